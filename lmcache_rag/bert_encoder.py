"""Plain BERT embedding models on a CPU, without the library that trains them.

The model of a fresh installation and many others (MiniLM, BGE, E5, GTE) are a BERT, a pooling and a normalisation.
transformers computes that. sentence-transformers gives the same vectors; importing it takes more than a second longer,
and every process that asks a question would wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
_FILES = ("config.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_MODULES = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])


class BertEncoder:
    """Texts to vectors that are not yet of length 1.

    Args:
        path: The model's folder; open() says whether it is of this kind.
        pooling: "mean" over the tokens, or the "first" token.
        max_tokens: What is longer is cut.
    """

    def __init__(self, path: Path, pooling: str, max_tokens: int) -> None:
        from transformers import AutoTokenizer, BertModel

        self._pooling, self._max_tokens = pooling, max_tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self._model: Any = BertModel.from_pretrained(path, local_files_only=True).eval()

    @classmethod
    def open(cls, path: Path) -> BertEncoder | None:
        """The encoder of this folder, or None if it asks for anything besides a BERT, a pooling and a normalisation."""
        plan = _plan(path)
        return None if plan is None else cls(path, *plan)

    def encode(self, texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
        """Vectors, shape [len(texts), dimension]; texts of like length are computed together."""
        import numpy as np
        import torch

        rows = self._tokenizer(list(texts), truncation=True, max_length=self._max_tokens)["input_ids"]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        vectors: NDArray[np.float32] = np.empty((len(rows), self._model.config.hidden_size), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                some = order[start : start + batch_size]
                vectors[some] = self._forward([rows[index] for index in some]).float().numpy()
        return vectors

    def _forward(self, rows: list[list[int]]) -> torch.Tensor:
        import torch

        longest = max(map(len, rows))
        padding = self._model.config.pad_token_id or 0
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        hidden: torch.Tensor = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self._pooling == "first":
            return hidden[:, 0]
        weights = mask[:, :, None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def _plan(path: Path) -> tuple[str, int] | None:
    """Pooling and longest text, or None if the folder is not certain to be of the plain kind."""
    try:
        modules = _read(path / "modules.json")
        if [module["type"].rsplit(".", 1)[-1] for module in modules] not in _MODULES or modules[0]["path"]:
            return None
        model, whole, text = (_read(path / name) for name in _FILES)
        pooling = _read(path / modules[1]["path"] / "config.json")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    modes = [name for name, wanted in pooling.items() if name.startswith("pooling_mode") and wanted]
    plain = (
        model.get("model_type") == "bert"
        and "auto_map" not in model
        and not any((whole.get("prompts") or {}).values())
        and not whole.get("default_prompt_name")
        and set(text) == {"max_seq_length", "do_lower_case"}
        and isinstance(text["max_seq_length"], int)
        and not text["do_lower_case"]
        and len(modes) == 1
    )
    pooled = _POOLINGS.get(modes[0]) if plain else None
    return (pooled, text["max_seq_length"]) if pooled else None


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
