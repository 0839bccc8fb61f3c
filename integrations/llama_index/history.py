"""A conversation of LlamaIndex as the turns that stand behind the passages."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import ChatMessage

from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import Turn


def turns(messages: Sequence[ChatMessage | Turn]) -> list[Turn]:
    """The user's and the assistant's turns, in order and taking turns.

    Chat templates want a user first and no role twice in a row. A memory that was cut can begin with an answer, which
    is left out; neighbours of one role are joined. Other roles (system, tool) say nothing here.
    """
    found: list[Turn] = []
    for message in messages:
        content = str(message.content or "")
        role = message.role.value if isinstance(message, ChatMessage) else message.role
        if role not in ("user", "assistant") or not content.strip():
            continue
        if found and found[-1].role == role:
            found[-1] = Turn(found[-1].role, f"{found[-1].content}\n\n{content}")
        elif found or role == "user":
            found.append(Turn("user" if role == "user" else "assistant", content))
    return found


def conversation(messages: Sequence[ChatMessage | Turn], question: str = "") -> tuple[list[Turn], str]:
    """(earlier turns, the user's question at the end). One that was never answered becomes a part of the next.

    Args:
        messages: What was said.
        question: What is said now; empty: it is the last of the messages.

    Raises:
        PromptError: It does not end with a user's message.
    """
    if question and not question.strip():
        raise PromptError("The question is empty.", remedy="Ask something.")
    found = turns([*messages, Turn("user", question)])
    if not found or found[-1].role != "user":
        raise PromptError("The conversation does not end with a user's message.", remedy="Ask something.")
    return found[:-1], found[-1].content
