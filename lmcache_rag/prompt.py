"""The only place that makes a prompt's token ids, for ingestion and for queries.

::

    query   = prefix ⧺ chunk₁ ⧺ sep₂ ⧺ chunk₂ ⧺ … ⧺ chunkₙ ⧺ suffix(question)
    ingest  = prefix ⧺ neutral passages ⧺ chunk

Parts are tokenised one by one and spliced as ids; text is never joined and tokenised again. So a chunk's ids are the
same in every prompt, and that is what makes its KV cache reusable. A format may put a `lead` between prefix and chunk₁.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from lmcache_rag._utils import well_formed
from lmcache_rag.chunk_prompts import ChunkPrompts
from lmcache_rag.engines.base import ChunkSpan, EngineInfo, IngestPrompt, QueryPrompt
from lmcache_rag.errors import PromptError
from lmcache_rag.neutral import NEUTRAL_PASSAGES, neutral_ids
from lmcache_rag.tokenizer import SafeTokenizer, chat_template, chat_text

SYSTEM = "You answer questions from the passages that you are given."
INSTRUCTION = "Answer the question with the passages below. If they do not hold the answer, say so."

# Placeholders that the chat template puts where the real parts go. Letters only: no template changes them.
_CONTEXT, _TURN, _REASON = "QXCONTEXTXQ", "QXTURN{}XQ", "QXREASONXQ"
_THINK, _END_THINK = "<think>", "</think>"


Role: TypeAlias = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One earlier turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class PromptFormat:
    """The text around chunks and question. All text before the first chunk is part of the KV's fingerprint.

    Attributes:
        system: System text; put into the user's turn if the template has no system role.
        instruction: Stands before the passages.
        context_head: Between instruction and first chunk.
        separator: Between chunks, always recomputed; ``{rank}`` becomes the number of the chunk that follows.
        question: The question's frame, after the last chunk.
        filler: Repeated between instruction and passages until the prefix is a whole number of KV blocks. Where it is
            not one token of the model, another neutral text is used.
        template_options: Given to the chat template. The date is fixed, since a prefix that changes every day (Llama 3)
            would make all KV useless every midnight; a template that calls `strftime_now` gets the same date, unless
            the options have a function of that name.
        lead: Between prefix and first chunk, in queries only; ``{question}`` becomes the question. It is always
            computed, and no chunk is exact then.
        label: Before each chunk, the first too, in queries with labels only; ``{label}`` becomes the chunk's. Always
            computed, as the separators are, so the chunks' KV is the same with labels and without.
        cite: After the last chunk, in queries with labels only; ``{label}`` becomes the first chunk's.
        neutral: Passages that stand before a chunk while its KV is computed, and in no query; see lmcache_rag.neutral.
            Empty: a chunk's KV is computed right after the prefix, and is exact in a query's first place.
    """

    system: str = SYSTEM
    instruction: str = INSTRUCTION
    context_head: str = "\n\nPassages:\n\n"
    separator: str = "\n\n"
    question: str = "\n\nQuestion: {question}"
    filler: str = "\n"
    template_options: Mapping[str, Any] = field(default_factory=lambda: {"date_string": "26 Jul 2024"})
    lead: str = ""
    label: str = "[{label}] "
    cite: str = "\n\nCite the passages by their numbers, such as [{label}]."
    neutral: tuple[str, ...] = NEUTRAL_PASSAGES

    def __post_init__(self) -> None:
        if self.question.count("{question}") != 1:
            raise PromptError("The question's frame must hold {question} exactly once.")


class PromptBuilder:
    """Builds ingest and query prompts for one engine, format and tenant. Thread-safe.

    Args:
        tokenizer: A ModelTokenizer, or a transformers tokenizer with a fast (tokenizers) backend.
        info: The engine's facts; kv_block decides how the prefix is padded.
        format: The text around chunks and question.
        tenant: KV of different tenants is never shared.

    Raises:
        PromptError: The chat template does not keep the parts apart, or the tokenizer is of an unsupported kind.
    """

    def __init__(
        self, tokenizer: Any, info: EngineInfo, *, format: PromptFormat | None = None, tenant: str = ""
    ) -> None:
        self.info = info
        self.format = format or PromptFormat()
        self.tenant = tenant
        self._tokenizer = tokenizer
        self._parts = SafeTokenizer.of(tokenizer)
        self._has_template = bool(chat_template(tokenizer))
        self._fold_system = self._needs_folding()
        self._drops_reasoning = self._template_drops_reasoning()
        neutral = neutral_ids(self.format.neutral, self._parts.text, info.kv_block, info.context_length)
        self._chunks = ChunkPrompts(self._parts, info, self._make_prefix(), tenant=tenant, neutral=neutral)
        self.prefix_ids: tuple[int, ...] = self._chunks.prefix_ids
        self.neutral_ids: tuple[int, ...] = self._chunks.neutral_ids
        self.fingerprint: str = self._chunks.fingerprint

    # -- the parts ----------------------------------------------------------------------------------------------

    @property
    def folds_system(self) -> bool:
        """Whether the system text is in the user's first turn, since the template has no fixed place for it."""
        return self._fold_system

    def chunk_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a chunk; special tokens in it are plain text. The latest are cached."""
        return self._chunks.chunk_ids(text)

    def chunk_key(self, text: str) -> str:
        """Name of the chunk's KV."""
        return self._chunks.chunk(text)[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of any text as it is: no special tokens are added, and none is recognised."""
        return self._parts.text(text)

    def suffix_ids(self, question: str, history: Sequence[Turn] = ()) -> list[int]:
        """Token ids of everything after the last chunk: question, earlier turns, the template's tail.

        Earlier turns come after the chunks, in order, the new question last, so that the chunks stay reusable.
        """
        turns = [turn.content for turn in history] + [question]
        roles: list[Role] = [turn.role for turn in history] + ["user"]
        if roles[0] != "user" or any(a == b for a, b in itertools.pairwise(roles)):
            raise PromptError(
                f"The history's roles are {roles[:-1]}.",
                remedy="Begin with a user's turn, alternate, and end with an assistant's.",
            )
        _, tail = self._split(roles)
        ids: list[int] = []
        for index, (role, content) in enumerate(zip(roles, turns, strict=True)):
            before, tail = _cut(tail, _TURN.format(index))
            if role == "assistant" and self._drops_reasoning:
                content = content.rpartition(_END_THINK)[2].lstrip("\n")
            ids += self._parts.template(before) + self._parts.text(content)
        return ids + self._parts.template(tail)

    # -- the prompts --------------------------------------------------------------------------------------------

    def ingest(self, chunk: str) -> IngestPrompt:
        """Prefix ⧺ neutral passages ⧺ chunk."""
        return self._chunks.ingest(chunk)

    def query(
        self, chunks: Sequence[str], question: str, history: Sequence[Turn] = (), *, labels: Sequence[str] = ()
    ) -> QueryPrompt:
        """Prefix ⧺ chunk₁ ⧺ sep₂ ⧺ chunk₂ ⧺ … ⧺ suffix, chunks in the given order.

        Args:
            chunks: The chunks' texts.
            question: The question.
            history: Earlier turns.
            labels: A label for each chunk, for citations; none: the prompt has no labels.
        """
        lead, spans = self._lead(question), []
        ids = list(self.prefix_ids)
        for rank, text in enumerate(chunks, start=1):
            before = lead if rank == 1 else self.format.separator.replace("{rank}", str(rank))
            ids += self._parts.text(before + self.label_text(labels[rank - 1]) if labels else before)
            key, chunk = self._chunks.chunk(text)
            spans.append(ChunkSpan(len(ids), len(ids) + len(chunk), key))
            ids += chunk
        if not chunks:
            ids += self._parts.text(lead)
        suffix_start = len(ids)
        ids += self._parts.text(self.cite_text(labels)) + self.suffix_ids(question, history)
        return QueryPrompt(
            tuple(ids),
            len(self.prefix_ids),
            tuple(spans),
            suffix_start,
            self.fingerprint,
            len(self.neutral_ids),
            self.tenant,
        )

    def label_text(self, label: str) -> str:
        """What stands before a chunk with this label."""
        return self.format.label.replace("{label}", label)

    def cite_text(self, labels: Sequence[str]) -> str:
        """The request to cite; "" without labels."""
        return self.format.cite.replace("{label}", labels[0]) if labels else ""

    def messages(self, chunks: Sequence[str], question: str, history: Sequence[Turn] = ()) -> list[dict[str, str]]:
        """The prompt as chat messages, chunks in the first user message; the filler of the prefix is in it too.

        For callbacks, traces and servers that render the chat template themselves. The prompt itself is the ids of
        `query`.
        """
        passages = "".join(
            text if rank == 1 else self.format.separator.replace("{rank}", str(rank)) + text
            for rank, text in enumerate(chunks, start=1)
        )
        turns = [*history, Turn("user", question)]
        passages = self._lead(question) + passages
        made = self._messages(turns, passages, fold=self._fold_system, filler=self._filler * self._fillers)
        return [{name: well_formed(text) for name, text in message.items()} for message in made]

    # -- inside -------------------------------------------------------------------------------------------------

    def _lead(self, question: str) -> str:
        return self.format.lead.replace("{question}", question)

    def _make_prefix(self) -> tuple[int, ...]:
        head, _ = self._split(["user"])
        before, after = _cut(head, self.format.context_head, last=True)
        # A chat template names the token that begins a sequence, if there is one.
        start = [] if self._has_template else self._parts.start()
        start += self._parts.template(before, first=True)
        end = self._parts.template(self.format.context_head + after)
        self._filler, filler = self._parts.filler(self.format.filler)
        self._fillers = -(len(start) + len(end)) % self.info.kv_block
        return (*start, *(filler * self._fillers), *end)

    def _messages(self, turns: Sequence[Turn], passages: str, *, fold: bool, filler: str = "") -> list[dict[str, str]]:
        form = self.format
        messages = []
        opening = f"{form.instruction}{filler}{form.context_head}{passages}"
        if form.system and fold:
            opening = f"{form.system}\n\n{opening}"
        elif form.system:
            messages.append({"role": "system", "content": form.system})
        for index, turn in enumerate(turns):
            content = turn.content
            if turn.role == "user":
                frame = form.question.lstrip() if index else form.question
                content = ("" if index else opening) + frame.replace("{question}", content)
            messages.append({"role": turn.role, "content": content})
        return messages

    def _render(self, roles: Sequence[Role], *, fold: bool) -> str:
        turns = [Turn(role, _TURN.format(index)) for index, role in enumerate(roles)]
        messages = self._messages(turns, _CONTEXT, fold=fold)
        if (text := chat_text(self._tokenizer, messages, self.format.template_options)) is not None:
            return text
        names = {"user": "\n\n", "assistant": "\nAnswer: ", "system": ""}
        text = "".join(names[m["role"]] + m["content"] for m in messages)
        return text.lstrip() + "\nAnswer:"

    def _template_drops_reasoning(self) -> bool:
        """Whether the chat template leaves an earlier answer's reasoning out."""
        turns = [Turn("user", "a"), Turn("assistant", f"{_THINK}{_REASON}{_END_THINK}{_TURN}"), Turn("user", "b")]
        try:
            messages = self._messages(turns, "", fold=self._fold_system)
            shown = chat_text(self._tokenizer, messages, self.format.template_options) or _REASON
        except Exception:  # templates raise errors of any kind
            return False
        return _REASON not in shown and _TURN in shown

    def _split(self, roles: Sequence[Role]) -> tuple[str, str]:
        """The rendered template before and after the chunks; the turns' placeholders are in the second part."""
        return _cut(self._render(roles, fold=self._fold_system), _CONTEXT)

    def _needs_folding(self) -> bool:
        """Whether the system text must go into the user's turn, since the template has no fixed place for it."""
        problems = []
        for fold in (False, True):
            try:
                conversations: tuple[list[Role], ...] = (["user"], ["user", "assistant", "user"])
                heads = {_cut(self._render(roles, fold=fold), _CONTEXT)[0] for roles in conversations}
            except Exception as problem:  # templates raise errors of any kind
                problems.append(str(problem))
                continue
            if len(heads) == 1 and (not self.format.system or self.format.system.strip() in next(iter(heads))):
                return fold
            problems.append("the text before the passages changes with the conversation")
        raise PromptError(
            f"The model's chat template does not keep passages apart from the rest ({'; '.join(problems)}).",
            remedy="Give the tokenizer another chat_template.",
        )


def _cut(text: str, mark: str, *, last: bool = False) -> tuple[str, str]:
    """Text before and after the mark, which must occur once (with `last`: after its last occurrence)."""
    if mark not in text or (not last and text.count(mark) != 1):
        raise PromptError(
            f"The chat template shows {mark!r} {text.count(mark)} times where once was expected.",
            remedy="Give the tokenizer another chat_template.",
        )
    before, _, after = text.rpartition(mark)
    return before, after
