"""What a blending server takes, one request at a time and under load, beside a baseline."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lmcache_rag import protocol
from lmcache_rag.bench.client import Timed, TimedClient
from lmcache_rag.bench.summary import Pairs, steps, under_load
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


_STORED_S = 0.3  # until what an ingestion stores behind its answers is stored
_STORED_S_PER_TOKEN = 15e-6  # the same for a single prompt


def new_chunks(at_once: int) -> int:
    """How many chunks an ingestion has: of fewer, those at its ends, which have no company, are too large a share."""
    return max(2 * at_once, 48)


class SpeedBench:
    """Asks every arm prompts of the same kind: in turn where only one request runs, one arm after another under load.

    What fills LMCache, and so may drive the chunks out, comes last: ingestion() and nothing_cached().

    Args:
        arms: What is compared; the first is the baseline.
        workload: What is asked.
        on_step: Called after every request.
    """

    def __init__(self, arms: Sequence[Arm], workload: Workload, on_step: Callable[[], None] = lambda: None) -> None:
        self.arms, self.workload, self._on_step = list(arms), workload, on_step
        self._clients = {arm.url: TimedClient(arm.url) for arm in arms}

    async def open(self) -> None:
        """Reach every server. The prompts' prefix is made to fill whole chunks of LMCache's."""
        await asyncio.gather(*(client.open() for client in self._clients.values()))
        chunk = max(client.chunk for client in self._clients.values())
        if chunk:
            self.workload = replace(self.workload, prefix=-(-self.workload.prefix // chunk) * chunk)

    async def close(self) -> None:
        """Let go of the servers."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def ingest(self, url: str, *, at_once: int = 4) -> float:
        """Have every chunk's KV computed; returns tokens per second."""
        return await self._ingest(Arm("", url), self.workload, at_once)

    async def _ingest(self, arm: Arm, workload: Workload, at_once: int) -> float:
        gate = asyncio.Semaphore(at_once)
        params = {**protocol.NO_BLEND, protocol.INGEST: True, protocol.PREFIX: workload.prefix} | arm.params
        prompts = [workload.ingest(index) for index in range(workload.chunks)]  # their drawing is not measured

        async def one(prompt: list[int]) -> None:
            async with gate:
                await self._clients[arm.url].ask(prompt, params)
                self._on_step()

        begin = time.perf_counter()
        await asyncio.gather(*map(one, prompts))
        return workload.chunks * workload.chunk / (time.perf_counter() - begin)

    async def ingestion(self, base: Arm, ours: Arm, *, at_once: int = 16, repeats: int = 2) -> list[dict[str, Any]]:
        """Tokens per second of ingesting chunks that nobody has seen, both in turn; the first time is not counted."""
        chunks = new_chunks(at_once)
        rates: dict[str, list[float]] = {base.name: [], ours.name: []}
        for repeat in range(-1, repeats):
            for arm in (base, ours) if repeat % 2 else (ours, base):
                # Each has chunks of its own: the two may be one server.
                seed = f"{self.workload.seed}:ingestion:{at_once}:{repeat}:{arm.name}"
                rate = await self._ingest(arm, replace(self.workload, chunks=chunks, seed=seed), at_once)
                if repeat >= 0:
                    rates[arm.name].append(rate)
                await asyncio.sleep(_STORED_S)
        usual = statistics.median(rates[base.name])
        return [
            {
                "arm": arm.name,
                "chunks": chunks,
                "at_once": at_once,
                "tokens_per_second": rates[arm.name],
                "of_base": statistics.median(rates[arm.name]) / usual,
            }
            for arm in (base, ours)
        ]

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
            sooner = None if arm is self.arms[0] else base / statistics.median(times)
            rows.append(Row(arm.name, tokens, times, sooner, steps(taken[arm.name])))
        return rows

    async def _ask(self, arm: Arm, tokens: int, number: int, answer: int = 1) -> Timed:
        params = {protocol.PREFIX: self.workload.prefix} | arm.params  # as our client asks
        params |= {protocol.CHUNKS: self.workload.spans(tokens, number)} if arm.hot else {}
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
        return {
            "arm": arm.name,
            "tokens": tokens,
            "requests": requests,
            "at_once": at_once,
            "requests_per_second": requests / seconds,
            **under_load(done),
        }

    async def rate(
        self, arm: Arm, tokens: int, requests: int, *, per_second: float, answer: int = 16
    ) -> dict[str, Any]:
        """So many requests a second whether or not answers come: the same random moments for every arm.

        Args:
            arm: What is asked.
            tokens: Length of the prompts.
            requests: How many.
            per_second: Mean number of requests sent a second.
            answer: Tokens of an answer; the gaps between them are taken.

        Returns:
            Times in milliseconds; `late_ms_max` is how much later than meant this client sent a request.
        """
        done: list[Timed] = []
        late: list[float] = []
        begin = time.perf_counter()

        async def one(number: int, moment: float) -> None:
            await asyncio.sleep(max(0.0, begin + moment - time.perf_counter()))
            late.append(time.perf_counter() - begin - moment)
            done.append(await self._ask(arm, tokens, number, answer))
            self._on_step()

        first = tokens * 2_000_000 + 7919 * self.arms.index(arm)
        moments = self.workload.arrivals(per_second, requests)
        await asyncio.gather(*(one(first + i, moment) for i, moment in enumerate(moments)))
        seconds = time.perf_counter() - begin
        return {
            "arm": arm.name,
            "tokens": tokens,
            "requests": requests,
            "per_second": per_second,
            "requests_per_second": requests / seconds,
            **under_load(done),
            "late_ms_max": max(late) * 1e3,
        }

    async def nothing_cached(self, base: Arm, ours: Arm, tokens: int, pairs: int, *, warm: int = 2) -> Pairs:
        """Prompts that share no token with any other, in pairs whose order changes."""
        times: dict[str, list[float]] = {base.name: [], ours.name: []}
        number = tokens * 1000
        for pair in range(-warm, pairs):
            for arm in (base, ours) if pair % 2 else (ours, base):
                number += 1
                done = await self._clients[arm.url].ask(self.workload.fresh(tokens, number), arm.params)
                if pair >= 0:
                    times[arm.name].append(done.ttft_ms)
                self._on_step()
                # Storing the KV goes on behind the answer; it is no part of the next one's time. Both wait alike.
                await asyncio.sleep(tokens * _STORED_S_PER_TOKEN)
        return Pairs("nothing cached", tokens, tuple(times[base.name]), tuple(times[ours.name]))

    async def floor(self, base: Arm, ours: Arm, lengths: Sequence[int], repeats: int, *, warm: int = 2) -> list[Pairs]:
        """What HTTP and scheduling take: 16 tokens, and prompts whose KV vLLM has to the last block."""
        found = []
        for name, tokens in (("16 tokens", 16), *((f"{n} tokens again", n) for n in lengths)):
            prompt = self.workload.fresh(tokens, tokens)
            times: dict[str, list[float]] = {base.name: [], ours.name: []}
            for repeat in range(-warm, repeats):
                for arm in (base, ours):
                    done = await self._clients[arm.url].ask(prompt, arm.params)
                    if repeat >= 0:
                        times[arm.name].append(done.ttft_ms)
                    self._on_step()
            found.append(Pairs(name, tokens, tuple(times[base.name]), tuple(times[ours.name])))
        return found
