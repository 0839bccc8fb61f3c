"""Token ids of a conversation in which passages stand, in the program's own words and with its own tools.

`prompt.py` makes the prompts of this library's own format. Here a program brings messages: a prompt template's, or an
agent's. What they begin with, up to the first text that changes or the first passage, is the prefix. ::

    query   = prefix ⧺ texts and passages, in the order of the chat template
    ingest  = prefix ⧺ neutral passages ⧺ passage

Each text is tokenised apart, in place of a mark in the rendered chat template, so that a passage has the same ids in
every prompt, and no text can be taken for a special token.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from lmcache_rag._utils import well_formed
from lmcache_rag.chunk_prompts import ChunkPrompts
from lmcache_rag.engines.base import ChunkSpan, EngineInfo, QueryPrompt
from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import PromptFormat
from lmcache_rag.tokenizer import SafeTokenizer, chat_template, chat_text

Kind: TypeAlias = Literal["fixed", "changing", "passage"]

_MARK = "QXPIECE{}XQ"  # letters only: no template changes them
_FILL = "QXFILLXQ"
_MARKS = re.compile(r"QX(?:PIECE\d+|FILL)XQ")
_CACHED_PREFIXES = 64
_ROLES = {"user": "\n\n", "assistant": "\nAnswer: "}  # where a model has no chat template


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a message: text that is the same in every request, text that changes, or a passage."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message; its text is that of its pieces. `extra`: what else the chat template is given, such as tool calls."""

    role: str
    pieces: tuple[Piece, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class MessagePrompt:
    """A prompt made of messages.

    Attributes:
        prompts: The ingest prompts of its prefix.
        prompt: Token ids, with the spans of the passages.
        texts: The passages, in the order of the spans.
    """

    prompts: ChunkPrompts
    prompt: QueryPrompt
    texts: tuple[str, ...]


class MessageComposer:
    """Makes prompts of messages for one engine and tenant. Thread-safe.

    Args:
        tokenizer: The model's tokenizer.
        info: The engine's facts; kv_block decides how prefixes are padded.
        tenant: KV of different tenants is never shared.
    """

    def __init__(self, tokenizer: Any, info: EngineInfo, *, tenant: str = "") -> None:
        self._tokenizer, self._info, self._tenant = tokenizer, info, tenant
        self._parts = SafeTokenizer.of(tokenizer)
        self._lock = threading.Lock()
        self._prompts: OrderedDict[tuple[int, ...], ChunkPrompts] = OrderedDict()

    def compose(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> MessagePrompt:
        """Make the prompt of these messages; the answer is to follow.

        Args:
            messages: The conversation.
            tools: Tools that the model may call, as in an OpenAI request; the chat template renders them.
            options: For the chat template.

        Raises:
            PromptError: The chat template cannot render these messages, or has no fixed text before the passages.
        """
        rendered = self._rendered(messages, tools, dict(options or {}))
        prefix = self._prefix(rendered)
        prompts = self._of_prefix(prefix)
        ids, spans, texts = list(prefix), [], []
        for piece in rendered[_head_of(rendered) :]:
            if not isinstance(piece, Piece):
                ids += self._parts.template(piece)
            elif piece.kind != "passage":
                ids += self._parts.text(piece.text)
            else:
                key, chunk = prompts.chunk(piece.text)
                if chunk:
                    spans.append(ChunkSpan(len(ids), len(ids) + len(chunk), key))
                    texts.append(piece.text)
                    ids += chunk
        end = spans[-1].end if spans else len(prefix)
        prompt = QueryPrompt(
            tuple(ids), len(prefix), tuple(spans), end, prompts.fingerprint, len(prompts.neutral_ids), self._tenant
        )
        return MessagePrompt(prompts, prompt, tuple(texts))

    # -- the prefix -----------------------------------------------------------------------------------------------

    def _of_prefix(self, prefix: tuple[int, ...]) -> ChunkPrompts:
        with self._lock:
            if prefix not in self._prompts:
                self._prompts[prefix] = ChunkPrompts(self._parts, self._info, prefix, tenant=self._tenant)
                while len(self._prompts) > _CACHED_PREFIXES:
                    self._prompts.popitem(last=False)
            self._prompts.move_to_end(prefix)
            return self._prompts[prefix]

    def _prefix(self, rendered: Sequence[str | Piece]) -> tuple[int, ...]:
        """Token ids of the parts before the first that changes, filled up to whole KV blocks."""
        head = rendered[: _head_of(rendered)]
        place = head.index(_FILL)
        first = True
        before, after = [] if chat_template(self._tokenizer) else self._parts.start(), list[int]()
        for ids, parts in ((before, head[:place]), (after, head[place + 1 :])):
            for part in parts:
                if isinstance(part, Piece):
                    ids += self._parts.text(part.text)
                else:
                    ids += self._parts.template(part, first=first)
                first = False
        _, filler = self._parts.filler()
        return (*before, *(filler * (-(len(before) + len(after)) % self._info.kv_block)), *after)

    # -- the chat template ----------------------------------------------------------------------------------------

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, options: dict[str, Any]
    ) -> list[str | Piece]:
        """The template's own text and the pieces, in its order; _FILL stands where the prefix is filled up."""
        problem: Exception | None = None
        for conversation in (messages, _without_system(messages)):
            for filled in _with_filler(conversation):
                try:
                    found = self._render(filled, tools, options)
                except Exception as wrong:  # templates raise errors of any kind
                    problem = problem or wrong
                    continue
                if _FILL in found[: _head_of(found)]:
                    return found
        raise PromptError(
            f"The chat template does not render these messages with a fixed beginning ({problem or 'none was found'}).",
            remedy="Begin with a system message that is the same in every request, or use another chat template.",
        )

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, options: dict[str, Any]
    ) -> list[str | Piece]:
        pieces: list[Piece] = []

        def mark(piece: Piece) -> str:
            if piece.text == _FILL:
                return _FILL
            pieces.append(replace(piece, text=well_formed(piece.text)))
            return _MARK.format(len(pieces) - 1)

        shown: list[dict[str, Any]] = []
        for message in messages:
            content = "".join(mark(piece) for piece in message.pieces)
            extra = dict(message.extra)
            if "tool_calls" in extra:
                extra["tool_calls"] = [_marked_call(call, mark) for call in extra["tool_calls"]]
            for name in ("name", "tool_call_id"):
                self._require_plain(extra.get(name, ""))
            shown.append({"role": message.role, "content": content, **extra})
        variables = {"tools": list(tools) if tools else None, **PromptFormat().template_options, **options}
        text = chat_text(self._tokenizer, shown, variables)
        if text is None:
            text = "".join(_ROLES.get(message["role"], "") + message["content"] for message in shown).lstrip()
            text += "\nAnswer:"
        found: list[str | Piece] = []
        at = 0
        for match in _MARKS.finditer(text):
            if match.start() > at:
                found.append(text[at : match.start()])
            name = match.group()
            found.append(name if name == _FILL else pieces[int(name[len("QXPIECE") : -len("XQ")])])
            at = match.end()
        return [*found, text[at:]] if at < len(text) else found

    def _require_plain(self, text: Any) -> None:
        """Raise if a text that stands in the template as it is holds a special token."""
        if self._parts.has_special(str(text)):
            raise PromptError(f"{text!r} holds a special token of the model.", remedy="Leave it out of the messages.")


def _head_of(rendered: Sequence[str | Piece]) -> int:
    """Index of the first part that is not the same in every request."""
    for index, part in enumerate(rendered):
        if isinstance(part, Piece) and part.kind != "fixed":
            return index
    return len(rendered)


def _with_filler(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages with a mark where the prefix is filled up: at the end of a line or of a message, or at the start."""
    first = next(
        (
            (number, place)
            for number, message in enumerate(messages)
            for place, piece in enumerate(message.pieces)
            if piece.kind != "fixed"
        ),
        (len(messages) - 1, len(messages[-1].pieces) if messages else 0),
    )
    fill = Piece("fixed", _FILL)
    number, place = first
    head = messages[number].pieces[:place]
    if head and "\n" in (text := head[-1].text):
        kept = text[: text.rindex("\n")].rstrip()
        ends = [Piece("fixed", part) for part in (kept, _FILL, text[len(kept) :]) if part]
        yield _changed(messages, number, (*head[:-1], *ends, *messages[number].pieces[place:]))
    for earlier in range(number - 1, -1, -1):
        if messages[earlier].pieces:
            yield _changed(messages, earlier, (*messages[earlier].pieces, fill))
            break
    # Where a template moves the fixed text after what changes.
    for later in range(len(messages)):
        yield _changed(messages, later, (fill, *messages[later].pieces))


def _changed(messages: Sequence[Message], number: int, pieces: tuple[Piece, ...]) -> list[Message]:
    return [replace(one, pieces=pieces) if index == number else one for index, one in enumerate(messages)]


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with the system text in the user's first turn, for templates without a system role."""
    system = [piece for message in messages if message.role == "system" for piece in message.pieces]
    rest = [message for message in messages if message.role != "system"]
    if not system or not rest:
        return list(messages)
    return [replace(rest[0], pieces=(*system, Piece("fixed", "\n\n"), *rest[0].pieces)), *rest[1:]]


def _marked_call(call: Mapping[str, Any], mark: Callable[[Piece], str]) -> dict[str, Any]:
    """A tool call as chat templates take it, arguments as values. Its texts are marked, since a model wrote them."""
    function = dict(call.get("function") or {})
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    name = mark(Piece("changing", str(function.get("name", ""))))
    return {**call, "function": {**function, "name": name, "arguments": _marked(arguments, mark)}}


def _marked(value: Any, mark: Callable[[Piece], str]) -> Any:
    if isinstance(value, str):
        return mark(Piece("changing", json.dumps(value, ensure_ascii=False)[1:-1])) if value else value
    if isinstance(value, Mapping):
        return {_marked(key, mark): _marked(one, mark) for key, one in value.items()}
    if isinstance(value, list):
        return [_marked(one, mark) for one in value]
    return value
