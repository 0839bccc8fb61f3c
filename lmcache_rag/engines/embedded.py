"""The embedded engine: a transformers model in this process. It is the default, and the reference."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag import lazy_fill
from lmcache_rag._utils import AsyncFromStream, needs
from lmcache_rag.costs import SELECTING, CostModel, Exploration, Recheck, Work
from lmcache_rag.engines.base import (
    BlendOptions,
    ChunkReuse,
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
)
from lmcache_rag.engines.chunk_cache import ChunkCache, require_blendable
from lmcache_rag.engines.kv_files import KVFiles
from lmcache_rag.errors import ContextLengthError
from lmcache_rag.policies import at_most, get_policy
from lmcache_rag.protocol import COMPUTED, DECISION, DEFAULT_MIN_GAIN, PREDICTED, Decision

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.engines.base import BlendOptions, ChunkSpan, EngineInfo, QueryPrompt
    from lmcache_rag.engines.chunk_cache import ChunkCache
    from lmcache_rag.engines.hf_blend import BlendedPrefill
    from lmcache_rag.engines.hf_generate import PromptState
    from lmcache_rag.engines.hf_model import HFModel, KVBuffer
    from lmcache_rag.weights import Source

log = logging.getLogger("lmcache_rag")

GB = 1_000_000_000


class EmbeddedEngine(AsyncFromStream):
    """Answers with a transformers model, on the CPU in float32 or on one GPU in bfloat16.

    Chunk KV is computed after the shared prefix and stored in files below `kv_dir`; recently used chunks also in
    memory. Safe to use from several threads; requests are computed one after another.

    Args:
        model: Folder or name, see lmcache_rag.weights.find_model, or where it was found; None: the default model.
        kv_dir: Folder of the KV files.
        device: "cpu", "cuda", "cuda:1" …; None: a GPU if there is one.
        dtype: Element type of weights and KV; None: float32 on a CPU, bfloat16 on a GPU.
        kv_budget: Most bytes of KV files.
        memory_budget: Most bytes of hot KV in memory.
        kv_block: The prefix is padded to a multiple of this number of tokens, as LMCache requires.
        batch: Chunks computed at once at ingestion. 1 on a CPU, where more gains nothing and a chunk's KV is then the
            same to the bit, independent of the other chunks; 16 on a GPU.
        min_gain: A prompt is blended if its first token is predicted to come earlier by this share; None: always.

    Raises:
        SourceError: The model was not found.
        EngineError: It could not be loaded.
    """

    exit_wait_s = 120.0  # PyTorch aborts a process that ends while one of its threads still computes a chunk

    def __init__(
        self,
        model: str | Path | Source | None = None,
        *,
        kv_dir: str | Path,
        device: str | None = None,
        dtype: str | None = None,
        kv_budget: int | None = 50 * GB,
        memory_budget: int = 4 * GB,
        kv_block: int = 64,
        batch: int | None = None,
        min_gain: float | None = DEFAULT_MIN_GAIN,
    ) -> None:
        from lmcache_rag.weights import Source, find_model, revision_of, tokenizer_digest

        with needs("embedded"):
            import torch  # noqa: F401 - transformers without it fails in other ways

            from lmcache_rag.engines.hf_model import HFModel

        source = model if isinstance(model, Source) else find_model(str(model) if model is not None else None)
        self._setup(
            HFModel.open(source.path, device=device, dtype=dtype),
            name=source.name,
            revision=revision_of(source.path),
            tokenizer_hash=tokenizer_digest(source.path),
            kv_dir=kv_dir,
            kv_budget=kv_budget,
            memory_budget=memory_budget,
            kv_block=kv_block,
            batch=batch,
            min_gain=min_gain,
        )

    @classmethod
    def from_model(
        cls, model: HFModel, *, name: str, revision: str, kv_dir: str | Path, **options: Any
    ) -> EmbeddedEngine:
        """An engine over a model that is loaded already; `revision` must be unique to its weights.

        The options are the constructor's; prompts are blended always, unless `min_gain` is given.
        """
        engine = cls.__new__(cls)
        engine._setup(model, name=name, revision=revision, kv_dir=kv_dir, **options)
        return engine

    def _setup(
        self,
        model: HFModel,
        *,
        name: str,
        revision: str,
        kv_dir: str | Path,
        tokenizer_hash: str | None = None,
        kv_budget: int | None = 50 * GB,
        memory_budget: int = 4 * GB,
        kv_block: int = 64,
        batch: int | None = None,
        min_gain: float | None = None,
    ) -> None:
        from lmcache_rag.engines.chunk_cache import KVStore

        self._model = model
        self._lock = threading.Lock()
        self._info = EngineInfo(
            engine="embedded",
            model=name,
            revision=revision,
            dtype=str(model.dtype).removeprefix("torch."),
            tokenizer=revision if tokenizer_hash is None else tokenizer_hash,
            kv_block=kv_block,
            context_length=model.context_length,
            kv_bytes_per_token=model.kv_bytes_per_token,
            can_blend=not model.why_not,
            why_not=model.why_not,
            falls_back=False,
        )
        self._chunks = ChunkCache(
            model,
            self._info,
            KVStore(KVFiles(Path(kv_dir), budget=kv_budget), memory_budget=memory_budget, device=model.device),
            lock=self._lock,
            batch=batch or (16 if model.device.type == "cuda" else 1),
        )
        self._gate = EmbeddedGate(min_gain)
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

    @property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end an answer."""
        ends = self._model.model.generation_config.eos_token_id
        return frozenset(
            ends if isinstance(ends, list) else [self._model.tokenizer.eos_token_id if ends is None else ends]
        )

    def load(self) -> None:
        """Load the weights now, so that the times of the first computation do not include it."""
        _ = self._model.model

    def prefill_rate(self, tokens: int = 256) -> float:
        """Tokens a second at which chunks of this length are computed, measured now."""
        import torch

        count, batch = min(tokens, self._info.context_length), self._chunks.batch
        with self._lock, torch.inference_mode():
            for length in (8, count):  # the first run has costs of its own
                ids = torch.ones((batch, length), dtype=torch.int64, device=self._model.device)
                cache = self._model.buffer(length, batch=batch)
                begin = time.perf_counter()
                states = self._model.forward(ids, torch.arange(length, device=ids.device), cache)
                _ = states[0, -1, 0].item()  # waits for a GPU
        return batch * count / (time.perf_counter() - begin)

    # -- ingestion ----------------------------------------------------------------------------------------------

    def precompute(
        self, prompts: Iterable[IngestPrompt], *, stop: threading.Event | None = None
    ) -> Iterator[PrecomputeResult]:
        """Compute and keep each chunk's KV, see Engine.precompute; UnsupportedModelError where it cannot be blended."""
        return self._chunks.precompute(prompts)

    def missing(self, prompts: Sequence[IngestPrompt]) -> list[bool]:
        """For each prompt, whether its KV is absent."""
        return self._chunks.missing(prompts)

    def forget(self, prompts_or_keys: Iterable[tuple[str, str]]) -> None:
        """Drop the KV of (fingerprint, key) pairs; unknown pairs are ignored."""
        self._chunks.forget(prompts_or_keys)

    def verify(self, prompt: IngestPrompt) -> VerifyResult:
        """Compute one chunk's KV again and compare it with the file. Changes nothing."""
        return self._chunks.verify(prompt)

    def usage(self) -> KVUsage:
        """How much KV is held."""
        return self._chunks.usage()

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
        check_request(self._info, prompt, blend)
        return self._stream(prompt, sampling, blend)

    def prefill(self, prompt: QueryPrompt, blend: BlendOptions, *, room: int = 0) -> PromptState:
        """Prefill one prompt and return the model's state, to read logits. Errors as for stream.

        Args:
            prompt: The prompt.
            blend: How KV is reused.
            room: How many tokens are going to be appended at most.
        """
        import torch

        from lmcache_rag.engines.hf_generate import PromptState

        check_request(self._info, prompt, blend)
        ids = torch.tensor(prompt.token_ids, device=self._model.device)
        with self._lock, torch.inference_mode():
            cache, counts, spent = fill_cache(self._model, self._chunks, prompt, ids, blend, room=room)
        rest = ids if cache is None else ids[cache.get_seq_length() :]
        return PromptState(self._model, rest, cache, self._lock, spent, counts)

    def _stream(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Iterator[StreamEvent]:
        import torch

        from lmcache_rag.engines.hf_generate import Decoded, decode

        begin = time.perf_counter()
        ids = torch.tensor(prompt.token_ids, device=self._model.device)
        counts: dict[str, Any] = {"computed_tokens": len(prompt), "chunks_missed": len(prompt.chunks)}

        prepared = [begin, 0]  # when the rest of the prompt began to be computed, and after how many tokens

        def prepare() -> KVBuffer | None:
            room = sampling.max_tokens
            cache, done, _ = fill_cache(self._model, self._chunks, prompt, ids, blend, room=room, gate=self._gate)
            counts.update(done)
            prepared[:] = [time.perf_counter(), 0 if cache is None else cache.get_seq_length()]
            return cache

        result = Decoded()
        for piece in decode(self._model, ids, prepare, sampling, self._lock, result):
            yield TextDelta(piece)
        self._gate.on_prefill(len(prompt) - int(prepared[1]), int(prepared[1]), result.first_token - prepared[0])
        absent = counts.pop("absent", ())
        computed = tuple(ChunkReuse(computed_tokens=span.end - span.start) for span in prompt.chunks)
        chunks = counts.pop("chunks", computed)
        stats = ReuseStats(len(prompt), ttft_ms=(result.first_token - begin) * 1e3, **counts)
        missed = f"The KV of {stats.chunks_missed} chunk(s) was missing; they were computed."
        warnings = (missed,) if blend.enabled and stats.chunks_missed else ()
        yield Completion(result.text, tuple(result.ids), result.finish_reason, stats, warnings, absent, chunks)

    def close(self) -> None:
        """Drop the KV in memory; the files stay. Safe to call twice."""
        lazy_fill.cancel(self)
        self._chunks.clear_memory()


# -- blending ---------------------------------------------------------------------------------------------------------


def check_request(info: EngineInfo, prompt: QueryPrompt, blend: BlendOptions) -> None:
    """Check that a request can be answered, before any work.

    Raises:
        ConfigError: There is no such policy.
        UnsupportedModelError: Blending is asked for and this model cannot be blended.
        ContextLengthError: The prompt is longer than the context.
    """
    if blend.enabled:
        get_policy(blend.policy)
        require_blendable(info)
    if len(prompt) >= info.context_length:
        raise ContextLengthError(
            f"The prompt has {len(prompt)} tokens, the model's context holds {info.context_length} with the answer.",
            remedy="Retrieve fewer chunks or ask a shorter question.",
        )


def fill_cache(
    model: HFModel,
    chunks: ChunkCache,
    prompt: QueryPrompt,
    ids: Tensor,
    blend: BlendOptions,
    *,
    room: int,
    gate: EmbeddedGate | None = None,
) -> tuple[KVBuffer | None, dict[str, Any], dict[str, float]]:
    """Fill a KV cache for the prompt from chunk KV, with room for `room` more tokens; the caller computes the rest.

    The caller holds the model's lock and is in inference mode.

    Args:
        model: The model.
        chunks: Its chunk KV.
        prompt: The prompt.
        ids: Its token ids, int64 [n], on the model's device.
        blend: How KV is reused.
        room: How many tokens may follow.
        gate: Decides whether the prompt is blended; None: it is.

    Returns:
        The cache, or None if the model makes its own; the fields of ReuseStats for this prompt, and with them
        `absent` and `chunks`, which a Completion holds beside its statistics; and the milliseconds of each step.
    """
    if model.why_not:
        return None, {}, {}
    cache = model.buffer(min(len(prompt) + room, model.context_length))
    if not blend.enabled:
        return cache, {}, {}
    return cache, *_blend(model, chunks, prompt, ids, cache, blend, gate)


def _blend(
    model: HFModel,
    chunks: ChunkCache,
    prompt: QueryPrompt,
    ids: Tensor,
    cache: KVBuffer,
    blend: BlendOptions,
    gate: EmbeddedGate | None,
) -> tuple[dict[str, Any], dict[str, float]]:
    from lmcache_rag.engines.hf_blend import blended_prefill

    begin = time.perf_counter()
    prefix, prefix_was_there = chunks.prefix(prompt.fingerprint, prompt.token_ids[: prompt.prefix_tokens])
    prefix_ms = (time.perf_counter() - begin) * 1e3
    held = chunks.held(prompt)
    decided = gate.decide(prompt, held, blend) if gate is not None else {}
    computed = decided.get(DECISION) in COMPUTED
    hits = chunks.find(prompt, first=computed)
    lookup_ms = (time.perf_counter() - begin) * 1e3
    found = {span for span, _ in hits}
    done = blended_prefill(model, prompt, ids, cache, prefix, hits, get_policy(blend.policy), blend.budget)
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize(model.device)  # so that what is measured is what was done
    if gate is not None and hits and not computed:
        whole_ms = (time.perf_counter() - begin) * 1e3 - prefix_ms
        gate.on_blend(
            prompt,
            held,
            done,
            blend,
            load_ms=lookup_ms - prefix_ms + done.load_ms + done.shift_ms,
            whole_ms=whole_ms,
        )
    # A prefix that was computed just now counts as computed, not as reused.
    exact = done.exact_tokens - (0 if prefix_was_there else prompt.prefix_tokens)
    stats = {
        "prefix_tokens": exact,
        "reused_tokens": done.reused_tokens,
        "recomputed_tokens": done.recomputed_tokens,
        "computed_tokens": len(prompt) - exact - done.reused_tokens - done.recomputed_tokens,
        "chunks_hit": len(hits),
        "chunks_missed": 0 if computed else len(prompt.chunks) - len(hits),
        "absent": () if computed else tuple(index for index, span in enumerate(prompt.chunks) if span not in found),
        "chunks": tuple(_reuse(span, span in found, done) for span in prompt.chunks),
        "lookup_ms": lookup_ms,
        "load_ms": done.load_ms + done.shift_ms,
        "blend_ms": done.select_ms + done.recompute_ms,
        "budget_tokens": done.recomputed_tokens,
        "budget_reason": done.reason,
        **decided,
    }
    spent = {
        "look-up": lookup_ms,
        "load": done.load_ms,
        "key shift": done.shift_ms,
        "selection": done.select_ms,
        "selected layers": done.recompute_ms,
    }
    return stats, spent


class EmbeddedGate:
    """Whether prompts are blended, by what blends and prefills took before. Safe to use from several threads.

    Nothing is measured at start: a prompt is blended until it is known what computing it takes, which first questions
    and ingestion show. As in lmcache_rag.connector.admission.BlendGate, some are blended to measure that again.

    Args:
        min_gain: Share of the time that a blend must save; None: everything is blended.

    Attributes:
        costs: What the work takes: loads from memory ("l1") and from files ("l2").
    """

    def __init__(self, min_gain: float | None) -> None:
        self.min_gain, self.costs = min_gain, CostModel()
        self._exploration, self._recheck, self._lock = Exploration(), Recheck(), threading.Lock()

    def decide(self, prompt: QueryPrompt, held: Mapping[ChunkSpan, str], blend: BlendOptions) -> dict[str, Any]:
        """The fields of ReuseStats for the decision; none where there is nothing to blend.

        Args:
            prompt: The prompt.
            held: The tier of each of its chunks that has KV.
            blend: How KV is reused.
        """
        exact, placed, end = _places(prompt, held)
        if not placed:
            return {}
        total, selected = sum(placed.values()), _most(blend, held, exact)
        if blend.budget.auto:
            with self._lock:
                selected = self.costs.recomputed(blend.policy, selected)
        work = Work(
            len(prompt),
            local=exact,
            exact=exact,
            placed=placed,
            computed=selected + end - exact - total,
            rest=len(prompt) - end,
            policy=blend.policy,
            selects=blend.policy in SELECTING and selected < total,
            looked_up=False,
        )
        if self.min_gain is None or blend.always:
            return {DECISION: str(Decision.ALWAYS)}
        with self._lock:
            forecast = self.costs.forecast(work)
            if forecast is None or (forecast.gains(self.min_gain) and not forecast.known):
                return {DECISION: str(Decision.UNKNOWN)}
            if forecast.gains(self.min_gain):
                again = self._recheck.is_due(len(prompt) - exact, forecast)
                decision = Decision.COMPUTED_AGAIN if again else Decision.BLENDED
            else:
                due = self._exploration.is_due(len(prompt), forecast)
                decision = Decision.MEASURED if due else Decision.NOT_FASTER
        times = dict(zip(PREDICTED, (forecast.blend_ms, forecast.compute_ms), strict=True))
        return {DECISION: str(decision), **times}

    def on_blend(
        self,
        prompt: QueryPrompt,
        held: Mapping[ChunkSpan, str],
        done: BlendedPrefill,
        blend: BlendOptions,
        *,
        load_ms: float,
        whole_ms: float,
    ) -> None:
        """A prompt was blended: what finding and loading took, and what all took."""
        exact, placed, _ = _places(prompt, held)
        total = done.reused_tokens + done.recomputed_tokens
        if not placed or total != sum(placed.values()):
            return  # KV was damaged, or dropped meanwhile
        policy, most = blend.policy, _most(blend, held, exact)
        selects = policy in SELECTING and 0 < done.recomputed_tokens < total
        tokens = done.length - done.exact_tokens - done.reused_tokens
        with self._lock:
            self.costs.load.observe((0, placed.get("l1", 0), placed.get("l2", 0)), load_ms)
            self.costs.observe_passes(policy, tokens, len(prompt), max(whole_ms - load_ms, 0.0), selects=selects)
            if blend.budget.auto:
                self.costs.observe_recomputed(policy, done.recomputed_tokens, most)

    def on_prefill(self, tokens: int, context: int, seconds: float) -> None:
        """So many tokens were computed after `context` others, up to the first token of an answer."""
        with self._lock:
            self.costs.prefill.observe((tokens, context, 0), seconds * 1e3)
            self._recheck.on_computed(tokens)


def _most(blend: BlendOptions, held: Mapping[ChunkSpan, str], exact: int) -> int:
    """Most tokens that a blend of these chunks recomputes, those before `exact` aside."""
    placed = [span.end - span.start for span in held if span.start >= exact]
    return at_most(get_policy(blend.policy), blend.budget, sum(placed), len(placed))


def _places(prompt: QueryPrompt, held: Mapping[ChunkSpan, str]) -> tuple[int, dict[str, int], int]:
    """Tokens whose KV is exact, tokens that a blend places by tier, and where it ends."""
    exact, placed = prompt.prefix_tokens, dict[str, int]()
    end = exact
    for span, tier in held.items():
        if span.start == exact == end and not placed and not prompt.neutral_tokens:
            exact = end = span.end
        else:
            placed[tier] = placed.get(tier, 0) + span.end - span.start
            end = span.end
    return exact, placed, end


def _reuse(span: ChunkSpan, found: bool, done: BlendedPrefill) -> ChunkReuse:
    tokens = span.end - span.start
    if not found:
        return ChunkReuse(computed_tokens=tokens)
    if span.end <= done.exact_tokens:
        return ChunkReuse(prefix_tokens=tokens)
    again = sum(span.start <= position < span.end for position in done.selected)
    return ChunkReuse(reused_tokens=tokens - again, recomputed_tokens=again)
