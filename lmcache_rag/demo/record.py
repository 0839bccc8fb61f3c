"""Questions and answers, in the form that the page shows and in that of the export."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from lmcache_rag.errors import LMCacheRAGError

if TYPE_CHECKING:
    from lmcache_rag.engines.base import BlendOptions, Completion, Sampling
    from lmcache_rag.store import Hit

ArmName: TypeAlias = Literal["blended", "baseline"]
ARMS: tuple[ArmName, ArmName] = ("blended", "baseline")
FORMAT = 1  # of the export


@dataclass(frozen=True, slots=True)
class Problem:
    """An error to show: what happened, and what to do about it."""

    type: str
    message: str
    remedy: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Problem:
        """From an exception."""
        if isinstance(error, LMCacheRAGError):
            return cls(type(error).__name__, error.message, error.remedy)
        return cls(type(error).__name__, str(error) or "It failed.", "See the log of `lmcache-rag demo`.")


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and one arm's answer.

    Attributes:
        ask: Number of the question in its session; both arms' turns of one question have the same.
        arm: Name of the arm.
        model: The engine's model.
        question: The question.
        passages: The chunks in the prompt, in their order.
        dropped: Chunks that did not fit the context.
        text: The answer, complete or partial.
        sampling: How tokens were chosen.
        blend: How KV was to be reused.
        spans: Position of each passage in the prompt, as (start, end) in tokens.
        alone: Whether nothing else was computed on the engine from the sending to the first token.
        first_text_ms: From the sending to the first text; None where none came.
        total_ms: From the sending to the end.
        completion: The engine's Completion; None if the answer is not complete.
        stopped: Whether the user stopped it.
        problem: Why it failed.
    """

    ask: int
    arm: ArmName
    model: str
    question: str
    passages: tuple[Hit, ...]
    dropped: tuple[Hit, ...]
    text: str
    sampling: Sampling
    blend: BlendOptions
    spans: tuple[tuple[int, int], ...] = ()
    alone: bool = True
    first_text_ms: float | None = None
    total_ms: float = 0.0
    completion: Completion | None = None
    stopped: bool = False
    problem: Problem | None = None

    @property
    def ttft_ms(self) -> float | None:
        """From the sending to the first token, as the engine reports it; for an incomplete answer to the first text."""
        return self.completion.stats.ttft_ms if self.completion else self.first_text_ms

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the user."""
        return self.completion.warnings if self.completion else ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the engine's own numbers, not rounded."""
        done = self.completion
        return {
            "ask": self.ask,
            "arm": self.arm,
            "model": self.model,
            "question": self.question,
            "passages": passages_as_list(self.passages),
            "dropped": passages_as_list(self.dropped),
            "text": self.text,
            "token_ids": list(done.token_ids) if done else None,
            "finish_reason": done.finish_reason if done else None,
            "stats": done.stats.as_dict() if done else None,
            "chunks": [asdict(chunk) for chunk in done.chunks] if done else [],
            "ttft_ms": self.ttft_ms,
            "first_text_ms": self.first_text_ms,
            "total_ms": self.total_ms,
            "warnings": list(self.warnings),
            "sampling": asdict(self.sampling),
            "blend": asdict(self.blend),
            "alone": self.alone,
            "stopped": self.stopped,
            "error": asdict(self.problem) if self.problem else None,
        }


@dataclass(frozen=True, slots=True)
class Check:
    """A prompt that was recomputed in full by blending (ratio 1), compared with a full prefill.

    Attributes:
        question: The question.
        equal: Whether both answers have the same tokens.
        first_difference: Index of the first token in which they differ; None where they are equal.
        tokens: Length of the shorter answer.
        recomputed: The answer with ratio 1.
        full: The answer of a full prefill.
    """

    question: str
    equal: bool
    first_difference: int | None
    tokens: int
    recomputed: Turn
    full: Turn

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "question": self.question,
            "equal": self.equal,
            "first_difference": self.first_difference,
            "tokens": self.tokens,
            "recomputed": self.recomputed.as_dict(),
            "full": self.full.as_dict(),
        }


@dataclass
class Uploaded:
    """An uploaded file and its state."""

    name: str
    state: Literal["waiting", "ingesting", "done", "failed"] = "waiting"
    detail: str = ""
    kv: tuple[int, int] = field(default=(0, 0))  # chunks with KV, and chunks in all as far as known


def speedup(blended: Turn | None, baseline: Turn | None) -> float | None:
    """How many times faster the blended answer started; None if the measurements do not show it.

    They do for two answers to one question with the same passages, of which the first reused KV, if nothing else
    was computed before their first tokens.
    """
    if blended is None or baseline is None or blended.ask != baseline.ask:
        return None
    if not (blended.alone and baseline.alone and blended.passages == baseline.passages):
        return None
    if blended.completion is None or not blended.completion.stats.blended or baseline.completion is None:
        return None
    mine, theirs = blended.completion.stats.ttft_ms, baseline.completion.stats.ttft_ms
    return theirs / mine if mine > 0 and theirs > 0 else None


def speedup_words(factor: float) -> str:
    """For example "first token 4.1x faster"."""
    return f"first token {factor:.1f}x faster" if factor >= 1 else f"first token {1 / factor:.1f}x slower"


def passages_as_list(hits: Iterable[Hit]) -> list[dict[str, Any]]:
    """Chunks for JSON."""
    return [
        {
            "chunk_id": hit.chunk_id,
            "source": source_name(hit),
            "part": hit.documents[0].ordinal + 1 if hit.documents else None,
            "score": hit.score,
            "tokens": hit.tokens,
            "text": hit.text,
        }
        for hit in hits
    ]


def source_name(hit: Hit) -> str:
    """Name of the chunk's file, without its folder."""
    return Path(hit.documents[0].source).name if hit.documents else f"chunk {hit.chunk_id}"


# -- the bar over a prompt: each part by how its KV was made, in the prompt's order
# -------------------------------------

Kind: TypeAlias = Literal["prefix", "reused", "recomputed", "computed", "cached"]
KINDS: tuple[Kind, ...] = ("prefix", "reused", "recomputed", "computed")
KIND_WORDS: dict[Kind, str] = {
    "prefix": "exact prefix",
    "reused": "reused",
    "recomputed": "recomputed",
    "computed": "computed",
    "cached": "reused, some of them recomputed",  # if a server does not report which
}


class Segment(NamedTuple):
    """Adjacent tokens of one kind; `passage` counts from 0, None for the text around the passages."""

    kind: Kind
    tokens: int
    passage: int | None


def totals(turn: Turn) -> dict[Kind, int]:
    """The counts over the whole prompt; empty where the engine gave none."""
    if turn.completion is None:
        return {}
    stats = turn.completion.stats
    return {
        "prefix": stats.prefix_tokens,
        "reused": stats.reused_tokens,
        "recomputed": stats.recomputed_tokens,
        "computed": stats.computed_tokens,
    }


def segments(turn: Turn) -> list[Segment]:
    """The bar's segments, in the prompt's order: passages, and the text before, between and after them.

    Inside a passage they are grouped by kind, as recomputed tokens are spread over it.
    """
    sums = totals(turn)
    chunks = turn.completion.chunks if turn.completion else ()
    if turn.completion is None or not chunks:
        return [Segment(kind, count, None) for kind, count in sums.items() if count]
    inner: list[list[Segment]] = []
    for index, chunk in enumerate(chunks):
        counts: dict[Kind, int] = {"prefix": chunk.prefix_tokens}
        if chunk.recomputed_tokens is None:
            counts["cached"] = chunk.reused_tokens
        else:
            counts |= {"reused": chunk.reused_tokens, "recomputed": chunk.recomputed_tokens}
        counts["computed"] = chunk.computed_tokens
        inner.append([Segment(kind, count, index) for kind, count in counts.items() if count])
    # Around the passages an exact prefix comes first, and all else is computed.
    exact = sums["prefix"] - sum(chunk.prefix_tokens for chunk in chunks)
    length = turn.completion.stats.prompt_tokens
    found: list[Segment] = []
    at = 0
    for (start, end), pieces in zip([*turn.spans, (length, length)], [*inner, []], strict=True):
        prefix = min(exact, start - at)
        exact -= prefix
        around: dict[Kind, int] = {"prefix": prefix, "computed": start - at - prefix}
        found += [Segment(kind, count, None) for kind, count in around.items() if count]
        found += pieces
        at = end
    return found


# -- which words of two answers differ ---------------------------------------------------------------------------------

_WORD = re.compile(r"\s*\S+|\s+")  # a word with the space before it


class Piece(NamedTuple):
    """A part of a text, and whether its words are not in the other text at this place."""

    text: str
    differs: bool


def compare_words(first: str, second: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, words compared without the space around them; joined, the pieces give the texts."""
    one, two = _WORD.findall(first), _WORD.findall(second)
    matcher = SequenceMatcher(None, [word.strip() for word in one], [word.strip() for word in two], autojunk=False)
    left: list[Piece] = []
    right: list[Piece] = []
    for kind, begin, end, other_begin, other_end in matcher.get_opcodes():
        _add_piece(left, one[begin:end], kind != "equal")
        _add_piece(right, two[other_begin:other_end], kind != "equal")
    return left, right


def differing_words(pieces: Sequence[Piece]) -> int:
    """How many words differ."""
    return sum(len(piece.text.split()) for piece in pieces if piece.differs)


def _add_piece(pieces: list[Piece], words: Sequence[str], differs: bool) -> None:
    text = "".join(words)
    space = text[: len(text) - len(text.lstrip())] if differs else ""
    if space:  # is no part of a word
        pieces.append(Piece(space, False))
    if text := text.removeprefix(space):
        pieces.append(Piece(text, differs))
