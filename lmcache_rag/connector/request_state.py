"""What the scheduler side knows of one request, and what it says of it when the request ends."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.connector.abandoned import Lookup
from lmcache_rag.connector.metadata import BlendResult, Claim, spans_of
from lmcache_rag.protocol import CAN_BLEND, FAILURE, REASON, Unsupported


@dataclass
class RequestState:
    """One request, from its arrival to its end. Of its prompt nothing is kept after a worker has its plan."""

    policy: str
    ratio: float
    blend: bool
    tokens: array[int] = field(default_factory=lambda: array("q"))  # the prompt; empty when nothing is looked up
    lookup: Lookup | None = None
    begun: bool = False  # it was seen what vLLM holds, and LMCache was asked where that was not enough
    step: int = 0  # in which vLLM asked for it last
    asked: float = 0.0
    awaited: float = 0.0  # since when the request waits for nothing but its look-up
    lookup_ms: float = 0.0
    prefix: int = 0  # tokens that LMCache holds from the prompt's beginning on
    claim: Claim | None = None
    local: int = 0
    background: bool = False  # the claim is blended beside other requests' steps
    planned: bool = False  # blocks were allocated: there is nothing more to decide
    loads: tuple[int, int] = (0, 0)  # exact prefix chunks that a worker loads, and that gives back their locks
    locked: tuple[int, int] = (0, 0)  # those whose locks are to be given back here
    over: bool = False  # nothing is claimed any more
    hot_only: bool = False  # vLLM holds nearly everything itself: LMCache is not asked
    approximate_from: int | None = None  # first token whose KV is approximate
    blocks_hit: int = 0  # of the plan that a worker has
    spans: list[tuple[int, int]] | None = None  # the same as chunks; None: the answer is not to say it
    ingest: bool = False
    result: BlendResult | None = None
    failure: str = ""

    def handed_over(self) -> None:
        """A worker has the plan: of what it was made from, the statistics need little."""
        if self.claim is not None:
            self.blocks_hit = len(self.claim.matches)
            self.spans = spans_of(self.claim.matches) if self.spans is not None else None
        self.tokens, self.claim = array("q"), None
        if not self.locked[1]:
            self.lookup = None


def is_embedded(request: Any) -> bool:
    """Whether embeddings are part of a prompt: in the places of its tokens are numbers of no meaning."""
    return getattr(request, "prompt_embeds", None) is not None or request.prompt_token_ids is None


def may_hit(request: Any, chunk: int) -> bool:
    """Whether anything can be cached for a request of vLLM's, which is looked up by whole chunks of so many tokens."""
    prompt = len(request.prompt_token_ids or ())
    if prompt <= chunk or getattr(request, "skip_reading_prefix_cache", False):
        return False
    if getattr(request, "mm_features", None) or is_embedded(request):
        return False  # pictures and embeddings are no text
    return bool(request.num_tokens == prompt)  # a resumed request is not blended


def statistics(prompt: int, state: RequestState) -> dict[str, Any]:
    """The reuse statistics of a request as plain numbers; the four token counts add up to its prompt's length."""
    result = state.result
    if result is not None:
        prefix, reused, recomputed = result.prefix_tokens, result.reused_tokens, result.recomputed_tokens
        failure = result.failure or state.failure
    else:  # no plan reached a worker: vLLM's own prefix is all there was
        prefix, reused, recomputed = min(state.local, prompt), 0, 0
        failure = state.failure
    placed = result is not None and not result.failure
    spans = {} if state.spans is None else {"spans": [list(span) for span in state.spans] if placed else []}
    return {
        "prompt_tokens": prompt,
        "prefix_tokens": prefix,
        "reused_tokens": reused,
        "recomputed_tokens": recomputed,
        "computed_tokens": prompt - prefix - reused - recomputed,
        "blocks_hit": state.blocks_hit if placed else 0,
        **spans,
        "hot_tokens": result.hot_tokens if result else 0,
        "lookup_ms": round(state.lookup_ms, 3),
        "load_ms": round(result.load_ms, 3) if result else 0.0,
        "blend_ms": round(result.blend_ms, 3) if result else 0.0,
        "blended": reused > 0,
        "policy": state.policy,
        "ratio": state.ratio,
        FAILURE: str(failure),
    }


def unblended(
    prompt: int, cached: int, policy: str, ratio: float, why_not: Unsupported, *, spans: bool = False
) -> dict[str, Any]:
    """The same of a request to a server that cannot blend at all; `can_blend` and `reason` are there in these only.

    Args:
        prompt: Tokens of the prompt.
        cached: How many of them vLLM or LMCache held.
        policy: The server's default.
        ratio: The server's default.
        why_not: Why it cannot.
        spans: Whether the request asked for `spans`.
    """
    held = max(min(cached, prompt - 1), 0)  # the last token is always computed
    state = RequestState(policy, ratio, blend=False, local=held, failure=why_not.detail, spans=[] if spans else None)
    return {**statistics(prompt, state), CAN_BLEND: False, REASON: str(why_not.code)}
