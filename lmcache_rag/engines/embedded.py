"""The engine that runs anywhere: a transformers model in this process. It is the default, and the reference."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.blend.policies import get_policy
from lmcache_rag.engines.base import (
    BlendOptions,
    Completion,
    EngineInfo,
    IngestPrompt,
    KVUsage,
    PrecomputeResult,
    QueryPrompt,
    ReuseStats,
    Sampling,
    StreamEvent,
    TextDelta,
    VerifyResult,
    kv_key,
)
from lmcache_rag.engines.kv_files import KVFiles
from lmcache_rag.engines.twins import AsyncTwins
from lmcache_rag.errors import ContextLengthError, PrecomputeError, StoreCorruptError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from lmcache_rag.engines.hf_model import HFModel
    from lmcache_rag.engines.kv_buffer import KVBuffer
    from lmcache_rag.engines.prefill import ChunkKV

log = logging.getLogger("lmcache_rag")

GB = 1_000_000_000


class EmbeddedEngine(AsyncTwins):
    """Answers with a transformers model, on the CPU in float32 or on one GPU in bfloat16.

    Chunk KV is computed behind the shared prefix and kept in files below `kv_dir`; hot chunks also in memory. Safe to
    use from several threads; requests are computed one after another.

    Args:
        model: Folder or name, see lmcache_rag.sources.find_model; None: the default model.
        kv_dir: Folder of the KV files.
        device: "cpu", "cuda", "cuda:1" …; None: a GPU if there is one.
        dtype: Element type of weights and KV; None: float32 on a CPU, bfloat16 on a GPU.
        kv_budget: Most bytes of KV files.
        memory_budget: Most bytes of hot KV in memory.
        kv_block: The prefix is padded to a multiple of so many tokens, as LMCache wants it.
        batch: Chunks computed at once at ingestion. 1 on a CPU, where more gains nothing and a chunk's KV is then the
            same to the bit whatever is ingested beside it; 16 on a GPU.

    Raises:
        SourceError: The model was not found.
        EngineError: It could not be loaded.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        kv_dir: str | Path,
        device: str | None = None,
        dtype: str | None = None,
        kv_budget: int | None = 50 * GB,
        memory_budget: int = 4 * GB,
        kv_block: int = 64,
        batch: int | None = None,
    ) -> None:
        from lmcache_rag.engines.hf_model import HFModel
        from lmcache_rag.sources import find_model, revision_of, tokenizer_digest

        source = find_model(str(model) if model is not None else None)
        self._setup(
            HFModel.open(source.path, device=device, dtype=dtype),
            name=source.name,
            revision=revision_of(source.path),
            tokenizer_hash=tokenizer_digest(source.path),
            files=KVFiles(Path(kv_dir), budget=kv_budget),
            memory_budget=memory_budget,
            kv_block=kv_block,
            batch=batch,
        )

    @classmethod
    def from_model(
        cls, model: HFModel, *, name: str, revision: str, kv_dir: str | Path, **options: Any
    ) -> EmbeddedEngine:
        """An engine over a model that is loaded already; `revision` must tell its weights from any others."""
        engine = cls.__new__(cls)
        budget = options.pop("kv_budget", 50 * GB)
        defaults = {"memory_budget": 4 * GB, "kv_block": 64, "batch": None, "tokenizer_hash": revision}
        engine._setup(
            model, name=name, revision=revision, files=KVFiles(Path(kv_dir), budget=budget), **(defaults | options)
        )
        return engine

    def _setup(
        self,
        model: HFModel,
        *,
        name: str,
        revision: str,
        tokenizer_hash: str,
        files: KVFiles,
        memory_budget: int,
        kv_block: int,
        batch: int | None,
    ) -> None:
        from lmcache_rag.engines.kv_store import KVStore

        self._model = model
        self._kv = KVStore(files, memory_budget=memory_budget, device=model.device)
        self._batch = batch or (16 if model.device.type == "cuda" else 1)
        self._lock = threading.Lock()
        self._info = EngineInfo(
            engine="embedded",
            model=name,
            revision=revision,
            dtype=str(model.dtype).removeprefix("torch."),
            tokenizer=tokenizer_hash,
            kv_block=kv_block,
            context_length=model.context_length,
            kv_bytes_per_token=model.kv_bytes_per_token,
            can_blend=not model.why_not,
            why_not=model.why_not,
        )
        if model.why_not:
            log.warning("%s is not blended: %s. Answers come from full prefills.", name, model.why_not)

    @property
    def info(self) -> EngineInfo:
        """What this engine serves."""
        return self._info

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._model.tokenizer

    @property
    def device(self) -> str:
        """Where the model is, for example "cpu"."""
        return str(self._model.device)

    def load(self) -> None:
        """Load the weights now rather than with the first computation, whose times would contain it."""
        _ = self._model.model

    # -- ingestion ----------------------------------------------------------------------------------------------

    def precompute(self, prompts: Iterable[IngestPrompt]) -> Iterator[PrecomputeResult]:
        """Compute and keep each chunk's KV, skipping what exists; yields each as soon as it is kept.

        Raises:
            UnsupportedModelError: This model cannot be blended.
            PrecomputeError: A chunk's KV could not be computed or kept. What was yielded before is kept.
        """
        self._require_blendable()
        source = iter(prompts)
        while group := list(islice(source, self._batch)):
            todo = {p.key: p for p in group if not self._kv.has(p.fingerprint, p.key)}
            done = self._compute(list(todo.values())) if todo else {}
            for prompt in group:
                if prompt.key in done:
                    nbytes = self._kv.put(prompt.fingerprint, prompt.key, done.pop(prompt.key))
                    yield PrecomputeResult(prompt.key, len(prompt.chunk_ids), nbytes, computed=True)
                else:
                    nbytes = len(prompt.chunk_ids) * self._info.kv_bytes_per_token
                    yield PrecomputeResult(prompt.key, len(prompt.chunk_ids), nbytes, computed=False)

    def missing(self, prompts: Sequence[IngestPrompt]) -> list[bool]:
        """For each prompt, whether its KV is absent."""
        return [not self._kv.has(p.fingerprint, p.key) for p in prompts]

    def forget(self, prompts_or_keys: Iterable[tuple[str, str]]) -> None:
        """Drop the KV of (fingerprint, key) pairs; unknown pairs are ignored."""
        self._kv.forget(prompts_or_keys)

    def verify(self, prompt: IngestPrompt) -> VerifyResult:
        """Compute one chunk's KV again and compare it with the file. Changes nothing."""
        self._require_blendable()
        try:
            kept = self._kv.files.load(prompt.fingerprint, prompt.key)
        except StoreCorruptError:
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
        count, size = self._kv.files.usage()
        return KVUsage(count, size, self._kv.memory_bytes)

    def _compute(self, prompts: list[IngestPrompt]) -> dict[str, ChunkKV]:
        """Chunk KV behind the prefix. A batch is padded on the right, where causal attention never looks."""
        import torch

        from lmcache_rag.engines.prefill import ChunkKV

        start = prompts[0].prefix_tokens
        longest = max(len(p.chunk_ids) for p in prompts)
        if start + longest > self._info.context_length:
            raise PrecomputeError(
                f"A chunk of {longest} tokens does not fit the context of {self._info.context_length}.",
                remedy="Split into smaller chunks (--chunk-tokens).",
            )
        try:
            with self._lock, torch.inference_mode():
                prefix, _ = self._prefix(prompts[0].fingerprint, prompts[0].token_ids[:start])
                cache = self._model.buffer(start + longest, batch=len(prompts))
                for index, layer in enumerate(cache.layers):
                    layer.all_keys[:, :, :start] = prefix.keys[index]
                    layer.all_values[:, :, :start] = prefix.values[index]
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
                f"A chunk's KV could not be computed: {problem}", remedy="Run the command again; it goes on from here."
            ) from problem

    def _prefix(self, fingerprint: str, prefix_ids: tuple[int, ...]) -> tuple[ChunkKV, bool]:
        """KV of the prefix, and whether it was there already. Computed once for each fingerprint."""
        import torch

        from lmcache_rag.engines.prefill import ChunkKV

        key = kv_key(fingerprint, ())
        if kv := self._kv.get(fingerprint, key):
            return kv, True
        ids = torch.tensor(prefix_ids, device=self._model.device)
        cache = self._model.buffer(len(ids))
        self._model.forward(ids[None], torch.arange(len(ids), device=ids.device), cache)
        kv = ChunkKV(
            torch.stack([layer.keys[0] for layer in cache.layers]),
            torch.stack([layer.values[0] for layer in cache.layers]),
        )
        try:
            self._kv.put(fingerprint, key, kv)
        except PrecomputeError as problem:  # a query must not fail because the store cannot be written
            log.warning("%s", problem)
        return kv, False

    # -- queries ------------------------------------------------------------------------------------------------

    def generate(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Completion:
        """Answer one prompt."""
        for event in self.stream(prompt, sampling, blend):
            if isinstance(event, Completion):
                return event
        raise AssertionError("a stream ends with a Completion")

    def stream(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Iterator[StreamEvent]:
        """Answer one prompt piece by piece. Closing the iterator stops the computation.

        Raises:
            UnsupportedModelError: Blending is asked for and this model cannot be blended.
            ContextLengthError: The prompt is longer than the context.
        """
        if blend.enabled:
            get_policy(blend.policy)
            self._require_blendable()
        if len(prompt) >= self._info.context_length:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens, the model's context holds {self._info.context_length} with the "
                "answer.",
                remedy="Retrieve fewer chunks or ask a shorter question.",
            )
        return self._stream(prompt, sampling, blend)

    def _stream(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Iterator[StreamEvent]:
        import torch

        from lmcache_rag.engines.decode import Decoded, decode

        begin = time.perf_counter()
        ids = torch.tensor(prompt.token_ids, device=self._model.device)
        counts: dict[str, Any] = {"computed_tokens": len(prompt), "chunks_missed": len(prompt.chunks)}

        def prepare() -> KVBuffer | None:
            if self._model.why_not:
                return None
            cache = self._model.buffer(min(len(prompt) + sampling.max_tokens, self._info.context_length))
            if blend.enabled:
                counts.update(self._blend(prompt, ids, cache, blend))
            return cache

        result = Decoded()
        for piece in decode(self._model, ids, prepare, sampling, self._lock, result):
            yield TextDelta(piece)
        stats = ReuseStats(len(prompt), ttft_ms=(result.first_token - begin) * 1e3, **counts)
        missed = f"The KV of {stats.chunks_missed} chunk(s) was missing; they were computed."
        warnings = (missed,) if blend.enabled and stats.chunks_missed else ()
        yield Completion(result.text, tuple(result.ids), result.finish_reason, stats, warnings)

    def _blend(self, prompt: QueryPrompt, ids: torch.Tensor, cache: KVBuffer, blend: BlendOptions) -> dict[str, Any]:
        """Fill the cache from chunk KV; returns the statistics' fields."""
        from lmcache_rag.engines.prefill import blended_prefill

        begin = time.perf_counter()
        prefix, prefix_was_there = self._prefix(prompt.fingerprint, prompt.token_ids[: prompt.prefix_tokens])
        found = [(span, self._kv.get(prompt.fingerprint, span.key)) for span in prompt.chunks]
        hits = [(span, kv) for span, kv in found if kv is not None and kv.tokens == span.end - span.start]
        lookup_ms = (time.perf_counter() - begin) * 1e3
        done = blended_prefill(self._model, prompt, ids, cache, prefix, hits, get_policy(blend.policy), blend.ratio)
        exact = done.exact_tokens - (0 if prefix_was_there else prompt.prefix_tokens)
        return {
            "prefix_tokens": exact,
            "reused_tokens": done.reused_tokens,
            "recomputed_tokens": done.recomputed_tokens,
            "computed_tokens": len(prompt) - exact - done.reused_tokens - done.recomputed_tokens,
            "chunks_hit": len(hits),
            "chunks_missed": len(prompt.chunks) - len(hits),
            "lookup_ms": lookup_ms,
            "load_ms": done.load_ms,
            "blend_ms": done.blend_ms,
        }

    def close(self) -> None:
        """Drop the KV in memory; the files stay. Safe to call twice."""
        self._kv.clear_memory()

    def _require_blendable(self) -> None:
        if self._model.why_not:
            raise UnsupportedModelError(
                f"{self._info.model} cannot be blended: {self._model.why_not}.",
                remedy="Use another model, or go without: --no-kv for ingestion, --no-blend for questions.",
            )
