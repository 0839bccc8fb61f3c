"""The scheduler's state of one request."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmcache_rag.connector import metrics
from lmcache_rag.connector.metadata import BlendResult, Claim, Match, spans_of


class Lookup(Protocol):
    """A look-up in flight; see lmcache_rag.connector.lmcache_client.BlendLookup."""

    request_id: str
    result: tuple[int, tuple[Match, ...]] | None

    def poll(self, seconds: float) -> bool:
        """Whether the result is there, waiting for it at most that long."""
        ...

    def release_prefix(self, start: int, end: int) -> None:
        """Release read locks of exact prefix chunks."""
        ...

    def end_session(self) -> None:
        """Release everything that was not loaded."""
        ...


@dataclass
class RequestState:
    """State of one request, from its arrival to its end. The prompt is dropped when a worker has its plan."""

    policy: str
    ratio: float
    blend: bool
    tokens: array[int] = field(default_factory=lambda: array("q"))  # the prompt; empty when nothing is looked up
    lookup: Lookup | None = None
    started: bool = False  # vLLM's blocks were searched, and a look-up was started where that was not enough
    step: int = 0  # in which vLLM asked for it last
    asked_at: float = 0.0
    waiting_since: float = 0.0  # since when the request waits for nothing but its look-up
    lookup_ms: float = 0.0
    prefix: int = 0  # tokens that LMCache holds from the prompt's beginning on
    claim: Claim | None = None
    local: int = 0
    background: bool = False  # the claim is blended during other requests' steps
    planned: bool = False  # blocks were allocated: there is nothing more to decide
    loads: tuple[int, int] = (0, 0)  # exact prefix chunks that a worker loads, which releases their locks
    unused: tuple[int, int] = (0, 0)  # those whose locks are to be released here
    closed: bool = False  # nothing is claimed any more
    resident_only: bool = False  # nearly everything is resident in vLLM's pool: LMCache is not asked
    approximate_from: int | None = None  # first token whose KV is approximate
    blocks_hit: int = 0  # of the plan that a worker has
    spans: list[tuple[int, int]] | None = None  # the same as chunks; None: the answer does not hold them
    ingest: bool = False
    result: BlendResult | None = None
    failure: str = ""

    @property
    def found(self) -> tuple[int, tuple[Match, ...]]:
        """What the look-up found: (tokens of the exact prefix, matches)."""
        return (self.lookup.result if self.lookup else None) or (0, ())

    def on_plan_sent(self) -> None:
        """A worker has the plan: drop what only the plan needed, and keep what the statistics need."""
        if self.claim is not None:
            self.blocks_hit = len(self.claim.matches)
            self.spans = spans_of(self.claim.matches) if self.spans is not None else None
        self.tokens, self.claim = array("q"), None
        if not self.unused[1]:
            self.lookup = None

    def statistics(self, prompt: int) -> dict[str, Any]:
        """The reuse statistics, see metrics.reuse_statistics."""
        return metrics.reuse_statistics(
            prompt,
            self.policy,
            self.ratio,
            local=self.local,
            result=self.result,
            failure=self.failure,
            lookup_ms=self.lookup_ms,
            blocks_hit=self.blocks_hit,
            spans=self.spans,
        )


def has_embeddings(request: Any) -> bool:
    """Whether a prompt contains embeddings: token ids at their positions have no meaning."""
    return getattr(request, "prompt_embeds", None) is not None or request.prompt_token_ids is None


def can_hit(request: Any, chunk: int) -> bool:
    """Whether anything can be cached for a request of vLLM's, which is looked up by whole chunks of `chunk` tokens."""
    prompt = len(request.prompt_token_ids or ())
    if prompt <= chunk or getattr(request, "skip_reading_prefix_cache", False):
        return False
    if getattr(request, "mm_features", None) or has_embeddings(request):
        return False  # images and embeddings are no text
    return bool(request.num_tokens == prompt)  # a resumed request is not blended
