"""How much blended answers differ from those of a full prefill, and how much KV they reuse: for any engine."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_rag import protocol
from lmcache_rag.engines.base import BlendOptions, QueryPrompt, Sampling
from lmcache_rag.protocol import NEAR_TIE

if TYPE_CHECKING:
    from lmcache_rag.engines.embedded import EmbeddedEngine
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.prompt import PromptBuilder

FULL = BlendOptions(enabled=False)
AGAIN = "again, exact"
TOP = 20  # likeliest tokens recorded at each place: the most that vLLM gives by default


# Answers token by token


@dataclass(frozen=True)
class Trace:
    """A greedy answer.

    Attributes:
        tokens: Its token ids.
        likely: At each place, the log-probabilities of the likeliest tokens by id.
        stats: The four token counts, as the engine reports them; empty where it reports none.
    """

    tokens: tuple[int, ...]
    likely: tuple[dict[int, float], ...]
    stats: dict[str, Any] = field(default_factory=dict)


class TracedEngine(Protocol):
    """An engine that answers with log-probabilities."""

    prompts: PromptBuilder

    def keep(self, chunks: Sequence[str]) -> None:
        """Compute these chunks' KV."""
        ...

    def trace(self, prompt: QueryPrompt, blend: BlendOptions, tokens: int) -> Trace:
        """A greedy answer of `tokens` tokens, whether or not an end token is among them."""
        ...


class TracedServer:
    """A vLLM server.

    Args:
        engine: Its client.
        prompts: The builder of its prompts.
        named: Whether requests name the chunks' spans, so that the server copies what it still holds itself.
    """

    def __init__(self, engine: VLLMEngine, prompts: PromptBuilder, *, named: bool = True) -> None:
        self.engine, self.prompts, self._named = engine, prompts, named

    def keep(self, chunks: Sequence[str]) -> None:
        """Compute these chunks' KV."""
        for _ in self.engine.precompute([self.prompts.ingest(chunk) for chunk in chunks]):
            pass

    def trace(self, prompt: QueryPrompt, blend: BlendOptions, tokens: int) -> Trace:
        """A greedy answer. Without blending, nothing of the prompt but its prefix goes to LMCache."""
        request = self.engine.request(prompt, Sampling(max_tokens=tokens), blend)
        extra = request["extra_body"] | {"ignore_eos": True, "return_tokens_as_token_ids": True}
        if not self._named:
            extra["kv_transfer_params"].pop(protocol.CHUNKS, None)
        if not blend.enabled:
            extra["kv_transfer_params"] |= {protocol.MAX_OFFLOAD_TOKENS: prompt.prefix_tokens}
        answer = self.engine.complete(request | {"extra_body": extra, "logprobs": TOP})
        choice = answer.choices[0]
        likely = tuple(
            {int(name.removeprefix("token_id:")): value for name, value in place.items()}
            for place in choice.logprobs.top_logprobs
        )
        return Trace(tuple(choice.token_ids), likely, protocol.answer_statistics(answer) or {})


class TracedEmbeddedEngine:
    """The embedded engine.

    Args:
        engine: The engine.
        prompts: The builder of its prompts.
    """

    def __init__(self, engine: EmbeddedEngine, prompts: PromptBuilder) -> None:
        self.engine, self.prompts = engine, prompts

    def keep(self, chunks: Sequence[str]) -> None:
        """Compute these chunks' KV."""
        for _ in self.engine.precompute([self.prompts.ingest(chunk) for chunk in chunks]):
            pass

    def trace(self, prompt: QueryPrompt, blend: BlendOptions, tokens: int) -> Trace:
        """A greedy answer; the engine's statistics are not part of it."""
        state = self.engine.prefill(prompt, blend, room=tokens)
        logits = state.logits
        answer: list[int] = []
        likely: list[dict[int, float]] = []
        while True:
            best = logits.float().log_softmax(-1).topk(TOP)
            likely.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
            answer.append(int(best.indices[0]))
            if len(answer) == tokens:
                return Trace(tuple(answer), tuple(likely))
            logits = state.extend(answer[-1:])[-1]


# Comparison


@dataclass(frozen=True)
class Query:
    """A question over some of the chunks, in an order."""

    chunks: tuple[str, ...]
    question: str


@dataclass(frozen=True)
class Difference:
    """One blended answer compared with the full prefill's.

    Attributes:
        place: Index of the first token that differs; None: all are equal.
        gap: How much likelier, in nats, the full prefill's own token was there; None where the other one was not among
            its likeliest.
        kl: KL divergence of the first token over the full prefill's likeliest, in nats.
        cover: Share of the chunks' whole blocks that were taken from the cache; None without statistics.
    """

    place: int | None
    gap: float | None
    kl: float
    cover: float | None

    @property
    def near_tie(self) -> bool:
        """Whether rounding alone can explain it."""
        return (
            self.place is not None and self.gap is not None and abs(self.gap) <= NEAR_TIE + 1e-4
        )  # a log-softmax's own


@dataclass(frozen=True)
class Exactness:
    """One arm over all prompts."""

    arm: str
    tokens: int
    differences: tuple[Difference, ...] = field(repr=False)

    @property
    def equal(self) -> int:
        """Prompts whose answers are equal to the last token."""
        return sum(each.place is None for each in self.differences)

    @property
    def unexplained(self) -> int:
        """Prompts whose answers differ, and not at a near tie."""
        return sum(each.place is not None and not each.near_tie for each in self.differences)

    @property
    def kl(self) -> float:
        """Mean KL of the first token, in nats."""
        return statistics.fmean(each.kl for each in self.differences)

    @property
    def kl_interval(self) -> tuple[float, float]:
        """95% bootstrap interval of that mean."""
        return bootstrap([each.kl for each in self.differences])

    @property
    def least_cover(self) -> float | None:
        """The smallest share of whole blocks that came from the cache."""
        known = [each.cover for each in self.differences if each.cover is not None]
        return min(known) if known else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        summary = {"equal": self.equal, "unexplained": self.unexplained, "kl": self.kl}
        return {**asdict(self), **summary, "kl_interval": self.kl_interval, "least_cover": self.least_cover}


def questions(chunks: Sequence[str], count: int, *, least: int = 4, most: int = 8, seed: int = 0) -> list[Query]:
    """Questions over random chunks in random order: each asks to continue one of them and to explain another."""
    rng = random.Random(seed)  # noqa: S311 - a workload, not a secret
    queries = []
    for _ in range(count):
        own = rng.sample(list(chunks), min(len(chunks), rng.randint(least, most)))
        first, second = (" ".join(text.split()[:8]) for text in (own[0], own[-1]))
        queries.append(Query(tuple(own), f'One passage begins "{first}". Continue it, then explain: "{second}".'))
    return queries


def permutations(chunks: Sequence[str], count: int, *, seed: int = 0) -> list[Query]:
    """The same chunks in `count` random orders."""
    rng = random.Random(f"{seed}:orders")  # noqa: S311
    return [Query(tuple(rng.sample(list(chunks), len(chunks))), "What do these passages say?") for _ in range(count)]


def compare(
    source: TracedEngine,
    queries: Sequence[Query],
    arms: dict[str, BlendOptions],
    *,
    tokens: int = 64,
    again: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> list[Exactness]:
    """Send every query once in each arm, and then without reuse.

    In this order: a server keeps the exact KV of a prompt that was computed in full, and would reuse that.

    Args:
        source: The engine; it must have the chunks' KV.
        queries: The questions.
        arms: Ways to reuse KV, by name.
        tokens: Length of the answers.
        again: Ask without reuse a second time, as the last arm: a server reuses the prompt's exact KV, so what
            differs there is its own rounding.
        on_step: Called after each question.
    """
    found: dict[str, list[Difference]] = {name: [] for name in (*arms, *([AGAIN] if again else []))}
    for each in queries:
        prompt = source.prompts.query(each.chunks, each.question)
        traces = {name: source.trace(prompt, blend, tokens) for name, blend in arms.items()}
        full = source.trace(prompt, FULL, tokens)
        if again:
            traces[AGAIN] = source.trace(prompt, FULL, tokens)
        for name, got in traces.items():
            found[name].append(difference(full, got, cover(prompt, got.stats, source.prompts.info.kv_block)))
        on_step()
    return [Exactness(name, tokens, tuple(each)) for name, each in found.items()]


def difference(full: Trace, got: Trace, covered: float | None = None) -> Difference:
    """Compare one answer with the full prefill's."""
    place = next((i for i, (a, b) in enumerate(zip(full.tokens, got.tokens, strict=True)) if a != b), None)
    gap = None
    if place is not None and got.tokens[place] in full.likely[place]:
        gap = full.likely[place][full.tokens[place]] - full.likely[place][got.tokens[place]]
    return Difference(place, gap, divergence(full.likely[0], got.likely[0]), covered)


def divergence(full: dict[int, float], got: dict[int, float]) -> float:
    """KL(full, got) over full's likeliest tokens, everything else as one, in nats.

    A token that got does not list counts as likely as the least that it lists, so the value is a lower bound there.
    """
    floor = min(got.values())
    pairs = [(math.exp(value), got.get(token, floor)) for token, value in full.items()]
    inside = sum(p * (math.log(p) - q) for p, q in pairs if p > 0)
    rest_p = max(1e-9, 1 - sum(p for p, _ in pairs))
    rest_q = max(1e-9, 1 - sum(math.exp(q) for _, q in pairs))
    return max(0.0, inside + rest_p * math.log(rest_p / rest_q))


def cover(prompt: QueryPrompt, stats: dict[str, Any], kv_block: int) -> float | None:
    """Share of the chunks' whole blocks that the server took from its cache; None if it sends no statistics."""
    if "reused_tokens" not in stats:
        return None
    whole = sum((chunk.end - chunk.start) // kv_block * kv_block for chunk in prompt.chunks)
    exact = max(0, int(stats["prefix_tokens"]) - prompt.prefix_tokens)
    return (exact + int(stats["reused_tokens"]) + int(stats["recomputed_tokens"])) / whole if whole else None


def bootstrap(values: Sequence[float], *, draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean."""
    rng = random.Random(0)  # noqa: S311
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]
