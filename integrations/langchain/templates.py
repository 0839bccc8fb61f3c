"""A program's prompt template: what stands before the passages is the prefix, everything else follows it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.prompts import (
    ChatPromptTemplate,
    HumanMessagePromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
)
from langchain_core.utils.function_calling import convert_to_openai_tool

from lmcache_rag.errors import ConfigError
from lmcache_rag.kv_removal import IngestPrompts
from lmcache_rag.message_prompt import Kind, Message, MessageComposer, Piece
from lmcache_rag.prompt import PromptFormat

from .agent_call import shown_tools
from .openai import template_options
from .prompts import DOCUMENTS, HISTORIES, QUESTIONS, BlendInput, conversation, parse_documents

if TYPE_CHECKING:
    from lmcache_rag.workspace import Workspace

_VARIABLE = "QXVARIABLE{}XQ"  # formatted into the template; letters only, so that no format changes it
_VARIABLES = re.compile(r"QXVARIABLE(\d+)XQ")
_ROLES = {"system": "system", "human": "user", "ai": "assistant"}
_MOVE = "Move it after the passages, or give it one value for all requests: prompt.partial({}=…)."


class TemplatePrompt:
    """A ChatPromptTemplate or PromptTemplate, taken apart at its variables.

    The passages are the variable `documents`, `context` or `docs`; the question `question`, `input` or `query`. What
    changes before the passages has to be computed for each request; that may be the question and a conversation, and
    nothing else. Values of `partial()` are part of the prefix.

    Args:
        prompt: The template. A PromptTemplate is a user's message.
        separator: Between passages.

    Raises:
        ConfigError: It is no such template, does not hold the passages once, or has other variables before them.
    """

    def __init__(self, prompt: Any, *, separator: str = "\n\n") -> None:
        if isinstance(prompt, PromptTemplate):
            prompt = ChatPromptTemplate.from_messages([HumanMessagePromptTemplate(prompt=prompt)])
        if not isinstance(prompt, ChatPromptTemplate):
            raise ConfigError(
                f"prompt is a {type(prompt).__name__}.", remedy="Give a ChatPromptTemplate or a PromptTemplate."
            )
        self.separator = separator
        computed: dict[str, Any] = {}
        messages = [_freed(message, computed) for message in prompt.messages]
        prompt = ChatPromptTemplate.from_messages(messages).partial(**computed, **prompt.partial_variables)
        constant = {name for name, value in prompt.partial_variables.items() if not callable(value)}
        self._computed = {name: value for name, value in prompt.partial_variables.items() if callable(value)}
        places = {part.variable_name for part in prompt.messages if isinstance(part, MessagesPlaceholder)}
        named = {*prompt.input_variables, *prompt.optional_variables, *prompt.partial_variables, *places}
        self.placeholders = frozenset(places)
        self.variables = tuple(sorted(named - (constant - places)))
        self._parts = self._take_apart(prompt)
        order = [name for _, parts in self._parts for kind, name in parts if kind == "variable"]
        self.documents = self._one_of(DOCUMENTS, order)
        self.question = next((name for name in QUESTIONS if name in order), None)
        before = order[: order.index(self.documents)]
        allowed = {*self.placeholders, *([self.question] if self.question else [])}
        if wrong := [name for name in before if name not in allowed]:
            raise ConfigError(
                f"The prompt has {{{wrong[0]}}} before the passages. Their KV depends on what stands there, so none "
                "would be reused once it changes.",
                remedy=_MOVE.format(wrong[0]),
            )

    @property
    def needed(self) -> set[str]:
        """Names of the variables that a request gives."""
        optional = {*self._computed, *self.placeholders}
        return {name for name in self.variables if name not in optional}

    def parse(self, value: Any, *, strict: bool = True) -> tuple[BlendInput, dict[str, Any]]:
        """Return the passages and the question in a chain's input, and all values by variable.

        Args:
            value: The chain's input.
            strict: Raise if a part of the input is not used.

        Raises:
            ConfigError: A value is missing, has the wrong type, or is not used by the prompt.
        """
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"blend() takes values for the prompt; it got {type(value).__name__}.",
                remedy='Put {"documents": retriever, "question": RunnablePassthrough()} before it.',
            )
        names = {name: self._name_in(name, value) for name in self.variables}
        found = {name: value[key] for name, key in names.items() if key is not None}
        if missing := sorted(self.needed - found.keys()):
            raise ConfigError(
                f"The prompt's {missing[0]!r} has no value; the input has {', '.join(map(repr, value)) or 'nothing'}.",
                remedy=f"Add {missing[0]!r} to the input.",
            )
        if strict and (unused := sorted(set(value) - {name for name in names.values() if name})):
            raise ConfigError(
                f"The prompt does not use {unused[0]!r} of the input.",
                remedy=f"Write {{{unused[0]}}} into the prompt, or leave it out: RunnablePick([…]) | blend(…).",
            )
        texts, scores = parse_documents(found[self.documents])
        question = found.get(self.question) if self.question else ""
        if isinstance(question, BaseMessage):
            question = question.text
        if not isinstance(question, str):
            raise ConfigError(f"The question is {type(question).__name__}.", remedy="Pass a text.")
        values = {name: one() for name, one in self._computed.items()} | found
        history: tuple[Any, ...] = ()
        for name in self.placeholders:
            turns, question = conversation(values.get(name) or (), question)
            values[name], history = turns, history + turns
        if self.question:
            values[self.question] = question
        return BlendInput(texts, scores, question, history), values

    def messages(self, texts: Sequence[str], values: Mapping[str, Any]) -> list[Message]:
        """The conversation with these passages."""
        made: list[Message] = []
        text: Kind = "fixed"  # "changing" after a conversation, or the prefix would be longer where that is empty
        for role, parts in self._parts:
            pieces: list[Piece] = []
            turns = None
            for kind, content in parts:
                if kind == "text":
                    pieces.append(Piece(text, content))
                elif content == self.documents:
                    pieces += self._passages(texts)
                elif content in self.placeholders:
                    turns = [Message(turn.role, (Piece("changing", turn.content),)) for turn in values.get(content, ())]
                    text = "changing"
                else:
                    pieces.append(Piece("changing", str(values[content])))
            made += [Message(role, tuple(pieces))] if turns is None else turns
        return made

    def prefix(self) -> list[Message]:
        """The conversation without a request's values, of which the prefix is the beginning."""
        return self.messages([], {name: () if name in self.placeholders else "x" for name in self.variables})

    def _passages(self, texts: Sequence[str]) -> list[Piece]:
        pieces = [Piece("passage", "")]  # the prefix ends here also where nothing was found
        for rank, text in enumerate(texts):
            pieces += [Piece("fixed", self.separator)] if rank else []
            pieces.append(Piece("passage", text))
        return pieces

    def _take_apart(self, prompt: ChatPromptTemplate) -> list[tuple[str, list[tuple[str, str]]]]:
        """Return (role, parts) of each message; a part is ("text", it) or ("variable", its name)."""
        names = list(self.variables)
        marks: dict[str, Any] = {name: _VARIABLE.format(index) for index, name in enumerate(names)}
        marks |= {name: [HumanMessage(marks[name])] for name in self.placeholders}
        try:
            formatted = prompt.format_messages(**marks)
        except Exception as problem:
            raise ConfigError(
                f"The prompt cannot be taken apart at its variables: {problem}.",
                remedy="Use plain variables, {name}, without formats or conditions.",
            ) from problem
        made = []
        for message in formatted:
            if message.type not in _ROLES:
                raise ConfigError(
                    f"The prompt has a message of the kind {message.type}.", remedy="Use system, human and ai messages."
                )
            if not isinstance(message.content, str):
                raise ConfigError("A message of the prompt is no text.", remedy="Passages stand in text messages only.")
            pieces = _VARIABLES.split(message.content)
            parts = [("variable", names[int(one)]) if at % 2 else ("text", one) for at, one in enumerate(pieces)]
            made.append((_ROLES[message.type], [part for part in parts if part[1]]))
        return made

    def _one_of(self, names: Sequence[str], order: Sequence[str]) -> str:
        found = [name for name in order if name in names]
        if len(found) != 1:
            raise ConfigError(
                f"The prompt has {len(found)} places for the passages.",
                remedy=f"Write {{context}} or {{documents}} once; it has {', '.join(order) or 'no variable'}.",
            )
        return found[0]

    def _name_in(self, name: str, value: Mapping[str, Any]) -> str | None:
        """Return the input's name of a variable: the same, or another of those for passages, question or history."""
        groups = [[name]]
        if name == self.documents:
            groups.append(list(DOCUMENTS))
        elif name == self.question:
            groups.append(list(QUESTIONS))
        elif name in self.placeholders:
            groups.append([other for other in HISTORIES if other not in self.variables])
        return next((one for group in groups for one in group if one in value), None)


def _freed(message: Any, computed: dict[str, Any]) -> Any:
    """Return a message of a prompt with the functions of its partial() as variables; they are added to `computed`."""
    inner = getattr(message, "prompt", None)
    found = {name: value for name, value in getattr(inner, "partial_variables", {}).items() if callable(value)}
    if inner is None or not found:
        return message
    computed |= found
    kept = {name: value for name, value in inner.partial_variables.items() if name not in found}
    changed = {"partial_variables": kept, "input_variables": sorted({*inner.input_variables, *found})}
    return message.model_copy(update={"prompt": inner.model_copy(update=changed)})


def default_template(format: PromptFormat) -> TemplatePrompt:
    """Return a template with the words of a PromptFormat, for models that are bound to tools."""
    head = f"{format.system}\n\n{format.instruction}{format.context_head}"
    history = MessagesPlaceholder("history", optional=True)
    made = ChatPromptTemplate.from_messages([("system", "{head}{documents}"), history, ("human", "{question}")])
    return TemplatePrompt(made.partial(head=head))


@dataclass(frozen=True)
class AgentPrompt:
    """How an agent's prompts begin: the KV of create_agent with BlendMiddleware depends on it.

    Attributes:
        system_prompt: The agent's. Where a dynamic prompt puts passages into it: the text up to them, then {context}.
        tools: The agent's.
        strict: Whether the tools are strict: LangChain makes them so where the agent's response_format is the
            provider's (ProviderStrategy).
    """

    system_prompt: str = ""
    tools: Sequence[Any] = ()
    strict: bool = False

    def messages(self) -> list[Message]:
        """The messages, up to the first that changes."""
        before, mark, _ = self.system_prompt.partition("{context}")
        system = [Piece("fixed", before)] if before else []
        if mark:
            system.append(Piece("passage", "x"))
        user = Message("user", (Piece("changing", "x"),))
        return [Message("system", tuple(system)), user] if system else [user]


def ingest_prompts(prompt: Any, workspace: Workspace, source: Any) -> IngestPrompts:
    """Return the prompts with which KV is computed for a prompt.

    Args:
        prompt: A template, a Blend, an AgentPrompt, or None for the workspace's own.
        workspace: The workspace.
        source: The model, if it has options for the chat template.
    """
    if prompt is None:
        return workspace.prompts
    if (found := getattr(prompt, "prompts", None)) is not None:  # a Blend
        return cast(IngestPrompts, found)
    composer = MessageComposer(workspace.engine.tokenizer, workspace.engine.info, tenant=workspace.settings.tenant)
    options = template_options(source, {})
    if isinstance(prompt, AgentPrompt):
        tools = shown_tools([convert_to_openai_tool(tool, strict=prompt.strict or None) for tool in prompt.tools])
        return composer.compose(prompt.messages(), tools=tools, options=options).prompts
    return composer.compose(TemplatePrompt(prompt).prefix(), options=options).prompts
