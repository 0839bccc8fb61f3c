"""The chat engine: LlamaIndex's ContextChatEngine, with blended answers and the conversation behind the passages."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.indices.base import BaseIndex
from llama_index.core.memory import BaseMemory, Memory
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.errors import ConfigError
from lmcache_rag.workspace import Workspace

from .engines import retriever_of
from .prompts import with_system
from .synthesizer import BlendSynthesizer

_MEMORY_SHARE = 2  # the conversation gets one part of the context in so many; passages and answer need the rest


class BlendChatEngine(ContextChatEngine):
    """A ContextChatEngine whose prompt is: system text, passages, earlier turns, the new message.

    LlamaIndex's puts the passages first too, but packs them as one text. Here they stay apart, and what was said before
    stands behind them, so that their KV is used in every turn. See as_blend_chat_engine.
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

    def _get_nodes(self, message: str) -> list[NodeWithScore]:
        nodes = self._retriever.retrieve(message)
        return self._synthesizer.noticer.postprocess(self._node_postprocessors, nodes, QueryBundle(message))

    async def _aget_nodes(self, message: str) -> list[NodeWithScore]:
        nodes = await self._retriever.aretrieve(message)
        return await self._synthesizer.noticer.apostprocess(self._node_postprocessors, nodes, QueryBundle(message))

    def _get_response_synthesizer(  # type: ignore[override] # LlamaIndex's uses it as any synthesizer
        self, chat_history: list[ChatMessage], streaming: bool = False
    ) -> BlendSynthesizer:
        return self._synthesizer.after(chat_history, streaming=streaming)


def as_blend_chat_engine(
    source: BaseIndex[Any] | BaseRetriever,
    llm: Any = None,
    *,
    workspace: Workspace | None = None,
    blend: BlendOptions | None = None,
    sampling: Sampling | None = None,
    lazy_fill: str | None = None,
    memory: BaseMemory | None = None,
    chat_history: list[ChatMessage] | None = None,
    system_prompt: str | None = None,
    node_postprocessors: list[BaseNodePostprocessor] | None = None,
    callback_manager: CallbackManager | None = None,
    **options: Any,
) -> BlendChatEngine:
    """In place of index.as_chat_engine(chat_mode="context", llm=...).

    Args:
        source: An index, or a retriever.
        llm: Who answers, see BlendSynthesizer.
        workspace: Where the KV is registered; None: the one that belongs to `llm`.
        blend: How KV is reused.
        sampling: How tokens are chosen where no LLM object says it.
        lazy_fill: At which use a passage without KV is ingested in the background, see BlendSynthesizer.
        memory: Keeps the conversation; None: one of half the model's context.
        chat_history: What was said before.
        system_prompt: In place of the workspace's. KV is computed behind it, so set it in the workspace's settings.
        node_postprocessors: Applied in order.
        callback_manager: Hears of each turn.
        options: For the index's retriever: similarity_top_k, filters ...

    Raises:
        ConfigError: Another chat mode is asked for.
    """
    if options.pop("chat_mode", "context") != "context":
        raise ConfigError(
            "Blended answers have the chat mode context only.",
            remedy='Give chat_mode="context", or use index.as_chat_engine() with the other mode.',
        )
    synthesizer = BlendSynthesizer(
        llm,
        workspace=workspace,
        blend=blend,
        sampling=sampling,
        lazy_fill=lazy_fill,
        callback_manager=callback_manager,
    )
    if system_prompt is not None:
        synthesizer.update_prompts({"text_qa_template": with_system(synthesizer.blender.prompts.format, system_prompt)})
    limit = synthesizer.blender.engine.info.context_length // _MEMORY_SHARE
    memory = memory or Memory.from_defaults(chat_history=chat_history or [], token_limit=limit)
    return BlendChatEngine(
        retriever_of(source, options),
        synthesizer,
        memory,
        node_postprocessors=node_postprocessors,
        callback_manager=callback_manager,
    )
