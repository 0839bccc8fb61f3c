"""One request to an OpenAI server, timed."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from lmcache_rag.credentials import ingest_key
from lmcache_rag.engines.vllm_client import VLLMClient
from lmcache_rag.errors import EngineError
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
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=timeout, limits=limits)
        self.model = ""
        self.chunk = 0

    async def open(self) -> None:
        """Find out which model it serves, and in chunks of how many tokens LMCache keeps KV there (0: it does not say).

        Raises:
            EngineError: There is no such server.
        """
        self.model = (await asyncio.to_thread(self._client.first_model)).name
        self.chunk = chunk_tokens(await asyncio.to_thread(self._client.metrics))

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
        self._client.close()
        await self._http.aclose()
