"""A server on this machine that speaks vLLM's part of the OpenAI API, with our connector's scheduler side behind it.

It has no model: it answers with the beginning of a fixed text. What it says about reuse comes from BlendScheduler, over
a memory of 64-token blocks that stands for LMCache. Everything that arrives is noted, and it can fail in several ways.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

from api_kit import ApiHandler

from lmcache_rag import protocol
from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.connector.metadata import BlendPlan, BlendResult, Match
from lmcache_rag.connector.metrics import reuse_statistics, unblended_statistics
from lmcache_rag.connector.scheduler import BlendScheduler
from lmcache_rag.protocol import CannotBlend, Unsupported

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
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

    def forget(self, salt: str, ids: list[int], prefix: int) -> None:
        for start in range(prefix, len(ids) // BLOCK * BLOCK, BLOCK):
            self.chains.discard((salt, tuple(ids[: start + BLOCK])))
            self.blocks.pop((salt, tuple(ids[start : start + BLOCK])), None)

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


class FakeVLLM(ThreadingHTTPServer):
    """Listens on loopback. What can be set at any time stands in __init__."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # connections that come at once

    def __init__(self, tokenizer: Any, *, model: str = MODEL, version: str = "0.33.0") -> None:
        self.tokenizer, self.model, self.version = tokenizer, model, version
        self.root = model
        self.context = 8192
        self.connector = True
        self.chunk = 0  # told on /metrics
        self.block = 0  # of vLLM's own prefix cache: told on /metrics, and of which an exact hit is whole blocks
        self.gauges: dict[str, float] = {}  # told on /metrics too
        self.status: dict[str, Any] | None = None  # what an LMCache says on /status, at the same address
        self.plugin = False  # makes streams of versions before 0.33 tell
        self.cached_details = False  # --enable-prompt-tokens-details
        self.failure = ""  # the connector cannot reach LMCache
        self.why_not = ""  # the connector cannot blend at all
        self.fail: list[int] = []  # statuses of the next completions
        self.hang = 0.0  # seconds before the next completions answer
        self.drop_after: int | None = None  # chunks of a stream before the connection breaks
        self.pause = 0.0  # seconds between the chunks of a stream
        self.key = ""
        self.ingest_key = ""  # wanted of requests that ingest and forget
        self.ingest_keys: list[tuple[bool, str | None]] = []  # (whether it ingests or forgets, the key that came)
        self.redirect = ""  # another server, to which completions are redirected
        self.forgets = True  # knows lmcache_rag.forget
        self.cannot_forget = 0  # so many times LMCache does not answer a forget
        self.memory = BlockMemory()
        self.seen: list[dict[str, Any]] = []
        self.auth: list[str | None] = []
        self.active = self.most_active = 0
        self.gone = threading.Event()  # a client closed its connection before the end of a stream
        self._lock = threading.Lock()
        self._side = BlendScheduler(
            ConnectorOptions(),
            BLOCK,
            SimpleNamespace(look_up=self._look_up),
            SimpleNamespace(hide=lambda request, first: None),
        )
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    # -- the connector ----------------------------------------------------------------------------------------------

    def _look_up(self, request: Any) -> Any:
        if self.failure:
            return None
        found = self.memory.find(request.cache_salt, request.prompt_token_ids)
        return SimpleNamespace(
            result=found, poll=lambda s: True, release_prefix=lambda a, b: None, end_session=lambda: None
        )

    def told(self, number: int, body: dict[str, Any]) -> dict[str, Any] | None:
        """What the connector says of a request, and the store after it."""
        ids, params, salt = body["prompt"], body.get("kv_transfer_params") or {}, body.get("cache_salt", "")
        if not self.connector:
            return None
        if params.get(protocol.FORGET):
            return {"lmcache_rag": self._forget(salt, ids, params[protocol.PREFIX])}
        if self.why_not:
            with self._lock:
                exact, _ = self.memory.find(salt, ids)
                self.memory.keep(salt, ids, len(ids))
            why_not = Unsupported(CannotBlend.NEEDS_CUDA, self.why_not)
            return {"lmcache_rag": unblended_statistics(len(ids), exact, "query", 0.15, why_not)}
        with self._lock:
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
            if not self.failure:
                limits = [len(ids), limit, params.get("lmcache.max_offload_tokens")]
                self.memory.keep(salt, ids, min(n for n in limits if n is not None))
            return {"lmcache_rag": self._side.finish(request)}

    def _forget(self, salt: str, ids: list[int], prefix: int) -> dict[str, Any]:
        with self._lock:
            done = not self.cannot_forget
            self.cannot_forget = max(0, self.cannot_forget - 1)
            if done:
                self.memory.forget(salt, ids, prefix)
        return reuse_statistics(len(ids), "query", 0.15) | {protocol.FORGOTTEN: done}


def _blended(plan: BlendPlan) -> BlendResult:
    """What a worker would have done with a plan."""
    matched = sum(end - start for start, end in plan.spans)
    redone = round(plan.ratio * matched)
    gaps = plan.end - plan.exact - matched
    return BlendResult(plan.request_id, plan.exact, matched - redone, redone, gaps, 1.5, 2.5)


class _Handler(ApiHandler):
    server: FakeVLLM

    def do_GET(self) -> None:
        server = self.server
        self._note_key()
        if self.path == "/v1/models":
            card = {
                "id": server.model,
                "object": "model",
                "created": 1,
                "owned_by": "vllm",
                "root": server.root,
                "parent": None,
                "max_model_len": server.context,
            }
            adapter = card | {"id": "an-adapter", "root": "/adapters/a", "parent": server.model}
            self.send_document(200, {"object": "list", "data": [adapter, card]})
        elif self.path == "/version":
            self.send_document(200, {"version": server.version})
        elif self.path == "/metrics" and (server.chunk or server.gauges or server.block):
            told = server.gauges | ({"vllm:lmcache_rag_chunk_tokens": float(server.chunk)} if server.chunk else {})
            lines = [f'{name}{{engine="0",model_name="{server.model}"}} {value}\n' for name, value in told.items()]
            if server.block:
                lines.append(f'vllm:cache_config_info{{block_size="{server.block}",engine="0"}} 1.0\n')
            self.send_text(200, "".join(lines), "text/plain; version=0.0.4")
        elif self.path == "/status" and server.status is not None:
            self.send_document(200, server.status)
        else:
            self.send_problem(404, "Not Found")

    def do_POST(self) -> None:
        server = self.server
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:  # the client hung up
            self.close_connection = True
            return
        body = json.loads(data)
        self._note_key()
        if self.path == "/tokenize":
            self.send_document(200, {"tokens": server.tokenizer.encode(body["prompt"], add_special_tokens=False)})
            return
        with server._lock:
            server.seen.append(body)
            number = len(server.seen)
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                self._complete(body, number)
        finally:
            with server._lock:
                server.active -= 1

    def _note_key(self) -> None:
        self.server.auth.append(self.headers.get("Authorization"))

    def _complete(self, body: dict[str, Any], number: int) -> None:
        server, params = self.server, body.get("kv_transfer_params")
        params = params if isinstance(params, dict) else {}
        changes = bool(params.get(protocol.INGEST) or params.get(protocol.FORGET))
        key = self.headers.get(protocol.INGEST_KEY_HEADER)
        server.ingest_keys.append((changes, key))
        time.sleep(server.hang)
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.send_problem(401, "Unauthorized")
        elif server.fail:
            self.send_problem(server.fail.pop(0), "on demand")
        elif server.redirect:
            self.send_response(307)
            self.send_header("Location", server.redirect + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif changes and server.ingest_key and key != server.ingest_key:
            self.send_problem(401 if key is None else 403, "it needs the server's ingest key")
        elif not server.forgets and params.get(protocol.FORGET):
            self.send_problem(400, "'lmcache_rag.forget' is not known")
        elif wrong := protocol.complaints(body.get("kv_transfer_params")):
            self.send_problem(400, protocol.joined(wrong))
        elif not isinstance(body.get("kv_transfer_params") or {}, dict):
            self.send_problem(400, "kv_transfer_params is no object")
        elif self.path != "/v1/completions":
            self.send_problem(404, "Not Found")
        elif body["model"] != server.model:
            self.send_problem(404, f"The model `{body['model']}` does not exist.")
        elif len(body["prompt"]) + body["max_tokens"] > server.context:
            self.send_problem(400, f"This model's maximum context length is {server.context} tokens. However, …")
        else:
            self._answer(body, number)

    def _answer(self, body: dict[str, Any], number: int) -> None:
        server = self.server
        told = server.told(number, body)
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
                told = None
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
            self.send_document(200, head | {"choices": [choice], "usage": usage, "kv_transfer_params": told})
            return
        self._stream(head, pieces, reason, usage, told)

    def _stream(
        self, head: dict[str, Any], pieces: list[tuple[str, int]], reason: str, usage: dict[str, Any], told: Any
    ) -> None:
        server = self.server
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
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
            params = {"kv_transfer_params": told} if last and (server.version >= "0.33" or server.plugin) else {}
            self.send_event(head | {"choices": [choice]} | params)
            time.sleep(server.pause)
        self.send_event(head | {"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")


def _logprobs(ids: list[int]) -> dict[str, Any]:
    """As vLLM gives them with return_tokens_as_token_ids: very sure of each token."""
    return {"top_logprobs": [{f"token_id:{token}": -0.1, f"token_id:{token + 1}": -3.0} for token in ids]}


@contextmanager
def vllm_serving(tokenizer: Any, **options: Any) -> Iterator[FakeVLLM]:
    """A running server."""
    server = FakeVLLM(tokenizer, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
