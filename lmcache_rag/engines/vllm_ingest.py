"""Chunk KV on a vLLM server: each chunk is sent once behind the prefix, and the server keeps what it computed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from lmcache_rag import protocol
from lmcache_rag.engines import vllm_wire as wire
from lmcache_rag.engines.base import (
    BlendOptions,
    EngineInfo,
    ForgetResult,
    IngestPrompt,
    PrecomputeResult,
    Sampling,
    VerifyResult,
)
from lmcache_rag.engines.vllm_errors import NotKeptError, RefusedError
from lmcache_rag.errors import ContextLengthError, LMCacheRAGError, PrecomputeError

if TYPE_CHECKING:
    from lmcache_rag.engines.vllm_client import Servers

T = TypeVar("T")

_ONE = Sampling(max_tokens=1)
_EXACT = wire.blend_params(BlendOptions(enabled=False))  # approximate KV must never become a chunk's KV


class Known:
    """Keys of KV that a server had when it was last asked. Safe to use from several threads."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()  # 32 bytes each rather than 64 letters: there may be millions

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str) -> None:
        """This key's KV is there."""
        self._keys.add(bytes.fromhex(key))

    def discard(self, key: str) -> None:
        """It is not, or nobody knows."""
        self._keys.discard(bytes.fromhex(key))


@dataclass(frozen=True)
class ChunkSender:
    """Sends chunks and learns from the answers what the server holds. Safe to use from several threads.

    Args:
        servers: The servers.
        info: What they serve.
        body: Makes a request of (prompt, sampling, kv_transfer_params).
        learn: Is shown each answer.
        vllm_block: Tokens of a block of vLLM's own prefix cache.
        concurrency: Chunks sent at once.
        patience: How often each is tried.
    """

    servers: Servers
    info: EngineInfo
    body: Callable[[IngestPrompt, Sampling, dict[str, Any]], dict[str, Any]]
    learn: Callable[[wire.Gathered], None]
    vllm_block: int
    concurrency: int
    patience: int
    known: Known = field(default_factory=Known)

    def precompute(
        self, prompts: Iterable[IngestPrompt], *, stop: threading.Event | None = None
    ) -> Iterator[PrecomputeResult]:
        """See VLLMEngine.precompute. More prompts are taken than were answered: as many as are sent at once."""
        for prompt, future in self._at_once(prompts, self._send, stop or threading.Event()):
            try:
                held = future.result()
            except LMCacheRAGError as problem:
                raise PrecomputeError(
                    f"A chunk's KV could not be computed: {problem.message}",
                    remedy=f"{problem.remedy} Run the command again; it goes on from here.".strip(),
                ) from problem
            self.known.add(prompt.key)
            tokens = len(prompt.chunk_ids)
            yield PrecomputeResult(prompt.key, tokens, tokens * self.info.kv_bytes_per_token, computed=not held)

    def forget(self, prompts: Iterable[IngestPrompt]) -> Iterator[ForgetResult]:
        """See VLLMEngine.forget_chunks."""
        for prompt, future in self._at_once(prompts, self._forget, threading.Event()):
            why = future.result()
            self.known.discard(prompt.key)
            yield ForgetResult(prompt.key, not why, why)

    def verify(self, prompt: IngestPrompt) -> VerifyResult:
        """See VLLMEngine.verify."""
        request = self._request(prompt, {protocol.MAX_OFFLOAD_TOKENS: 0})
        held = self._held(prompt, self.servers.complete(request, home=_home(prompt)))
        return VerifyResult(prompt.key, "ok" if held else "missing")

    def _at_once(
        self, prompts: Iterable[IngestPrompt], work: Callable[[IngestPrompt, threading.Event], T], stop: threading.Event
    ) -> Iterator[tuple[IngestPrompt, Future[T]]]:
        """Do something with each prompt, several at a time; in the order of the prompts."""
        source = iter(prompts)
        running: deque[tuple[IngestPrompt, Future[T]]] = deque()
        try:
            while True:
                for prompt in islice(source, self.concurrency - len(running)):
                    running.append((prompt, _in_thread(partial(work, prompt, stop))))
                if not running:
                    return
                yield running.popleft()
        finally:
            stop.set()  # those under way end by themselves; nobody waits for them

    def _forget(self, prompt: IngestPrompt, stop: threading.Event) -> str:
        """Have a chunk's KV deleted on every server, each of which may hold a copy; returns why not, "" if it was."""
        request = self._request(prompt, {protocol.FORGET: True, protocol.MAX_OFFLOAD_TOKENS: 0})
        for home in range(len(self.servers.urls)):
            try:
                response = self.servers.complete(
                    request, home=home, attempts=self.patience, stop=stop, check=_forgotten, ingest=True, only=True
                )
            except RefusedError as problem:
                return problem.message
            if protocol.FORGOTTEN not in (protocol.answer_statistics(response) or {}):
                return f"{self.servers.urls[home]} runs without a connector of lmcache-rag that can do it"
        return ""

    def _send(self, prompt: IngestPrompt, stop: threading.Event) -> bool:
        """Have a chunk's KV computed; returns whether it was there already."""
        response = self.servers.complete(
            self._request(prompt, {protocol.INGEST: True}),
            home=_home(prompt),
            attempts=self.patience,
            stop=stop,
            check=_kept,
            ingest=True,
        )
        return self._held(prompt, response)

    def _request(self, prompt: IngestPrompt, params: dict[str, Any] | None = None) -> dict[str, Any]:
        if len(prompt.token_ids) >= self.info.context_length:
            raise ContextLengthError(
                f"A chunk of {len(prompt.chunk_ids)} tokens does not fit the context of {self.info.context_length}.",
                remedy="Split into smaller chunks (--chunk-tokens).",
            )
        return self.body(prompt, _ONE, _EXACT | (params or {}))

    def _held(self, prompt: IngestPrompt, response: Any) -> bool:
        gathered = wire.Gathered()
        gathered.take(response)
        self.learn(gathered)
        return wire.already_held(gathered, prompt, kv_block=self.info.kv_block, vllm_block=self.vllm_block)


def _home(prompt: IngestPrompt) -> int:
    """Which of several servers computes and keeps a chunk."""
    return int(prompt.key[:8], 16)


def _kept(response: Any) -> None:
    """The server computes the prompt also when its KV store is out of reach; then nothing is kept."""
    gathered = wire.Gathered()
    gathered.take(response)
    failure = (gathered.told or {}).get("failure")
    if failure and not gathered.why_not:  # a server that cannot blend keeps exact prefixes
        raise NotKeptError(
            f"the server could not reach its KV store ({failure})", remedy="Look after the LMCache server."
        )


def _forgotten(response: Any) -> None:
    """A server that could not reach its KV store says so; another try may help."""
    if (protocol.answer_statistics(response) or {}).get(protocol.FORGOTTEN) is False:
        raise NotKeptError(
            "the server could not delete a chunk's KV: its KV store did not answer",
            remedy="Look after the LMCache server, and run the command again.",
        )


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Run something in a daemon thread, which the end of the process does not wait for: a server may hang."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as problem:  # handed to whoever waits
            future.set_exception(problem)

    threading.Thread(target=run, name="lmcache-rag-precompute", daemon=True).start()
    return future
