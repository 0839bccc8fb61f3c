"""The self-check at start: compares a blend on this model and build with a full prefill, before the first request.

At ratio 1 a blend computes every token, so it must equal vLLM's own prefill up to rounding. How much rounding does is
measured: the same prefill in chunks of other sizes. And cached keys moved to new positions must equal keys computed
there, which shows in the first layer: its keys depend on token and position alone. Requested in LMCache issue 4666: a
model or a build on which blending is wrong must not be discovered by wrong answers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_rag.budget import Budget
from lmcache_rag.connector import kv_quant, vllm_internals
from lmcache_rag.connector.attention import PagedSequence
from lmcache_rag.connector.blend_pass import BlendPass, Model, StepIterator, T
from lmcache_rag.connector.identity import identity
from lmcache_rag.connector.metadata import Match
from lmcache_rag.policies import QueryPolicy
from lmcache_rag.protocol import CannotBlend, Unsupported
from lmcache_rag.weights.packages import cache_folder

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("lmcache_rag")

MARGIN = 4.0  # times the difference between two chunkings of a full prefill
# Differences that are allowed even if the chunkings differ by less, as a share of the values: a blend's kernels are not
# vLLM's, so they may round differently where vLLM's always round alike.
_LEAST = 1e-4
_LEAST_EPS = 1.0
_MOVED, _MOVED_EPS = 1e-3, 4.0  # the same for a moved key, which is rounded once more than a computed one
# FP8: a moved key is off by up to a step of the format, an eighth. Attention of FP8 kernels rounds probabilities too.
_MOVED_FP8, _LEAST_FP8 = 0.125, 0.02
_CHUNKS, _GAP, _SUFFIX, _UNIT = 3, 3, 33, 64
_WORDS = (300, 15000)  # ids of plain text in the usual vocabularies; no special tokens
_STALE = 7.0  # fills blocks before they are written, so that missing writes show
_SOME, _ALL = Budget(share=0.15), Budget(share=1.0)
_FOLDER, _MOST_PASSED = "self-check", 200
_PACKAGES = ("vllm", "torch", "triton", "lmcache-rag")


class CheckedModel(Model, Protocol):
    """What the check needs of a model in addition to what a blend does."""

    @property
    def block_size(self) -> int:
        """Tokens in a block of the cache."""
        ...

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [blocks, block, kv heads, size]."""
        ...

    def prefill(self, ids: Tensor, positions: Tensor, sequence: PagedSequence) -> Tensor:
        """Run vLLM's own pass over consecutive positions of a prompt, which writes their KV; returns hidden states."""
        ...

    def logits(self, hidden: Tensor) -> Tensor | None:
        """The logits of hidden states; None on a rank that does not get them."""
        ...

    def copies(self, longest: int) -> Mapping[str, KVCopy]:
        """Each way to move chunk KV over distances up to that, by name."""
        ...

    def trial_adapter(self) -> AbstractContextManager[Any]:
        """A `with` block in which there is a LoRA adapter of random weights; gives it, None without LoRA."""
        ...

    def using(self, adapter: Any) -> AbstractContextManager[None]:
        """A `with` block whose passes run with that adapter."""
        ...


class KVCopy(Protocol):
    """See lmcache_rag.connector.model_runner.GpuCopy."""

    def run(self, matches: Sequence[Match], sequence: PagedSequence) -> None:
        """Copy blocks to their positions in a sequence, keys rotated to match."""
        ...


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        name: What was compared.
        difference: Difference of the two in the worst row, as a share of the values.
        allowed: Largest difference that counts as rounding.
    """

    name: str
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether they agree; NaN does not."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        return f"{self.name} differ by {self.difference:.2g} of their size, where {self.allowed:.2g} is rounding"


@dataclass(frozen=True)
class Prompt:
    """The built-in prompt: random words from a fixed seed.

    Attributes:
        ids: Token ids.
        prefix: Tokens before the first chunk's gap.
        spans: (start, end) of each chunk: a multiple of the block size long, starting anywhere in a block.
    """

    ids: tuple[int, ...]
    prefix: int
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, *, vocabulary: int, block: int, longest: int) -> Prompt:
        """The prompt for a vocabulary of that size and a cache with blocks of `block` tokens, no longer than `longest`.

        Raises:
            ValueError: Not even one chunk fits.
        """
        unit = -(-_UNIT // block) * block
        chunks = min(_CHUNKS, (longest - unit - _SUFFIX) // (unit + _GAP))
        if chunks < 1:
            raise ValueError(f"sequences of {longest} tokens are too short for the check")
        length = unit + chunks * (unit + _GAP) + _SUFFIX
        dice = random.Random(4666)  # noqa: S311 - not a secret: every rank draws the same
        ids = tuple(dice.randrange(min(_WORDS[0], vocabulary // 2), min(_WORDS[1], vocabulary)) for _ in range(length))
        starts = [unit + _GAP + number * (unit + _GAP) for number in range(chunks)]
        return cls(ids, unit, tuple((start, start + unit) for start in starts))


def run_self_check(vllm_config: Any, model: CheckedModel, on_all_ranks: Callable[[bool], bool]) -> Unsupported | None:
    """Compare a blend with a full prefill, unless this model and build passed at an earlier start.

    Args:
        vllm_config: vLLM's configuration.
        model: The model, ready to blend.
        on_all_ranks: Whether something is true on all tensor-parallel ranks; every rank must call it.

    Returns:
        Why blends must not be trusted on this model and build; None if they equal a full prefill.
    """
    name = check_name(vllm_config)
    if on_all_ranks(has_passed(name)):
        log.info("Self-check: passed at an earlier start of this model and build")
        return None
    begun, reason = time.perf_counter(), None
    try:
        config = vllm_config.model_config
        findings = compare_with_prefill(
            model, vocabulary=int(config.get_vocab_size()), longest=int(config.max_model_len)
        )
        wrong = [finding for finding in findings if not finding.holds]
    except Exception as problem:
        log.exception("The self-check could not run")
        detail = f"the self-check at start could not run: {type(problem).__name__}: {problem}"
        reason = Unsupported(CannotBlend.SELF_CHECK_ERROR, detail)
    else:
        for finding in findings:
            log.debug("Self-check: %s", finding)
        if wrong:
            detail = f"the self-check at start failed: {'; '.join(map(str, wrong))}"
            reason = Unsupported(CannotBlend.SELF_CHECK, detail)
    if not on_all_ranks(reason is None) and reason is None:
        reason = Unsupported(CannotBlend.OTHER_RANK, "the self-check at start failed on another rank")
    if reason is not None:
        log.error("BLENDING IS OFF: %s. Exact prefixes are reused, everything else is computed.", reason)
        return reason
    log.info("Self-check: passed, a blend equals a full prefill (%.1f s)", time.perf_counter() - begun)
    remember_passed(name)
    return None


def compare_with_prefill(model: CheckedModel, *, vocabulary: int, longest: int) -> list[Finding]:
    """Blend the built-in prompt, and compare. Before any request: blocks of the cache are written, and cleared again.

    All tensor-parallel ranks must call it.

    Args:
        model: The model, ready to blend.
        vocabulary: Number of token ids.
        longest: Most tokens of a sequence.

    Raises:
        ValueError: The KV cache is too small, sequences are too short, or a LoRA adapter changes nothing.
    """
    import torch

    keys = model.cache(0)[0]
    prompt = Prompt.of(vocabulary=vocabulary, block=model.block_size, longest=longest)
    whole = -(-len(prompt.ids) // model.block_size)
    alone = -(-(prompt.prefix + prompt.spans[0][1] - prompt.spans[0][0]) // model.block_size)
    if keys.shape[0] < 1 + whole + alone:  # block 0 is vLLM's null block
        raise ValueError(
            f"a KV cache of {keys.shape[0]} blocks of {model.block_size} tokens is too small for the check"
        )
    with torch.inference_mode():
        check = _Check(model, prompt, range(1, 1 + whole), range(1 + whole, 1 + whole + alone))
        try:
            findings = check.run()
            with model.trial_adapter() as adapter:
                if adapter is not None:
                    with model.using(adapter):
                        findings += check.run(" with a LoRA adapter")
            return findings
        finally:
            check.fill(0.0)


class _Check:
    def __init__(self, model: CheckedModel, prompt: Prompt, whole: range, alone: range) -> None:
        import torch

        device = model.cache(0)[0].device
        self._model, self._prompt = model, prompt
        self._ids = torch.tensor(prompt.ids, dtype=torch.int64, device=device)
        self._sequence = PagedSequence.of(whole, model.block_size, str(device))
        self._alone = PagedSequence.of(alone, model.block_size, str(device))
        self._blocks = torch.cat([self._sequence.blocks, self._alone.blocks]).long()
        self._tail = range(len(prompt.ids) - _SUFFIX, len(prompt.ids))  # what is compared
        self._before: Tensor | None = None  # hidden states of the last run
        self._fp8 = kv_quant.is_fp8(model.cache(0)[0])

    def fill(self, value: float) -> None:
        """Fill the blocks that the check uses."""
        for layer in range(self._model.layers):
            for cache in self._model.cache(layer):
                kv_quant.fill(cache, self._blocks, value)

    def run(self, how: str = "") -> list[Finding]:
        """All comparisons.

        Raises:
            ValueError: There was another run, with another adapter and the same hidden states.
        """
        length = len(self._prompt.ids)
        want = self._full(length)
        if self._before is not None and _difference(want, self._before) < _LEAST:
            raise ValueError("a LoRA adapter of random weights changes no hidden state")
        self._before = want.clone()
        computed = self._first_layer()
        others = [self._full(length // 2 + 7), self._full(length // 3 + 5)]
        findings = []
        for name, copy in self._model.copies(length).items():
            self._place(copy)
            difference = _difference(self._first_layer(), computed)
            allowed = _MOVED_FP8 if self._fp8 else _allowed(computed, _MOVED, _MOVED_EPS)
            findings.append(Finding(f"KV moved {name}{how}", difference, allowed))
        states = [want, *others, self._blended(findings)]
        logits = [of for state in states if (of := self._model.logits(state)) is not None]
        least = _LEAST_FP8 if self._fp8 else _LEAST
        findings += _compared("hidden states", states, how, least)
        return findings + _compared("logits", logits, how, least) if logits else findings

    def _full(self, chunk_size: int) -> Tensor:
        """A full prefill in chunks of that size: hidden states of the last tokens."""
        self.fill(_STALE)
        return self._prefill(self._ids, self._sequence, 0, chunk_size)[-_SUFFIX:]

    def _prefill(self, ids: Tensor, sequence: PagedSequence, first: int, chunk_size: int) -> Tensor:
        import torch

        chunk_size, states = min(chunk_size, self._model.max_tokens), []
        for start in range(first, len(ids), chunk_size):
            positions = torch.arange(start, min(start + chunk_size, len(ids)), device=ids.device)
            states.append(self._model.prefill(ids[positions], positions, sequence).clone())
        return torch.cat(states)

    def _place(self, copy: KVCopy) -> None:
        """Compute chunks after the prefix, as ingestion does, and copy them to their positions in the prompt."""
        import torch

        self.fill(_STALE)
        prefix, block, many = self._prompt.prefix, self._model.block_size, len(self._ids)
        self._prefill(self._ids[:prefix], self._sequence, 0, many)
        for start, end in self._prompt.spans:
            self._prefill(torch.cat([self._ids[:prefix], self._ids[start:end]]), self._alone, 0, many)
            blocks = self._alone.blocks[prefix // block :].tolist()
            copy.run(
                [
                    Match(start + at, start + at + block, prefix + at, prefix + at + block, block=blocks[at // block])
                    for at in range(0, end - start, block)
                ],
                self._sequence,
            )

    def _first_layer(self) -> Tensor:
        """The first layer's keys and values of the chunks, [tokens, 2 * heads * size]."""
        import torch

        both = torch.cat([self._sequence.gather(cache, len(self._ids)) for cache in self._model.cache(0)], 1)
        return torch.cat([both[start:end] for start, end in self._prompt.spans]).flatten(1)

    def _blended(self, findings: list[Finding]) -> Tensor:
        """Hidden states of the last tokens by vLLM over blended KV, and of the last one by the blend itself."""
        import torch

        spans, last = list(self._prompt.spans), len(self._ids) - 1
        blend = BlendPass(self._model, self._sequence)
        policy = QueryPolicy()
        outcome = take_steps(blend.run(self._ids, spans, self._prompt.prefix, policy=policy, budget=_SOME))
        fine = outcome.observed_sum is not None and bool(outcome.observed_sum.isfinite())
        findings.append(Finding("attention sums of the selection", 0.0 if fine else float("nan"), 0.0))
        own = take_steps(
            blend.run(self._ids, spans, self._prompt.prefix, policy=policy, budget=_ALL, end=last, with_last_token=True)
        ).hidden
        assert own is not None  # noqa: S101 - with_last_token computes it
        after = self._prefill(self._ids, self._sequence, self._tail.start, len(self._tail))
        return torch.cat([after, own])


def take_steps(steps: StepIterator[T]) -> T:
    """Take all steps."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def _compared(name: str, rows: Sequence[Tensor], how: str = "", least: float = _LEAST) -> list[Finding]:
    """Compare the rows of a full prefill, of others in other chunks, and of a blend, which has one row more."""
    want, *others, got = rows
    noise = max(_difference(other, want) for other in others)
    allowed = MARGIN * max(noise, _allowed(want, least, _LEAST_EPS))
    return [
        Finding(f"{name} of a blend{how}", _difference(got[:-1], want), allowed),
        Finding(f"{name} of its last token{how}", _difference(got[-1:], want[-1:]), allowed),
    ]


def _difference(got: Tensor, want: Tensor) -> float:
    """Difference of two [rows, n] in the worst row, as a share of the usual size of a row."""
    apart = (got.float() - want.float()).square().mean(1).sqrt().max()
    return float(apart / want.float().square().mean().sqrt())


def _allowed(values: Tensor, least: float, eps: float) -> float:
    import torch

    return max(least, eps * torch.finfo(values.dtype).eps)


# -- checks that passed, by model and build, in the user's cache folder: later starts need not run them again ----------
# Only what passed is remembered: a start that failed is checked again. A file that is lost or damaged costs a check.


def check_name(vllm_config: Any) -> str:
    """A name for this model on this build; "", which is not remembered, where it cannot be made. Never raises."""
    try:
        return _check_name(vllm_config)
    except Exception:
        log.warning("The self-check will run at each start", exc_info=True)
        return ""


def has_passed(name: str) -> bool:
    """Whether that check passed at an earlier start."""
    try:
        return bool(name) and _passed_file(name).read_text(encoding="ascii") == name
    except (OSError, ValueError):
        return False


def remember_passed(name: str) -> None:
    """Remember that it passed. Ranks of one machine write the same."""
    if not name:
        return
    file = _passed_file(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name, encoding="ascii")
        others = sorted(file.parent.iterdir(), key=lambda other: other.stat().st_mtime)
        for old in others[:-_MOST_PASSED]:  # a model that cannot be identified has a new name at each start
            old.unlink()
    except OSError as problem:
        log.info("The self-check will run again at the next start: %s", problem)


def _check_name(vllm_config: Any) -> str:
    """Weights, versions, our own code, GPU, ranks and attention backend in one hash."""
    import torch

    layers = vllm_internals.attention_layers(vllm_config).values()
    facts = {
        "model": identity(vllm_config),
        "versions": {package: _installed_version(package) for package in _PACKAGES},
        "cuda": str(torch.version.cuda),
        "code": _code_digest(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "ranks": vllm_config.parallel_config.tensor_parallel_size,
        "LoRA": getattr(vllm_config, "lora_config", None) is not None,
        "eager": bool(vllm_config.model_config.enforce_eager),
        "block": vllm_config.cache_config.block_size,
        "KV": sorted({str(getattr(layer, "kv_cache_dtype", "")) for layer in layers}),
        "backends": sorted({type(getattr(layer, "impl", None)).__name__ for layer in layers}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


def _passed_file(name: str) -> Path:
    return cache_folder() / _FOLDER / name


def _installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _code_digest() -> str:
    """What an editable install changes without a new version."""
    contents = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in [package / "policies.py", *sorted((package / "connector").rglob("*.py"))]:
        contents.update(file.read_bytes())
    return contents.hexdigest()
