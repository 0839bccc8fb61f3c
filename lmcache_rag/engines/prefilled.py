"""A prompt whose KV stands in a cache of its own, to look at logits: for measurements and tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmcache_rag.engines.hf_model import HFModel


class PrefilledPrompt:
    """The state of a model behind a prompt; see EmbeddedEngine.prefill.

    Args:
        model: The model.
        ids: What the cache does not hold yet, int64 [n], on the model's device, n at least 1.
        cache: The KV cache; None: a new one.
        lock: Held while the model computes.
        spent: Milliseconds of what was done before, by step.

    Attributes:
        logits: Of the token that follows the prompt, [vocabulary], as the model gives them.
        spent: Milliseconds by step; "suffix" is what the cache did not hold.
    """

    def __init__(
        self, model: HFModel, ids: torch.Tensor, cache: Any, lock: threading.Lock, spent: dict[str, float]
    ) -> None:
        from transformers import DynamicCache

        begin = time.perf_counter()
        self._model, self._lock = model, lock
        self._cache = DynamicCache() if cache is None else cache
        self.logits: Tensor = self._run(ids, keep=1)[0]
        self.spent = spent | {"suffix": (time.perf_counter() - begin) * 1e3}

    def extend(self, token_ids: Sequence[int]) -> Tensor:
        """Append these tokens.

        Returns:
            Logits of the token that follows each of them, [len(token_ids), vocabulary].
        """
        import torch

        return self._run(torch.tensor(token_ids, device=self._model.device), keep=len(token_ids))

    def _run(self, ids: torch.Tensor, *, keep: int) -> Tensor:
        import torch

        with self._lock, torch.inference_mode():
            logits: Tensor = self._model.model(
                ids[None], use_cache=True, logits_to_keep=keep, **self._model.cache_argument(self._cache)
            ).logits[0]
            return logits
