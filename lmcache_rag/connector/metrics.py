"""What the connector counts: one record for each request, summed up for vLLM's log and its /metrics.

Knows neither vLLM nor Prometheus. The scheduler's process makes the records; vLLM carries them as plain data to the API
server's process, which alone holds the counters, also where several of those share a directory (multi-process mode).
lmcache_rag.connector.stats ties this to vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lmcache_rag.protocol import CHUNK_GAUGE, METRICS, OUTCOMES, SOURCES, Fallback

RECORDS = "lmcache_rag_requests"  # our key in the data that vLLM carries

REASONS = tuple(str(each) for each in Fallback)  # a counter's label needs few values: others count as OTHER
TIMES = ("lookup", "load", "blend")
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds


def record(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """What is counted of a request's reuse statistics (lmcache_rag.connector.scheduler.statistics)."""
    failure = str(statistics["failure"])
    blended = bool(statistics["blended"])
    found: dict[str, Any] = {source: int(statistics[f"{source}_tokens"]) for source in SOURCES}
    found["hot"] = int(statistics["hot_tokens"])
    found["outcome"] = "blended" if blended else "prefix" if found["prefix"] else "computed"
    if failure:
        found["fallback"] = str(Fallback.of(failure))
    # What was not done took no time; a load that failed did.
    seconds = {name: float(statistics[f"{name}_ms"]) / 1e3 for name in TIMES}
    return found | {name: value for name, value in seconds.items() if value > 0}


def unblended(prompt: int, cached: int) -> dict[str, Any]:
    """The record of a request that this server cannot blend: it was served as stock vLLM does.

    Args:
        prompt: Tokens of the prompt.
        cached: How many of them vLLM or LMCache held.
    """
    prefix = max(min(cached, prompt - 1), 0)  # the last token is always computed
    tokens = {"prefix": prefix, "reused": 0, "recomputed": 0, "computed": prompt - prefix, "hot": 0}
    return {**tokens, "outcome": "unblended", "fallback": str(Fallback.CANNOT_BLEND)}


def summary(records: Iterable[Mapping[str, Any]]) -> dict[str, int | float]:
    """What vLLM's log says of the requests of an interval."""
    items = list(records)
    if not items:
        return {}
    said: dict[str, int | float] = {
        "Requests blended": sum(item["outcome"] == "blended" for item in items),
        "Requests not blended": sum(item["outcome"] != "blended" for item in items),
        "Fallbacks": sum("fallback" in item for item in items),
    }
    for source in SOURCES:
        said[f"Tokens {source}"] = sum(item[source] for item in items)
    for name in TIMES:
        seconds = [item[name] for item in items if name in item]
        if seconds:
            said[f"Avg {name} (ms)"] = round(sum(seconds) / len(seconds) * 1e3, 3)
    return said


def show_chunk(gauge: Callable[..., Any], labelnames: list[str], engines: Mapping[int, list[Any]], tokens: int) -> None:
    """Put on /metrics how many tokens an LMCache chunk has: clients pad what their prompts share to whole chunks.

    Args:
        gauge: Makes a gauge, called as prometheus_client.Gauge is, by keywords.
        labelnames: Labels that each metric of vLLM has.
        engines: Their values for each engine.
        tokens: So many.
    """
    made = gauge(
        name=CHUNK_GAUGE,
        documentation="Tokens of an LMCache chunk.",
        labelnames=labelnames,
        multiprocess_mode="mostrecent",
    )
    for given in engines.values():
        made.labels(*given).set(tokens)


class Meters:
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
            # Made at once, so that a counter which never moved can be read as 0.
            return {(engine, one): metric.labels(*given, one) for engine, given in engines.items() for one in values}

        def counted(name: str, about: str, label: str, values: Iterable[str]) -> dict[tuple[int, str], Any]:
            made = counter(name=METRICS + name, documentation=about, labelnames=[*labelnames, label])
            return each(made, values)

        self._requests = counted("requests", "Finished requests by what was reused of their prompt.", "how", OUTCOMES)
        self._tokens = counted("prompt_tokens", "Prompt tokens by where their KV came from.", "source", SOURCES)
        self._fallbacks = counted("fallbacks", "Requests computed in full, by reason.", "reason", REASONS)
        hot = counter(
            name=f"{METRICS}hot_tokens",
            documentation="Reused and recomputed tokens whose KV vLLM itself still held.",
            labelnames=labelnames,
        )
        self._hot = {engine: hot.labels(*given) for engine, given in engines.items()}
        self._times: dict[tuple[int, str], Any] = {}
        for name, about in (
            ("lookup", "From a request's look-up to its result, in seconds."),
            ("load", "Time of loading KV for a request, in seconds."),
            ("blend", "Time of selecting and recomputing tokens of a request, in seconds."),
        ):
            made = histogram(
                name=f"{METRICS}{name}_seconds", documentation=about, labelnames=labelnames, buckets=list(BUCKETS)
            )
            self._times |= {(engine, name): made.labels(*given) for engine, given in engines.items()}

    def observe(self, records: Iterable[Mapping[str, Any]], engine: int = 0) -> None:
        """Count these requests."""
        for item in records:
            self._requests[engine, item["outcome"]].inc()
            for source in SOURCES:
                self._tokens[engine, source].inc(item[source])
            self._hot[engine].inc(item["hot"])
            if "fallback" in item:
                self._fallbacks[engine, item["fallback"]].inc()
            for name in TIMES:
                if name in item:
                    self._times[engine, name].observe(item[name])
