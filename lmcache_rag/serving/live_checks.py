"""What can be asked of running servers: LMCache's state, vLLM's, and a live round trip."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lmcache_rag import protocol
from lmcache_rag.errors import LMCacheRAGError
from lmcache_rag.protocol import LMCACHE_CHUNK, CannotBlend, SelfCheck, chunk_tokens, hit_tokens
from lmcache_rag.serving import api
from lmcache_rag.serving.machine import Check
from lmcache_rag.serving.roundtrip import Outcome, round_trip

COUNTED_S = 3.0
NEARLY_FULL = 0.9


def lmcache(url: str, *, needed: bool) -> tuple[list[Check], dict[str, Any]]:
    """LMCache's server: (checks, its status; empty when it does not answer).

    Args:
        url: Its HTTP address.
        needed: Whether it is a fault when it does not answer.
    """
    if not api.answers(url, "/healthcheck"):
        remedy = "lmcache-rag serve MODEL starts it. On another machine or port: --lmcache-url."
        return [Check("LMCache", "failed" if needed else "skipped", f"{url} does not answer", remedy)], {}
    try:
        status = api.get_json(url, "/status")
    except LMCacheRAGError as problem:
        return [Check("LMCache", "failed", problem.message, problem.remedy)], {}
    if status is None:
        return [Check("LMCache", "failed", f"{url}/status does not answer", "Its log may say why.")], {}
    checks = []
    healthy = bool(status.get("is_healthy"))
    chunk = status.get("chunk_size")
    checks.append(
        Check(
            "LMCache",
            "ok" if healthy else "failed",
            f"{url} is {'healthy' if healthy else 'not healthy'}; chunks of {chunk} tokens",
            "" if healthy else f"See {url}/status.",
        )
    )
    # Only the blend engine reports rotary tables.
    tables = status.get("registered_cb_rope_instances")
    if tables is None:
        remedy = "Start it with --engine-type blend, as lmcache-rag serve does."
        checks.append(Check("Blend engine", "failed", "this server does not blend", remedy))
        return checks, status
    checks.append(Check("Blend engine", "ok", "on"))
    workers = len(status.get("registered_gpu_ids") or ())
    if tables:
        some = len(tables) < workers
        remedy = 'The others do not blend; their vLLM\'s log says why under "KV is not blended".' if some else ""
        words = f"registered by {len(tables)} of {workers} workers"
        checks.append(Check("RoPE", "warning" if some else "ok", words, remedy))
    elif workers:
        remedy = 'vLLM\'s log says why under "KV is not blended"; is kv_connector CacheBlendConnector?'
        checks.append(Check("RoPE", "failed", f"not registered, though {workers} workers are there", remedy))
    else:
        state: Any = "failed" if needed else "skipped"
        checks.append(Check("RoPE", state, "no vLLM worker is registered", "Is vLLM up, and with our connector?"))
    checks += ranks(status)
    checks.append(index(api.get_text(url, "/metrics")))
    return checks, status


def index(metrics: str) -> Check:
    """How full the index of chunks is, and how many of those that were asked for it found."""
    entries, asked, found, size = (
        protocol.lmcache_number(metrics, name)
        for name in (protocol.INDEX_ENTRIES, protocol.INDEX_ASKED, protocol.INDEX_FOUND, protocol.INDEX_SIZE)
    )
    if entries is None:
        return Check("Chunk index", "skipped", "LMCache's /metrics does not say")
    words = f"{entries:,} chunks" + (f" of at most {size:,}" if size else "")
    if asked:
        words += f"; {found or 0:,} of {asked:,} chunks of prompts were found"
    if size and entries >= NEARLY_FULL * size:
        remedy = (
            "New chunks take the place of those that were not used for longest: serve --index-size gives room for more."
        )
        return Check("Chunk index", "warning", f"{words}: it is nearly full", remedy)
    return Check("Chunk index", "ok", words)


def ranks(status: dict[str, Any]) -> list[Check]:
    """Whether all tensor-parallel ranks of each vLLM are registered; nothing where no vLLM has several.

    A rank that is not there makes every prompt computed on all: none may blend alone.
    """
    sizes: Counter[tuple[str, int]] = Counter()
    for one in (status.get("cache_context_meta") or {}).values():
        sizes[str(one.get("model_name")), int(one.get("world_size") or 1)] += 1
    checks = []
    for (model, size), found in sorted(sizes.items()):
        if size == 1:
            continue
        words = f"{found} registered for {model}, which is served by {size}"
        if found % size:
            remedy = "KV is blended by all ranks or by none: see vLLM's log for the worker that could not register."
            checks.append(Check("Ranks", "failed", words, remedy))
        else:
            checks.append(Check("Ranks", "ok", words))
    return checks


def vllm(server: api.VLLM, here: str = "") -> tuple[list[Check], api.Served | None]:
    """The vLLM server: (checks, what it serves).

    Args:
        server: To ask.
        here: Version of vLLM in this environment, "" where it does not matter.
    """
    try:
        served = server.served()
    except LMCacheRAGError as problem:
        return [Check("vLLM", "failed", problem.message, problem.remedy)], None
    version = server.version()
    words = f"{server.url} serves {served.name}" + (f", vLLM {version}" if version else "")
    if not server.healthy():
        return [Check("vLLM", "failed", f"{words}, and is not healthy", "Its log says why; start it again.")], served
    if version and here and version.partition("+")[0] != here.partition("+")[0]:
        words += f"; this environment has vLLM {here}, which is what was checked above"
        return [Check("vLLM", "warning", words, "Run the lmcache-rag doctor of the server's own environment.")], served
    return [Check("vLLM", "ok", words)], served


def chunk_size(server: api.VLLM, status: dict[str, Any]) -> int:
    """Tokens of an LMCache chunk, by LMCache's own word or by that of vLLM with our connector; 0: neither says."""
    own = status.get("chunk_size")
    return own if isinstance(own, int) and own > 0 else chunk_tokens(server.metrics())


def sizes(server: api.VLLM, status: dict[str, Any]) -> Check:
    """LMCache's chunk against vLLM's block."""
    chunk = chunk_size(server, status)
    found = re.search(r'cache_config_info\{[^}]*\bblock_size="(\d+)"', server.metrics())
    if not chunk or found is None:
        return Check("Chunk and block", "skipped", "the servers do not say")
    block = int(found[1])
    words = f"chunks of {chunk} tokens, blocks of {block}"
    if block and chunk % block == 0:
        return Check("Chunk and block", "ok", words)
    return Check("Chunk and block", "failed", words, "The chunk size must be a multiple of the block size.")


def live(server: api.VLLM, served: api.Served, status: dict[str, Any]) -> list[Check]:
    """The round trip."""
    before = hit_tokens(server.metrics())
    try:
        outcome = round_trip(server, served, chunk_size(server, status) or LMCACHE_CHUNK)
    except LMCacheRAGError as problem:
        return [Check("Round trip", "failed", problem.message, problem.remedy)]
    checks = list(judge(outcome))
    return [*checks, counters(server, before)] if outcome.hit else checks


def counters(server: api.VLLM, before: int | None) -> Check:
    """Whether the hits of a round trip show on /metrics, where they come a moment behind the answer."""
    if before is None:
        return Check("Hit counters", "skipped", "the server has none; vLLM's --disable-log-stats turns them off")
    until = time.monotonic() + COUNTED_S
    while (after := hit_tokens(server.metrics()) or 0) <= before and time.monotonic() < until:
        time.sleep(0.1)
    words = f"{after - before:,} tokens more on /metrics"
    if after > before:
        return Check("Hit counters", "ok", words)
    return Check("Hit counters", "failed", words, "Are several servers behind this address? Ask each by its own.")


def judge(outcome: Outcome) -> Iterator[Check]:
    """What a round trip says."""
    found = outcome.reused
    if found is None:
        remedy = "Start vLLM by lmcache-rag serve, or with the --kv-transfer-config of its --dry-run."
        yield Check("Round trip", "failed", "the answer has no statistics: our connector is not loaded", remedy)
        return
    if (why_not := protocol.cannot_blend(found)) is not None:
        name = "Self-check" if why_not.code in _SELF_CHECKS else "Round trip"
        remedy = _REMEDIES.get(why_not.code, _STOCK)
        yield Check(name, "failed", f"our connector is loaded, and cannot blend: {why_not}", remedy)
        return
    yield self_check(found)
    if not outcome.hit:
        why = found.get("failure")
        words = f"nothing was reused in {outcome.queries} queries" + (f": {why}" if why else "")
        remedy = 'vLLM\'s log says why under "KV is not blended"; an LMCache that is full or new holds no KV.'
        yield Check("Round trip", "failed", words, remedy)
        return
    times = ", ".join(
        f"{name} {found[f'{name}_ms']:g} ms" for name in ("lookup", "load", "blend") if f"{name}_ms" in found
    )
    yield Check(
        "Round trip",
        "ok",
        f"chunks in another order: {found['reused_tokens']:,} of {found.get('prompt_tokens', 0):,} tokens reused, "
        f"{found.get('recomputed_tokens', 0):,} recomputed ({found.get('policy')} at {found.get('ratio'):g}); {times}",
    )
    exact = outcome.exact or {}
    if not exact.get("recomputed_tokens"):
        words = f"nothing was recomputed: {exact.get('failure') or 'no chunk was found again'}"
        yield Check("Ratio 1", "failed", words, "LMCache may be too small for its load: --l1-gb.")
        return
    words = f"{outcome.same} of {outcome.compared} tokens equal a run without reuse"
    if outcome.near_tie and outcome.same < outcome.compared:
        words += "; the first difference is a tie but for rounding"
    remedy = "" if outcome.agrees else "Answers may be wrong. Set lmcache_rag.blend to off and report this, please."
    yield Check("Ratio 1", "ok" if outcome.agrees else "failed", words, remedy)


def self_check(found: Mapping[str, Any]) -> Check:
    """What came of the comparison of a blend with a full prefill at the server's start."""
    outcome = found.get(protocol.SELF_CHECK)
    if outcome == SelfCheck.PASSED:
        return Check("Self-check", "ok", "on this model and build a blend at ratio 1 equals a full prefill")
    if outcome == SelfCheck.SKIPPED:
        remedy = "Start the server without lmcache_rag.self_check=false."
        return Check("Self-check", "warning", "blends were not compared with a full prefill at start", remedy)
    return Check("Self-check", "skipped", "the server does not say")


_SELF_CHECKS = (CannotBlend.SELF_CHECK, CannotBlend.SELF_CHECK_ERROR)
_STOCK = "Everything is served as stock vLLM does. Leave out the option, or take a model, that is named."
_LMCACHE = "Start LMCache's server as lmcache-rag serve does, and vLLM after it."
_WORKERS = "See vLLM's log: its workers did not get as far as the connector."
_REPORT = "vLLM's log has the error: please report it."
_REMEDIES = {
    CannotBlend.NOT_READY: _WORKERS,
    CannotBlend.NO_WORKER: _WORKERS,
    CannotBlend.NO_PLUGIN: "Add lmcache_rag to the server's VLLM_PLUGINS, or unset it.",
    CannotBlend.NEEDS_CUDA: "Run vLLM and LMCache on an NVIDIA GPU, both as lmcache-rag serve starts them.",
    CannotBlend.ROCM: "Run vLLM and LMCache on an NVIDIA GPU.",
    CannotBlend.SLEEP_MODE: "Start vLLM without --enable-sleep-mode.",
    CannotBlend.MULTI_CONNECTOR: "Name CacheBlendConnector itself in --kv-transfer-config, as lmcache-rag serve does.",
    CannotBlend.LMCACHE_HANDSHAKE: _LMCACHE,
    CannotBlend.LMCACHE_ROPE: _LMCACHE,
    CannotBlend.OTHER_RANK: "vLLM's log names the rank that cannot, and its reason.",
    CannotBlend.SELF_CHECK: "Blended answers would be wrong here. Please report the model, the GPU, and this line.",
    CannotBlend.SELF_CHECK_ERROR: f"{_REPORT} --connector lmcache_rag.self_check=false blends without the check.",
    CannotBlend.ERROR: _REPORT,
}
