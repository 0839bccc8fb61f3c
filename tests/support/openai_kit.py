"""A stand-in for vLLM without a model, with our connector's scheduler behind it.

It answers with the beginning of a fixed text. The reuse that it reports comes from BlendScheduler, over a memory of
64-token blocks that stands for LMCache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from fake_vllm import FakeVLLM, Handler, running

from lmcache_rag import protocol
from lmcache_rag.budget import AUTO_RULES, Budget
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.metadata import BlendPlan, BlendResult, Match
from lmcache_rag.connector.metrics import reuse_statistics, unblended_statistics
from lmcache_rag.connector.scheduler import BlendScheduler
from lmcache_rag.policies import get_policy, how_many
from lmcache_rag.protocol import Unsupported

TEXT = " A key that was computed at one place is moved to another by turning it further, as the passage says."
BLOCK = 64


class BlockMemory:
    """What LMCache holds: blocks by all tokens up to their end, and by their own tokens alone."""

    def __init__(self) -> None:
        self.chains: set[tuple[str, tuple[int, ...]]] = set()
        self.blocks: dict[tuple[str, tuple[int, ...]], int] = {}

    def keep(self, salt: str, ids: list[int], end: int) -> None:
        for start in range(0, end // BLOCK * BLOCK, BLOCK):
            self.chains.add((salt, tuple(ids[: start + BLOCK])))
            self.blocks[salt, tuple(ids[start : start + BLOCK])] = start

    def forget(self, salt: str, ids: list[int], begin: int) -> None:
        for start in range(begin // BLOCK * BLOCK, len(ids) // BLOCK * BLOCK, BLOCK):
            self.chains.discard((salt, tuple(ids[: start + BLOCK])))
            self.blocks.pop((salt, tuple(ids[start : start + BLOCK])), None)

    def count(self, salt: str, ids: list[int], begin: int) -> int:
        ends = range(begin // BLOCK * BLOCK + BLOCK, len(ids) + 1, BLOCK)
        return sum((salt, tuple(ids[:end])) in self.chains for end in ends)

    def find(self, salt: str, ids: list[int]) -> tuple[int, tuple[Match, ...]]:
        exact = 0
        while exact + BLOCK <= len(ids) and (salt, tuple(ids[: exact + BLOCK])) in self.chains:
            exact += BLOCK
        matches, at = [], exact
        while at + BLOCK <= len(ids):
            old = self.blocks.get((salt, tuple(ids[at : at + BLOCK])))
            if old:  # a block at the very beginning is never matched elsewhere
                matches.append(Match(at, at + BLOCK, old, old + BLOCK))
            at += BLOCK if old else 1
        return exact, tuple(matches)


class TextBackend:
    """Answers `/v1/completions` with a fixed text, and reports what the connector's scheduler claims."""

    server: FakeVLLM
    context = 8192
    adapters = ("an-adapter",)

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.memory = BlockMemory()
        self._side = BlendScheduler(
            ConnectorOptions(),
            BLOCK,
            SimpleNamespace(look_up=self._look_up),
            SimpleNamespace(hide=lambda request, first: None),
        )

    def answer(self, handler: Handler, body: dict[str, Any], number: int) -> None:
        server = self.server
        if handler.path != "/v1/completions":
            handler.send_problem(404, "Not Found")
            return
        if len(body["prompt"]) + body["max_tokens"] > server.context:
            handler.refuse_length()
            return
        reported = self.statistics(number, body)
        ids = server.tokenizer.encode(TEXT, add_special_tokens=False)
        pieces, text, reason = [], "", "stop"
        for at in range(1, len(ids) + 1):
            if at > body["max_tokens"]:
                reason = "length"
                break
            now = server.tokenizer.decode(ids[:at])
            cut = min((i for stop in body.get("stop") or () if (i := now.find(stop)) >= 0), default=-1)
            if cut >= 0:  # found in the front end, which aborts the request: the connector's words never come
                pieces.append((now[len(text) : cut], ids[at - 1]))
                reported = None
                break
            pieces.append((now[len(text) :], ids[at - 1]))
            text = now
        usage: dict[str, Any] = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": len(pieces),
            "total_tokens": len(body["prompt"]) + len(pieces),
        }
        if server.cached_details:
            usage["prompt_tokens_details"] = {"cached_tokens": 64}
        head = {"id": f"cmpl-{number}", "object": "text_completion", "created": 1, "model": server.model}
        if not body.get("stream"):
            choice = {
                "index": 0,
                "text": "".join(piece for piece, _ in pieces),
                "logprobs": _logprobs([token for _, token in pieces]) if body.get("logprobs") else None,
                "finish_reason": reason,
                "token_ids": [token for _, token in pieces],
            }
            handler.send_document(200, head | {"choices": [choice], "usage": usage, "kv_transfer_params": reported})
            return
        self._stream(handler, head, pieces, reason, usage, reported)

    def _stream(
        self,
        handler: Handler,
        head: dict[str, Any],
        pieces: list[tuple[str, int]],
        reason: str,
        usage: dict[str, Any],
        reported: Any,
    ) -> None:
        server = self.server
        handler.start_stream()
        for index, (piece, token) in enumerate(pieces):
            if index == server.drop_after:
                return
            last = index == len(pieces) - 1
            choice = {
                "index": 0,
                "text": piece,
                "logprobs": None,
                "finish_reason": reason if last else None,
                "token_ids": [token],
            }
            params = {"kv_transfer_params": reported} if last and (server.version >= "0.33" or server.plugin) else {}
            handler.send_event(head | {"choices": [choice]} | params)
            time.sleep(server.pause)
        handler.send_event(head | {"choices": [], "usage": usage})
        handler.wfile.write(b"data: [DONE]\n\n")

    # -- the connector ----------------------------------------------------------------------------------------------

    def _look_up(self, request: Any) -> Any:
        if self.server.failure:
            return None
        found = self.memory.find(request.cache_salt, request.prompt_token_ids)
        return SimpleNamespace(
            result=found, poll=lambda s: True, release_prefix=lambda a, b: None, end_session=lambda: None
        )

    def statistics(self, number: int, body: dict[str, Any]) -> dict[str, Any] | None:
        """What the connector says of a request, and the store after it."""
        ids, params, salt = body["prompt"], body.get("kv_transfer_params") or {}, body.get("cache_salt", "")
        if not self.server.connector:
            return None
        if params.get(protocol.FORGET):
            told = self._forget(salt, ids, protocol.removal_start(params, len(ids)))
            return {
                "lmcache_rag": told if params.get(protocol.HELD) else {k: v for k, v in told.items() if k != "held"}
            }
        if (pin := protocol.pins(params)) is not None:
            return {"lmcache_rag": self._pin(tuple(ids), pin=pin)}
        if self.server.why_not:
            with self.server.lock:
                exact, _ = self.memory.find(salt, ids)
                self.memory.keep(salt, ids, len(ids))
            why_not = Unsupported(self.server.why_code, self.server.why_not)
            return {"lmcache_rag": unblended_statistics(len(ids), exact, "query", Budget(), why_not)}
        with self.server.lock:
            request = SimpleNamespace(
                request_id=str(number),
                prompt_token_ids=ids,
                num_tokens=len(ids),
                kv_transfer_params=params,
                cache_salt=salt,
            )
            claimed = self._side.match(request, 0) or 0
            self._side.on_allocated(request, [], claimed, None)
            self._side.on_results([_blended(plan) for plan in self._side.build_plans()[0]])
            limit = self._side.store_limit(request.request_id)
            if not self.server.failure:
                limits = [len(ids), limit, params.get("lmcache.max_offload_tokens")]
                self.memory.keep(salt, ids, min(n for n in limits if n is not None))
            told = self._side.finish(request)
            if told is not None and self.server.second_use is not None and not protocol.ingests(params):
                told |= {protocol.USED_BEFORE: self.server.second_use.used_before(salt, ids, params)}
            return {"lmcache_rag": told}

    def _pin(self, ids: tuple[int, ...], *, pin: bool) -> dict[str, Any]:
        pins = self.server.pins
        with self.server.lock:
            pins.discard(ids)
            done = pin and sum(map(len, pins)) + len(ids) <= self.server.most_pinned
            if done:
                pins.add(ids)
            figures = {"used": 1000 * sum(map(len, pins)), "limit": 1000 * self.server.most_pinned, "tenant": 0}
        return reuse_statistics(len(ids), "query", Budget()) | {protocol.PINNED: done, protocol.PINS: figures}

    def _forget(self, salt: str, ids: list[int], begin: int) -> dict[str, Any]:
        with self.server.lock:
            done = not self.server.cannot_forget
            self.server.cannot_forget = max(0, self.server.cannot_forget - 1)
            held = {"memory": self.memory.count(salt, ids, begin)}
            if done and not self.server.keeps:
                self.memory.forget(salt, ids, begin)
        return reuse_statistics(len(ids), "query", Budget()) | {protocol.FORGOTTEN: done, protocol.KV_HELD: held}


def _blended(plan: BlendPlan) -> BlendResult:
    """What a worker would have done with a plan."""
    matched = sum(end - start for start, end in plan.spans)
    fixed = how_many(get_policy(plan.policy), plan.budget, matched, len(plan.spans))
    redone = fixed.tokens if fixed is not None else AUTO_RULES["query"].bounds(len(plan.spans), matched)[0]
    gaps = plan.end - plan.exact - matched
    return BlendResult(plan.request_id, plan.exact, matched - redone, redone, gaps, 1.5, 2.5)


def _logprobs(ids: list[int]) -> dict[str, Any]:
    """As vLLM gives them with return_tokens_as_token_ids: very sure of each token."""
    return {"top_logprobs": [{f"token_id:{token}": -0.1, f"token_id:{token + 1}": -3.0} for token in ids]}


@contextmanager
def vllm_serving(tokenizer: Any, **options: Any) -> Iterator[FakeVLLM]:
    """A running server."""
    with running(FakeVLLM(TextBackend(tokenizer), **options)) as server:
        yield server
