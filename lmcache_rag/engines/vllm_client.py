"""The client of vLLM servers: requests with retries, sync and async, what the servers serve, and their errors.

Engine, doctor, benchmarks and demo use it. It knows vLLM's HTTP API only, and never imports vLLM.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from lmcache_rag.credentials import API_KEY_REMEDY, DIRECT, INGEST_KEY_REMEDY, api_key, proxy_remedy
from lmcache_rag.errors import ConfigError, ContextLengthError, EngineError, EngineUnavailableError, LMCacheRAGError
from lmcache_rag.protocol import INGEST_KEY_HEADER, chunk_tokens

if TYPE_CHECKING:
    import openai

log = logging.getLogger("lmcache_rag")

STREAMS_WITH_STATS = (0, 33)  # first vLLM whose streams carry kv_transfer_params without our plugin
CHAT_TAKES_IDS = (0, 32)  # first whose chat completions take kv_transfer_params.prompt_token_ids
CONNECT_SECONDS = 5.0
LONGEST_WAIT_S = 20.0  # between two attempts
# The timeout of an answer in one piece grows by one timeout for this many tokens: one token per
# second, with the default of 120 s. In a stream the timeout applies to each part.
TOKENS_IN_TIMEOUT = 120
_STREAM = {"stream": True, "stream_options": {"include_usage": True}}
_PROBE = "The KV cache of 12,345 tokens: naïve façade, 日本語.\n\n  def f(x): return x"
_TOO_LONG = re.compile(r"context length|max_model_len|maximum model length")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One entry of a server's list of models.

    Attributes:
        name: Its name in requests.
        root: Hugging Face name or folder from which the server loaded it.
        context_length: Longest prompt and answer together, in tokens; 0 if the server does not report it.
        adapter: Whether it is an adapter of another model.
    """

    name: str
    root: str
    context_length: int = 0
    adapter: bool = False


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that all the servers serve.

    Attributes:
        name: Its name in requests.
        root: Hugging Face name or folder from which the server loaded it.
        context_length: Longest prompt and answer together, in tokens.
        streams_have_stats: Whether its streams carry reuse statistics.
        streams_may_have_stats: Whether they do if our plugin is loaded there, as it is where our connector runs.
        chat_takes_ids: Whether its chat completions take token ids.
        chunk: Tokens of an LMCache chunk; 0 if the server does not report it.
        block: Tokens of a block of vLLM's own prefix cache; 0 if the server does not report it.
        caches_prefixes: Whether vLLM's own prefix cache is on, as it is by default; false if a server reports it off.
        local: Folder on this machine that the user named for it; "" if none.
        base: As `root`, of the model that it is a LoRA adapter of; "" if it is none.
    """

    name: str
    root: str
    context_length: int
    streams_have_stats: bool
    streams_may_have_stats: bool
    chat_takes_ids: bool
    chunk: int = 0
    block: int = 0
    caches_prefixes: bool = True
    local: str = ""
    base: str = ""


def server_urls(urls: str | Sequence[str]) -> tuple[str, ...]:
    """URLs of servers without trailing slash and /v1, from a list or a text with commas.

    Raises:
        ConfigError: There is none, or one is not an http URL.
    """
    texts = [urls] if isinstance(urls, str) else list(urls)
    parts = [part.strip().rstrip("/").removesuffix("/v1") for text in texts for part in text.split(",") if part.strip()]
    for url in parts or [""]:
        if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
            raise ConfigError(
                f"{url!r} is not the URL of a server.",
                remedy="Write for example http://localhost:8000; several with commas between them.",
            )
    return tuple(dict.fromkeys(parts))


@dataclass(frozen=True, slots=True)
class _Send:
    """A step of a request: send it to this server."""

    url: str


@dataclass(frozen=True, slots=True)
class _Wait:
    """A step of a request: wait before the next attempt."""

    seconds: float


class VLLMClient:
    """Client of one or several vLLM servers that serve the same model. Use it as a context manager.

    Safe to use from several threads and event loops. Sync and async requests run the same steps, see `_steps`.

    Args:
        urls: The servers, for example "http://localhost:8000"; a text with commas, or a list.
        timeout: Longest silence of a server, in seconds. An answer that is not streamed has more, by its length.
        attempts: How often a request is sent at most.
        backoff: Longest first wait between two attempts, in seconds; it doubles from attempt to attempt.
        api_key: None or "": from the environment.
        ingest_key: Sent with the requests that ingest and forget, and with no others; None: from the environment.
        verify: Whether to check the servers' certificates.

    Raises:
        ConfigError: A URL is not valid.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        timeout: float = 120.0,
        attempts: int = 4,
        backoff: float = 0.25,
        api_key: str | None = None,
        ingest_key: str | None = None,
        verify: bool = True,
    ) -> None:
        self._clients: dict[tuple[str, bool], openai.OpenAI] = {}
        self._lock = threading.Lock()
        self.urls = server_urls(urls)
        self.timeout, self._attempts, self._backoff = timeout, attempts, backoff
        self._api_key, self._ingest_key, self._verify = api_key, ingest_key, verify
        self._turn = itertools.count()

    @property
    def url(self) -> str:
        """The first server."""
        return self.urls[0]

    @property
    def headers(self) -> dict[str, str]:
        """The API key as a header, if there is one."""
        key = self._api_key or api_key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def __enter__(self) -> VLLMClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. Safe to call twice."""
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()

    def __del__(self) -> None:
        try:  # noqa: SIM105 -- not closed by its owner; at the interpreter's end `suppress` may be gone
            self.close()
        except Exception:  # noqa: S110
            pass

    # -- completions ------------------------------------------------------------------------------------------------

    def complete(
        self,
        request: dict[str, Any],
        *,
        home: int | None = None,
        attempts: int | None = None,
        stop: threading.Event | None = None,
        check: Callable[[Any], None] | None = None,
        ingest: bool = False,
        only: bool = False,
    ) -> Any:
        """One completion in one piece, as the openai client returns it.

        Args:
            request: Arguments of completions.create.
            home: Index of the server to use first; None: round robin. After a failure the next attempt uses the next
                server.
            attempts: Number of attempts; None: the client's.
            stop: Ends the waiting between attempts, and the attempts.
            check: Called with the response; what it raises may lead to another attempt.
            ingest: Whether the request ingests or forgets, for which a server may require the ingest key.
            only: Send every attempt to `home`.

        Raises:
            LMCacheRAGError: See `translated`.
        """
        steps = self._steps(request, home, attempts or self._attempts, stop, check, ingest=ingest, only=only)
        return self._run(steps, request, ingest=ingest, sleep=stop.wait if stop is not None else time.sleep)

    @contextmanager
    def streaming(self, request: dict[str, Any]) -> Iterator[Iterator[Any]]:
        """The chunks of a streamed completion. Leaving the block closes the connection and stops the computation."""
        with translate_errors("The server", self.timeout):
            stream = self.complete(request | _STREAM)
            try:
                yield iter(stream)
            finally:
                stream.close()

    async def acomplete(self, request: dict[str, Any]) -> Any:
        """Async version of complete."""
        async with self._asend(request) as response:
            return response

    @asynccontextmanager
    async def astreaming(self, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[Any]]:
        """Async version of streaming."""
        with translate_errors("The server", self.timeout):
            async with self._asend(request | _STREAM) as stream:
                try:
                    yield aiter(stream)
                finally:
                    await stream.close()

    def _steps(
        self,
        request: dict[str, Any],
        home: int | None,
        attempts: int,
        stop: threading.Event | None,
        check: Callable[[Any], None] | None,
        *,
        ingest: bool,
        only: bool,
    ) -> Generator[_Send | _Wait, Any, Any]:
        """The steps of a request, for sync and async callers: which server, when to retry, how to translate errors.

        Does no I/O itself. Yields each step; is sent a response, or thrown the error of a step; returns the response.
        """
        urls, seconds = self._order(home, only=only), self._seconds(request)
        for attempt in itertools.count(1):
            url = next(urls)
            try:
                response = yield _Send(url)
                if check is not None:
                    check(response)
                return response
            except Exception as problem:
                if attempt >= attempts or (stop is not None and stop.is_set()) or not is_retryable(problem):
                    raise_translated(problem, url, seconds, ingest=ingest)
                log.debug("%s: another attempt follows: %s", url, problem)
            longest = min(LONGEST_WAIT_S, self._backoff * 2 ** (attempt - 1))
            yield _Wait(random.uniform(0, longest))  # noqa: S311 - not a secret: spreads the retries of many clients
        raise AssertionError("the attempts end with a response or an error")

    def _run(
        self,
        steps: Generator[_Send | _Wait, Any, Any],
        request: dict[str, Any],
        *,
        ingest: bool,
        sleep: Callable[[float], object],
    ) -> Any:
        limits = self._limits_of(self._seconds(request))

        def take(step: _Send | _Wait) -> Any:
            if isinstance(step, _Wait):
                return sleep(step.seconds)
            return self._client(step.url, ingest=ingest).completions.create(
                **_without_typed_ids(request), timeout=limits
            )

        step = next(steps)
        while True:
            try:
                outcome = take(step)
            except Exception as problem:
                step = steps.throw(problem)
                continue
            try:
                step = steps.send(outcome)
            except StopIteration as ended:
                return ended.value

    async def _arun(
        self, steps: Generator[_Send | _Wait, Any, Any], take: Callable[[_Send | _Wait], Awaitable[Any]]
    ) -> Any:
        step = next(steps)
        while True:
            try:
                outcome = await take(step)
            except Exception as problem:
                step = steps.throw(problem)
                continue
            try:
                step = steps.send(outcome)
            except StopIteration as ended:
                return ended.value

    @asynccontextmanager
    async def _asend(self, request: dict[str, Any]) -> AsyncIterator[Any]:
        """The response. A connection pool belongs to one event loop, so each call has an HTTP client of its own."""
        import openai

        limits = self._limits_of(self._seconds(request))
        async with openai.DefaultAsyncHttpxClient(verify=self._tls, timeout=self._limits, mounts=DIRECT) as http:

            async def take(step: _Send | _Wait) -> Any:
                if isinstance(step, _Wait):
                    return await asyncio.sleep(step.seconds)
                client = openai.AsyncOpenAI(base_url=f"{step.url}/v1", http_client=http, **self._options)
                return await client.completions.create(**_without_typed_ids(request), timeout=limits)

            yield await self._arun(
                self._steps(request, None, self._attempts, None, None, ingest=False, only=False), take
            )

    def _order(self, home: int | None, *, only: bool = False) -> Iterator[str]:
        if only and home is not None:
            return itertools.repeat(self.urls[home])
        start = next(self._turn) if home is None else home
        return itertools.islice(itertools.cycle(self.urls), start % len(self.urls), None)

    def _seconds(self, request: dict[str, Any]) -> float:
        """The request's timeout, in seconds."""
        tokens = 1 if request.get("stream") else int(request.get("max_tokens") or 1)
        return self.timeout * (1 + (tokens - 1) / TOKENS_IN_TIMEOUT)

    # -- what the servers serve -------------------------------------------------------------------------------------

    def models(self, url: str = "") -> tuple[ModelCard, ...]:
        """All models of a server, the first one by default, adapters included; see /v1/models.

        Raises:
            EngineUnavailableError: It cannot be reached.
            EngineError: It is not an OpenAI server.
        """
        url = url or self.url
        with translate_errors(url, self.timeout):
            text = self._client(url).get(f"{url}/v1/models", cast_to=str)
        try:
            return tuple(
                ModelCard(
                    str(card["id"]),
                    str(card.get("root") or card["id"]),
                    int(card.get("max_model_len") or 0),
                    card.get("parent") is not None,
                )
                for card in json.loads(text).get("data") or ()
            )
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise EngineError(
                f"{url}/v1/models does not answer as vLLM does: {type(problem).__name__}: {problem}.",
                remedy="Is it vLLM's OpenAI server?",
            ) from problem

    def first_model(self) -> ModelCard:
        """The model of the first server, adapters left out. Errors as for models, and EngineError without a model."""
        for card in sorted(self.models(), key=lambda card: card.adapter):
            return card
        raise EngineError(f"{self.url} lists no model.", remedy="Is it vLLM's OpenAI server?")

    def served_names(self) -> list[str]:
        """Names of the models that the first server serves, adapters left out. Errors as for models."""
        return list(dict.fromkeys(card.name for card in self.models() if not card.adapter))

    def served_model(self, wanted: str | None) -> ServedModel:
        """The one model that all the servers serve.

        Args:
            wanted: If given, it must be the model's name or root, or a folder here whose name they end with.

        Raises:
            EngineError: A server serves another model than wanted, or than the first server, or is not vLLM.
            EngineUnavailableError: It cannot be reached.
        """
        first, *others = [self._served(url, wanted) for url in self.urls]
        for url, other in zip(self.urls[1:], others, strict=True):
            if (other.name, other.root) != (first.name, first.root):
                raise EngineError(
                    f"{url} serves {other.name} ({other.root}), {self.url} serves {first.name} ({first.root}).",
                    remedy="Name servers of the same model.",
                )
            if other.chunk and first.chunk and other.chunk != first.chunk:
                raise EngineError(
                    f"{url} keeps KV in chunks of {other.chunk} tokens, {self.url} of {first.chunk}.",
                    remedy="Start them with the same --chunk-size.",
                )
        every = [first, *others]
        return replace(
            first,
            context_length=min(each.context_length for each in every),
            streams_have_stats=all(each.streams_have_stats for each in every),
            streams_may_have_stats=all(each.streams_may_have_stats for each in every),
            chat_takes_ids=all(each.chat_takes_ids for each in every),
            chunk=max(each.chunk for each in every),
            # If they differ, the smaller: a stored chunk may then count as missing, and is sent once more.
            block=min(each.block for each in every),
            caches_prefixes=all(each.caches_prefixes for each in every),
        )

    def _served(self, url: str, wanted: str | None) -> ServedModel:
        local = Path(wanted).resolve() if wanted and Path(wanted).is_dir() else None
        cards = self.models(url)
        matching = [card for card in cards if not wanted or _matches(wanted, local, (card.name, card.root))]
        matching.sort(key=lambda card: card.adapter)
        if not matching:
            raise EngineError(
                f"{url} serves {', '.join(card.name for card in cards) or 'nothing'}, not {wanted or 'a model'}.",
                remedy="Name the server's model by --model, or another server by --engine.",
            )
        card, base = matching[0], None
        if card.adapter:  # vLLM reports the length of its model's context only
            base = next((each for each in cards if not each.adapter), None)
            card = replace(card, context_length=card.context_length or (base.context_length if base else 0))
        if not card.context_length:
            raise EngineError(
                f"{url} does not report the length of its context.",
                remedy="Name a vLLM server: lmcache-rag serve MODEL.",
            )
        number = re.match(r"(\d+)\.(\d+)", self.version(url))
        version, metrics = (int(number[1]), int(number[2])) if number else (0, 0), self.metrics(url)
        chunk = chunk_tokens(metrics)
        return ServedModel(
            card.name,
            card.root,
            card.context_length,
            streams_have_stats=version >= STREAMS_WITH_STATS,
            streams_may_have_stats=version >= STREAMS_WITH_STATS or chunk > 0,
            chat_takes_ids=version >= CHAT_TAKES_IDS,
            chunk=chunk,
            block=vllm_block(metrics),
            caches_prefixes=prefix_caching(metrics) is not False,
            local=str(local or ""),
            base=base.root if base else "",
        )

    def check_tokenizer(self, model: str, tokenizer: Any) -> None:
        """Check that the servers tokenize as this tokenizer does, if they have an endpoint for that.

        Raises:
            EngineError: One does not: it would read other text from the prompts' token ids.
        """
        body = {"model": model, "prompt": _PROBE, "add_special_tokens": False}
        expected = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
        for url in self.urls:
            answer = _optional_json(partial(self._client(url).post, f"{url}/tokenize", body=body, cast_to=str))
            if answer.get("tokens") not in (None, expected):
                raise EngineError(
                    f"The tokenizer of {model} on {url} is not the one found here.",
                    remedy="Name the very model that the server runs, by its Hugging Face name or a folder (--model).",
                )

    def version(self, url: str = "") -> str:
        """VLLM's version on a server, the first one by default; "" if it does not report it."""
        url = url or self.url
        answer = _optional_json(partial(self._client(url).get, f"{url}/version", cast_to=str))
        return str(answer.get("version", ""))

    def metrics(self, url: str = "") -> str:
        """The Prometheus page of a server, the first one by default; "" if it has none."""
        url = url or self.url
        return _optional(partial(self._client(url).get, f"{url}/metrics", cast_to=str)) or ""

    def healthy(self) -> bool:
        """Whether the first server answers /health."""
        return _optional(partial(self._client(self.url).get, f"{self.url}/health", cast_to=str)) is not None

    # -- openai's clients -------------------------------------------------------------------------------------------

    def _client(self, url: str, *, ingest: bool = False) -> openai.OpenAI:
        """The openai client of one server; with `ingest`, the one that sends the ingest key.

        The key is a header of the HTTP client, which logs none; openai's own client logs its requests' headers.
        """
        import openai

        from lmcache_rag.credentials import ingest_key

        with self._lock:
            if ingest and self._ingest_key is None:
                self._ingest_key = ingest_key()
            name = (url, ingest and bool(self._ingest_key))
            if name not in self._clients:
                options: dict[str, Any] = {}
                if name[1]:  # a redirect could lead the key to another server
                    options = {"headers": {INGEST_KEY_HEADER: self._ingest_key}, "follow_redirects": False}
                http = openai.DefaultHttpxClient(verify=self._tls, timeout=self._limits, mounts=DIRECT, **options)
                self._clients[name] = openai.OpenAI(base_url=f"{url}/v1", http_client=http, **self._options)
            return self._clients[name]

    @cached_property
    def _options(self) -> dict[str, Any]:
        key = self._api_key or api_key() or "none"  # the client requires one
        return {"api_key": key, "max_retries": 0, "timeout": self._limits}

    @cached_property
    def _limits(self) -> Any:
        return self._limits_of(self.timeout)

    def _limits_of(self, seconds: float) -> Any:
        import openai

        return openai.Timeout(seconds, connect=min(CONNECT_SECONDS, self.timeout))

    @cached_property
    def _tls(self) -> Any:
        import ssl

        # Once: every client would read all certificates again.
        return ssl.create_default_context() if self._verify else False


def _without_typed_ids(request: dict[str, Any]) -> dict[str, Any]:
    """The same request with the prompt's token ids in `extra_body`, which replaces the argument `prompt` in the body.

    The openai package checks each element of an argument against its type: some 10 microseconds for every token id,
    before anything is sent. It sends `extra_body` as it is.
    """
    ids = request["prompt"]
    if isinstance(ids, str):
        return request
    return request | {"prompt": "", "extra_body": {**(request.get("extra_body") or {}), "prompt": ids}}


def vllm_block(metrics: str) -> int:
    """Tokens of a block of vLLM's prefix cache, by the text of its /metrics; 0 if it is not there."""
    found = re.search(r'^vllm:cache_config_info\{(?:[^}]*,)?block_size="(\d+)"', metrics, re.MULTILINE)
    return int(found[1]) if found else 0


def prefix_caching(metrics: str) -> bool | None:
    """Whether vLLM's prefix cache is on, by the text of its /metrics; None if it is not there."""
    found = re.search(r'^vllm:cache_config_info\{(?:[^}]*,)?enable_prefix_caching="(\w+)"', metrics, re.MULTILINE)
    return None if found is None else found[1] == "True"


def _matches(wanted: str, local: Path | None, names: Sequence[str]) -> bool:
    return wanted in names or (local is not None and local.name in [Path(name).name for name in names])


def _optional(ask: Callable[[], str]) -> str | None:
    """Request a page that a server need not have; None if that fails."""
    try:
        return ask()
    except Exception as problem:  # a real problem shows in the next request that matters
        log.debug("%s: %s", type(problem).__name__, problem)
        return None


def _optional_json(ask: Callable[[], str]) -> dict[str, Any]:
    """As `_optional`, for a JSON object; empty if that fails."""
    try:
        answer = json.loads(_optional(ask) or "null")
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


# -- errors -----------------------------------------------------------------------------------------------------------


class RefusedError(EngineError):
    """The server does not take this request: status 400."""


class KVNotStoredError(EngineError):
    """The server answered, but reports that its KV store was out of reach."""


@contextmanager
def translate_errors(url: str, timeout: float) -> Iterator[None]:
    """Translate the openai client's errors to ours; other errors pass unchanged."""
    try:
        yield
    except Exception as problem:
        raise_translated(problem, url, timeout)


def raise_translated(problem: Exception, url: str, timeout: float, *, ingest: bool = False) -> NoReturn:
    """Raise our error for a problem, or the problem itself if the server did not cause it."""
    ours = translated(problem, url, timeout, ingest=ingest)
    if ours is None:
        raise problem
    raise ours from problem


def translated(problem: Exception, url: str, timeout: float, *, ingest: bool = False) -> LMCacheRAGError | None:
    """Our error for a problem of the openai client; None if the server did not cause it.

    Args:
        problem: The problem.
        url: The server.
        timeout: The timeout that applied, in seconds.
        ingest: Whether the request was one for which a server may require the ingest key.
    """
    import openai

    reason = str(getattr(problem, "message", "") or problem)
    if isinstance(problem, openai.APITimeoutError) or _is_timeout(problem):
        return EngineUnavailableError(
            f"{url} sent nothing for {timeout:g} s.",
            remedy="Look into the server's log, or wait longer: LMCACHE_RAG_ENGINE_TIMEOUT_S.",
        )
    if isinstance(problem, openai.APIConnectionError):
        return EngineUnavailableError(
            f"{url} cannot be reached ({problem.__cause__ or problem}).",
            remedy="Start it with lmcache-rag serve MODEL, or name another by --engine." + proxy_remedy(url),
        )
    if isinstance(problem, openai.AuthenticationError | openai.PermissionDeniedError):
        if ingest:
            return EngineError(
                f"{url} rejected the ingest key or the API key: {reason}",
                remedy=f"The ingest key: {INGEST_KEY_REMEDY} The API key: {API_KEY_REMEDY}",
            )
        return EngineError(f"{url} rejected the API key.", remedy=API_KEY_REMEDY)
    if isinstance(problem, openai.NotFoundError):
        return EngineError(
            f"{url} does not know this request: {reason}",
            remedy="Check which model it serves now; a vLLM server's URL has the form http://host:8000."
            + proxy_remedy(url),
        )
    if isinstance(problem, openai.BadRequestError):
        if _TOO_LONG.search(reason):
            return ContextLengthError(reason, remedy="Retrieve fewer chunks or ask a shorter question.")
        return RefusedError(f"{url} refused the request: {reason}", remedy="See the server's log.")
    if isinstance(problem, openai.RateLimitError | openai.InternalServerError):
        return EngineUnavailableError(f"{url} is not able to answer: {reason}", remedy="Try again later.")
    if isinstance(problem, openai.APIError) or _is_transport(problem):
        return EngineUnavailableError(f"{url} broke off: {reason}", remedy="See the server's log, and try again.")
    return None


def is_retryable(problem: BaseException) -> bool:
    """Whether another attempt may help. A request to a server that accepts it and sends nothing is not retried."""
    import openai

    if isinstance(problem, KVNotStoredError):
        return True
    if isinstance(problem, openai.APITimeoutError):
        return type(problem.__cause__).__name__ == "ConnectTimeout"
    return isinstance(problem, openai.APIConnectionError | openai.RateLimitError | openai.InternalServerError)


def _is_transport(problem: Exception) -> bool:
    # A connection that breaks while a stream is read raises the HTTP client's own error, and that client's name changed
    # from httpx to httpx2 with openai 3.
    return type(problem).__module__.startswith(("httpx", "httpcore"))


def _is_timeout(problem: Exception) -> bool:
    return _is_transport(problem) and type(problem).__name__.endswith("Timeout")
