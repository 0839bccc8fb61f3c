"""A transformers decoder with our KV cache and attention function, and whether its KV can be blended."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers.cache_utils import DynamicCache, DynamicLayer

from lmcache_rag.errors import ConfigError, EngineError
from lmcache_rag.families import FAMILIES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmcache_rag.engines.kv_files import ChunkKV


BLENDED = {family.model_type: family for family in FAMILIES if family.model_type}
WITH_TOWERS = ("mistral3",)  # their text is computed by a language model inside, as if there were no towers
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def unsupported_reason(config: Any) -> str:
    """Why a model of this configuration cannot be blended; "" when it can."""
    if config.model_type not in BLENDED:
        titles = ", ".join(family.title for family in BLENDED.values())
        return f"models of type {config.model_type!r} are not supported (supported: {titles})"
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        return "layers with different rotary embeddings are not supported"
    if "mrope_section" in rope:
        return "multimodal RoPE is not supported"
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        return f"RoPE scaling {kind!r} changes with the prompt's length (supported: {', '.join(ROPE_TYPES)})"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is rotated by RoPE"
    if getattr(config, "attention_chunk_size", None):
        return "attention in chunks is not supported"
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if window and not hasattr(type(config), "layer_types"):
        types.add("sliding_attention")  # a field that this family does not have changes nothing of it
    if types != {"full_attention"}:
        return f"it uses {', '.join(sorted(types - {'full_attention'}))}, and only full attention is supported"
    return ""


class HFModel:
    """A transformers model and the facts that the blend needs. The weights are loaded when they are first used.

    Args:
        config: The model's transformers configuration; of one that takes pictures too, that of its text part is kept.
        tokenizer: Its tokenizer.
        dtype: Element type of weights and KV.
        device: Where the weights go.
        load: Gives the transformers causal language model.

    Attributes:
        before_chunks: Token ids that stood before the chunks of the latest ingestion, and their KV; for ChunkCache.

    Raises:
        EngineError: The model takes more than text, and is none of those whose text part is known.
    """

    def __init__(
        self, config: Any, tokenizer: Any, *, dtype: torch.dtype, device: torch.device, load: Callable[[], Any]
    ) -> None:
        if (inside := getattr(config, "text_config", None)) is not None:
            if config.model_type not in WITH_TOWERS:
                raise EngineError(
                    f"The embedded engine runs models of text alone; {config.model_type!r} takes pictures or sound.",
                    remedy="Serve it with vLLM, `lmcache-rag serve`, and name its URL: `--engine http://localhost:8000`.",
                )
            config = inside
        self.config = config
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.device = device
        self.why_not = unsupported_reason(config)
        self.layers = int(config.num_hidden_layers)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        self.head_size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.before_chunks: tuple[tuple[int, ...], ChunkKV] | None = None
        self._load = load
        self._loaded: Any = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, *, device: str | None = None, dtype: str | None = None) -> HFModel:
        """Open a folder: by default float32 on a CPU, bfloat16 on a GPU.

        Raises:
            EngineError: The folder holds no usable model.
            ConfigError: There is no such dtype.
        """
        import torch
        from transformers import AutoConfig

        from lmcache_rag.tokenizer import auto_tokenizer

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        name = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        if name not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"There is no dtype {name!r}.", remedy="Choose float32, bfloat16 or float16.")
        kind: torch.dtype = getattr(torch, name)

        def load() -> Any:
            # Imports much, which a process that only retrieves does not need.
            from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

            family = AutoModelForImageTextToText if config.model_type in WITH_TOWERS else AutoModelForCausalLM
            return family.from_pretrained(path, dtype=kind, local_files_only=True, use_safetensors=True)

        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            tokenizer = auto_tokenizer(path)
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
                    _decoder_of(model).set_attn_implementation(register())
                self._loaded = model.to(self.device).eval()
            return self._loaded

    @property
    def rotary(self) -> Any:
        """The model's own rotary embedding."""
        return self.decoder.rotary_emb

    @property
    def decoder(self) -> Any:
        """The layers of the language model, without the head."""
        return _decoder_of(self.model)

    @property
    def interleaved(self) -> bool:
        """Whether RoPE's pairs are neighbours in a head, rather than its two halves."""
        return self.config.model_type in BLENDED and BLENDED[self.config.model_type].interleaved

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
            The hidden states after the last norm, [batch, m, width].
        """
        import torch

        cache.set_positions(positions if blend_pass is not None else None)
        try:
            with torch.inference_mode():
                output = self.decoder(
                    input_ids=ids,
                    position_ids=positions[None],
                    use_cache=True,
                    **self.cache_argument(cache),
                    **({"blend_pass": blend_pass} if blend_pass is not None else {}),
                )
                states: torch.Tensor = output.last_hidden_state
                return states
        finally:
            cache.set_positions(None)


def _decoder_of(model: Any) -> Any:
    """The language model's decoder; in a model that takes pictures it stands beside a tower."""
    return getattr(model.model, "language_model", model.model)


def _no_model(path: Path | str, problem: Exception) -> EngineError:
    return EngineError(
        f"No model could be loaded from {path}: {problem}",
        remedy="Name a folder with config.json, *.safetensors and a tokenizer.",
    )


# -- the KV cache of one request --------------------------------------------------------------------------------------


class _Layer(DynamicLayer):  # type: ignore[misc]
    """One layer in memory of a fixed capacity; appending copies nothing but the new tokens."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.all_keys, self.all_values = keys, values
        self.positions: torch.Tensor | None = None
        self.set_length(0)

    def set_length(self, length: int) -> None:
        """Declare that the first `length` tokens exist."""
        self.keys, self.values = self.all_keys[:, :, :length], self.all_values[:, :, :length]

    def get_seq_length(self) -> int:
        """Tokens that exist."""
        return int(self.keys.shape[2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; or, while a pass sets positions, write there and return everything up to the capacity."""
        if self.positions is not None:
            self.all_keys.index_copy_(2, self.positions, key_states)
            self.all_values.index_copy_(2, self.positions, value_states)
            return self.all_keys, self.all_values
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.set_length(end)
        return self.keys, self.values


class KVBuffer(DynamicCache):  # type: ignore[misc]
    """KV of one sequence, `capacity` tokens long.

    Args:
        layers: Number of layers.
        kv_heads: Key and value heads.
        size: Size of a head.
        capacity: Most tokens.
        like: A tensor whose dtype and device are used.
        batch: Sequences.
    """

    def __init__(
        self, layers: int, kv_heads: int, size: int, capacity: int, *, like: torch.Tensor, batch: int = 1
    ) -> None:
        super().__init__()
        memory = like.new_empty((2, layers, batch, kv_heads, capacity, size))
        self.layers = [_Layer(memory[0, i], memory[1, i]) for i in range(layers)]
        self.layer_class_to_replicate = None

    def set_length(self, length: int) -> None:
        """Declare that the first `length` tokens exist."""
        for layer in self.layers:
            layer.set_length(length)

    def clear(self, positions: torch.Tensor, start: int, end: int) -> None:
        """Zero these positions and [start, end): a mask hides missing KV, but NaN would pass through it."""
        for layer in self.layers:
            for memory in (layer.all_keys, layer.all_values):
                memory.index_fill_(2, positions, 0)
                memory[:, :, start:end] = 0

    def set_positions(self, positions: torch.Tensor | None) -> None:
        """Make the next forward pass write its KV to these positions, int64 [m]; None: append again."""
        for layer in self.layers:
            layer.positions = positions


# -- attention --------------------------------------------------------------------------------------------------------
#
# The model's own forward runs unchanged; only the attention itself is ours. A pass that needs more than plain causal
# attention gives the model's forward a `ForwardPass` as ``blend_pass=``, which transformers passes on to `attention`.

NAME = "lmcache_rag"


class ForwardPass(Protocol):
    """Attention of one forward pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[1, heads, m, size], twice [1, kv heads, n, size] -> [1, heads, m, size]."""
        ...


@lru_cache(maxsize=8)
def _tail(rows: int, keys: int, device: str) -> PositionAttention:
    """Plain causal attention of the last `rows` of `keys` tokens; the same in every layer of a pass."""
    import torch

    return PositionAttention(torch.arange(keys - rows, keys, device=device))


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    blend_pass: ForwardPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer. No padding masks: this library never pads on the left."""
    from torch.nn.functional import scaled_dot_product_attention

    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rows, keys = query.shape[2], key.shape[2]
    if blend_pass is not None:
        out = blend_pass.attend(module.layer_idx, query, key, value, scale)
    elif rows in (1, keys):
        gqa = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, is_causal=rows > 1, scale=scale, enable_gqa=gqa)
    else:
        out = _tail(rows, keys, str(query.device))(query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Register the function with transformers; returns its name. Without a mask function no mask is ever built."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    return NAME


# -- attention by position --------------------------------------------------------------------------------------------
#
# The mask must follow positions. The causal masks of the usual kernels follow places in the batch (top-left or
# bottom-right aligned), with which a scattered query would see later tokens.

_MASK_ELEMENTS = 1 << 26  # masks up to this size in all are kept from layer to layer, larger ones are made again


class PositionAttention:
    """Attention of queries at given positions over keys 0..n-1, planned once and used in every layer.

    Queries are taken in blocks, each with the keys up to its last position only: so the work is that of a causal
    prefill of the same rows, not of the whole rectangle.

    Args:
        positions: int64 [m], ascending, on the queries' device.
        rows: Queries per block. Few waste the kernel, many compute keys that most of the block may not see.
        hidden: Positions of keys that no query may see (their KV does not exist yet), int64, or None.
    """

    def __init__(self, positions: Tensor, *, rows: int = 0, hidden: Tensor | None = None) -> None:
        self._positions = positions
        self._hidden = hidden
        self._ends = positions.tolist()
        consecutive = len(positions) > 1 and self._ends[-1] - self._ends[0] == len(positions) - 1
        rows = rows or (256 if consecutive else 64)
        starts = range(0, len(self._ends), rows)
        self._blocks = [(start, min(start + rows, len(self._ends))) for start in starts]
        keep = sum((end - start) * self._keys(end) for start, end in self._blocks) <= _MASK_ELEMENTS
        self._kept = {block: self._mask(*block) for block in self._blocks} if keep else {}

    def _keys(self, end: int) -> int:
        return int(self._ends[end - 1]) + 1

    def _mask(self, start: int, end: int) -> Tensor:
        """Additive mask of one block, float32 [rows, keys]: 0 where the key is seen, -inf elsewhere."""
        import torch

        columns = torch.arange(self._keys(end), device=self._positions.device)
        unseen = columns[None] > self._positions[start:end, None]
        if self._hidden is not None:
            unseen[:, self._hidden[self._hidden < len(columns)]] = True
        return torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, float("-inf"))

    def masks(self) -> list[tuple[int, int, int, Tensor]]:
        """(first row, last row + 1, number of keys, mask) of each block."""
        return [(s, e, self._keys(e), self._kept[s, e] if self._kept else self._mask(s, e)) for s, e in self._blocks]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Query [1, heads, m, size], key and value [1, kv heads, n, size] -> [1, heads, m, size]."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        out = torch.empty_like(query)
        group = query.shape[1] // key.shape[1]
        if group > 1 and query.is_cuda:  # no fast CUDA kernel takes grouped heads and a mask together
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            group = 1
        for start, end in self._blocks:
            keys = self._keys(end)
            mask = self._kept[start, end] if self._kept else self._mask(start, end)
            out[:, :, start:end] = scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, :keys],
                value[:, :, :keys],
                attn_mask=mask.to(query.dtype),
                scale=scale,
                enable_gqa=group > 1,
            )
        return out


def attention_with_mass(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, reduce: str
) -> tuple[Tensor, Tensor]:
    """Attention that also returns how much attention each key got.

    Args:
        query: [1, heads, m, size].
        key: [1, kv heads, n, size].
        value: [1, kv heads, n, size].
        mask: Additive, float32 [m, n].
        scale: Factor of the scores.
        reduce: "sum" or "max" over heads and rows.

    Returns:
        The attention's output [1, heads, m, size], and float32 [n]: the softmax probability that each key got.
    """
    import torch

    _, heads, rows, size = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    # The heads of a group become rows of one product: keys are read once, and never repeated in memory.
    grouped = (query[0] * scale).reshape(kv_heads, -1, size)
    scores = torch.bmm(grouped, key[0].transpose(1, 2)).float().view(kv_heads, heads // kv_heads, rows, keys)
    weights = scores.add_(mask).softmax(-1)
    mass = weights.sum((0, 1, 2)) if reduce == "sum" else weights.amax((0, 1, 2))
    out = torch.bmm(weights.view(kv_heads, -1, keys).to(value.dtype), value[0])
    return out.view(1, heads, rows, size), mass
