"""Blended prompts for a framework: answered by the engine, or sent by the user's own OpenAI client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache_rag._utils import iterate_in_thread
from lmcache_rag.engines import vllm_answer as wire
from lmcache_rag.engines.base import (
    BlendOptions,
    Completion,
    QueryPrompt,
    ReuseStats,
    Sampling,
    StreamEvent,
)
from lmcache_rag.errors import EngineError, PromptError
from lmcache_rag.lazy_fill import FillCounts, cancel, fill_of, mode_of
from lmcache_rag.rag import AnswerStreamer, fit_context

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.prompt import PromptBuilder, Turn
    from lmcache_rag.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Prompted:
    """A prompt and what it was made of.

    Attributes:
        prompt: Token ids, with the places of the chunks.
        question: The question.
        texts: The chunks in it, in their order.
        kept: Which of the given texts these are.
        dropped: Which did not fit the context.
        registered: For each of the texts, whether it stands in the registry as it is here. If not, something changed it
            after retrieval, or it was never ingested.
    """

    prompt: QueryPrompt
    question: str
    texts: tuple[str, ...]
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    registered: tuple[bool, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if not self.dropped:
            return ()
        given = len(self.kept) + len(self.dropped)
        return (f"{len(self.dropped)} of {given} chunks did not fit the context and were dropped.",)


class Blender:
    """Makes blended prompts over a workspace, and reads what came back. Safe to use from several threads.

    Args:
        workspace: Store, engine and prompts.
        blend: How KV is reused; None: as the workspace's settings say.
        sampling: How tokens are chosen where the engine answers itself; None: as the settings say.
        lazy_fill: At which use a passage without KV is ingested in the background: "first", "second" or "never"; None:
            as the settings say.

    Raises:
        ConfigError: There is no such lazy_fill.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        blend: BlendOptions | None = None,
        sampling: Sampling | None = None,
        lazy_fill: str | None = None,
    ) -> None:
        settings = workspace.settings
        self.workspace = workspace
        self.engine: Engine = workspace.engine
        self.prompts: PromptBuilder = workspace.prompts
        self.blend = blend or BlendOptions(settings.policy, settings.ratio, settings.blend)
        self.sampling = sampling or Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature)
        self.lazy_fill = mode_of(lazy_fill or settings.lazy_fill)
        self._answering = AnswerStreamer(workspace.store, self.engine, self.prompts, lazy_fill=self.lazy_fill)

    # -- the prompt ---------------------------------------------------------------------------------------------

    def prompted(
        self,
        texts: Sequence[str],
        question: str,
        *,
        history: Sequence[Turn] = (),
        scores: Sequence[float | None] | None = None,
        max_tokens: int | None = None,
    ) -> Prompted:
        """The prompt for these chunks in this order. What does not fit the context is dropped, lowest score first.

        Args:
            texts: The chunks. One without tokens is left out.
            question: The question.
            history: Earlier turns; they stand behind the chunks, which so stay reusable.
            scores: One for each text, larger is better. Without scores, later texts count as worse.
            max_tokens: Most tokens of the answer.

        Raises:
            PromptError: The question is empty, or the history out of order.
            ContextLengthError: The question alone is longer than the context.
        """
        from lmcache_rag.store import Hit

        if not question.strip():
            raise PromptError("The question is empty.", remedy="Ask something.")
        given = list(scores) if scores is not None else [None] * len(texts)
        ranked = [-float(i) if score is None else float(score) for i, score in enumerate(given)]
        if scores is not None and any(score is None for score in given):
            ranked = [-float(i) for i in range(len(texts))]  # some only: they cannot be compared
        hits = [Hit(i, text, score, 0, ()) for i, (text, score) in enumerate(zip(texts, ranked, strict=True))]
        fitted = fit_context(
            self.prompts,
            question,
            [hit for hit in hits if self.prompts.chunk_ids(hit.text)],
            limit=self.engine.info.context_length,
            history=history,
            max_tokens=self.sampling.max_tokens if max_tokens is None else max_tokens,
        )
        kept = tuple(hit.text for hit in fitted.kept)
        return Prompted(
            self.prompts.query(kept, question, history),
            question,
            kept,
            tuple(hit.chunk_id for hit in fitted.kept),
            tuple(hit.chunk_id for hit in fitted.dropped),
            tuple(self._registered(kept)),
        )

    def _registered(self, texts: Sequence[str]) -> list[bool]:
        from lmcache_rag.store import text_hash

        known = self.workspace.store.registry.stored_texts(texts)
        return [text_hash(text) in known for text in texts]

    # -- answered by the engine ---------------------------------------------------------------------------------

    def stream(
        self, prompted: Prompted, *, sampling: Sampling | None = None, blend: BlendOptions | None = None
    ) -> Iterator[StreamEvent]:
        """TextDelta events, then one Completion. Closing the iterator stops the computation.

        Raises:
            LMCacheRAGError: See the engine's errors.
        """
        sampling, blend = sampling or self.sampling, blend or self.blend
        return self._answering.stream(
            prompted.texts, prompted.prompt, sampling, blend, prompted.notes, prompted.registered
        )

    def answer(
        self, prompted: Prompted, *, sampling: Sampling | None = None, blend: BlendOptions | None = None
    ) -> Completion:
        """The whole answer. Errors as for stream."""
        for event in self.stream(prompted, sampling=sampling, blend=blend):
            last = event
        assert isinstance(last, Completion)  # noqa: S101 - what Engine.stream promises
        return last

    async def astream(
        self, prompted: Prompted, *, sampling: Sampling | None = None, blend: BlendOptions | None = None
    ) -> AsyncIterator[StreamEvent]:
        """Async twin of stream."""
        async for event in iterate_in_thread(self.stream(prompted, sampling=sampling, blend=blend)):
            yield event

    async def aanswer(
        self, prompted: Prompted, *, sampling: Sampling | None = None, blend: BlendOptions | None = None
    ) -> Completion:
        """Async twin of answer. Cancelling it stops the computation."""
        async for event in self.astream(prompted, sampling=sampling, blend=blend):
            last = event
        assert isinstance(last, Completion)  # noqa: S101
        return last

    # -- sent by another client ---------------------------------------------------------------------------------

    def request(self, prompted: Prompted, *, blend: BlendOptions | None = None) -> dict[str, Any]:
        """What another OpenAI client adds to the body of its completions request.

        Returns:
            prompt (token ids), kv_transfer_params, return_token_ids, and cache_salt for a tenant.

        Raises:
            EngineError: The workspace's engine is no server.
            ContextLengthError: The prompt is longer than the server's context.
        """
        self._answering.begin()
        made = self._vllm().request(prompted.prompt, self.sampling, self._answering.allowed(blend or self.blend))
        extra = made["extra_body"]
        names = ("kv_transfer_params", "return_token_ids", "cache_salt")
        return {"prompt": made["prompt"], **{name: extra[name] for name in names if name in extra}}

    @property
    def chat_takes_ids(self) -> bool:
        """Whether the server's chat completions take token ids (vLLM 0.32 and later)."""
        return self._vllm().chat_takes_ids

    def request_chat(self, prompted: Prompted, *, blend: BlendOptions | None = None) -> dict[str, Any]:
        """The same for chat completions: the token ids take the place of what the messages would become.

        Raises:
            EngineError: The workspace's engine is no server, or one whose chat completions take no token ids.
        """
        body = self.request(prompted, blend=blend)
        if not self.chat_takes_ids:
            raise EngineError(
                "The chat completions of this vLLM take no token ids, so the passages' KV would not be found.",
                remedy="Use vLLM 0.32 or later, or a completions client (langchain_openai.OpenAI, OpenAILike with "
                "is_chat_model=False).",
            )
        ids = body.pop("prompt")
        return body | {"kv_transfer_params": {**body["kv_transfer_params"], "prompt_token_ids": ids}}

    def gather(self) -> wire.Gathered:
        """Takes the raw parts of the answer that another client got; the clock starts now."""
        return wire.Gathered()

    def finished(
        self,
        gathered: wire.Gathered,
        prompted: Prompted,
        *,
        streamed: bool,
        blend: BlendOptions | None = None,
        stops: bool = False,
    ) -> Completion:
        """The answer with the statistics that the server told. What it did not say is not made up.

        Passages whose KV was missing are ingested in the background, as `lazy_fill` says. With `stops`, stop strings
        were given: then missing statistics do not mean that the server makes none.
        """
        blend = self._answering.allowed(blend or self.blend)
        done = self._vllm().finished(gathered, prompted.prompt, blend, streamed=streamed, stops=stops)
        done = self._answering.filled(prompted.texts, prompted.registered, prompted.prompt, done, blend)
        return _with_notes(done, prompted.notes)

    # -- the background -----------------------------------------------------------------------------------------

    @property
    def what_follows(self) -> str:
        """A sentence for warnings: what happens to passages that are not registered."""
        if self.lazy_fill == "never" or self.engine.info.engine == "embedded":
            return "They are computed for every question."
        return f"They are ingested in the background at their {self.lazy_fill} use (lazy_fill)."

    @property
    def fill_counts(self) -> FillCounts:
        """What was ingested in the background so far, for this engine."""
        return fill_of(self.engine).counts

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until no passage is being ingested in the background; False when the time is over before."""
        return fill_of(self.engine).drain(timeout)

    async def adrain(self) -> bool:
        """Async twin of drain."""
        return await asyncio.to_thread(self.drain)

    def close(self) -> None:
        """Ingest nothing more in the background for this workspace. It stays open, and so can be asked again."""
        cancel(self.engine, self.workspace.store)

    async def aclose(self) -> None:
        """Async twin of close."""
        await asyncio.to_thread(self.close)

    def _vllm(self) -> VLLMEngine:
        from lmcache_rag.engines.vllm import VLLMEngine

        if not isinstance(self.engine, VLLMEngine):
            raise EngineError(
                f"The engine of this workspace is {self.engine.info.engine}, not a vLLM server.",
                remedy='Open the workspace with the server: Workspace.open(..., engine="http://localhost:8000").',
            )
        return self.engine


def counts(stats: ReuseStats) -> dict[str, Any]:
    """The reuse statistics as plain numbers, as callbacks and metadata carry them."""
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in stats.as_dict().items()}


def _with_notes(done: Completion, notes: tuple[str, ...]) -> Completion:
    from dataclasses import replace

    return replace(done, warnings=(*done.warnings, *notes)) if notes else done
