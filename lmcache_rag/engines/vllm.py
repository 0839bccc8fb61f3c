"""The engine that asks a vLLM server which runs our connector. It knows the server's API only, never imports vLLM."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lmcache_rag import lazy_fill, protocol
from lmcache_rag.engines import vllm_wire as wire
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
from lmcache_rag.engines.vllm_client import Servers, server_urls
from lmcache_rag.engines.vllm_ingest import ChunkSender
from lmcache_rag.engines.vllm_served import check_tokenizer, served_model
from lmcache_rag.engines.vllm_tokenizer import tokenizer_of
from lmcache_rag.errors import ContextLengthError, EngineError, EngineUnavailableError

log = logging.getLogger("lmcache_rag")

KV_BLOCK = 64  # tokens of an LMCache chunk where a server does not say: what `lmcache-rag serve` starts it with
NO_CONNECTOR = "the server runs without lmcache-rag's connector, or the connector cannot blend there"


class VLLMEngine:
    """Answers through the completions API of one or several vLLM servers that serve one model.

    Several servers take turns; a chunk is precomputed on one of them, chosen by its key. So they should share one
    LMCache server, as the replicas of `serve --data-parallel-size` do: its index knows only what went through it.
    Prompts go as token ids. KV of a tenant carries a `cache_salt`; without a tenant there is none, so that any other
    client of the server shares the KV.

    Whether the server blends is learned from its answers: `info.can_blend` is true until one shows that it does not.
    The API key, if any, comes from the environment: LMCACHE_RAG_API_KEY, or VLLM_API_KEY. One that an LLM object of the
    user's holds for this very server can be given instead.

    Args:
        urls: The servers, for example "http://localhost:8000"; a text with commas, or a list.
        model: Name or root of the served model, which must be it; None: whatever the server serves.
        tokenizer: The model's transformers tokenizer, or the folder or Hugging Face name to take it from; None: found
            by the model's name.
        timeout: Longest silence of a server, in seconds.
        concurrency: Chunks that are precomputed at once, over all servers.
        kv_block: Tokens of an LMCache chunk; None: what the server says, or 64 where it does not.
        attempts: How often a question is tried while the server cannot be reached or is overloaded.
        patience: The same for each chunk at ingestion.
        backoff: Longest first wait between two tries, in seconds; it doubles from try to try.
        api_key: Of these servers; None: from the environment.
        ingest_key: What these servers want for ingestion and forgetting, and sent with nothing else; None: from the
            environment, LMCACHE_RAG_INGEST_KEY or LMCACHE_RAG_INGEST_KEY_FILE.

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
        self._servers = Servers(
            server_urls(urls),
            timeout=timeout,
            attempts=attempts,
            backoff=backoff,
            api_key=api_key,
            ingest_key=ingest_key,
        )
        self._lock = threading.Lock()
        self._blends: bool | None = None  # not known yet
        self._why_not = NO_CONNECTOR
        try:
            served = served_model(self._servers, model)
            self._tokenizer, digest, kv_bytes = tokenizer_of(served, tokenizer)
            check_tokenizer(self._servers, served.name, self._tokenizer)
        except BaseException:
            self.close()
            raise
        self._model = served.name
        # Streams carry statistics: it is known that they do; it may be that they do.
        self._streams_tell, self._streams_may_tell = served.streams_tell, served.streams_may_tell
        self.chat_takes_ids = served.chat_takes_ids
        self._info = EngineInfo(
            engine="vllm",
            model=served.root,
            revision="unknown",  # no server tells; the connector's keys hold it, see connector.identity
            dtype="unknown",
            tokenizer=digest,
            kv_block=kv_block or served.chunk or KV_BLOCK,
            context_length=served.context_length,
            kv_bytes_per_token=kv_bytes,
        )
        self._chunks = ChunkSender(
            self._servers,
            self._info,
            self._body,
            partial(self._learn, sure=True),
            served.block or protocol.VLLM_BLOCK,
            concurrency=concurrency,
            patience=patience,
        )

    @property
    def info(self) -> EngineInfo:
        """What this engine serves, by what is known of the server."""
        if self._blends is False:
            return replace(self._info, can_blend=False, why_not=self._why_not, said_why=True)
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

        Results come in the order of the prompts. KV that the server had already costs it the last tokens only.
        """
        return self._chunks.precompute(prompts, stop=stop)

    def missing(self, prompts: Sequence[IngestPrompt]) -> list[bool]:
        """For each prompt, whether this process does not know that the server has its KV.

        No API tells what a server holds, and it can forget. So a new process takes nothing for granted, and `warm`
        sends all: an exact prefix hit is cheap, and enters the chunk into the server's index again. A question whose
        chunks were not there takes them off the list, so that they are sent again.
        """
        return [prompt.key not in self._chunks.known for prompt in prompts]

    def forget(self, prompts_or_keys: Iterable[tuple[str, str]]) -> None:
        """Take (fingerprint, key) pairs off the list of what the server is known to have.

        Their KV stays there until LMCache evicts it; see forget_chunks.
        """
        for _, key in prompts_or_keys:
            self._chunks.known.discard(key)

    def forget_chunks(self, prompts: Iterable[IngestPrompt]) -> Iterator[ForgetResult]:
        """Have the KV of these chunks deleted on the servers, from memory and tiers; yields in the prompts' order.

        Call it for chunks only that nobody needs any more: a server does not know which documents hold a chunk.
        A server that cannot do it, or whose connector is not there, keeps the KV until LMCache evicts it; the result
        says so.

        Raises:
            EngineUnavailableError: A server, or its KV store, cannot be reached.
            EngineError: A server wants another key.
        """
        return self._chunks.forget(prompts)

    def forget_chunk(self, prompt: IngestPrompt) -> ForgetResult:
        """The same for one chunk."""
        [result] = self.forget_chunks([prompt])
        return result

    def verify(self, prompt: IngestPrompt) -> VerifyResult:
        """Ask the server for one chunk: "ok" if it had the exact KV of its whole blocks, "missing" if not.

        KV cannot be fetched from a server, so no values are compared. LMCache is told to keep nothing of this request;
        vLLM's own prefix cache may.
        """
        return self._chunks.verify(prompt)

    def usage(self) -> KVUsage:
        """Nothing that can be known from here but the servers' names."""
        return KVUsage(details={"servers": list(self._servers.urls), "known": len(self._chunks.known)})

    # -- queries --------------------------------------------------------------------------------------------------

    def generate(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Completion:
        """Answer one prompt, however long the answer takes: the timeout is for the server's silence.

        Streams inside where streams carry the statistics: from vLLM 0.33 on, or where our connector runs. Elsewhere the
        answer comes in one piece, and the timeout grows with its length.

        Raises:
            ContextLengthError: The prompt is longer than the context.
            EngineUnavailableError: No server can be reached, or it said nothing for too long.
            EngineError: The server refused.
        """
        request = self.request(prompt, sampling, blend)
        if not self._streams_may_tell:
            gathered = wire.Gathered()
            gathered.take(self._servers.complete(request))
            return self.finished(gathered, prompt, blend, streamed=False, stops=bool(sampling.stop))
        *_, done = self._stream(request, prompt, sampling, blend)
        return done  # type: ignore[return-value] # a stream ends with a Completion

    def stream(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Iterator[StreamEvent]:
        """Answer one prompt piece by piece. Closing the iterator stops the computation. Errors as for generate."""
        return self._stream(self.request(prompt, sampling, blend), prompt, sampling, blend)

    def _stream(
        self, request: dict[str, Any], prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions
    ) -> Iterator[StreamEvent]:
        gathered = wire.Gathered()
        with self._servers.streaming(request) as parts:
            for part in parts:
                if text := gathered.take(part):
                    yield TextDelta(text)
        yield self.finished(gathered, prompt, blend, streamed=True, stops=bool(sampling.stop))

    async def agenerate(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> Completion:
        """Async twin of generate."""
        request = self.request(prompt, sampling, blend)
        gathered = wire.Gathered()
        if not self._streams_may_tell:
            gathered.take(await self._servers.acomplete(request))
            return self.finished(gathered, prompt, blend, streamed=False, stops=bool(sampling.stop))
        async with self._servers.astreaming(request) as parts:
            async for part in parts:
                gathered.take(part)
        return self.finished(gathered, prompt, blend, streamed=True, stops=bool(sampling.stop))

    async def astream(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> AsyncIterator[StreamEvent]:
        """Async twin of stream."""
        request = self.request(prompt, sampling, blend)
        gathered = wire.Gathered()
        async with self._servers.astreaming(request) as parts:
            async for part in parts:
                if text := gathered.take(part):
                    yield TextDelta(text)
        yield self.finished(gathered, prompt, blend, streamed=True, stops=bool(sampling.stop))

    # -- for other clients ------------------------------------------------------------------------------------------

    def request(self, prompt: QueryPrompt, sampling: Sampling, blend: BlendOptions) -> dict[str, Any]:
        """Arguments of completions.create for a prompt, for whichever OpenAI client sends it.

        Raises:
            ContextLengthError: The prompt is longer than the context.
            ConfigError: There is no such policy.
        """
        from lmcache_rag.blend.policies import get_policy

        if blend.enabled:
            get_policy(blend.policy)
        if len(prompt) >= self._info.context_length:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens, the context holds {self._info.context_length} with the answer.",
                remedy="Retrieve fewer chunks or ask a shorter question.",
            )
        return self._body(prompt, sampling, wire.blend_params(blend, prompt))

    def check(self) -> None:
        """See that the servers are there and still serve this model.

        Raises:
            EngineUnavailableError: One cannot be reached.
            EngineError: It serves another model now.
        """
        served = served_model(self._servers, self._model)
        if served.root != self._info.model:
            raise EngineError(
                f"{self.urls[0]} serves {served.root} now, not {self._info.model}.", remedy="Open the engine anew."
            )

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers."""
        return self._servers.urls

    @property
    def headers(self) -> dict[str, str]:
        """What a plain HTTP client must send to be let in."""
        return self._servers.headers

    def complete(self, request: dict[str, Any]) -> Any:
        """Send a request, made by request() and changed at will; the server's own response.

        Raises:
            EngineUnavailableError: No server can be reached, or it said nothing for too long.
            EngineError: The server refused.
        """
        return self._servers.complete(request)

    def finished(
        self,
        gathered: wire.Gathered,
        prompt: QueryPrompt,
        blend: BlendOptions,
        *,
        streamed: bool,
        stops: bool = False,
    ) -> Completion:
        """The answer with what the server told of it, whichever OpenAI client got it.

        Args:
            gathered: What came.
            prompt: What was asked.
            blend: How KV was to be reused.
            streamed: Whether the answer came as a stream.
            stops: Whether stop strings were given.

        Raises:
            EngineUnavailableError: The answer broke off.
        """
        if gathered.reason is None:
            raise EngineUnavailableError(
                "The server broke off in the middle of an answer.", remedy="See the server's log, and ask again."
            )
        if streamed and gathered.told is not None and len(self._servers.urls) == 1:
            self._streams_tell = self._streams_may_tell = True  # by our plugin, where the version alone would not
        elif streamed and gathered.told is None and not (stops or self._streams_tell):
            self._streams_may_tell = False  # the plugin is not there
        # A stop string is found in vLLM's front end, which aborts the request: its statistics never come.
        self._learn(gathered, sure=not stops and (self._streams_tell or not streamed))
        ids = tuple(gathered.ids) or tuple(self._tokenizer.encode(gathered.text, add_special_tokens=False))
        done = wire.completion(
            gathered,
            prompt,
            kv_block=self._info.kv_block,
            blending=blend.enabled and self._blends is not False,
            streamed=streamed,
            ids=ids,
        )
        # Where the server could not look, nobody knows what it still has.
        unsure = blend.enabled and done.stats.chunks_missed and (gathered.told or {}).get(protocol.FAILURE)
        for index in range(len(prompt.chunks)) if unsure else done.missed:
            self._chunks.known.discard(prompt.chunks[index].key)
        return done

    def close(self) -> None:
        """Close the connections. Safe to call twice."""
        lazy_fill.cancel(self)
        self._servers.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _body(self, prompt: QueryPrompt | IngestPrompt, sampling: Sampling, params: dict[str, Any]) -> dict[str, Any]:
        """A request that keeps what belongs to a tenant to itself.

        Without a tenant there is no salt. With one it is the fingerprint, which holds the tenant.
        """
        plain = self._info.fingerprint(prompt.token_ids[: prompt.prefix_tokens])
        return wire.request(
            self._model,
            prompt.token_ids,
            sampling,
            params | {protocol.PREFIX: prompt.prefix_tokens},
            room=self._info.context_length - len(prompt.token_ids),
            salt="" if prompt.fingerprint == plain else prompt.fingerprint,
        )

    def _learn(self, gathered: wire.Gathered, *, sure: bool) -> None:
        """Whether the server blends. No statistics where they would have come mean that nobody there makes them."""
        with self._lock:
            if gathered.told is not None and not gathered.why_not:
                self._blends = True
            elif (sure or gathered.why_not) and self._blends is not False:
                self._blends, self._why_not = False, gathered.why_not or NO_CONNECTOR
                log.warning("%s is not blended: %s. It answers as it does to any client.", self._model, self._why_not)
