"""Timed requests to an OpenAI server, and the prompts of a RAG service: a prefix, chunks in random order, a question.

The prompts are random token ids, since only time counts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import httpx

from lmcache_rag.errors import EngineError
from lmcache_rag.ingest_key import ingest_key
from lmcache_rag.protocol import INGEST_KEY_HEADER, answer_statistics, chunk_tokens, ingests


@dataclass(frozen=True)
class Timed:
    """What a request took.

    Attributes:
        ttft_ms: To the first token.
        gaps_ms: Between the following tokens.
        total_ms: To the end.
        statistics: Reuse statistics, where the server sent them.
        text: The answer.
    """

    ttft_ms: float
    gaps_ms: tuple[float, ...]
    total_ms: float
    statistics: dict[str, Any] = field(default_factory=dict)
    text: str = ""


class TimedClient:
    """A server under measurement.

    Args:
        url: For example http://localhost:8000.
        api_key: Sent as a bearer token.
        timeout: Seconds.
    """

    def __init__(self, url: str, api_key: str = "", timeout: float = 300.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=timeout, limits=limits)
        self.model = ""
        self.chunk = 0

    async def open(self) -> None:
        """Find out which model it serves, and in chunks of how many tokens LMCache keeps KV there (0: unknown).

        Raises:
            EngineError: There is no such server.
        """
        try:
            answer = await self._http.get("/v1/models")
            answer.raise_for_status()
            served = answer.json()["data"]
            self.model = next(each["id"] for each in served if not each.get("parent"))  # adapters have one
        except (httpx.HTTPError, KeyError, StopIteration, TypeError, ValueError) as problem:
            raise EngineError(
                f"No OpenAI server answers at {self.url}: {problem}", remedy="Start one: lmcache-rag serve MODEL."
            ) from problem
        with contextlib.suppress(httpx.HTTPError):
            self.chunk = chunk_tokens((await self._http.get("/metrics")).text)

    async def ask(self, prompt: list[int], params: dict[str, Any] | None = None, *, tokens: int = 1) -> Timed:
        """Send a prompt of token ids and take the times of its tokens.

        Raises:
            EngineError: The server refused or broke off.
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
        await self._http.aclose()


def _draw(seed: str, count: int, vocabulary: int) -> tuple[int, ...]:
    rng = random.Random(seed)  # noqa: S311 - a workload, no secret
    return tuple(rng.randrange(300, vocabulary) for _ in range(count))


# A client that draws numbers between two tokens of another answer measures itself.
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
        """A prompt of about so many tokens; each number has chunks, an order and a question of its own."""
        order = self._order(tokens, number)
        ids = self._ids(self.prefix, "prefix")
        for place, index in enumerate(order):
            if place:
                ids += self._ids(self.separator, "separator")
            ids += self._ids(self.chunk, "chunk", index)
        return ids + self._ids(self.question, "question", number)

    def fresh(self, tokens: int, number: int) -> list[int]:
        """A prompt of exactly so many tokens that begins like no other and holds no chunk."""
        return list(_draw(f"{self.seed}:fresh:{number}", tokens, self.vocabulary))

    def arrivals(self, per_second: float, count: int) -> list[float]:
        """When to send so many requests, in seconds: a Poisson process that begins with one at 0."""
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
