"""Reuse statistics of a request, and the counts made from them for vLLM's log and its /metrics.

The scheduler's process makes the statistics and one record for each request. vLLM carries the records as plain data
(BlendStats, a KVConnectorStats) to the API server's process, which alone holds the counters (BlendPromMetrics, a
KVConnectorPromMetrics), also where several API servers share a directory (Prometheus' multi-process mode). These two
extend LMCache's own, whose look-up times stay as they are. The rest can be used without vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from lmcache_rag.budget import Budget, BudgetReason
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.metadata import BlendResult
from lmcache_rag.costs import Forecast
from lmcache_rag.protocol import (
    BOUNDARY_GAUGE,
    BUDGET_REASON,
    BUDGET_TOKENS,
    CAN_BLEND,
    CHUNK_GAUGE,
    COST_GAUGE,
    DECISION,
    FAILURE,
    METRICS,
    OUTCOMES,
    PREDICTED,
    REASON,
    SELECT_MS,
    SERVER_FACTS,
    SERVER_GAUGE,
    SOURCES,
    Decision,
    Fallback,
    Unsupported,
)

if find_spec("vllm"):
    from lmcache.integration.vllm.lmcache_mp_metrics import LMCacheMPConnectorStats, LMCacheMPPromMetrics
else:
    LMCacheMPConnectorStats = LMCacheMPPromMetrics = object

RECORDS = "lmcache_rag_requests"  # our key in the data that vLLM carries
COSTS = "lmcache_rag_costs"  # another one: [gauge, label's value, number] of each figure, where they have changed
FACTS = "lmcache_rag_facts"  # and another one: SERVER_FACTS, once

REASONS = tuple(str(each) for each in Fallback)  # a counter's label needs few values: others count as OTHER
DECISIONS = tuple(map(str, Decision))
TIMES = ("lookup", "load", "blend")
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds


def reuse_statistics(
    prompt: int,
    policy: str,
    budget: Budget,
    *,
    local: int = 0,
    result: BlendResult | None = None,
    failure: str = "",
    lookup_ms: float = 0.0,
    blocks_hit: int = 0,
    spans: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """The reuse statistics of a request as plain numbers; the four token counts add up to its prompt's length.

    Args:
        prompt: Tokens of the prompt.
        policy: Its recompute policy.
        budget: How many of the placed tokens to recompute.
        local: Tokens that vLLM's own prefix cache held.
        result: What a worker did; None when no plan reached one.
        failure: Why nothing was blended; what the worker reports takes precedence.
        lookup_ms: Time of the look-up.
        blocks_hit: Pieces of the plan that the worker had.
        spans: The same as chunks; None: the answer does not hold them.
    """
    if result is not None:
        prefix, reused, recomputed = result.prefix_tokens, result.reused_tokens, result.recomputed_tokens
        failure = result.failure or failure
    else:  # only vLLM's own prefix was reused
        prefix, reused, recomputed = min(local, prompt), 0, 0
    placed = result is not None and not result.failure
    found = {} if spans is None else {"spans": [list(span) for span in spans] if placed else []}
    share = recomputed / (reused + recomputed) if reused + recomputed else 0.0
    return {
        "prompt_tokens": prompt,
        "prefix_tokens": prefix,
        "reused_tokens": reused,
        "recomputed_tokens": recomputed,
        "computed_tokens": prompt - prefix - reused - recomputed,
        "blocks_hit": blocks_hit if placed else 0,
        **found,
        "hot_tokens": result.hot_tokens if result else 0,
        "lookup_ms": round(lookup_ms, 3),
        "load_ms": round(result.load_ms, 3) if result else 0.0,
        "blend_ms": round(result.blend_ms, 3) if result else 0.0,
        SELECT_MS: round(result.select_ms, 3) if result else 0.0,
        "blended": reused > 0,
        "policy": policy,
        "ratio": round(share, 4) if budget.share is None else budget.share,
        BUDGET_TOKENS: recomputed,
        BUDGET_REASON: result.budget_reason if result else "",
        FAILURE: str(failure),
    }


def decision_statistics(decision: str, forecast: Forecast | None) -> dict[str, Any]:
    """The fields for a decision, see lmcache_rag.protocol.Decision; none where nothing was decided."""
    if not decision:
        return {}
    times = (forecast.blend_ms, forecast.compute_ms) if forecast else ()
    return {DECISION: str(decision), **{name: round(ms, 3) for name, ms in zip(PREDICTED, times, strict=False)}}


def unblended_statistics(
    prompt: int, cached: int, policy: str, budget: Budget, unsupported: Unsupported, *, spans: bool = False
) -> dict[str, Any]:
    """The statistics of a request to a server that cannot blend at all; only these hold `can_blend` and `reason`.

    Args:
        prompt: Tokens of the prompt.
        cached: How many of them vLLM or LMCache held.
        policy: The server's default.
        budget: The server's default.
        unsupported: Why it cannot.
        spans: Whether the request asked for `spans`.
    """
    held = max(min(cached, prompt - 1), 0)  # the last token is always computed
    no_spans: list[Any] | None = [] if spans else None
    found = reuse_statistics(prompt, policy, budget, local=held, failure=unsupported.detail, spans=no_spans)
    return {**found, CAN_BLEND: False, REASON: str(unsupported.code)}


def record(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a request that the metrics count, from its reuse statistics."""
    failure = str(statistics["failure"])
    blended = bool(statistics["blended"])
    found: dict[str, Any] = {source: int(statistics[f"{source}_tokens"]) for source in SOURCES}
    found["hot"] = int(statistics["hot_tokens"])
    found["outcome"] = "blended" if blended else "prefix" if found["prefix"] else "computed"
    if failure:
        found["fallback"] = str(Fallback.of(failure))
    if reason := statistics.get(BUDGET_REASON):
        found["budget"] = str(reason)
    if statistics.get(DECISION):
        found["decision"] = str(statistics[DECISION])
    # A stage that did not run took no time; a load that failed did.
    seconds = {name: float(statistics[f"{name}_ms"]) / 1e3 for name in TIMES}
    return found | {name: value for name, value in seconds.items() if value > 0}


def unblended_record(prompt: int, cached: int) -> dict[str, Any]:
    """The record of a request on a server that cannot blend: it was served as by stock vLLM.

    Args:
        prompt: Tokens of the prompt.
        cached: How many of them vLLM or LMCache held.
    """
    prefix = max(min(cached, prompt - 1), 0)  # the last token is always computed
    tokens = {"prefix": prefix, "reused": 0, "recomputed": 0, "computed": prompt - prefix, "hot": 0}
    return {**tokens, "outcome": "unblended", "fallback": str(Fallback.CANNOT_BLEND)}


def summary(records: Iterable[Mapping[str, Any]]) -> dict[str, int | float]:
    """Summary of an interval's requests, for vLLM's log."""
    items = list(records)
    if not items:
        return {}
    shown: dict[str, int | float] = {
        "Requests blended": sum(item["outcome"] == "blended" for item in items),
        "Requests not blended": sum(item["outcome"] != "blended" for item in items),
        "Fallbacks": sum("fallback" in item for item in items),
    }
    if not_faster := sum(item.get("decision") == Decision.NOT_FASTER for item in items):
        shown["Computed as that is as fast"] = not_faster
    for source in SOURCES:
        shown[f"Tokens {source}"] = sum(item[source] for item in items)
    for name in TIMES:
        seconds = [item[name] for item in items if name in item]
        if seconds:
            shown[f"Avg {name} (ms)"] = round(sum(seconds) / len(seconds) * 1e3, 3)
    return shown


def publish_chunk_size(
    gauge: Callable[..., Any], labelnames: list[str], engines: Mapping[int, list[Any]], tokens: int
) -> None:
    """Publish on /metrics how many tokens an LMCache chunk has: clients pad what their prompts share to whole chunks.

    Args:
        gauge: Makes a gauge, called as prometheus_client.Gauge is, by keywords.
        labelnames: Labels that each metric of vLLM has.
        engines: Their values for each engine.
        tokens: Tokens of a chunk.
    """
    made = gauge(
        name=CHUNK_GAUGE,
        documentation="Tokens of an LMCache chunk.",
        labelnames=labelnames,
        multiprocess_mode="mostrecent",
    )
    for values in engines.values():
        made.labels(*values).set(tokens)


class CostGauges:
    """What an engine's work takes, and from how many tokens on it blends.

    Args:
        gauge: Makes a gauge, called as prometheus_client.Gauge is, by keywords.
        labelnames: Labels that each metric of vLLM has.
        engines: Their values for each engine.
    """

    def __init__(self, gauge: Callable[..., Any], labelnames: list[str], engines: Mapping[int, list[Any]]) -> None:
        self._engines = engines
        self._gauges = {
            name: gauge(
                name=name,
                documentation=about,
                labelnames=[*labelnames, label],
                multiprocess_mode="mostrecent",
            )
            for name, label, about in (
                (COST_GAUGE, "cost", "What an engine's work takes for so many tokens, in milliseconds, as measured."),
                (BOUNDARY_GAUGE, "tier", "Prompts of so many tokens on are blended, by where their KV is; 0: none."),
            )
        }

    def observe(self, figures: Iterable[Sequence[Any]], engine: int = 0) -> None:
        """Publish these figures."""
        for name, value, number in figures:
            self._gauges[name].labels(*self._engines[engine], value).set(number)


class ServerInfo:
    """What servers that share KV have in common, as labels of a gauge that is 1.

    Args:
        gauge: Makes a gauge, called as prometheus_client.Gauge is, by keywords.
        labelnames: Labels that each metric of vLLM has.
        engines: Their values for each engine.
    """

    def __init__(self, gauge: Callable[..., Any], labelnames: list[str], engines: Mapping[int, list[Any]]) -> None:
        self._engines = engines
        self._gauge = gauge(
            name=SERVER_GAUGE,
            documentation="What servers have to have in common to share KV: digests and versions.",
            labelnames=[*labelnames, *SERVER_FACTS],
            multiprocess_mode="mostrecent",
        )

    def observe(self, found: Iterable[Mapping[str, str]], engine: int = 0) -> None:
        """Publish these facts."""
        for facts in found:
            self._gauge.labels(*self._engines[engine], *(facts.get(name, "") for name in SERVER_FACTS)).set(1)


class Counters:
    """The counters and histograms of each engine.

    Args:
        counter: Makes a counter, called as prometheus_client.Counter is, by keywords.
        histogram: Likewise.
        labelnames: Labels that each metric of vLLM has.
        engines: Their values for each engine.
    """

    def __init__(
        self,
        counter: Callable[..., Any],
        histogram: Callable[..., Any],
        labelnames: list[str],
        engines: Mapping[int, list[Any]],
    ) -> None:
        def each(metric: Any, values: Iterable[str]) -> dict[tuple[int, str], Any]:
            # Made at start, so that a counter which was never incremented can be read as 0.
            return {(engine, one): metric.labels(*own, one) for engine, own in engines.items() for one in values}

        def counted(name: str, about: str, label: str, values: Iterable[str]) -> dict[tuple[int, str], Any]:
            made = counter(name=METRICS + name, documentation=about, labelnames=[*labelnames, label])
            return each(made, values)

        self._requests = counted("requests", "Finished requests by what was reused of their prompt.", "how", OUTCOMES)
        self._tokens = counted("prompt_tokens", "Prompt tokens by where their KV came from.", "source", SOURCES)
        self._fallbacks = counted("fallbacks", "Requests computed in full, by reason.", "reason", REASONS)
        why = "Blended requests by why so many tokens were recomputed."
        self._budgets = counted("budgets", why, "reason", [str(each) for each in BudgetReason])
        self._decisions = counted(
            "decisions", "Requests with cached chunks, by whether they were blended and why.", "decision", DECISIONS
        )
        hot = counter(
            name=f"{METRICS}hot_tokens",
            documentation="Reused and recomputed tokens whose KV vLLM itself still held.",
            labelnames=labelnames,
        )
        self._hot = {engine: hot.labels(*own) for engine, own in engines.items()}
        self._times: dict[tuple[int, str], Any] = {}
        for name, about in (
            ("lookup", "From a request's look-up to its result, in seconds."),
            ("load", "Time of loading KV for a request, in seconds."),
            ("blend", "Time of selecting and recomputing tokens of a request, in seconds."),
        ):
            made = histogram(
                name=f"{METRICS}{name}_seconds", documentation=about, labelnames=labelnames, buckets=list(BUCKETS)
            )
            self._times |= {(engine, name): made.labels(*own) for engine, own in engines.items()}

    def observe(self, records: Iterable[Mapping[str, Any]], engine: int = 0) -> None:
        """Count these requests."""
        for item in records:
            self._requests[engine, item["outcome"]].inc()
            for source in SOURCES:
                self._tokens[engine, source].inc(item[source])
            self._hot[engine].inc(item["hot"])
            if "fallback" in item:
                self._fallbacks[engine, item["fallback"]].inc()
            if "budget" in item:
                self._budgets[engine, item["budget"]].inc()
            if "decision" in item:
                self._decisions[engine, item["decision"]].inc()
            for name in TIMES:
                if name in item:
                    self._times[engine, name].observe(item[name])


@dataclass
class BlendStats(LMCacheMPConnectorStats):  # type: ignore[misc]
    """LMCache's observations of an interval, and one record for each request that ended in it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data.setdefault(RECORDS, [])
        self.data.setdefault(COSTS, [])
        self.data.setdefault(FACTS, [])

    @property
    def records(self) -> list[dict[str, Any]]:
        """See `record`."""
        found: list[dict[str, Any]] = self.data[RECORDS]
        return found

    @property
    def costs(self) -> list[list[Any]]:
        """Figures for CostGauges."""
        found: list[list[Any]] = self.data[COSTS]
        return found

    @property
    def facts(self) -> list[dict[str, str]]:
        """See ServerInfo."""
        found: list[dict[str, str]] = self.data[FACTS]
        return found

    def clone_and_reset(self) -> BlendStats:
        """Return the observations of this interval, and begin a new one."""
        taken = BlendStats(data=self.data)
        self.reset()
        return taken

    def reset(self) -> None:
        """Begin a new interval."""
        super().reset()
        self.data[RECORDS], self.data[COSTS], self.data[FACTS] = [], [], []

    def aggregate(self, other: Any) -> BlendStats:
        """Merge the observations of another interval, or another rank."""
        super().aggregate(other)
        self.records.extend(other.data.get(RECORDS, ()))
        self.costs.extend(other.data.get(COSTS, ()))
        self.facts.extend(other.data.get(FACTS, ()))
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        return {**super().reduce(), **summary(self.records)}

    def is_empty(self) -> bool:
        """Whether nothing was observed."""
        return bool(super().is_empty()) and not self.records and not self.costs and not self.facts


class BlendPromMetrics(LMCacheMPPromMetrics):  # type: ignore[misc]
    """LMCache's metrics and ours."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[Any]]
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = Counters(self._counter_cls, self._histogram_cls, labelnames, per_engine_labelvalues)
        self._costs = CostGauges(self._gauge_cls, labelnames, per_engine_labelvalues)
        self._info = ServerInfo(self._gauge_cls, labelnames, per_engine_labelvalues)
        options = ConnectorOptions.read(vllm_config.kv_transfer_config.get_from_extra_config)
        if options.chunk_size:
            publish_chunk_size(self._gauge_cls, labelnames, per_engine_labelvalues, options.chunk_size)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count the requests that ended in a step."""
        super().observe(transfer_stats_data, engine_idx)
        self._counters.observe(transfer_stats_data.get(RECORDS, ()), engine_idx)
        self._costs.observe(transfer_stats_data.get(COSTS, ()), engine_idx)
        self._info.observe(transfer_stats_data.get(FACTS, ()), engine_idx)
