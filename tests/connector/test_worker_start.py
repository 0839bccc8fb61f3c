"""Getting ready to blend: whatever goes wrong is a reason, and ranks go on together or not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_rag.connector import vllm_internals, vllm_patches
from lmcache_rag.connector import worker as worker_module
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.protocol import CannotBlend, Unsupported

CONFIG = SimpleNamespace(
    kv_transfer_config=SimpleNamespace(
        kv_load_failure_policy="recompute", get_from_extra_config=lambda key, default: default
    ),
    scheduler_config=SimpleNamespace(async_scheduling=True),
)

ADAPTER = SimpleNamespace(parallel_strategy=SimpleNamespace(vllm_worker_id=0, vllm_world_size=1))


class World:
    """What a worker gets ready, noted in `done`; `fails` is where it goes wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "", *, others: bool = True) -> None:
        self.done: list[str] = []
        self.fails, self.others = fails, others
        self.reason: Unsupported | None = None
        self.wrong: Unsupported | None = None
        runner = SimpleNamespace(get_model=lambda: self.does("model"))
        worker = SimpleNamespace(model_runner=runner)
        monkeypatch.setattr(vllm_patches, "worker", lambda: worker)
        self.layer = SimpleNamespace(kv_cache_dtype="auto")
        self.told: tuple[Any, ...] = ()  # LMCache, of the rotary table
        monkeypatch.setattr(vllm_internals, "attention_layers", lambda config: {"a layer": self.layer})
        monkeypatch.setattr(vllm_internals, "true_on_all_ranks", lambda fine: self.does("vote") or (fine and others))
        monkeypatch.setattr(vllm_patches, "patch_execute_model", lambda: self.does("wrap"))
        monkeypatch.setattr(vllm_patches, "patch_run_fullgraph", lambda: None)
        monkeypatch.setattr(
            worker_module.lmcache_transfers, "LMCacheLoader", lambda adapter, deadline, address, absent: self
        )
        monkeypatch.setattr(worker_module, "VLLMModel", lambda config, runner: self)
        monkeypatch.setattr(worker_module, "rotary_of", lambda model: SimpleNamespace(
            cos_sin_cache=None, head_size=16, is_neox_style=True
        ))  # fmt: skip
        monkeypatch.setattr(worker_module, "run_self_check", lambda *given: self.does("check") or self.wrong)
        monkeypatch.setattr(worker_module, "costs_file", lambda config: None)
        monkeypatch.setattr(worker_module, "measure_costs", lambda *given: self.does("costs") or {"version": 1})
        monkeypatch.setattr(worker_module, "unsupported_reason", lambda config, model: self.reason)

    def does(self, what: str) -> None:
        self.done.append(what)
        if what == self.fails:
            raise ValueError("arange's range must be a power of 2")

    def unsupported_reason(self) -> None:
        """The server can."""

    def register_rope(self, *given: Any) -> str:
        self.told = given
        self.does("table")
        return "it was not taken" if self.fails == "refused" else ""

    def warm_up(self) -> None:
        self.does("warm up")

    def capture(self) -> None:
        self.does("capture")

    def gpu_copy(self) -> Any:
        return SimpleNamespace(warm_up=lambda: self.does("hot"))

    def prepared(self, **options: Any) -> worker_module.WorkerStart:
        return worker_module.start_worker(CONFIG, ADAPTER, ConnectorOptions(**options))


ALL = ["model", "table", "warm up", "hot", "vote", "capture", "check", "wrap", "costs"]


def test_it_blends_when_all_went_well(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    side, why_not, self_check, costs, file = world.prepared()
    assert (costs, file) == ({"version": 1}, "")
    assert why_not is None
    assert side is not None
    assert self_check == "passed"
    assert world.done == ALL


def test_the_self_check_can_be_left_out_which_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(monkeypatch, "check")
    side, why_not, self_check, *_ = world.prepared(self_check=False)
    assert side is not None
    assert (why_not, self_check) == (None, "skipped")
    assert "self_check is off" in caplog.text
    assert "check" not in world.done


def test_a_blend_that_is_wrong_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.wrong = Unsupported(CannotBlend.SELF_CHECK, "logits differ")
    assert world.prepared()[:3] == (None, world.wrong, None)
    assert "wrap" not in world.done, "vLLM's worker is left as it is"


def test_hot_chunks_are_prepared_only_if_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, "hot")
    side, why_not, *_ = world.prepared(hot=False)
    assert (side is not None, why_not) == (True, None)
    assert "hot" not in world.done


@pytest.mark.parametrize("fails", [name for name in ALL if name not in ("vote", "costs")])
def test_what_goes_wrong_is_told_and_does_not_end_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    world = World(monkeypatch, fails)
    side, why_not, self_check, *_ = world.prepared()
    assert (side, self_check) == (None, None)
    detail = "blend initialisation failed: ValueError: arange's range must be a power of 2"
    assert why_not == Unsupported(CannotBlend.ERROR, detail)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "vote" in world.done, "the other ranks wait for it"
    if ALL.index(fails) < ALL.index("vote"):
        assert world.done[-1] == "vote"


def test_a_reason_that_is_known_is_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    world = World(monkeypatch, "refused")
    assert world.prepared()[:3] == (None, Unsupported(CannotBlend.LMCACHE_ROPE, "it was not taken"), None)
    world.reason = Unsupported(CannotBlend.LORA, "adapters")
    assert world.prepared()[:3] == (None, world.reason, None)
    assert caplog.records == []


def test_where_another_rank_cannot_none_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, others=False)
    assert world.prepared()[:3] == (None, Unsupported(CannotBlend.OTHER_RANK, "another rank cannot blend"), None)
    assert world.done == ALL[: ALL.index("vote") + 1]


def test_without_the_plugin_there_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    World(monkeypatch)
    monkeypatch.setattr(vllm_patches, "worker", lambda: None)
    side, why_not, *_ = worker_module.start_worker(CONFIG, ADAPTER, ConnectorOptions())
    assert side is None
    assert why_not is not None
    assert why_not.code == CannotBlend.NO_PLUGIN
    assert "plugin" in why_not.detail


@pytest.mark.parametrize(
    ("policy", "asynchronous", "takes"),
    [("recompute", False, True), ("recompute", True, False), ("recompute", None, False), ("fail", False, False)],
)
def test_damage_is_reported_only_if_vllm_recomputes(
    monkeypatch: pytest.MonkeyPatch, policy: str, asynchronous: bool | None, takes: bool
) -> None:
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_load_failure_policy=policy, get_from_extra_config=lambda key, default: default
        ),
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
    )
    World(monkeypatch)
    side, *_ = worker_module.start_worker(config, ADAPTER, ConnectorOptions())
    assert side is not None
    assert side._vllm_recomputes_bad_blocks == takes


@pytest.mark.parametrize(
    ("kind", "told"), [("auto", ""), ("bfloat16", ""), ("fp8", "fp8_e4m3"), ("fp8_e4m3", "fp8_e4m3")]
)
def test_lmcache_is_told_of_fp8_kv(monkeypatch: pytest.MonkeyPatch, kind: str, told: str) -> None:
    """It gets bytes, whose meaning it cannot know."""
    world = World(monkeypatch)
    world.layer.kv_cache_dtype = kind
    assert world.prepared().worker is not None
    assert world.told == (None, 16, True, told)
