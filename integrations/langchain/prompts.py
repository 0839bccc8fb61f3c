"""Parses a chain's input, and shows a finished prompt to LangChain. Token ids are made in lmcache_rag.prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AnyMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    convert_to_messages,
)
from langchain_core.prompt_values import PromptValue
from typing_extensions import TypedDict

from lmcache_rag.errors import ConfigError
from lmcache_rag.prompt import Turn

from ..blender import join_turns

if TYPE_CHECKING:
    from ..blender import BlendPrompt

DOCUMENTS = ("documents", "context", "docs")
QUESTIONS = ("question", "input", "query")
HISTORIES = ("history", "chat_history")
_SCORES = ("relevance_score", "score")  # metadata fields in which rerankers and retrievers leave their scores
_MESSAGES: Mapping[str, Callable[[str], AnyMessage]] = {
    "system": SystemMessage,
    "user": HumanMessage,
    "assistant": AIMessage,
}


# -- the chain's input ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlendInput:
    """A question with its chunks.

    Attributes:
        texts: The chunks, in prompt order.
        scores: One for each chunk, larger is better; None where not every document has one.
        question: The question.
        history: Earlier turns.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...] | None
    question: str
    history: tuple[Turn, ...]


def parse_input(value: Any) -> BlendInput:
    """Parse the input of a blend.

    Args:
        value: A mapping with documents (also "context", "docs"), question ("input", "query"), and perhaps history
            ("chat_history"). Documents are Documents or texts, in prompt order.

    Raises:
        ConfigError: A part is missing or has the wrong type.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"blend() takes documents and a question; it got {type(value).__name__}.",
            remedy='Put {"documents": retriever, "question": RunnablePassthrough()} before it.',
        )
    texts, scores = parse_documents(_first(value, DOCUMENTS))
    question = _first(value, QUESTIONS)
    if isinstance(question, BaseMessage):
        question = question.text
    if not isinstance(question, str):
        raise ConfigError(f"The question is {type(question).__name__}.", remedy="Pass a text.")
    history, question = conversation(next((value[name] for name in HISTORIES if value.get(name)), ()), question)
    return BlendInput(texts, scores, question, history)


def unused_inputs(value: Mapping[str, Any]) -> list[str]:
    """Return the names in a chain's input that parse_input does not use."""
    used = {next((name for name in names if name in value), "") for names in (DOCUMENTS, QUESTIONS)}
    return sorted(set(value) - used - {name for name in HISTORIES if name in value})


def parse_documents(documents: Any) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Return the texts of documents, and their scores if all have one.

    Raises:
        ConfigError: They are no list of Documents or texts.
    """
    if isinstance(documents, str) or not isinstance(documents, Sequence):
        raise ConfigError(
            f"The documents are {type(documents).__name__}.",
            remedy="Pass the list of Documents as the retriever returns it: joined into one text, no KV is found.",
        )
    return tuple(map(_text, documents)), _scores(documents)


def conversation(messages: Any, question: str) -> tuple[tuple[Turn, ...], str]:
    """Convert messages (or what LangChain converts to messages) to earlier turns, and the question after them.

    Turns begin with a user's and alternate, as chat templates require, so that

    - an assistant's greeting at the head is left out, and so are tool messages and messages without text;
    - system messages (a summary, say) stand before the user's next words;
    - a question at the end that was never answered stands before the new one, unless it is the same.

    Raises:
        ConfigError: It is no list of messages.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ConfigError(
            f"The history is {type(messages).__name__}.",
            remedy="Pass a list of human and AI messages, without passages.",
        )
    turns: list[Turn] = []
    notes = ""  # system messages, until the user speaks
    for message in convert_to_messages(messages):
        text = message.text
        if not text.strip():
            continue
        if isinstance(message, SystemMessage):
            notes += f"{text}\n\n"
        elif isinstance(message, AIMessage) and turns:
            turns.append(Turn("assistant", text))
        elif isinstance(message, HumanMessage):
            turns.append(Turn("user", notes + text))
            notes = ""
    turns = join_turns(turns)
    if turns and turns[-1].role == "user":
        pending = turns.pop().content
        notes = notes if pending.strip() == question.strip() else f"{pending}\n\n{notes}"
    return tuple(turns), notes + question


def _first(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in values:
            return values[name]
    raise ConfigError(
        f"The input has {', '.join(map(repr, values)) or 'nothing'}, but no {names[0]!r}.",
        remedy=f"Name it {' or '.join(map(repr, names))}.",
    )


def _text(document: Any) -> str:
    if isinstance(document, Document):
        return document.page_content
    if isinstance(document, str):
        return document
    raise ConfigError(f"A document is a {type(document).__name__}.", remedy="Pass Documents or texts.")


def _scores(documents: Sequence[Any]) -> tuple[float, ...] | None:
    """Return the documents' scores if all have one: what does not fit the context is dropped by score, not position."""
    for name in _SCORES:
        values = [getattr(document, "metadata", {}).get(name) for document in documents]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if numbers and len(numbers) == len(values):
            return tuple(numbers)
    return None


# -- the prompt value -------------------------------------------------------------------------------------------------


class Segment(TypedDict):
    """A part of a prompt: token_ids[start:end]. `key` is the key of a chunk's KV, and empty for the other kinds."""

    kind: Literal["prefix", "chunk", "separator", "suffix"]
    start: int
    end: int
    key: str


class ChunkedPromptValue(PromptValue):
    """A prompt as it is sent to the model: its token ids, since the parts are tokenised one by one.

    Attributes:
        text: What the model reads, special tokens included.
        messages: The same as a conversation, for chat models and for traces.
        token_ids: The prompt.
        segments: Its parts, in order, without gaps.
    """

    text: str
    messages: list[AnyMessage]
    token_ids: list[int]
    segments: list[Segment]

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Return the package that exports the class."""
        return ["lmcache_rag", "integrations", "langchain"]

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return False: LangChain does not load classes of other packages."""
        return False

    def to_string(self) -> str:
        """Return the text."""
        return self.text

    def to_messages(self) -> list[BaseMessage]:
        """Return the messages."""
        return list(self.messages)


def prompt_value(messages: Sequence[Mapping[str, str]], tokenizer: Any, prompt: BlendPrompt) -> ChunkedPromptValue:
    """Convert a blended prompt to a prompt value.

    Args:
        messages: The same as a conversation.
        tokenizer: The model's tokenizer.
        prompt: The prompt.
    """
    ids = list(prompt.prompt.token_ids)
    return ChunkedPromptValue(
        text=tokenizer.decode(ids),
        messages=[_MESSAGES[message["role"]](message["content"]) for message in messages],
        token_ids=ids,
        segments=_segments(prompt),
    )


def _segments(prompt: BlendPrompt) -> list[Segment]:
    query = prompt.prompt
    parts: list[Segment] = [{"kind": "prefix", "start": 0, "end": query.prefix_tokens, "key": ""}]
    for span in query.chunks:
        if span.start > parts[-1]["end"]:
            parts.append({"kind": "separator", "start": parts[-1]["end"], "end": span.start, "key": ""})
        parts.append({"kind": "chunk", "start": span.start, "end": span.end, "key": span.key})
    return [*parts, {"kind": "suffix", "start": query.suffix_start, "end": len(query), "key": ""}]
