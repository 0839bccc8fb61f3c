"""What was asked and answered, as the page shows it and as the export has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lmcache_rag.errors import LMCacheRAGError

if TYPE_CHECKING:
    from lmcache_rag.engines.base import BlendOptions, Completion, Sampling
    from lmcache_rag.store import Hit

ArmName: TypeAlias = Literal["blended", "baseline"]
ARMS: tuple[ArmName, ArmName] = ("blended", "baseline")
FORMAT = 1  # of the export


@dataclass(frozen=True, slots=True)
class Problem:
    """An error for people: what happened, and what to do about it."""

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
        arm: Which arm.
        model: The engine's model.
        question: The question.
        passages: The chunks in the prompt, in their order.
        dropped: Chunks that did not fit the context.
        text: The answer, or what came of it.
        sampling: How tokens were chosen.
        blend: How KV was to be reused.
        spans: Where each of the passages stands in the prompt, as (start, end) in tokens.
        alone: Whether nothing else was computed on the engine from the sending to the first token.
        first_text_ms: From the sending to the first text; None where none came.
        total_ms: From the sending to the end.
        completion: What the engine gave at the end; None where it did not come to that.
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
        """From the sending to the first token: by the engine, or to the first text where the answer has no end."""
        return self.completion.stats.ttft_ms if self.completion else self.first_text_ms

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the answer."""
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
    """A file that was uploaded: what became of it."""

    name: str
    state: Literal["waiting", "ingesting", "done", "failed"] = "waiting"
    detail: str = ""
    kv: tuple[int, int] = field(default=(0, 0))  # chunks with KV, and chunks in all as far as known


def speedup(blended: Turn | None, baseline: Turn | None) -> float | None:
    """How many times faster the blended answer started, by what was measured; None where that cannot be said.

    It can be said of two answers to one question with the same passages, of which the first reused KV, if nothing else
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


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Index of the first place in which two answers differ, or None."""
    from lmcache_rag.rag import first_difference as found

    return found(first, second)
