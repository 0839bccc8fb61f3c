"""Decode with transformers' own generation, streamed from a thread, from a KV cache that a blend may have filled."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lmcache_rag.engines.base import FinishReason, Sampling
    from lmcache_rag.engines.hf_model import HFModel, KVBuffer


class StopStringFilter:
    """Ends a streamed text before the first stop string, and never emits a part of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False

    def push(self, piece: str, *, end: bool = False) -> str:
        """Take a piece of text; returns the text that can be emitted now."""
        if self.stopped:
            return ""
        text = self._held + piece
        at = min((i for s in self._stop if (i := text.find(s)) >= 0), default=-1)
        if at >= 0:
            self.stopped, self._held = True, ""
            return text[:at]
        keep = 0 if end else max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep]


class _QueueStreamer(TextStreamer):  # type: ignore[misc]
    """transformers' incremental detokenisation into a queue; records when the first token came."""

    def __init__(self, tokenizer: Any, out: queue.Queue[Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._out = out
        self.ids: list[int] = []
        self.first_token: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        if not self.next_tokens_are_prompt:
            if self.first_token is None:
                self.first_token = time.perf_counter()
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece of text."""
        if text:
            self._out.put(text)


class _Cancelled(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        import torch

        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


@dataclass
class Decoded:
    """The result of a decode, complete once its iterator is exhausted."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    first_token: float = 0.0
    finish_reason: FinishReason = "stop"


def _config(model: HFModel, sampling: Sampling, room: int) -> Any:
    """Our settings over the model's own special tokens; none of the model's sampling defaults."""
    own = model.model.generation_config
    warm: dict[str, Any] = {}
    if sampling.temperature > 0:
        warm = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    eos = own.eos_token_id if own.eos_token_id is not None else model.tokenizer.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else (eos[0] if isinstance(eos, list) else eos)
    return GenerationConfig(
        max_new_tokens=min(sampling.max_tokens, room),
        repetition_penalty=sampling.repetition_penalty,
        stop_strings=list(sampling.stop) or None,
        eos_token_id=eos,
        pad_token_id=pad,
        **({"do_sample": False} | warm),
    )


def decode(
    model: HFModel,
    ids: torch.Tensor,
    prepare: Callable[[], KVBuffer | None],
    sampling: Sampling,
    lock: threading.Lock,
    result: Decoded,
) -> Iterator[str]:
    """Generate in a thread; yields the text piece by piece and fills `result`.

    Closing the iterator stops the generation within one token and waits for it.

    Args:
        model: The model.
        ids: The prompt, int64 [n].
        prepare: Called in the thread, under the lock: returns the KV cache to continue from, or None for a new one.
        sampling: How tokens are chosen.
        lock: One generation at a time.
        result: Is filled.
    """
    pieces: queue.Queue[Any] = queue.Queue()
    cancel = threading.Event()
    streamer = _QueueStreamer(model.tokenizer, pieces)
    room = max(1, model.context_length - len(ids))

    def work() -> None:
        import torch

        try:
            with lock, torch.inference_mode(), torch.random.fork_rng(enabled=sampling.seed is not None):
                if cancel.is_set():
                    return
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed)
                model.model.generate(
                    ids[None],
                    attention_mask=torch.ones_like(ids)[None],
                    generation_config=_config(model, sampling, room),
                    streamer=streamer,
                    tokenizer=model.tokenizer if sampling.stop else None,
                    stopping_criteria=StoppingCriteriaList([_Cancelled(cancel)]),
                    **model.cache_argument(prepare()),
                )
        except BaseException as problem:  # handed to the caller's thread
            pieces.put(problem)
        finally:
            pieces.put(None)

    thread = threading.Thread(target=work, name="lmcache-rag-decode", daemon=True)
    thread.start()
    cutter = StopStringFilter(sampling.stop)
    try:
        while (item := pieces.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if shown := cutter.push(item):
                result.text += shown
                yield shown
        if shown := cutter.push("", end=True):
            result.text += shown
            yield shown
    finally:
        cancel.set()
        thread.join()
        result.ids = streamer.ids
        result.first_token = streamer.first_token or time.perf_counter()
        result.finish_reason = _reason(model, streamer.ids, cutter.stopped, min(sampling.max_tokens, room))


def _reason(model: HFModel, ids: list[int], stopped: bool, limit: int) -> FinishReason:
    eos = model.model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos, model.tokenizer.eos_token_id]
    if stopped or (ids and ids[-1] in ends):
        return "stop"
    return "length" if len(ids) >= limit else "cancelled"


# -- logits -----------------------------------------------------------------------------------------------------------


class PromptState:
    """The state of a model after a prompt, to read logits: for measurements and tests. See EmbeddedEngine.prefill.

    Args:
        model: The model.
        ids: Tokens that the cache does not hold yet, int64 [n], on the model's device, n at least 1.
        cache: The KV cache; None: a new one.
        lock: Held while the model computes.
        spent: Milliseconds of the work before, by step.
        counts: Fields of ReuseStats for the prompt; empty without a blend.

    Attributes:
        logits: Of the token that follows the prompt, [vocabulary], as the model gives them.
        spent: Milliseconds by step; "suffix" is the computation of what the cache did not hold.
        counts: As the argument.
    """

    def __init__(
        self,
        model: HFModel,
        ids: torch.Tensor,
        cache: Any,
        lock: threading.Lock,
        spent: dict[str, float],
        counts: Mapping[str, Any] | None = None,
    ) -> None:
        from transformers import DynamicCache

        begin = time.perf_counter()
        self._model, self._lock = model, lock
        self._cache = DynamicCache() if cache is None else cache
        self.logits: Tensor = self._run(ids, keep=1)[0]
        self.spent = spent | {"suffix": (time.perf_counter() - begin) * 1e3}
        self.counts = dict(counts or {})
        self._length = self._cache.get_seq_length()

    def rewind(self, tokens: int) -> None:
        """Forget what was appended, but for the first `tokens` of it."""
        if excess := self._cache.get_seq_length() - self._length - tokens:
            self._cache.crop(-excess)

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
