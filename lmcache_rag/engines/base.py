"""The interface of an engine, which computes chunk KV once and answers prompts from it.

All data between the prompt, the engine and the caller are frozen dataclasses from this module.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from lmcache_rag.budget import AUTO, Budget, Ratio, parse_budget
from lmcache_rag.errors import ConfigError
from lmcache_rag.passage_order import Order, OrderMode, order_of

KV_FORMAT = 1  # raise when the meaning or layout of stored KV changes: old KV is then never read


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves. model, revision, dtype, tokenizer and kv_block decide whether KV fits another engine.

    Attributes:
        engine: "embedded" or "vllm".
        model: Name or folder of the model.
        revision: Distinguishes weights of one name (commit, or a digest of the files).
        dtype: Element type of the KV, for example "float32".
        tokenizer: Digest of the tokenizer.
        kv_block: Unit of KV reuse in tokens; the shared prefix is padded to a multiple of it.
        context_length: Most tokens of prompt and answer together.
        kv_bytes_per_token: Size of one token's KV over all layers, in bytes.
        can_blend: Whether chunk KV can be reused at all.
        why_not: The reason when it cannot.
        falls_back: What an engine that cannot blend does with a request to blend: if True, it answers by full prefills,
            and the caller logs that once; if False, it raises UnsupportedModelError.
        said_why: Whether the engine has logged that it does not blend, so that its caller need not.
        caches_prefixes: Whether it keeps KV of whole prompts, so that one that begins as an earlier one reuses it.
        recurrent: Whether the model has recurrent layers, so that no engine can blend it.
    """

    engine: str
    model: str
    revision: str
    dtype: str
    tokenizer: str
    kv_block: int
    context_length: int
    kv_bytes_per_token: int
    can_blend: bool = True
    why_not: str = ""
    falls_back: bool = True
    said_why: bool = False
    caches_prefixes: bool = False
    recurrent: bool = False

    def fingerprint(self, prefix_ids: Sequence[int], tenant: str = "", neutral_ids: Sequence[int] = ()) -> str:
        """A hash of everything that a chunk's KV depends on besides the chunk, as 64 hex digits.

        Args:
            prefix_ids: The prefix.
            tenant: Name of the tenant.
            neutral_ids: The neutral passages that stand between the prefix and a chunk while its KV is computed.
        """
        facts = {
            "format": KV_FORMAT,
            "model": self.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer,
            "kv_block": self.kv_block,
            "prefix": list(prefix_ids),
            "tenant": tenant,
            **({"neutral": list(neutral_ids)} if neutral_ids else {}),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def kv_key(fingerprint: str, chunk_ids: Sequence[int]) -> str:
    """Name of one chunk's KV, as 64 hex digits: (fingerprint, token ids), never a document."""
    return hashlib.sha256(f"{fingerprint}:{','.join(map(str, chunk_ids))}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """Where a chunk is in a prompt: token_ids[start:end], with the name of its KV."""

    start: int
    end: int
    key: str


@dataclass(frozen=True, slots=True)
class IngestPrompt:
    """prefix ⧺ neutral passages ⧺ chunk: the prompt whose chunk part is stored as KV.

    Attributes:
        token_ids: Its token ids.
        prefix_tokens: Tokens of the prefix.
        key: Name of the chunk's KV.
        fingerprint: Of all that the KV depends on besides the chunk.
        neutral_tokens: Tokens of the neutral passages, see lmcache_rag.neutral.
        tenant: Whose KV it is; "": that of all who use the engine.
        shared_tokens: When its KV is removed: first tokens of the chunk with which other chunks begin, too. A server
            stores KV in blocks by all tokens up to there, so theirs is the same.
    """

    token_ids: tuple[int, ...]
    prefix_tokens: int
    key: str
    fingerprint: str
    neutral_tokens: int = 0
    tenant: str = ""
    shared_tokens: int = 0

    @property
    def chunk_start(self) -> int:
        """Where the chunk begins."""
        return self.prefix_tokens + self.neutral_tokens

    @property
    def chunk_ids(self) -> tuple[int, ...]:
        """The chunk's own tokens."""
        return self.token_ids[self.chunk_start :]


@dataclass(frozen=True, slots=True)
class QueryPrompt:
    """prefix ⧺ chunk₁ ⧺ sep₂ ⧺ chunk₂ ⧺ … ⧺ chunkₙ ⧺ suffix.

    Attributes:
        token_ids: Its token ids.
        prefix_tokens: Tokens of the prefix.
        chunks: Where the chunks are, in order.
        suffix_start: Where the suffix begins.
        fingerprint: Of all that a chunk's KV depends on besides the chunk.
        neutral_tokens: Tokens of the neutral passages after which the chunks' KV was computed; they are not in here.
        tenant: Whose KV it is; "": that of all who use the engine.
        order: In which order the chunks are, see lmcache_rag.passage_order.
    """

    token_ids: tuple[int, ...]
    prefix_tokens: int
    chunks: tuple[ChunkSpan, ...]
    suffix_start: int
    fingerprint: str
    neutral_tokens: int = 0
    tenant: str = ""
    order: Order = "retrieved"

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def computed_at(self) -> int:
        """Where a chunk began when its KV was computed."""
        return self.prefix_tokens + self.neutral_tokens


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_tokens must be at least 1": self.max_tokens >= 1,
            "temperature must not be negative": self.temperature >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "top_k must not be negative": self.top_k >= 0,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
        }
        for message, holds in checks.items():
            if not holds:
                raise ConfigError(f"{message}; got {self}.")


@dataclass(frozen=True, slots=True)
class BlendOptions:
    """How one request reuses KV.

    Attributes:
        policy: Name of a recompute policy, see lmcache_rag.policies.
        ratio: How many cached tokens to recompute: "auto" chooses that for each request, a number in [0, 1] is a share
            of them, {"tokens": N} are N tokens.
        enabled: False computes the whole prompt (a full prefill).
        always: Blend even where the engine predicts that computing the prompt starts the answer as early.
        order: The order of the passages in the prompt: "retrieved", "stable", or "auto", which is stable for models
            with recurrent layers on an engine that keeps KV of prompts that begin alike; see lmcache_rag.passage_order.
    """

    policy: str = "query"
    ratio: Ratio = AUTO
    enabled: bool = True
    always: bool = False
    order: OrderMode = "auto"

    def __post_init__(self) -> None:
        parse_budget(self.ratio)
        order_of(self.order)

    @property
    def budget(self) -> Budget:
        """The ratio as a budget."""
        return parse_budget(self.ratio)


@dataclass(frozen=True, slots=True)
class ReuseStats:
    """What the engine reused and computed for one request; the four token counts add up to prompt_tokens.

    Attributes:
        prompt_tokens: Length of the prompt.
        prefix_tokens: Taken from an exact prefix hit.
        reused_tokens: Taken from cached chunks as they are.
        recomputed_tokens: In cached chunks, selected and computed again.
        computed_tokens: Never cached: separators, missed chunks, suffix.
        chunks_hit: Chunks whose KV was found.
        chunks_missed: Chunks whose KV was not found.
        lookup_ms: Time to find the KV, in milliseconds.
        load_ms: Time to load and place it.
        blend_ms: Time of selection and recomputation.
        ttft_ms: From the call to the first token.
        budget_tokens: How many tokens of cached chunks were chosen for recomputation.
        budget_reason: Why so many, a lmcache_rag.budget.BudgetReason; "" where nothing was blended, or where the
            server does not report it.
        decision: Why the prompt was blended or computed, see lmcache_rag.protocol.Decision; "": nothing was decided.
        predicted_blend_ms: Time to the first token that was predicted for the blend; 0: unknown.
        predicted_compute_ms: The same for computing the prompt.
        order: The order of the passages: "retrieved", or "stable", so that prompts begin alike.
    """

    prompt_tokens: int
    prefix_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    computed_tokens: int = 0
    chunks_hit: int = 0
    chunks_missed: int = 0
    lookup_ms: float = 0.0
    load_ms: float = 0.0
    blend_ms: float = 0.0
    ttft_ms: float = 0.0
    budget_tokens: int = 0
    budget_reason: str = ""
    decision: str = ""
    predicted_blend_ms: float = 0.0
    predicted_compute_ms: float = 0.0
    order: Order = "retrieved"

    def __post_init__(self) -> None:
        parts = (self.prefix_tokens, self.reused_tokens, self.recomputed_tokens, self.computed_tokens)
        if min(parts) < 0 or sum(parts) != self.prompt_tokens:
            raise ValueError(f"the reuse counts {parts} do not add up to {self.prompt_tokens} prompt tokens")

    @property
    def blended(self) -> bool:
        """Whether any cached chunk KV was used as it was."""
        return self.reused_tokens > 0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and codes, for JSON."""
        return {**asdict(self), "blended": self.blended}


@dataclass(frozen=True, slots=True)
class ChunkReuse:
    """What was reused and computed of one chunk of a prompt; the four counts add up to its tokens.

    Attributes:
        prefix_tokens: Taken from an exact prefix hit.
        reused_tokens: Taken from cached KV as they are; with those selected, where `recomputed_tokens` is None.
        recomputed_tokens: In cached KV, selected and computed again; None where the engine reports no number per chunk.
        computed_tokens: Never cached.
    """

    prefix_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int | None = 0
    computed_tokens: int = 0


FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer, as it is streamed."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer.

    Attributes:
        text: The answer.
        token_ids: Its tokens, with the end-of-sequence token when the model gave one.
        finish_reason: Why it ended.
        stats: The reuse statistics.
        warnings: What the user should know.
        missed: The prompt's chunks that were looked up, could have been stored, and were not found.
        chunks: Reuse of each of the prompt's chunks; empty if the engine does not report it.
        used_before: The prompt's chunks that a server has seen in earlier prompts, whoever sent these; where it counts.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: ReuseStats
    warnings: tuple[str, ...] = ()
    missed: tuple[int, ...] = ()
    chunks: tuple[ChunkReuse, ...] = ()
    used_before: tuple[int, ...] = ()


StreamEvent: TypeAlias = TextDelta | Completion
VerifyStatus: TypeAlias = Literal["ok", "missing", "damaged", "differs"]


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """Outcome of computing one chunk's KV again; max_abs_diff is None when there was nothing to compare."""

    key: str
    status: VerifyStatus
    max_abs_diff: float | None = None


@dataclass(frozen=True, slots=True)
class PrecomputeResult:
    """One chunk whose KV now exists. computed is False when it existed already; nbytes is its size."""

    key: str
    tokens: int
    nbytes: int
    computed: bool


@dataclass(frozen=True, slots=True)
class ForgetResult:
    """Whether one chunk's KV was removed from a server.

    Attributes:
        key: Name of the KV.
        forgotten: Whether the server says that it was removed.
        why: Why it was not.
        before: Objects of it by tier before the removal, if they were counted.
        left: The same, counted after it.
    """

    key: str
    forgotten: bool
    why: str = ""
    before: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KVUsage:
    """How much KV an engine holds; zero where it cannot know."""

    chunks: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0
    details: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Engine(Protocol):
    """Computes, keeps and blends chunk KV. Implementations are safe to call from several threads.

    stream() yields TextDelta events and ends with one Completion. A query whose KV is missing or damaged is answered
    by computing it, which its statistics show: no state of the KV store makes a query fail.
    """

    @property
    def info(self) -> EngineInfo:
        """What this engine serves."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer that prompts for this engine are built with."""
        ...

    def precompute(
        self, prompts: Iterable[IngestPrompt], *, stop: threading.Event | None = None
    ) -> Iterator[PrecomputeResult]:
        """Compute and store each chunk's KV, skipping existing KV; yields each chunk as soon as it is stored.

        Args:
            prompts: The chunks.
            stop: Once it is set, failed chunks are not retried.

        Raises:
            PrecomputeError: A chunk's KV could not be computed or stored. KV of chunks yielded before is stored.
        """
        ...

    def missing(self, prompts: Sequence[IngestPrompt]) -> list[bool]:
        """For each prompt, whether its KV is missing (True), as far as this engine knows."""
        ...

    def forget(self, prompts_or_keys: Iterable[tuple[str, str]]) -> None:
        """Drop the KV of (fingerprint, key) pairs; unknown pairs are ignored."""
        ...

    def verify(self, prompt: IngestPrompt) -> VerifyResult:
        """Compute one chunk's KV again and compare it with the stored KV. Changes nothing."""
        ...

    def usage(self) -> KVUsage:
        """How much KV is held."""
        ...

    def generate(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Completion:
        """Answer one prompt."""
        ...

    def stream(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Iterator[StreamEvent]:
        """Answer one prompt piece by piece. Closing the iterator stops the computation."""
        ...

    async def agenerate(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Completion:
        """Async version of generate."""
        ...

    def astream(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> AsyncIterator[StreamEvent]:
        """Async version of stream."""
        ...

    def close(self) -> None:
        """Release what the engine holds. Safe to call twice."""
        ...


@runtime_checkable
class PinsChunks(Protocol):
    """An engine whose KV may be evicted elsewhere, unless it is pinned there."""

    def pin_chunk(self, prompt: IngestPrompt, *, pin: bool = True) -> None:
        """Keep a chunk's KV from being evicted from memory, or end that. It may be computed later.

        Raises:
            PinRefusedError: Pins have no room for it, or the server cannot pin.
            EngineUnavailableError: It cannot be reached, or cannot reach its KV store.
            EngineError: It rejects the request.
        """
        ...


@runtime_checkable
class ForgetsChunks(Protocol):
    """An engine whose KV is stored elsewhere, by the chunks' tokens and not by key. Others forget by Engine.forget."""

    def forget_chunks(self, prompts: Iterable[IngestPrompt], *, count: bool = False) -> Iterator[ForgetResult]:
        """Delete each chunk's KV where it is stored; yields in the order of the prompts.

        Args:
            prompts: The chunks. Their `shared_tokens` stay.
            count: Count what each tier holds, before and after.

        Raises:
            EngineUnavailableError: It cannot be reached, or cannot reach its KV store.
            EngineError: It rejects the request.
        """
        ...
