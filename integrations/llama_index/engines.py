"""The query engine: LlamaIndex's own, with blended answers."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.indices.base import BaseIndex
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle

from lmcache_rag.engines.base import BlendOptions, Sampling
from lmcache_rag.errors import ConfigError
from lmcache_rag.workspace import Workspace

from .noticing import Noticer
from .retriever import LMCacheRetriever
from .synthesizer import BlendSynthesizer

_MODES = (
    "response_mode",
    "refine_template",
    "summary_template",
    "simple_template",
    "output_cls",
    "multimodal",
    "use_async",
    "response_synthesizer",
)


class BlendQueryEngine(RetrieverQueryEngine):
    """A RetrieverQueryEngine that notices postprocessors which change texts; see as_blend_query_engine."""

    def _apply_node_postprocessors(self, nodes: list[NodeWithScore], query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._noticer.postprocess(self._node_postprocessors, nodes, query_bundle)

    async def _async_apply_node_postprocessors(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle
    ) -> list[NodeWithScore]:
        return await self._noticer.apostprocess(self._node_postprocessors, nodes, query_bundle)

    def with_retriever(self, retriever: BaseRetriever) -> BlendQueryEngine:
        """The same with another retriever."""
        return BlendQueryEngine(
            retriever, self._response_synthesizer, self._node_postprocessors, callback_manager=self.callback_manager
        )

    @property
    def _noticer(self) -> Noticer:
        synthesizer = self._response_synthesizer
        return synthesizer.noticer if isinstance(synthesizer, BlendSynthesizer) else Noticer()


def as_blend_query_engine(
    source: BaseIndex[Any] | BaseRetriever,
    llm: Any = None,
    *,
    workspace: Workspace | None = None,
    blend: BlendOptions | None = None,
    sampling: Sampling | None = None,
    lazy_fill: str | None = None,
    streaming: bool = False,
    node_postprocessors: list[BaseNodePostprocessor] | None = None,
    text_qa_template: BasePromptTemplate | None = None,
    callback_manager: CallbackManager | None = None,
    **options: Any,
) -> BlendQueryEngine:
    """In place of index.as_query_engine(llm=...): the same retrieval, blended answers.

    Args:
        source: An index, or a retriever.
        llm: Who answers, see BlendSynthesizer.
        workspace: Where the KV is registered; None: the one that belongs to `llm`.
        blend: How KV is reused.
        sampling: How tokens are chosen where no LLM object says it.
        lazy_fill: At which use a passage without KV is ingested in the background, see BlendSynthesizer.
        streaming: Give answers as streams.
        node_postprocessors: Applied in order, as ever. One that changes texts costs their KV, with a warning.
        text_qa_template: Words around passages and question.
        callback_manager: Hears of each query.
        options: For the index's retriever: similarity_top_k, filters, vector_store_query_mode ...

    Raises:
        ConfigError: Another response mode is asked for: all of LlamaIndex's own break passages up or pack them anew.
    """
    if wrong := [name for name in _MODES if options.pop(name, None) not in (None, False)]:
        raise ConfigError(
            f"{', '.join(wrong)}: blended answers have one mode. LlamaIndex's own pack passages anew or ask about "
            "each of them alone, so that no KV fits.",
            remedy="Leave it out, or use index.as_query_engine() for this query.",
        )
    synthesizer = BlendSynthesizer(
        llm,
        workspace=workspace,
        blend=blend,
        sampling=sampling,
        lazy_fill=lazy_fill,
        streaming=streaming,
        text_qa_template=text_qa_template,
        callback_manager=callback_manager,
    )
    return BlendQueryEngine(
        retriever_of(source, options),
        synthesizer,
        node_postprocessors,
        callback_manager=callback_manager or synthesizer.callback_manager,
    )


def retriever_of(source: BaseIndex[Any] | BaseRetriever, options: dict[str, Any]) -> BaseRetriever:
    """The index's own retriever, or the retriever itself."""
    if isinstance(source, BaseIndex):
        return source.as_retriever(**options)
    return LMCacheRetriever(source, **options) if options or not isinstance(source, BaseRetriever) else source
