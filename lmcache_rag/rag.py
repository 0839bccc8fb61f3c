"""Ask questions: retrieve chunks, blend their KV, answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from lmcache_rag.answering import Answering
from lmcache_rag.engines.base import BlendOptions, Completion, ReuseStats, Sampling, TextDelta
from lmcache_rag.engines.twins import iterate_in_thread
from lmcache_rag.errors import ConfigError, LMCacheRAGError, PromptError
from lmcache_rag.fitting import fit

if TYPE_CHECKING:
    from lmcache_rag.embedding import Embedder
    from lmcache_rag.engines.base import Engine
    from lmcache_rag.prompt import PromptBuilder, Turn
    from lmcache_rag.store import Hit, Store


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with where it comes from.

    Attributes:
        question: What was asked.
        text: The answer.
        sources: The chunks in the prompt, in their order.
        dropped: Retrieved chunks that did not fit the context, lowest score first.
        completion: What the engine gave, with the reuse statistics.
    """

    question: str
    text: str
    sources: tuple[Hit, ...]
    dropped: tuple[Hit, ...]
    completion: Completion

    @property
    def stats(self) -> ReuseStats:
        """What was reused, recomputed and computed."""
        return self.completion.stats


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
        """How many times sooner the blended answer started."""
        return self.full.stats.ttft_ms / max(self.blended.stats.ttft_ms, 1e-9)


RAGEvent: TypeAlias = TextDelta | Answer


class RAG:
    """Answers questions from a store. Safe to use from several threads and from an event loop.

    Args:
        store: Where the chunks are.
        engine: Computes the answers.
        embedder: Must be the one that the store was made with.
        prompts: Must be the one that the chunks were ingested with.
        top_k: Chunks for a question, unless said otherwise.
        sampling: How tokens are chosen, unless said otherwise.
        blend: How KV is reused, unless said otherwise.
        keep_missing: Compute and keep the KV of chunks that had none, once the question that needed it is answered.
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
    ) -> None:
        self.store, self.engine, self.embedder, self.prompts = store, engine, embedder, prompts
        self.top_k = top_k
        self.sampling = sampling or Sampling()
        self.blend = blend or BlendOptions()
        self._answering = Answering(store, engine, prompts, keep_missing=keep_missing)

    # -- retrieval ----------------------------------------------------------------------------------------------

    def retrieve(self, question: str, *, top_k: int | None = None) -> list[Hit]:
        """The store's chunks that are nearest to the question, best first.

        Raises:
            PromptError: The question is empty.
            StoreError: The store was made with another embedder.
        """
        k = self.top_k if top_k is None else top_k
        if k < 1:
            raise ConfigError(f"top_k must be at least 1; got {k}.")
        if not question.strip():
            raise PromptError("The question is empty.", remedy="Ask something.")
        self.store.registry.require_embedder(self.embedder.fingerprint)
        return self.store.index.search(self.embedder.embed_query(question), k)

    async def aretrieve(self, question: str, *, top_k: int | None = None) -> list[Hit]:
        """Async twin of retrieve."""
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
            history: Earlier turns of the conversation. They stand behind the chunks, which so stay reusable.
            sampling: How tokens are chosen.
            blend: How KV is reused.

        Raises:
            PromptError: The question is empty, or the history out of order.
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

        After the Answer, missing KV is computed and kept; a caller that stops there skips this.
        """
        sampling, blend = sampling or self.sampling, blend or self.blend
        found = list(hits) if hits is not None else self.retrieve(question, top_k=top_k)
        fitted = fit(
            self.prompts,
            question,
            found,
            limit=self.engine.info.context_length,
            history=history,
            max_tokens=sampling.max_tokens,
        )
        texts = [hit.text for hit in fitted.kept]
        prompt = self.prompts.query(texts, question, history)
        notes = []
        if fitted.dropped:
            notes.append(f"{len(fitted.dropped)} of {len(found)} chunks did not fit the context and were dropped.")
        for event in self._answering.stream(texts, prompt, sampling, blend, notes):
            if isinstance(event, Completion):
                yield Answer(question, event.text, fitted.kept, fitted.dropped, event)
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
        """Async twin of ask. Cancelling it stops the computation."""
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
        """Async twin of stream."""
        events = self.stream(question, top_k=top_k, hits=hits, history=history, sampling=sampling, blend=blend)
        async for event in iterate_in_thread(events):
            yield event

    def ask_batch(self, questions: Sequence[str], *, top_k: int | None = None) -> list[Answer | LMCacheRAGError]:
        """Answer several questions, in order. One that fails gives its error instead; the others go on."""
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
        """Async twin of ask_batch, several at a time."""
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
        full = self.ask(question, hits=hits, blend=replace(self.blend, enabled=False))
        return Comparison(blended, full, first_difference(blended.completion.token_ids, full.completion.token_ids))


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Index of the first place in which two sequences differ, or None."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return None if len(first) == len(second) else min(len(first), len(second))
