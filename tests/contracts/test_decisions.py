"""Whether requests are blended, in vLLM's real scheduler: by what it measured, and as the answers and metrics say.

See vllm_scheduler_kit for what is real.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm_scheduler_kit import Lookup

    from lmcache_rag.connector import scheduler
    from lmcache_rag.connector.metadata import BlendHandshakeMetadata
    from lmcache_rag.costs import CostModel
    from lmcache_rag.protocol import SelfCheck

pytestmark = [pytest.mark.filterwarnings("ignore")]

PROMPT = 400


def known() -> CostModel:
    """Prefills take a tenth of a millisecond for each token, a blend's passes little."""
    costs = CostModel(512)
    for size in (16, 64, 256, 512):
        for _ in range(3):
            costs.prefill.observe((size, 0, 0), size * 0.1)
            costs.observe_passes("query", size, 512, 1 + size * 0.01)
    return costs


class Clock:
    """The scheduler's clock, which goes on while it waits for a look-up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.delay = 0.0
        monkeypatch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def use(self, engine: Any) -> None:
        """Have the engine's look-ups take `delay` milliseconds."""

        def look_up(request: Any) -> Lookup:
            found: Lookup = engine.look_up(request)
            poll = found.poll

            def later(seconds: float) -> bool:
                self.now += self.delay / 1e3
                return poll(seconds)

            found.poll = later  # type: ignore[method-assign]
            return found

        engine.use(look_up)


def started(make: Any, costs: CostModel | None, **options: Any) -> Any:
    engine = make(**options)
    state = costs.as_dict() if costs else None
    engine.connector.set_xfer_handshake_metadata({0: BlendHandshakeMetadata(None, SelfCheck.PASSED, state)})
    return engine


def ask(engine: Any, name: str) -> dict[str, Any]:
    """A request alone, to its end."""
    engine.add(name, PROMPT, 4)
    engine.to_the_end()
    found: dict[str, Any] = engine.told[name]
    return found


def test_a_delay_of_50_ms_moves_the_boundary(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, clock = started(make, known()), Clock(monkeypatch)
    clock.use(engine)
    clock.delay = 1.0
    fast = [ask(engine, f"fast {number}") for number in range(4)]
    assert [found["decision"] for found in fast] == [*["blended: costs unknown"] * 3, "blended"]
    assert fast[-1]["predicted_compute_ms"] == pytest.approx(41, rel=0.2)
    clock.delay = 51.0
    slow = [ask(engine, f"slow {number}") for number in range(12)]
    assert slow[0]["decision"] == "blended", "it is not known yet"
    assert {found["decision"] for found in slow[-3:]} == {"computed: not faster"}
    assert (slow[-1]["blended"], slow[-1]["failure"], slow[-1]["computed_tokens"]) == (False, "", PROMPT)
    assert slow[-1]["lookup_ms"] == 0, "it is not even looked up"
    clock.delay = 1.0
    later = [ask(engine, f"later {number}")["decision"] for number in range(150)]
    assert later.count("blended") > 20, "and it is noticed when it is fast again"


def test_min_gain_off_blends_whatever_it_takes(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, clock = started(make, known(), min_gain="off"), Clock(monkeypatch)
    clock.use(engine)
    clock.delay = 51.0
    assert {ask(engine, str(number))["decision"] for number in range(8)} == {"blended: always"}


def test_without_costs_requests_are_blended_as_ever(make: Any) -> None:
    engine = started(make, None)
    assert {ask(engine, str(number))["decision"] for number in range(4)} == {"blended: costs unknown"}


def test_decisions_and_costs_leave_with_the_statistics(make: Any) -> None:
    engine = started(make, known())
    ask(engine, "a")
    stats = engine.connector.get_kv_connector_stats()
    records = stats.records if stats is not None else []
    seen = {gauge for gauge, _, _ in (stats.costs if stats is not None else [])}
    published = engine.connector._scheduler.gate._shown[0] > 0
    assert published or seen
    assert all(record.get("decision") for record in records)


def test_a_computed_request_is_stored_as_exact(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = known()
    for _ in range(10):
        costs.lookup.observe((PROMPT,), 500.0)
    engine = started(make, costs)
    assert ask(engine, "a")["decision"] == "computed: not faster"
    engine.add("again", PROMPT, 4)
    tokens = next(iter(engine.scheduler.requests.values())).prompt_token_ids
    engine.to_the_end()
    engine.add_tokens("twin", list(tokens))
    engine.to_the_end()
    assert engine.told["twin"]["prefix_tokens"] >= PROMPT - 2 * 32, "its blocks serve others"
