"""Requests to a vLLM server's completions API, and the parts of its answers as a Completion.

The sentence of a reason code comes from lmcache_rag.protocol (`fallback_sentence`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag import protocol
from lmcache_rag.engines.base import (
    BlendOptions,
    ChunkReuse,
    ChunkSpan,
    Completion,
    FinishReason,
    IngestPrompt,
    QueryPrompt,
    ReuseStats,
    Sampling,
)
from lmcache_rag.engines.vllm_client import KVNotStoredError
from lmcache_rag.errors import PinRefusedError


def blend_params(blend: BlendOptions, prompt: QueryPrompt | None = None) -> dict[str, Any]:
    """How a request reuses KV, as our connector reads it; see lmcache_rag.protocol.

    The chunks' spans are sent, so that the server can copy chunks that are still in its own cache. The request asks it
    to report which spans it reused, which reveals the missing chunks; see chunks_found.
    """
    if not blend.enabled:
        return dict(protocol.NO_BLEND)
    switch = "always" if blend.always else "on"
    params = {protocol.BLEND: switch, protocol.POLICY: blend.policy, protocol.RATIO: blend.budget.wire}
    spans = [[chunk.start, chunk.end] for chunk in prompt.chunks] if prompt else []
    return params | ({protocol.CHUNKS: spans, protocol.SPANS: True} if spans else {})


def request(
    model: str, token_ids: tuple[int, ...], sampling: Sampling, params: Mapping[str, Any], *, room: int, salt: str = ""
) -> dict[str, Any]:
    """Arguments of completions.create.

    Every sampling parameter is set: vLLM would take missing ones from the model's generation_config.json.

    Args:
        model: Name by which the server knows the model.
        token_ids: The prompt.
        sampling: How tokens are chosen.
        params: kv_transfer_params.
        room: Most tokens that the context has room for.
        salt: KV of different salts is never shared.
    """
    extra: dict[str, Any] = {
        "top_k": sampling.top_k,
        "repetition_penalty": sampling.repetition_penalty,
        "return_token_ids": True,
        "kv_transfer_params": dict(params),
    }
    if salt:
        extra["cache_salt"] = salt
    arguments: dict[str, Any] = {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": max(1, min(sampling.max_tokens, room)),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "extra_body": extra,
    }
    if sampling.stop:
        arguments["stop"] = list(sampling.stop)
    if sampling.seed is not None:
        arguments["seed"] = sampling.seed
    return arguments


@dataclass
class Gathered:
    """Collects an answer: from the chunks of a stream, or from one whole response."""

    begin: float = field(default_factory=time.perf_counter)
    first: float | None = None
    text: str = ""
    ids: list[int] = field(default_factory=list)
    reason: str | None = None
    stats: dict[str, Any] | None = None
    cached: int | None = None

    @property
    def unsupported_reason(self) -> str:
        """Why the server cannot blend any request, as it reports; "" where it can or reports nothing."""
        return str(protocol.cannot_blend(self.stats) or "")

    def take(self, part: Any) -> str:
        """Take a part of a completion or of a chat completion, its first choice; returns its text."""
        if (stats := protocol.answer_statistics(part)) is not None:
            self.stats = stats
        details = getattr(getattr(part, "usage", None), "prompt_tokens_details", None)
        if (cached := getattr(details, "cached_tokens", None)) is not None:
            self.cached = int(cached)
        if not (choices := getattr(part, "choices", None)):
            return ""
        choice = choices[0]
        message = getattr(choice, "delta", None) or getattr(choice, "message", None)  # a chat's
        text = (choice.text if message is None else getattr(message, "content", None)) or ""
        ids = getattr(choice, "token_ids", None) or ()
        if self.first is None and (text or ids):
            self.first = time.perf_counter()
        self.text += text
        self.ids += ids
        self.reason = choice.finish_reason or self.reason
        return text

    @property
    def ttft_ms(self) -> float:
        """From the request to the first token, in milliseconds."""
        return ((self.first or time.perf_counter()) - self.begin) * 1e3

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ended."""
        return "stop" if self.reason == "stop" else "length" if self.reason == "length" else "cancelled"


def already_held(gathered: Gathered, prompt: IngestPrompt, *, kv_block: int, vllm_block: int) -> bool:
    """Whether the server had all KV of this prompt that it can store, and so computed only the last tokens.

    Args:
        gathered: The answer.
        prompt: The prompt that was sent.
        kv_block: Tokens of an LMCache chunk.
        vllm_block: Tokens of a block of vLLM's own prefix cache.
    """
    length = len(prompt.token_ids)
    # One token at least is always computed, and vLLM's own cache then gives whole blocks only.
    keeps = min(length // kv_block * kv_block, (length - 1) // vllm_block * vllm_block)
    reported = gathered.stats or {}
    return keeps > prompt.chunk_start and int(reported.get("prefix_tokens", gathered.cached or 0)) >= keeps


def completion(
    gathered: Gathered, prompt: QueryPrompt, *, kv_block: int, blending: bool, streamed: bool, ids: tuple[int, ...]
) -> Completion:
    """The finished answer with its statistics; what the server did not report counts as computed.

    Args:
        gathered: The answer.
        prompt: The prompt that was sent.
        kv_block: Tokens of the unit of KV reuse.
        blending: Whether the server may have blended this request.
        streamed: Whether the answer came as a stream.
        ids: The answer's tokens.
    """
    warnings: list[str] = []
    missing: tuple[int, ...] = ()
    reported = gathered.stats
    counts = _counts(reported, len(prompt)) if reported is not None else None
    if counts is not None and reported is not None:
        # Where nothing can be blended no chunk is missed, and the reason is logged once, not with each answer. Nor is
        # one where computing was as fast: the server may not even have looked them up.
        computed = counts["decision"] in protocol.COMPUTED
        found = None if gathered.unsupported_reason or computed else chunks_found(prompt, reported, kv_block)
        hit, missed = (found.count(True), found.count(False)) if found is not None else (0, 0)
        counts |= {"chunks_hit": hit, "chunks_missed": missed}
        failure = reported.get(protocol.FAILURE)
        if blending and found is not None and not failure:
            missing = tuple(i for i, there in enumerate(found) if not there and kept_tokens(prompt.chunks[i], kv_block))
        if failure and not gathered.unsupported_reason:
            warnings.append(f"The server computed the prompt in full: {protocol.fallback_sentence(str(failure))}.")
        elif blending and missed:
            warnings.append(f"The KV of {missed} chunk(s) was missing; they were computed.")
    else:
        # cached_tokens includes blended tokens, so it is the exact prefix only on servers that cannot blend
        prefix = 0 if blending else min(gathered.cached or 0, len(prompt))
        counts = {"prefix_tokens": prefix, "computed_tokens": len(prompt) - prefix}
        if reported is not None:
            warnings.append("The server's reuse statistics are not consistent, so they are left out.")
        elif blending:
            how = "in a stream (vLLM 0.33 does, and older ones with our plugin)" if streamed else "for this request"
            known = "" if gathered.cached is None else f"; {gathered.cached} tokens were cached, exact or blended"
            warnings.append(
                f"The server does not report what it reused {how}{known}. All tokens are counted as computed."
            )
    if not streamed and len(ids) > 1:
        warnings.append("The answer came in one piece: its time to the first token is that of the whole answer.")
    stats = ReuseStats(len(prompt), ttft_ms=gathered.ttft_ms, **counts)
    reuse = () if reported is None and blending else chunk_reuse(prompt, stats, (reported or {}).get("spans"))
    return Completion(
        gathered.text,
        ids,
        gathered.finish_reason,
        stats,
        tuple(warnings),
        missing,
        reuse,
        _used_before(prompt, (reported or {}).get(protocol.USED_BEFORE)),
    )


def _used_before(prompt: QueryPrompt, starts: Any) -> tuple[int, ...]:
    known = set(starts) if isinstance(starts, list) and all(isinstance(start, int) for start in starts) else set()
    return tuple(at for at, chunk in enumerate(prompt.chunks) if chunk.start in known)


def _counts(reported: Mapping[str, Any], length: int) -> dict[str, Any] | None:
    """The token counts and times that the server reported; None unless the counts are whole and add up."""
    parts = {name: reported.get(name) for name in protocol.COUNTS}
    if not all(isinstance(part, int) and part >= 0 for part in parts.values()):
        return None
    if sum(part for part in parts.values() if part is not None) != length:
        return None
    times = {name: float(reported.get(name) or 0.0) for name in (*protocol.TIMES, *protocol.PREDICTED)}
    reason = str(reported.get(protocol.BUDGET_REASON) or "")  # absent where the server is older
    budget = {"budget_tokens": parts["recomputed_tokens"] if reason else 0, "budget_reason": reason}
    return {**parts, **times, **budget, protocol.DECISION: str(reported.get(protocol.DECISION) or "")}


def chunk_reuse(prompt: QueryPrompt, stats: ReuseStats, spans: Any) -> tuple[ChunkReuse, ...]:
    """Reuse of each chunk; empty if it cannot be derived from the server's statistics.

    A server reports where it placed KV, and how many of those tokens it recomputed in all, but not which.

    Args:
        prompt: The prompt that was sent.
        stats: The counts.
        spans: The placed parts of the prompt as [start, end] pairs; None: not reported.
    """
    cached = stats.reused_tokens + stats.recomputed_tokens
    if cached and spans is None:
        return ()
    exact = stats.prefix_tokens
    placed = [(max(int(start), exact), int(end)) for start, end in spans or ()]
    reuse = []
    for chunk in prompt.chunks:
        prefix = max(0, min(chunk.end, exact) - chunk.start)
        found = sum(max(0, min(chunk.end, end) - max(chunk.start, start)) for start, end in placed)
        rest = chunk.end - chunk.start - prefix - found
        reuse.append(ChunkReuse(prefix, found, None if found and stats.recomputed_tokens else 0, rest))
    return tuple(reuse)


def kept_tokens(span: ChunkSpan, kv_block: int) -> int:
    """Tokens of a chunk that a server can store: whole blocks."""
    return (span.end - span.start) // kv_block * kv_block


def chunks_found(prompt: QueryPrompt, reported: Mapping[str, Any], kv_block: int) -> list[bool] | None:
    """For each chunk, whether its KV was found; None if it cannot be derived from the server's statistics.

    `spans`, the placed parts of the prompt as [start, end] pairs, answer this; a server sends them on request.
    Without them there are only token counts, which show no more than whether all or none of the chunks were found. A
    chunk shorter than a block is never stored and so never found.
    """
    keep = [kept_tokens(span, kv_block) for span in prompt.chunks]
    exact = int(reported["prefix_tokens"])
    if (spans := reported.get("spans")) is not None:
        places = [(0, exact), *((int(start), int(end)) for start, end in spans)]
        return [
            tokens > 0 and sum(max(0, min(span.end, end) - max(span.start, start)) for start, end in places) > 0
            for span, tokens in zip(prompt.chunks, keep, strict=True)
        ]
    covered = max(0, exact - prompt.prefix_tokens) + int(reported["reused_tokens"]) + int(reported["recomputed_tokens"])
    if covered == 0:
        return [False] * len(keep)
    return [tokens > 0 for tokens in keep] if covered >= sum(keep) else None


# -- pins --------------------------------------------------------------------------------------------------------------


def check_pinned(response: Any) -> None:
    """Raise if the server reports that it could not reach its KV store: another attempt may help.

    Raises:
        KVNotStoredError: It reports that.
    """
    statistics = protocol.answer_statistics(response) or {}
    if statistics.get(protocol.PINNED) is False and not statistics.get(protocol.PINS):
        raise KVNotStoredError(
            "the server could not pin a chunk: its KV store did not answer",
            remedy="Check the LMCache server, and run the command again.",
        )


def pin_refusal(statistics: Mapping[str, Any], tokens: int, *, pin: bool) -> PinRefusedError | None:
    """Why a chunk of so many tokens is not pinned, by an answer's statistics; None if it is as it was asked for."""
    if protocol.PINNED not in statistics:
        return PinRefusedError(
            "The server cannot pin chunks.",
            remedy="Start it with this version's `lmcache-rag serve`, and see `lmcache-rag doctor`.",
        )
    if not pin or statistics[protocol.PINNED]:
        return None
    figures = protocol.read_held(statistics.get(protocol.PINS))
    used, limit = (figures.get(name, 0) / 1e9 for name in ("used", "limit"))
    limited = "the tenant's budget" if figures.get("tenant") else "the server's memory"
    return PinRefusedError(
        f"A chunk of {tokens:,} tokens cannot be pinned: {used:,.2f} GB of the {limit:,.2f} GB of {limited} that pins "
        "may take are pinned.",
        remedy="Pin fewer chunks, end pins with `lmcache-rag warm --no-pin`, or start the server with a larger "
        f"{'--tenant-budget' if figures.get('tenant') else '--l1-gb'}.",
    )
