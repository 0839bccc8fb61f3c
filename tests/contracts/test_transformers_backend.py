"""Models of vLLM's Transformers backend on a CPU: the class of vLLM, with transformers' own layers inside it.

As test_forward.py, of models that vLLM has no class for, and of others with `--model-impl transformers`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from forward_kit import BLOCK, LENGTH, NEAR, SIZE, Pair
    from models import tiny_config
    from vllm.config import set_current_vllm_config

    from lmcache_rag.budget import Budget
    from lmcache_rag.connector import model_support, vllm_internals
    from lmcache_rag.connector.attention import DeviationCheck, PagedAttention, StopForward
    from lmcache_rag.connector.blend_pass import BlendPass
    from lmcache_rag.connector.metadata import Match
    from lmcache_rag.connector.rotary import rotary_of
    from lmcache_rag.families import TRANSFORMERS_BACKEND, TRANSFORMERS_DECODERS
    from lmcache_rag.policies import get_policy

pytestmark = [pytest.mark.own_version, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("group")]
# With the scaling of each, and what else is in its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("yarn", {}),
    "jais2": ("default", {}),
    "llama": ("llama3", {}),
    "mistral": ("yarn", {"sliding_window": None}),
    "olmo": ("default", {"clip_qkv": 1.0}),
    "olmo2": ("linear", {}),
    "qwen2": ("linear", {}),
    "qwen3": ("default", {}),
    "seed_oss": ("yarn", {}),
    "smollm3": ("default", {"no_rope_layers": [1, 1, 1, 1]}),
}
Load = Callable[..., Pair]


@contextlib.contextmanager
def unchanged(decoder: Any) -> Iterator[None]:
    """A `with` block after which a class of transformers is as before: vLLM gives it another base and `__init__`."""
    before, bases = dict(vars(decoder)), decoder.__bases__
    yield
    decoder.__bases__ = bases
    for name in set(vars(decoder)) - set(before):
        delattr(decoder, name)
    for name, value in before.items():
        if vars(decoder)[name] is not value:
            setattr(decoder, name, value)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Loads a tiny random model. The check takes the backend for CPUs here: it looks at the rest."""
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's runner for CPUs does
    monkeypatch.setattr(model_support, "BACKENDS", ("CPUAttentionBackendImpl", "PlainCache"))
    with contextlib.ExitStack() as stack:

        def made(family: str, scaling: str = "default", **changes: Any) -> Pair:
            stack.enter_context(unchanged(transformers.AutoModel._model_mapping[type(tiny_config(family))]))
            return Pair(tmp_path, family, scaling, options={"model_impl": "transformers"}, **changes)

        yield made


def why_not(pair: Pair) -> str:
    return str(model_support.unsupported_reason(pair.config, pair.model) or "")


@pytest.mark.parametrize("family", MODELS)
def test_our_pass_gives_the_logits_of_vllms_own(load: Load, family: str) -> None:
    scaling, changes = MODELS[family]
    pair = load(family, scaling, **changes)
    assert type(pair.model).__name__ == TRANSFORMERS_BACKEND
    assert why_not(pair) == ""
    own = pair.prefill()
    torch.testing.assert_close(own, pair.logits, **NEAR)
    blendable = pair.plain()
    pieces = torch.arange(LENGTH).split(70)
    ours = torch.cat([pair.forward(blendable, piece, int(piece[-1]) + 1) for piece in pieces])
    torch.testing.assert_close(ours, own, **NEAR)
    for layer, kv in enumerate(pair.kv):
        torch.testing.assert_close(pair.stored(layer), kv, **NEAR)


def test_each_decoder_of_the_list_is_tested() -> None:
    decoders = {transformers.AutoModel._model_mapping[type(tiny_config(family))].__name__ for family in MODELS}
    assert decoders == set(TRANSFORMERS_DECODERS)


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_policy_all_equals_vllms_own_prefill(load: Load, family: str) -> None:
    """Over KV of other tokens, which a policy that needs a pass of its own has looked at."""
    pair = load(family, *MODELS[family][:1])
    own, end = pair.prefill(), LENGTH - 1
    blendable, ids = pair.plain(), pair.ids
    spans = [(BLOCK + 3, BLOCK + 60), (BLOCK + 65, BLOCK + 90)]
    pair.ids = ids.roll(7)
    pair.forward(blendable, torch.arange(LENGTH), LENGTH)
    pair.ids = ids
    pair.forward(blendable, torch.arange(BLOCK), BLOCK)  # the exact prefix
    with torch.inference_mode(), set_current_vllm_config(pair.config):
        for name, share in (("query", 0.2), ("all", 1.0)):
            steps = BlendPass(blendable, pair.sequence, chunk_size=40).run(
                ids, spans, BLOCK, policy=get_policy(name), budget=Budget(share=share), end=end, with_last_token=True
            )
            with pytest.raises(StopIteration) as stopped:
                while True:
                    next(steps)
        logits = blendable.logits(stopped.value.value.hidden)
    assert logits is not None
    torch.testing.assert_close(logits, own[end:], **NEAR)
    for layer, kv in enumerate(pair.kv):
        torch.testing.assert_close(pair.stored(layer), kv, **NEAR)


def test_a_pass_may_end_in_the_middle(load: Load) -> None:
    """A policy stops a pass at the layer that it needs, by an exception through transformers' code."""
    pair = load("olmo2")
    blendable = pair.plain()
    positions = torch.arange(LENGTH)
    slots, attention = pair.sequence.slots(positions), PagedAttention(pair.sequence, positions.int(), LENGTH)
    with torch.inference_mode(), set_current_vllm_config(pair.config), pytest.raises(StopForward):
        blendable.forward(pair.ids, positions, slots, DeviationCheck(attention, slots, 2))
    torch.testing.assert_close(pair.forward(blendable, positions, LENGTH), pair.logits, **NEAR)


@pytest.mark.parametrize("scaling", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("family", ["llama", "seed_oss"])
def test_a_moved_key_equals_the_key_computed(load: Load, family: str, scaling: str) -> None:
    """In the first layer, where a key depends on its token and position alone; by the table that LMCache gets too."""
    pair = load(family, scaling)
    blendable = pair.plain()
    pair.ids[64:96] = pair.ids[:32]
    pair.forward(blendable, torch.arange(LENGTH), LENGTH)
    computed = pair.stored(0)
    copies = blendable.copies(LENGTH)
    assert len(copies) == 2
    for copy in copies.values():
        pair.layers["model.layers.0.self_attn.attn"].kv_cache[pair.sequence.blocks[2].long()] = 7.0
        copy.run([Match(64, 96, 0, 32, block=int(pair.sequence.blocks[0]))], pair.sequence)
        torch.testing.assert_close(pair.stored(0), computed, **NEAR)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("smollm3", {}, "NoPE"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1], "use_sliding_window": True, "sliding_window": 64,
                     "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "sliding window"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0,
                                       "original_max_position_embeddings": 2048, "short_factor": [1.0] * (SIZE // 2),
                                       "long_factor": [2.0] * (SIZE // 2)}}, "type longrope"),
        ("hunyuan_v1_dense", {}, "HunYuanDenseV1Model of transformers.models.hunyuan_v1_dense"),
        ("olmo3", {"layer_types": ["full_attention"] * 4}, "Olmo3Model"),
        ("glm", {}, "GlmModel"),
    ],
)  # fmt: skip
def test_what_is_refused(load: Load, family: str, changes: dict[str, Any], reason: str) -> None:
    assert reason in why_not(load(family, **changes))


def test_what_is_refused_of_a_rotary_embedding(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load("llama")
    assert why_not(pair) == ""
    rotary = pair.model.model.rotary_emb
    with monkeypatch.context() as changed:
        changed.setattr(rotary, "inv_freq", rotary.inv_freq[:4])
        assert "only part of each head" in why_not(pair)
    with monkeypatch.context() as changed:
        changed.setattr(type(pair.model.model), "__module__", "transformers_modules.remote.modeling")
        assert "LlamaModel of transformers_modules.remote.modeling" in why_not(pair)
    with monkeypatch.context() as changed:
        changed.setattr(pair.model.model.layers[2].self_attn, "rotary_emb", rotary, raising=False)
        assert "embedding of their own" in why_not(pair)


def test_the_table_has_the_type_of_the_models_keys(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load("llama", "yarn")
    monkeypatch.setattr(pair.model.model_config, "dtype", torch.bfloat16)
    rotary = rotary_of(pair.model)
    exact = vllm_internals.exact_rotary_table(rotary)
    assert (rotary.cos_sin_cache.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    assert exact.shape == (512, SIZE)
    assert not torch.equal(rotary.cos_sin_cache.float(), exact)
