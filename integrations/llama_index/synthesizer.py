"""The response synthesizer: passages and question in, a blended answer out, in one request."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, QueryType
from llama_index.core.settings import Settings
from llama_index.core.types import RESPONSE_TEXT_TYPE

from lmcache_rag.engines.base import BlendOptions, Completion, Sampling, TextDelta
from lmcache_rag.prompt import Turn
from lmcache_rag.workspace import Workspace

from ..blender import Blender, Prompted
from .answers import AnswerStream, AnswerText, AsyncAnswerStream, Facts
from .events import tell
from .history import conversation
from .llm import EngineLLM, workspace_of
from .noticing import Noticer
from .openai_like import BlendClient
from .prompts import format_of, template_of, with_words

log = logging.getLogger("lmcache_rag")


class BlendSynthesizer(BaseSynthesizer):
    """Answers from the passages' KV. All passages stand in one prompt, each as it was ingested.

    LlamaIndex's own modes cannot be used for that: `compact` packs passages anew, `refine` and `tree_summarize` ask
    about each piece in a prompt of its own, `simple_summarize` prints a list. Passages that do not fit the model's
    context are dropped here, those with the lowest score first, with a warning; the response names all that were found.

    `response.metadata["lmcache_rag"]` and a BlendEvent tell what was reused; in a stream, when it has ended.

    Args:
        llm: The LLM object that answers (OpenAILike with a vLLM server), or a Workspace, an engine or a URL; None:
            Settings.llm.
        workspace: Where the KV is registered; None: the one that belongs to `llm`.
        blend: How KV is reused; None: as the workspace's settings say. BlendOptions(enabled=False) reuses none.
        sampling: How tokens are chosen where no LLM object says it.
        text_qa_template: Words around passages and question; see update_prompts().
        history: Earlier turns; they stand behind the passages.
        streaming: Give answers as streams.
        callback_manager: Hears of each answer.
        empty_response: The answer where nothing was found.
        noticer: Shared by what works together.
        lazy_fill: At which use a passage without KV is ingested, in the background after the answer: "first",
            "second" or "never"; None: as the settings say (LMCACHE_RAG_LAZY_FILL, or "second").

    Raises:
        ConfigError: The LLM or the template cannot be used, or there is no such lazy_fill.
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
        noticer: Noticer | None = None,
        lazy_fill: str | None = None,
    ) -> None:
        source = Settings.llm if llm is None else llm
        self._workspace = workspace or workspace_of(source)
        self._options = {"blend": blend, "sampling": sampling, "lazy_fill": lazy_fill}
        blender = Blender(self._workspace, **self._options)  # type: ignore[arg-type]
        self._base = blender.prompts.format
        engine_llm = not isinstance(source, LLM) or isinstance(source, EngineLLM)
        self._client = BlendClient(EngineLLM(blender) if engine_llm else source, blender)
        if engine_llm:
            self._client.llm.callback_manager = callback_manager or Settings.callback_manager
        self._history: tuple[ChatMessage | Turn, ...] = tuple(history)
        self._noticer = noticer or Noticer()
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
        """What makes the prompts."""
        return self._client.blender

    @property
    def llm(self) -> LLM:
        """Who answers."""
        return self._client.llm

    def after(self, history: Sequence[ChatMessage | Turn], *, streaming: bool) -> BlendSynthesizer:
        """The same for the next turn of a conversation."""
        other = copy.copy(self)
        other._history, other._streaming = tuple(history), streaming
        return other

    @property
    def noticer(self) -> Noticer:
        """What notices changed passages."""
        return self._noticer

    # -- prompts ------------------------------------------------------------------------------------------------

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": template_of(self.blender.prompts.format)}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """Take other words. Those behind {context_str} can change freely; KV was computed behind those before it."""
        if (template := prompts.get("text_qa_template")) is None:
            return
        words = format_of(template, self._base, self._client.llm)
        blender = Blender(with_words(self._workspace, words), **self._options)  # type: ignore[arg-type]
        if blender.prompts.fingerprint != self._workspace.prompts.fingerprint:
            log.warning(
                "The prompt has other words before the passages than their KV was computed behind: each passage is "
                "computed once more, when it is first asked for. Set system and instruction in the workspace's "
                "settings, so that ingestion uses the same words."
            )
        llm = self._client.llm
        if isinstance(llm, EngineLLM):
            llm = self._llm = EngineLLM(blender, callback_manager=llm.callback_manager)
        self._client = BlendClient(llm, blender)

    # -- answers ------------------------------------------------------------------------------------------------

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
            additional_source_nodes: Named as sources too.
            response_kwargs: `blend` and `history` for this answer; everything else goes to the LLM.
        """
        response_kwargs.setdefault("scores", [node.score for node in nodes])
        return super().synthesize(query, nodes, additional_source_nodes, **response_kwargs)

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Async twin of synthesize."""
        response_kwargs.setdefault("scores", [node.score for node in nodes])
        return await super().asynthesize(query, nodes, additional_source_nodes, **response_kwargs)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """The answer to a question from texts, or a generator of its pieces."""
        asked = self._asked(query_str, text_chunks, response_kwargs)
        if self._streaming:
            return AnswerStream(self._stream(*asked, facts := Facts()), facts)
        prompted, changed, options = asked
        done = self._client.answer(prompted, **options)
        return AnswerText.of(done.text or self._empty_response, Facts(tell(prompted, done, changed)))

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Async twin of get_response."""
        asked = await asyncio.to_thread(self._asked, query_str, text_chunks, response_kwargs)
        if self._streaming:
            return AsyncAnswerStream(self._astream(*asked, facts := Facts()), facts)
        prompted, changed, options = asked
        done = await self._client.aanswer(prompted, **options)
        return AnswerText.of(done.text or self._empty_response, Facts(tell(prompted, done, changed)))

    # -- inside -------------------------------------------------------------------------------------------------

    def _stream(
        self, prompted: Prompted, changed: int, options: dict[str, Any], facts: Facts
    ) -> Generator[str, None, None]:
        for event in self._client.stream(prompted, **options):
            if isinstance(event, TextDelta):
                yield event.text
            elif isinstance(event, Completion):
                facts |= tell(prompted, event, changed)

    async def _astream(
        self, prompted: Prompted, changed: int, options: dict[str, Any], facts: Facts
    ) -> AsyncGenerator[str, None]:
        async for event in self._client.astream(prompted, **options):
            if isinstance(event, TextDelta):
                yield event.text
            elif isinstance(event, Completion):
                facts |= tell(prompted, event, changed)

    def _asked(
        self, question: str, texts: Sequence[str], kwargs: dict[str, Any]
    ) -> tuple[Prompted, int, dict[str, Any]]:
        """(the prompt, how many of its passages have another text than was ingested, options of the client)."""
        options = dict(kwargs)
        scores = options.pop("scores", None)
        history, question = conversation(options.pop("history", self._history), question)
        wanted = options.get("max_tokens") or self._client.max_tokens
        prompted = self.blender.prompted(texts, question, history=history, scores=scores, max_tokens=wanted)
        changed = [text for text, kept in zip(prompted.texts, prompted.registered, strict=True) if not kept]
        if changed:
            self._noticer.warn(changed, len(prompted.texts), self.blender.what_follows)
        return prompted, len(changed), options

    def _prepare_response_output(
        self, response_str: RESPONSE_TEXT_TYPE | None, source_nodes: list[NodeWithScore]
    ) -> RESPONSE_TYPE:
        facts = getattr(response_str, "facts", None)
        text = str(response_str) if isinstance(response_str, AnswerText) else response_str
        response = super()._prepare_response_output(text, source_nodes)
        if facts is not None:
            response.metadata = {**(response.metadata or {}), "lmcache_rag": facts}
        return response
