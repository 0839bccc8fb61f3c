"""The state of one browser: passages, panes and controls. Runs in the event loop; one action at a time."""

from __future__ import annotations

import asyncio
import datetime
import logging
import random
import statistics
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lmcache_rag import __version__
from lmcache_rag.budget import AUTO, Ratio
from lmcache_rag.demo import record
from lmcache_rag.demo.arms import Arm, Request, Wording
from lmcache_rag.demo.record import ARMS, ArmName, Check, Problem, Turn, Uploaded
from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.errors import LMCacheRAGError
from lmcache_rag.kv_manager import KVManager
from lmcache_rag.prompt import INSTRUCTION, SYSTEM
from lmcache_rag.prompt import Turn as HistoryTurn
from lmcache_rag.rag import first_difference

if TYPE_CHECKING:
    from lmcache_rag.demo.hub import Hub, Stack
    from lmcache_rag.store import Hit

log = logging.getLogger("lmcache_rag")

MAX_TOKENS = 96  # of an answer, unless it is set: two answers should not take long
PaneState: TypeAlias = Literal["idle", "waiting", "sent", "writing", "done", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Controls:
    """What the user can set."""

    policy: str = "query"
    ratio: Ratio = AUTO
    temperature: float = 0.0
    max_tokens: int = MAX_TOKENS
    top_k: int = 4
    system: str = SYSTEM
    instruction: str = INSTRUCTION
    at_once: bool = False  # both panes at the same time instead of in turn
    follow_up: bool = False  # send each pane's earlier turns along
    retrieve: bool = True  # retrieve for each question; otherwise the passages stay as they are
    model: str = ""


@dataclass
class Pane:
    """One arm's side of the page.

    Attributes:
        state: "waiting": for the other pane or other requests; "sent": before the first token; "writing": after it.
        text: The answer as far as it came.
        sent: time.perf_counter() of the sending.
        turn: The latest finished turn.
        turns: All of them, since the last new conversation.
    """

    state: PaneState = "idle"
    text: str = ""
    sent: float = 0.0
    turn: Turn | None = None
    turns: list[Turn] = field(default_factory=list)

    @property
    def problem(self) -> Problem | None:
        """Why the latest turn failed."""
        return self.turn.problem if self.turn and self.state == "failed" else None

    def history(self) -> tuple[HistoryTurn, ...]:
        """Earlier turns with an answer, for the prompt."""
        answered = [turn for turn in self.turns if turn.text.strip()]
        return tuple(
            part
            for turn in answered
            for part in (HistoryTurn("user", turn.question), HistoryTurn("assistant", turn.text))
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """One repetition: both times to the first token in milliseconds, reused tokens, whether the answers differ.

    `alone` says whether nothing else was computed before the first tokens.
    """

    order: tuple[int, ...]
    first: ArmName
    blended_ms: float
    baseline_ms: float
    reused_tokens: int
    prefix_tokens: int
    baseline_prefix_tokens: int
    differ: bool
    alone: bool = True


@dataclass
class Repeats:
    """A run of repetitions.

    Attributes:
        question: The question.
        wanted: How many repetitions.
        passages: The chunks, in the page's order.
        pairs: Those done so far.
        problem: Why it ended early.
        finished: Whether it has ended.
    """

    question: str
    wanted: int
    passages: list[int]
    pairs: list[Pair] = field(default_factory=list)
    problem: Problem | None = None
    finished: bool = False

    @property
    def medians(self) -> tuple[float, float] | None:
        """Median times to the first token, blended and baseline, in milliseconds, of pairs that ran alone."""
        alone = [pair for pair in self.pairs if pair.alone]
        if not alone:
            return None
        return (
            statistics.median(pair.blended_ms for pair in alone),
            statistics.median(pair.baseline_ms for pair in alone),
        )

    @property
    def disturbed(self) -> int:
        """How many pairs the medians leave out, since something else ran at the same time."""
        return sum(not pair.alone for pair in self.pairs)

    @property
    def speedup(self) -> float | None:
        """Baseline's median by the blended one; None before the first pair, and if nothing was reused."""
        if self.medians is None or not any(pair.reused_tokens for pair in self.pairs):
            return None
        blended, baseline = self.medians
        return baseline / blended if blended > 0 else None

    @property
    def differing(self) -> int:
        """How many of the answers differ."""
        return sum(pair.differ for pair in self.pairs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        medians = self.medians
        return {
            "question": self.question,
            "wanted": self.wanted,
            "passages": self.passages,
            "pairs": [asdict(pair) for pair in self.pairs],
            "median_blended_ms": medians[0] if medians else None,
            "median_baseline_ms": medians[1] if medians else None,
            "speedup": self.speedup,
            "differing": self.differing,
            "disturbed": self.disturbed,
            "error": asdict(self.problem) if self.problem else None,
        }


class Session:
    """The state of one browser's demo. All methods are to be called in the event loop.

    Args:
        session_id: Its name; part of its cache salts.
        hub: What all sessions share.
    """

    def __init__(self, session_id: str, hub: Hub) -> None:
        settings = hub.settings
        self.id, self.hub = session_id, hub
        self.controls = Controls(
            policy=settings.policy,
            ratio=settings.ratio,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens if "max_tokens" in settings.model_fields_set else MAX_TOKENS,
            top_k=settings.top_k,
            system=SYSTEM if settings.system is None else settings.system,
            instruction=INSTRUCTION if settings.instruction is None else settings.instruction,
        )
        self.question = ""
        self.passages: list[Hit] = []
        self.panes: dict[ArmName, Pane] = {name: Pane() for name in ARMS}
        self.turns: list[Turn] = []  # of the whole session, for the export
        self.checks: list[Check] = []
        self.repeats: list[Repeats] = []
        self.uploads: list[Uploaded] = []
        self.note = ""  # about the latest action
        self.problem: Problem | None = None  # of an action that belongs to no pane
        self.busy = ""  # name of the running action
        self.version = 0  # grows with each change
        self.listeners: list[Callable[[], None]] = []
        self.seen = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._asks = 0
        self._colds = 0
        self._is_cold = False
        self._own_kv: set[tuple[str, str]] = set()  # (fingerprint, key) of KV that only this session uses

    # -- what changes ----------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Have the pages update what has changed."""
        self.version += 1
        for listener in list(self.listeners):
            listener()

    def set(self, **changes: Any) -> None:
        """Change controls."""
        new = replace(self.controls, **changes)
        if new != self.controls:
            self.controls = new
            self.changed()

    # -- passages --------------------------------------------------------------------------------------------------

    def move(self, old: int, new: int) -> None:
        """Move a passage; the passages are hand-picked from then on."""
        if 0 <= old < len(self.passages) and 0 <= new < len(self.passages) and old != new:
            self.passages.insert(new, self.passages.pop(old))
            self._set_hand_picked()

    def remove(self, index: int) -> None:
        """Remove a passage."""
        if 0 <= index < len(self.passages):
            del self.passages[index]
            self._set_hand_picked()

    def add(self, hit: Hit) -> None:
        """Append a passage that is not there yet."""
        if all(hit.chunk_id != other.chunk_id for other in self.passages):
            self.passages.append(hit)
            self._set_hand_picked()

    def shuffle(self) -> None:
        """Shuffle the passages into another order."""
        if len(self.passages) < 2:
            return
        before = list(self.passages)
        while self.passages == before:
            random.shuffle(self.passages)
        self._set_hand_picked()

    async def find(self, text: str, count: int = 8) -> list[Hit]:
        """Passages for a text, best first.

        Raises:
            LMCacheRAGError: The text is empty, or the store cannot be searched.
        """
        return await asyncio.to_thread(self._find, text, count)

    async def tokens(self) -> tuple[int, int] | None:
        """Tokens of the next prompt in the blended pane, and of the context; None before the engine is open."""
        if self.hub.start.phase != "ready":
            return None
        request = self._request("blended", self.question or " ", tuple(self.passages))
        return await asyncio.to_thread(lambda: self.stack.blended.tokens(request))

    def _find(self, text: str, count: int) -> list[Hit]:
        return self.stack.workspace.rag.retrieve(text, top_k=count)

    def _set_hand_picked(self) -> None:
        self.controls = replace(self.controls, retrieve=False)
        self.changed()

    # -- actions ---------------------------------------------------------------------------------------------------

    def start(self, what: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Start an action; returns None if another one is running."""
        if self.busy:
            work.close()
            return None
        self.busy, self.problem, self.note = what, None, ""
        self._task = asyncio.get_running_loop().create_task(self._run_action(work))
        self.changed()
        return self._task

    def stop(self) -> None:
        """Stop the running action. The engine stops computing, too."""
        if self._task is not None and not self._task.done():
            self._task.cancel()

    async def _run_action(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except asyncio.CancelledError:
            self.note = "Stopped."
        except Exception as problem:
            log.debug("%s: %s", self.busy, problem, exc_info=True)
            self.problem = Problem.of(problem)
        finally:
            for pane in self.panes.values():
                if pane.state == "waiting":
                    pane.state = "stopped"
            self.busy = ""
            self.changed()

    def ask(self, question: str) -> asyncio.Task[None] | None:
        """Ask both arms; the answers come into the panes."""
        return self.start("ask", self._ask(question.strip()))

    async def _ask(self, question: str) -> None:
        self.question = question
        if self.controls.retrieve or not self.passages:
            self.passages = await self.find(question, self.controls.top_k)
        self._asks += 1
        hits, at_once = tuple(self.passages), self.controls.at_once
        for pane in self.panes.values():
            pane.state, pane.text, pane.turn = "waiting", "", None
        self.changed()
        together = asyncio.Barrier(len(ARMS)) if at_once else None
        asked = [self._answer(name, self._request(name, question, hits), together) for name in ARMS]
        if at_once:
            tasks = [asyncio.ensure_future(each) for each in asked]
            try:
                done = await asyncio.gather(*tasks)
            except asyncio.CancelledError:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise
        else:
            try:
                done = [await asked[0], await asked[1]]
            finally:
                for each in asked:
                    each.close()
        await self._store_missing_kv(done[0])

    async def _answer(self, name: ArmName, request: Request, together: asyncio.Barrier | None) -> Turn:
        """Answer in a pane. A stopped answer stays there, and the cancellation is raised."""
        pane, arm = self.panes[name], self._arm(name)

        def sent() -> None:
            pane.sent, pane.state = time.perf_counter(), "sent"
            self.changed()

        def text(piece: str) -> None:
            pane.text += piece
            if pane.state == "sent":
                pane.state = "writing"
                self.changed()
            else:
                self.version += 1

        turn = await arm.answer(request, text, sent, together)
        pane.turn, pane.text = turn, turn.text
        pane.state = "failed" if turn.problem else "stopped" if turn.stopped else "done"
        pane.turns.append(turn)
        self.turns.append(turn)
        self.changed()
        if turn.stopped:
            raise asyncio.CancelledError
        return turn

    async def _store_missing_kv(self, turn: Turn) -> None:
        """Compute and store the KV that the question missed, after both answers."""
        if not (turn.completion and turn.blend.enabled and turn.completion.missed):
            return
        try:
            await self._compute_kv([turn.passages[index] for index in turn.completion.missed])
        except LMCacheRAGError as problem:  # the answers stand
            self.note = f"The KV of the passages is not kept: {problem}"

    async def _compute_kv(self, hits: Sequence[Hit]) -> None:
        self.note = f"Computing the KV of {len(hits)} passages, for the next question."
        self.changed()
        wording, tenant = self.wording, self._tenant("blended")
        stack = self.stack

        def work() -> int:
            prompts = stack.blended.prompts(wording, tenant)
            with stack.blended.traffic.work():
                if prompts.fingerprint == stack.workspace.prompts.fingerprint:
                    KVManager(stack.workspace.store, stack.blended.engine, prompts).keep([hit.text for hit in hits])
                    return len(hits)
                ingest = [prompts.ingest(hit.text) for hit in hits]
                self._own_kv |= {(prompt.fingerprint, prompt.key) for prompt in ingest}
                return sum(1 for _ in stack.blended.engine.precompute(ingest))

        done = await asyncio.to_thread(work)
        self.note = f"The KV of {done} passages is computed now; the next answer can reuse it."

    def check(self) -> asyncio.Task[None] | None:
        """Compare ratio 1 with a full prefill."""
        return self.start("check", self._check())

    async def _check(self) -> None:
        question, hits = await self._current()
        greedy = replace(self._request("blended", question, hits), history=())
        greedy = replace(greedy, sampling=replace(greedy.sampling, temperature=0.0, seed=None))
        turns = []
        for name in ARMS:
            again = BlendOptions(self.controls.policy, 1.0, always=True)
            blend = again if name == "blended" else BlendOptions(enabled=False)
            turn = await self._arm(name).answer(replace(greedy, blend=blend, tenant=self._tenant(name)))
            if turn.stopped:
                raise asyncio.CancelledError
            if turn.problem or turn.completion is None:
                self.problem = turn.problem
                return
            turns.append(turn)
        ids = [turn.completion.token_ids for turn in turns if turn.completion]
        differs = first_difference(*ids)
        self.checks.append(Check(question, differs is None, differs, min(map(len, ids)), *turns))

    def repeat(self, times: int) -> asyncio.Task[None] | None:
        """Ask both arms `times` times, the passages in random order."""
        return self.start("repeat", self._repeat(times))

    async def _repeat(self, times: int) -> None:
        question, hits = await self._current()
        requests = {name: replace(self._request(name, question, hits), history=()) for name in ARMS}
        run = Repeats(question, times, [hit.chunk_id for hit in hits])
        self.repeats.append(run)
        await run_repeats(run, {name: self._arm(name) for name in ARMS}, requests, self.changed)

    def cold(self) -> asyncio.Task[None] | None:
        """Empty this session's caches: fresh cache salts for both panes."""
        return self.start("cold", self._cold())

    async def _cold(self) -> None:
        await self._forget_own()
        self._colds += 1
        self._is_cold = True
        self.note = "Cold: nothing is cached for this session. The next answers compute every passage."

    def warm(self) -> asyncio.Task[None] | None:
        """Fill the caches for the present prompt: the passages' KV, and the baseline's prefix."""
        return self.start("warm", self._warm())

    async def _warm(self) -> None:
        await self._forget_own()
        self._is_cold = False
        if not self.passages:
            self.note = "Warm: the KV that was computed at ingestion is used."
            return
        await self._compute_kv(self.passages)
        words = f"Warm: the KV of the {len(self.passages)} passages is there."
        baseline = self.stack.baseline
        engine = await asyncio.to_thread(lambda: baseline.engine)
        if engine.info.engine == "embedded":
            self.note = f"{words} This engine keeps no prefix for full prefills."
        elif self.question:
            request = self._request("baseline", self.question, tuple(self.passages))
            turn = await baseline.answer(replace(request, sampling=Sampling(max_tokens=1)))
            self.problem = turn.problem
            self.note = f"{words} The baseline has answered this prompt once, so that its prefix cache holds it."

    def upload(self, files: Sequence[tuple[str, bytes]]) -> asyncio.Task[None] | None:
        """Ingest files, one after the other; `uploads` holds the state of each."""
        return self.start("upload", self._upload(files))

    async def _upload(self, files: Sequence[tuple[str, bytes]]) -> None:
        rows = [Uploaded(name) for name, _ in files]
        self.uploads += rows
        for row, (name, content) in zip(rows, files, strict=True):
            row.state = "ingesting"
            self.changed()

            def on_kv(done: int, known: int, row: Uploaded = row) -> None:
                row.kv = (done, known)
                self.version += 1

            try:
                model = self.controls.model
                row.detail = await asyncio.to_thread(self.hub.upload, model, name, content, on_kv)
                row.state = "done"
            except asyncio.CancelledError:
                row.state, row.detail = "failed", "Stopped."
                raise
            except Exception as problem:
                row.state, row.detail = "failed", str(problem) or type(problem).__name__
            self.changed()

    def choose(self, model: str) -> asyncio.Task[None] | None:
        """Switch to another model, once it is open."""
        return self.start("model", self._choose(model))

    async def _choose(self, model: str) -> None:
        await asyncio.to_thread(self.hub.stack, model)
        self.set(model=model)

    def new_conversation(self) -> None:
        """Empty the panes and their histories; passages and controls stay."""
        if not self.busy:
            self.panes = {name: Pane() for name in ARMS}
            self.note, self.problem = "", None
            self.changed()

    # -- what is shown ---------------------------------------------------------------------------------------------

    @property
    def stack(self) -> Stack:
        """Both arms of the chosen model."""
        return self.hub.stack(self.controls.model)

    @property
    def wording(self) -> Wording:
        """The words before the passages; those of the ingestion if they are the same."""
        mine = Wording(self.controls.system.strip(), self.controls.instruction.strip())
        default = self.hub.default_wording
        ingested = Wording(
            SYSTEM if default.system is None else default.system,
            INSTRUCTION if default.instruction is None else default.instruction,
        )
        return default if mine == ingested else mine

    @property
    def speedup(self) -> float | None:
        """How many times faster the blended pane started; None if the panes cannot be compared."""
        return record.speedup(self.panes["blended"].turn, self.panes["baseline"].turn)

    def as_dict(self) -> dict[str, Any]:
        """The whole session for JSON."""
        stack = self.hub.stack(self.controls.model) if self.hub.start.phase == "ready" else None
        engines = {arm.name: arm.opened for arm in stack.arms} if stack else {}
        return {
            "format": record.FORMAT,
            "lmcache_rag": __version__,
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "engines": {name: asdict(engine.info) if engine else None for name, engine in engines.items()},
            "one_engine": stack.one_engine if stack else None,
            "controls": asdict(self.controls),
            "question": self.question,
            "passages": record.passages_as_list(self.passages),
            "speedup": self.speedup,
            "turns": [turn.as_dict() for turn in self.turns],
            "checks": [check.as_dict() for check in self.checks],
            "repeats": [run.as_dict() for run in self.repeats],
            "uploads": [{"name": row.name, "state": row.state, "detail": row.detail} for row in self.uploads],
        }

    async def close(self) -> None:
        """Stop, and drop KV that only this session used."""
        self.stop()
        if self._task is not None:
            with suppress(asyncio.CancelledError):
                await self._task
        await self._forget_own()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _arm(self, name: ArmName) -> Arm:
        return self.stack.blended if name == "blended" else self.stack.baseline

    def _tenant(self, name: ArmName) -> str:
        """The baseline has one cache salt per session, so that no pane helps the other; a cold start fresh ones."""
        if name == "baseline":
            return f"demo {self.id} baseline {self._colds}"
        return f"demo {self.id} cold {self._colds}" if self._is_cold else self.hub.settings.tenant

    def _request(self, name: ArmName, question: str, hits: tuple[Hit, ...]) -> Request:
        chosen = self.controls
        sampling = Sampling(chosen.max_tokens, chosen.temperature, seed=0 if chosen.temperature else None)
        history = self.panes[name].history() if chosen.follow_up else ()
        blend = BlendOptions(chosen.policy, chosen.ratio)
        return Request(question, hits, history, sampling, blend, self.wording, self._tenant(name), self._asks)

    async def _current(self) -> tuple[str, tuple[Hit, ...]]:
        """The question and passages on the page; retrieved if there are none."""
        if not self.passages:
            self.passages = await self.find(self.question, self.controls.top_k)
        return self.question, tuple(self.passages)

    async def _forget_own(self) -> None:
        own, self._own_kv = self._own_kv, set()
        if own and self.hub.start.phase == "ready":
            await asyncio.to_thread(self.stack.blended.engine.forget, own)


async def run_repeats(
    run: Repeats, arms: Mapping[ArmName, Arm], requests: Mapping[ArmName, Request], on_change: Callable[[], None]
) -> None:
    """Fill a run, one request at a time; each pair of requests has one order of passages.

    Args:
        run: The run to fill.
        arms: The arms.
        requests: The request of each arm.
        on_change: Called after each pair.

    Raises:
        CancelledError: It was stopped; the pairs so far stay.
    """
    try:
        for _ in range(run.wanted):
            hits = list(requests["blended"].hits)
            random.shuffle(hits)
            names = list(ARMS)
            random.shuffle(names)
            turns, alone = {}, True
            for name in names:
                turn = await arms[name].answer(replace(requests[name], hits=tuple(hits)))
                if turn.stopped:
                    raise asyncio.CancelledError
                if turn.problem or turn.completion is None:
                    run.problem = turn.problem
                    return
                turns[name], alone = turn.completion, alone and turn.alone
            blended, baseline = turns["blended"], turns["baseline"]
            run.pairs.append(
                Pair(
                    tuple(hit.chunk_id for hit in hits),
                    names[0],
                    blended.stats.ttft_ms,
                    baseline.stats.ttft_ms,
                    blended.stats.reused_tokens,
                    blended.stats.prefix_tokens,
                    baseline.stats.prefix_tokens,
                    blended.text != baseline.text,
                    alone,
                )
            )
            on_change()
    finally:
        run.finished = True
        on_change()
