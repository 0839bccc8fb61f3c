"""One way to answer: an engine, whether it blends, and the other requests on it. Uses the library's engines."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from lmcache_rag.demo.record import ArmName, Problem, Turn
from lmcache_rag.engines.base import BlendOptions, Completion, Sampling, StreamEvent, TextDelta
from lmcache_rag.rag import fit_context

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine, QueryPrompt
    from lmcache_rag.prompt import PromptBuilder
    from lmcache_rag.prompt import Turn as HistoryTurn
    from lmcache_rag.rag import FittedContext
    from lmcache_rag.store import Hit

T = TypeVar("T")
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_BUILDERS = 16  # prompt builders of one arm that are kept


@dataclass(eq=False)
class Visit:
    """One request's time on an engine.

    Attributes:
        alone: Whether nothing else was computed there from its sending to its first token.
        measured: Whether it has its first token; later events do not change `alone`.
    """

    alone: bool = True
    measured: bool = False


class Traffic:
    """Requests and ingestion on one engine, of all sessions.

    Args:
        exclusive: Admit one request at a time. For an engine that computes them one by one: the wait for others is then
            not part of the time to the first token.
        settle: Called in a thread before an exclusive request is admitted: waits for work of aborted requests.
    """

    def __init__(self, *, exclusive: bool, settle: Callable[[], None] = lambda: None) -> None:
        self._gate = asyncio.Lock() if exclusive else None
        self._settle = settle
        self._lock = threading.Lock()
        self._active: set[Visit] = set()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[Visit]:
        """A request that is sent now."""
        async with self._gate or nullcontext():
            if self._gate is not None:
                await asyncio.to_thread(self._settle)
            with self.work() as visit:
                yield visit

    @contextmanager
    def work(self) -> Iterator[Visit]:
        """A `with` block in which something is computed; from any thread."""
        visit = Visit()
        with self._lock:
            visit.alone = not self._active
            for other in self._active:
                other.alone = other.alone and other.measured
            self._active.add(visit)
        try:
            yield visit
        finally:
            with self._lock:
                self._active.discard(visit)


@dataclass(frozen=True, slots=True)
class Wording:
    """The text before the passages; None: the library's defaults."""

    system: str | None = None
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A request to an arm.

    Attributes:
        question: The question.
        hits: The passages, in their order.
        history: Earlier turns that are sent along.
        sampling: How tokens are chosen.
        blend: How KV is reused.
        wording: The text before the passages.
        tenant: KV of different tenants is never shared; a server gets a cache salt for it.
        ask: Number of the question in its session.
    """

    question: str
    hits: tuple[Hit, ...]
    history: tuple[HistoryTurn, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    blend: BlendOptions = field(default_factory=BlendOptions)
    wording: Wording = Wording()
    tenant: str = ""
    ask: int = 0


class Arm:
    """Answers requests by one engine.

    Args:
        name: Name of the arm.
        open_engine: Opens the engine, or gives the one that is open; called again after it failed.
        traffic: All requests and ingestion on this engine.
        blends: Whether it blends; otherwise it computes every prompt in full.
    """

    def __init__(self, name: ArmName, open_engine: Callable[[], Engine], traffic: Traffic, *, blends: bool) -> None:
        self.name, self.traffic, self.blends = name, traffic, blends
        self._open = open_engine
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self._builders: OrderedDict[tuple[Wording, str], PromptBuilder] = OrderedDict()

    @property
    def engine(self) -> Engine:
        """The engine; opened by the first call, which may take a while.

        Raises:
            LMCacheRAGError: It cannot be opened.
        """
        with self._lock:
            if self._engine is None:
                self._engine = self._open()
            return self._engine

    @property
    def opened(self) -> Engine | None:
        """The engine, if it is open."""
        return self._engine

    @property
    def why_not(self) -> str:
        """Why the engine does not blend; "" if it does, or if that is unknown."""
        known = self._engine
        return "" if known is None or known.info.can_blend else known.info.why_not

    def prompts(self, wording: Wording, tenant: str = "") -> PromptBuilder:
        """The prompt builder for this wording and tenant."""
        from lmcache_rag.prompt import PromptBuilder, PromptFormat

        key = (wording, tenant)
        engine = self.engine
        with self._lock:
            if found := self._builders.get(key):
                self._builders.move_to_end(key)
                return found
        texts = {"system": wording.system, "instruction": wording.instruction}
        words = PromptFormat(**{name: text for name, text in texts.items() if text is not None})  # type: ignore[arg-type]
        made = PromptBuilder(engine.tokenizer, engine.info, format=words, tenant=tenant)
        with self._lock:
            self._builders[key] = made
            while len(self._builders) > _BUILDERS:
                self._builders.popitem(last=False)
        return made

    def prompt(self, request: Request) -> tuple[QueryPrompt, FittedContext]:
        """The prompt of a request, and which of its passages fit.

        Raises:
            ContextLengthError: Not even the question fits.
            LMCacheRAGError: The engine cannot be opened.
        """
        prompts = self.prompts(request.wording, request.tenant)
        fitted = fit_context(
            prompts,
            request.question,
            request.hits,
            limit=self.engine.info.context_length,
            history=request.history,
            max_tokens=request.sampling.max_tokens,
        )
        return prompts.query([hit.text for hit in fitted.kept], request.question, request.history), fitted

    def tokens(self, request: Request) -> tuple[int, int]:
        """Tokens of the whole prompt, whether it fits or not, and of the model's context."""
        prompts = self.prompts(request.wording, request.tenant)
        prompt = prompts.query([hit.text for hit in request.hits], request.question, request.history)
        return len(prompt), self.engine.info.context_length

    async def answer(
        self,
        request: Request,
        on_text: Callable[[str], None] = lambda text: None,
        on_sent: Callable[[], None] = lambda: None,
        together: asyncio.Barrier | None = None,
    ) -> Turn:
        """Answer a request. An error is part of the turn; cancelling stops the engine and gives a stopped turn.

        Args:
            request: The request.
            on_text: Called in the event loop with each piece of the answer.
            on_sent: Called when the request is sent.
            together: Send at the same time as the others that wait there, once every prompt is made: making one takes
                this process tens of milliseconds, during which it would not notice another arm's first token.
        """
        blend = replace(request.blend, enabled=self.blends and request.blend.enabled)
        turn = Turn(request.ask, self.name, "", request.question, request.hits, (), "", request.sampling, blend)
        pieces: list[str] = []
        begin = time.perf_counter()
        try:
            prompt, fitted = await asyncio.to_thread(self.prompt, request)
            info = self.engine.info
            if blend.enabled and not info.can_blend and info.falls_back:
                blend = replace(blend, enabled=False)
            spans = tuple((chunk.start, chunk.end) for chunk in prompt.chunks)
            turn = replace(
                turn, model=info.model, passages=fitted.kept, dropped=fitted.dropped, blend=blend, spans=spans
            )
            if together is not None:
                with suppress(asyncio.BrokenBarrierError):  # another arm failed before it could send
                    await together.wait()
            async with self.traffic.request() as visit:
                on_sent()
                begin = time.perf_counter()
                async with aclosing(stream(self.engine, prompt, request.sampling, blend)) as events:
                    async for event in events:
                        if isinstance(event, TextDelta):
                            if turn.first_text_ms is None:
                                visit.measured = True
                                turn = replace(turn, first_text_ms=_ms_since(begin), alone=visit.alone)
                            pieces.append(event.text)
                            on_text(event.text)
                        else:
                            turn = replace(turn, completion=_with_dropped(event, turn))
        except asyncio.CancelledError:
            turn = replace(turn, stopped=True)
        except Exception as problem:
            turn = replace(turn, problem=Problem.of(problem))
            if together is not None:
                await together.abort()
        return replace(turn, text="".join(pieces), total_ms=_ms_since(begin))


async def stream(
    engine: Engine, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions
) -> AsyncGenerator[StreamEvent, None]:
    """The engine's stream in an event loop. Leaving early ends the request: on a server at once.

    An engine in this process stops within one token, or at the end of its prefill.
    """
    if engine.info.engine == "embedded":
        events: AsyncIterator[StreamEvent] = iterate(engine.stream(prompt, sampling, blend))
    else:
        events = engine.astream(prompt, sampling, blend)
    try:
        async for event in events:
            yield event
    finally:
        if close := getattr(events, "aclose", None):
            await close()


def join_threads(timeout: float) -> None:
    """Wait for the threads of abandoned streams: the process must not end while one of them computes."""
    end = time.monotonic() + timeout
    for thread in list(_threads):
        thread.join(max(0.0, end - time.monotonic()))


async def iterate(iterator: Iterator[T]) -> AsyncIterator[T]:
    """Drive a blocking iterator in a new thread, which closes it. Leaving early does not wait for the thread."""
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[tuple[str, T | BaseException | None]] = asyncio.Queue()
    stop = threading.Event()

    def put(kind: str, item: T | BaseException | None = None) -> None:
        with suppress(RuntimeError):  # the loop may be closed
            loop.call_soon_threadsafe(items.put_nowait, (kind, item))

    def work() -> None:
        try:
            for item in iterator:
                if stop.is_set():
                    break
                put("item", item)
        except BaseException as problem:  # raised in the event loop
            put("error", problem)
        finally:
            if close := getattr(iterator, "close", None):
                close()
            put("end")

    thread = threading.Thread(target=work, name="lmcache-rag-demo", daemon=True)
    _threads.add(thread)
    thread.start()
    try:
        while True:
            kind, item = await items.get()
            if kind == "end":
                return
            if kind == "error":
                raise item  # type: ignore[misc]
            yield item  # type: ignore[misc]
    finally:
        stop.set()


def _with_dropped(done: Completion, turn: Turn) -> Completion:
    if not turn.dropped:
        return done
    total = len(turn.passages) + len(turn.dropped)
    note = f"{len(turn.dropped)} of {total} passages did not fit the context and were left out."
    return replace(done, warnings=(*done.warnings, note))


def _ms_since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1e3
