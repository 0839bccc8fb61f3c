"""Requests of every kind, for minutes, while the servers are disturbed: does any fail, hang, differ or leak?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

import httpx

from lmcache_rag.bench.exact import Query, Trace, TracedServer, difference, questions
from lmcache_rag.bench.hostile import Hostile, HostileError, send
from lmcache_rag.credentials import DIRECT, lmcache_headers
from lmcache_rag.engines.base import BlendOptions, QueryPrompt, Sampling
from lmcache_rag.errors import LMCacheRAGError
from lmcache_rag.protocol import DEFAULT_RATIO, NEAR_TIE, answer_statistics
from lmcache_rag.serving.process import descendants

Kind: TypeAlias = Literal["blended", "ratio 1", "unblended", "aborted"]
LMCACHE_URL = "http://127.0.0.1:8089"  # as lmcache-rag serve starts it
MAY_GROW_MB = (
    64.0  # of a process, from a tenth of the time on: engines that leaked nothing grew by 14 and 21 in 6 minutes
)
LEAST = 20  # requests, however long they take
MOST_NOISE = 1.0  # nats: a server that differs from itself by more is wrong
SHARES: dict[Kind, float] = {"blended": 0.45, "ratio 1": 0.15, "unblended": 0.2, "aborted": 0.2}
OPTIONS: dict[Kind, BlendOptions] = {
    "blended": BlendOptions("query", DEFAULT_RATIO, always=True),
    "ratio 1": BlendOptions("query", 1.0, always=True),
    "unblended": BlendOptions(enabled=False),
    "aborted": BlendOptions("query", DEFAULT_RATIO, always=True),
}
# Gauges of vLLM on /metrics: requests, and used blocks that no prefix cache explains.
VLLM_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
# Numbers of LMCache 0.5.6 on /status, by their place there; "*" is each of its memories, which are added up. Its locks
# expire by themselves after minutes, so that what is left of a request shows for long enough. Its sessions are not
# among these: a store that comes after its request's end opens another, which holds no lock and ends in ten minutes.
LMCACHE_GAUGES = (
    "active_prefetch_jobs",
    "active_cb_lookups",
    "storage_manager.l1_managers.*.read_locked_count",
    "storage_manager.l1_managers.*.write_locked_count",
    "storage_manager.prefetch_controller.in_flight_request_count",
    "storage_manager.prefetch_controller.submission_queue_size",
    "storage_manager.prefetch_controller.pending_queue_size",
    "storage_manager.prefetch_controller.completed_results_count",
)
GAUGES = (*VLLM_GAUGES, *(f"lmcache:{place}" for place in LMCACHE_GAUGES))
SETTLE_S = 15.0  # for work after the last answer: KV is stored, and aborted requests are cleaned up
PROC = Path("/proc")
LISTENS = "0A"


@dataclass
class SoakReport:
    """The results.

    Attributes:
        requests: How many of each kind completed.
        failed: The errors of those that did not complete.
        reused: Requests that reused chunk KV.
        fallbacks: The server's reasons, of requests that it computed in full instead.
        differing: Answers at ratio 1 or without blending that differ from the full prefill's and not at a near tie:
            the kind, the place, and how much likelier, in nats, the full prefill's token was there.
        near_ties: How many of each kind differ at one.
        slowest_s: Longest request.
        gauges: What should be zero at the end, from vLLM's /metrics and LMCache's /status, see
            GAUGES; None: it was not reported.
        memory_mb: Resident megabytes of the watched processes, at a tenth of the time and at the end.
        may_grow_mb: Growth up to this many megabytes is not a leak.
        hostile: Hostile requests by outcome: "200", "400", "aborted", or "other" for another rejection.
        hostile_failed: The errors of those at which the server failed or did not answer in time.
        engine_cores: Process ids of vLLM's EngineCore below the watched processes, at the beginning and at the end.
        pauses: How often LMCache was paused, and how often it should have been.
    """

    requests: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    reused: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    differing: list[dict[str, Any]] = field(default_factory=list)
    near_ties: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    gauges: dict[str, float | None] = field(default_factory=dict)
    memory_mb: dict[int, list[float]] = field(default_factory=dict)
    may_grow_mb: float = MAY_GROW_MB
    hostile: Counter[str] = field(default_factory=Counter)
    hostile_failed: list[str] = field(default_factory=list)
    engine_cores: list[list[int]] = field(default_factory=list)
    pauses: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def noise(self) -> float:
        """How much, in nats, the server differs from itself without blending: other batches sum in another order."""
        gaps = [abs(each["gap"]) for each in self.differing if each["kind"] == "unblended" and each["gap"] is not None]
        return max((gap for gap in gaps if gap <= MOST_NOISE), default=NEAR_TIE)

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """The differing answers that `noise` does not explain."""
        return [each for each in self.differing if each["gap"] is None or abs(each["gap"]) > self.noise + 1e-4]

    @property
    def left(self) -> dict[str, float]:
        """Gauges that are not zero at the end."""
        return {name: value for name, value in self.gauges.items() if value}

    @property
    def unknown(self) -> list[str]:
        """Gauges that were not reported at the end: something may be left there."""
        return [name for name in GAUGES if self.gauges.get(name) is None]

    @property
    def grown(self) -> dict[int, list[float]]:
        """Watched processes that grew too much, or whose memory was unknown once, for example because they ended."""
        return {
            process: sizes
            for process, sizes in self.memory_mb.items()
            if not all(sizes) or sizes[-1] - sizes[0] > self.may_grow_mb
        }

    @property
    def ended(self) -> list[int]:
        """EngineCore processes that ended during the test."""
        everywhere = [each for ids in self.engine_cores for each in set(ids)]
        return sorted({each for each in everywhere if everywhere.count(each) < len(self.engine_cores)})

    @property
    def sound(self) -> bool:
        """Whether nothing failed, was wrong, ended or was left, and all gauges were reported."""
        bad = self.failed or self.hostile_failed or self.wrong or self.left or self.unknown or self.grown or self.ended
        return not bad and self.pauses[0] == self.pauses[1]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = {f.name: getattr(self, f.name) for f in fields(self)}  # asdict() would count a Counter's pairs
        return {name: dict(v) if isinstance(v, Counter) else v for name, v in facts.items()} | {
            "noise": self.noise,
            "wrong": self.wrong,
            "left": self.left,
            "unknown": self.unknown,
            "grown": self.grown,
            "ended": self.ended,
            "sound": self.sound,
        }


class Soak:
    """Sends the requests.

    Args:
        source: The server; it should have the chunks' KV.
        chunks: Texts to ask about.
        tokens: Length of the answers.
        concurrency: Requests in flight.
        limit_s: A request that takes longer counts as failed.
        lmcache_url: HTTP address of the LMCache server.
        watch: Ids of processes whose memory is recorded; they must keep running.
        may_grow_mb: By how much that may grow.
        most: Most chunks of a question.
        different: Queries whose full prefill is computed first.
        hostile: Share of the requests that are hostile, see lmcache_rag.bench.hostile.
        on_step: Called after each request with the seconds gone by.

    Attributes:
        full: The full prefills' answers to queries that are repeated without blending.
        report: The results so far.
    """

    def __init__(
        self,
        source: TracedServer,
        chunks: Sequence[str],
        *,
        tokens: int = 16,
        concurrency: int = 8,
        limit_s: float = 60.0,
        lmcache_url: str = LMCACHE_URL,
        watch: Sequence[int] = (),
        may_grow_mb: float = MAY_GROW_MB,
        most: int = 8,
        hostile: float = 0.0,
        different: int = 40,
        on_step: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._source, self._chunks, self._tokens = source, list(chunks), tokens
        self._concurrency, self._limit, self._watch = concurrency, limit_s, tuple(watch)
        self._on_step, self._lmcache_url, self._hostile = on_step, lmcache_url, hostile
        self._queries = questions(self._chunks, different, least=min(3, most), most=most)
        self._orders = {query.chunks for query in self._queries}
        self._begun = 0
        self.full: dict[Query, Trace] = {}
        self.report = SoakReport(may_grow_mb=may_grow_mb)

    def run(self, seconds: float, disturb: Sequence[Callable[[], None]] = ()) -> SoakReport:
        """Send requests for that many seconds; the disturbances are called at equal intervals."""
        for query in self._queries:
            if query in self.full:
                continue
            self.full[query] = self._source.trace(self._prompt(query), OPTIONS["unblended"], self._tokens)
        asyncio.run(self._run(seconds, disturb))
        return self.report

    def pause(self, seconds: float) -> None:
        """Stop LMCache for that many seconds; a disturbance for `run`."""
        self.report.pauses[1] += 1
        port = urlsplit(self._lmcache_url).port or 80
        self.report.pauses[0] += pause_listener(port, seconds)

    async def _run(self, seconds: float, disturb: Sequence[Callable[[], None]]) -> None:
        begin, self._begun = time.monotonic(), 0
        self.report.engine_cores.append(engine_cores(self._watch))
        url = self._source.engine.urls[0]
        headers = self._source.engine.headers
        async with httpx.AsyncClient(base_url=url, timeout=self._limit, headers=headers, mounts=DIRECT) as http:
            jobs = [self._worker(http, number, begin, seconds) for number in range(self._concurrency)]
            jobs += [self._at(begin + seconds * (i + 1) / (len(disturb) + 1), each) for i, each in enumerate(disturb)]
            jobs += [self._at(begin + seconds / 10, self._note_memory)]
            await asyncio.gather(*jobs)
            self.report.engine_cores.append(engine_cores(self._watch))
            self.report.gauges = await settled(http, self._lmcache_url, seconds=SETTLE_S)
            self._note_memory()

    async def _at(self, moment: float, do: Callable[[], None]) -> None:
        await asyncio.sleep(max(0.0, moment - time.monotonic()))
        await asyncio.to_thread(do)

    async def _worker(self, http: httpx.AsyncClient, number: int, begin: float, seconds: float) -> None:
        rng = random.Random(number)  # noqa: S311 - a workload, not a secret
        kinds, shares = list(SHARES), list(SHARES.values())
        while time.monotonic() - begin < seconds or self._begun < LEAST:
            self._begun += 1
            if rng.random() < self._hostile:
                await self._send_hostile(http, rng)
                continue
            kind, query = rng.choices(kinds, shares)[0], rng.choice(self._queries)
            if kind != "unblended":
                query = self._new(query, rng)
            start = time.monotonic()
            try:
                await asyncio.wait_for(self._request(http, kind, query, rng), self._limit)
                self.report.requests[kind] += 1
            except (httpx.HTTPError, LMCacheRAGError, TimeoutError, KeyError, ValueError) as problem:
                self.report.failed.append(f"{kind}: {type(problem).__name__}: {problem}"[:300])
            self.report.slowest_s = max(self.report.slowest_s, time.monotonic() - start)
            self._on_step(time.monotonic() - begin)

    async def _send_hostile(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        query = self._new(rng.choice(self._queries), rng)
        request = Hostile(lambda: self._body(self._prompt(query), "blended"), self._tokens).draw(rng)
        try:
            self.report.hostile[await asyncio.wait_for(send(http, request, rng), self._limit)] += 1
        except (httpx.HTTPError, HostileError, TimeoutError) as problem:
            text = f"{request.kind}, {request.path}: {type(problem).__name__}: {problem}"
            self.report.hostile_failed.append(text[:300])

    def _new(self, query: Query, rng: random.Random) -> Query:
        """The query over chunks in an order that was not used yet: the exact KV of a used one would be reused."""
        for attempt in range(100):  # few chunks have few orders: then other chunks are taken
            pool = query.chunks if attempt < 10 else self._chunks
            order = tuple(rng.sample(pool, len(query.chunks)))
            if order not in self._orders:
                break
        self._orders.add(order)
        return Query(order, query.question)

    async def _request(self, http: httpx.AsyncClient, kind: Kind, query: Query, rng: random.Random) -> None:
        prompt = self._prompt(query)
        body = self._body(prompt, kind)
        if kind == "aborted":
            async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                answer.raise_for_status()
                if rng.random() < 0.5:  # else at once, most likely before the look-up is done
                    async for _ in answer.aiter_lines():
                        break
            return
        answer = await http.post("/v1/completions", json=body)
        answer.raise_for_status()
        data = answer.json()
        tokens = tuple(data["choices"][0]["token_ids"])
        stats = answer_statistics(data) or {}
        self.report.reused += stats.get("reused_tokens", 0) > 0
        if stats.get("failure"):
            self.report.fallbacks[str(stats["failure"])] += 1
        if len(tokens) != self._tokens:
            raise ValueError(f"{len(tokens)} tokens instead of {self._tokens}")
        if kind == "unblended":
            self._judge(kind, self.full[query], tokens)
        elif kind == "ratio 1":  # everything was computed again: compare with a full prefill, which runs now
            full = await asyncio.to_thread(self._source.trace, prompt, OPTIONS["unblended"], self._tokens)
            self._judge(kind, full, tokens)

    def _body(self, prompt: QueryPrompt, kind: Kind) -> dict[str, Any]:
        request = self._source.engine.request(prompt, Sampling(max_tokens=self._tokens), OPTIONS[kind])
        body = {name: value for name, value in request.items() if name != "extra_body"}
        return {**body, **request["extra_body"], "ignore_eos": True}

    def _judge(self, kind: Kind, full: Trace, tokens: tuple[int, ...]) -> None:
        found = difference(full, Trace(tokens, full.likely))
        if found.place is not None:
            if found.near_tie:
                self.report.near_ties[kind] += 1
            else:
                self.report.differing.append({"kind": kind, "place": found.place, "gap": found.gap})

    def _prompt(self, query: Query) -> QueryPrompt:
        return self._source.prompts.query(query.chunks, query.question)

    def _note_memory(self) -> None:
        for process in self._watch:
            self.report.memory_mb.setdefault(process, []).append(resident_mb(process))


# What servers still hold


async def settled(vllm: httpx.AsyncClient, lmcache_url: str, *, seconds: float) -> dict[str, float | None]:
    """Values of all GAUGES, once all are 0 or after `seconds`; None: the server does not report it."""
    end = time.monotonic() + seconds
    headers = lmcache_headers(lmcache_url)
    # Not vllm: that one sends vLLM's key.
    async with httpx.AsyncClient(base_url=lmcache_url, timeout=10, headers=headers, mounts=DIRECT) as lmcache:
        while True:
            found = await _vllm_gauges(vllm) | await _lmcache_gauges(lmcache)
            if all(value == 0 for value in found.values()) or time.monotonic() >= end:
                return found
            await asyncio.sleep(0.5)


async def _vllm_gauges(http: httpx.AsyncClient) -> dict[str, float | None]:
    try:
        text = (await http.get("/metrics")).raise_for_status().text
    except httpx.HTTPError:
        text = ""
    found: dict[str, float | None] = {}
    for name in VLLM_GAUGES:
        lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        found[name] = sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else None
    return found


async def _lmcache_gauges(http: httpx.AsyncClient) -> dict[str, float | None]:
    try:
        status = (await http.get("/status")).raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        status = None
    return {f"lmcache:{place}": _number_at(status, place.split(".")) for place in LMCACHE_GAUGES}


def _number_at(status: Any, place: list[str]) -> float | None:
    """The number at that place of a document."""
    if not place:
        return float(status) if isinstance(status, int | float) else None
    if not isinstance(status, dict):
        return None
    if place[0] != "*":
        return _number_at(status.get(place[0]), place[1:])
    found = [value for each in status.values() if (value := _number_at(each, place[1:])) is not None]
    return sum(found) if found and len(found) == len(status) else None


def resident_mb(process: int) -> float:
    """Resident memory of a process in megabytes; 0 if it has ended or the system has no /proc."""
    try:
        with open(f"/proc/{process}/status") as status:  # noqa: PTH123
            line = next(line for line in status if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return 0.0
    return int(line.split()[1]) / 1024


# Processes of this machine, by /proc


def engine_cores(watched: Iterable[int]) -> list[int]:
    """VLLM's EngineCore processes among these and their descendants."""
    found = set()
    for process in watched:
        for each in (process, *descendants(process)):
            with contextlib.suppress(OSError):
                if b"EngineCore" in (PROC / str(each) / "cmdline").read_bytes():
                    found.add(each)
    return sorted(found)


def listener(port: int) -> int | None:
    """The process that listens on that port of this machine; of several the one that was started first."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == LISTENS and int(columns[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{columns[9]}]")
    found = []
    for folder in PROC.glob("[0-9]*") if sockets else ():
        with contextlib.suppress(OSError):
            if any(_target(each) in sockets for each in (folder / "fd").iterdir()):
                found.append(int(folder.name))
    return min(found, default=None)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


@contextmanager
def paused(process: int) -> Iterator[None]:
    """Stop a process and its descendants within a `with` block; they continue at its end."""
    all_ = [process, *descendants(process)]
    try:
        for each in all_:
            _signal(each, signal.SIGSTOP)
        yield
    finally:
        for each in all_:
            _signal(each, signal.SIGCONT)


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def pause_listener(port: int, seconds: float, *, wait_s: float = 60.0) -> bool:
    """Pause the process that listens on that port; False if none does, even after `wait_s` for a restart."""
    end = time.monotonic() + wait_s
    while (process := listener(port)) is None:
        if time.monotonic() >= end:
            return False
        time.sleep(0.25)
    with paused(process):
        time.sleep(seconds)
    return True
