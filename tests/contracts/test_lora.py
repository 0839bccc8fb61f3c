"""Passes with LoRA adapters through vLLM's own model and its own LoRA layers on a CPU.

See test_forward.py. The reference is vLLM's own prefill under an adapter, and transformers with the adapter merged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from contract_kit import vllm_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from adapter_kit import merged, write_adapter
    from forward_kit import BLOCK, LENGTH, NEAR, SIZE, Pair
    from vllm.config import set_current_vllm_config
    from vllm.config.lora import LoRAConfig
    from vllm.lora.request import LoRARequest

    from lmcache_rag.budget import Budget
    from lmcache_rag.connector.attention import PagedSequence
    from lmcache_rag.connector.blend_pass import BlendPass
    from lmcache_rag.connector.self_check import take_steps
    from lmcache_rag.policies import QueryPolicy

pytestmark = [pytest.mark.own_version, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("group")]
MERGED = {"atol": 1e-3, "rtol": 1e-3}  # a merged weight is rounded once, an adapter's share apart


class Adapted(Pair):
    """A pair with adapters; `wanted` has what transformers makes of the prompt with each, and without (None)."""

    def __init__(self, folder: Path, family: str, *, slots: int = 2, adapters: int = 2) -> None:
        lora = LoRAConfig(max_lora_rank=8, max_loras=slots, max_cpu_loras=slots, lora_dtype=torch.float32)
        super().__init__(folder / "model", family, "default", lora)
        self.adapters: list[Any] = [None]
        self.wanted = [(self.logits, self.kv)]
        for number in range(1, adapters + 1):
            path = write_adapter(folder / f"adapter-{number}", self.reference, seed=number)
            self.adapters.append(LoRARequest(f"adapter-{number}", number, str(path)))
            self.wanted.append(self.expected(merged(self.reference, path)))
        self.own = [self.prefill(adapter) for adapter in self.adapters]
        self.blendable = self.plain()

    def passed(self, number: int, *, pieces: int = 70) -> torch.Tensor:
        """Logits of the whole prompt by passes of ours with an adapter, by its number."""
        with self.blendable.using(self.adapters[number]):
            found = [self.forward(self.blendable, at, int(at[-1]) + 1) for at in torch.arange(LENGTH).split(pieces)]
        return torch.cat(found)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's runner for CPUs does
        yield Adapted(tmp_path_factory.mktemp(request.param), request.param)


def test_our_pass_gives_vllms_own_logits_with_lora(adapted: Adapted) -> None:
    for number, (own, (logits, kv)) in enumerate(zip(adapted.own, adapted.wanted, strict=True)):
        torch.testing.assert_close(own, logits, **MERGED)
        torch.testing.assert_close(adapted.passed(number), own, **NEAR)
        for layer, wanted in enumerate(kv):
            torch.testing.assert_close(adapted.stored(layer), wanted, **MERGED)


def test_adapters_and_the_model_in_turn_do_not_mix(adapted: Adapted) -> None:
    """Pieces of three prompts that are computed in turn, as of requests in the background of one step."""
    model = adapted.blendable
    sequences = [PagedSequence.of(range(1 + 5 * n, 6 + 5 * n), BLOCK, "cpu") for n in range(3)]
    logits: list[list[torch.Tensor]] = [[], [], []]
    for positions in torch.arange(LENGTH).split(40):
        for number in (2, 0, 1):
            adapted.sequence = sequences[number]
            with model.using(adapted.adapters[number]):
                logits[number].append(adapted.forward(model, positions, int(positions[-1]) + 1))
    found = [torch.cat(parts) for parts in logits]
    for number in range(3):
        torch.testing.assert_close(found[number], adapted.own[number], **NEAR)
        for other in {0, 1, 2} - {number}:
            assert not torch.allclose(found[number], adapted.own[other], atol=0.1), "adapters do nothing here"


def test_the_steps_own_mapping_is_put_back(adapted: Adapted) -> None:
    """A pass within a step of two other requests, one with an adapter and one without, set by the runner before."""
    manager, model = adapted.runner.lora_manager._adapter_manager, adapted.blendable
    first, second = adapted.adapters[1:3]

    def state() -> list[Any]:
        (wrapper,) = manager.punica_wrapper_mapping.values()
        return [
            list(wrapper.indices_len),
            wrapper.token_lora_indices.tolist(),
            wrapper.sampler_indices.tolist(),
            [part.tolist() if isinstance(part, torch.Tensor) else part for part in wrapper.prefill_metadata],
            wrapper.no_lora,
        ]

    adapted.runner._set_active_loras((1, 0), (1,) * 9 + (0,) * 5, {first})
    before = state()
    with model.step_adapters():
        with model.using(second):
            adapted.forward(model, torch.arange(70), 70)
        assert state() != before
        with model.using(None):
            adapted.forward(model, torch.arange(70), 70)
    assert state() == before
    with model.step_adapters():
        pass
    assert state() == before


def test_an_adapter_takes_no_slot_of_the_steps(adapted: Adapted, tmp_path: Path) -> None:
    """There are two slots. Where a step needs both, another adapter waits; it may take one of an idle step."""
    model, third = (
        adapted.blendable,
        LoRARequest("adapter-3", 3, str(write_adapter(tmp_path, adapted.reference, seed=3))),
    )
    first, second = adapted.adapters[1:3]
    adapted.runner._set_active_loras((1, 0), (1, 0), {first})
    assert model.has_slot(None)
    assert model.has_slot(first)
    assert model.has_slot(third)
    adapted.runner._set_active_loras((1, 2), (1, 2), {first, second})
    assert model.has_slot(None)
    assert model.has_slot(second)
    assert not model.has_slot(third)
    with model.step_adapters(), model.using(third):  # an idle step: the mapping is that of the step before
        adapted.forward(model, torch.arange(70), 70)
    torch.testing.assert_close(adapted.passed(1), adapted.own[1], **NEAR)
    torch.testing.assert_close(adapted.passed(2), adapted.own[2], **NEAR)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_blend_at_ratio_one_equals_a_prefill(adapted: Adapted, number: int) -> None:
    """Over KV of the chunk that another adapter computed: all of it is computed again."""
    end = LENGTH - 1
    adapted.passed((number + 1) % 3)
    with (
        torch.inference_mode(),
        set_current_vllm_config(adapted.config),
        adapted.blendable.using(adapted.adapters[number]),
    ):
        adapted.forward(adapted.blendable, torch.arange(BLOCK), BLOCK)  # the exact prefix
        blend = BlendPass(adapted.blendable, adapted.sequence, chunk_size=40)
        steps = blend.run(
            adapted.ids,
            [(BLOCK + 3, BLOCK + 60), (BLOCK + 65, BLOCK + 90)],
            BLOCK,
            policy=QueryPolicy(),
            budget=Budget(share=1.0),
            end=end,
            with_last_token=True,
        )
        outcome = take_steps(steps)
        logits = adapted.blendable.logits(outcome.hidden)
    assert logits is not None
    torch.testing.assert_close(logits, adapted.own[number][end:], **NEAR)
    for layer, wanted in enumerate(adapted.wanted[number][1]):
        torch.testing.assert_close(adapted.stored(layer), wanted, **MERGED)


def test_runners_set_adapters_before_the_connector() -> None:
    """A step's mapping is there when its blends run, and is set again after those that begin before the step."""
    text = (vllm_folder() / "v1/worker/gpu/model_runner.py").read_text()
    execute = text[text.index("    def execute_model(") :]
    own = execute.index("self._set_active_loras(")
    assert execute.index("self.prepare_inputs(") < own < execute.index("self.kv_connector.pre_forward(")
    text = (vllm_folder() / "v1/worker/gpu_model_runner.py").read_text()
    assert "self.set_active_loras(" in text[text.index("    def _prepare_inputs(") :]
    execute = text[text.index("    def execute_model(") :]
    assert execute.index("self._prepare_inputs(") < execute.index("self.maybe_get_kv_connector_output(")


def test_an_adapter_loaded_in_place_is_read_once(adapted: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reads such an adapter's files again in each step of its requests."""
    again = msgspec.structs.replace(adapted.adapters[1], load_inplace=True)
    with adapted.blendable.using(again):
        adapted.forward(adapted.blendable, torch.arange(70), 70)
        monkeypatch.setattr(type(adapted.runner.lora_manager), "_load_adapter", None)
        adapted.forward(adapted.blendable, torch.arange(70), 70)


def test_a_start_with_lora_compares_the_model_alone(adapted: Adapted) -> None:
    """The self-check at start runs before any adapter was loaded, and its logits are of more rows than requests."""
    hidden = torch.randn(9, 4 * SIZE)
    with torch.inference_mode(), set_current_vllm_config(adapted.config):
        found = adapted.blendable.logits(hidden)
        with adapted.blendable.using(adapted.adapters[1]):
            torch.testing.assert_close(adapted.blendable.logits(hidden), found)
    torch.testing.assert_close(found, adapted.reference.lm_head(hidden), **NEAR)
