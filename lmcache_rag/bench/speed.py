"""The speed of a blending server against a baseline, one request at a time and under load."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lmcache_rag import protocol
from lmcache_rag.bench.client import Timed, TimedClient, Workload

WARM = 2  # requests of each kind that are not counted
INGESTIONS = 2  # measured ingestions of each server
OF_BASELINE = 0.8  # of its throughput: a load that it can sustain
_STORED_S = 0.3  # until LMCache has stored the KV of an ingestion's last answers
_STORED_S_PER_TOKEN = 15e-6  # the same for a single prompt
STEPS = (
    "prefix_tokens",
    "hot_tokens",
    "reused_tokens",
    "recomputed_tokens",
    "computed_tokens",
    "lookup_ms",
    "load_ms",
    protocol.SELECT_MS,
    "blend_ms",
)


@dataclass(frozen=True)
class SpeedConfig:
    """What to measure besides the time to the first token of every arm.

    Attributes:
        tokens: Lengths of the prompts; under load the first one.
        repeats: Measured requests of each kind.
        throughput: Requests a second with in_flight requests at a time.
        rate: Requests a second; 0: 0.8 of the baseline's throughput; None: not measured.
        ingestion: Tokens per second of the chunks' prefill.
        nothing_cached: Prompts without any cached part.
        floor: Time of HTTP and scheduling.
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


@dataclass(frozen=True)
class Arm:
    """One way to send prompts: a server and request parameters; `hot` names the chunks to it."""

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
        sooner: Speedup: the baseline's median over this one's; None for the baseline itself.
        steps: Medians of the server's statistics.
        decisions: What the server decided of each request that had cached chunks, see lmcache_rag.protocol.Decision.
    """

    arm: str
    tokens: int
    ttft_ms: tuple[float, ...]
    sooner: float | None
    steps: dict[str, float]
    decisions: tuple[str, ...] = ()

    @property
    def median(self) -> float:
        """Median time to the first token, in milliseconds."""
        return statistics.median(self.ttft_ms)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "median_ms": self.median, "min_ms": min(self.ttft_ms)}


def new_chunks(at_once: int) -> int:
    """How many chunks an ingestion needs, so that those at its ends, which run alone, are a small share."""
    return max(2 * at_once, 48)


@dataclass
class SpeedResults:
    """Results; empty where they were not requested."""

    ttft: list[Row] = field(default_factory=list)
    throughput: list[dict[str, Any]] = field(default_factory=list)
    rate: list[dict[str, Any]] = field(default_factory=list)
    ingestion: list[dict[str, Any]] = field(default_factory=list)
    nothing_cached: list[Pairs] = field(default_factory=list)
    floor: list[Pairs] = field(default_factory=list)

    def as_list(self) -> list[dict[str, Any]]:
        """For JSON: one row for each figure, with its kind under `measure`."""
        rows = [{"measure": "ttft"} | row.as_dict() for row in self.ttft]
        rows += [{"measure": "throughput"} | row for row in self.throughput]
        rows += [{"measure": "rate"} | row for row in self.rate]
        rows += [{"measure": "ingestion"} | row for row in self.ingestion]
        rows += [{"measure": "nothing cached"} | row.as_dict() for row in self.nothing_cached]
        return rows + [{"measure": "floor"} | row.as_dict() for row in self.floor]


# A run


def count_requests(arms: Sequence[Arm], workload: Workload, config: SpeedConfig) -> int:
    """How many requests measure() sends."""
    each, lengths = config.repeats + WARM, len(config.tokens)
    urls = len({arm.url for arm in arms})
    loaded = len(_throughput_arms(arms, config)) + (len(arms) if config.rate is not None else 0)
    return (
        urls * workload.chunks
        + lengths * len(arms) * each
        + loaded * config.requests
        + config.ingestion * 2 * (1 + INGESTIONS) * new_chunks(config.in_flight)
        + config.nothing_cached * lengths * 2 * each
        + config.floor * (lengths + 1) * 2 * each
    )


async def measure(
    arms: Sequence[Arm],
    engine: Arm,
    workload: Workload,
    config: SpeedConfig,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> SpeedResults:
    """Measure everything in the configuration, in an order in which no part affects a later one.

    Args:
        arms: The arms to compare; the first is the baseline.
        engine: The blending server, used like any vLLM server.
        workload: The prompts.
        config: What to measure.
        on_step: Called after each request with how many are done and how many there are in all.

    Raises:
        EngineError: A server cannot be reached or fails.
    """
    done, total = itertools.count(1), count_requests(arms, workload, config)
    bench, found = SpeedBench(arms, workload, lambda: on_step(next(done), total)), SpeedResults()
    await bench.open()
    try:
        for url in {arm.url for arm in bench.arms}:
            await bench.ingest(url)
        for length in config.tokens:
            found.ttft += await bench.latency(length, config.repeats, warm=WARM)
        await _measure_under_load(bench, config, found)
        pair = (bench.arms[0], engine)
        if config.floor:
            found.floor = await bench.floor(*pair, config.tokens, config.repeats, warm=WARM)
        # From here on LMCache fills up with prompts that are not sent again.
        if config.ingestion:
            found.ingestion = await bench.ingestion(*pair, at_once=config.in_flight, repeats=INGESTIONS)
        if config.nothing_cached:
            for length in config.tokens:
                found.nothing_cached.append(await bench.nothing_cached(*pair, length, config.repeats, warm=WARM))
    finally:
        await bench.close()
    return found


async def _measure_under_load(bench: SpeedBench, config: SpeedConfig, found: SpeedResults) -> None:
    tokens = config.tokens[0]
    for arm in _throughput_arms(bench.arms, config):
        found.throughput.append(await bench.throughput(arm, tokens, config.requests, at_once=config.in_flight))
    if config.rate is None:
        return
    per_second = config.rate or OF_BASELINE * found.throughput[0]["requests_per_second"]
    for arm in bench.arms:
        found.rate.append(await bench.rate(arm, tokens, config.requests, per_second=per_second))


def _throughput_arms(arms: Sequence[Arm], config: SpeedConfig) -> Sequence[Arm]:
    """The arms whose throughput is measured; the baseline's gives the rate where none is set."""
    if config.throughput:
        return arms
    return arms[:1] if config.rate == 0 else []


class SpeedBench:
    """Sends prompts of the same kind to every arm: in turn if one request runs at a time, arm after arm under load.

    Measurements that fill LMCache, and may evict the chunks, come last: ingestion() and nothing_cached().

    Args:
        arms: The arms to compare; the first is the baseline.
        workload: The prompts.
        on_step: Called after every request.
    """

    def __init__(self, arms: Sequence[Arm], workload: Workload, on_step: Callable[[], None] = lambda: None) -> None:
        self.arms, self.workload, self._on_step = list(arms), workload, on_step
        self._clients = {arm.url: TimedClient(arm.url) for arm in arms}

    async def open(self) -> None:
        """Connect to every server. The prompts' prefix is padded to whole LMCache chunks."""
        await asyncio.gather(*(client.open() for client in self._clients.values()))
        chunk = max(client.chunk for client in self._clients.values())
        if chunk:
            self.workload = replace(self.workload, prefix=-(-self.workload.prefix // chunk) * chunk)

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def ingest(self, url: str, *, at_once: int = 4) -> float:
        """Compute every chunk's KV; returns tokens per second."""
        return await self._ingest(Arm("", url), self.workload, at_once)

    async def _ingest(self, arm: Arm, workload: Workload, at_once: int) -> float:
        gate = asyncio.Semaphore(at_once)
        params = {**protocol.NO_BLEND, protocol.INGEST: True, protocol.PREFIX: workload.prefix} | arm.params
        prompts = [workload.ingest(index) for index in range(workload.chunks)]  # drawn before the measurement

        async def one(prompt: list[int]) -> None:
            async with gate:
                await self._clients[arm.url].ask(prompt, params)
                self._on_step()

        begin = time.perf_counter()
        await asyncio.gather(*map(one, prompts))
        return workload.chunks * workload.chunk / (time.perf_counter() - begin)

    async def ingestion(self, base: Arm, ours: Arm, *, at_once: int = 16, repeats: int = 2) -> list[dict[str, Any]]:
        """Tokens per second of ingesting new chunks, both arms in turn; the first ingestion is not counted."""
        chunks = new_chunks(at_once)
        rates: dict[str, list[float]] = {base.name: [], ours.name: []}
        for repeat in range(-1, repeats):
            for arm in (base, ours) if repeat % 2 else (ours, base):
                # Each has different chunks: the two may be one server.
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
                # A different prompt for each arm: none may find another's in a prefix cache.
                number += 1
                done = await self.ask(arm, tokens, number)
                if repeat >= 0:
                    taken[arm.name].append(done)
                self._on_step()
        base = statistics.median(t.ttft_ms for t in taken[self.arms[0].name])
        rows = []
        for arm in self.arms:
            times = tuple(t.ttft_ms for t in taken[arm.name])
            speedup = None if arm is self.arms[0] else base / statistics.median(times)
            decided = tuple(str(t.statistics.get(protocol.DECISION, "")) for t in taken[arm.name])
            rows.append(Row(arm.name, tokens, times, speedup, steps(taken[arm.name]), tuple(filter(None, decided))))
        return rows

    async def ask(self, arm: Arm, tokens: int, number: int, answer: int = 1) -> Timed:
        """Send the prompt of that number, of about so many tokens, as this arm does."""
        params = {protocol.PREFIX: self.workload.prefix} | arm.params  # as our client asks
        params |= {protocol.CHUNKS: self.workload.spans(tokens, number)} if arm.hot else {}
        return await self._clients[arm.url].ask(self.workload.prompt(tokens, number), params, tokens=answer)

    async def throughput(
        self, arm: Arm, tokens: int, requests: int, *, at_once: int = 16, answer: int = 16
    ) -> dict[str, Any]:
        """Requests per second with `at_once` in flight, and the gaps between tokens."""
        gate, done = asyncio.Semaphore(at_once), []

        async def one(number: int) -> None:
            async with gate:
                done.append(await self.ask(arm, tokens, number, answer))
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
        """Send `per_second` requests a second, independent of the answers: at the same random times for every arm.

        Args:
            arm: The prompts.
            tokens: Length of the prompts.
            requests: How many.
            per_second: Mean number of requests sent a second.
            answer: Tokens of an answer; the gaps between them are taken.

        Returns:
            Times in milliseconds; `late_ms_max` is the largest delay with which this client sent a request.
        """
        done: list[Timed] = []
        delays: list[float] = []
        begin = time.perf_counter()

        async def one(number: int, moment: float) -> None:
            await asyncio.sleep(max(0.0, begin + moment - time.perf_counter()))
            delays.append(time.perf_counter() - begin - moment)
            done.append(await self.ask(arm, tokens, number, answer))
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
            "late_ms_max": max(delays) * 1e3,
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
                # The KV is stored after the answer, which must not count to the next one's time. Both wait alike.
                await asyncio.sleep(tokens * _STORED_S_PER_TOKEN)
        return Pairs("nothing cached", tokens, tuple(times[base.name]), tuple(times[ours.name]))

    async def floor(self, base: Arm, ours: Arm, lengths: Sequence[int], repeats: int, *, warm: int = 2) -> list[Pairs]:
        """The time of HTTP and scheduling: 16 tokens, and prompts whose KV vLLM has completely."""
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


# Summaries of timed requests


def steps(done: Iterable[Timed]) -> dict[str, float]:
    """Medians of the server's statistics; empty if it sent none."""
    found = [timed.statistics for timed in done if timed.statistics]
    return {step: statistics.median(each.get(step, 0) for each in found) for step in STEPS} if found else {}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies, one of them; 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def under_load(done: Sequence[Timed]) -> dict[str, Any]:
    """Times to the first token and gaps between tokens of requests that ran at the same time, in milliseconds."""
    first = [timed.ttft_ms for timed in done]
    gaps = [gap for timed in done for gap in timed.gaps_ms]
    return {
        "ttft_ms_median": statistics.median(first),
        "ttft_ms_p99": percentile(first, 0.99),
        "gap_ms_p50": percentile(gaps, 0.5),
        "gap_ms_p90": percentile(gaps, 0.9),
        "gap_ms_p99": percentile(gaps, 0.99),
        "gap_ms_max": max(gaps, default=0.0),
        "steps": steps(done),
        "ttft_ms": [round(each, 2) for each in first],
        "gaps_ms": [round(each, 2) for each in gaps],
    }


@dataclass(frozen=True)
class Pairs:
    """The same kind of prompt sent to two servers in turn.

    Attributes:
        prompt: Which kind.
        tokens: Its length.
        base_ms: The baseline's times to the first token.
        ours_ms: The other's, in the same order: each measured right after or before the baseline's.
    """

    prompt: str
    tokens: int
    base_ms: tuple[float, ...]
    ours_ms: tuple[float, ...]

    @property
    def of_medians(self) -> float:
        """How much longer the other's median is, as a share of the baseline's: 0.03 is 3% longer."""
        return statistics.median(self.ours_ms) / statistics.median(self.base_ms) - 1

    @property
    def of_pairs(self) -> float:
        """The median of the same share, pair by pair: drifts over minutes cancel out."""
        return statistics.median(ours / base for base, ours in zip(self.base_ms, self.ours_ms, strict=True)) - 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        medians = {
            "base_median_ms": statistics.median(self.base_ms),
            "ours_median_ms": statistics.median(self.ours_ms),
        }
        return {**asdict(self), **medians, "of_medians": self.of_medians, "of_pairs": self.of_pairs}
