"""A transformers decoder, and whether its KV can be blended."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.errors import ConfigError, EngineError

if TYPE_CHECKING:
    import torch

    from lmcache_rag.engines.attention_hook import ForwardPass
    from lmcache_rag.engines.kv_buffer import KVBuffer

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2 and Qwen2.5", "qwen3": "Qwen3"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def why_not_blendable(config: Any) -> str:
    """Why a model of this configuration cannot be blended; empty when it can."""
    if config.model_type not in FAMILIES:
        return f"models of type {config.model_type!r} are not supported (supported: {', '.join(FAMILIES.values())})"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        return f"RoPE scaling {kind!r} changes with the prompt's length (supported: {', '.join(ROPE_TYPES)})"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is turned by RoPE"
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if types != {"full_attention"}:
        return f"it uses {', '.join(sorted(types - {'full_attention'}))}, and only full attention is supported"
    return ""


class HFModel:
    """A model, with what the blend needs to know of it. The weights are loaded when they are first needed.

    Args:
        config: The model's transformers configuration.
        tokenizer: Its tokenizer.
        dtype: Element type of weights and KV.
        device: Where the weights go.
        load: Gives the transformers causal language model.
    """

    def __init__(
        self, config: Any, tokenizer: Any, *, dtype: torch.dtype, device: torch.device, load: Callable[[], Any]
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.device = device
        self.why_not = why_not_blendable(config)
        self.layers = int(config.num_hidden_layers)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        self.head_size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self._load = load
        self._loaded: Any = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, *, device: str | None = None, dtype: str | None = None) -> HFModel:
        """Open a folder: float32 on a CPU, bfloat16 on a GPU, unless told otherwise.

        Raises:
            EngineError: The folder holds no usable model.
            ConfigError: There is no such dtype.
        """
        import torch
        from transformers import AutoConfig, AutoTokenizer

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        name = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        if name not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"There is no dtype {name!r}.", remedy="Choose float32, bfloat16 or float16.")
        kind: torch.dtype = getattr(torch, name)

        def load() -> Any:
            # Imports a lot, and a process that only retrieves never comes here.
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(path, dtype=kind, local_files_only=True, use_safetensors=True)

        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as problem:
            raise _no_model(path, problem) from problem
        return cls(config, tokenizer, dtype=kind, device=torch.device(device), load=load)

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any) -> HFModel:
        """Take a model that is loaded already. Its attention function is replaced if it can be blended."""
        return cls(model.config, tokenizer, dtype=model.dtype, device=model.device, load=lambda: model)

    @property
    def model(self) -> Any:
        """The transformers causal language model, with our attention function if it can be blended."""
        with self._lock:
            if self._loaded is None:
                try:
                    model = self._load()
                except (OSError, ValueError) as problem:
                    raise _no_model(getattr(self.config, "_name_or_path", "there"), problem) from problem
                if not self.why_not:
                    from lmcache_rag.engines import attention_hook

                    model.set_attn_implementation(attention_hook.register())
                self._loaded = model.to(self.device).eval()
            return self._loaded

    @property
    def rotary(self) -> Any:
        """The model's own rotary embedding."""
        return self.model.model.rotary_emb

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence."""
        return int(self.config.max_position_embeddings)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token over all layers, in bytes."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.dtype.itemsize

    def buffer(self, capacity: int, *, batch: int = 1) -> KVBuffer:
        """An empty KV cache of that many tokens."""
        import torch

        from lmcache_rag.engines.kv_buffer import KVBuffer

        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return KVBuffer(self.layers, self.kv_heads, self.head_size, capacity, like=like, batch=batch)

    def cache_argument(self, cache: Any) -> dict[str, Any]:
        """The keyword that hands the model a KV cache: transformers 5.2x renamed past_key_values to cache."""
        return {self._cache_name: cache}

    @cached_property
    def _cache_name(self) -> str:
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: KVBuffer, blend_pass: ForwardPass | None = None
    ) -> torch.Tensor:
        """Run all layers, for their KV alone: no logits.

        Args:
            ids: int64 [batch, m].
            positions: int64 [m].
            cache: Is read and written.
            blend_pass: Attention of this pass; the KV is then written at `positions`. None: plain causal, appended.

        Returns:
            The hidden states behind the last norm, [batch, m, width].
        """
        import torch

        cache.set_places(positions if blend_pass is not None else None)
        try:
            with torch.inference_mode():
                output = self.model.model(
                    input_ids=ids,
                    position_ids=positions[None],
                    use_cache=True,
                    **self.cache_argument(cache),
                    **({"blend_pass": blend_pass} if blend_pass is not None else {}),
                )
                states: torch.Tensor = output.last_hidden_state
                return states
        finally:
            cache.set_places(None)


def _no_model(path: Path | str, problem: Exception) -> EngineError:
    return EngineError(
        f"No model could be loaded from {path}: {problem}",
        remedy="Name a folder with config.json, *.safetensors and a tokenizer.",
    )
