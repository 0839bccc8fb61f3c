"""What a model says behind a prompt, token by token, from a server or from the embedded engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_rag import protocol
from lmcache_rag.engines.base import BlendOptions, QueryPrompt

if TYPE_CHECKING:
    from lmcache_rag.engines.embedded import EmbeddedEngine
    from lmcache_rag.engines.vllm import VLLMEngine
    from lmcache_rag.prompt import PromptBuilder

TOP = 20  # likeliest tokens that are kept at each place: most that vLLM gives unless told otherwise


@dataclass(frozen=True)
class Trace:
    """A greedy answer.

    Attributes:
        tokens: Its token ids.
        likely: At each place, the log-probabilities of the likeliest tokens by id.
        stats: The four token counts, as the engine told them; empty where it told none.
    """

    tokens: tuple[int, ...]
    likely: tuple[dict[int, float], ...]
    stats: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Something that answers and says how sure it was."""

    prompts: PromptBuilder

    def keep(self, chunks: Sequence[str]) -> None:
        """Compute these chunks' KV."""
        ...

    def trace(self, prompt: QueryPrompt, blend: BlendOptions, tokens: int) -> Trace:
        """A greedy answer of so many tokens, whether or not an end token is among them."""
        ...


class ServerSource:
    """A vLLM server.

    Args:
        engine: Its client.
        prompts: Made for it.
        named: Whether to tell the server where the chunks stand: then it copies what it still holds itself.
    """

    def __init__(self, engine: VLLMEngine, prompts: PromptBuilder, *, named: bool = True) -> None:
        self.engine, self.prompts, self._named = engine, prompts, named

    def keep(self, chunks: Sequence[str]) -> None:
        """Compute these chunks' KV."""
        for _ in self.engine.precompute([self.prompts.ingest(chunk) for chunk in chunks]):
            pass

    def trace(self, prompt: QueryPrompt, blend: BlendOptions, tokens: int) -> Trace:
        """A greedy answer. Without blending, nothing of the prompt but its prefix goes to LMCache."""
        from lmcache_rag.engines.base import Sampling

        request = self.engine.request(prompt, Sampling(max_tokens=tokens), blend)
        extra = request["extra_body"] | {"ignore_eos": True, "return_tokens_as_token_ids": True}
        if not self._named:
            extra["kv_transfer_params"].pop(protocol.CHUNKS, None)
        if not blend.enabled:
            extra["kv_transfer_params"] |= {protocol.MAX_OFFLOAD_TOKENS: prompt.prefix_tokens}
        answer = self.engine.complete(request | {"extra_body": extra, "logprobs": TOP})
        choice = answer.choices[0]
        likely = tuple(
            {int(name.removeprefix("token_id:")): value for name, value in place.items()}
            for place in choice.logprobs.top_logprobs
        )
        told = protocol.answer_statistics(answer) or {}
        return Trace(tuple(choice.token_ids), likely, told)


class EmbeddedSource:
    """The embedded engine.

    Args:
        engine: The engine.
        prompts: Made for it.
    """

    def __init__(self, engine: EmbeddedEngine, prompts: PromptBuilder) -> None:
        self.engine, self.prompts = engine, prompts

    def keep(self, chunks: Sequence[str]) -> None:
        """Compute these chunks' KV."""
        for _ in self.engine.precompute([self.prompts.ingest(chunk) for chunk in chunks]):
            pass

    def trace(self, prompt: QueryPrompt, blend: BlendOptions, tokens: int) -> Trace:
        """A greedy answer; the engine's statistics are not part of it."""
        behind = self.engine.prefill(prompt, blend, room=tokens)
        logits = behind.logits
        answer: list[int] = []
        likely: list[dict[int, float]] = []
        while True:
            best = logits.float().log_softmax(-1).topk(TOP)
            likely.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
            answer.append(int(best.indices[0]))
            if len(answer) == tokens:
                return Trace(tuple(answer), tuple(likely))
            logits = behind.extend(answer[-1:])[-1]
