"""Blended prompts for a framework: a BlendPrompt goes in, a Completion comes out.

The engine answers it, or the user's own OpenAI client sends it and the Blender reads what comes back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lmcache_rag._utils import iterate_in_thread, well_formed
from lmcache_rag.engines import vllm_answer
from lmcache_rag.engines.base import (
    BlendOptions,
    Completion,
    QueryPrompt,
    ReuseStats,
    Sampling,
    StreamEvent,
)
from lmcache_rag.errors import EngineError, LMCacheRAGError, PromptError, StoreLockedError
from lmcache_rag.lazy_fill import FillCounts, cancel, fill_of, mode_of
from lmcache_rag.passage_order import numbered, passage_order
from lmcache_rag.prompt import Turn
from lmcache_rag.rag import AnswerStreamer, arranged, fit_context, fit_sizes
from lmcache_rag.trace import opened

if TYPE_CHECKING:
    from lmcache_rag.engines.base import Engine
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.message_prompt import Message, MessageComposer, MessagePrompt
    from lmcache_rag.passage_order import OrderMode
    from lmcache_rag.prompt import PromptBuilder
    from lmcache_rag.store import Hit
    from lmcache_rag.workspace import Workspace

log = logging.getLogger("lmcache_rag")

_PREFIXES = 64  # of prompts made of messages, the latest
_SEPARATOR = 6  # tokens around a passage in these, at most


@dataclass(frozen=True, slots=True)
class BlendPrompt:
    """A prompt and its parts.

    Attributes:
        prompt: Token ids, with the spans of the chunks.
        question: The question.
        texts: The chunks in it, in prompt order.
        kept: Indices of these chunks in the list that build_prompt was given.
        dropped: Indices of the chunks that did not fit the context.
        registered: For each of `texts`, whether the registry has it unchanged. If not, something changed it after
            retrieval, or it was never ingested.
    """

    prompt: QueryPrompt
    question: str
    texts: tuple[str, ...]
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    registered: tuple[bool, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings for the answer."""
        if not self.dropped:
            return ()
        total = len(self.kept) + len(self.dropped)
        return (f"{len(self.dropped)} of {total} chunks did not fit the context and were dropped.",)


class Blender:
    """Builds blended prompts over a workspace and reads the answers. Safe to use from several threads.

    Args:
        workspace: Store, engine and prompts.
        blend: How KV is reused; None: from the workspace's settings.
        sampling: How tokens are chosen where the engine itself answers; None: from the settings.
        lazy_fill: At which use a passage without KV is ingested in the background: "first", "second" or "never"; None:
            from the settings.
        prompts: Prompts with other words than the workspace's; their KV is another.
        trace: File to which is appended which passages each question used; None: by the settings.

    Raises:
        ConfigError: lazy_fill is none of these, or the trace cannot be written.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        blend: BlendOptions | None = None,
        sampling: Sampling | None = None,
        lazy_fill: str | None = None,
        prompts: PromptBuilder | None = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        settings = workspace.settings
        self.workspace = workspace
        self.engine: Engine = workspace.engine
        self.prompts: PromptBuilder = prompts or workspace.prompts
        self.blend = blend or workspace.blend_options
        self.sampling = sampling or Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature)
        self.lazy_fill = mode_of(lazy_fill or settings.fills)
        self._trace = workspace.trace if trace is None else opened(trace)
        self._answering = AnswerStreamer(
            workspace.store, self.engine, self.prompts, lazy_fill=self.lazy_fill, trace=self._trace
        )
        self._lock = threading.Lock()
        self._composer: MessageComposer | None = None
        self._others: dict[str, Blender] = {}

    # -- the prompt -----------------------------------------------------------------------------------------------

    def build_prompt(
        self,
        texts: Sequence[str],
        question: str,
        *,
        history: Sequence[Turn] = (),
        scores: Sequence[float | None] | None = None,
        max_tokens: int | None = None,
        order: OrderMode | None = None,
    ) -> BlendPrompt:
        """Build the prompt for these chunks; drop what does not fit the context, lowest score first.

        Args:
            texts: The chunks. A chunk without tokens is left out.
            question: The question.
            history: Earlier turns. They follow the chunks, so that the chunks stay reusable.
            scores: One for each text, larger is better. Without scores, later texts rank lower.
            max_tokens: Limit of the answer.
            order: The order of the chunks, see BlendOptions; None: the Blender's.

        Raises:
            PromptError: The question is empty, or the roles in the history do not alternate.
            ContextLengthError: The question alone is longer than the context.
        """
        question, texts = well_formed(question), [well_formed(text) for text in texts]
        history = [Turn(turn.role, well_formed(turn.content)) for turn in history]
        if not question.strip():
            raise PromptError("The question is empty.", remedy="Ask something.")
        hits = _hits(texts, scores)
        fitted = fit_context(
            self.prompts,
            question,
            [hit for hit in hits if self.prompts.chunk_ids(hit.text)],
            limit=self.engine.info.context_length,
            history=history,
            max_tokens=self.sampling.max_tokens if max_tokens is None else max_tokens,
        )
        places, chosen = arranged(
            self.engine,
            self.prompts,
            [hit.text for hit in fitted.kept],
            order or self.blend.order,
            [hit.chunk_id + 1 for hit in fitted.kept],
        )
        hits = [fitted.kept[place] for place in places]
        kept = tuple(hit.text for hit in hits)
        return BlendPrompt(
            replace(self.prompts.query(kept, question, history), order=chosen),
            question,
            kept,
            tuple(hit.chunk_id for hit in hits),
            tuple(hit.chunk_id for hit in fitted.dropped),
            tuple(self._registered(kept)),
        )

    # -- prompts made of messages -----------------------------------------------------------------------------------

    @property
    def composer(self) -> MessageComposer:
        """Makes prompts of messages."""
        from lmcache_rag.message_prompt import MessageComposer

        with self._lock:
            if self._composer is None:
                tenant = self.workspace.settings.tenant
                self._composer = MessageComposer(self.engine.tokenizer, self.engine.info, tenant=tenant)
            return self._composer

    def build_message_prompt(
        self,
        texts: Sequence[str],
        question: str,
        messages: Callable[[Sequence[str]], Sequence[Message]],
        *,
        scores: Sequence[float | None] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        order: OrderMode | None = None,
    ) -> tuple[Blender, BlendPrompt, Sequence[Message]]:
        """As build_prompt, of messages; returns also the Blender for its prefix, and the messages.

        Args:
            texts: The chunks.
            question: The question, for traces.
            messages: Returns the conversation with these chunks.
            scores: As for build_prompt.
            tools: As for MessageComposer.compose.
            options: The same.
            max_tokens: Limit of the answer.
            order: As for build_prompt. It stays where something that changes stands before the passages.

        Raises:
            PromptError: The chat template cannot render the messages.
            ContextLengthError: They alone are longer than the context.
        """
        bare = self.composer.compose(messages([]), tools=tools, options=options)
        hits = [hit for hit in _hits(texts, scores) if bare.prompts.chunk_ids(hit.text)]
        fitted = fit_sizes(
            hits,
            [len(bare.prompts.chunk_ids(hit.text)) + _SEPARATOR for hit in hits],
            len(bare.prompt),
            limit=self.engine.info.context_length,
            max_tokens=self.sampling.max_tokens if max_tokens is None else max_tokens,
            has_history=True,
        )
        shown = messages([hit.text for hit in fitted.kept])
        made = self.composer.compose(shown, tools=tools, options=options)
        hits = list(fitted.kept)
        if made.prompt.chunks and made.prompt.chunks[0].start == made.prompt.prefix_tokens:
            keys = [made.prompts.chunk(hit.text)[0] for hit in hits]
            counted = numbered([hit.text for hit in hits], [hit.chunk_id + 1 for hit in hits])
            places, chosen = passage_order(self.engine).arrange(keys, order or self.blend.order, numbered=counted)
            if chosen == "stable":
                hits = [hits[place] for place in places]
                shown = messages([hit.text for hit in hits])
                made = self.composer.compose(shown, tools=tools, options=options)
                made = replace(made, prompt=replace(made.prompt, order=chosen))
        kept, dropped = ([hit.chunk_id for hit in some] for some in (hits, fitted.dropped))
        return *self.of_message_prompt(made, question, kept=kept, dropped=dropped), shown

    def of_message_prompt(
        self, made: MessagePrompt, question: str, *, kept: Sequence[int] = (), dropped: Sequence[int] = ()
    ) -> tuple[Blender, BlendPrompt]:
        """Return the prompt of messages, and the Blender that answers it and ingests what it misses.

        Args:
            made: The prompt.
            question: The question, for traces.
            kept: See BlendPrompt.
            dropped: See BlendPrompt.
        """
        with self._lock:
            found = self._others.get(made.prompts.fingerprint)
            if found is None:
                found = copy(self)
                found._answering = AnswerStreamer(
                    self.workspace.store, self.engine, made.prompts, lazy_fill=self.lazy_fill, trace=self._trace
                )
                if len(self._others) >= _PREFIXES:
                    self._others.pop(next(iter(self._others)))
                self._others[made.prompts.fingerprint] = found
        registered = tuple(self._registered(made.texts))
        return found, BlendPrompt(made.prompt, question, made.texts, tuple(kept), tuple(dropped), registered)

    def _registered(self, texts: Sequence[str]) -> list[bool]:
        from lmcache_rag.store import text_hash

        known = self.workspace.store.registry.stored_texts(texts)
        return [text_hash(text) in known for text in texts]

    # -- answered by the engine -----------------------------------------------------------------------------------

    def stream(
        self, prompt: BlendPrompt, *, sampling: Sampling | None = None, blend: BlendOptions | None = None
    ) -> Iterator[StreamEvent]:
        """TextDelta events, then one Completion. Closing the iterator stops the computation.

        Raises:
            LMCacheRAGError: See the engine's errors.
        """
        sampling, blend = sampling or self.sampling, blend or self.blend
        return self._answering.stream(
            prompt.texts, prompt.prompt, sampling, blend, prompt.notes, prompt.registered, question=prompt.question
        )

    def answer(
        self, prompt: BlendPrompt, *, sampling: Sampling | None = None, blend: BlendOptions | None = None
    ) -> Completion:
        """Return the whole answer. Errors as for stream."""
        for event in self.stream(prompt, sampling=sampling, blend=blend):
            last = event
        assert isinstance(last, Completion)  # noqa: S101 - what Engine.stream promises
        return last

    async def astream(
        self, prompt: BlendPrompt, *, sampling: Sampling | None = None, blend: BlendOptions | None = None
    ) -> AsyncIterator[StreamEvent]:
        """Async version of stream."""
        async for event in iterate_in_thread(self.stream(prompt, sampling=sampling, blend=blend)):
            yield event

    async def aanswer(
        self, prompt: BlendPrompt, *, sampling: Sampling | None = None, blend: BlendOptions | None = None
    ) -> Completion:
        """Async version of answer. Cancelling it stops the computation."""
        async for event in self.astream(prompt, sampling=sampling, blend=blend):
            last = event
        assert isinstance(last, Completion)  # noqa: S101
        return last

    # -- sent by another client -----------------------------------------------------------------------------------

    def request(self, prompt: BlendPrompt, *, blend: BlendOptions | None = None) -> dict[str, Any]:
        """Return what another OpenAI client adds to the body of its completions request.

        Returns:
            prompt (token ids), kv_transfer_params, return_token_ids, and cache_salt for a tenant.

        Raises:
            EngineError: The workspace's engine is not a server.
            ContextLengthError: The prompt is longer than the server's context.
        """
        self._answering.begin()
        params = self._vllm().request(prompt.prompt, self.sampling, self._answering.allowed(blend or self.blend))
        extra = params["extra_body"]
        names = ("kv_transfer_params", "return_token_ids", "cache_salt")
        return {"prompt": params["prompt"], **{name: extra[name] for name in names if name in extra}}

    @property
    def chat_takes_ids(self) -> bool:
        """Whether the server's chat completions take token ids (vLLM 0.32 and later)."""
        return self._vllm().chat_takes_ids

    def request_chat(self, prompt: BlendPrompt, *, blend: BlendOptions | None = None) -> dict[str, Any]:
        """As `request`, for chat completions: the server takes the token ids instead of rendering the messages.

        Raises:
            EngineError: The workspace's engine is not a server, or its chat completions take no token ids.
        """
        body = self.request(prompt, blend=blend)
        if not self.chat_takes_ids:
            raise EngineError(
                "The chat completions of this vLLM take no token ids, so the passages' KV would not be found.",
                remedy="Use vLLM 0.32 or later, or a completions client (langchain_openai.OpenAI, OpenAILike with "
                "is_chat_model=False).",
            )
        ids = body.pop("prompt")
        return body | {"kv_transfer_params": {**body["kv_transfer_params"], "prompt_token_ids": ids}}

    def gather(self) -> vllm_answer.Gathered:
        """Start to collect the raw parts of the answer that another client gets; TTFT counts from now."""
        return vllm_answer.Gathered()

    def finished(
        self,
        gathered: vllm_answer.Gathered,
        prompt: BlendPrompt,
        *,
        streamed: bool,
        blend: BlendOptions | None = None,
        stops: bool = False,
    ) -> Completion:
        """Return the answer with the server's statistics; what the server did not report stays unknown.

        Chunks whose KV was missing are ingested in the background, as set by `lazy_fill`.

        Args:
            gathered: The raw parts.
            prompt: The prompt.
            streamed: Whether the answer came as a stream.
            blend: How KV was reused; None: the Blender's.
            stops: Whether the request had stop strings: missing statistics then do not mean that the server has none.

        Raises:
            EngineUnavailableError: The server closed the connection before the answer's end.
        """
        blend = self._answering.allowed(blend or self.blend)
        done = self._vllm().finished(gathered, prompt.prompt, blend, streamed=streamed, stops=stops)
        self._answering.record(prompt.question, prompt.texts, prompt.prompt)
        done = self._answering.filled(prompt.texts, prompt.registered, prompt.prompt, done, blend)
        return _with_notes(done, prompt.notes)

    def keep(self, texts: Sequence[str]) -> None:
        """Compute the KV of registered texts now, where it is missing. An error is logged, and fails no answer."""
        from lmcache_rag.kv_manager import KVManager

        try:
            KVManager(self.workspace.store, self.engine, self.prompts).keep(texts)
        except StoreLockedError:
            log.debug("another process writes to the store; the missing KV is stored at a later question")
        except LMCacheRAGError as problem:
            log.warning("Could not store the missing KV: %s", problem)

    # -- the background -------------------------------------------------------------------------------------------

    @property
    def unregistered_note(self) -> str:
        """What happens to passages that are not registered, as a sentence for warnings."""
        if self.lazy_fill == "never" or self.engine.info.engine == "embedded":
            return "They are computed for every question."
        return f"They are ingested in the background at their {self.lazy_fill} use (lazy_fill)."

    @property
    def missing_note(self) -> str:
        """What happens to registered passages without KV, as a sentence for warnings."""
        if self.lazy_fill == "never":
            return "They are computed for every question."
        return "They are ingested in the background after their first use (lazy_fill)."

    @property
    def fill_counts(self) -> FillCounts:
        """Counts of background ingestion so far, for this engine."""
        return fill_of(self.engine).counts

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until no passage is being ingested in the background; returns False after `timeout` seconds."""
        return fill_of(self.engine).drain(timeout)

    async def adrain(self) -> bool:
        """Async version of drain."""
        return await asyncio.to_thread(self.drain)

    def close(self) -> None:
        """Stop the background ingestion of this workspace. The workspace stays open and can answer again."""
        cancel(self.engine, self.workspace.store)

    async def aclose(self) -> None:
        """Async version of close."""
        await asyncio.to_thread(self.close)

    def _vllm(self) -> VLLMEngine:
        from lmcache_rag.engines.vllm import VLLMEngine

        if not isinstance(self.engine, VLLMEngine):
            raise EngineError(
                f"The engine of this workspace is {self.engine.info.engine}, not a vLLM server.",
                remedy='Open the workspace with the server: Workspace.open(..., engine="http://localhost:8000").',
            )
        return self.engine


def _hits(texts: Sequence[str], scores: Sequence[float | None] | None) -> list[Hit]:
    """Return texts as hits; without scores for all, later ones rank lower."""
    from lmcache_rag.store import Hit

    ranked = [-float(i) for i in range(len(texts))]
    if scores is not None:
        numbers = [float(score) for score in scores if score is not None]
        if len(numbers) == len(scores):  # scores of only some texts cannot be compared
            ranked = numbers
    # Not from a store: a chunk's id is its index in `texts`; size and documents are not known, nor read.
    return [Hit(i, text, score, 0, ()) for i, (text, score) in enumerate(zip(texts, ranked, strict=True))]


def counts(stats: ReuseStats) -> dict[str, Any]:
    """Return the reuse statistics as plain numbers, for callbacks and metadata."""
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in stats.as_dict().items()}


def join_turns(turns: Iterable[Turn]) -> list[Turn]:
    """Join neighbouring turns of one role by an empty line: chat templates require roles to alternate."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role:
            turn = Turn(turn.role, f"{joined.pop().content}\n\n{turn.content}")
        joined.append(turn)
    return joined


def _with_notes(done: Completion, notes: tuple[str, ...]) -> Completion:
    return replace(done, warnings=(*done.warnings, *notes)) if notes else done
