"""Ways to answer the same token ids, greedily: by the embedded engine, and by a vLLM server.

=============== =======================================================================================================
``full``        a full prefill: nothing is reused
``prefix``      vLLM's own prefix caching only (servers only)
``none``        all cached KV as it is
``all``         everything recomputed: what differs from ``full`` is rounding
``POLICY:0.1``  that share of the cached tokens recomputed, by this policy
``POLICY:tokens=400`` so many of them
``auto``        as at the default: the engine chooses how many, and computes what it predicts to be as fast
``POLICY:auto`` the engine chooses how many, by this policy, and always blends
``stock``       a server without blending, at a URL of its own, as it is: with prefix caching
``contextpilot`` passages in ContextPilot's order, with vLLM's prefix caching only (servers only)
=============== =======================================================================================================
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lmcache_rag import protocol
from lmcache_rag.bench.exact import FULL as UNBLENDED
from lmcache_rag.bench.exact import TOP, divergence
from lmcache_rag.budget import AUTO
from lmcache_rag.engines.base import BlendOptions, QueryPrompt, Sampling
from lmcache_rag.errors import ConfigError, EngineUnavailableError
from lmcache_rag.policies import get_policy

if TYPE_CHECKING:
    import torch

    from lmcache_rag.engines.embedded import EmbeddedEngine
    from lmcache_rag.engines.hf_generate import PromptState
    from lmcache_rag.engines.vllm import VLLMEngine

DEFAULT = "prefix,auto,query:0.15,query:0.1,query:0.3,hkvd:0.15,none,all"
FULL, PREFIX, STOCK, CONTEXTPILOT = "full", "prefix", "stock", "contextpilot"
UNBLENDING = (FULL, PREFIX, STOCK, CONTEXTPILOT)  # arms without chunk KV
_FORM = "Write for example query:0.15, hkvd:0.3, query:tokens=400, auto, none, all, prefix or stock."


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        name: For example "query:0.15".
        policy: The recompute policy; "" for an arm that does not blend.
        ratio: A share, "auto", or {"tokens": N}.
    """

    name: str
    policy: str = ""
    ratio: Any = 0.0

    @property
    def blends(self) -> bool:
        """Whether it reuses chunk KV."""
        return bool(self.policy)

    def options(self) -> BlendOptions:
        """How a request of this arm reuses KV."""
        if not self.blends:
            return UNBLENDED
        return BlendOptions(self.policy, self.ratio)


def parse_arms(text: str) -> list[Arm]:
    """Arms from a text with commas, the full prefill first.

    Raises:
        ConfigError: There is no such arm or policy.
    """
    arms = [Arm(FULL), *(_parse(part.strip()) for part in text.split(",") if part.strip())]
    return list({arm.name: arm for arm in arms}.values())


def _parse(text: str) -> Arm:
    if text in UNBLENDING:
        return Arm(text)
    if text == "none":
        return Arm(text, "none", 0.0)
    if text == "all":
        return Arm(text, "all", 1.0)
    if text == "auto":
        return Arm(text, protocol.DEFAULT_POLICY, AUTO)
    policy, _, budget = text.partition(":")
    get_policy(policy)
    ratio: Any = None
    if budget == AUTO:
        ratio = budget
    elif tokens := re.fullmatch(r"tokens=(\d+)", budget):
        ratio = {"tokens": int(tokens[1])}
    elif re.fullmatch(r"\d*\.?\d+", budget):
        ratio = float(budget)
    if ratio is None or (isinstance(ratio, float) and ratio > 1):
        raise ConfigError(f"{text!r} is not an arm.", remedy=_FORM)
    return Arm(text, policy, ratio)


# Answers


@dataclass(frozen=True)
class ArmAnswer:
    """One arm's answer to one question.

    Attributes:
        text: The answer.
        tokens: Its token ids.
        ttft_ms: Time to the first token; None where several questions ran at once.
        equal: Whether all tokens are those of the full prefill.
        first_kl: KL divergence of the first token from the full prefill's, in nats; None if unknown.
        along_kl: Its mean along the full prefill's answer; from a server only up to the first different token.
        gold_nll: Mean negative log-likelihood of the right answer's tokens, in nats; None from a server.
        counts: The four token counts, as the engine reports them; empty where it reports none.
        failure: Why the server could not blend; "" if it did, or was not asked to.
        decision: Why it blended or computed, as it reports; "" if it does not.
    """

    text: str
    tokens: tuple[int, ...]
    ttft_ms: float | None = None
    equal: bool | None = None
    first_kl: float | None = None
    along_kl: float | None = None
    gold_nll: float | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    failure: str = ""
    decision: str = ""

    @property
    def blended(self) -> bool | None:
        """Whether cached chunk KV was used; None where the engine does not report it."""
        if not self.counts:
            return None
        return self.counts["reused_tokens"] + self.counts["recomputed_tokens"] > 0


class AnswerSource(Protocol):
    """An engine that answers one prompt in several arms."""

    kind: str

    def supports(self, arm: Arm) -> bool:
        """Whether it has this arm at all."""
        ...

    def answers(
        self, name: str, prompt: QueryPrompt, arms: Sequence[Arm], gold: Sequence[int], max_tokens: int
    ) -> dict[str, ArmAnswer]:
        """Each arm's answer.

        Args:
            name: Name of the question, unique in the run.
            prompt: Its prompt; the chunks' KV exists.
            arms: The arms; all are compared with the full prefill, if that is one of them.
            gold: Token ids of the right answer.
            max_tokens: Most tokens of an answer.
        """
        ...


class EmbeddedAnswers:
    """The embedded engine: all measures are exact.

    The full prefill is asked first, since the others are compared along its answer; the engine keeps none of its KV.
    """

    kind = "embedded"

    def __init__(self, engine: EmbeddedEngine) -> None:
        self._engine = engine
        self._ends = engine.end_tokens

    def supports(self, arm: Arm) -> bool:
        """All but those that need a server's prefix cache."""
        return arm.blends or arm.name == FULL

    def answers(
        self, name: str, prompt: QueryPrompt, arms: Sequence[Arm], gold: Sequence[int], max_tokens: int
    ) -> dict[str, ArmAnswer]:
        """See AnswerSource."""
        full: list[int] = []
        likely: torch.Tensor | None = None
        found: dict[str, ArmAnswer] = {}
        for arm in sorted(arms, key=lambda arm: arm.name != FULL):
            begin = time.perf_counter()
            state = self._engine.prefill(prompt, arm.options(), room=max(max_tokens, len(gold)))
            first = int(state.logits.argmax())
            ttft_ms = (time.perf_counter() - begin) * 1e3
            if arm.name == FULL:
                full, likely = self._greedy(state, [first], max_tokens)
                tokens, first_kl, along_kl = full, 0.0, 0.0
            elif likely is None:
                tokens, first_kl, along_kl = self._greedy(state, [first], max_tokens)[0], None, None
            else:
                got = _along(state, full)
                kl = (likely.exp() * (likely - got)).sum(-1)
                first_kl, along_kl = float(kl[0]), float(kl.mean())
                tokens = self._continued(state, full, got.argmax(-1).tolist(), max_tokens)
            found[arm.name] = ArmAnswer(
                self._engine.tokenizer.decode(tokens, skip_special_tokens=True),
                tuple(tokens),
                ttft_ms,
                tokens == full if likely is not None else None,
                first_kl,
                along_kl,
                _gold_nll(state, gold),
                {key: state.counts.get(key, 0) for key in protocol.COUNTS} if state.counts else {},
            )
        return found

    def _continued(self, state: PromptState, full: list[int], likeliest: list[int], max_tokens: int) -> list[int]:
        """The arm's own greedy answer, from the first token that differs from the full prefill's."""
        place = next((i for i, (a, b) in enumerate(zip(full, likeliest, strict=True)) if a != b), None)
        if place is None:
            return full
        state.rewind(place)
        return self._greedy(state, [*full[:place], likeliest[place]], max_tokens)[0]

    def _greedy(self, state: PromptState, tokens: list[int], max_tokens: int) -> tuple[list[int], torch.Tensor]:
        """(the tokens continued up to the end token; log-probabilities at the prompt's end and after each new one)."""
        import torch

        rows = [state.logits]
        while len(tokens) < max_tokens and tokens[-1] not in self._ends:
            rows.append(state.extend(tokens[-1:])[-1])
            tokens = [*tokens, int(rows[-1].argmax())]
        return tokens, torch.stack(rows).float().log_softmax(-1)


def _along(state: PromptState, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [len(tokens), vocabulary] of each next token after the prompt and these tokens so far."""
    import torch

    state.rewind(0)
    rows = [state.logits[None]] + ([state.extend(tokens[:-1])] if len(tokens) > 1 else [])
    return torch.cat(rows).float().log_softmax(-1)


def _gold_nll(state: PromptState, gold: Sequence[int]) -> float | None:
    if not gold:
        return None
    rows = _along(state, gold)
    return -sum(float(row[token]) for row, token in zip(rows, gold, strict=True)) / len(gold)


class ServerAnswers:
    """A vLLM server with our connector.

    The full prefill has a cache salt for each question, so its exact KV helps no other arm and none helps it; the arms
    with prefix caching share one of their own. LMCache stores nothing of either. KL divergences come from the
    log-probabilities of the likeliest tokens, so they are lower bounds.

    Args:
        engine: Its client.
        run: Unique to this run, for the cache salts.
        timed: Whether requests run one at a time, so that their TTFT is quoted.
        stock: Client of a server without blending that serves the same model, for the arm `stock`.
    """

    kind = "vllm"

    def __init__(self, engine: VLLMEngine, run: str, *, timed: bool, stock: VLLMEngine | None = None) -> None:
        self._engine, self._run, self._timed, self._stock = engine, run, timed, stock

    def supports(self, arm: Arm) -> bool:
        """All, but `stock` needs a server of its own."""
        return arm.name != STOCK or self._stock is not None

    def answers(
        self, name: str, prompt: QueryPrompt, arms: Sequence[Arm], gold: Sequence[int], max_tokens: int
    ) -> dict[str, ArmAnswer]:
        """See AnswerSource. `gold` is not used: no request makes a server score a text after blended KV."""
        # `auto` comes last: where it computes the prompt, vLLM caches exact KV of it, which the others would find.
        ordered = sorted(arms, key=lambda arm: arm.name == AUTO)
        traces = {arm.name: self._ask(name, prompt, arm, max_tokens) for arm in ordered}
        full = traces.get(FULL)
        return {arm: trace.answer(full) for arm, trace in traces.items()}

    def _ask(self, name: str, prompt: QueryPrompt, arm: Arm, max_tokens: int) -> _ServerTrace:
        from lmcache_rag.engines.vllm_answer import Gathered

        engine = self._stock if arm.name == STOCK and self._stock is not None else self._engine
        request = engine.request(prompt, Sampling(max_tokens=max_tokens), arm.options())
        extra = request["extra_body"] | {"return_tokens_as_token_ids": True}
        if arm.blends and arm.name != AUTO:
            # Only `auto` itself leaves it to the server whether blending is faster: the others measure blended answers.
            extra["kv_transfer_params"] |= protocol.ALWAYS_BLEND
        if not arm.blends:
            extra["kv_transfer_params"] |= {protocol.MAX_OFFLOAD_TOKENS: 0}
            extra["cache_salt"] = f"bench-quality-{self._run}-{name if arm.name == FULL else arm.name}"
        if arm.name == STOCK:
            del extra["kv_transfer_params"]
        request |= {"extra_body": extra, "logprobs": TOP}
        gathered, likely = Gathered(), list[dict[int, float]]()
        if not self._timed:
            response = engine.complete(request)
            gathered.take(response)
            likely += _likely(response)
        else:
            with engine.streaming(request) as parts:
                for part in parts:
                    gathered.take(part)
                    likely += _likely(part)
        if gathered.reason is None:
            raise EngineUnavailableError("The server broke off in the middle of an answer.", remedy="See its log.")
        return _ServerTrace(
            gathered.text,
            tuple(gathered.ids),
            gathered.ttft_ms if self._timed else None,
            tuple(likely),
            gathered.stats or {},
        )


@dataclass(frozen=True)
class _ServerTrace:
    text: str
    tokens: tuple[int, ...]
    ttft_ms: float | None
    likely: tuple[dict[int, float], ...]
    stats: Mapping[str, Any]

    def answer(self, full: _ServerTrace | None) -> ArmAnswer:
        """Compared with the full prefill."""
        counts = {key: int(self.stats[key]) for key in protocol.COUNTS} if protocol.COUNTS[0] in self.stats else {}
        kl = [divergence(a, b) for a, b in self._pairs(full)] if full else []
        return ArmAnswer(
            self.text,
            self.tokens,
            self.ttft_ms,
            self.tokens == full.tokens if full else None,
            kl[0] if kl else None,
            sum(kl) / len(kl) if kl else None,
            None,
            counts,
            str(self.stats.get(protocol.FAILURE) or ""),
            str(self.stats.get("decision") or ""),
        )

    def _pairs(self, full: _ServerTrace) -> Iterator[tuple[dict[int, float], dict[int, float]]]:
        """Likeliest tokens of both, place by place, as long as both have read the same tokens."""
        for place, pair in enumerate(zip(full.likely, self.likely, strict=False)):
            yield pair
            if full.tokens[place : place + 1] != self.tokens[place : place + 1]:
                return


def _likely(response: Any) -> list[dict[int, float]]:
    """Log-probabilities of the likeliest tokens, at each place of a response or of a part of one."""
    if not response.choices or (logprobs := response.choices[0].logprobs) is None:
        return []
    return [
        {int(name.removeprefix("token_id:")): value for name, value in place.items()}
        for place in logprobs.top_logprobs or ()
        if place
    ]
