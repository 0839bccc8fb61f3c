"""One call of an agent's model: the passages in its messages become reusable, whatever the program wrote around them.

Messages, tools and structured output are what the program made them. Only the prompt's token ids are made here, so that
each passage has the same ids in every prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import BaseMessage, ToolMessage

from lmcache_rag.engines.base import BlendOptions, QueryPrompt
from lmcache_rag.errors import ContextLengthError, PromptError
from lmcache_rag.message_prompt import Message, Piece

from ..blender import Blender, BlendPrompt
from .openai import KEY, BlendCall
from .retrieved import RETRIEVED, passages_in, split_at_passages
from .reuse_watch import ReuseWatch

log = logging.getLogger("lmcache_rag")

_NOTHING = BlendPrompt(QueryPrompt((), 0, (), 0, ""), "", (), (), ())
_WITH_PASSAGES = ("system", "developer", "user", "tool")
_REMEDY = (
    "Passages are found where they stand word for word in a message, and were returned by a tool as Documents "
    '(response_format="content_and_artifact") or by a search of LMCacheVectorStore or LMCacheRetriever.'
)


@dataclass
class AgentCall(BlendCall):
    """State of one call. Its prompt is made when the request is, of the messages in it.

    Attributes:
        passages: Texts that may stand in the messages, besides those retrieved lately.
        watch: Is told what was reused.
    """

    passages: tuple[str, ...] = ()
    watch: ReuseWatch = field(default_factory=ReuseWatch)

    @classmethod
    def of(cls, blender: Blender, messages: Sequence[Any], blend: BlendOptions, watch: ReuseWatch) -> AgentCall:
        """Make one for messages; artifacts of tool messages are passages."""
        found = [text for one in messages if isinstance(one, ToolMessage) for text in passages_in(one.artifact)]
        return cls(blender, _NOTHING, blend, passages=tuple(found), watch=watch)

    @property
    def params(self) -> dict[str, Any]:
        """As of BlendCall, without what is known only later."""
        blend = self.blend
        return {f"{KEY}_blend": blend.enabled, f"{KEY}_policy": blend.policy, f"{KEY}_ratio": blend.budget.wire}

    def request(self, payload: dict[str, Any], model_body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Add token ids and the blend's parameters, if there are passages in the messages."""
        self.done, self._gathered = None, None
        try:
            made = self._made(payload, model_body)
        except (PromptError, ContextLengthError) as problem:  # the server may still answer, or says it in its own words
            self.watch.cannot(str(problem))
            return payload
        if made is None:
            return payload
        self.blender, self.prompt = made
        self.body = self.blender.request_chat(self.prompt, blend=self.blend)
        return super().request(payload, model_body)

    def finish(self) -> Any:
        """As of BlendCall; the watch is told."""
        new, done = self.done is None, super().finish()
        if new and done is not None:
            self.watch.take(self.blender, self.prompt, done, self.blend)
        return done

    def _made(
        self, payload: Mapping[str, Any], model_body: Mapping[str, Any] | None
    ) -> tuple[Blender, BlendPrompt] | None:
        if not self.blender.chat_takes_ids:
            self.watch.cannot("the chat completions of this vLLM take no token ids. Use vLLM 0.32 or later.")
            return None
        known = [*self.passages, *RETRIEVED.texts()]
        messages = [_message(one, known) for one in payload["messages"]]
        if None in messages:
            self.watch.cannot("a message is not only text.")
            return None
        conversation = [message for message in messages if message is not None]
        if not any(piece.kind == "passage" for message in conversation for piece in message.pieces):
            self.watch.no_passages(_REMEDY)
            return None
        bodies = [body or {} for body in (model_body, payload.get("extra_body"))]
        options: dict[str, Any] = {}
        for body in bodies:
            options |= body.get("chat_template_kwargs") or {}
        made = self.blender.composer.compose(conversation, tools=shown_tools(payload.get("tools")), options=options)
        question = next((message.text for message in reversed(conversation) if message.role == "user"), "")
        return self.blender.of_message_prompt(made, question, kept=range(len(made.texts)))


def shown_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return tools as vLLM gives them to the chat template. `strict` is left out: it says how an answer is parsed."""
    shown = []
    for tool in tools or ():
        function = tool.get("function", {})
        facts = {name: function.get(name) for name in ("name", "description", "parameters")}
        shown.append({"type": "function", "function": facts})
    return shown


def is_messages(value: Any) -> bool:
    """Return whether a step's input is a conversation, as a chat model takes it."""
    if hasattr(value, "to_messages"):
        return True
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(one, BaseMessage) or (isinstance(one, Mapping) and "role" in one) for one in value)


def _message(message: Mapping[str, Any], passages: Sequence[str]) -> Message | None:
    """Return a message of an OpenAI request with its passages; None if it is not only text."""
    content = message.get("content") or ""
    if isinstance(content, list):
        parts = [part.get("text") if part.get("type") == "text" else None for part in content]
        if None in parts:
            return None
        content = "\n".join(str(part) for part in parts)  # as vLLM joins them
    role = str(message.get("role"))
    kind: Any = "fixed" if role in ("system", "developer") else "changing"
    found = split_at_passages(content, passages if role in _WITH_PASSAGES else ())
    pieces = tuple(Piece("passage" if is_passage else kind, part) for is_passage, part in found)
    extra = {name: message[name] for name in ("tool_calls", "tool_call_id", "name") if message.get(name)}
    return Message("system" if role == "developer" else role, pieces, extra)
