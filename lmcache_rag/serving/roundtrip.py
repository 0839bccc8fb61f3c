"""A live round trip: random chunks precomputed behind a prefix, then asked in another order."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.engines.vllm_client import ModelCard, VLLMClient
from lmcache_rag.errors import EngineError
from lmcache_rag.protocol import (
    CAN_BLEND,
    INGEST,
    MAX_OFFLOAD_TOKENS,
    NEAR_TIE,
    NO_BLEND,
    POLICY,
    RATIO,
    answer_statistics,
    ingests,
)

IDS = range(300, 15000)  # ids of plain text in the usual vocabularies; none of them special
CHUNKS = 3
BLOCKS = (4, 3, 2)  # LMCache chunks in each of ours
ANSWER = 16
TOP = 5  # log-probabilities asked for with each token
ATTEMPTS, PAUSE_S = 5, 1.0  # LMCache indexes what it stored a moment later


@dataclass(frozen=True)
class Prompts:
    """Random prompts.

    Attributes:
        prefix: One LMCache chunk.
        chunks: Token ids of the chunks; each a multiple of LMCache's.
    """

    prefix: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]

    @classmethod
    def draw(cls, chunk_size: int, most_tokens: int = 0, seed: int | None = None) -> Prompts:
        """New random text, so that nothing of it is cached yet. Shorter where the model's context is short."""
        dice = random.Random(seed)  # noqa: S311 - no secret
        blocks = BLOCKS if not most_tokens or most_tokens > chunk_size * 12 else (1, 2, 1)
        return cls(_ids(dice, chunk_size), tuple(_ids(dice, chunk_size * n) for n in blocks))

    def ingest(self) -> list[list[int]]:
        """Prefix and chunk, for each chunk."""
        return [[*self.prefix, *chunk] for chunk in self.chunks]

    def query(self) -> list[int]:
        """All chunks in the opposite order, with new separators and a new question."""
        dice = random.Random()  # noqa: S311 - no secret
        prompt = list(self.prefix)
        for chunk in reversed(self.chunks):
            prompt += [*_ids(dice, 3), *chunk]
        return [*prompt, *_ids(dice, 40)]


@dataclass(frozen=True)
class Answer:
    """A completion.

    Attributes:
        tokens: Ids of the answer.
        top: For each of them the most likely ids and their log-probabilities.
        statistics: What our connector did; None without it.
    """

    tokens: tuple[int, ...]
    top: tuple[dict[int, float], ...] = ()
    statistics: dict[str, Any] | None = field(default=None)


def ask(server: VLLMClient, model: str, prompt: list[int], *, params: dict[str, Any], max_tokens: int = 1) -> Answer:
    """Greedy completion of a prompt of token ids, with these kv_transfer_params.

    Raises:
        EngineError: The server refused it, or does not answer as vLLM does.
    """
    request = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": TOP,
        "extra_body": {
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "kv_transfer_params": params,
        },
    }
    response = server.complete(request, ingest=ingests(params))
    try:
        choice = response.choices[0]
        top = getattr(choice.logprobs, "top_logprobs", None) or ()
        return Answer(
            tuple(choice.token_ids),
            tuple({int(name.rpartition(":")[2]): value for name, value in row.items()} for row in top if row),
            answer_statistics(response),
        )
    except (AttributeError, IndexError, TypeError, ValueError) as problem:
        raise EngineError(
            f"The server does not answer as vLLM does: {type(problem).__name__}: {problem}.",
            remedy="vLLM 0.25.1 or newer is needed.",
        ) from problem


@dataclass(frozen=True)
class Outcome:
    """What a round trip showed.

    Attributes:
        reused: Statistics of the best query with the server's own policy; None when the connector said nothing.
        queries: How many queries it took.
        exact: Statistics of the query with every token recomputed; None without reuse.
        same: Tokens in which it agrees with a run without reuse, out of `compared`.
        compared: Tokens compared.
        near_tie: Whether the first difference is a tie but for rounding.
    """

    reused: dict[str, Any] | None
    queries: int
    exact: dict[str, Any] | None = None
    same: int = 0
    compared: int = 0
    near_tie: bool = False

    @property
    def hit(self) -> bool:
        """Whether KV of cached chunks was found and used, be it only to say what is recomputed."""
        return found_again(self.reused) > 0

    @property
    def agrees(self) -> bool:
        """Whether recomputing everything equals a full prefill."""
        return self.compared > 0 and (self.same == self.compared or self.near_tie)


def found_again(statistics: dict[str, Any] | None) -> int:
    """Tokens of cached chunks. With policy `all` or ratio 1 every one of them is recomputed, and none reused."""
    told = statistics or {}
    return int(told.get("reused_tokens", 0)) + int(told.get("recomputed_tokens", 0))


def round_trip(
    server: VLLMClient,
    served: ModelCard,
    chunk_size: int,
    *,
    compare: bool = True,
    pause: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Run it.

    Args:
        server: The vLLM server.
        served: Its model.
        chunk_size: Tokens of an LMCache chunk.
        compare: Also compare a run that recomputes everything with one that reuses nothing.
        pause: For waiting between two attempts.

    Raises:
        EngineError: The server refused a request, or answers in a way that is not vLLM's.
    """
    prompts = Prompts.draw(chunk_size, served.context_length)
    # What is asked is not to be stored: an attempt that finds nothing must not help the next one.
    keep_out = {MAX_OFFLOAD_TOKENS: chunk_size}
    for prompt in prompts.ingest():
        ask(server, served.name, prompt, params={**NO_BLEND, INGEST: True})
    found: dict[str, Any] | None = None
    query: list[int] = []
    attempt = 0
    while attempt < ATTEMPTS and not found_again(found):
        pause(PAUSE_S if attempt else PAUSE_S / 4)
        attempt += 1
        query = prompts.query()
        found = ask(server, served.name, query, params=keep_out).statistics
        if found is None or found.get(CAN_BLEND) is False:
            break
    if not compare or not found_again(found):
        return Outcome(found, attempt)
    # Blended first: after a run without reuse vLLM itself would hold the whole prompt.
    query = prompts.query()
    every = {POLICY: "query", RATIO: 1.0}
    blended = ask(server, served.name, query, max_tokens=ANSWER, params=every | keep_out)
    plain = ask(server, served.name, query, max_tokens=ANSWER, params={**NO_BLEND, **keep_out})
    if not blended.tokens or not plain.tokens:
        raise EngineError("The server answered without tokens.", remedy="Its log may say more.")
    same = _agree(blended.tokens, plain.tokens)
    compared = max(len(blended.tokens), len(plain.tokens))
    return Outcome(found, attempt, blended.statistics, same, compared, _near_tie(plain, blended, same))


def _ids(dice: random.Random, count: int) -> tuple[int, ...]:
    return tuple(dice.choice(IDS) for _ in range(count))


def _agree(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _near_tie(plain: Answer, blended: Answer, at: int) -> bool:
    """Whether the run without reuse found both tokens about equally likely where the two part."""
    if at >= min(len(plain.top), len(plain.tokens), len(blended.tokens)):
        return False
    row, ours, theirs = plain.top[at], blended.tokens[at], plain.tokens[at]
    return ours in row and theirs in row and row[theirs] - row[ours] <= NEAR_TIE
