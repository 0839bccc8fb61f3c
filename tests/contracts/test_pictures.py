"""Models that take pictures: text is blended, and a prompt with a picture is computed in full.

vLLM's own class and its scheduler on a CPU. No picture is read: the package that does that in transformers is missing.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from contract_kit import CHUNK

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from forward_kit import LENGTH, NEAR, Pair
    from vllm.model_executor.models import registry
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

    from lmcache_rag.connector import model_support

pytestmark = [pytest.mark.own_version, pytest.mark.filterwarnings("ignore")]
READS_PICTURES = "transformers.models.pixtral.image_processing_pixtral"  # needs torchvision


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("text_only", [False, True])
def test_our_pass_gives_the_logits_of_vllms_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_only: bool
) -> None:
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's runner for CPUs does
    monkeypatch.setattr(model_support, "BACKENDS", ("CPUAttentionBackendImpl",))
    without = ModuleType(READS_PICTURES)
    without._num_image_tokens = without.get_resize_output_image_size = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, READS_PICTURES, without)
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())  # there it would be missing again
    pair = Pair(tmp_path, "mistral3", "yarn", options={"language_model_only": text_only})
    assert type(pair.model).__name__ == "Mistral3ForConditionalGeneration"
    assert model_support.unsupported_reason(pair.config, pair.model) is None
    own = pair.prefill()
    torch.testing.assert_close(own, pair.logits, **NEAR)
    forward, given = type(pair.model).forward, []

    def watched(self: Any, **inputs: Any) -> Any:
        given.append({name for name, value in inputs.items() if value is not None} - {"positions"})
        return forward(self, **inputs)

    monkeypatch.setattr(type(pair.model), "forward", watched)
    blendable = pair.plain()
    pieces = torch.arange(LENGTH).split(70)
    ours = torch.cat([pair.forward(blendable, piece, int(piece[-1]) + 1) for piece in pieces])
    torch.testing.assert_close(ours, own, **NEAR)
    for layer, kv in enumerate(pair.kv):
        torch.testing.assert_close(pair.stored(layer), kv, **NEAR)
    assert given == [{"input_ids" if text_only else "inputs_embeds"}] * len(pieces), "vLLM compiles for one of them"


def test_a_prompt_with_a_picture_is_computed_in_full(make: Any) -> None:
    """Beside a text of the same tokens, which is blended. Nothing of the picture's prompt is stored."""
    engine = make()
    engine.scheduler.max_num_encoder_input_tokens = 512  # as for a model that takes pictures
    engine.scheduler.encoder_cache_manager = EncoderCacheManager(512)
    picture = MultiModalFeatureSpec(
        data=None, modality="image", identifier="a", mm_position=PlaceholderRange(offset=80, length=40)
    )
    tokens = list(range(1000, 1400))
    engine.add("text", 400, 4)
    engine.add_tokens("picture", tokens, mm_features=[picture])
    trackers = engine.connector.request_trackers
    engine.step()
    assert trackers["picture"].max_offload_tokens == 0
    assert trackers["text"].max_offload_tokens != 0
    engine.to_the_end()
    assert "picture" not in engine.lookups
    told = engine.told["picture"]
    assert (told["failure"], told["reused_tokens"], told["computed_tokens"]) == ("not text", 0, len(tokens))
    assert (engine.told["text"]["failure"], engine.told["text"]["reused_tokens"]) == ("", 3.5 * CHUNK)
