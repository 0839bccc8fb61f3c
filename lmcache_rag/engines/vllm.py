"""The engine that sends its prompts to vLLM servers with our connector. It never imports vLLM."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lmcache_rag import lazy_fill, protocol
from lmcache_rag.engines import vllm_answer
from lmcache_rag.engines.base import (
    BlendOptions,
    Completion,
    EngineInfo,
    ForgetResult,
    IngestPrompt,
    KVUsage,
    PrecomputeResult,
    QueryPrompt,
    Sampling,
    StreamEvent,
    TextDelta,
    VerifyResult,
)
from lmcache_rag.engines.vllm_client import KVNotStoredError, RefusedError, ServedModel, VLLMClient
from lmcache_rag.errors import (
    ContextLengthError,
    EngineError,
    EngineUnavailableError,
    LMCacheRAGError,
    PrecomputeError,
)
from lmcache_rag.families import CANNOT_RECUR, recurrent_of

log = logging.getLogger("lmcache_rag")

T = TypeVar("T")

_ONE = Sampling(max_tokens=1)
_EXACT = vllm_answer.blend_params(BlendOptions(enabled=False))  # approximate KV must never become a chunk's KV

NO_CONNECTOR = "the server runs without lmcache-rag's connector, or the connector cannot blend there"


class VLLMEngine:
    """Answers through the completions API of one or several vLLM servers that serve one model.

    Several servers take turns; a chunk is precomputed on one of them, chosen by its key. So they should share one
    LMCache server, as the replicas of `serve --data-parallel-size` do: its index has only chunks that it stored.
    Prompts are sent as token ids. Requests of a tenant carry a `cache_salt`; without a tenant there is none, so that
    any other client of the server shares the KV.

    Whether the server blends is learned from its answers: `info.can_blend` is true until one shows that it does not.
    The API key, if any, comes from the environment: LMCACHE_RAG_API_KEY, or VLLM_API_KEY. The key of a user's LLM
    object for the same server can be passed instead.

    Args:
        urls: The servers, for example "http://localhost:8000"; a text with commas, or a list.
        model: Name or root of the served model, which the server must serve; None: any.
        tokenizer: The model's tokenizer (a ModelTokenizer, or transformers' own), or the folder or Hugging Face name to
            take it from; None: found by the model's name.
        timeout: Longest silence of a server, in seconds.
        concurrency: Chunks that are precomputed at once, over all servers.
        kv_block: Tokens of an LMCache chunk; None: what the server reports, or 64.
        attempts: How often a question is tried while the server cannot be reached or is overloaded.
        patience: How often each chunk is tried at ingestion.
        backoff: Longest first wait between two tries, in seconds; it doubles from try to try.
        api_key: Of these servers; None: from the environment.
        ingest_key: Key that these servers require for ingestion and forgetting, sent with no other request; None: from
            the environment, LMCACHE_RAG_INGEST_KEY or LMCACHE_RAG_INGEST_KEY_FILE.

    Raises:
        EngineUnavailableError: A server cannot be reached.
        EngineError: It serves another model.
        SourceError: The tokenizer was not found.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        model: str | None = None,
        *,
        tokenizer: Any = None,
        timeout: float = 120.0,
        concurrency: int = 8,
        kv_block: int | None = None,
        attempts: int = 3,
        patience: int = 8,
        backoff: float = 0.5,
        api_key: str | None = None,
        ingest_key: str | None = None,
    ) -> None:
        self._client = VLLMClient(
            urls,
            timeout=timeout,
            attempts=attempts,
            backoff=backoff,
            api_key=api_key,
            ingest_key=ingest_key,
        )
        try:
            served = self._client.served_model(model)
            self._tokenizer, digest, kv_bytes, architectures = _tokenizer_of(served, tokenizer)
            self._client.check_tokenizer(served.name, self._tokenizer)
        except BaseException:
            self.close()
            raise
        self._model = served.name
        self._streams_have_stats = served.streams_have_stats  # known, not only possible
        self._streams_may_have_stats = served.streams_may_have_stats
        self.chat_takes_ids = served.chat_takes_ids
        self._info = EngineInfo(
            engine="vllm",
            model=served.root,
            revision="unknown",  # no server reports it; the connector's keys hold it
            dtype="unknown",
            tokenizer=digest,
            kv_block=kv_block or served.chunk or protocol.LMCACHE_CHUNK,
            context_length=served.context_length,
            kv_bytes_per_token=kv_bytes,
            caches_prefixes=served.caches_prefixes,
        )
        self._requests = RequestBuilder(self._model, self._info)
        self._support = BlendSupport(self._model)
        if name := recurrent_of(architectures):
            self._support.recurs(f"{name} {CANNOT_RECUR}")
        self._chunks = ChunkPrecomputer(
            self._client,
            self._requests,
            self._support,
            vllm_block=served.block or protocol.VLLM_BLOCK,
            concurrency=concurrency,
            patience=patience,
        )

    @property
    def info(self) -> EngineInfo:
        """What this engine serves, as far as the server's answers show it."""
        if self._support.can_blend is False:
            known = self._support
            return replace(self._info, can_blend=False, why_not=known.reason, said_why=True, recurrent=known.recurrent)
        return self._info

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._tokenizer

    # -- ingestion ------------------------------------------------------------------------------------------------

    def precompute(
        self, prompts: Iterable[IngestPrompt], *, stop: threading.Event | None = None
    ) -> Iterator[PrecomputeResult]:
        """Send each prefix ⧺ chunk once, several at a time, so that the server keeps its KV; see Engine.precompute.

        Results come in the order of the prompts. For KV that it has already the server computes only the last tokens.
        """
        return self._chunks.precompute(prompts, stop=stop)

    def missing(self, prompts: Sequence[IngestPrompt]) -> list[bool]:
        """For each prompt, whether its KV is missing on the server (True), as far as this process knows.

        No API reports which KV a server holds, and it evicts KV. So a new process assumes nothing, and `warm`
        sends all chunks: an exact prefix hit is cheap, and enters the chunk into the server's index again. If a
        question does not find a chunk, it counts as missing, and is sent again.
        """
        return [prompt.key not in self._chunks.known for prompt in prompts]

    def forget(self, prompts_or_keys: Iterable[tuple[str, str]]) -> None:
        """Count the KV of (fingerprint, key) pairs as missing on the server.

        Their KV stays there until LMCache evicts it; see forget_chunks.
        """
        for _, key in prompts_or_keys:
            self._chunks.known.discard(key)

    def forget_chunks(self, prompts: Iterable[IngestPrompt], *, count: bool = False) -> Iterator[ForgetResult]:
        """Delete the KV of these chunks on the servers, from memory and tiers; yields in the prompts' order.

        Call it only for chunks that no document holds any more: a server does not know which documents hold a chunk.
        A server that cannot do it, or has no connector of ours, keeps the KV until LMCache evicts it; the result
        has the reason.

        Args:
            prompts: The chunks. The KV of their `shared_tokens` stays.
            count: Have each server list what its tiers hold of a chunk, before the removal and once more after it.

        Raises:
            EngineUnavailableError: A server, or its KV store, cannot be reached.
            EngineError: A server rejected the key.
        """
        return self._chunks.forget(prompts, count=count)

    def forget_chunk(self, prompt: IngestPrompt) -> ForgetResult:
        """As `forget_chunks`, for one chunk."""
        [result] = self.forget_chunks([prompt])
        return result

    def pin_chunk(self, prompt: IngestPrompt, *, pin: bool = True) -> None:
        """Keep a chunk's KV in its server's memory, until it is removed or LMCache is started again; or end that.

        Raises:
            PinRefusedError: Pins have no room for it, or the server cannot pin.
            EngineUnavailableError: The server, or its KV store, cannot be reached.
            EngineError: The server rejected the key.
        """
        self._chunks.pin(prompt, pin=pin)

    def verify(self, prompt: IngestPrompt) -> VerifyResult:
        """Ask the server for one chunk: "ok" if it had the exact KV of its whole blocks, "missing" if not.

        KV cannot be fetched from a server, so no values are compared. LMCache is asked to store nothing of this
        request; vLLM's own prefix cache may.
        """
        return self._chunks.verify(prompt)

    def usage(self) -> KVUsage:
        """Only the servers' names: how much KV they hold is unknown."""
        return KVUsage(details={"servers": list(self._client.urls), "known": len(self._chunks.known)})

    # -- queries --------------------------------------------------------------------------------------------------

    def generate(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Completion:
        """Answer one prompt. The timeout limits how long the server may send nothing, not the length of the answer.

        Uses a stream if streams carry the statistics: from vLLM 0.33 on, or with our connector. Otherwise the
        answer comes in one piece, and the timeout grows with its length.

        Raises:
            ContextLengthError: The prompt is longer than the context.
            EngineUnavailableError: No server can be reached, or it sent nothing for too long.
            EngineError: The server refused.
        """
        request = self.request(prompt, sampling, blend)
        if not self._streams_may_have_stats:
            gathered = vllm_answer.Gathered()
            gathered.take(self._client.complete(request))
            return self.finished(gathered, prompt, blend, streamed=False, stops=bool(sampling.stop))
        *_, done = self._stream(request, prompt, sampling, blend)
        return done  # type: ignore[return-value] # a stream ends with a Completion

    def stream(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Iterator[StreamEvent]:
        """Answer one prompt piece by piece. Closing the iterator stops the computation. Errors as for generate."""
        return self._stream(self.request(prompt, sampling, blend), prompt, sampling, blend)

    def _stream(
        self, request: dict[str, Any], prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions
    ) -> Iterator[StreamEvent]:
        gathered = vllm_answer.Gathered()
        with self._client.streaming(request) as parts:
            for part in parts:
                if text := gathered.take(part):
                    yield TextDelta(text)
        yield self.finished(gathered, prompt, blend, streamed=True, stops=bool(sampling.stop))

    async def agenerate(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Completion:
        """Async version of generate."""
        request = self.request(prompt, sampling, blend)
        gathered = vllm_answer.Gathered()
        if not self._streams_may_have_stats:
            gathered.take(await self._client.acomplete(request))
            return self.finished(gathered, prompt, blend, streamed=False, stops=bool(sampling.stop))
        async with self._client.astreaming(request) as parts:
            async for part in parts:
                gathered.take(part)
        return self.finished(gathered, prompt, blend, streamed=True, stops=bool(sampling.stop))

    async def astream(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> AsyncIterator[StreamEvent]:
        """Async version of stream."""
        request = self.request(prompt, sampling, blend)
        gathered = vllm_answer.Gathered()
        async with self._client.astreaming(request) as parts:
            async for part in parts:
                if text := gathered.take(part):
                    yield TextDelta(text)
        yield self.finished(gathered, prompt, blend, streamed=True, stops=bool(sampling.stop))

    # -- for other clients ------------------------------------------------------------------------------------------

    def request(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> dict[str, Any]:
        """Arguments of completions.create for a prompt, for any OpenAI client.

        Raises:
            ContextLengthError: The prompt is longer than the context.
            ConfigError: There is no such policy.
        """
        from lmcache_rag.policies import get_policy

        if blend.enabled:
            get_policy(blend.policy)
        if len(prompt) >= self._info.context_length:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens, the context holds {self._info.context_length} with the answer.",
                remedy="Retrieve fewer chunks or ask a shorter question.",
            )
        return self._requests.build(prompt, sampling, vllm_answer.blend_params(blend, prompt))

    def check(self) -> None:
        """Check that the servers can be reached and still serve this model.

        Raises:
            EngineUnavailableError: One cannot be reached.
            EngineError: It serves another model now.
        """
        served = self._client.served_model(self._model)
        if served.root != self._info.model:
            raise EngineError(
                f"{self.urls[0]} serves {served.root} now, not {self._info.model}.", remedy="Open the engine again."
            )

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers."""
        return self._client.urls

    @property
    def headers(self) -> dict[str, str]:
        """The headers with which a plain HTTP client authenticates."""
        return self._client.headers

    def complete(self, request: dict[str, Any]) -> Any:
        """Send a request that request() built, changed or not; returns the server's own response.

        Raises:
            EngineUnavailableError: No server can be reached, or it sent nothing for too long.
            EngineError: The server refused.
        """
        return self._client.complete(request)

    def streaming(self, request: dict[str, Any]) -> AbstractContextManager[Iterator[Any]]:
        """As complete(), in the parts that the server sends. Leaving the block stops the computation."""
        return self._client.streaming(request)

    def finished(
        self,
        gathered: vllm_answer.Gathered,
        prompt: QueryPrompt,
        blend: BlendOptions,
        *,
        streamed: bool,
        stops: bool = False,
    ) -> Completion:
        """The answer with the server's statistics, whichever OpenAI client received it.

        Args:
            gathered: The answer.
            prompt: The prompt that was sent.
            blend: How KV was to be reused.
            streamed: Whether the answer came as a stream.
            stops: Whether the request had stop strings.

        Raises:
            EngineUnavailableError: The answer is incomplete.
        """
        if gathered.reason is None:
            raise EngineUnavailableError(
                "The server broke off in the middle of an answer.", remedy="See the server's log, and ask again."
            )
        if streamed and gathered.stats is not None and len(self._client.urls) == 1:
            self._streams_have_stats = self._streams_may_have_stats = (
                True  # by our plugin, where vLLM's version alone would not
            )
        elif streamed and gathered.stats is None and not (stops or self._streams_have_stats):
            self._streams_may_have_stats = False  # the plugin is not there
        # vLLM's front end finds a stop string and aborts the request: its statistics are never sent.
        self._support.observe(gathered, conclusive=not stops and (self._streams_have_stats or not streamed))
        ids = tuple(gathered.ids) or tuple(self._tokenizer.encode(gathered.text, add_special_tokens=False))
        done = vllm_answer.completion(
            gathered,
            prompt,
            kv_block=self._info.kv_block,
            blending=blend.enabled and self._support.can_blend is not False,
            streamed=streamed,
            ids=ids,
        )
        # If the server could not look anything up, it is unknown which KV it has.
        unsure = blend.enabled and done.stats.chunks_missed and (gathered.stats or {}).get(protocol.FAILURE)
        for index in range(len(prompt.chunks)) if unsure else done.missed:
            self._chunks.known.discard(prompt.chunks[index].key)
        return done

    def close(self) -> None:
        """Close the connections. Safe to call twice."""
        lazy_fill.cancel(self)
        self._client.close()


def _tokenizer_of(served: ServedModel, tokenizer: Any) -> tuple[Any, str, int, tuple[str, ...]]:
    """(tokenizer, its digest, bytes of one token's KV, architectures) of a model that a server runs.

    Without its configuration it has 0 bytes and no architecture.

    Args:
        served: The model.
        tokenizer: A tokenizer, or the folder or name to take it from; None: found by the model's names.

    Raises:
        SourceError: No source has it.
        EngineError: It cannot be read.
    """
    from lmcache_rag.tokenizer import open_tokenizer
    from lmcache_rag.weights import find_tokenizer, kv_bytes_per_token, tokenizer_digest
    from lmcache_rag.weights.find import architectures_of

    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        content = f"{tokenizer.backend_tokenizer.to_str()}{tokenizer.chat_template}"
        return tokenizer, hashlib.sha256(content.encode()).hexdigest()[:32], 0, ()
    names = [str(tokenizer)] if tokenizer is not None else [served.local, served.root, served.name, served.base]
    path = find_tokenizer(names)
    return open_tokenizer(path), tokenizer_digest(path), kv_bytes_per_token(path), architectures_of(path)


# -- requests, and what their answers reveal of the servers -----------------------------------------------------------


@dataclass(frozen=True)
class RequestBuilder:
    """Builds arguments of completions.create.

    Args:
        model: Name by which the servers know the model.
        info: What they serve.
    """

    model: str
    info: EngineInfo

    def build(self, prompt: QueryPrompt | IngestPrompt, sampling: Sampling, params: dict[str, Any]) -> dict[str, Any]:
        """A request whose KV is shared within its tenant only.

        Without a tenant there is no salt. With one it is the fingerprint, which holds the tenant.
        """
        return vllm_answer.request(
            self.model,
            prompt.token_ids,
            sampling,
            params
            | {protocol.PREFIX: prompt.prefix_tokens}
            | ({protocol.TENANT: protocol.tenant_name(prompt.tenant)} if prompt.tenant else {}),
            room=self.info.context_length - len(prompt.token_ids),
            salt=prompt.fingerprint if prompt.tenant else "",
        )


class BlendSupport:
    """Whether the servers blend, learned from their answers. Safe to use from several threads.

    Args:
        model: Name of the model, for the log.

    Attributes:
        can_blend: None until an answer shows it.
        reason: Why not, if it is False.
        recurrent: Whether that is because the model has recurrent layers.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._lock = threading.Lock()
        self.can_blend: bool | None = None
        self.reason, self.recurrent = NO_CONNECTOR, False

    def observe(self, gathered: vllm_answer.Gathered, *, conclusive: bool) -> None:
        """Learn from an answer.

        Args:
            gathered: The answer.
            conclusive: Whether missing statistics mean that the server makes none.
        """
        with self._lock:
            if gathered.stats is not None and not gathered.unsupported_reason:
                self.can_blend = True
            elif conclusive or gathered.unsupported_reason:
                why = protocol.cannot_blend(gathered.stats)
                self._cannot(
                    str(why or NO_CONNECTOR), recurrent=bool(why and why.code is protocol.CannotBlend.RECURRENT)
                )

    def recurs(self, reason: str) -> None:
        """The model has recurrent layers."""
        with self._lock:
            self._cannot(reason, recurrent=True)

    def _cannot(self, reason: str, *, recurrent: bool) -> None:
        if self.can_blend is not False:
            self.can_blend, self.reason, self.recurrent = False, reason, recurrent
            log.warning("%s is not blended: %s. Prompts are computed in full.", self._model, reason)


class KeySet:
    """Keys of KV that a server had at the last request. Safe to use from several threads."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()  # 32 bytes each rather than 64 letters: there may be millions

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str) -> None:
        """Record that this key's KV is there."""
        self._keys.add(bytes.fromhex(key))

    def discard(self, key: str) -> None:
        """Record that this key's KV is missing, or may be."""
        self._keys.discard(bytes.fromhex(key))


# -- precomputation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkPrecomputer:
    """Sends each prefix ⧺ chunk once and records whose KV the servers hold. Safe to use from several threads.

    Args:
        client: Client of the servers.
        requests: Builds the requests.
        support: Observes each answer.
        vllm_block: Tokens of a block of vLLM's own prefix cache.
        concurrency: Chunks sent at once.
        patience: How often each is sent at most.
        known: Keys of the chunks whose KV the servers had at the last request.
    """

    client: VLLMClient
    requests: RequestBuilder
    support: BlendSupport
    vllm_block: int
    concurrency: int
    patience: int
    known: KeySet = field(default_factory=KeySet)

    def precompute(
        self, prompts: Iterable[IngestPrompt], *, stop: threading.Event | None = None
    ) -> Iterator[PrecomputeResult]:
        """See VLLMEngine.precompute. Reads ahead in `prompts` by as many as are sent at once."""
        for prompt, future in self._at_once(prompts, self._send, stop or threading.Event()):
            try:
                held = future.result()
            except LMCacheRAGError as problem:
                raise PrecomputeError(
                    f"A chunk's KV could not be computed: {problem.message}",
                    remedy=f"{problem.remedy} Run the command again; it continues from here.".strip(),
                ) from problem
            self.known.add(prompt.key)
            tokens = len(prompt.chunk_ids)
            yield PrecomputeResult(
                prompt.key, tokens, tokens * self.requests.info.kv_bytes_per_token, computed=not held
            )

    def forget(self, prompts: Iterable[IngestPrompt], *, count: bool = False) -> Iterator[ForgetResult]:
        """See VLLMEngine.forget_chunks."""
        for prompt, future in self._at_once(prompts, partial(self._forget, count=count), threading.Event()):
            result = future.result()
            self.known.discard(prompt.key)
            yield result

    def pin(self, prompt: IngestPrompt, *, pin: bool) -> None:
        """See VLLMEngine.pin_chunk."""
        response = self.client.complete(
            self._request(prompt, {protocol.PIN: pin, protocol.MAX_OFFLOAD_TOKENS: 0}),
            home=_home(prompt),
            attempts=self.patience,
            check=vllm_answer.check_pinned,
            ingest=True,
        )
        statistics = protocol.answer_statistics(response) or {}
        if refusal := vllm_answer.pin_refusal(statistics, len(prompt.chunk_ids), pin=pin):
            raise refusal

    def verify(self, prompt: IngestPrompt) -> VerifyResult:
        """See VLLMEngine.verify."""
        request = self._request(prompt, {protocol.MAX_OFFLOAD_TOKENS: 0})
        held = self._held(prompt, self.client.complete(request, home=_home(prompt)))
        return VerifyResult(prompt.key, "ok" if held else "missing")

    def _at_once(
        self, prompts: Iterable[IngestPrompt], work: Callable[[IngestPrompt, threading.Event], T], stop: threading.Event
    ) -> Iterator[tuple[IngestPrompt, Future[T]]]:
        """Run `work` on each prompt, several at a time; yields the futures in the order of the prompts."""
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
            stop.set()  # requests in flight end by themselves; this does not wait for them

    def _forget(self, prompt: IngestPrompt, stop: threading.Event, *, count: bool) -> ForgetResult:
        """Delete a chunk's KV on every server, since each may hold a copy."""
        if prompt.shared_tokens >= len(prompt.chunk_ids):
            return ForgetResult(prompt.key, True)  # all of it belongs to another chunk, too
        keep = {protocol.KEEP: prompt.shared_tokens} if prompt.shared_tokens else {}
        params = {protocol.FORGET: True, protocol.MAX_OFFLOAD_TOKENS: 0} | keep
        request = self._request(prompt, params | ({protocol.HELD: True} if count else {}))
        before, left = Counter[str](), Counter[str]()
        for home in range(len(self.client.urls)):
            for counts in (before, left)[: 1 + count]:  # the second request finds what the first one left
                try:
                    response = self.client.complete(
                        request, home=home, attempts=self.patience, stop=stop, check=_forgotten, ingest=True, only=True
                    )
                except RefusedError as problem:
                    return ForgetResult(prompt.key, False, problem.message, before, left)
                statistics = protocol.answer_statistics(response) or {}
                if protocol.FORGOTTEN not in statistics:
                    why = f"{self.client.urls[home]} runs without a connector of lmcache-rag that can do it"
                    return ForgetResult(prompt.key, False, why, before, left)
                counts.update(protocol.read_held(statistics.get(protocol.KV_HELD)))
        stays = [tier for tier, number in left.items() if number]
        why = f"there is KV of it left in {', '.join(stays)}" if stays else ""
        return ForgetResult(prompt.key, not why, why, before, left)

    def _send(self, prompt: IngestPrompt, stop: threading.Event) -> bool:
        """Have a server compute a chunk's KV; returns whether it had the KV already."""
        response = self.client.complete(
            self._request(prompt, {protocol.INGEST: True}),
            home=_home(prompt),
            attempts=self.patience,
            stop=stop,
            check=_kept,
            ingest=True,
        )
        return self._held(prompt, response)

    def _request(self, prompt: IngestPrompt, params: dict[str, Any] | None = None) -> dict[str, Any]:
        length = self.requests.info.context_length
        if len(prompt.token_ids) >= length:
            raise ContextLengthError(
                f"A chunk of {len(prompt.chunk_ids)} tokens does not fit the context of {length}.",
                remedy="Split into smaller chunks (--chunk-tokens).",
            )
        where = {protocol.CHUNKS: [[prompt.chunk_start, len(prompt.token_ids)]]} if prompt.neutral_tokens else {}
        return self.requests.build(prompt, _ONE, _EXACT | where | (params or {}))

    def _held(self, prompt: IngestPrompt, response: Any) -> bool:
        gathered = vllm_answer.Gathered()
        gathered.take(response)
        self.support.observe(gathered, conclusive=True)
        return vllm_answer.already_held(
            gathered, prompt, kv_block=self.requests.info.kv_block, vllm_block=self.vllm_block
        )


def _home(prompt: IngestPrompt) -> int:
    """Which of several servers computes and keeps a chunk."""
    return int(prompt.key[:8], 16)


def _kept(response: Any) -> None:
    """Raise if the server could not reach its KV store: it computed the prompt, but stored nothing."""
    gathered = vllm_answer.Gathered()
    gathered.take(response)
    failure = (gathered.stats or {}).get("failure")
    if failure and not gathered.unsupported_reason:  # a server that cannot blend keeps exact prefixes
        raise KVNotStoredError(
            f"the server could not reach its KV store ({failure})", remedy="Check the LMCache server."
        )


def _forgotten(response: Any) -> None:
    """Raise if the server reports that it could not reach its KV store: another attempt may help."""
    if (protocol.answer_statistics(response) or {}).get(protocol.FORGOTTEN) is False:
        raise KVNotStoredError(
            "the server could not delete a chunk's KV: its KV store did not answer",
            remedy="Check the LMCache server, and run the command again.",
        )


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a daemon thread, for which the process does not wait at its end: a server may hang."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as problem:  # raised by the future's result()
            future.set_exception(problem)

    threading.Thread(target=run, name="lmcache-rag-precompute", daemon=True).start()
    return future
