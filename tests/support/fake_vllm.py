"""The one stand-in for vLLM's API server in this process: HTTP, faults, /metrics, and what arrived.

A backend answers. openai_kit has one without a model, with our connector's scheduler behind it; embedded_server_kit has
one that answers with a real embedded engine. serve_kit's stand-ins are processes, which `serve` starts.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from typing import Any, Protocol

from api_kit import ApiHandler

from lmcache_rag import protocol

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PATHS = ("/v1/completions", "/v1/chat/completions")


class Backend(Protocol):
    """What answers. `adapters` are served beside the model; `context` is the longest prompt with its answer."""

    server: FakeVLLM  # which it answers for
    tokenizer: Any
    context: int
    adapters: tuple[str, ...]

    def answer(self, handler: Handler, body: dict[str, Any], number: int) -> None:
        """Answer a request that passed the server's own checks; `number` counts requests from 1."""


class FakeVLLM(ThreadingHTTPServer):
    """Listens on loopback. What can be set at any time is set in __init__.

    Args:
        backend: Answers. Its tokenizer must be the one that clients find under the model's name.
        model: The served model's name.
        version: Of vLLM: 0.32 and later take token ids for chat, 0.33 and later have statistics in a stream.
        port: Where it listens; 0: anywhere.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # connections that come at once

    def __init__(self, backend: Backend, *, model: str = MODEL, version: str = "0.33.0", port: int = 0) -> None:
        self.backend, self.model, self.version = backend, model, version
        self.tokenizer = backend.tokenizer
        backend.server = self
        self.root = model
        self.context = backend.context
        # The connector.
        self.connector = True  # False: a stock vLLM
        self.plugin = False  # adds statistics to the streams of versions before 0.33
        self.failure = ""  # the connector cannot reach LMCache
        self.why_not, self.why_code = "", protocol.CannotBlend.NEEDS_CUDA  # the connector cannot blend at all
        self.forgets = True  # knows lmcache_rag.forget
        self.keeps = False  # a tier of LMCache cannot delete
        self.pins: set[tuple[int, ...]] = set()  # prompts
        self.most_pinned = 1 << 20  # tokens
        self.second_use: Any = None  # the connector's SecondUse, with --store second
        self.cannot_forget = 0  # so many times LMCache does not answer a forget
        # What it reports.
        self.chunk = 0  # on /metrics
        self.block = 0  # of vLLM's own prefix cache: on /metrics, and an exact hit is a number of whole blocks
        self.prefix_caching: bool | None = None  # on /metrics; None: it does not report it
        self.gauges: dict[str, float] = {}  # on /metrics too
        self.status: dict[str, Any] | None = None  # what an LMCache reports on /status, at the same address
        self.cached_details = False  # --enable-prompt-tokens-details
        # Keys and faults.
        self.key = ""  # the API key that it wants
        self.ingest_key = ""  # wanted of requests that ingest and forget
        self.redirect = ""  # another server, to which completions are redirected
        self.fail: list[int] = []  # statuses of the next completions
        self.hang = 0.0  # seconds before a completion's answer begins
        self.drop_after: int | None = None  # pieces of a stream before the connection breaks
        self.pause = 0.0  # seconds after each piece of a stream
        # What arrived.
        self.seen: list[dict[str, Any]] = []  # completions, in order; "path" is where it was sent
        self.auth: list[str | None] = []
        self.ingest_keys: list[tuple[bool, str | None]] = []  # (whether it ingests or forgets, the key that came)
        self.active = self.most_active = 0
        self.gone = threading.Event()  # a client closed its connection before the end of a stream
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def questions(self) -> list[dict[str, Any]]:
        """What arrived, without the ingestion of chunks."""
        return [body for body in self.seen if not is_ingest(body)]

    @property
    def version_numbers(self) -> tuple[int, int]:
        major, minor, *_ = self.version.split(".")
        return int(major), int(minor)

    def metrics(self) -> str:
        """The text of /metrics; empty: there is none."""
        values = self.gauges | ({"vllm:lmcache_rag_chunk_tokens": float(self.chunk)} if self.chunk else {})
        lines = [f'{name}{{engine="0",model_name="{self.model}"}} {value}\n' for name, value in values.items()]
        if self.block or self.prefix_caching is not None:
            caching = f'enable_prefix_caching="{self.prefix_caching}",' if self.prefix_caching is not None else ""
            lines.append(f'vllm:cache_config_info{{{caching}block_size="{self.block}",engine="0"}} 1.0\n')
        return "".join(lines)


def is_ingest(body: dict[str, Any]) -> bool:
    params = body.get("kv_transfer_params") or {}
    return body.get("max_tokens") == 1 and params.get("lmcache_rag.blend") == "off" and "messages" not in body


class Handler(ApiHandler):
    """The server's own part of each request."""

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
            adapters = [
                card | {"id": name, "root": "/adapters/a", "parent": server.model, "max_model_len": None}
                for name in server.backend.adapters
            ]
            self.send_document(200, {"object": "list", "data": [*adapters, card]})
        elif self.path == "/health":
            self.send_text(200, "", "text/plain")
        elif self.path == "/version":
            self.send_document(200, {"version": server.version})
        elif self.path == "/metrics" and (text := server.metrics()):
            self.send_text(200, text, "text/plain; version=0.0.4")
        elif self.path == "/status" and server.status is not None:
            self.send_document(200, server.status)
        else:
            self.send_problem(404, "Not Found")

    def do_POST(self) -> None:
        server, self.arrived = self.server, time.perf_counter()
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:  # the client hung up
            self.close_connection = True
            return
        body = json.loads(data)
        self._note_key()
        if self.path == "/tokenize":
            special = body.get("add_special_tokens", True)
            self.send_document(200, {"tokens": server.tokenizer.encode(body["prompt"], add_special_tokens=special)})
            return
        if self.path not in PATHS:
            self.send_problem(404, "Not Found")
            return
        with server.lock:
            server.seen.append(body | {"path": self.path})
            number = len(server.seen)
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                self._complete(body, number)
        finally:
            with server.lock:
                server.active -= 1

    def start_stream(self) -> None:
        """The head of a stream of events; the connection ends with it."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def refuse_length(self) -> None:
        self.send_problem(400, f"This model's maximum context length is {self.server.context} tokens. However, …")

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
        elif body["model"] != server.model:
            self.send_problem(404, f"The model `{body['model']}` does not exist.")
        else:
            server.backend.answer(self, body, number)


@contextmanager
def running(server: FakeVLLM) -> Iterator[FakeVLLM]:
    """The server, answering in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
