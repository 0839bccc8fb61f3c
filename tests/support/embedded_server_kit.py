"""A server on this machine that speaks vLLM's part of the OpenAI API, with a real embedded engine behind it.

A user's own OpenAI client gets really blended answers from it. A request that our client makes to ingest a chunk has
its KV computed and kept; a question's chunks are found where `lmcache_rag.chunks` says; anything else is prefilled in
full. See openai_kit.py for a server that has no model and fails in more ways.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from api_kit import ApiHandler

from lmcache_rag.engines.base import (
    BlendOptions,
    ChunkSpan,
    Completion,
    IngestPrompt,
    QueryPrompt,
    ReuseStats,
    Sampling,
    TextDelta,
    kv_key,
)
from lmcache_rag.engines.embedded import EmbeddedEngine
from lmcache_rag.errors import LMCacheRAGError
from lmcache_rag.prompt import PromptBuilder

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
VLLM_BLOCK = 16


class EmbeddedVLLM(ThreadingHTTPServer):
    """Listens on loopback. What can be set at any time stands in __init__.

    Args:
        engine: Answers. Its tokenizer must be the one that clients find under the model's name.
        model: The served model's name.
        version: Of vLLM: 0.32 and later take token ids for chat, 0.33 and later tell statistics in a stream.
        prompts: Says which prefix the chunks stand behind; None: the default format's.
        port: Where it listens; 0: anywhere.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        engine: EmbeddedEngine,
        *,
        model: str = MODEL,
        version: str = "0.33.0",
        prompts: PromptBuilder | None = None,
        port: int = 0,
    ) -> None:
        self.engine, self.model, self.version = engine, model, version
        self.prompts = prompts or PromptBuilder(engine.tokenizer, engine.info)
        self.root = model
        self.context = engine.info.context_length
        self.connector = True  # False: a stock vLLM
        self.failure = ""  # the connector cannot reach its KV store
        self.fail: list[int] = []  # statuses of the next answers
        self.hang = 0.0  # seconds before an answer begins
        self.drop_after: int | None = None  # pieces of a stream before the connection breaks
        self.key = ""  # the API key that it wants
        self.reused: list[int] = []  # what each question's answer took from cached chunks
        self.seen: list[dict[str, Any]] = []  # what arrived, in order; "path" tells where
        self.first_ms: list[float] = []  # of each stream: from the request to its first piece of text
        self.ids: list[list[int]] = []  # the token ids that were computed, beside `seen`
        self.auth: list[str | None] = []
        self.active = self.most_active = 0
        self.pause = 0.0  # seconds after each piece of a stream
        self.gone = threading.Event()  # a client closed its connection before the end of a stream
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def questions(self) -> list[dict[str, Any]]:
        """What arrived, without the ingestion of chunks."""
        return [body for body in self.seen if not _is_ingest(body)]

    @property
    def version_numbers(self) -> tuple[int, int]:
        major, minor, *_ = self.version.split(".")
        return int(major), int(minor)

    # -- what vLLM does ---------------------------------------------------------------------------------------------

    def token_ids(self, body: dict[str, Any]) -> list[list[int]]:
        """The prompts of a request as token ids."""
        params = body.get("kv_transfer_params") or {}
        tokenizer = self.engine.tokenizer
        if "messages" in body:
            if self.version_numbers >= (0, 32) and (ids := params.get("prompt_token_ids")) is not None:
                return [ids]
            text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            return [tokenizer.encode(text, add_special_tokens=False)]
        prompt = body["prompt"]
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        return [tokenizer.encode(one) if isinstance(one, str) else list(one) for one in prompt]

    # -- what the connector does ------------------------------------------------------------------------------------

    def fingerprint(self, body: dict[str, Any]) -> str:
        return f"{self.prompts.fingerprint}{body.get('cache_salt', '')}"

    def ingest(self, ids: list[int], body: dict[str, Any]) -> Completion:
        """Keep the KV of the chunk behind the prefix; the one token of the answer is the first of the prompt again."""
        prefix, fingerprint = len(self.prompts.prefix_ids), self.fingerprint(body)
        told = {"prefix_tokens": 0, "computed_tokens": len(ids)}
        if ids[:prefix] == list(self.prompts.prefix_ids) and len(ids) > prefix:
            prompt = IngestPrompt(tuple(ids), prefix, kv_key(fingerprint, ids[prefix:]), fingerprint)
            [missing] = self.engine.missing([prompt])
            if not missing:
                held = (len(ids) - 1) // VLLM_BLOCK * VLLM_BLOCK
                told = {"prefix_tokens": held, "computed_tokens": len(ids) - held}
            elif (body.get("kv_transfer_params") or {}).get("lmcache.max_offload_tokens") != 0 and not self.failure:
                list(self.engine.precompute([prompt]))
        return Completion("", (ids[0],), "length", ReuseStats(len(ids), **told))

    def query(self, ids: list[int], body: dict[str, Any]) -> tuple[QueryPrompt, BlendOptions]:
        """The prompt as our engine takes it."""
        params = body.get("kv_transfer_params") or {}
        prefix, fingerprint = len(self.prompts.prefix_ids), self.fingerprint(body)
        spans = params.get("lmcache_rag.chunks") or []
        if ids[:prefix] != list(self.prompts.prefix_ids):
            prefix, spans = 0, []
        chunks = tuple(ChunkSpan(start, end, kv_key(fingerprint, ids[start:end])) for start, end in spans)
        prompt = QueryPrompt(tuple(ids), prefix, chunks, chunks[-1].end if chunks else prefix, fingerprint)
        blending = self.connector and not self.failure and params.get("lmcache_rag.blend") == "on" and bool(chunks)
        blend = BlendOptions(
            params.get("lmcache_rag.policy", "query"), params.get("lmcache_rag.ratio", 0.15), enabled=blending
        )
        return prompt, blend

    def told(self, done: Completion, prompt: QueryPrompt | None, body: dict[str, Any]) -> dict[str, Any] | None:
        """What the connector says of a request, before it is computed where `spans` are wanted."""
        if not self.connector:
            return None
        numbers = done.stats.as_dict()
        if prompt is not None:
            self.reused.append(done.stats.reused_tokens)
        for name in ("chunks_hit", "chunks_missed", "ttft_ms", "blended", "prompt_tokens"):
            del numbers[name]
        if prompt is not None and (body.get("kv_transfer_params") or {}).get("lmcache_rag.spans"):
            there = [chunk for i, chunk in enumerate(prompt.chunks) if i not in done.missed and done.stats.chunks_hit]
            numbers["spans"] = [[chunk.start, chunk.end] for chunk in there]
        return {"lmcache_rag": numbers | ({"failure": self.failure} if self.failure else {})}


def _is_ingest(body: dict[str, Any]) -> bool:
    params = body.get("kv_transfer_params") or {}
    return body.get("max_tokens") == 1 and params.get("lmcache_rag.blend") == "off" and "messages" not in body


class _Handler(ApiHandler):
    server: EmbeddedVLLM

    def do_GET(self) -> None:
        server = self.server
        server.auth.append(self.headers.get("Authorization"))
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
            self.send_document(200, {"object": "list", "data": [card]})
        elif self.path == "/version":
            self.send_document(200, {"version": server.version})
        else:
            self.send_problem(404, "Not Found")

    def do_POST(self) -> None:
        server, self.arrived = self.server, time.perf_counter()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.auth.append(self.headers.get("Authorization"))
        if self.path == "/tokenize":
            special = body.get("add_special_tokens", True)
            self.send_document(
                200, {"tokens": server.engine.tokenizer.encode(body["prompt"], add_special_tokens=special)}
            )
            return
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            self.send_problem(404, "Not Found")
            return
        with server.lock:
            server.seen.append(body | {"path": self.path})
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                self._complete(body)
        finally:
            with server.lock:
                server.active -= 1

    def _complete(self, body: dict[str, Any]) -> None:
        server = self.server
        time.sleep(server.hang)
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.send_problem(401, "Unauthorized")
        elif server.fail:
            self.send_problem(server.fail.pop(0), "on demand")
        elif body["model"] != server.model:
            self.send_problem(404, f"The model `{body['model']}` does not exist.")
        else:
            prompts = server.token_ids(body)
            with server.lock:
                server.ids += prompts
            most = body.get("max_tokens") or body.get("max_completion_tokens") or 16
            if "messages" in body and not body.get("max_tokens") and not body.get("max_completion_tokens"):
                most = max(1, server.context - len(prompts[0]))
            if max(map(len, prompts)) + most > server.context:
                self.send_problem(400, f"This model's maximum context length is {server.context} tokens. However, …")
                return
            try:
                self._answer(body, prompts, most)
            except LMCacheRAGError as problem:
                self.send_problem(400, str(problem))

    def _answer(self, body: dict[str, Any], prompts: list[list[int]], most: int) -> None:
        server = self.server
        stop = body.get("stop") or ()
        sampling = Sampling(
            max_tokens=most,
            temperature=body.get("temperature") or 0.0,
            top_p=body.get("top_p") or 1.0,
            top_k=max(0, body.get("top_k") or 0),
            repetition_penalty=body.get("repetition_penalty") or 1.0,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            seed=body.get("seed"),
        )
        if body.get("stream"):
            self._stream(body, prompts[0], sampling)
            return
        choices, told, tokens = [], None, 0
        for index, ids in enumerate(prompts):
            if _is_ingest(body):
                prompt, done = None, server.ingest(ids, body)
            else:
                prompt, blend = server.query(ids, body)
                done = server.engine.generate(prompt, sampling, blend)
            told = server.told(done, prompt, body)
            if _stopped_by_text(done, server.engine.tokenizer):
                told = None  # found in the front end, which aborts the request: the connector's words never come
            tokens += len(done.token_ids)
            choice = {"index": index, "logprobs": None, "finish_reason": done.finish_reason}
            if body.get("return_token_ids"):
                choice["token_ids"] = list(done.token_ids)
            said: dict[str, Any] = {"text": done.text}
            if "messages" in body:
                said = {"message": {"role": "assistant", "content": done.text}}
            choices.append(choice | said)
        length = sum(map(len, prompts))
        usage = {"prompt_tokens": length, "completion_tokens": tokens, "total_tokens": length + tokens}
        head = _head(body, server.model, chunk=False)
        self.send_document(200, head | {"choices": choices, "usage": usage, "kv_transfer_params": told})

    def _stream(self, body: dict[str, Any], ids: list[int], sampling: Sampling) -> None:
        server, chat = self.server, "messages" in body
        prompt, blend = server.query(ids, body)
        events = server.engine.stream(prompt, sampling, blend)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        head = _head(body, server.model, chunk=True)
        try:
            if chat:
                self.send_event(head | _piece(chat, {"role": "assistant", "content": ""}))
            for index, event in enumerate(events):
                if index == server.drop_after:
                    return
                if isinstance(event, TextDelta):
                    self.send_event(head | _piece(chat, event.text))
                    if index == 0:
                        server.first_ms.append((time.perf_counter() - self.arrived) * 1e3)
                    time.sleep(self.server.pause)
                    continue
                last = _piece(chat, "", finish_reason=event.finish_reason)
                if body.get("return_token_ids"):
                    last["choices"][0]["token_ids"] = list(event.token_ids)
                if server.version_numbers >= (0, 33) and not _stopped_by_text(event, server.engine.tokenizer):
                    last["kv_transfer_params"] = server.told(event, prompt, body)
                self.send_event(head | last)
                if (body.get("stream_options") or {}).get("include_usage"):
                    counts = (len(ids), len(event.token_ids), len(ids) + len(event.token_ids))
                    usage = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), counts, strict=True))
                    self.send_event(head | {"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        finally:
            events.close()  # type: ignore[attr-defined]


def _head(body: dict[str, Any], model: str, *, chunk: bool) -> dict[str, Any]:
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if "messages" in body else "text_completion"
    return {"id": "cmpl-1", "object": kind, "created": 1, "model": model}


def _piece(chat: bool, said: Any, *, finish_reason: str | None = None) -> dict[str, Any]:
    delta = {"delta": said if isinstance(said, dict) else {"content": said}} if chat else {"text": said}
    return {"choices": [{"index": 0, "logprobs": None, "finish_reason": finish_reason} | delta]}


def _stopped_by_text(done: Completion, tokenizer: Any) -> bool:
    ends = {tokenizer.eos_token_id}
    return done.finish_reason == "stop" and not (done.token_ids and done.token_ids[-1] in ends)


@contextmanager
def serving(engine: EmbeddedEngine, **options: Any) -> Iterator[EmbeddedVLLM]:
    """A running server."""
    server = EmbeddedVLLM(engine, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def main(port: int, kv: Path) -> None:
    """Serve SmolLM2 in a process of its own, which can be killed."""
    EmbeddedVLLM(EmbeddedEngine(kv_dir=kv, device="cpu", dtype="float32"), port=port).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
