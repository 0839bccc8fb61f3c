"""Requests with LoRA adapters in vLLM's real scheduler: whose KV they find, and how many run at once.

See vllm_scheduler_kit for what is real.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from adapter_kit import write_adapter
from contract_kit import BLOCK, CHUNK
from models import tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from vllm.config.lora import LoRAConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.core import EngineCore

    from lmcache_rag.protocol import CHUNKS, INGEST, PREFIX

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """None, and three adapters."""
    folder, model = tmp_path_factory.mktemp("adapters"), tiny_model("llama")
    paths = [write_adapter(folder / str(number), model, seed=number) for number in (1, 2, 3)]
    return [None, *(LoRARequest(path.name, number, str(path)) for number, path in enumerate(paths, 1))]


def with_slots(slots: int) -> Any:
    return LoRAConfig(max_lora_rank=8, max_loras=slots, max_cpu_loras=slots, lora_dtype=torch.float32)


def test_a_prompt_is_looked_up_under_its_adapter_only(make: Any, adapters: list[Any]) -> None:
    engine, tokens, salts = make(lora=with_slots(3)), list(range(200)), []
    for turn in range(2):
        for number, adapter in enumerate(adapters):
            engine.add_tokens(f"{number}, {turn}", tokens, lora_request=adapter)
            engine.step()
            salts.append(engine.connector.request_trackers[f"{number}, {turn}"].cache_salt)
            engine.to_the_end()
    assert salts[:4] == salts[4:]
    assert len(set(salts)) == 4


def test_a_chunk_is_resident_under_its_adapter_only(make: Any, adapters: list[Any]) -> None:
    """Ingested under each adapter in turn: a query finds the blocks that were computed under its own."""
    engine, prefix, chunk = (
        make(lora=with_slots(3), least_tokens=16),
        list(range(64)),
        list(range(100, 100 + 2 * CHUNK)),
    )
    query = [*prefix, *range(500, 564), *chunk, *range(600, 620)]  # after another chunk, which nobody ingested
    spans = [[64, 128], [128, 128 + len(chunk)]]
    blocks: list[set[int]] = []
    for number, adapter in enumerate(adapters[:3]):
        params = {INGEST: True, PREFIX: len(prefix)}
        engine.add_tokens(f"ingest {number}", prefix + chunk, params, outputs=1, lora_request=adapter)
        engine.to_the_end()
    for number, adapter in enumerate(adapters):
        engine.add_tokens(f"ask {number}", query, {PREFIX: len(prefix), CHUNKS: spans}, lora_request=adapter)
        plans = engine.step().kv_connector_metadata.blend_plans
        blocks.append({match.block for plan in plans for match in plan.matches})
        assert all(plan.adapter == adapter for plan in plans)
        engine.to_the_end()
    assert [len(found) for found in blocks] == [2 * CHUNK // BLOCK] * 3 + [0]
    assert not (blocks[0] & blocks[1] | blocks[1] & blocks[2] | blocks[0] & blocks[2])


@pytest.mark.parametrize("slots", [1, 2])
def test_no_more_adapters_than_slots_at_once(make: Any, adapters: list[Any], slots: int) -> None:
    """Blends in the background count. The base model is not held up."""
    engine = make(lora=with_slots(slots))
    engine.add("runs", 100, 0, outputs=12, adapter=adapters[1] if slots == 2 else None)
    engine.step()
    engine.add("blends", 400, 4, adapter=adapters[2])
    engine.step(slow=6)
    assert engine.beside["blends"] == 1
    engine.add("third", 100, 0, adapter=adapters[3])
    engine.add("base", 100, 0)
    ran = [list(engine.step(slow=6).num_scheduled_tokens) for _ in range(4)]
    assert not any("third" in names for names in ran)
    assert any("base" in names for names in ran)
    engine.to_the_end()
    assert max(map(len, engine.adapters)) == slots
    assert engine.told["blends"]["reused_tokens"] == 224


def test_a_changed_adapter_is_computed_in_full(make: Any, adapters: list[Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = LoRARequest("changes", 4, str(write_adapter(tmp_path / "adapter", model, seed=4)))
    engine = make(lora=with_slots(2))
    engine.add("before", 400, 4, adapter=adapter)
    engine.to_the_end()
    write_adapter(tmp_path / "adapter", model, seed=5)
    engine.add("after", 400, 4, adapter=adapter)
    engine.step()
    tracker = engine.connector.request_trackers["after"]
    assert tracker.max_offload_tokens == 0
    assert "after" not in engine.lookups
    engine.to_the_end()
    assert engine.told["before"]["reused_tokens"] == 224
    assert (engine.told["after"]["reused_tokens"], engine.told["after"]["failure"]) == (0, "LoRA adapter changed")


def test_what_replaces_an_adapter_in_place_is_noticed(make: Any, adapters: list[Any]) -> None:
    """EngineCore.add_lora, which the API server calls: with the patch it reaches the connector."""
    engine = make(lora=with_slots(2))
    first, second = adapters[1:3]
    core = object.__new__(EngineCore)
    core.scheduler, core.model_executor = engine.scheduler, SimpleNamespace(add_lora=lambda request: "added")
    assert core.add_lora(first) == "added"
    engine.add("a", 400, 4, adapter=first)
    engine.add("base", 400, 4)
    engine.step()
    limits = {name: tracker.max_offload_tokens for name, tracker in engine.connector.request_trackers.items()}
    core.add_lora(first)
    assert limits == {name: one.max_offload_tokens for name, one in engine.connector.request_trackers.items()}
    core.add_lora(LoRARequest(first.lora_name, 1, second.lora_path, load_inplace=True))
    assert engine.connector.request_trackers["a"].max_offload_tokens == 0
    assert engine.connector.request_trackers["base"].max_offload_tokens == limits["base"] != 0
    engine.add("late", 400, 4, adapter=first)
    engine.to_the_end()
    assert engine.told["late"]["failure"] == "LoRA adapter changed"
    assert not engine.connector._client._with_adapter
