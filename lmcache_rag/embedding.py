"""Texts to vectors: sentence-transformers, or any embedding object of LangChain or LlamaIndex."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_rag._utils import needs, well_formed, without_garbage_collection
from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lmcache_rag.weights import Source


_CPU_BATCH = 8  # texts: more only adds padding
PARTS = ("name", "dimension", "fingerprint", "embed_documents", "embed_query")


class Embedder(Protocol):
    """Turns texts into vectors of length 1. Implementations are safe to call from several threads."""

    @property
    def name(self) -> str:
        """Name of the model, to show."""
        ...

    @property
    def dimension(self) -> int:
        """Length of its vectors."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies everything that its vectors depend on: vectors of two fingerprints are never compared."""
        ...

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts that will be searched, shape [len(texts), dimension]."""
        ...

    def embed_query(self, text: str) -> NDArray[np.float32]:
        """Vector of a question, shape [dimension]."""
        ...


class SentenceTransformerEmbedder:
    """An embedding model of sentence-transformers, found and loaded when it is first used.

    If a model has prompts for queries or documents, they are used. A plain BERT on a CPU is computed without the
    library, which takes longer to import than the model to load; the vectors are the same.

    Args:
        path_or_name: Folder or name, see lmcache_rag.weights.find_embedder; None: the default embedder.
        device: "cpu", "cuda", "cuda:1" …; None: a GPU if there is one.
        batch_size: Texts computed at once; None: 8 on a CPU, where more only adds padding, else 32.
    """

    def __init__(
        self, path_or_name: str | Path | None = None, *, device: str | None = None, batch_size: int | None = None
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1; got {batch_size}.")
        self._wanted, self._device, self._batch_size = path_or_name, device, batch_size
        self._lock = threading.RLock()

    @property
    def source(self) -> Source:
        """Where the model was found.

        Raises:
            SourceError: No source has it.
        """
        with self._lock:
            return self._source

    @cached_property
    def _source(self) -> Source:
        from lmcache_rag.weights import find_embedder

        return find_embedder(self._wanted)

    @property
    def name(self) -> str:
        """Hugging Face name, or the folder's own name."""
        return self.source.name

    @cached_property
    def fingerprint(self) -> str:
        """Name and digest of the model's files: a copy from another source has the same one."""
        from lmcache_rag.weights import content_digest

        return f"{self.name}@{content_digest(self.source.path)}"

    @cached_property
    def dimension(self) -> int:
        """Length of the vectors; loads the model."""
        return int(self.embed_query("dimension").shape[0])

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts that will be searched, shape [len(texts), dimension], each of length 1."""
        with needs("store"):
            import numpy as np

        if isinstance(texts, str):
            raise ConfigError("embed_documents takes a list of texts.", remedy="Write [text].")
        if not len(texts):
            return np.empty((0, self.dimension), dtype=np.float32)
        return self._encode("encode_document", list(texts))

    def embed_query(self, text: str) -> NDArray[np.float32]:
        """Vector of a question, shape [dimension], of length 1."""
        vector: NDArray[np.float32] = self._encode("encode_query", [text])[0]
        return vector

    def _encode(self, method: str, texts: list[str]) -> NDArray[np.float32]:
        # One at a time: a fast tokenizer's padding settings are shared, and torch uses every core already.
        texts = [well_formed(text) for text in texts]
        with self._lock:
            model = self._model
            if isinstance(model, BertEncoder):
                return unit_length(model.encode(texts, self._batch_size or _CPU_BATCH))
            batch = self._batch_size or (_CPU_BATCH if model.device.type == "cpu" else 32)
            vectors = getattr(model, method)(texts, batch_size=batch, show_progress_bar=False, convert_to_numpy=True)
        return unit_length(vectors)

    @cached_property
    def _model(self) -> Any:
        path = self._source.path
        with without_garbage_collection(), needs("store"):
            import torch

            on_cpu = self._device == "cpu" or (self._device is None and not torch.accelerator.is_available())
            with _no_progress_bars():
                if on_cpu and (plain := BertEncoder.open(path)):
                    return plain
                import sentence_transformers

                return sentence_transformers.SentenceTransformer(
                    str(path), device=self._device, local_files_only=True, trust_remote_code=False
                )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing on the terminal while a small model loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class ForeignEmbedder:
    """An embedding object of another library, with its vectors brought to length 1. See as_embedder."""

    def __init__(self, obj: Any, *, documents: str, query: str, name: str | None = None) -> None:
        self._documents, self._query = getattr(obj, documents), getattr(obj, query)
        kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
        label = next((v for a in ("model_name", "model") if isinstance(v := getattr(obj, a, None), str) and v), "")
        self.name = name or (f"{kind}:{label}" if label else kind)

    @property
    def fingerprint(self) -> str:
        """Its name and dimension: an object of another library reveals no more."""
        return f"{self.name}@{self.dimension}"

    @cached_property
    def dimension(self) -> int:
        """Length of the vectors, found by embedding one word."""
        return int(self.embed_query("dimension").shape[0])

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts that will be searched, shape [len(texts), dimension], each of length 1."""
        with needs("store"):
            import numpy as np

        if not len(texts):
            return np.empty((0, self.dimension), dtype=np.float32)
        return unit_length(self._documents([well_formed(text) for text in texts]))

    def embed_query(self, text: str) -> NDArray[np.float32]:
        """Vector of a question, shape [dimension], of length 1."""
        vector: NDArray[np.float32] = unit_length([self._query(well_formed(text))])[0]
        return vector


def as_embedder(obj: Any, *, name: str | None = None) -> Embedder:
    """Make an Embedder of any embedding object, or of a model's name.

    Args:
        obj: An Embedder, a LangChain Embeddings, a LlamaIndex BaseEmbedding, or the folder or name of a model.
        name: Name that no other embedding has; needed when the object does not know its model.

    Raises:
        ConfigError: It is none of these.
    """
    if obj is None or isinstance(obj, str | Path):
        return SentenceTransformerEmbedder(obj)
    if all(inspect.getattr_static(obj, part, None) is not None for part in PARTS):  # isinstance would load the model
        embedder: Embedder = obj
        return embedder
    for documents, query in (
        ("embed_documents", "embed_query"),  # LangChain
        ("get_text_embedding_batch", "get_query_embedding"),  # LlamaIndex
    ):
        if callable(getattr(obj, documents, None)) and callable(getattr(obj, query, None)):
            return ForeignEmbedder(obj, documents=documents, query=query, name=name)
    raise ConfigError(
        f"{type(obj).__name__} cannot embed texts.",
        remedy="Give the name or folder of a model, a LangChain Embeddings or a LlamaIndex BaseEmbedding.",
    )


def unit_length(vectors: Any) -> NDArray[np.float32]:
    """Rows scaled to length 1, as float32; a row of zeros stays as it is."""
    with needs("store"):
        import numpy as np

    rows = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(lengths == 0, 1, lengths), dtype=np.float32)


# -- plain BERT models on a CPU ---------------------------------------------------------------------------------------
#
# The model of a fresh installation and many others (MiniLM, BGE, E5, GTE) are a BERT, a pooling and a normalisation.
# transformers computes that. sentence-transformers gives the same vectors; importing it takes over a second longer, and
# every process that asks a question would wait for it.

_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
_FILES = ("config.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_MODULES = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])


class BertEncoder:
    """Texts to vectors that are not yet of length 1.

    Args:
        path: The model's folder; open() checks whether it is of this kind.
        pooling: "mean" over the tokens, or the "first" token.
        max_tokens: Longer texts are truncated.
    """

    def __init__(self, path: Path, pooling: str, max_tokens: int) -> None:
        from transformers import AutoTokenizer, BertModel

        self._pooling, self._max_tokens = pooling, max_tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self._model: Any = BertModel.from_pretrained(path, local_files_only=True).eval()

    @classmethod
    def open(cls, path: Path) -> BertEncoder | None:
        """The encoder of this folder, or None if it needs anything besides a BERT, a pooling and a normalisation."""
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
    """Pooling and longest text, or None if the folder may not be of the plain kind."""
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
