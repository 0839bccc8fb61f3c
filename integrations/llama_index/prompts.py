"""LlamaIndex's prompt templates as the words around the passages, and back."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.prompts import (
    BasePromptTemplate,
    ChatPromptTemplate,
    PromptTemplate,
    PromptType,
    SelectorPromptTemplate,
)

from lmcache_rag.errors import ConfigError
from lmcache_rag.prompt import PromptBuilder, PromptFormat

if TYPE_CHECKING:
    from llama_index.core.llms.llm import LLM

    from lmcache_rag.workspace import Workspace

_CONTEXT, _QUERY = "{context_str}", "{query_str}"
_REMEDY = (
    "Write one user's message with {context_str} and, behind it, {query_str}; a system message may stand before it."
)


def template_of(words: PromptFormat) -> ChatPromptTemplate:
    """The words as a template that a user can read and change."""
    body = f"{words.instruction}{words.context_head}{_CONTEXT}{words.question.replace('{question}', _QUERY)}"
    messages = [ChatMessage(role=MessageRole.SYSTEM, content=words.system)] if words.system else []
    messages.append(ChatMessage(role=MessageRole.USER, content=body))
    return ChatPromptTemplate(messages, prompt_type=PromptType.QUESTION_ANSWER)


def format_of(template: BasePromptTemplate, words: PromptFormat, llm: LLM | None = None) -> PromptFormat:
    """The template's words.

    Args:
        template: With {context_str} and, behind it, {query_str}.
        words: Where everything else is taken from. A template of plain text keeps their system text. What stands
            before the passages is kept as it is where it says the same, so that the passages' KV stays good.
        llm: For templates that depend on it.

    Raises:
        ConfigError: The template cannot be blended, because the question stands before the passages, say.
    """
    if isinstance(template, SelectorPromptTemplate):
        template = template.select(llm)
    system, body = _parts(template, words.system)
    if body.count(_CONTEXT) != 1 or body.count(_QUERY) != 1 or body.index(_CONTEXT) > body.index(_QUERY):
        raise ConfigError(
            "The prompt template does not have the passages once and the question once behind them. Their KV is "
            "computed without knowing the question, so it cannot stand before them.",
            remedy=_REMEDY,
        )
    head, tail = body.split(_CONTEXT)
    question = tail.replace(_QUERY, "{question}")
    if (system, head) == (words.system, words.instruction + words.context_head):
        return replace(words, question=question)
    # The head is filled up to a whole number of KV blocks before its last line.
    cut = head.rstrip().rfind("\n")
    instruction, context_head = (head[:cut], head[cut:]) if cut >= 0 else (head, "\n")
    return replace(words, system=system, instruction=instruction, context_head=context_head, question=question)


def with_system(words: PromptFormat, system: str) -> ChatPromptTemplate:
    """The words' template with another system text."""
    return template_of(replace(words, system=system))


def with_words(workspace: Workspace, words: PromptFormat) -> Workspace:
    """The same store and engine, with prompts of other words. It is not to be closed: it owns nothing."""
    other = copy.copy(workspace)
    tenant = workspace.prompts.tenant
    other.__dict__ |= {"store": workspace.store, "engine": workspace.engine}
    other.__dict__["prompts"] = PromptBuilder(
        workspace.engine.tokenizer, workspace.engine.info, format=words, tenant=tenant
    )
    return other


def _parts(template: BasePromptTemplate, system: str) -> tuple[str, str]:
    """(system text, everything else) with the template's own names and values filled in."""
    if template.function_mappings:
        raise ConfigError("The prompt template computes a part of itself.", remedy="Leave function_mappings out.")
    if isinstance(template, PromptTemplate):
        return system, _filled(template, template.template)
    if not isinstance(template, ChatPromptTemplate):
        raise ConfigError(f"{type(template).__name__} cannot be blended.", remedy=_REMEDY)
    messages = [(m.role, _filled(template, str(m.content or ""))) for m in template.message_templates]
    place = next((i for i, (_, text) in enumerate(messages) if _CONTEXT in text), len(messages))
    first, rest = messages[:place], messages[place:]
    if any(role != MessageRole.SYSTEM for role, _ in first) or any(role == MessageRole.ASSISTANT for role, _ in rest):
        raise ConfigError("The prompt template has a conversation of its own.", remedy=_REMEDY)
    return "\n\n".join(text for _, text in first), "\n\n".join(text for _, text in rest)


def _filled(template: BasePromptTemplate, text: str) -> str:
    """The text with our names for passages and question, and with what was filled in beforehand."""
    for ours, theirs in (template.template_var_mappings or {}).items():
        text = text.replace("{" + str(theirs) + "}", "{" + ours + "}")
    for name, value in template.kwargs.items():
        text = text.replace("{" + name + "}", str(value))
    return text
