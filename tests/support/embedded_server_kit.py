"""A stand-in for vLLM with a real embedded engine behind it.

A user's own OpenAI client gets really blended answers from it. A request that our client makes to ingest a chunk has
its KV computed and kept; a question's chunks are found where `lmcache_rag.chunks` says; anything else is prefilled in
full.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fake_vllm import FakeVLLM, Handler, is_ingest, running

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

VLLM_BLOCK = 16


class EngineBackend:
    """Answers completions and chat with an embedded engine.

    Args:
        engine: Its tokenizer must be the one that clients find under the model's name.
        prompts: Says which prefix the chunks stand behind; None: the default format's.
    """

    server: FakeVLLM
    adapters = ()

    def __init__(self, engine: EmbeddedEngine, *, prompts: PromptBuilder | None = None) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.prompts = prompts or PromptBuilder(engine.tokenizer, engine.info)
        self.neutral_tokens: dict[str, int] = {}  # by the fingerprint of what was ingested
        self.context = engine.info.context_length
        self.reused: list[int] = []  # what each question's answer took from cached chunks
        self.first_ms: list[float] = []  # of each stream: from the request to its first piece of text
        self.ids: list[list[int]] = []  # the token ids that were computed, beside the server's `seen`

    def answer(self, handler: Handler, body: dict[str, Any], number: int) -> None:
        context, prompts = self.server.context, self.token_ids(body)
        with self.server.lock:
            self.ids += prompts
        most = body.get("max_tokens") or body.get("max_completion_tokens") or 16
        if "messages" in body and not body.get("max_tokens") and not body.get("max_completion_tokens"):
            most = max(1, context - len(prompts[0]))
        if max(map(len, prompts)) + most > context:
            handler.refuse_length()
            return
        try:
            self._answer(handler, body, prompts, most)
        except LMCacheRAGError as problem:
            handler.send_problem(400, str(problem))

    # -- what vLLM does ---------------------------------------------------------------------------------------------

    def token_ids(self, body: dict[str, Any]) -> list[list[int]]:
        """The prompts of a request as token ids."""
        params = body.get("kv_transfer_params") or {}
        tokenizer = self.engine.tokenizer
        if "messages" in body:
            if self.server.version_numbers >= (0, 32) and (ids := params.get("prompt_token_ids")) is not None:
                return [ids]
            text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            return [tokenizer.encode(text, add_special_tokens=False)]
        prompt = body["prompt"]
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        return [tokenizer.encode(one) if isinstance(one, str) else list(one) for one in prompt]

    # -- what the connector does ------------------------------------------------------------------------------------

    def prefix(self, ids: list[int], body: dict[str, Any]) -> tuple[int, str]:
        """Tokens of a request's prefix, as it names them or as the default prompt has them, and its fingerprint."""
        named = (body.get("kv_transfer_params") or {}).get("lmcache_rag.prefix")
        own = self.prompts.prefix_ids
        length = named if isinstance(named, int) else len(own) if ids[: len(own)] == list(own) else 0
        fingerprint = self.engine.info.fingerprint(ids[:length], self.prompts.tenant)
        return length, f"{fingerprint}{body.get('cache_salt', '')}"

    def ingest(self, ids: list[int], body: dict[str, Any]) -> Completion:
        """Keep the KV of the chunk behind the prefix; the one token of the answer is the first of the prompt again."""
        params = body.get("kv_transfer_params") or {}
        prefix, fingerprint = self.prefix(ids, body)
        reported = {"prefix_tokens": 0, "computed_tokens": len(ids)}
        start = params["lmcache_rag.chunks"][0][0] if params.get("lmcache_rag.chunks") else prefix
        if 0 < prefix <= start < len(ids):
            prompt = IngestPrompt(tuple(ids), prefix, kv_key(fingerprint, ids[start:]), fingerprint, start - prefix)
            self.neutral_tokens[fingerprint] = start - prefix
            [missing] = self.engine.missing([prompt])
            if not missing:
                held = (len(ids) - 1) // VLLM_BLOCK * VLLM_BLOCK
                reported = {"prefix_tokens": held, "computed_tokens": len(ids) - held}
            elif params.get("lmcache.max_offload_tokens") != 0 and not self.server.failure:
                list(self.engine.precompute([prompt]))
        return Completion("", (ids[0],), "length", ReuseStats(len(ids), **reported))

    def query(self, ids: list[int], body: dict[str, Any]) -> tuple[QueryPrompt, BlendOptions]:
        """The prompt as our engine takes it."""
        params = body.get("kv_transfer_params") or {}
        prefix, fingerprint = self.prefix(ids, body)
        spans = params.get("lmcache_rag.chunks") or []
        chunks = tuple(ChunkSpan(start, end, kv_key(fingerprint, ids[start:end])) for start, end in spans)
        end, neutral = chunks[-1].end if chunks else prefix, self.neutral_tokens.get(fingerprint, 0)
        prompt = QueryPrompt(tuple(ids), prefix, chunks, end, fingerprint, neutral)
        blending = (
            self.server.connector
            and not self.server.failure
            and params.get("lmcache_rag.blend") in ("on", "always")
            and bool(chunks)
        )
        blend = BlendOptions(
            params.get("lmcache_rag.policy", "query"),
            params.get("lmcache_rag.ratio", "auto"),
            enabled=blending,
            always=params.get("lmcache_rag.blend") == "always",
        )
        return prompt, blend

    def statistics(self, done: Completion, prompt: QueryPrompt | None, body: dict[str, Any]) -> dict[str, Any] | None:
        """What the connector says of a request, before it is computed where `spans` are wanted."""
        if not self.server.connector:
            return None
        numbers = done.stats.as_dict()
        if prompt is not None:
            self.reused.append(done.stats.reused_tokens)
        for name in ("chunks_hit", "chunks_missed", "ttft_ms", "blended", "prompt_tokens"):
            del numbers[name]
        if prompt is not None and (body.get("kv_transfer_params") or {}).get("lmcache_rag.spans"):
            there = [chunk for i, chunk in enumerate(prompt.chunks) if i not in done.missed and done.stats.chunks_hit]
            numbers["spans"] = [[chunk.start, chunk.end] for chunk in there]
        return {"lmcache_rag": numbers | ({"failure": self.server.failure} if self.server.failure else {})}

    # -- how it answers ---------------------------------------------------------------------------------------------

    def _answer(self, handler: Handler, body: dict[str, Any], prompts: list[list[int]], most: int) -> None:
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
            self._stream(handler, body, prompts[0], sampling)
            return
        choices, reported, tokens = [], None, 0
        for index, ids in enumerate(prompts):
            if is_ingest(body):
                prompt, done = None, self.ingest(ids, body)
            else:
                prompt, blend = self.query(ids, body)
                done = self.engine.generate(prompt, sampling, blend)
            reported = self.statistics(done, prompt, body)
            if _stopped_by_text(done, self.engine.tokenizer):
                reported = None  # found in the front end, which aborts the request: the connector's words never come
            tokens += len(done.token_ids)
            choice = {"index": index, "logprobs": None, "finish_reason": done.finish_reason}
            if body.get("return_token_ids"):
                choice["token_ids"] = list(done.token_ids)
            said: dict[str, Any] = {"text": done.text}
            if "messages" in body:
                said = {"message": {"role": "assistant"} | _said(body, done.text)}
                if said["message"]["content"] != done.text:
                    choice["finish_reason"] = "stop"  # made up, and whole
            choices.append(choice | said)
        length = sum(map(len, prompts))
        usage = {"prompt_tokens": length, "completion_tokens": tokens, "total_tokens": length + tokens}
        head = _head(body, self.server.model, chunk=False)
        handler.send_document(200, head | {"choices": choices, "usage": usage, "kv_transfer_params": reported})

    def _stream(self, handler: Handler, body: dict[str, Any], ids: list[int], sampling: Sampling) -> None:
        server, chat = self.server, "messages" in body
        prompt, blend = self.query(ids, body)
        events = self.engine.stream(prompt, sampling, blend)
        handler.start_stream()
        head = _head(body, self.server.model, chunk=True)
        try:
            if chat:
                handler.send_event(head | _piece(chat, {"role": "assistant", "content": ""}))
            for index, event in enumerate(events):
                if index == server.drop_after:
                    return
                if isinstance(event, TextDelta):
                    handler.send_event(head | _piece(chat, event.text))
                    if index == 0:
                        self.first_ms.append((time.perf_counter() - handler.arrived) * 1e3)
                    time.sleep(server.pause)
                    continue
                last = _piece(chat, "", finish_reason=event.finish_reason)
                if body.get("return_token_ids"):
                    last["choices"][0]["token_ids"] = list(event.token_ids)
                if server.version_numbers >= (0, 33) and not _stopped_by_text(event, self.engine.tokenizer):
                    last["kv_transfer_params"] = self.statistics(event, prompt, body)
                handler.send_event(head | last)
                if (body.get("stream_options") or {}).get("include_usage"):
                    counts = (len(ids), len(event.token_ids), len(ids) + len(event.token_ids))
                    usage = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), counts, strict=True))
                    handler.send_event(head | {"choices": [], "usage": usage})
            handler.wfile.write(b"data: [DONE]\n\n")
        finally:
            events.close()  # type: ignore[attr-defined]


def _said(body: dict[str, Any], text: str) -> dict[str, Any]:
    """The answer as chat: a call of the tool that `tool_choice` names, or JSON where the request has a schema."""
    choice, schema = body.get("tool_choice"), (body.get("response_format") or {}).get("json_schema")
    if isinstance(choice, dict):
        asked = next(one["content"] for one in reversed(body["messages"]) if one["role"] == "user")
        function = {"name": choice["function"]["name"], "arguments": json.dumps({"query": asked})}
        return {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    if schema:
        return {"content": json.dumps(dict.fromkeys(schema["schema"]["properties"], "yes"))}
    return {"content": text}


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
def serving(engine: EmbeddedEngine, *, prompts: PromptBuilder | None = None, **options: Any) -> Iterator[FakeVLLM]:
    """A running server."""
    with running(FakeVLLM(EngineBackend(engine, prompts=prompts), **options)) as server:
        yield server


def main(port: int, kv: Path) -> None:
    """Serve SmolLM2 in a process of its own, which can be killed."""
    engine = EmbeddedEngine(kv_dir=kv, device="cpu", dtype="float32")
    FakeVLLM(EngineBackend(engine), port=port).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
