"""Ask questions: retrieve chunks, blend their KV, answer."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from lmcache_rag._utils import iterate_in_thread, well_formed
from lmcache_rag.engines.base import (
    BlendOptions,
    Completion,
    ReuseStats,
    Sampling,
    StreamEvent,
    TextDelta,
)
from lmcache_rag.errors import ConfigError, ContextLengthError, LMCacheRAGError, PromptError, StoreLockedError
from lmcache_rag.kv_manager import KVManager
from lmcache_rag.kv_removal import IngestPrompts
from lmcache_rag.lazy_fill import LazyFillMode, fill_of
from lmcache_rag.passage_order import Order, OrderMode, numbered, passage_order
from lmcache_rag.trace import TraceWriter, opened

if TYPE_CHECKING:
    from lmcache_rag.embedding import Embedder
    from lmcache_rag.engines.base import Engine, QueryPrompt
    from lmcache_rag.prompt import PromptBuilder, Turn
    from lmcache_rag.store import Hit, Store

log = logging.getLogger("lmcache_rag")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its sources.

    Attributes:
        question: The question.
        text: The answer.
        sources: The chunks in the prompt, in their order.
        dropped: Retrieved chunks that did not fit the context, lowest score first.
        completion: The engine's answer, with the reuse statistics.
        labels: The labels of the sources in the prompt, for citations; empty without.
    """

    question: str
    text: str
    sources: tuple[Hit, ...]
    dropped: tuple[Hit, ...]
    completion: Completion
    labels: tuple[str, ...] = ()

    @property
    def stats(self) -> ReuseStats:
        """The reuse statistics."""
        return self.completion.stats

    @property
    def cited(self) -> tuple[str, ...]:
        """Those labels that the answer cites, in the order in which it does."""
        found = re.findall(r"\d+", " ".join(re.findall(r"\[([\d,; ]+)\]", self.text)))
        return tuple(label for label in dict.fromkeys(found) if label in self.labels)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same prompt answered twice: from blended KV and from a full prefill.

    Attributes:
        blended: The answer from blended KV.
        full: The answer of a full prefill.
        first_difference: Index of the first token in which they differ, or None when they are equal.
    """

    blended: Answer
    full: Answer
    first_difference: int | None

    @property
    def speedup(self) -> float:
        """TTFT of the full prefill over that of the blended answer."""
        return self.full.stats.ttft_ms / max(self.blended.stats.ttft_ms, 1e-9)


def retrieve(store: Store, embedder: Embedder, question: str, top_k: int) -> list[Hit]:
    """A store's chunks that are nearest to a question, best first. Needs no language model. See RAG.retrieve."""
    if top_k < 1:
        raise ConfigError(f"top_k must be at least 1; got {top_k}.")
    if not question.strip():
        raise PromptError("The question is empty.", remedy="Ask something.")
    store.registry.require_embedder(embedder.fingerprint)
    return store.index.search(embedder.embed_query(question), top_k)


RAGEvent: TypeAlias = TextDelta | Answer


class RAG:
    """Answers questions from a store. Safe to use from several threads and from an event loop.

    Args:
        store: Where the chunks are.
        engine: Computes the answers.
        embedder: Must be the one that the store was made with.
        prompts: Must be the one that the chunks were ingested with.
        top_k: Chunks for a question, by default.
        sampling: How tokens are chosen, by default.
        blend: How KV is reused, by default.
        keep_missing: Compute and store the KV of chunks that had none, once the question that needed it is answered.
        cite: Give each passage its chunk id as a label and ask for citations. The same KV is reused.
        trace: Appends which chunks each question used, see lmcache_rag.trace; a file, or its writer.

    Raises:
        ConfigError: The trace cannot be written.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        embedder: Embedder,
        prompts: PromptBuilder,
        *,
        top_k: int = 4,
        sampling: Sampling | None = None,
        blend: BlendOptions | None = None,
        keep_missing: bool = True,
        cite: bool = False,
        trace: TraceWriter | str | os.PathLike[str] | None = None,
    ) -> None:
        self.store, self.engine, self.embedder, self.prompts = store, engine, embedder, prompts
        self.cite = cite
        self.top_k = top_k
        self.sampling = sampling or Sampling()
        self.blend = blend or BlendOptions()
        self._answering = AnswerStreamer(store, engine, prompts, keep_missing=keep_missing, trace=trace)

    # -- retrieval ----------------------------------------------------------------------------------------------

    def retrieve(self, question: str, *, top_k: int | None = None) -> list[Hit]:
        """The store's chunks that are nearest to the question, best first.

        Raises:
            PromptError: The question is empty.
            StoreError: The store was made with another embedder.
        """
        k = self.top_k if top_k is None else top_k
        return retrieve(self.store, self.embedder, question, k)

    async def aretrieve(self, question: str, *, top_k: int | None = None) -> list[Hit]:
        """Async version of retrieve."""
        return await asyncio.to_thread(self.retrieve, question, top_k=top_k)

    # -- answers ------------------------------------------------------------------------------------------------

    def ask(
        self,
        question: str,
        *,
        top_k: int | None = None,
        hits: Sequence[Hit] | None = None,
        history: Sequence[Turn] = (),
        sampling: Sampling | None = None,
        blend: BlendOptions | None = None,
    ) -> Answer:
        """Answer a question.

        Args:
            question: The question.
            top_k: Chunks to retrieve.
            hits: Use these chunks in this order instead of retrieving.
            history: Earlier turns of the conversation. They follow the chunks, so that these stay reusable.
            sampling: How tokens are chosen.
            blend: How KV is reused.

        Raises:
            PromptError: The question is empty, or the roles in the history do not alternate.
            ContextLengthError: The question alone is longer than the model's context.
            LMCacheRAGError: See the store's and the engine's errors.
        """
        events = self.stream(question, top_k=top_k, hits=hits, history=history, sampling=sampling, blend=blend)
        for event in events:
            if isinstance(event, Answer):
                answer = event
        return answer

    def stream(
        self,
        question: str,
        *,
        top_k: int | None = None,
        hits: Sequence[Hit] | None = None,
        history: Sequence[Turn] = (),
        sampling: Sampling | None = None,
        blend: BlendOptions | None = None,
    ) -> Iterator[RAGEvent]:
        """Answer piece by piece: TextDelta events, then one Answer. Arguments and errors as for ask.

        After the Answer, missing KV is computed and stored; a caller that stops at the Answer skips this.
        """
        yield from self._stream(question, top_k, hits, history, sampling, blend)

    def _stream(
        self,
        question: str,
        top_k: int | None,
        hits: Sequence[Hit] | None,
        history: Sequence[Turn],
        sampling: Sampling | None,
        blend: BlendOptions | None,
        *,
        traced: bool = True,
    ) -> Iterator[RAGEvent]:
        sampling, blend = sampling or self.sampling, blend or self.blend
        question = well_formed(question)
        found = list(hits) if hits is not None else self.retrieve(question, top_k=top_k)
        fitted = fit_context(
            self.prompts,
            question,
            found,
            limit=self.engine.info.context_length,
            history=history,
            max_tokens=sampling.max_tokens,
            cite=self.cite,
        )
        places, order = arranged(self.engine, self.prompts, [hit.text for hit in fitted.kept], blend.order)
        sources = tuple(fitted.kept[place] for place in places)
        texts = [hit.text for hit in sources]
        labels = tuple(str(hit.chunk_id) for hit in sources) if self.cite else ()
        prompt = replace(self.prompts.query(texts, question, history, labels=labels), order=order)
        notes = []
        if fitted.dropped:
            notes.append(f"{len(fitted.dropped)} of {len(found)} chunks did not fit the context and were dropped.")
        traced_as = question if traced else None
        for event in self._answering.stream(texts, prompt, sampling, blend, notes, question=traced_as):
            if isinstance(event, Completion):
                yield Answer(question, event.text, sources, fitted.dropped, event, labels)
            else:
                yield event

    async def aask(
        self,
        question: str,
        *,
        top_k: int | None = None,
        hits: Sequence[Hit] | None = None,
        history: Sequence[Turn] = (),
        sampling: Sampling | None = None,
        blend: BlendOptions | None = None,
    ) -> Answer:
        """Async version of ask. Cancelling it stops the computation."""
        events = self.astream(question, top_k=top_k, hits=hits, history=history, sampling=sampling, blend=blend)
        async for event in events:
            if isinstance(event, Answer):
                answer = event
        return answer

    async def astream(
        self,
        question: str,
        *,
        top_k: int | None = None,
        hits: Sequence[Hit] | None = None,
        history: Sequence[Turn] = (),
        sampling: Sampling | None = None,
        blend: BlendOptions | None = None,
    ) -> AsyncIterator[RAGEvent]:
        """Async version of stream."""
        events = self.stream(question, top_k=top_k, hits=hits, history=history, sampling=sampling, blend=blend)
        async for event in iterate_in_thread(events):
            yield event

    def ask_batch(self, questions: Sequence[str], *, top_k: int | None = None) -> list[Answer | LMCacheRAGError]:
        """Answer several questions, in order. One that fails gives its error as result; the others are answered."""
        answers: list[Answer | LMCacheRAGError] = []
        for question in questions:
            try:
                answers.append(self.ask(question, top_k=top_k))
            except LMCacheRAGError as problem:
                answers.append(problem)
        return answers

    async def aask_batch(
        self, questions: Sequence[str], *, top_k: int | None = None, concurrency: int = 8
    ) -> list[Answer | LMCacheRAGError]:
        """Async version of ask_batch, several at a time."""
        gate = asyncio.Semaphore(concurrency)

        async def one(question: str) -> Answer | LMCacheRAGError:
            async with gate:
                try:
                    return await self.aask(question, top_k=top_k)
                except LMCacheRAGError as problem:
                    return problem

        return list(await asyncio.gather(*map(one, questions)))

    def compare(self, question: str, *, hits: Sequence[Hit] | None = None, top_k: int | None = None) -> Comparison:
        """Answer once from blended KV and once by a full prefill, with the same chunks in the same order."""
        hits = list(hits) if hits is not None else self.retrieve(question, top_k=top_k)
        blended = self.ask(question, hits=hits)
        hits, same = blended.sources, replace(self.blend, enabled=False, order="retrieved")
        *_, full = self._stream(question, None, hits, (), None, same, traced=False)
        assert isinstance(full, Answer)  # noqa: S101 - what stream() promises
        return Comparison(blended, full, first_difference(blended.completion.token_ids, full.completion.token_ids))


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Index at which two sequences first differ, or None."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return None if len(first) == len(second) else min(len(first), len(second))


# -- the engine's answer ----------------------------------------------------------------------------------------------


class AnswerStreamer:
    """Streams an engine's answers, logs once if it cannot blend, and stores the KV that a question missed.

    Args:
        store: Where the chunks are registered.
        engine: Computes the answers.
        prompts: Makes the prompts.
        keep_missing: Compute and keep the KV of registered chunks that had none, once the question is answered.
        lazy_fill: At which use chunks without KV are ingested in the background instead, registered or not.
            None: not in the background.
        trace: Appends which chunks each question used; a file, or its writer.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        prompts: IngestPrompts,
        *,
        keep_missing: bool = True,
        lazy_fill: LazyFillMode | None = None,
        trace: TraceWriter | str | os.PathLike[str] | None = None,
    ) -> None:
        self._store, self._engine = store, engine
        self.trace = opened(trace)
        self.keep_missing = keep_missing and lazy_fill is None
        self.lazy_fill = lazy_fill
        self._kv = KVManager(store, engine, prompts)
        self._warned = False
        self._lock = threading.Lock()

    def stream(
        self,
        texts: Sequence[str],
        prompt: QueryPrompt,
        sampling: Sampling,
        blend: BlendOptions,
        notes: Sequence[str] = (),
        registered: Sequence[bool] = (),
        *,
        question: str | None = "",
    ) -> Iterator[StreamEvent]:
        """Answer piece by piece; missing KV is computed and stored after the Completion, or in the background.

        Args:
            texts: The chunks in the prompt.
            prompt: The prompt.
            sampling: How tokens are chosen.
            blend: How KV is reused.
            notes: Warnings for the Completion.
            registered: For each text, whether it is in the store; for lazy fill.
            question: The question, for the trace; None: not for the trace.
        """
        blend = self.allowed(blend)
        self.begin()
        for event in self._engine.stream(prompt, sampling, blend):
            if isinstance(event, Completion):
                if question is not None:
                    self.record(question, texts, prompt)
                event = self.filled(texts, registered, prompt, event, blend)
                yield replace(event, warnings=(*event.warnings, *notes)) if notes else event
                self.keep(texts, event, blend)
            else:
                yield event

    def allowed(self, blend: BlendOptions) -> BlendOptions:
        """The options for this engine: full prefills if it cannot blend and falls back, which is logged once."""
        info = self._engine.info
        if blend.enabled and not info.can_blend and info.falls_back:
            with self._lock:
                if not self._warned and not info.said_why:
                    self._warned = True
                    log.warning("%s does not blend: %s. Answers come from full prefills.", info.model, info.why_not)
            return replace(blend, enabled=False)
        return blend

    def record(self, question: str, texts: Sequence[str], prompt: QueryPrompt) -> None:
        """Append an answered question to the trace, if there is one."""
        if self.trace is not None and len(texts) == len(prompt.chunks):
            tokens = [chunk.end - chunk.start for chunk in prompt.chunks]
            self.trace.record(question, texts, tokens, tenant=prompt.tenant)

    def begin(self) -> None:
        """A question begins: ingestion in the background waits for it."""
        if self.lazy_fill not in (None, "never"):
            fill_of(self._engine).question()

    def filled(
        self,
        texts: Sequence[str],
        registered: Sequence[bool],
        prompt: QueryPrompt,
        done: Completion,
        blend: BlendOptions,
    ) -> Completion:
        """Queue the ingestion of chunks whose KV an answer missed; the answer gets a warning. Never waits.

        A registered chunk is meant to have KV, so it is ingested at its first use. An embedded engine keeps KV
        of registered chunks only: nothing would ever delete the files of others. A server's count of a chunk's uses,
        by whomever, counts for a client that has seen it once.
        """
        if prompt.order != done.stats.order:
            done = replace(done, stats=replace(done.stats, order=prompt.order))
        if self.lazy_fill in (None, "never") or not (blend.enabled and done.missed):
            return done
        fill, queued = fill_of(self._engine), 0
        for index in done.missed:
            known = index < len(registered) and registered[index]
            if known or self._engine.info.engine != "embedded":
                queued += fill.offer(
                    prompt.chunks[index].key,
                    partial(self._kv.fill, texts[index]),
                    uses=1 if known or self.lazy_fill == "first" or index in done.used_before else 2,
                    owner=self._store,
                )
        if not queued:
            return done
        return replace(done, warnings=(*done.warnings, f"{queued} passage(s) without KV are ingested now."))

    def keep(self, texts: Sequence[str], done: Completion, blend: BlendOptions) -> None:
        """Store the KV that a question missed. An error is logged, and does not fail the answer."""
        if not (self.keep_missing and blend.enabled and done.stats.chunks_missed):
            return
        try:
            self._kv.keep(texts)
        except StoreLockedError:
            log.debug("another process writes to the store; the missing KV is stored at a later question")
        except LMCacheRAGError as problem:
            log.warning("Could not store the missing KV: %s", problem)


# -- the order of the chunks -------------------------------------------------------------------------------------------


def arranged(
    engine: Engine, prompts: PromptBuilder, texts: Sequence[str], mode: OrderMode, ranks: Sequence[int] = ()
) -> tuple[list[int], Order]:
    """Indices of these chunks in the order of the prompt, and which order that is.

    Args:
        engine: What answers.
        prompts: Makes the prompt.
        texts: The chunks, as retrieved.
        mode: See BlendOptions.
        ranks: The ranks that a program may have written before them, from 1; chunks so numbered keep their order.
    """
    form = prompts.format
    if "{question}" in form.lead:  # nothing after it repeats
        return list(range(len(texts))), "retrieved"
    keys = [prompts.chunk_key(text) for text in texts]
    counted = "{rank}" in form.separator or numbered(texts, ranks)
    return passage_order(engine).arrange(keys, mode, numbered=counted)


# -- chunks that fit the context --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FittedContext:
    """Chunks by whether they fit: `kept` in their order, `dropped` lowest score first."""

    kept: tuple[Hit, ...]
    dropped: tuple[Hit, ...]


def fit_context(
    prompts: PromptBuilder,
    question: str,
    hits: Sequence[Hit],
    *,
    limit: int,
    history: Sequence[Turn] = (),
    max_tokens: int = 0,
    cite: bool = False,
) -> FittedContext:
    """Choose the chunks that fit the context with question and answer; the lowest scores are dropped first.

    Args:
        prompts: Makes the prompt.
        question: The question.
        hits: The chunks.
        limit: The model's context, in tokens.
        history: Earlier turns of the conversation.
        max_tokens: Most tokens of the answer.
        cite: Whether the chunks get labels, their ids, and the answer is to cite them.

    Raises:
        ContextLengthError: Not even the question fits.
    """
    separator = max(len(prompts.encode(prompts.format.separator)), 1) + 2
    labels = [str(hit.chunk_id) for hit in hits] if cite else []
    if longest := max(labels, key=len, default=""):
        separator += len(prompts.encode(prompts.label_text(longest)))
    sizes = [len(prompts.chunk_ids(hit.text)) + separator for hit in hits]
    bare = len(prompts.query([], question, history, labels=[longest] if longest else []))
    return fit_sizes(hits, sizes, bare, limit=limit, max_tokens=max_tokens, has_history=bool(history))


def fit_sizes(
    hits: Sequence[Hit], sizes: Sequence[int], bare: int, *, limit: int, max_tokens: int, has_history: bool
) -> FittedContext:
    """As fit_context, for chunks that take so many tokens each, in a prompt that takes `bare` tokens without them."""
    if bare >= limit:
        raise ContextLengthError(
            f"The question{' and the conversation' if has_history else ''} take {bare} tokens, the model's context "
            f"holds {limit}.",
            remedy="Ask a shorter question or start a new chat." if has_history else "Ask a shorter question.",
        )
    # Reserve room for the answer, but never so much that no passage fits.
    room = limit - bare - min(max_tokens, (limit - bare) // 2)
    total = sum(sizes)
    dropped: list[int] = []
    for index in sorted(range(len(hits)), key=lambda i: hits[i].score):
        if total <= room:
            break
        dropped.append(index)
        total -= sizes[index]
    if dropped:
        log.warning(
            "%d of %d chunks do not fit the context of %d tokens and were dropped, lowest score first. "
            "Lower --top-k or --max-tokens, or use a model with a longer context.",
            len(dropped),
            len(hits),
            limit,
        )
    gone = set(dropped)
    return FittedContext(tuple(h for i, h in enumerate(hits) if i not in gone), tuple(hits[i] for i in dropped))
