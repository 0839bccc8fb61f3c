"""A model on a paged cache as the connector's checks at start want it, with vLLM's attention done by PyTorch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from paged_kit import PagedModel

from lmcache_rag.connector.attention import PagedSequence
from lmcache_rag.connector.model_runner import GpuCopy
from lmcache_rag.engines.hf_model import HFModel

BLOCK, BLOCKS = 16, 64


class Exact:
    """Attention by PyTorch's own function over what the cache holds, in the place of vLLM's backend."""

    def __init__(self, sequence: PagedSequence, positions: torch.Tensor) -> None:
        self._sequence, self._positions = sequence, positions

    def before_write(self, *given: Any) -> None:
        """Nothing."""

    def attend(self, layer: int, query: Any, keys: Any, values: Any, scale: float, out: Any) -> None:
        end = int(self._positions[-1]) + 1
        key, value = (self._sequence.gather(cache, end).transpose(0, 1)[None] for cache in (keys, values))
        mask = torch.arange(end)[None] <= self._positions[:, None]
        found = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None], key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
        out.copy_(found[0].transpose(0, 1))


class CheckedModel(PagedModel):
    """See lmcache_rag.connector.self_check.CheckedModel."""

    block_size = BLOCK

    def __init__(self, model: HFModel, blocks: int = BLOCKS, layout: str = "NHD", **given: Any) -> None:
        super().__init__(model, layout=layout, block=BLOCK, blocks=blocks, **given)
        self.theta = 1.0  # factor on the angles by which keys are moved

    def cache(self, layer: int) -> Any:
        return self.caches[layer]

    def trial_adapter(self) -> Any:
        return contextlib.nullcontext()

    def using(self, adapter: Any) -> Any:
        return contextlib.nullcontext()

    def prefill(self, ids: torch.Tensor, positions: torch.Tensor, sequence: PagedSequence) -> torch.Tensor:
        return PagedModel.forward(self, ids, positions, sequence.slots(positions), Exact(sequence, positions))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        found: torch.Tensor = self._model.model.lm_head(hidden)
        return found

    def copies(self, longest: int) -> dict[str, GpuCopy]:
        cos, sin = self._model.rotary(torch.empty(0), torch.arange(longest)[None] * self.theta)
        half = cos.shape[2] // 2
        return {"by a table": GpuCopy(self.caches, torch.cat([cos[0, :, :half], sin[0, :, :half]], 1), neox=True)}
