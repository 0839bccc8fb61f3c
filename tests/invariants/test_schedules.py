"""The scheduler side under any simulated schedule: whatever happens to a request, no lock leaks and no claim is wrong.

The scheduler is simulated after vLLM's: who waits is asked for in order, in each step; blocks may be missing; who runs
may be preempted.
"""

from __future__ import annotations

import json
from array import array
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from scheduler_kit import CHUNK, Lookup, Pool, PrefixCache, Request, Server, chunk_hashes, hash_block

from lmcache_rag.connector import scheduler
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.gpu_chunks import GpuChunks, ResidentChunks
from lmcache_rag.connector.lookup import LOCK_SECONDS
from lmcache_rag.connector.metadata import BlendResult, Claim, Match, claim
from lmcache_rag.connector.scheduler import BlendScheduler

BLOCK = 8
OPTIONS = ConnectorOptions(least_tokens=16, step_tokens=40, idle_tokens=60, tail_tokens=20, lookup_deadline=5.0)


def computed(plan: Any) -> int:
    """What a blend in the step computes."""
    return Claim(plan.exact, plan.matches, plan.end).computed(plan.policy, plan.budget)


class Schedules(RuleBasedStateMachine):
    """Any schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.clock = mock.patch.object(scheduler, "time", SimpleNamespace(perf_counter=lambda: self.now))
        self.clock.start()
        self.server = Server()
        self.pool = Pool()
        self.hot = ResidentChunks(self.pool, BLOCK)
        self.side = BlendScheduler(OPTIONS, CHUNK, self, PrefixCache())
        self.side.gpu_chunks = GpuChunks(self.hot)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.loading: list[Request] = []  # wait for what is blended in the background
        self.background: list[list[Any]] = []  # plans of workers, and steps that each still takes
        self.received: set[str] = set()
        self.lookups: dict[str, Lookup] = {}
        self.left: set[str] = set()  # went away before their look-up was of use
        self.planned: set[str] = set()
        self.admitted: set[str] = set()
        self.finished: set[str] = set()
        self.count = self.back_in = 0

    def look_up(self, request: Request) -> Lookup | None:
        assert request.request_id not in self.lookups, "asked twice"
        if not self.server.up:
            return None
        self.lookups[request.request_id] = Lookup(self.server, request)
        return self.lookups[request.request_id]

    # -- what happens -------------------------------------------------------------------------------------------------

    @rule(
        prompt=st.integers(0, 198).map(lambda less: 200 - less),
        prefix=st.sampled_from([2, 1, 4, 0, 13]),
        gaps=st.lists(st.integers(0, 20), min_size=1, max_size=8),
        polls=st.integers(0, 3),
        outputs=st.integers(0, 3),
        blend=st.sampled_from([None, None, None, "off", "on"]),
        kind=st.sampled_from(["text", "text", "text", "text", "resumed", "no reading"]),
        hot=st.sampled_from([0, 0, 8, 3]),
        early=st.booleans(),
    )
    def arrive(
        self,
        prompt: int,
        prefix: int,
        gaps: list[int],
        polls: int,
        outputs: int,
        blend: str | None,
        kind: str,
        hot: int,
        early: bool,
    ) -> None:
        exact = min(prefix * CHUNK, prompt // CHUNK * CHUNK)
        matches, here = [], exact
        for number, gap in enumerate(gaps):
            here += gap if number or not hot else 0
            if here + CHUNK <= prompt:
                matches.append(Match(here, here + CHUNK, 1000 * number, 1000 * number + CHUNK))
                here += CHUNK
        params: dict[str, Any] = {"lmcache_rag.blend": blend} if blend else {}
        tokens, hashes = list(range(prompt)), [hash_block(None, tuple(range(BLOCK)))]
        for first in range(BLOCK, prompt - BLOCK + 1, BLOCK):
            hashes.append(hash_block(hashes[-1], tuple(tokens[first : first + BLOCK])))
        if hot and exact and matches:
            params["lmcache_rag.chunks"] = [[match.start, match.end] for match in matches]
            for match in matches[:hot]:
                parent, chunk = hashes[exact // BLOCK - 1], tokens[match.start : match.end]
                self.pool.file(parent, chunk, BLOCK)
                own = [*hashes[: exact // BLOCK], *chunk_hashes(parent, chunk, BLOCK)]
                self.hot.remember(array("q", tokens[:exact] + chunk), own, exact)
        self.count += 1
        request = Request(str(self.count), tokens, params or None, (exact, tuple(matches)), polls, outputs)
        request.block_hashes = hashes
        request.num_tokens = prompt + (kind == "resumed")
        request.skip_reading_prefix_cache = kind == "no reading"
        self.waiting.append(request)
        if early:
            self.side.start_early(request)

    @rule(
        slow=st.sampled_from([0, 0, 1, 3]),
        local=st.lists(st.integers(0, 25), min_size=6, max_size=6),
        room=st.sampled_from([0, 0, 1, 2, 4]),
        preempt=st.booleans(),
        budget=st.sampled_from([16, 64, 512]),
        failing=st.booleans(),
    )
    def step(self, local: list[int], room: int, preempt: bool, budget: int, failing: bool, slow: int = 0) -> None:
        self.now += 0.01
        self.back_in -= 1
        self.server.up = self.server.up or self.back_in <= 0
        results = []
        if preempt and self.running:
            victim = self.running.pop()
            victim.computed, victim.runs = 0, False
            self.waiting.insert(0, victim)
        before = {request.request_id for request in self.running}
        for request in self.running:
            self.advance(request, budget)
        for request, blocks in zip(list(self.waiting), local, strict=False):
            if not self.admit(request, min(blocks * BLOCK, (request.num_tokens - 1) // BLOCK * BLOCK), room, budget):
                break
            room -= request.runs
        others = [r for r in self.running if r.request_id in before]
        plans, allowance = self.side.build_plans({r.request_id: 1 for r in self.running})
        now = [plan for plan in plans if not plan.background]
        work = sum(computed(plan) for plan in now)
        assert len(now) <= 1
        assert not now or not others, "a request that runs would wait for the whole blend"
        assert work <= 60
        assert allowance.idle == (not self.running)
        if others:
            assert allowance.tokens <= OPTIONS.step_tokens
        for plan in plans:
            self.check(plan)
            self.load(plan)
            if plan.background:
                self.background.append([plan, slow, failing])
            else:
                results.append(self.work(plan, failing))
        for one in list(self.background):
            one[1] -= 1
            if one[1] <= 0:
                self.background.remove(one)
                self.check(one[0])
                results.append(self.work(one[0], one[2]))
                self.receive(one[0].request_id)
        assert len(self.background) <= 8
        self.side.on_results(results)
        for request in [r for r in self.running if r.num_tokens > r.prompt + r.outputs]:
            self.finish(request)

    @rule(which=st.integers(0, 10))
    def abort(self, which: int) -> None:
        everyone = self.waiting + self.running + self.loading
        if everyone:
            self.finish(everyone[which % len(everyone)])

    @rule()
    def vllm_needs_blocks(self) -> None:
        self.pool.evict()

    @rule(change=st.sampled_from(["answers", "deadline", "hangs", "answers", "dies"]))
    def trouble(self, change: str) -> None:
        if change in ("hangs", "answers"):
            self.server.answers = change == "answers"
        elif change == "dies":
            self.server.up, self.back_in = False, 2
            self.server.restart()
        else:
            self.now += OPTIONS.lookup_deadline + 1

    # -- the simulated vLLM -------------------------------------------------------------------------------------------

    def admit(self, request: Request, local: int, room: int, budget: int) -> bool:
        """Returns whether the next one is asked too."""
        before = request.request_id in self.planned
        if request.request_id in self.received:  # goes on behind what was loaded, without being asked for again
            if room <= 0:
                return False
            self.received.remove(request.request_id)
            self.side.on_allocated(request, list(range(-(-request.num_tokens // BLOCK))), 0, None)
            return self.start(request, budget)
        more = self.side.match(request, local)
        if more is None:
            assert not before
            return True
        assert more >= 0
        assert more == 0 or local + more <= request.prompt - 1, "nothing is left to compute"
        lookup = self.lookups.get(request.request_id)
        off = (request.kv_transfer_params or {}).get("lmcache_rag.blend") == "off"
        hot = not off and "lmcache_rag.chunks" in (request.kv_transfer_params or {})
        if before or request.skip_reading_prefix_cache or (lookup is None and not hot):
            assert more == 0
        if more and not hot:
            assert lookup is not None
            assert lookup.result is not None
            wanted = claim(
                request.prompt, local, request.cached[0], () if off else request.cached[1], least=16, tail=20
            )
            if self.side.in_background(request.request_id) and wanted.matches:
                assert local + more == request.prompt - 1
            else:
                assert local + more == wanted.end
            if wanted.matches:
                first = wanted.matches[0].start
                assert min(request.hidden) <= first, "another request could be served approximate KV"
                assert self.side.store_limit(request.request_id) == min(request.hidden)
        if room <= 0:
            return False  # no blocks: it is asked again in the next step
        background = more > 0 and self.side.in_background(request.request_id)
        blocks = -(-(local + more if background else request.num_tokens) // BLOCK)
        self.side.on_allocated(request, list(range(blocks)), more, None)
        if more:
            self.planned.add(request.request_id)
        self.admitted.add(request.request_id)
        request.computed = local + more
        if background:
            self.waiting.remove(request)
            self.loading.append(request)
            return True
        return self.start(request, budget)

    def receive(self, name: str) -> None:
        """The worker says that what it loaded for a request is there."""
        for request in [r for r in self.loading if r.request_id == name]:
            self.loading.remove(request)
            self.waiting.insert(0, request)
            self.received.add(name)

    def start(self, request: Request, budget: int) -> bool:
        request.runs = True
        self.waiting.remove(request)
        self.running.append(request)
        self.advance(request, budget)
        return True

    def advance(self, request: Request, budget: int) -> None:
        request.computed = min(request.computed + budget, request.num_tokens)
        if request.computed == request.num_tokens:
            request.num_tokens += 1

    def check(self, plan: Any) -> None:
        held = {block.block_id for block in self.pool.touched if block.users}
        for match in plan.matches:
            assert match.block < 0 or match.block in held, "its KV could be overwritten before it is copied"
        here = [r for r in self.running + self.loading if r.request_id == plan.request_id]
        if not here:
            assert plan.background, "nobody wants it"
            return
        (request,) = here
        assert plan.local <= plan.exact <= plan.end <= request.prompt - 1
        assert len(plan.block_ids) * BLOCK >= plan.end
        assert list(plan.token_ids) == request.prompt_token_ids
        assert all(match.start >= plan.exact for match in plan.matches)
        if plan.matches:
            assert min(request.hidden) <= plan.matches[0].start, "another request could be served approximate KV"
            assert self.side.store_limit(request.request_id) == min(request.hidden)

    def load(self, plan: Any) -> None:
        """As BlendWorker: asks for what is exact in the step that brings the plan, and with it gives back the locks.

        In the background too: whoever is aborted later, while the rest of the plan is under way, holds none.
        """
        lookup = self.lookups.get(plan.request_id)
        if lookup is not None and plan.exact > plan.local and lookup.life == self.server.life:
            self.server.give_back(plan.request_id, plan.local // CHUNK * CHUNK, lookup.request.cached[0])

    def work(self, plan: Any, failing: bool) -> BlendResult:
        """As BlendWorker."""
        if failing or not self.server.up:
            return BlendResult(plan.request_id, plan.local, 0, 0, plan.end - plan.local, 1.0, 1.0, "load failed")
        covered = sum(match.end - match.start for match in plan.matches)
        return BlendResult(
            plan.request_id, plan.exact, covered - covered // 4, covered // 4, plan.end - plan.exact - covered, 1.0, 1.0
        )

    def finish(self, request: Request) -> None:
        if request.request_id not in self.admitted:
            self.left.add(request.request_id)
        next(queue for queue in (self.waiting, self.running, self.loading) if request in queue).remove(request)
        self.received.discard(request.request_id)
        self.finished.add(request.request_id)
        stats = self.side.finish(request)
        if not self.side.keeps_session(request.request_id):
            self.server.end_session(request.request_id)  # LMCache's own connector, right afterwards
        if stats is None:
            return
        json.dumps(stats)
        counts = [stats[f"{name}_tokens"] for name in ("prefix", "reused", "recomputed", "computed")]
        assert min(counts) >= 0
        assert sum(counts) == stats["prompt_tokens"] == request.prompt
        assert stats["blended"] == (stats["reused_tokens"] > 0)
        assert not (stats["failure"] and stats["blended"])
        assert (stats["blocks_hit"] > 0) == (stats["reused_tokens"] > 0)
        assert request.request_id in self.planned or not stats["blended"]

    # -- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def everybody_is_looked_after_once(self) -> None:
        assert self.side.requests <= len(self.waiting) + len(self.running) + len(self.loading)

    @invariant()
    def whoever_runs_holds_no_locks(self) -> None:
        for request in self.running:
            if not self.side.keeps_session(
                request.request_id
            ):  # a look-up given up that is still to be heard to its end
                assert not self.server.held[request.request_id]

    def teardown(self) -> None:
        """Let everybody come to an end, with and without the server."""
        self.server.up = self.server.answers = True
        for _ in range(400):
            if not self.waiting + self.running + self.loading + self.background:
                break
            self.now += 0.1
            self.step([0] * 6, 6, False, 512, False)
        assert not self.waiting + self.running + self.loading, "somebody starves"
        assert not self.side.budget.background
        lost = [one for one in self.lookups.values() if one.life != self.server.life]
        for _ in range(5):
            self.side.build_plans()
        assert self.side.requests == 0
        assert self.side.aborted_lookups <= len(lost), "only what was asked of a dead server is not answered"
        self.now += LOCK_SECONDS + 1
        self.side.build_plans()
        assert self.side.aborted_lookups == 0
        assert not any(self.server.held.values()), "locks leak"
        assert not any(block.users for block in self.pool.touched), "blocks leak"
        for one in self.lookups.values():
            if one.life == self.server.life and (one.result is None or one.request.request_id in self.left):
                assert one.closed, "an abandoned look-up is not heard to its end"
        self.clock.stop()


Schedules.TestCase.settings = settings(max_examples=250, stateful_step_count=40)
TestSchedules = Schedules.TestCase
