"""Requests of every kind, for minutes, while something is done to the servers: does any fail, hang, differ or leak?"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

import httpx

from lmcache_rag.bench import leftovers, processes
from lmcache_rag.bench.exact import Asked, difference, questions
from lmcache_rag.bench.hostile import Hostile, HostileError, send
from lmcache_rag.bench.traces import ServerSource, Trace
from lmcache_rag.engines.base import BlendOptions, QueryPrompt, Sampling
from lmcache_rag.errors import LMCacheRAGError
from lmcache_rag.protocol import NEAR_TIE, answer_statistics

Kind: TypeAlias = Literal["blended", "ratio 1", "unblended", "aborted"]
LMCACHE_URL = "http://127.0.0.1:8089"  # where lmcache-rag serve has it
MAY_GROW_MB = (
    64.0  # of a process, from a tenth of the time on: engines that leaked nothing grew by 14 and 21 in 6 minutes
)
LEAST = 20  # requests, however long they take
MOST_NOISE = 1.0  # nats: a server that differs from itself by more is wrong, whatever the reason
SHARES: dict[Kind, float] = {"blended": 0.45, "ratio 1": 0.15, "unblended": 0.2, "aborted": 0.2}
OPTIONS: dict[Kind, BlendOptions] = {
    "blended": BlendOptions("query", 0.15),
    "ratio 1": BlendOptions("query", 1.0),
    "unblended": BlendOptions(enabled=False),
    "aborted": BlendOptions("query", 0.15),
}


@dataclass
class SoakReport:
    """What came of it.

    Attributes:
        requests: How many of each kind came to their end.
        failed: What was said of those that did not.
        reused: Requests that reused chunk KV.
        fallbacks: What the server said of requests that it computed in full instead.
        differing: Answers at ratio 1 or without blending that differ from the full prefill's and not at a near tie:
            the kind, the place, and how much likelier, in nats, the full prefill's token was there.
        near_ties: How many of each kind differ at one.
        slowest_s: Longest request.
        gauges: What vLLM's /metrics and LMCache's /status said at the end of what should be zero then, see
            lmcache_rag.bench.leftovers; None: it was not said.
        memory_mb: Resident megabytes of the watched processes, at a tenth of the time and at the end.
        may_grow_mb: So many megabytes more at the end are no leak.
        hostile: Hostile requests by what came of them: "200", "400", "aborted", or "other" for another refusal.
        hostile_failed: What was said of those that the server failed at, or did not answer in time.
        engine_cores: Process ids of vLLM's EngineCore below the watched processes, at the beginning and at the end.
        pauses: How often LMCache was paused, and was to be.
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
        """How far, in nats, the server differs from itself without blending: other batches are added up otherwise."""
        gaps = [abs(each["gap"]) for each in self.differing if each["kind"] == "unblended" and each["gap"] is not None]
        return max((gap for gap in gaps if gap <= MOST_NOISE), default=NEAR_TIE)

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """The differing answers that this does not explain."""
        return [each for each in self.differing if each["gap"] is None or abs(each["gap"]) > self.noise + 1e-4]

    @property
    def left(self) -> dict[str, float]:
        """What is not zero at the end."""
        return {name: value for name, value in self.gauges.items() if value}

    @property
    def unknown(self) -> list[str]:
        """What no server said at the end: something may be left there."""
        return [name for name in leftovers.ALL if self.gauges.get(name) is None]

    @property
    def grown(self) -> dict[int, list[float]]:
        """Watched processes that grew by too much, or whose memory was not known each time: one that ended, say."""
        return {
            process: sizes
            for process, sizes in self.memory_mb.items()
            if not all(sizes) or sizes[-1] - sizes[0] > self.may_grow_mb
        }

    @property
    def ended(self) -> list[int]:
        """EngineCore processes that did not live through it."""
        everywhere = [each for ids in self.engine_cores for each in set(ids)]
        return sorted({each for each in everywhere if everywhere.count(each) < len(self.engine_cores)})

    @property
    def sound(self) -> bool:
        """Nothing failed, was wrong, ended or stayed, and every place was looked at where something could."""
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
        source: The server; the chunks' KV should be there.
        chunks: Texts to ask about.
        tokens: Length of the answers.
        concurrency: Requests in flight.
        limit_s: A request that takes longer counts as failed.
        lmcache_url: HTTP address of the LMCache server.
        watch: Process ids whose memory is noted; they must live on.
        may_grow_mb: By how much that may grow.
        most: Most chunks of a question.
        different: Questions whose full prefill is asked for first.
        hostile: Share of the requests that are hostile, see lmcache_rag.bench.hostile.
        on_step: Called after each request with the seconds gone by.

    Attributes:
        full: The full prefills' answers to questions that are asked again and again without blending.
        report: What has come of it so far.
    """

    def __init__(
        self,
        source: ServerSource,
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
        self._asked = questions(self._chunks, different, least=min(3, most), most=most)
        self._orders = {asked.chunks for asked in self._asked}
        self._begun = 0
        self.full: dict[Asked, Trace] = {}
        self.report = SoakReport(may_grow_mb=may_grow_mb)

    def run(self, seconds: float, disturb: Sequence[Callable[[], None]] = ()) -> SoakReport:
        """Go on for so long; what disturbs is called at equal distances in between."""
        for asked in self._asked:
            if asked in self.full:
                continue
            self.full[asked] = self._source.trace(self._prompt(asked), OPTIONS["unblended"], self._tokens)
        asyncio.run(self._run(seconds, disturb))
        return self.report

    def pause(self, seconds: float) -> None:
        """Stop LMCache for so long; one of those that disturb."""
        self.report.pauses[1] += 1
        port = urlsplit(self._lmcache_url).port or 80
        self.report.pauses[0] += processes.pause_listener(port, seconds)

    async def _run(self, seconds: float, disturb: Sequence[Callable[[], None]]) -> None:
        begin, self._begun = time.monotonic(), 0
        self.report.engine_cores.append(processes.engine_cores(self._watch))
        url = self._source.engine.urls[0]
        async with httpx.AsyncClient(base_url=url, timeout=self._limit, headers=self._source.engine.headers) as http:
            jobs = [self._worker(http, number, begin, seconds) for number in range(self._concurrency)]
            jobs += [self._at(begin + seconds * (i + 1) / (len(disturb) + 1), each) for i, each in enumerate(disturb)]
            jobs += [self._at(begin + seconds / 10, self._weigh)]
            await asyncio.gather(*jobs)
            self.report.engine_cores.append(processes.engine_cores(self._watch))
            self.report.gauges = await leftovers.settled(http, self._lmcache_url, seconds=leftovers.SETTLE_S)
            self._weigh()

    async def _at(self, moment: float, do: Callable[[], None]) -> None:
        await asyncio.sleep(max(0.0, moment - time.monotonic()))
        await asyncio.to_thread(do)

    async def _worker(self, http: httpx.AsyncClient, number: int, begin: float, seconds: float) -> None:
        rng = random.Random(number)  # noqa: S311 - a workload, no secret
        kinds, shares = list(SHARES), list(SHARES.values())
        while time.monotonic() - begin < seconds or self._begun < LEAST:
            self._begun += 1
            if rng.random() < self._hostile:
                await self._harm(http, rng)
                continue
            kind, asked = rng.choices(kinds, shares)[0], rng.choice(self._asked)
            if kind != "unblended":
                asked = self._new(asked, rng)
            start = time.monotonic()
            try:
                await asyncio.wait_for(self._request(http, kind, asked, rng), self._limit)
                self.report.requests[kind] += 1
            except (httpx.HTTPError, LMCacheRAGError, TimeoutError, KeyError, ValueError) as problem:
                self.report.failed.append(f"{kind}: {type(problem).__name__}: {problem}"[:300])
            self.report.slowest_s = max(self.report.slowest_s, time.monotonic() - start)
            self._on_step(time.monotonic() - begin)

    async def _harm(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        asked = self._new(rng.choice(self._asked), rng)
        request = Hostile(lambda: self._body(self._prompt(asked), "blended"), self._tokens).draw(rng)
        try:
            self.report.hostile[await asyncio.wait_for(send(http, request, rng), self._limit)] += 1
        except (httpx.HTTPError, HostileError, TimeoutError) as problem:
            text = f"{request.kind}, {request.path}: {type(problem).__name__}: {problem}"
            self.report.hostile_failed.append(text[:300])

    def _new(self, asked: Asked, rng: random.Random) -> Asked:
        """The question over chunks in an order that was not asked yet: what was computed in full is reused as it is."""
        for attempt in range(100):  # a few chunks have few orders, and then others are taken
            pool = asked.chunks if attempt < 10 else self._chunks
            order = tuple(rng.sample(pool, len(asked.chunks)))
            if order not in self._orders:
                break
        self._orders.add(order)
        return Asked(order, asked.question)

    async def _request(self, http: httpx.AsyncClient, kind: Kind, asked: Asked, rng: random.Random) -> None:
        prompt = self._prompt(asked)
        body = self._body(prompt, kind)
        if kind == "aborted":
            async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                answer.raise_for_status()
                if rng.random() < 0.5:  # else at once, most likely before the look-up is through
                    async for _ in answer.aiter_lines():
                        break
            return
        answer = await http.post("/v1/completions", json=body)
        answer.raise_for_status()
        data = answer.json()
        tokens = tuple(data["choices"][0]["token_ids"])
        told = answer_statistics(data) or {}
        self.report.reused += told.get("reused_tokens", 0) > 0
        if told.get("failure"):
            self.report.fallbacks[str(told["failure"])] += 1
        if len(tokens) != self._tokens:
            raise ValueError(f"{len(tokens)} tokens instead of {self._tokens}")
        if kind == "unblended":
            self._judge(kind, self.full[asked], tokens)
        elif kind == "ratio 1":  # everything was computed again: the answer is the full prefill's, which is asked now
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

    def _prompt(self, asked: Asked) -> QueryPrompt:
        return self._source.prompts.query(asked.chunks, asked.question)

    def _weigh(self) -> None:
        for process in self._watch:
            self.report.memory_mb.setdefault(process, []).append(leftovers.resident_mb(process))
