"""The contract between clients and the connector inside vLLM, spelled once.

Request keys and what may stand in them, reason codes, the statistics in an answer, metric names and defaults. Server,
client, command line, doctor, benchmarks and integrations take them from here. Needs neither vLLM nor PyTorch.

Programs compare codes; a sentence is made from a code where a person reads it: `fallback_sentence`; an
`Unsupported` brings its own text. Existing keys, codes, answer fields, metric names and label values never change.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Any, Final

from lmcache_rag.budget import AUTO, FORMS, Budget, BudgetReason, Ratio, parse_budget, read_budget
from lmcache_rag.budget import MOST_TOKENS as MOST_TOKENS
from lmcache_rag.policies import POLICIES

# -- request keys, in kv_transfer_params ------------------------------------------------------------------------------

NAMESPACE: Final = "lmcache_rag."  # prefix of all our keys
POLICY: Final = "lmcache_rag.policy"  # recompute policy: a name of POLICIES
RATIO: Final = "lmcache_rag.ratio"  # how many cached tokens to recompute: a share, 0 to 1; "auto"; {"tokens": N}
BLEND: Final = "lmcache_rag.blend"  # "on", "off", a boolean, or "always": even where computing is as fast
CHUNKS: Final = "lmcache_rag.chunks"  # [[start, end], ...]: where the chunks are in the prompt, in tokens
PREFIX: Final = "lmcache_rag.prefix"  # tokens before the first chunk, which the prompt shares with others
# true: the prompt is prefix + chunk, to be stored and indexed. Between the two there may be other text; then CHUNKS
# names the chunk.
INGEST: Final = "lmcache_rag.ingest"
FORGET: Final = "lmcache_rag.forget"  # true: such a prompt, whose chunk's KV is to be removed everywhere
SPANS: Final = "lmcache_rag.spans"  # true: the answer's statistics hold `spans`
KEEP: Final = "lmcache_rag.keep"  # with forget: first tokens of the chunk whose KV stays: another chunk begins so, too
HELD: Final = "lmcache_rag.held"  # with forget, true: the answer counts what each tier held of the chunk
# With the prompt of an ingestion, true: the chunk's KV is not evicted from LMCache's memory; false: it may be again.
PIN: Final = "lmcache_rag.pin"
TENANT: Final = "lmcache_rag.tenant"  # whose budget the KV counts to; default: the request's cache_salt
REQUEST_KEYS: Final = (POLICY, RATIO, BLEND, CHUNKS, PREFIX, INGEST, FORGET, KEEP, HELD, SPANS, PIN, TENANT)

LMCACHE_NAMESPACE: Final = "lmcache."
MAX_OFFLOAD_TOKENS: Final = "lmcache.max_offload_tokens"  # LMCache's: most tokens of this request to store
LMCACHE_KEYS: Final = (MAX_OFFLOAD_TOKENS,)  # those of LMCache's keys that a request may hold
# Keys of disaggregated prefill, which our connector does not support.
PD_KEYS: Final = ("do_remote_prefill", "do_remote_decode", "cached_token_stats")
PD_PREFIX: Final = "remote_"

NO_BLEND: Final[Mapping[str, Any]] = {BLEND: "off"}
ALWAYS_BLEND: Final[Mapping[str, Any]] = {BLEND: "always"}

# vLLM's priority of requests that ingest or forget (lower is earlier, a question has 0): they yield to questions where
# the server schedules by priority.
INGEST_PRIORITY: Final = 100
INGEST_KEY_HEADER: Final = "X-LMCache-RAG-Ingest-Key"

# -- keys between the connector and LMCache's server, in the request_configs of LMCache's keys ------------------------

UNTIL: Final = (
    "lmcache_rag.until"  # deadline of a load or store, by time.time(): the server must not carry it out later
)

# -- defaults ---------------------------------------------------------------------------------------------------------

DEFAULT_POLICY: Final = "query"
DEFAULT_RATIO: Final = AUTO
DEFAULT_MIN_GAIN: Final = 0.1  # a prompt is blended if its first token is predicted to come earlier by this share
LMCACHE_CHUNK: Final = 64  # tokens of an LMCache chunk, as `lmcache-rag serve` starts it
VLLM_BLOCK: Final = 16  # tokens of a block of vLLM's prefix cache, its default on CUDA
NEAR_TIE: Final = (
    0.25  # nats: two steps of a bfloat16 logit between 16 and 32, so either token could have been the first
)
SPAN_TOKENS: Final = 16  # a prompt has at most one span for each so many tokens
WORDS: Final = 80  # characters of a client's value that a message or a log line shows
_SHOWN_KEYS, _SHOWN_BITS = 3, 64


class Fallback(StrEnum):
    """Why a request was computed in full: `failure` in its statistics, and the label `reason` of a counter."""

    CANNOT_BLEND = "cannot blend"
    NO_SERVER = "no server"
    LOOKUP_DEADLINE = "look-up deadline"
    LOAD_FAILED = "load failed"
    LOAD_FAILED_ELSEWHERE = "load failed on another rank"
    NO_HOT_COPY = "no copy of hot chunks"
    DAMAGED_KV = "damaged KV"
    OUT_OF_MEMORY = "out of memory"
    REQUEST_ERROR = "request error"
    ADAPTER_CHANGED = "LoRA adapter changed"
    NOT_TEXT = "not text"
    OTHER = "other"

    @classmethod
    def of(cls, failure: str) -> Fallback:
        """The code of a `failure`; OTHER if it is not a code."""
        try:
            return cls(failure)
        except ValueError:
            return cls.OTHER


LOADS: Final = (Fallback.LOAD_FAILED, Fallback.LOAD_FAILED_ELSEWHERE)
SERVER_FAULTS: Final = (Fallback.NO_SERVER, *LOADS)  # only a load that succeeds shows that they have ended

_FALLBACKS: Final[Mapping[str, str]] = {
    Fallback.CANNOT_BLEND: "the server cannot blend",
    Fallback.NO_SERVER: "LMCache does not answer",
    Fallback.LOOKUP_DEADLINE: "LMCache did not answer the look-up in time",
    Fallback.LOAD_FAILED: "LMCache did not load the KV, or not in time",
    Fallback.LOAD_FAILED_ELSEWHERE: "LMCache did not load the KV on another tensor-parallel rank",
    Fallback.NO_HOT_COPY: "the KV in vLLM's own cache cannot be copied",
    Fallback.DAMAGED_KV: "the loaded KV holds numbers that are not finite",
    Fallback.OUT_OF_MEMORY: "the GPU has no memory for the blend",
    Fallback.REQUEST_ERROR: "the connector could not handle the request; vLLM's log has the error",
    Fallback.ADAPTER_CHANGED: "the files of its LoRA adapter have changed since it was loaded",
    Fallback.NOT_TEXT: "its prompt has pictures, sound or embeddings, and only text is blended",
    Fallback.OTHER: "an error in the connector; vLLM's log has it",
}


def fallback_sentence(failure: str) -> str:
    """A `failure` of an answer's statistics in words."""
    return _FALLBACKS.get(failure, failure)


class Decision(StrEnum):
    """Why a request with cached chunks was blended or computed: `decision` in its statistics, and a counter's label."""

    BLENDED = "blended"
    ALWAYS = "blended: always"
    UNKNOWN = "blended: costs unknown"
    MEASURED = "blended: costs measured again"
    NOT_FASTER = "computed: not faster"
    COMPUTED_AGAIN = "computed: costs measured again"


_DECISIONS: Final[Mapping[str, str]] = {
    Decision.BLENDED: "Blended, since that starts the answer earlier than computing the prompt",
    Decision.ALWAYS: "Blended, since the request or the server says always",
    Decision.UNKNOWN: "Blended, since it is not known yet what computing or blending takes",
    Decision.MEASURED: "Blended, to measure again what that takes",
    Decision.NOT_FASTER: "Computed, since blending would not start the answer earlier",
    Decision.COMPUTED_AGAIN: "Computed, to measure again what that takes",
}
COMPUTED: Final = (Decision.NOT_FASTER, Decision.COMPUTED_AGAIN)  # by decision, not for want of KV


def decision_sentence(statistics: Mapping[str, Any]) -> str:
    """The `decision` of an answer's statistics in words, with the times that were predicted; "" if there is none."""
    decision = str(statistics.get(DECISION) or "")
    if not decision:
        return ""
    words = _DECISIONS.get(decision, decision)
    blend, compute = (statistics.get(name) for name in PREDICTED)
    if not isinstance(blend, int | float) or not isinstance(compute, int | float) or not compute:
        return f"{words}."
    return f"{words}: {blend:,.1f} ms blended and {compute:,.1f} ms computed are predicted."


class CannotBlend(StrEnum):
    """Why a server cannot blend any request: `reason` in the statistics of each of its answers."""

    NOT_READY = "not ready"
    NO_WORKER = "no worker reported"
    NO_PLUGIN = "plugin not loaded"
    NEEDS_CUDA = "needs CUDA"
    ROCM = "ROCm"
    SLEEP_MODE = "sleep mode"
    MULTI_CONNECTOR = "MultiConnector"
    LMCACHE_HANDSHAKE = "LMCache handshake"
    LMCACHE_ROPE = "LMCache rotary table"
    MODEL = "model"
    RECURRENT = "recurrent layers"
    PARALLELISM = "parallelism"
    SPECULATIVE = "speculative decoding"
    LORA = "LoRA"
    ATTENTION = "attention"
    KV_CACHE = "KV cache"
    ROTARY = "rotary embedding"
    OTHER_RANK = "another rank"
    SELF_CHECK = "self-check failed"
    SELF_CHECK_ERROR = "self-check could not run"
    ERROR = "error at start"


@dataclass(frozen=True)
class Unsupported:
    """Why blending is off: a code for programs, and the details for people.

    Attributes:
        code: The code.
        detail: A clause that can follow "KV is not blended: ".
    """

    code: CannotBlend
    detail: str

    def __str__(self) -> str:
        return self.detail


# -- statistics in an answer: kv_transfer_params["lmcache_rag"] -------------------------------------------------------

ANSWER: Final = "lmcache_rag"
COUNTS: Final = ("prefix_tokens", "reused_tokens", "recomputed_tokens", "computed_tokens")  # they add up to the prompt
TIMES: Final = ("lookup_ms", "load_ms", "blend_ms")
SELECT_MS: Final = "select_ms"  # the part of blend_ms in which the tokens to recompute are chosen
USED_BEFORE: Final = "used_before"  # with `serve --store second`: starts of named chunks that other prompts had, too
FAILURE: Final = "failure"  # a Fallback, or a sentence if can_blend is false; "" if none
DECISION: Final = "decision"  # a Decision; absent where there was nothing to decide
PREDICTED: Final = ("predicted_blend_ms", "predicted_compute_ms")  # what it compared, where known
FORGOTTEN: Final = "forgotten"  # in answers to lmcache_rag.forget only: whether the chunk's KV was removed
PINNED: Final = "pinned"  # in answers to lmcache_rag.pin only: whether the chunk is pinned now
PINS: Final = "pins"  # with it: `used` and `limit`, bytes of pins, and `tenant`, 1 if they are its tenant's; or nothing
KV_HELD: Final = "held"  # with lmcache_rag.held: objects of the chunk by tier, before this request removed them
CAN_BLEND: Final = "can_blend"  # false in answers of a server that cannot blend at all; else absent
REASON: Final = "reason"  # a CannotBlend, present with can_blend
SELF_CHECK: Final = "self_check"  # a SelfCheck, in answers of a server that blends
BUDGET_TOKENS: Final = "budget_tokens"  # how many tokens of cached chunks were chosen for recomputation
BUDGET_REASON: Final = "budget_reason"  # why so many, a BudgetReason; "" where nothing was blended


class SelfCheck(StrEnum):
    """Result of the self-check at start: a blend against a full prefill. If they differ, the server cannot blend."""

    PASSED = "passed"
    SKIPPED = "skipped"  # lmcache_rag.self_check is false


def answer_statistics(document: Any) -> dict[str, Any] | None:
    """The statistics in an answer of vLLM's API, a JSON object or the openai client's; None: there are none."""
    params = (
        document.get("kv_transfer_params")
        if isinstance(document, Mapping)
        else getattr(document, "kv_transfer_params", None)
    )
    found = params.get(ANSWER) if isinstance(params, Mapping) else None
    return found if isinstance(found, dict) else None


_REASONS: Final[Mapping[str, str]] = {
    BudgetReason.SCORES: "as the question's attention asks for",
    BudgetReason.FLOOR: "the fewest for so many chunks",
    BudgetReason.CEILING: "the most for so many chunks",
    BudgetReason.CHUNKS: "a fixed number for each chunk",
    BudgetReason.FREE: "they cost no time",
    BudgetReason.ALL: "nearly all, so all",
}


def budget_words(reason: str) -> str:
    """Why so many tokens were recomputed, in words: a `budget_reason`; "" where a request or its policy decided it."""
    return f"auto: {_REASONS[reason]}" if reason in _REASONS else ""


def chosen(statistics: Mapping[str, Any]) -> str:
    """The policy and the budget of an answer's statistics, for example "query at 0.15" or "query, auto: 375 tokens"."""
    policy, tokens = statistics.get("policy"), statistics.get(BUDGET_TOKENS, 0)
    reason = statistics.get(BUDGET_REASON)
    if reason in _REASONS:
        return f"{policy}, auto: {tokens:,} tokens"
    if reason == BudgetReason.TOKENS:
        return f"{policy}, {tokens:,} tokens"
    return f"{policy} at {statistics.get('ratio', 0.0):g}"


def cannot_blend(statistics: Mapping[str, Any] | None) -> Unsupported | None:
    """Why the server that sent these statistics cannot blend; None if it can, or does not report it."""
    if not statistics or statistics.get(CAN_BLEND) is not False:
        return None
    code = str(statistics.get(REASON) or "")
    known = CannotBlend(code) if code in {str(each) for each in CannotBlend} else CannotBlend.ERROR
    return Unsupported(known, str(statistics.get(FAILURE) or "it does not report why"))


# -- metrics on vLLM's /metrics ---------------------------------------------------------------------------------------

METRICS: Final = "vllm:lmcache_rag_"  # vLLM unregisters metrics that begin with "vllm:" when an engine is made again
SOURCES: Final = ("prefix", "reused", "recomputed", "computed")
OUTCOMES: Final = ("blended", "prefix", "computed", "unblended")
CHUNK_GAUGE: Final = METRICS + "chunk_tokens"
COST_GAUGE: Final = METRICS + "cost_ms"  # label `cost`: names of lmcache_rag.costs.CostModel.figures
BOUNDARY_GAUGE: Final = METRICS + "blended_from_tokens"  # label `tier`
SERVER_GAUGE: Final = METRICS + "server_info"  # 1; its labels are what servers that share KV have in common
SERVER_FACTS: Final = (
    *("chunk", "weights", "config", "layout", "secret", "prefix_tokens"),
    *("vllm", "lmcache", "lmcache_rag"),
)

# On LMCache's /metrics, where the dot is an underscore and counters end in _total.
INDEX_ENTRIES: Final = "lmcache_rag.index_entries"  # chunks that can be blended
INDEX_ASKED: Final = "lmcache_rag.chunks_asked"  # whole chunks in prompts that were looked up
INDEX_FOUND: Final = "lmcache_rag.chunks_found"  # chunks that the index found in them
INDEX_SIZE: Final = "lmcache_rag.index_size"  # most chunks that the index takes
TIER_DAMAGED: Final = "lmcache_rag.tier_damaged"  # objects of second tiers that are not what was stored
COORDINATOR_ANSWERS: Final = "lmcache_rag.coordinator_answers"  # 1, or 0 while it is away
PINNED_BYTES: Final = "lmcache_rag.pinned_bytes"  # of memory
PIN_LIMIT: Final = "lmcache_rag.pinned_limit_bytes"  # most of them
TENANT_BYTES: Final = "lmcache_rag.tenant_bytes"  # of memory, label `tenant`: of tenants with a budget
TENANT_BUDGET: Final = "lmcache_rag.tenant_budget_bytes"
TENANT_EVICTED: Final = "lmcache_rag.tenant_evicted"  # objects that were evicted, as the tenant was beyond its budget
FLEET_FOUND: Final = "lmcache_rag.chunks_found_elsewhere"  # that only the coordinator knew
LMCACHE_INFO: Final = "lmcache_rag.lmcache_info"  # 1; its labels are LMCACHE_FACTS
LMCACHE_FACTS: Final = ("chunk", "hash", "lmcache", "lmcache_rag")  # hash: digest of what its hash makes of a chunk


def chunk_tokens(metrics: str) -> int:
    """Tokens of an LMCache chunk, by the text of a server's /metrics; 0 if it is not there."""
    found = re.search(rf"^{CHUNK_GAUGE}\{{[^}}]*\}} (\d+)(?:\.0)?$", metrics, re.MULTILINE)
    return int(found[1]) if found else 0


def costs(metrics: str) -> dict[str, float]:
    """What a server's work takes in milliseconds, by the text of its /metrics; empty if it does not say."""
    return _labelled(metrics, COST_GAUGE, "cost")


def boundaries(metrics: str) -> dict[str, float]:
    """From how many tokens on a server blends, by where the KV is, by the text of its /metrics."""
    return _labelled(metrics, BOUNDARY_GAUGE, "tier")


def tenant_bytes(metrics: str, name: str) -> dict[str, float]:
    """A metric by tenant (TENANT_BYTES and the like) by the text of LMCache's /metrics; empty if it is not there."""
    base = name.replace(".", "_")
    found = re.findall(rf'^{base}(?:_total)?\{{[^}}]*tenant="((?:[^"\\]|\\.)*)"[^}}]*\}} (\S+)$', metrics, re.MULTILINE)
    return {re.sub(r"\\(.)", r"\1", tenant): float(value) for tenant, value in found}


def server_facts(metrics: str) -> dict[str, str]:
    """The SERVER_FACTS of a vLLM server, by the text of its /metrics; empty if it does not say."""
    return _facts(metrics, SERVER_GAUGE, SERVER_FACTS)


def lmcache_facts(metrics: str) -> dict[str, str]:
    """The LMCACHE_FACTS of an LMCache server, by the text of its /metrics; empty if it does not say."""
    return _facts(metrics, LMCACHE_INFO.replace(".", "_"), LMCACHE_FACTS)


def _facts(metrics: str, name: str, labels: Iterable[str]) -> dict[str, str]:
    found = re.search(rf"^{name}\{{([^}}]*)\}} 1(?:\.0)?$", metrics, re.MULTILINE)
    known = dict(re.findall(r'(\w+)="([^"]*)"', found[1])) if found else {}
    return {label: known[label] for label in labels if label in known}


def _labelled(metrics: str, name: str, label: str) -> dict[str, float]:
    found = re.findall(rf'^{name}\{{[^}}]*{label}="([^"]*)"[^}}]*\}} (\S+)$', metrics, re.MULTILINE)
    return {key: float(value) for key, value in found}


def hit_tokens(metrics: str) -> int | None:
    """Tokens taken from cached chunks so far, reused or recomputed, by the text of /metrics."""
    source = r'source="(?:reused|recomputed)"'
    found = re.findall(rf"^{METRICS}prompt_tokens_total\{{[^}}]*{source}[^}}]*\}} (\S+)$", metrics, re.MULTILINE)
    return round(sum(map(float, found))) if found else None


def lmcache_number(metrics: str, name: str) -> int | None:
    """A metric of ours (INDEX_ENTRIES and the like) by the text of LMCache's /metrics; None if it is not there."""
    found = re.search(rf"^{name.replace('.', '_')}(?:_total)?(?:\{{[^}}]*\}})? (\S+)$", metrics, re.MULTILINE)
    try:
        return round(float(found[1])) if found else None
    except (ValueError, OverflowError):
        return None


# -- validation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestParams:
    """A request's parameters.

    Attributes:
        policy: Recompute policy.
        budget: How many cached tokens to recompute.
        blend: Whether to blend.
        ingest: Whether the prompt is prefix + chunk, to be stored and indexed.
        forget: Whether the prompt is prefix + chunk, whose KV is to be removed.
        spans: Whether the answer's statistics are to hold `spans`.
        always: Whether to blend even where computing the prompt is as fast.
    """

    policy: str
    budget: Budget
    blend: bool
    ingest: bool = False
    forget: bool = False
    spans: bool = False
    always: bool = False


def shown(value: Any) -> str:
    """A client's value for a message or a log line: at most WORDS characters, none of them a control character.

    Costs the same for values of any size and depth.
    """
    if isinstance(value, Mapping):
        return f"(an object of {len(value)})"
    if isinstance(value, list | tuple):
        return f"(a list of {len(value)})"
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return f"(a number of {value.bit_length()} bits)"
    text = repr(value if not isinstance(value, str) or len(value) <= WORDS else value[:WORDS])
    return text if len(text) <= WORDS else f"{text[: WORDS - 3]}..."


def read_params(
    params: Any, policy: str = DEFAULT_POLICY, ratio: Ratio = DEFAULT_RATIO, blend: bool = True
) -> tuple[RequestParams, list[str]]:
    """Parse a request's parameters. Invalid values are replaced by the defaults and reported. Never raises.

    Args:
        params: Its kv_transfer_params.
        policy: The server's default.
        ratio: The server's default.
        blend: The server's default.

    Returns:
        (parameters, complaints: a clause each).
    """
    values: Mapping[str, Any] = params if isinstance(params, Mapping) else {}
    wrong: list[str] = []
    if isinstance(wanted := values.get(POLICY, policy), str) and wanted in POLICIES:
        policy = wanted
    else:
        wrong.append(f"{POLICY} {shown(wanted)} is none of {', '.join(POLICIES)}")
    budget = read_budget(wanted := values.get(RATIO, ratio))
    if budget is None:
        wrong.append(f"{RATIO} {shown(wanted)} is not {FORMS}")
    switch = values.get(BLEND, blend)
    if isinstance(switch, bool) or (isinstance(switch, str) and switch in ("on", "off", "always")):
        blend = switch not in (False, "off")
    else:
        wrong.append(f"{BLEND} {shown(switch)} is neither on nor off nor always")
    flags = {}
    for key in (INGEST, FORGET, HELD, SPANS, PIN):
        flag = values.get(key, False)
        if not isinstance(flag, bool):
            wrong.append(f"{key} {shown(flag)} is neither true nor false")
        flags[key] = flag is True
    chosen, always = budget or parse_budget(ratio), switch == "always"
    return RequestParams(policy, chosen, blend, flags[INGEST], flags[FORGET], flags[SPANS], always), wrong


def complaints(params: Any, tokens: int = MOST_TOKENS) -> list[str]:
    """Validate a request's kv_transfer_params: returns each error as a clause. Ignores keys that are not ours.

    Never raises. The length of a list is checked before it is read, so a huge one costs no more than a short one.

    Args:
        params: Its kv_transfer_params.
        tokens: Length of its prompt; if that is unknown, of the longest that the server takes.
    """
    if params is None:
        return []
    if not isinstance(params, Mapping):
        return [f"{shown(params)} is not an object"]
    wrong = list(islice(filter(None, map(_refused, params)), _SHOWN_KEYS))
    wrong += read_params(params)[1]
    wrong += _wrong_spans(params.get(CHUNKS, []), tokens)
    for key in (PREFIX, KEEP, MAX_OFFLOAD_TOKENS):
        number = params.get(key, 0)
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            wrong.append(f"{key} {shown(number)} is not a number of tokens")
        elif number > (MOST_TOKENS if key == MAX_OFFLOAD_TOKENS else tokens):
            wrong.append(f"{key} {shown(number)} is more tokens than the prompt has")
    if params.get(INGEST) is True and params.get(FORGET) is True:
        wrong.append(f"{INGEST} and {FORGET} contradict each other")
    if PIN in params and (params.get(INGEST) is True or params.get(FORGET) is True):
        wrong.append(f"{PIN} needs a request of its own, without {INGEST} and {FORGET}")
    tenant = params.get(TENANT, "")
    if not isinstance(tenant, str) or len(tenant) > WORDS or not tenant.isprintable():
        wrong.append(f"{TENANT} {shown(tenant)} is not a name of at most {WORDS} printable characters")
    wrong += [f"{key} needs {FORGET}" for key in (KEEP, HELD) if params.get(key) and params.get(FORGET) is not True]
    return wrong


def accepted(params: Any, tokens: int = MOST_TOKENS, block: int = VLLM_BLOCK) -> dict[str, Any]:
    """The part of kv_transfer_params without `complaints` that the engine gets: our keys and LMCache's.

    Spans outside the prompt are left out: a client that renders a chat template itself may be off by some tokens.
    Chunks shorter than a block of vLLM's cache are left out too, since it holds none of them. The first stays: the
    prefix ends where it begins.

    Args:
        params: A request's kv_transfer_params.
        tokens: Length of its prompt, see `complaints`.
        block: Tokens of a block of vLLM's cache.
    """
    if not isinstance(params, Mapping):
        return {}
    kept = {key: params[key] for key in (*REQUEST_KEYS, *LMCACHE_KEYS) if key in params}
    if kept.get(PREFIX, 0) > tokens:
        del kept[PREFIX]
    if (spans := kept.pop(CHUNKS, None)) and len(spans) <= tokens // SPAN_TOKENS and spans[-1][1] <= tokens:
        kept[CHUNKS] = [span for at, span in enumerate(spans) if not at or span[1] - span[0] >= block]
    return kept


def _refused(key: Any) -> str:
    """Why a key is rejected; "" if it is accepted, or is not ours."""
    if not isinstance(key, str) or key in REQUEST_KEYS or key in LMCACHE_KEYS:
        return ""
    if key.startswith(NAMESPACE):
        return f"{shown(key)} is not known (there are {', '.join(REQUEST_KEYS)})"
    if key.startswith(LMCACHE_NAMESPACE):
        return f"{shown(key)} is not supported (of LMCache's, {', '.join(LMCACHE_KEYS)} is)"
    if key in PD_KEYS or key.startswith(PD_PREFIX):
        return f"{shown(key)} belongs to disaggregated prefill, in which this server takes no part"
    return ""


def _wrong_spans(spans: Any, tokens: int) -> list[str]:
    if not isinstance(spans, list):
        return [f"{CHUNKS} {shown(spans)} is not a list of [start, end], in tokens of the prompt"]
    most = tokens // SPAN_TOKENS
    if len(spans) > most:
        return [f"{CHUNKS} {shown(spans)} has more than {most} spans, one for {SPAN_TOKENS} tokens of the prompt"]
    end = 0
    for number, span in enumerate(spans):
        if not _is_span(span):
            return [f"{CHUNKS}: span {number} is not [start, end], in tokens of the prompt"]
        if span[0] < end:
            return [f"{CHUNKS}: span {number} begins before the end of the one before it"]
        end = span[1]
    return [f"{CHUNKS}: the last span ends after the prompt, at token {shown(end)} of {tokens}"] if end > tokens else []


def _is_span(span: Any) -> bool:
    return (
        isinstance(span, list)
        and len(span) == 2
        and type(span[0]) is int
        and type(span[1]) is int
        and 0 <= span[0] < span[1]
    )


def named_spans(params: Any, prompt: int) -> list[tuple[int, int]]:
    """The chunks' spans in a prompt of that length, as the request names them; empty if they are not valid.

    More spans than `complaints` accepts are not valid. Chunks shorter than a block are left out, as in `accepted`.
    """
    named = params.get(CHUNKS) if isinstance(params, Mapping) else None
    if not isinstance(named, list) or len(named) > prompt // SPAN_TOKENS:
        return []
    spans: list[tuple[int, int]] = []
    last = 0
    for item in named:
        if not (isinstance(item, list | tuple) and len(item) == 2 and all(type(n) is int for n in item)):
            return []
        start, end = item
        if not last <= start < end <= prompt:
            return []
        last = end
        if end - start >= SPAN_TOKENS or not spans:  # the first stays, however short: the prefix ends where it begins
            spans.append((start, end))
    return spans


def named_prefix(params: Any, prompt: int) -> int:
    """Tokens of the prefix that the request names; 0 if it names none, or one longer than the prompt."""
    prefix = params.get(PREFIX) if isinstance(params, Mapping) else None
    return prefix if isinstance(prefix, int) and not isinstance(prefix, bool) and 0 < prefix <= prompt else 0


def chunk_start(params: Any, prompt: int) -> int:
    """Where the chunk of a prompt that is ingested or forgotten begins; 0 if its prefix is not named.

    At the one span that the request names, or else right after the prefix.
    """
    prefix, spans = named_prefix(params, prompt), named_spans(params, prompt)
    return spans[0][0] if prefix and len(spans) == 1 and spans[0][0] >= prefix else prefix


def removal_start(params: Any, prompt: int) -> int:
    """From which token on the KV of a prompt that is forgotten is removed; 0 if nothing may be.

    After the prefix, the neutral passages, and the first tokens of the chunk that are to stay (KEEP).
    """
    start, keep = chunk_start(params, prompt), params.get(KEEP, 0)
    if not start or not isinstance(keep, int) or isinstance(keep, bool) or keep < 0:
        return 0
    return start + keep if start + keep < prompt else 0


def read_held(value: Any) -> dict[str, int]:
    """Objects of a chunk by tier, or figures of pins, as an answer has them; empty if it has none."""
    if not isinstance(value, Mapping):
        return {}
    return {str(tier): count for tier, count in value.items() if isinstance(count, int)}


def tenant_name(tenant: str) -> str:
    """A tenant's name as a request may hold it in TENANT: others are named by their SHA-256."""
    if len(tenant) <= WORDS and tenant.isprintable():
        return tenant
    return hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()


def pins(params: Any) -> bool | None:
    """Whether a request pins its chunk; False if it ends that; None if it does neither."""
    wanted = params.get(PIN) if isinstance(params, Mapping) else None
    return wanted if isinstance(wanted, bool) else None


def ingests(params: Any) -> bool:
    """Whether a request is one chunk after its prefix, to be stored and indexed."""
    return isinstance(params, Mapping) and params.get(INGEST) is True


def joined(clauses: Iterable[str]) -> str:
    """Complaints as one message."""
    return "; ".join(clauses)
