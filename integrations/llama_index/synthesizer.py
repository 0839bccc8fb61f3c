"""The response synthesizer: passages and a question go in, a blended answer comes out, in one request."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined] # it is documented
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import BaseNode, NodeWithScore, QueryType
from llama_index.core.settings import Settings
from llama_index.core.types import RESPONSE_TEXT_TYPE

from lmcache_rag.engines.base import BlendOptions, Completion, Sampling, TextDelta
from lmcache_rag.prompt import Turn
from lmcache_rag.workspace import Workspace

from ..blender import Blender, BlendPrompt, counts
from .derived import has_kv_for, is_derived, register_derived
from .llm import EngineLLM, conversation, workspace_of
from .openai_like import BlendClient
from .prompts import ChangedPassageWarner, format_of, template_of, with_format

log = logging.getLogger("lmcache_rag")
dispatcher = get_dispatcher(__name__)


class BlendEvent(BaseEvent):
    """A finished answer and what was reused for it.

    Attributes:
        stats: The reuse statistics as plain numbers; see lmcache_rag.engines.base.ReuseStats.
        warnings: Warnings for the user.
        passages: How many passages the prompt had.
        changed: How many of the passages were changed after retrieval; they were computed in full.
        dropped: How many did not fit the context.
        finish_reason: Why the answer ended: stop, length or cancelled.
    """

    stats: dict[str, Any]
    warnings: list[str]
    passages: int
    changed: int
    dropped: int
    finish_reason: str

    @classmethod
    def class_name(cls) -> str:
        """Class name."""
        return "LMCacheBlendEvent"


def emit_blend_event(prompt: BlendPrompt, done: Completion, changed: int) -> dict[str, Any]:
    """Send a BlendEvent; return its fields for the response's metadata."""
    fields: dict[str, Any] = {
        "stats": counts(done.stats),
        "warnings": list(done.warnings),
        "passages": len(prompt.texts),
        "changed": changed,
        "dropped": len(prompt.dropped),
        "finish_reason": done.finish_reason,
    }
    dispatcher.event(BlendEvent(**fields))
    return fields


class ReuseMetadata(dict[str, Any]):
    """The fields of the BlendEvent; empty until a stream has ended.

    Attributes:
        places: Indices of the source nodes in the order of the prompt, where that is not the order of the retriever.
    """

    places: tuple[int, ...] = ()

    @classmethod
    def of(cls, prompt: BlendPrompt, fields: dict[str, Any] | None = None) -> ReuseMetadata:
        """Make one."""
        made = cls(fields or {})
        made.places = prompt.kept if prompt.prompt.order == "stable" else ()
        return made

    def arrange(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        """The nodes in the order of the prompt, so that an answer's "second passage" is the second; others last."""
        first = [nodes[place] for place in self.places]
        return [*first, *(node for place, node in enumerate(nodes) if place not in self.places)]


# What answers reuse, inside collect_reuse(): LlamaIndex's chat engines do not pass a response's metadata on.
_collected: ContextVar[list[ReuseMetadata] | None] = ContextVar("collected", default=None)


@contextmanager
def collect_reuse() -> Iterator[list[ReuseMetadata]]:
    """Collect the reuse metadata of the answers that are made meanwhile, in this thread or task."""
    found: list[ReuseMetadata] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


class AnswerText(str):
    """An answer with its reuse metadata."""

    reuse: ReuseMetadata

    @classmethod
    def of(cls, text: str, reuse: ReuseMetadata) -> AnswerText:
        """Make one."""
        answer = cls(text)
        answer.reuse = reuse
        return answer

    def __str__(self) -> str:
        return str.__str__(self)


class AnswerStream(Generator[str, None, None]):
    """The pieces of an answer, with its reuse metadata."""

    def __init__(self, pieces: Generator[str, None, None], reuse: ReuseMetadata) -> None:
        self._pieces, self.reuse = pieces, reuse

    def send(self, value: None) -> str:
        """Return the next piece."""
        return self._pieces.send(value)

    def throw(self, *problem: Any) -> str:
        """Raise an error in the generator of the pieces."""
        return self._pieces.throw(*problem)

    def close(self) -> None:
        """Stop the computation."""
        self._pieces.close()


class AsyncAnswerStream(AsyncGenerator[str, None]):
    """The pieces of an answer, with its reuse metadata."""

    def __init__(self, pieces: AsyncGenerator[str, None], reuse: ReuseMetadata) -> None:
        self._pieces, self.reuse = pieces, reuse

    async def asend(self, value: None) -> str:
        """Return the next piece."""
        return await self._pieces.asend(value)

    async def athrow(self, *problem: Any) -> str:
        """Raise an error in the generator of the pieces."""
        return await self._pieces.athrow(*problem)

    async def aclose(self) -> None:
        """Stop the computation."""
        await self._pieces.aclose()


@dataclass(frozen=True, slots=True)
class _Request:
    """A prompt to answer.

    Attributes:
        prompt: The prompt.
        changed: How many of its passages are not registered as they are.
        options: For the client.
        derived: Parents and windows that were registered for this answer; their KV is computed after it.
    """

    prompt: BlendPrompt
    changed: int
    options: dict[str, Any]
    derived: tuple[str, ...] = ()


class BlendSynthesizer(BaseSynthesizer):
    """Answers from the passages' KV. One prompt has all passages, each as it was ingested.

    LlamaIndex's own modes cannot do that: `compact` repacks passages, `refine` and `tree_summarize` send a prompt for
    each piece, `simple_summarize` prints a list. Passages that do not fit the model's context are dropped, those with
    the lowest score first, with a warning; the response lists all that were found.

    `response.metadata["lmcache_rag"]` and a BlendEvent report what was reused; for a stream, after its end.

    Args:
        llm: The LLM object that answers (OpenAILike with a vLLM server), or a Workspace, an engine or a URL; None:
            Settings.llm.
        workspace: Where the KV is registered; None: the workspace of `llm`.
        blend: How KV is reused; None: from the workspace's settings. BlendOptions(enabled=False) reuses none.
        sampling: How tokens are chosen, if `llm` is not an LLM object.
        text_qa_template: The text around passages and question; see update_prompts().
        history: Earlier turns; they follow the passages.
        streaming: Return answers as streams.
        callback_manager: Receives the events of each answer.
        empty_response: The answer if nothing was found.
        noticer: Warns of changed passages; may be shared by several synthesizers.
        lazy_fill: At which use a passage without KV is ingested, in the background after the answer: "first",
            "second" or "never"; None: from the settings (LMCACHE_RAG_LAZY_FILL, or "second").
        trace: File to which is appended which passages each question used, for `lmcache-rag plan` and `warm`; None:
            from the settings (LMCACHE_RAG_TRACE, or none).

    Raises:
        ConfigError: The LLM or the template cannot be used, or lazy_fill is none of these.
        EngineUnavailableError, EngineError: The server cannot be reached, or serves another model.
    """

    def __init__(
        self,
        llm: Any = None,
        *,
        workspace: Workspace | None = None,
        blend: BlendOptions | None = None,
        sampling: Sampling | None = None,
        text_qa_template: BasePromptTemplate | None = None,
        history: Sequence[ChatMessage | Turn] = (),
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        empty_response: str | None = None,
        noticer: ChangedPassageWarner | None = None,
        lazy_fill: str | None = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        source = Settings.llm if llm is None else llm
        self._workspace = workspace or workspace_of(source)
        self._options = {"blend": blend, "sampling": sampling, "lazy_fill": lazy_fill, "trace": trace}
        blender = Blender(self._workspace, **self._options)  # type: ignore[arg-type]
        self._base_format = blender.prompts.format
        engine_llm = not isinstance(source, LLM) or isinstance(source, EngineLLM)
        self._client = BlendClient(EngineLLM(blender) if engine_llm else source, blender)
        if engine_llm:
            self._client.llm.callback_manager = callback_manager or Settings.callback_manager
        self._history: tuple[ChatMessage | Turn, ...] = tuple(history)
        self._warner = noticer or ChangedPassageWarner()
        super().__init__(
            llm=self._client.llm,
            callback_manager=callback_manager,
            streaming=streaming,
            empty_response=empty_response,
        )
        if text_qa_template is not None:
            self._update_prompts({"text_qa_template": text_qa_template})

    @property
    def blender(self) -> Blender:
        """The builder of the prompts."""
        return self._client.blender

    @property
    def llm(self) -> LLM:
        """The LLM that answers."""
        return self._client.llm

    def after(self, history: Sequence[ChatMessage | Turn], *, streaming: bool) -> BlendSynthesizer:
        """Return a copy for the next turn of a conversation."""
        other = copy.copy(self)
        other._history, other._streaming = tuple(history), streaming
        return other

    @property
    def noticer(self) -> ChangedPassageWarner:
        """Warns of changed passages."""
        return self._warner

    # -- prompts --------------------------------------------------------------------------------------------------

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": template_of(self.blender.prompts.format)}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """Use another template. The text after {context_str} can change freely, that before it is part of the KV."""
        if (template := prompts.get("text_qa_template")) is None:
            return
        format = format_of(template, self._base_format, self._client.llm)
        blender = Blender(with_format(self._workspace, format), **self._options)  # type: ignore[arg-type]
        made = blender.prompts.fingerprint
        if made != self._workspace.prompts.fingerprint and not has_kv_for(self._workspace, made):
            log.warning(
                "The prompt has another text before the passages than their KV was computed with: each passage is "
                "computed again at its first use. Give the vector store the template, "
                "LMCacheVectorStore(..., prompts=[template]), so that ingestion uses the same text."
            )
        llm = self._client.llm
        if isinstance(llm, EngineLLM):
            llm = self._llm = EngineLLM(blender, callback_manager=llm.callback_manager)
        self._client = BlendClient(llm, blender)

    # -- answers --------------------------------------------------------------------------------------------------

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer from these nodes, in this order.

        Args:
            query: The question.
            nodes: The passages.
            additional_source_nodes: Listed as sources too.
            response_kwargs: `blend` and `history` for this answer; all others go to the LLM.
        """
        response_kwargs.setdefault("scores", [node.score for node in nodes])
        response_kwargs.setdefault("passage_nodes", [node.node for node in nodes])
        return super().synthesize(query, nodes, additional_source_nodes, **response_kwargs)

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Async version of synthesize."""
        response_kwargs.setdefault("scores", [node.score for node in nodes])
        response_kwargs.setdefault("passage_nodes", [node.node for node in nodes])
        return await super().asynthesize(query, nodes, additional_source_nodes, **response_kwargs)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Return the answer to a question from texts, or a generator of its pieces."""
        request = self._parse(query_str, text_chunks, response_kwargs)
        if self._streaming:
            return AnswerStream(self._stream(request, reuse := ReuseMetadata.of(request.prompt)), reuse)
        done = self._client.answer(request.prompt, **request.options)
        reuse = ReuseMetadata.of(request.prompt, emit_blend_event(request.prompt, done, request.changed))
        self._keep(request)
        return AnswerText.of(done.text or self._empty_response, reuse)

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Async version of get_response."""
        request = await asyncio.to_thread(self._parse, query_str, text_chunks, response_kwargs)
        if self._streaming:
            return AsyncAnswerStream(self._astream(request, reuse := ReuseMetadata.of(request.prompt)), reuse)
        done = await self._client.aanswer(request.prompt, **request.options)
        reuse = ReuseMetadata.of(request.prompt, emit_blend_event(request.prompt, done, request.changed))
        await asyncio.to_thread(self._keep, request)
        return AnswerText.of(done.text or self._empty_response, reuse)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _stream(self, request: _Request, reuse: ReuseMetadata) -> Generator[str, None, None]:
        for event in self._client.stream(request.prompt, **request.options):
            if isinstance(event, TextDelta):
                yield event.text
            elif isinstance(event, Completion):
                reuse |= emit_blend_event(request.prompt, event, request.changed)
        self._keep(request)

    async def _astream(self, request: _Request, reuse: ReuseMetadata) -> AsyncGenerator[str, None]:
        async for event in self._client.astream(request.prompt, **request.options):
            if isinstance(event, TextDelta):
                yield event.text
            elif isinstance(event, Completion):
                reuse |= emit_blend_event(request.prompt, event, request.changed)
        await asyncio.to_thread(self._keep, request)

    def _parse(self, question: str, texts: Sequence[str], kwargs: dict[str, Any]) -> _Request:
        options = dict(kwargs)
        scores, nodes = options.pop("scores", None), options.pop("passage_nodes", None)
        history, question = conversation(options.pop("history", self._history), question)
        limit = options.get("max_tokens") or self._client.max_tokens
        order = (options.get("blend") or self.blender.blend).order
        prompt = self.blender.build_prompt(
            texts, question, history=history, scores=scores, max_tokens=limit, order=order
        )
        derived = self._register_derived(prompt, nodes)
        parts = list(zip(prompt.texts, prompt.registered, strict=True))
        changed = [text for text, known in parts if not known and text not in derived]
        if changed:
            self._warner.warn(changed, len(prompt.texts), self.blender.unregistered_note)
        kept: tuple[str, ...] = ()
        if derived and self.blender.engine.info.engine == "embedded":
            kept = tuple(derived)
        elif derived:  # the server ingests them in the background
            prompt = replace(prompt, registered=tuple(known or text in derived for text, known in parts))
        return _Request(prompt, len(changed), options, kept)

    def _keep(self, request: _Request) -> None:
        """Compute the KV of new parents and windows after the answer. Only the embedded engine does that here."""
        blend = request.options.get("blend") or self.blender.blend
        if request.derived and blend.enabled:
            self.blender.keep(request.derived)

    def _register_derived(self, prompt: BlendPrompt, nodes: Sequence[BaseNode] | None) -> set[str]:
        """Register passages that are parents or windows of registered nodes; return the texts that are new."""
        if nodes is None or all(prompt.registered) or self.blender.lazy_fill == "never":
            return set()
        parts = zip(prompt.texts, prompt.kept, prompt.registered, strict=True)
        unknown = {text: nodes[index] for text, index, known in parts if not known}
        stable = {
            text: node for text, node in unknown.items() if self._warner.keeps_text(text, node) and is_derived(node)
        }
        done = register_derived(self._workspace, stable) if stable else set()
        if done:
            log.info(
                "%d of %d passages are parents or windows of registered nodes. They are registered now, and have KV "
                "from their second use.",
                len(done),
                len(prompt.texts),
            )
        return done

    def _prepare_response_output(
        self, response_str: RESPONSE_TEXT_TYPE | None, source_nodes: list[NodeWithScore]
    ) -> RESPONSE_TYPE:
        reuse = getattr(response_str, "reuse", None)
        text = str(response_str) if isinstance(response_str, AnswerText) else response_str
        if reuse is not None:
            source_nodes = reuse.arrange(source_nodes)
        response = super()._prepare_response_output(text, source_nodes)
        if reuse is not None:
            response.metadata = {**(response.metadata or {}), "lmcache_rag": reuse}
            if (collected := _collected.get()) is not None:
                collected.append(reuse)
        return response
