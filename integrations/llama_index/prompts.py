"""Nodes and prompt templates as parts of a blended prompt, and warnings of changed passages."""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import (
    BasePromptTemplate,
    ChatPromptTemplate,
    PromptTemplate,
    PromptType,
    SelectorPromptTemplate,
)
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle

from lmcache_rag.errors import ConfigError
from lmcache_rag.kv_removal import IngestPrompts
from lmcache_rag.prompt import PromptBuilder, PromptFormat

if TYPE_CHECKING:
    from llama_index.core.llms.llm import LLM

    from lmcache_rag.workspace import Workspace

log = logging.getLogger("lmcache_rag")

_MAX_CHANGED = 1024  # changed texts
_CONTEXT, _QUERY = "{context_str}", "{query_str}"
_REMEDY = "Write one user message with {context_str} and, after it, {query_str}; a system message may precede it."


def node_text(node: BaseNode) -> str:
    """Return a node's text with its metadata for LLMs: the same at ingestion and in a question.

    LlamaIndex's own synthesizers do the same. A node whose metadata for LLMs changes is another text with another KV.
    """
    return str(node.get_content(metadata_mode=MetadataMode.LLM))


# -- prompt templates -------------------------------------------------------------------------------------------------


def template_of(format: PromptFormat) -> ChatPromptTemplate:
    """Convert a prompt format to a template that a user can read and change."""
    body = f"{format.instruction}{format.context_head}{_CONTEXT}{format.question.replace('{question}', _QUERY)}"
    messages = [ChatMessage(role=MessageRole.SYSTEM, content=format.system)] if format.system else []
    messages.append(ChatMessage(role=MessageRole.USER, content=body))
    return ChatPromptTemplate(messages, prompt_type=PromptType.QUESTION_ANSWER)


def format_of(template: BasePromptTemplate, base: PromptFormat, llm: LLM | None = None) -> PromptFormat:
    """Convert a template to a prompt format.

    Args:
        template: With {context_str} and, after it, {query_str}.
        base: The format that everything else comes from. A plain text template keeps its system text. If the text
            before the passages is the same, `base`'s parts of it are kept, so that the passages' KV stays valid.
        llm: For templates that depend on the LLM.

    Raises:
        ConfigError: The template cannot be blended, for example because the question precedes the passages.
    """
    if isinstance(template, SelectorPromptTemplate):
        template = template.select(llm)
    system, body = _parts(template, base.system)
    if body.count(_CONTEXT) != 1 or body.count(_QUERY) != 1 or body.index(_CONTEXT) > body.index(_QUERY):
        raise ConfigError(
            "The prompt template does not have the passages once and the question once after them. The KV of the "
            "passages is computed without the question, so the question cannot precede them.",
            remedy=_REMEDY,
        )
    head, tail = body.split(_CONTEXT)
    question = tail.replace(_QUERY, "{question}")
    if (system, head) == (base.system, base.instruction + base.context_head):
        return replace(base, question=question)
    # The prompt builder pads the head to whole KV blocks before its last line.
    cut = head.rstrip().rfind("\n")
    instruction, context_head = (head[:cut], head[cut:]) if cut >= 0 else (head, "\n")
    return replace(base, system=system, instruction=instruction, context_head=context_head, question=question)


def with_system(format: PromptFormat, system: str) -> ChatPromptTemplate:
    """Return the format's template with another system text."""
    return template_of(replace(format, system=system))


def with_format(workspace: Workspace, format: PromptFormat) -> Workspace:
    """Return a view of the workspace with another prompt format. Do not close it: it owns nothing."""
    other = copy.copy(workspace)
    tenant = workspace.prompts.tenant
    other.__dict__ |= {"store": workspace.store, "engine": workspace.engine}
    other.__dict__["prompts"] = PromptBuilder(
        workspace.engine.tokenizer, workspace.engine.info, format=format, tenant=tenant
    )
    return other


def ingest_prompts(prompt: Any, workspace: Workspace, llm: LLM) -> IngestPrompts:
    """Return the prompts with which KV is computed for a template.

    Args:
        prompt: A template, as `text_qa_template`; a BlendSynthesizer; None: the workspace's own prompt.
        workspace: Has the model and the words that the template does not change.
        llm: For templates that depend on the LLM.

    Raises:
        ConfigError: The template cannot be blended.
    """
    if prompt is None:
        return workspace.prompts
    if (blender := getattr(prompt, "blender", None)) is not None:
        return cast(IngestPrompts, blender.prompts)
    if not isinstance(prompt, BasePromptTemplate):
        raise ConfigError(f"{type(prompt).__name__} is no prompt template.", remedy=_REMEDY)
    return with_format(workspace, format_of(prompt, workspace.prompts.format, llm)).prompts


def _parts(template: BasePromptTemplate, system: str) -> tuple[str, str]:
    """Return (system text, everything else), with the template's own variable names and values filled in."""
    if template.function_mappings:
        raise ConfigError("The prompt template has function_mappings.", remedy="Leave function_mappings out.")
    if isinstance(template, PromptTemplate):
        return system, _filled(template, template.template)
    if not isinstance(template, ChatPromptTemplate):
        raise ConfigError(f"{type(template).__name__} cannot be blended.", remedy=_REMEDY)
    messages = [(m.role, _filled(template, str(m.content or ""))) for m in template.message_templates]
    place = next((i for i, (_, text) in enumerate(messages) if _CONTEXT in text), len(messages))
    first, rest = messages[:place], messages[place:]
    if any(role != MessageRole.SYSTEM for role, _ in first) or any(role == MessageRole.ASSISTANT for role, _ in rest):
        raise ConfigError("The prompt template contains a conversation.", remedy=_REMEDY)
    return "\n\n".join(text for _, text in first), "\n\n".join(text for _, text in rest)


def _filled(template: BasePromptTemplate, text: str) -> str:
    """Return the text with LlamaIndex's standard variable names, and with the template's partial values filled in."""
    for standard, own in (template.template_var_mappings or {}).items():
        text = text.replace("{" + str(own) + "}", "{" + standard + "}")
    for name, value in template.kwargs.items():
        text = text.replace("{" + name + "}", str(value))
    return text


# -- changed passages -------------------------------------------------------------------------------------------------


class ChangedPassageWarner:
    """Warns of passages whose text was changed between the vector store and the prompt, once for each cause.

    Records which postprocessor changed a text. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._causes: OrderedDict[str, str] = OrderedDict()
        self._logged: set[str] = set()

    def postprocess(
        self, postprocessors: Sequence[BaseNodePostprocessor], nodes: list[NodeWithScore], query: QueryBundle
    ) -> list[NodeWithScore]:
        """Apply postprocessors in order, and record the texts that they change."""
        for postprocessor in postprocessors:
            before = _texts(nodes)  # before the call: some change nodes in place
            nodes = postprocessor.postprocess_nodes(nodes, query_bundle=query)
            self._record(postprocessor, _texts(nodes) - before)
        return nodes

    async def apostprocess(
        self, postprocessors: Sequence[BaseNodePostprocessor], nodes: list[NodeWithScore], query: QueryBundle
    ) -> list[NodeWithScore]:
        """Async version of postprocess."""
        for postprocessor in postprocessors:
            before = _texts(nodes)
            nodes = await postprocessor.apostprocess_nodes(nodes, query_bundle=query)
            self._record(postprocessor, _texts(nodes) - before)
        return nodes

    def warn(self, changed: Sequence[str], passages: int, unregistered_note: str) -> None:
        """Log, once for each cause, that these texts have no KV.

        Args:
            changed: The texts that are not registered.
            passages: How many passages the prompt has.
            unregistered_note: What happens to such texts, as a sentence.
        """
        with self._lock:
            causes = [self._causes.get(text, "") for text in changed]
            new = set(causes) - self._logged
            self._logged |= new
        for cause in sorted(new):
            count = causes.count(cause)
            what = (
                f"{cause} changed the text of {count} of {passages} passages"
                if cause
                else f"{count} of {passages} passages are not texts of an LMCacheVectorStore: something changed them "
                "after retrieval, or they were never added through one (adopt() registers earlier nodes)"
            )
            log.warning(
                "%s. Such passages have no KV at their first use, and count as missed. %s Rerankers, filters and "
                "reorderings do not change texts.",
                what,
                unregistered_note,
            )

    def keeps_text(self, text: str, node: BaseNode) -> bool:
        """Return whether no postprocessor changed this text, or only replaced it by the node's own metadata."""
        with self._lock:
            cause = self._causes.get(text, "")
        return not cause or node.get_content(metadata_mode=MetadataMode.NONE) in node.metadata.values()

    def _record(self, postprocessor: BaseNodePostprocessor, changed: set[str]) -> None:
        with self._lock:
            for text in changed:
                self._causes[text] = type(postprocessor).__name__
                self._causes.move_to_end(text)
            while len(self._causes) > _MAX_CHANGED:
                self._causes.popitem(last=False)


def _texts(nodes: Sequence[NodeWithScore]) -> set[str]:
    return {node_text(node.node) for node in nodes}
