"""Query engine, chat engine and retriever: LlamaIndex's own, with blended answers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.chat_engine.types import AgentChatResponse, StreamingAgentChatResponse
from llama_index.core.indices.base import BaseIndex
from llama_index.core.memory import BaseMemory, Memory
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.errors import ConfigError
from lmcache_rag.workspace import Workspace

from .prompts import ChangedPassageWarner, with_system
from .synthesizer import BlendSynthesizer, ReuseMetadata, collect_reuse

if TYPE_CHECKING:
    from lmcache_rag.rag import RAG
    from lmcache_rag.store import Hit

ChatAnswer = TypeVar("ChatAnswer", AgentChatResponse, StreamingAgentChatResponse)

_RESPONSE_OPTIONS = (
    "response_mode",
    "refine_template",
    "summary_template",
    "simple_template",
    "output_cls",
    "multimodal",
    "use_async",
    "response_synthesizer",
)
_MEMORY_SHARE = 2  # the conversation gets 1/2 of the context; passages and answer need the rest


# -- retriever --------------------------------------------------------------------------------------------------------


class LMCacheRetriever(BaseRetriever):
    """Retrieves the passages nearest to the question, best first, unchanged.

    Args:
        source: A RAG, an index (`options` then go to its as_retriever), or a retriever.
        similarity_top_k: How many passages; None: the source's own number. Of a retriever's result it takes the first.
        callback_manager: Receives an event for each retrieval.
        options: For the index's retriever, for example filters or vector_store_query_mode.

    Raises:
        ConfigError: The source is something else, or it takes no options.
    """

    def __init__(
        self,
        source: RAG | BaseIndex[Any] | BaseRetriever,
        *,
        similarity_top_k: int | None = None,
        callback_manager: Any = None,
        **options: Any,
    ) -> None:
        if similarity_top_k is not None and similarity_top_k < 1:
            raise ConfigError(f"similarity_top_k must be at least 1; got {similarity_top_k}.")
        super().__init__(callback_manager=callback_manager)
        self._top_k = similarity_top_k
        self._rag: RAG | None = None
        self._inner: BaseRetriever
        if isinstance(source, BaseIndex):
            count = {} if similarity_top_k is None else {"similarity_top_k": similarity_top_k}
            self._inner = source.as_retriever(**count, **options)
            return
        if options:
            raise ConfigError(f"{', '.join(options)}: only an index takes these.", remedy="Set them on the retriever.")
        if isinstance(source, BaseRetriever):
            self._inner = source
        elif hasattr(source, "retrieve") and hasattr(source, "aretrieve"):
            self._rag = source
        else:
            raise ConfigError(
                f"{type(source).__name__} has no retrieve().", remedy="Give a RAG, an index or a retriever."
            )

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._rag is not None:
            return [_node(hit) for hit in self._rag.retrieve(query_bundle.query_str, top_k=self._top_k)]
        return list(self._inner.retrieve(query_bundle))[: self._top_k]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._rag is not None:
            return [_node(hit) for hit in await self._rag.aretrieve(query_bundle.query_str, top_k=self._top_k)]
        return list(await self._inner.aretrieve(query_bundle))[: self._top_k]


def _node(hit: Hit) -> NodeWithScore:
    """Convert a hit. The text stays unchanged, so that its KV is found; the model does not read the metadata."""
    first = hit.documents[0] if hit.documents else None
    metadata = {**(first.metadata if first else {}), "source": first.source if first else ""}
    node = TextNode(
        id_=str(hit.chunk_id),
        text=hit.text,
        metadata=metadata,
        excluded_llm_metadata_keys=list(metadata),
        excluded_embed_metadata_keys=list(metadata),
    )
    return NodeWithScore(node=node, score=hit.score)


def _as_retriever(source: BaseIndex[Any] | BaseRetriever, options: dict[str, Any]) -> BaseRetriever:
    """Return the index's own retriever, or the retriever itself."""
    if isinstance(source, BaseIndex):
        return source.as_retriever(**options)
    return LMCacheRetriever(source, **options) if options or not isinstance(source, BaseRetriever) else source


# -- query engine -----------------------------------------------------------------------------------------------------


class BlendQueryEngine(RetrieverQueryEngine):
    """A RetrieverQueryEngine that warns of postprocessors which change texts; see as_blend_query_engine."""

    def _apply_node_postprocessors(self, nodes: list[NodeWithScore], query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._warner.postprocess(self._node_postprocessors, nodes, query_bundle)

    async def _async_apply_node_postprocessors(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle
    ) -> list[NodeWithScore]:
        return await self._warner.apostprocess(self._node_postprocessors, nodes, query_bundle)

    def with_retriever(self, retriever: BaseRetriever) -> BlendQueryEngine:
        """Return a copy with another retriever."""
        return BlendQueryEngine(
            retriever, self._response_synthesizer, self._node_postprocessors, callback_manager=self.callback_manager
        )

    @property
    def _warner(self) -> ChangedPassageWarner:
        synthesizer = self._response_synthesizer
        return synthesizer.noticer if isinstance(synthesizer, BlendSynthesizer) else ChangedPassageWarner()


def as_blend_query_engine(
    source: BaseIndex[Any] | BaseRetriever,
    llm: Any = None,
    *,
    workspace: Workspace | None = None,
    blend: BlendOptions | None = None,
    sampling: Sampling | None = None,
    lazy_fill: str | None = None,
    trace: str | os.PathLike[str] | None = None,
    streaming: bool = False,
    node_postprocessors: list[BaseNodePostprocessor] | None = None,
    text_qa_template: BasePromptTemplate | None = None,
    callback_manager: CallbackManager | None = None,
    **options: Any,
) -> BlendQueryEngine:
    """Replaces index.as_query_engine(llm=...): the same retrieval, blended answers.

    Args:
        source: An index, or a retriever.
        llm: The model that answers, see BlendSynthesizer.
        workspace: Where the KV is registered; None: the workspace of `llm`.
        blend: How KV is reused.
        sampling: How tokens are chosen, if `llm` is not an LLM object.
        lazy_fill: At which use a passage without KV is ingested in the background, see BlendSynthesizer.
        trace: File to which is appended which passages each question used, see BlendSynthesizer.
        streaming: Return answers as streams.
        node_postprocessors: Applied in order. One that changes texts loses their KV, with a warning.
        text_qa_template: The text around passages and question.
        callback_manager: Receives the events of each query.
        options: For the index's retriever: similarity_top_k, filters, vector_store_query_mode ...

    Raises:
        ConfigError: Another response mode is requested: LlamaIndex's own modes split passages or repack them.
    """
    if wrong := [name for name in _RESPONSE_OPTIONS if options.pop(name, None) not in (None, False)]:
        raise ConfigError(
            f"{', '.join(wrong)}: blended answers have one mode. LlamaIndex's own modes repack passages or ask about "
            "each of them alone, so that no KV can be reused.",
            remedy="Leave it out, or use index.as_query_engine() for this query.",
        )
    synthesizer = BlendSynthesizer(
        llm,
        workspace=workspace,
        blend=blend,
        sampling=sampling,
        lazy_fill=lazy_fill,
        trace=trace,
        streaming=streaming,
        text_qa_template=text_qa_template,
        callback_manager=callback_manager,
    )
    return BlendQueryEngine(
        _as_retriever(source, options),
        synthesizer,
        node_postprocessors,
        callback_manager=callback_manager or synthesizer.callback_manager,
    )


# -- chat engine ------------------------------------------------------------------------------------------------------


class BlendChatEngine(ContextChatEngine):
    """A ContextChatEngine whose prompt is: system text, passages, earlier turns, the new message.

    LlamaIndex's own also starts with the passages, but packs them into one text. Here they stay separate, and the
    conversation follows them, so that every turn reuses their KV. See as_blend_chat_engine.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        synthesizer: BlendSynthesizer,
        memory: BaseMemory,
        *,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        super().__init__(
            retriever,
            llm=synthesizer.llm,
            memory=memory,
            prefix_messages=[],
            node_postprocessors=node_postprocessors,
            callback_manager=callback_manager or synthesizer.callback_manager,
        )
        self._synthesizer = synthesizer

    def chat(self, *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Answer a message; `response.metadata["lmcache_rag"]` reports what was reused."""
        with collect_reuse() as found:
            response: AgentChatResponse = super().chat(*args, **kwargs)
            return _with_reuse(response, found)

    async def achat(self, *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Async version of chat."""
        with collect_reuse() as found:
            response: AgentChatResponse = await super().achat(*args, **kwargs)
            return _with_reuse(response, found)

    def stream_chat(self, *args: Any, **kwargs: Any) -> StreamingAgentChatResponse:
        """Answer piece by piece; the metadata is filled in when the stream has ended."""
        with collect_reuse() as found:
            response: StreamingAgentChatResponse = super().stream_chat(*args, **kwargs)
            return _with_reuse(response, found)

    async def astream_chat(self, *args: Any, **kwargs: Any) -> StreamingAgentChatResponse:
        """Async version of stream_chat."""
        with collect_reuse() as found:
            response: StreamingAgentChatResponse = await super().astream_chat(*args, **kwargs)
            return _with_reuse(response, found)

    def _get_nodes(self, message: str) -> list[NodeWithScore]:
        nodes = self._retriever.retrieve(message)
        return self._synthesizer.noticer.postprocess(self._node_postprocessors, nodes, QueryBundle(message))

    async def _aget_nodes(self, message: str) -> list[NodeWithScore]:
        nodes = await self._retriever.aretrieve(message)
        return await self._synthesizer.noticer.apostprocess(self._node_postprocessors, nodes, QueryBundle(message))

    def _get_response_synthesizer(  # type: ignore[override] # LlamaIndex uses it as any synthesizer
        self, chat_history: list[ChatMessage], streaming: bool = False
    ) -> BlendSynthesizer:
        return self._synthesizer.after(chat_history, streaming=streaming)


def _with_reuse(response: ChatAnswer, found: list[ReuseMetadata]) -> ChatAnswer:
    """Add the reuse metadata; without passages there is none. A stream's class has no such field of its own."""
    response.metadata = {"lmcache_rag": found[-1]} if found else {}  # type: ignore[attr-defined]
    return response


def as_blend_chat_engine(
    source: BaseIndex[Any] | BaseRetriever,
    llm: Any = None,
    *,
    workspace: Workspace | None = None,
    blend: BlendOptions | None = None,
    sampling: Sampling | None = None,
    lazy_fill: str | None = None,
    trace: str | os.PathLike[str] | None = None,
    memory: BaseMemory | None = None,
    chat_history: list[ChatMessage] | None = None,
    system_prompt: str | None = None,
    node_postprocessors: list[BaseNodePostprocessor] | None = None,
    callback_manager: CallbackManager | None = None,
    **options: Any,
) -> BlendChatEngine:
    """Replaces index.as_chat_engine(chat_mode="context", llm=...).

    Args:
        source: An index, or a retriever.
        llm: The model that answers, see BlendSynthesizer.
        workspace: Where the KV is registered; None: the workspace of `llm`.
        blend: How KV is reused.
        sampling: How tokens are chosen, if `llm` is not an LLM object.
        lazy_fill: At which use a passage without KV is ingested in the background, see BlendSynthesizer.
        trace: File to which is appended which passages each question used, see BlendSynthesizer.
        memory: Keeps the conversation; None: a memory of half the model's context.
        chat_history: Earlier messages.
        system_prompt: Replaces the workspace's. It precedes the passages and is part of their KV, so
            prefer to set it in the workspace's settings.
        node_postprocessors: Applied in order.
        callback_manager: Receives the events of each turn.
        options: For the index's retriever: similarity_top_k, filters ...

    Raises:
        ConfigError: Another chat mode is requested.
    """
    if options.pop("chat_mode", "context") != "context":
        raise ConfigError(
            "Blended answers support chat_mode='context' only.",
            remedy='Give chat_mode="context", or use index.as_chat_engine() with the other mode.',
        )
    synthesizer = BlendSynthesizer(
        llm,
        workspace=workspace,
        blend=blend,
        sampling=sampling,
        lazy_fill=lazy_fill,
        trace=trace,
        callback_manager=callback_manager,
    )
    if system_prompt is not None:
        synthesizer.update_prompts({"text_qa_template": with_system(synthesizer.blender.prompts.format, system_prompt)})
    limit = synthesizer.blender.engine.info.context_length // _MEMORY_SHARE
    memory = memory or Memory.from_defaults(chat_history=chat_history or [], token_limit=limit)
    return BlendChatEngine(
        _as_retriever(source, options),
        synthesizer,
        memory,
        node_postprocessors=node_postprocessors,
        callback_manager=callback_manager,
    )
