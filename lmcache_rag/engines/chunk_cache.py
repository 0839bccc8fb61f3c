"""Chunk KV of one model: computed once after the shared prefix, stored in memory and on disk, verified."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from lmcache_rag.engines.base import (
    ChunkSpan,
    EngineInfo,
    IngestPrompt,
    KVUsage,
    PrecomputeResult,
    QueryPrompt,
    VerifyResult,
    kv_key,
)
from lmcache_rag.engines.kv_files import ChunkKV, KVFiles
from lmcache_rag.errors import PrecomputeError, StoreCorruptError, StoreError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from lmcache_rag.engines.hf_model import HFModel
log = logging.getLogger("lmcache_rag")


class ChunkCache:
    """Computes each chunk's KV once and keeps it. Safe to use from several threads.

    Args:
        model: The model.
        info: What the engine serves.
        store: Where the KV is kept.
        lock: Held while the model computes.
        batch: Chunks computed at once.
    """

    def __init__(self, model: HFModel, info: EngineInfo, store: KVStore, *, lock: threading.Lock, batch: int) -> None:
        self._model, self._info, self._store = model, info, store
        self._lock, self.batch = lock, batch

    # -- ingestion ----------------------------------------------------------------------------------------------

    def precompute(self, prompts: Iterable[IngestPrompt]) -> Iterator[PrecomputeResult]:
        """See Engine.precompute.

        Raises:
            UnsupportedModelError: This model cannot be blended.
            PrecomputeError: A chunk's KV could not be computed or stored. KV of chunks yielded before is stored.
        """
        require_blendable(self._info)
        source = iter(prompts)
        while group := list(islice(source, self.batch)):
            todo = {p.key: p for p in group if not self._store.has(p.fingerprint, p.key)}
            done = self._compute(list(todo.values())) if todo else {}
            for prompt in group:
                if prompt.key in done:
                    nbytes = self._store.put(prompt.fingerprint, prompt.key, done.pop(prompt.key))
                    yield PrecomputeResult(prompt.key, len(prompt.chunk_ids), nbytes, computed=True)
                else:
                    nbytes = len(prompt.chunk_ids) * self._info.kv_bytes_per_token
                    yield PrecomputeResult(prompt.key, len(prompt.chunk_ids), nbytes, computed=False)

    def missing(self, prompts: Sequence[IngestPrompt]) -> list[bool]:
        """For each prompt, whether its KV is absent."""
        return [not self._store.has(p.fingerprint, p.key) for p in prompts]

    def forget(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Drop the KV of (fingerprint, key) pairs. The prefix's KV is dropped with the last chunk that follows it."""
        self._store.forget_chunks(pairs)

    def verify(self, prompt: IngestPrompt) -> VerifyResult:
        """Compute one chunk's KV again and compare it with the file. Changes nothing."""
        require_blendable(self._info)
        try:
            kept = self._store.files.load(prompt.fingerprint, prompt.key)
        except StoreError:
            return VerifyResult(prompt.key, "damaged")
        if kept is None:
            return VerifyResult(prompt.key, "missing")
        fresh = self._compute([prompt])[prompt.key]
        if fresh.keys.shape != kept.keys.shape:
            return VerifyResult(prompt.key, "differs")
        pairs = ((fresh.keys, kept.keys), (fresh.values, kept.values))
        worst = max(float((a.cpu().float() - b.float()).abs().max()) for a, b in pairs)
        scale = max(1.0, *(float(a.abs().max()) for a, _ in pairs))
        tolerance = (1e-4 if self._info.dtype == "float32" else 2e-2) * scale
        # "not <=" rather than ">": a NaN must count as different.
        return VerifyResult(prompt.key, "ok" if worst <= tolerance else "differs", worst)

    def usage(self) -> KVUsage:
        """How much KV is held."""
        count, size = self._store.files.usage()
        return KVUsage(count, size, self._store.memory_bytes)

    # -- queries ------------------------------------------------------------------------------------------------

    def held(self, prompt: QueryPrompt) -> dict[ChunkSpan, str]:
        """Those of the prompt's chunks whose KV is kept, and where: "l1" in memory, "l2" in a file."""
        tiers = ((span, self._store.tier(prompt.fingerprint, span.key)) for span in prompt.chunks)
        return {span: tier for span, tier in tiers if tier}

    def find(self, prompt: QueryPrompt, *, first: bool = False) -> list[tuple[ChunkSpan, ChunkKV]]:
        """Those of the prompt's chunks whose KV is kept, in the prompt's order.

        Args:
            prompt: The prompt.
            first: Only one whose KV is exact: without neutral passages, one right after the prefix.
        """
        exact = prompt.prefix_tokens if not prompt.neutral_tokens else -1
        chunks = [span for span in prompt.chunks if span.start == exact] if first else prompt.chunks
        found = [(span, self._store.get(prompt.fingerprint, span.key)) for span in chunks]
        return [(span, kv) for span, kv in found if kv is not None and kv.tokens == span.end - span.start]

    def prefix(self, fingerprint: str, prefix_ids: tuple[int, ...]) -> tuple[ChunkKV, bool]:
        """KV of the prefix, and whether it existed already. Computed once for each fingerprint.

        The caller holds the lock and is in inference mode.
        """
        key = kv_key(fingerprint, ())
        if kv := self._store.get(fingerprint, key):
            return kv, True
        kv = self._compute_alone(prefix_ids)
        try:
            self._store.put(fingerprint, key, kv)
        except PrecomputeError as problem:  # a query must not fail because the store cannot be written
            log.warning("%s", problem)
        return kv, False

    def clear_memory(self) -> None:
        """Drop the KV in memory; the files stay."""
        self._store.clear_memory()

    # -- inside -------------------------------------------------------------------------------------------------

    def _before(self, prompt: IngestPrompt) -> ChunkKV:
        """KV of all that stands before the chunk. The latest is kept in memory, with the model."""
        prefix, _ = self.prefix(prompt.fingerprint, prompt.token_ids[: prompt.prefix_tokens])
        if not prompt.neutral_tokens:
            return prefix
        ids = prompt.token_ids[: prompt.chunk_start]
        kept = self._model.before_chunks
        if kept is None or kept[0] != ids:
            kept = self._model.before_chunks = (ids, self._compute_alone(ids))
        return kept[1]

    def _compute_alone(self, token_ids: tuple[int, ...]) -> ChunkKV:
        import torch

        ids = torch.tensor(token_ids, device=self._model.device)
        cache = self._model.buffer(len(ids))
        self._model.forward(ids[None], torch.arange(len(ids), device=ids.device), cache)
        return ChunkKV(
            torch.stack([layer.keys[0] for layer in cache.layers]),
            torch.stack([layer.values[0] for layer in cache.layers]),
        )

    def _compute(self, prompts: list[IngestPrompt]) -> dict[str, ChunkKV]:
        """Compute KV of chunks, each after the prefix and the neutral passages.

        A batch is padded on the right, which causal attention never reads.
        """
        import torch

        start = prompts[0].chunk_start
        longest = max(len(p.chunk_ids) for p in prompts)
        if start + longest > self._info.context_length:
            raise PrecomputeError(
                f"A chunk of {longest} tokens does not fit the context of {self._info.context_length}.",
                remedy="Split into smaller chunks (--chunk-tokens).",
            )
        try:
            with self._lock, torch.inference_mode():
                before = self._before(prompts[0])
                cache = self._model.buffer(start + longest, batch=len(prompts))
                for index, layer in enumerate(cache.layers):
                    layer.all_keys[:, :, :start] = before.keys[index]
                    layer.all_values[:, :, :start] = before.values[index]
                cache.set_length(start)
                rows = [list(p.chunk_ids) + [0] * (longest - len(p.chunk_ids)) for p in prompts]
                ids = torch.tensor(rows, device=self._model.device)
                self._model.forward(ids, torch.arange(start, start + longest, device=ids.device), cache)
                return {
                    p.key: ChunkKV(
                        torch.stack([x.all_keys[row, :, start : start + len(p.chunk_ids)] for x in cache.layers]),
                        torch.stack([x.all_values[row, :, start : start + len(p.chunk_ids)] for x in cache.layers]),
                    )
                    for row, p in enumerate(prompts)
                }
        except RuntimeError as problem:
            raise PrecomputeError(
                f"A chunk's KV could not be computed: {problem}",
                remedy="Run the command again; it continues from here.",
            ) from problem


def require_blendable(info: EngineInfo) -> None:
    """Raise UnsupportedModelError unless chunk KV of this model can be reused."""
    if not info.can_blend:
        raise UnsupportedModelError(
            f"{info.model} cannot be blended: {info.why_not}.",
            remedy="Use another model, or turn KV reuse off: --no-kv for ingestion, --no-blend for questions.",
        )


# -- in memory and on disk --------------------------------------------------------------------------------------------


class KVStore:
    """Finds chunk KV: in memory first, then in the files. Thread-safe.

    On a CPU the memory tier holds files that are already mapped and checked, so that the operating system's page
    cache is not copied; on a GPU it holds copies in the GPU's memory.

    Args:
        files: The files.
        memory_budget: Most bytes in memory.
        device: Where the model is; None: there is none, and no KV is read.
    """

    def __init__(self, files: KVFiles, *, memory_budget: int, device: torch.device | None) -> None:
        self.files = files
        self.memory_budget = memory_budget
        self._device = device
        self._hot: OrderedDict[tuple[str, str], ChunkKV] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, fingerprint: str, key: str) -> ChunkKV | None:
        """The chunk's KV on the model's device, or None.

        A file that is damaged or cannot be read is a miss, with a warning; a damaged one is removed.
        """
        name = (fingerprint, key)
        with self._lock:
            if kv := self._hot.get(name):
                self._hot.move_to_end(name)
                return kv
        try:
            kv = self.files.load(fingerprint, key)
        except StoreCorruptError as problem:
            log.warning("%s", problem)
            try:
                self.files.delete([name])
            except OSError as failure:
                log.warning("The damaged file cannot be removed: %s", failure)
            return None
        except StoreError as problem:
            log.warning("%s", problem)
            return None
        if kv is not None:
            kv = self._to_device(kv)
            self._keep(name, kv)
        return kv

    def put(self, fingerprint: str, key: str, kv: ChunkKV) -> int:
        """Keep a chunk's KV in the files; returns its size in bytes."""
        return self.files.save(fingerprint, key, kv)

    def has(self, fingerprint: str, key: str) -> bool:
        """Whether the KV is kept."""
        return bool(self.tier(fingerprint, key))

    def tier(self, fingerprint: str, key: str) -> str:
        """Where the KV is kept: "l1" in memory, "l2" in a file, "" nowhere."""
        return "l1" if (fingerprint, key) in self._hot else "l2" if self.files.exists(fingerprint, key) else ""

    def forget(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Drop KV from both tiers."""
        pairs = list(pairs)
        with self._lock:
            for name in pairs:
                if kv := self._hot.pop(name, None):
                    self._bytes -= kv.nbytes
        self.files.delete(pairs)

    def forget_chunks(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Drop the KV of chunks. The prefix's KV is dropped with the last chunk that follows it."""
        pairs = list(pairs)
        self.forget(pairs)
        for fingerprint in dict.fromkeys(fingerprint for fingerprint, _ in pairs):
            prefix = kv_key(fingerprint, ())
            if not self.files.holds_other_than(fingerprint, prefix):
                self.forget([(fingerprint, prefix)])

    @property
    def memory_bytes(self) -> int:
        """Bytes in memory."""
        return self._bytes

    def clear_memory(self) -> None:
        """Drop the memory tier; the files stay."""
        with self._lock:
            self._hot.clear()
            self._bytes = 0

    def _to_device(self, kv: ChunkKV) -> ChunkKV:
        return ChunkKV(kv.keys.to(self._device), kv.values.to(self._device))

    def _keep(self, name: tuple[str, str], kv: ChunkKV) -> None:
        if kv.nbytes > self.memory_budget:
            return
        with self._lock:
            if name not in self._hot:
                self._bytes += kv.nbytes
            self._hot[name] = kv
            while self._bytes > self.memory_budget:
                _, old = self._hot.popitem(last=False)
                self._bytes -= old.nbytes
