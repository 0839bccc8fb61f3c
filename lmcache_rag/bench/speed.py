"""Time to the first token and throughput of a blending server, beside a baseline."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lmcache_rag.bench.client import Timed, TimedClient
from lmcache_rag.bench.workload import Workload


@dataclass(frozen=True)
class Arm:
    """One way to ask: a server and the request's parameters; `hot` names the chunks to it."""

    name: str
    url: str
    params: dict[str, Any] = field(default_factory=dict)
    hot: bool = False


@dataclass(frozen=True)
class Row:
    """One arm at one length.

    Attributes:
        arm: Its name.
        tokens: Length of the prompts.
        ttft_ms: Each request's time to the first token.
        sooner: The baseline's median over this one's; None for the baseline itself.
        steps: Medians of what the server says of itself.
    """

    arm: str
    tokens: int
    ttft_ms: tuple[float, ...]
    sooner: float | None
    steps: dict[str, float]

    @property
    def median(self) -> float:
        """Median time to the first token, in milliseconds."""
        return statistics.median(self.ttft_ms)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "median_ms": self.median, "min_ms": min(self.ttft_ms)}


STEPS = (
    "prefix_tokens",
    "hot_tokens",
    "reused_tokens",
    "recomputed_tokens",
    "computed_tokens",
    "lookup_ms",
    "load_ms",
    "blend_ms",
)


class SpeedBench:
    """Asks every arm the same prompts, one request at a time, in turn.

    Args:
        arms: What is compared; the first is the baseline.
        workload: What is asked.
        on_step: Called after every request.
    """

    def __init__(self, arms: Sequence[Arm], workload: Workload, on_step: Callable[[], None] = lambda: None) -> None:
        self.arms, self.workload, self._on_step = list(arms), workload, on_step
        self._clients = {arm.url: TimedClient(arm.url) for arm in arms}

    async def open(self) -> None:
        """Reach every server."""
        await asyncio.gather(*(client.open() for client in self._clients.values()))

    async def close(self) -> None:
        """Let go of the servers."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def ingest(self, url: str, *, at_once: int = 4) -> float:
        """Have every chunk's KV computed; returns tokens per second."""
        gate = asyncio.Semaphore(at_once)

        async def one(index: int) -> None:
            async with gate:
                await self._clients[url].ask(self.workload.ingest(index), {"lmcache_rag.blend": "off"})
                self._on_step()

        begin = time.perf_counter()
        await asyncio.gather(*map(one, range(self.workload.chunks)))
        return self.workload.chunks * self.workload.chunk / (time.perf_counter() - begin)

    async def latency(self, tokens: int, repeats: int, *, warm: int = 2) -> list[Row]:
        """Time to the first token of prompts of that length; the first `warm` of each arm are not counted."""
        taken: dict[str, list[Timed]] = {arm.name: [] for arm in self.arms}
        number = tokens * 1000
        for repeat in range(-warm, repeats):
            for arm in self.arms:
                # A prompt of its own for each arm: none may find another's in a prefix cache.
                number += 1
                done = await self._ask(arm, tokens, number)
                if repeat >= 0:
                    taken[arm.name].append(done)
                self._on_step()
        base = statistics.median(t.ttft_ms for t in taken[self.arms[0].name])
        rows = []
        for arm in self.arms:
            times = tuple(t.ttft_ms for t in taken[arm.name])
            found = [t.statistics for t in taken[arm.name] if t.statistics]
            steps = {step: statistics.median(f.get(step, 0) for f in found) for step in STEPS} if found else {}
            sooner = None if arm is self.arms[0] else base / statistics.median(times)
            rows.append(Row(arm.name, tokens, times, sooner, steps))
        return rows

    async def _ask(self, arm: Arm, tokens: int, number: int, answer: int = 1) -> Timed:
        params = arm.params | ({"lmcache_rag.chunks": self.workload.spans(tokens, number)} if arm.hot else {})
        return await self._clients[arm.url].ask(self.workload.prompt(tokens, number), params, tokens=answer)

    async def throughput(
        self, arm: Arm, tokens: int, requests: int, *, at_once: int = 16, answer: int = 16
    ) -> dict[str, Any]:
        """Requests per second with so many in flight, and the gaps between tokens."""
        gate, done = asyncio.Semaphore(at_once), []

        async def one(number: int) -> None:
            async with gate:
                done.append(await self._ask(arm, tokens, number, answer))
                self._on_step()

        begin = time.perf_counter()
        first = tokens * 1_000_000 + 7919 * self.arms.index(arm)
        await asyncio.gather(*(one(first + i) for i in range(requests)))
        seconds = time.perf_counter() - begin
        gaps = sorted(gap for t in done for gap in t.gaps_ms)
        return {
            "arm": arm.name,
            "tokens": tokens,
            "requests": requests,
            "at_once": at_once,
            "requests_per_second": requests / seconds,
            "ttft_ms_median": statistics.median(t.ttft_ms for t in done),
            "gap_ms_p50": gaps[len(gaps) // 2] if gaps else 0.0,
            "gap_ms_p99": gaps[int(len(gaps) * 0.99)] if gaps else 0.0,
        }
