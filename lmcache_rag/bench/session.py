"""One run of everything that was asked for, in the order that keeps the parts out of each other's way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.bench.speed import Arm, Row, SpeedBench, new_chunks
from lmcache_rag.bench.summary import Pairs
from lmcache_rag.bench.workload import Workload

WARM = 2  # requests of each kind that are not counted
INGESTIONS = 2  # of each server that count
OF_BASELINE = 0.8  # of its throughput: a load that it carries


@dataclass(frozen=True)
class Wanted:
    """What to measure beside the time to the first token of every arm.

    Attributes:
        tokens: Lengths of the prompts; under load the first one.
        repeats: Requests of each kind that count.
        throughput: With so many in flight.
        rate: At so many requests a second; 0: at 0.8 of the baseline's throughput; None: not at all.
        ingestion: Tokens per second of the chunks' prefill.
        nothing_cached: Prompts of which nothing is cached.
        floor: What HTTP and scheduling take.
        requests: Of each arm under load.
        in_flight: Requests at a time.
    """

    tokens: tuple[int, ...]
    repeats: int = 10
    throughput: bool = False
    rate: float | None = None
    ingestion: bool = False
    nothing_cached: bool = False
    floor: bool = False
    requests: int = 64
    in_flight: int = 16


@dataclass
class Found:
    """What came of it; empty where it was not wanted."""

    ttft: list[Row] = field(default_factory=list)
    throughput: list[dict[str, Any]] = field(default_factory=list)
    rate: list[dict[str, Any]] = field(default_factory=list)
    ingestion: list[dict[str, Any]] = field(default_factory=list)
    nothing_cached: list[Pairs] = field(default_factory=list)
    floor: list[Pairs] = field(default_factory=list)

    def as_list(self) -> list[dict[str, Any]]:
        """For JSON: one row for each figure, with `measure` saying which kind it is."""
        rows = [{"measure": "ttft"} | row.as_dict() for row in self.ttft]
        rows += [{"measure": "throughput"} | row for row in self.throughput]
        rows += [{"measure": "rate"} | row for row in self.rate]
        rows += [{"measure": "ingestion"} | row for row in self.ingestion]
        rows += [{"measure": "nothing cached"} | row.as_dict() for row in self.nothing_cached]
        return rows + [{"measure": "floor"} | row.as_dict() for row in self.floor]


class SpeedSession:
    """Measures it.

    Args:
        arms: What is compared; the first is the baseline.
        engine: The blending server, asked as a client that knows nothing of blending asks it.
        workload: What is asked.
        wanted: What is measured.
        on_step: Called after each request with how many are done and how many there are in all.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        engine: Arm,
        workload: Workload,
        wanted: Wanted,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._base, self._engine, self._wanted = arms[0], engine, wanted
        self._bench = SpeedBench(arms, workload, self._step)
        self._done, self._on_step = 0, on_step

    def _step(self) -> None:
        self._done += 1
        self._on_step(self._done, self.total)

    @property
    def total(self) -> int:
        """Requests in all."""
        want, bench = self._wanted, self._bench
        each, lengths = want.repeats + WARM, len(want.tokens)
        urls = len({arm.url for arm in bench.arms})
        loaded = len(self._at_once()) + (len(bench.arms) if want.rate is not None else 0)
        return (
            urls * bench.workload.chunks
            + lengths * len(bench.arms) * each
            + loaded * want.requests
            + want.ingestion * 2 * (1 + INGESTIONS) * new_chunks(want.in_flight)
            + want.nothing_cached * lengths * 2 * each
            + want.floor * (lengths + 1) * 2 * each
        )

    async def run(self) -> Found:
        """Measure.

        Raises:
            EngineError: A server cannot be reached or fails.
        """
        bench, want, found = self._bench, self._wanted, Found()
        await bench.open()
        try:
            for url in {arm.url for arm in bench.arms}:
                await bench.ingest(url)
            for length in want.tokens:
                found.ttft += await bench.latency(length, want.repeats, warm=WARM)
            await self._under_load(found)
            pair = (self._base, self._engine)
            if want.floor:
                found.floor = await bench.floor(*pair, want.tokens, want.repeats, warm=WARM)
            # From here on LMCache is filled with what nobody asks for again.
            if want.ingestion:
                found.ingestion = await bench.ingestion(*pair, at_once=want.in_flight, repeats=INGESTIONS)
            if want.nothing_cached:
                for length in want.tokens:
                    found.nothing_cached.append(await bench.nothing_cached(*pair, length, want.repeats, warm=WARM))
        finally:
            await bench.close()
        return found

    def _at_once(self) -> list[Arm]:
        """Whose throughput is measured; the baseline's gives the rate where none was named."""
        if self._wanted.throughput:
            return self._bench.arms
        return [self._base] if self._wanted.rate == 0 else []

    async def _under_load(self, found: Found) -> None:
        bench, want = self._bench, self._wanted
        tokens = want.tokens[0]
        for arm in self._at_once():
            found.throughput.append(await bench.throughput(arm, tokens, want.requests, at_once=want.in_flight))
        if want.rate is None:
            return
        per_second = want.rate or OF_BASELINE * found.throughput[0]["requests_per_second"]
        for arm in bench.arms:
            found.rate.append(await bench.rate(arm, tokens, want.requests, per_second=per_second))
