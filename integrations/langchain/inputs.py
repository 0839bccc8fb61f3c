"""What a chain hands over: documents, a question, earlier turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, convert_to_messages

from lmcache_rag.errors import ConfigError
from lmcache_rag.prompt import Turn

DOCUMENTS = ("documents", "context", "docs")
QUESTIONS = ("question", "input", "query")
HISTORIES = ("history", "chat_history")
_SCORES = ("relevance_score", "score")  # metadata in which rerankers and retrievers leave their judgement


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its chunks."""

    texts: tuple[str, ...]
    scores: tuple[float, ...] | None
    question: str
    history: tuple[Turn, ...]


def asked_of(given: Any) -> Asked:
    """Read the input of a blend.

    Args:
        given: A mapping with documents (also "context", "docs"), question ("input", "query"), and perhaps history
            ("chat_history"). Documents are Documents or texts, in the order of the prompt.

    Raises:
        ConfigError: Something is missing or of another kind.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"blend() takes documents and a question; it got {type(given).__name__}.",
            remedy='Put {"documents": retriever, "question": RunnablePassthrough()} before it.',
        )
    documents = _first(given, DOCUMENTS)
    if isinstance(documents, str) or not isinstance(documents, Sequence):
        raise ConfigError(
            f"The documents are {type(documents).__name__}.",
            remedy="Hand over the list of Documents as the retriever gives it: joined into one text, no KV is found.",
        )
    question = _first(given, QUESTIONS)
    if isinstance(question, BaseMessage):
        question = question.text
    if not isinstance(question, str):
        raise ConfigError(f"The question is {type(question).__name__}.", remedy="Hand over a text.")
    history = next((given[name] for name in HISTORIES if given.get(name)), ())
    return Asked(tuple(map(_text, documents)), _scores(documents), question, turns_of(history))


def turns_of(messages: Sequence[Any]) -> tuple[Turn, ...]:
    """Messages (or what LangChain makes messages of) as turns; neighbours of one role become one turn.

    Raises:
        ConfigError: A message is neither a person's nor the model's.
    """
    turns: list[Turn] = []
    for message in convert_to_messages(messages) if messages else ():
        if isinstance(message, AIMessage):
            turn = Turn("assistant", message.text)
        elif isinstance(message, HumanMessage):
            turn = Turn("user", message.text)
        else:
            raise ConfigError(
                f"The history holds a {type(message).__name__}.",
                remedy="Only human and AI messages can stand behind the passages; the system text is a setting "
                "(LMCACHE_RAG_SYSTEM), since it stands before them and is part of their KV.",
            )
        if turns and turns[-1].role == turn.role:
            turn = Turn(turn.role, f"{turns.pop().content}\n\n{turn.content}")
        turns.append(turn)
    return tuple(turns)


def _first(given: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in given:
            return given[name]
    raise ConfigError(
        f"The input has {', '.join(map(repr, given)) or 'nothing'}, but no {names[0]!r}.",
        remedy=f"Name it {' or '.join(map(repr, names))}.",
    )


def _text(document: Any) -> str:
    if isinstance(document, Document):
        return document.page_content
    if isinstance(document, str):
        return document
    raise ConfigError(f"A document is a {type(document).__name__}.", remedy="Hand over Documents or texts.")


def _scores(documents: Sequence[Any]) -> tuple[float, ...] | None:
    """Scores that all the documents have, so that what does not fit is dropped by them and not by its place."""
    for name in _SCORES:
        values = [getattr(document, "metadata", {}).get(name) for document in documents]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if numbers and len(numbers) == len(values):
            return tuple(numbers)
    return None
