"""Timed requests to an OpenAI server, and the prompts of a RAG service: a prefix, chunks in random order, a question.

The prompts are random token ids, since only time counts.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import httpx

from lmcache_rag.credentials import DIRECT, ingest_key
from lmcache_rag.engines.vllm_client import VLLMClient
from lmcache_rag.errors import EngineError
from lmcache_rag.protocol import INGEST_KEY_HEADER, answer_statistics, chunk_tokens, ingests


@dataclass(frozen=True)
class Timed:
    """Times of one request.

    Attributes:
        ttft_ms: To the first token.
        gaps_ms: Between the following tokens.
        total_ms: To the end.
        statistics: Reuse statistics, if the server sent them.
        text: The answer.
    """

    ttft_ms: float
    gaps_ms: tuple[float, ...]
    total_ms: float
    statistics: dict[str, Any] = field(default_factory=dict)
    text: str = ""


class TimedClient:
    """A server under measurement. Requests are read from the wire here, so that nothing else is measured.

    Args:
        url: For example http://localhost:8000.
        api_key: Sent as a bearer token; "": from the environment.
        timeout: Seconds.
    """

    def __init__(self, url: str, api_key: str = "", timeout: float = 300.0) -> None:
        self._client = VLLMClient(url, timeout=timeout, attempts=1, api_key=api_key)
        self.url = self._client.url
        headers = self._client.headers
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=timeout, limits=limits, mounts=DIRECT
        )
        self.model = ""
        self.chunk = 0

    async def open(self) -> None:
        """Find out which model it serves, and the tokens of its LMCache chunks (0: unknown).

        Raises:
            EngineError: There is no such server.
        """
        self.model = (await asyncio.to_thread(self._client.first_model)).name
        self.chunk = chunk_tokens(await asyncio.to_thread(self._client.metrics))

    async def ask(self, prompt: list[int], params: dict[str, Any] | None = None, *, tokens: int = 1) -> Timed:
        """Send a prompt of token ids and take the times of its tokens.

        Raises:
            EngineError: The server rejected the request or closed the connection.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": tokens > 1,
        }
        if params:
            body["kv_transfer_params"] = params
        begin = time.perf_counter()
        try:
            if tokens > 1:
                return await self._stream(body, begin)
            key = ingest_key() if ingests(params) else ""
            headers = {INGEST_KEY_HEADER: key} if key else {}
            answer = await self._http.post("/v1/completions", json=body, headers=headers)
            answer.raise_for_status()
        except httpx.HTTPError as problem:
            detail = getattr(getattr(problem, "response", None), "text", "")
            raise EngineError(f"{self.url} failed: {problem} {detail[:300]}".strip()) from problem
        took = (time.perf_counter() - begin) * 1e3
        data = answer.json()
        statistics = answer_statistics(data) or {}
        return Timed(took, (), took, statistics, data["choices"][0]["text"])

    async def _stream(self, body: dict[str, Any], begin: float) -> Timed:
        marks: list[float] = []
        text = ""
        statistics: dict[str, Any] = {}
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.is_error:
                await answer.aread()
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                data = json.loads(line[6:])
                statistics = answer_statistics(data) or statistics
                if data.get("choices"):
                    marks.append(time.perf_counter())
                    text += data["choices"][0]["text"]
        if not marks:
            raise EngineError(f"{self.url} sent no token.")
        gaps = tuple((b - a) * 1e3 for a, b in itertools.pairwise(marks))
        return Timed((marks[0] - begin) * 1e3, gaps, (time.perf_counter() - begin) * 1e3, statistics, text)

    async def close(self) -> None:
        """Close the connections."""
        self._client.close()
        await self._http.aclose()


def _draw(seed: str, count: int, vocabulary: int) -> tuple[int, ...]:
    rng = random.Random(seed)  # noqa: S311 - a workload, not a secret
    return tuple(rng.randrange(300, vocabulary) for _ in range(count))


# Cached: drawing numbers between two tokens of another answer would count to its times.
_drawn = lru_cache(maxsize=256)(_draw)


@dataclass(frozen=True)
class Workload:
    """The prompts of a measurement.

    Args:
        vocabulary: Token ids are drawn below this.
        prefix: Tokens of the shared prefix; a multiple of LMCache's chunk.
        chunk: Tokens of a chunk.
        separator: Tokens between chunks.
        question: Tokens after the chunks.
        chunks: How many different chunks there are.
        seed: Makes it repeatable.
    """

    vocabulary: int = 30000
    prefix: int = 64
    chunk: int = 1024
    separator: int = 2
    question: int = 32
    chunks: int = 40
    seed: int | str = 0

    def _ids(self, count: int, *name: object) -> list[int]:
        return list(_drawn(f"{self.seed}:{name}", count, self.vocabulary))

    def ingest(self, index: int) -> list[int]:
        """The prompt that computes one chunk's KV."""
        return self._ids(self.prefix, "prefix") + self._ids(self.chunk, "chunk", index)

    def prompt(self, tokens: int, number: int) -> list[int]:
        """A prompt of about `tokens` tokens; each number gives different chunks, order and question."""
        order = self._order(tokens, number)
        ids = self._ids(self.prefix, "prefix")
        for place, index in enumerate(order):
            if place:
                ids += self._ids(self.separator, "separator")
            ids += self._ids(self.chunk, "chunk", index)
        return ids + self._ids(self.question, "question", number)

    def fresh(self, tokens: int, number: int) -> list[int]:
        """A prompt of exactly `tokens` tokens, without chunks and with a unique beginning."""
        return list(_draw(f"{self.seed}:fresh:{number}", tokens, self.vocabulary))

    def arrivals(self, per_second: float, count: int) -> list[float]:
        """When to send `count` requests, in seconds: a Poisson process that begins with one at 0."""
        rng = random.Random("arrivals")  # noqa: S311
        gaps = [rng.expovariate(per_second) for _ in range(count - 1)]
        return list(itertools.accumulate(gaps, initial=0.0))

    def spans(self, tokens: int, number: int) -> list[list[int]]:
        """Where that prompt's chunks are: [start, end] in tokens."""
        step = self.chunk + self.separator
        starts = [self.prefix + place * step for place in range(len(self._order(tokens, number)))]
        return [[start, start + self.chunk] for start in starts]

    def _order(self, tokens: int, number: int) -> list[int]:
        count = max(1, min(self.chunks, (tokens - self.prefix - self.question) // (self.chunk + self.separator)))
        return random.Random(f"{self.seed}:order:{number}").sample(range(self.chunks), count)  # noqa: S311
