"""The checks of `lmcache-rag doctor`, in order: this machine, running servers, and a live round trip.

The round trip precomputes random chunks after a prefix and then queries them in another order.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lmcache_rag import protocol
from lmcache_rag.costs import SHOWN
from lmcache_rag.credentials import LOOPBACK
from lmcache_rag.engines.vllm_client import ModelCard, VLLMClient, prefix_caching, vllm_block
from lmcache_rag.errors import ConfigError, EngineError, LMCacheRAGError
from lmcache_rag.protocol import (
    ALWAYS_BLEND,
    CAN_BLEND,
    INGEST,
    LMCACHE_CHUNK,
    MAX_OFFLOAD_TOKENS,
    NEAR_TIE,
    NO_BLEND,
    POLICY,
    RATIO,
    CannotBlend,
    SelfCheck,
    answer_statistics,
    chunk_tokens,
    hit_tokens,
    ingests,
)
from lmcache_rag.serving import machine
from lmcache_rag.serving.lmcache_checks import lmcache_checks
from lmcache_rag.serving.machine import Check, version

COUNTED_S = 3.0
IDS = range(300, 15000)  # ids of plain text in the usual vocabularies; none of them special
CHUNKS = 3
BLOCKS = (4, 3, 2)  # LMCache chunks in each of ours
ANSWER = 16
ADAPTERS = 8  # names in a line
TOP = 5  # log-probabilities requested with each token
ATTEMPTS, PAUSE_S = 5, 1.0  # LMCache indexes stored KV with a short delay


def examine(
    url: str = "",
    *,
    lmcache_url: str = "",
    model: str = "",
    api_key: str = "",
    ingest_key: str = "",
    alone: bool = True,
) -> Iterator[Check]:
    """Check this machine, and with a URL the servers too. Yields each check when it is done.

    Args:
        url: Address of a vLLM server.
        lmcache_url: HTTP address of the LMCache server; default: port 8089 of this machine.
        model: Folder or Hugging Face name; default: what the server serves.
        api_key: vLLM's key, or "".
        ingest_key: Its key for ingestion, or "".
        alone: Whether this machine and the usual address of LMCache are checked; else they are another server's.

    Raises:
        ConfigError: An address is not valid.
    """
    local, named = not url or http_host(url) in LOOPBACK, bool(lmcache_url)
    here = local and machine.serves()  # else a client's machine: the address may be that of a container or a tunnel
    if not (url or lmcache_url or machine.serves()):
        yield Check("vLLM", "skipped", "not installed here, and no URL was given", machine.INSTALL)
        return
    if alone:
        yield from _this_machine(here=here, local=local)
    status: dict[str, Any] = {}
    exact = ""  # why the server can only answer exactly, which needs no LMCache
    if url:
        with VLLMClient(url, attempts=1, api_key=api_key, ingest_key=ingest_key) as server:
            exact = only_exact(server)
    if lmcache_url or (here and alone):
        lmcache_url = (lmcache_url or "http://127.0.0.1:8089").rstrip("/")
        http_host(lmcache_url)
        on_gpu = not (here and machine.VLLMBuild.installed().cpu)
        known, status = lmcache_checks(lmcache_url, needed=named or bool(url and not exact), on_gpu=on_gpu)
        yield from known
    else:
        yield Check("LMCache", "skipped", "it is where the server is", "If it can be reached from here: --lmcache-url.")
    if not url:
        if model:
            yield machine.model(model)
        yield Check("vLLM", "skipped", "no URL was given", "lmcache-rag doctor http://127.0.0.1:8000")
        return
    with VLLMClient(url, attempts=1, api_key=api_key, ingest_key=ingest_key) as server:
        known, served = vllm_checks(server, version("vllm") if here else "")
        yield from known
        if model or served:
            yield machine.model(model or (served.root if served else ""))
        if served is None:
            return
        yield from adapter_checks(server)
        if exact:
            yield prefix_cache(server)
            return
        yield chunk_and_block(server, status)
        yield from round_trip_checks(server, served, status)


def _this_machine(*, here: bool, local: bool) -> Iterator[Check]:
    if here:
        yield from machine.gpu()
        yield from machine.versions()
        yield machine.compiled()
        yield from machine.connector()
    elif local:
        result = "vLLM is not installed here: the server runs in a container, another environment, or behind a tunnel"
        yield Check("This machine", "skipped", result, "Run lmcache-rag doctor where the server runs.")
    else:
        yield Check("This machine", "skipped", "the server is elsewhere", "Run lmcache-rag doctor there.")


def http_host(url: str) -> str:
    """The host in the address of a server.

    Raises:
        ConfigError: It is no such address.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise ConfigError(f"{url!r} is not the address of a server.", remedy="For example http://127.0.0.1:8000.")
    return host


# Running servers


def vllm_checks(server: VLLMClient, here: str = "") -> tuple[list[Check], ModelCard | None]:
    """Check the vLLM server: returns (checks, its model).

    Args:
        server: Client of the server.
        here: Version of vLLM in this environment, "" if it does not matter.
    """
    try:
        served = server.first_model()
    except LMCacheRAGError as problem:
        return [Check("vLLM", "failed", problem.message, problem.remedy)], None
    version = server.version()
    result = f"{server.url} serves {served.name}" + (f", vLLM {version}" if version else "")
    if not server.healthy():
        return [Check("vLLM", "failed", f"{result}, and is not healthy", "See its log, and start it again.")], served
    if version and here and version.partition("+")[0] != here.partition("+")[0]:
        result += f"; this environment has vLLM {here}, which was checked above"
        return [Check("vLLM", "warning", result, "Run the lmcache-rag doctor of the server's own environment.")], served
    return [Check("vLLM", "ok", result)], served


def only_exact(server: VLLMClient) -> str:
    """Why a server can only answer exactly, by the model's configuration on this machine; "" if it is not known to."""
    try:
        return machine.recurrent(server.first_model().root)
    except LMCacheRAGError:
        return ""  # a later check reports it


def prefix_cache(server: VLLMClient) -> Check:
    """Whether vLLM keeps prompts, for a model that can only be served exactly."""
    metrics = server.metrics()
    if (switch := prefix_caching(metrics)) is None:
        return Check("Prefix cache", "skipped", "the server does not report it")
    if switch:
        blocks = f"whole blocks of {vllm_block(metrics)} tokens"
        return Check("Prefix cache", "ok", f"on: prompts that begin alike share work, in {blocks}")
    remedy = "Start it with lmcache-rag serve MODEL, or with --enable-prefix-caching."
    return Check("Prefix cache", "failed", "off: every prompt is computed from its beginning", remedy)


def adapter_checks(server: VLLMClient) -> list[Check]:
    """Name the LoRA adapters that the server has, if it has any."""
    names = [card.name for card in server.models() if card.adapter]
    if not names:
        return []
    shown = names if len(names) <= ADAPTERS else [*names[:ADAPTERS], "..."]
    return [Check("LoRA adapters", "ok", f"{len(names)} ({', '.join(shown)}), each with KV of its own")]


def chunk_size(server: VLLMClient, status: dict[str, Any]) -> int:
    """Tokens of an LMCache chunk, as LMCache reports it, or else vLLM with our connector; 0: neither does."""
    own = status.get("chunk_size")
    return own if isinstance(own, int) and own > 0 else chunk_tokens(server.metrics())


def chunk_and_block(server: VLLMClient, status: dict[str, Any]) -> Check:
    """Check LMCache's chunk size against vLLM's block size."""
    chunk = chunk_size(server, status)
    block = vllm_block(server.metrics())
    if not chunk or not block:
        return Check("Chunk and block", "skipped", "the servers do not report it")
    result = f"chunks of {chunk} tokens, blocks of {block}"
    if chunk % block == 0:
        return Check("Chunk and block", "ok", result)
    return Check("Chunk and block", "failed", result, "The chunk size must be a multiple of the block size.")


def round_trip_checks(server: VLLMClient, served: ModelCard, status: dict[str, Any]) -> list[Check]:
    """Run the round trip and judge it."""
    before = hit_tokens(server.metrics())
    try:
        outcome = round_trip(server, served, chunk_size(server, status) or LMCACHE_CHUNK)
    except LMCacheRAGError as problem:
        return [Check("Round trip", "failed", problem.message, problem.remedy)]
    checks = list(judge(outcome))
    return [*checks, counter_check(server, before), *cost_checks(server.metrics())] if outcome.hit else checks


def cost_checks(metrics: str) -> list[Check]:
    """What the server's work takes, and from how many tokens on it blends, by the text of its /metrics."""
    costs, from_tokens = protocol.costs(metrics), protocol.boundaries(metrics)
    if not costs:
        return [Check("Costs", "skipped", "the server does not report what its work takes")]
    parts = []
    for kind, words in _COSTS.items():
        sizes = [tokens for tokens in SHOWN if f"{kind}_{tokens}" in costs]
        if sizes:
            numbers = " / ".join(f"{costs[f'{kind}_{tokens}']:,.1f}" for tokens in sizes)
            parts.append(f"{words} of {' / '.join(f'{tokens:,}' for tokens in sizes)} tokens: {numbers} ms")
    parts += [f"{words}: {costs[name]:,.1f} ms" for name, words in _PASSES.items() if name in costs]
    checks = [Check("Costs", "ok", "; ".join(parts))]
    shown = [
        f"{words} " + (f"{round(from_tokens[tier], -1):,.0f} tokens" if from_tokens[tier] else "never")
        for tier, words in _TIERS.items()
        if tier in from_tokens
    ]
    if shown:
        checks.append(Check("Blends from", "ok", "; ".join(shown)))
    else:
        checks.append(Check("Blends from", "skipped", "not known yet, or every request is blended (--min-gain off)"))
    return checks


_COSTS = {
    "prefill": "prefill",
    "lookup": "look-up",
    "load_l1": "load from LMCache's memory",
    "load_hot": "copy inside vLLM's cache",
}
_PASSES = {"blend_query": "smallest blend", "recompute_100_query": "100 tokens recomputed more"}
_TIERS = {"l1": "from LMCache's memory:", "hot": "from vLLM's own cache:"}


def counter_check(server: VLLMClient, before: int | None) -> Check:
    """Check that the hits of a round trip appear on /metrics, which happens shortly after the answer."""
    if before is None:
        return Check("Hit counters", "skipped", "the server has none; vLLM's --disable-log-stats turns them off")
    until = time.monotonic() + COUNTED_S
    while (after := hit_tokens(server.metrics()) or 0) <= before and time.monotonic() < until:
        time.sleep(0.1)
    result = f"{after - before:,} tokens more on /metrics"
    if after > before:
        return Check("Hit counters", "ok", result)
    return Check(
        "Hit counters", "failed", result, "Do several servers share this address? Check each by its own address."
    )


def judge(outcome: Outcome) -> Iterator[Check]:
    """The checks that result from a round trip."""
    found = outcome.reused
    if found is None:
        remedy = "Start vLLM by lmcache-rag serve, or with the --kv-transfer-config of its --dry-run."
        yield Check("Round trip", "failed", "the answer has no statistics: our connector is not loaded", remedy)
        return
    why_not = protocol.cannot_blend(found)
    if why_not is not None and why_not.code is CannotBlend.NEEDS_CUDA and outcome.prefix is not None:
        yield exact_prefixes(outcome.prefix)
        return
    if why_not is not None:
        name = "Self-check" if why_not.code in _SELF_CHECKS else "Round trip"
        remedy = _REMEDIES.get(why_not.code, _STOCK)
        yield Check(name, "failed", f"our connector is loaded, and cannot blend: {why_not}", remedy)
        return
    yield self_check(found)
    if not outcome.hit:
        why = found.get("failure")
        result = f"nothing was reused in {outcome.queries} queries" + (f": {why}" if why else "")
        remedy = 'vLLM\'s log has the reason after "KV is not blended"; an LMCache that is full or new holds no KV.'
        yield Check("Round trip", "failed", result, remedy)
        return
    times = ", ".join(
        f"{name} {found[f'{name}_ms']:g} ms" for name in ("lookup", "load", "blend") if f"{name}_ms" in found
    )
    yield Check(
        "Round trip",
        "ok",
        f"chunks in another order: {found['reused_tokens']:,} of {found.get('prompt_tokens', 0):,} tokens reused, "
        f"{found.get('recomputed_tokens', 0):,} recomputed ({protocol.chosen(found)}); {times}",
    )
    exact = outcome.exact or {}
    if not exact.get("recomputed_tokens"):
        result = f"nothing was recomputed: {exact.get('failure') or 'no chunk was found again'}"
        yield Check("Ratio 1", "failed", result, "LMCache may be too small for its load: --l1-gb.")
        return
    result = f"{outcome.same} of {outcome.compared} tokens equal a run without reuse"
    if outcome.near_tie and outcome.same < outcome.compared:
        result += "; at the first difference both tokens are equally likely within rounding"
    remedy = "" if outcome.agrees else "Answers may be wrong. Set lmcache_rag.blend to off and report this, please."
    yield Check("Ratio 1", "ok" if outcome.agrees else "failed", result, remedy)


def exact_prefixes(found: Mapping[str, Any]) -> Check:
    """The round trip of a server on a CPU, which reuses exact prefixes and blends nothing.

    Args:
        found: Statistics of a prompt that was asked again.
    """
    held, prompt = int(found.get("prefix_tokens", 0)), int(found.get("prompt_tokens", 0))
    result = f"an exact prefix: {held:,} of {prompt:,} tokens found again; a server on a CPU blends nothing"
    if held:
        return Check("Round trip", "ok", result)
    return Check("Round trip", "failed", result, "Does LMCache run, and is vLLM's prefix cache on? See their logs.")


def self_check(found: Mapping[str, Any]) -> Check:
    """The result of the comparison of a blend with a full prefill at the server's start."""
    outcome = found.get(protocol.SELF_CHECK)
    if outcome == SelfCheck.PASSED:
        return Check("Self-check", "ok", "on this model and build a blend at ratio 1 equals a full prefill")
    if outcome == SelfCheck.SKIPPED:
        remedy = "Start the server without lmcache_rag.self_check=false."
        return Check("Self-check", "warning", "blends were not compared with a full prefill at start", remedy)
    return Check("Self-check", "skipped", "the server does not report it")


_SELF_CHECKS = (CannotBlend.SELF_CHECK, CannotBlend.SELF_CHECK_ERROR)
_STOCK = "Prompts are served as by stock vLLM. Remove the unsupported option, or use a supported model."
_LMCACHE = "Start LMCache's server as lmcache-rag serve does, and vLLM after it."
_WORKERS = "See vLLM's log: its workers failed before they started the connector."
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
    CannotBlend.KV_CACHE: "docs/models.md says which KV caches are blended; without --kv-cache-dtype they are.",
    CannotBlend.LORA: "Serve adapters of this model without blending, or the model without --enable-lora.",
    CannotBlend.OTHER_RANK: "vLLM's log names the rank that cannot, and its reason.",
    CannotBlend.SELF_CHECK: "Blended answers would be wrong here. Please report the model, the GPU, and this line.",
    CannotBlend.SELF_CHECK_ERROR: f"{_REPORT} --connector lmcache_rag.self_check=false blends without the check.",
    CannotBlend.ERROR: _REPORT,
}


# The round trip


@dataclass(frozen=True)
class Prompts:
    """Random prompts.

    Attributes:
        prefix: One LMCache chunk.
        chunks: Token ids of the chunks; each a multiple of LMCache's.
    """

    prefix: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]

    @classmethod
    def draw(cls, chunk_size: int, most_tokens: int = 0, seed: int | None = None) -> Prompts:
        """New random text, so that nothing of it is cached yet. Shorter if the model's context is short."""
        dice = random.Random(seed)  # noqa: S311 - not a secret
        blocks = BLOCKS if not most_tokens or most_tokens > chunk_size * 12 else (1, 2, 1)
        return cls(_ids(dice, chunk_size), tuple(_ids(dice, chunk_size * n) for n in blocks))

    def ingest(self) -> list[list[int]]:
        """Prefix and chunk, for each chunk."""
        return [[*self.prefix, *chunk] for chunk in self.chunks]

    def query(self, chunks: int = CHUNKS) -> list[int]:
        """All chunks, or the first, in the opposite order, with new separators and a new question."""
        dice = random.Random()  # noqa: S311 - not a secret
        prompt = list(self.prefix)
        for chunk in reversed(self.chunks[:chunks]):
            prompt += [*_ids(dice, 3), *chunk]
        return [*prompt, *_ids(dice, 40)]


@dataclass(frozen=True)
class Answer:
    """A completion.

    Attributes:
        tokens: Ids of the answer.
        top: For each of them the most likely ids and their log-probabilities.
        statistics: Reuse statistics of our connector; None without it.
    """

    tokens: tuple[int, ...]
    top: tuple[dict[int, float], ...] = ()
    statistics: dict[str, Any] | None = field(default=None)


def ask(server: VLLMClient, model: str, prompt: list[int], *, params: dict[str, Any], max_tokens: int = 1) -> Answer:
    """Greedy completion of a prompt of token ids, with these kv_transfer_params.

    Raises:
        EngineError: The server rejected it, or does not answer as vLLM does.
    """
    request = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": TOP,
        "extra_body": {
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "kv_transfer_params": params,
        },
    }
    response = server.complete(request, ingest=ingests(params))
    try:
        choice = response.choices[0]
        top = getattr(choice.logprobs, "top_logprobs", None) or ()
        return Answer(
            tuple(choice.token_ids),
            tuple({int(name.rpartition(":")[2]): value for name, value in row.items()} for row in top if row),
            answer_statistics(response),
        )
    except (AttributeError, IndexError, TypeError, ValueError) as problem:
        raise EngineError(
            f"The server does not answer as vLLM does: {type(problem).__name__}: {problem}.",
            remedy="vLLM 0.25.1 or newer is needed.",
        ) from problem


@dataclass(frozen=True)
class Outcome:
    """Result of a round trip.

    Attributes:
        reused: Statistics of the best query with the server's own policy; None when the connector sent none.
        queries: Number of queries until KV was reused.
        exact: Statistics of the query with every token recomputed; None without reuse.
        same: Tokens in which it agrees with a run without reuse, out of `compared`.
        compared: Tokens compared.
        near_tie: Whether both tokens at the first difference are equally likely within rounding.
        prefix: Statistics of a prompt that was asked again, where the server cannot blend.
    """

    reused: dict[str, Any] | None
    queries: int
    exact: dict[str, Any] | None = None
    same: int = 0
    compared: int = 0
    near_tie: bool = False
    prefix: dict[str, Any] | None = None

    @property
    def hit(self) -> bool:
        """Whether KV of cached chunks was found and used, even if only to select what to recompute."""
        return found_again(self.reused) > 0

    @property
    def agrees(self) -> bool:
        """Whether recomputing everything equals a full prefill."""
        return self.compared > 0 and (self.same == self.compared or self.near_tie)


def found_again(statistics: dict[str, Any] | None) -> int:
    """Tokens of cached chunks. With policy `all` or ratio 1 every one of them is recomputed, and none reused."""
    found = statistics or {}
    return int(found.get("reused_tokens", 0)) + int(found.get("recomputed_tokens", 0))


def round_trip(
    server: VLLMClient,
    served: ModelCard,
    chunk_size: int,
    *,
    compare: bool = True,
    more: int = 0,
    pause: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Run the round trip.

    Args:
        server: The vLLM server.
        served: Its model.
        chunk_size: Tokens of an LMCache chunk.
        compare: Also compare a run that recomputes everything with one that reuses nothing.
        more: Further queries, which show the server what its look-ups, loads and blends take.
        pause: For waiting between two attempts.

    Raises:
        EngineError: The server rejected a request, or does not answer as vLLM does.
    """
    prompts = Prompts.draw(chunk_size, served.context_length)
    # The queries' KV must not be stored: an attempt that finds nothing must not help the next one.
    keep_out = {**ALWAYS_BLEND, MAX_OFFLOAD_TOKENS: chunk_size}
    for prompt in prompts.ingest():
        ask(server, served.name, prompt, params={**NO_BLEND, INGEST: True})
    found: dict[str, Any] | None = None
    query: list[int] = []
    attempt = 0
    while attempt < ATTEMPTS and not found_again(found):
        pause(PAUSE_S if attempt else PAUSE_S / 4)
        attempt += 1
        query = prompts.query()
        found = ask(server, served.name, query, params=keep_out).statistics
        if found is None or found.get(CAN_BLEND) is False:
            break
    if compare and protocol.cannot_blend(found) is not None:
        again = ask(server, served.name, prompts.ingest()[0], params={**NO_BLEND, MAX_OFFLOAD_TOKENS: 0})
        return Outcome(found, attempt, prefix=again.statistics)
    for _ in range(more if found_again(found) else 0):
        ask(server, served.name, prompts.query(), params=keep_out)
    if not compare or not found_again(found):
        return Outcome(found, attempt)
    # Blended first: after a run without reuse vLLM itself would hold the whole prompt.
    query = prompts.query()
    every = {POLICY: "query", RATIO: 1.0}
    blended = ask(server, served.name, query, max_tokens=ANSWER, params=every | keep_out)
    plain = ask(server, served.name, query, max_tokens=ANSWER, params={**keep_out, **NO_BLEND})
    if not blended.tokens or not plain.tokens:
        raise EngineError("The server answered without tokens.", remedy="See its log.")
    same = _agree(blended.tokens, plain.tokens)
    compared = max(len(blended.tokens), len(plain.tokens))
    return Outcome(found, attempt, blended.statistics, same, compared, _near_tie(plain, blended, same))


def _ids(dice: random.Random, count: int) -> tuple[int, ...]:
    return tuple(dice.choice(IDS) for _ in range(count))


def _agree(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _near_tie(plain: Answer, blended: Answer, at: int) -> bool:
    """Whether, at the first difference, the run without reuse found both tokens about equally likely."""
    if at >= min(len(plain.top), len(plain.tokens), len(blended.tokens)):
        return False
    row, ours, theirs = plain.top[at], blended.tokens[at], plain.tokens[at]
    return ours in row and theirs in row and row[theirs] - row[ours] <= NEAR_TIE
