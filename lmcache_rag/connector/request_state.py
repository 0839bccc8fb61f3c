"""What the scheduler side knows of one request, and what it says of it when the request ends."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.connector.abandoned import Lookup
from lmcache_rag.connector.plan import BlendResult, Claim, spans_of
from lmcache_rag.protocol import CAN_BLEND, FAILURE


@dataclass
class RequestState:
    """One request, from its first look-up to its end."""

    policy: str
    ratio: float
    blend: bool
    tokens: array[int] = field(default_factory=lambda: array("q"))  # the prompt; empty when nothing is looked up
    lookup: Lookup | None = None
    asked: float = 0.0
    awaited: float = 0.0  # since when the request waits for nothing but its look-up
    lookup_ms: float = 0.0
    claim: Claim | None = None
    local: int = 0
    background: bool = False  # the claim is blended beside other requests' steps
    planned: bool = False  # blocks were allocated: there is nothing more to decide
    loads: tuple[int, int] = (0, 0)  # exact prefix chunks that a worker loads, and that gives back their locks
    over: bool = False  # nothing is claimed any more
    hot_only: bool = False  # vLLM holds nearly everything itself: LMCache is not asked
    approximate_from: int | None = None  # first token whose KV is approximate
    result: BlendResult | None = None
    failure: str = ""


def may_hit(request: Any, chunk: int) -> bool:
    """Whether anything can be cached for a request of vLLM's, which is looked up by whole chunks of so many tokens."""
    prompt = len(request.prompt_token_ids or ())
    if prompt <= chunk or getattr(request, "skip_reading_prefix_cache", False):
        return False
    if getattr(request, "mm_features", None) or getattr(request, "prompt_embeds", None) is not None:
        return False  # pictures and embeddings are no text, and have numbers of no meaning in its place
    return bool(request.num_tokens == prompt)  # a resumed request is not blended


def statistics(prompt: int, state: RequestState) -> dict[str, Any]:
    """The reuse statistics of a request as plain numbers; the four token counts add up to its prompt's length."""
    result = state.result
    if result is not None:
        prefix, reused, recomputed = result.prefix_tokens, result.reused_tokens, result.recomputed_tokens
        failure = result.failure
    else:  # no plan reached a worker: vLLM's own prefix is all there was
        prefix, reused, recomputed = min(state.local, prompt), 0, 0
        failure = state.failure
    placed = state.claim.matches if state.claim and result and not result.failure else ()
    return {
        "prompt_tokens": prompt,
        "prefix_tokens": prefix,
        "reused_tokens": reused,
        "recomputed_tokens": recomputed,
        "computed_tokens": prompt - prefix - reused - recomputed,
        "blocks_hit": len(placed),
        "spans": [list(span) for span in spans_of(placed)],
        "hot_tokens": result.hot_tokens if result else 0,
        "lookup_ms": round(state.lookup_ms, 3),
        "load_ms": round(result.load_ms, 3) if result else 0.0,
        "blend_ms": round(result.blend_ms, 3) if result else 0.0,
        "blended": reused > 0,
        "policy": state.policy,
        "ratio": state.ratio,
        FAILURE: str(failure),
    }


def unblended(prompt: int, cached: int, policy: str, ratio: float, why_not: str) -> dict[str, Any]:
    """The same of a request to a server that cannot blend at all; `can_blend` is there, and false, in these only.

    Args:
        prompt: Tokens of the prompt.
        cached: How many of them vLLM or LMCache held.
        policy: The server's default.
        ratio: The server's default.
        why_not: Why it cannot.
    """
    held = max(min(cached, prompt - 1), 0)  # the last token is always computed
    state = RequestState(policy, ratio, blend=False, local=held, failure=why_not)
    return {**statistics(prompt, state), CAN_BLEND: False}
