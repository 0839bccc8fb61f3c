"""Connections to one or several vLLM servers that serve the same model: openai clients, retries, errors."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lmcache_rag.credentials import API_KEY_REMEDY, INGEST_KEY_REMEDY, api_key
from lmcache_rag.errors import ConfigError, ContextLengthError, EngineError, EngineUnavailableError, LMCacheRAGError
from lmcache_rag.protocol import INGEST_KEY_HEADER, chunk_tokens

if TYPE_CHECKING:
    import openai

log = logging.getLogger("lmcache_rag")

CONNECT_SECONDS = 5.0
# An answer in one piece is waited for as long as a server may take that gives so many tokens in each timeout: one a
# second, with the usual 120 s. A stream is waited for from part to part.
TOKENS_IN_TIMEOUT = 120


def server_urls(given: str | Sequence[str]) -> tuple[str, ...]:
    """URLs of servers without trailing slash and /v1, from a list or a text with commas.

    Raises:
        ConfigError: There is none, or one is no http URL.
    """
    texts = [given] if isinstance(given, str) else list(given)
    urls = [part.strip().rstrip("/").removesuffix("/v1") for text in texts for part in text.split(",") if part.strip()]
    for url in urls or [""]:
        if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
            raise ConfigError(
                f"{url!r} is no URL of a server.",
                remedy="Write for example http://localhost:8000; several with commas between them.",
            )
    return tuple(dict.fromkeys(urls))


class Servers:
    """Talks to the servers. Safe to use from several threads and event loops.

    Args:
        urls: The servers.
        timeout: Longest silence in seconds. An answer that is not streamed has more, by its length.
        attempts: How often a request is tried at most.
        backoff: Longest first wait between two tries, in seconds; it doubles from try to try.
        api_key: None: from the environment.
        ingest_key: Sent with the requests that ingest and forget, and with no others; None: from the environment.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float,
        attempts: int = 4,
        backoff: float = 0.25,
        api_key: str | None = None,
        ingest_key: str | None = None,
    ) -> None:
        self.urls = tuple(urls)
        self.timeout, self._attempts, self._backoff = timeout, attempts, backoff
        self._api_key, self._ingest_key = api_key, ingest_key
        self._clients: dict[tuple[str, bool], openai.OpenAI] = {}
        self._lock = threading.Lock()
        self._turn = itertools.count()

    # -- requests -------------------------------------------------------------------------------------------------

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
        """One completion in one piece.

        Args:
            request: Arguments of completions.create.
            home: Index of the server to ask first; None: they take turns. A try after a failure goes to the next.
            attempts: Other than the usual number of tries.
            stop: Ends the waiting between tries.
            check: Called with the response; what it raises may lead to another try.
            ingest: Whether the request ingests or forgets, for which a server may want the ingest key.
            only: Every try goes to `home`.

        Raises:
            LMCacheRAGError: See lmcache_rag.engines.vllm_client.explained.
        """
        import tenacity

        rules: dict[str, Any] = {}
        if attempts is not None:
            rules["stop"] = tenacity.stop_after_attempt(attempts)
        if stop is not None:
            rules["stop"] = tenacity.stop_any(rules.get("stop", self._ends), tenacity.stop_when_event_set(stop))
            rules["sleep"] = tenacity.sleep_using_event(stop)
        return self._tried(request, home, rules, check, ingest=ingest, only=only)

    @contextmanager
    def streaming(self, request: dict[str, Any]) -> Iterator[Iterator[Any]]:
        """The chunks of a streamed completion. Leaving closes the connection, and so stops the computation."""
        with speaking("The server", self.timeout):
            stream = self._tried(request | {"stream": True, "stream_options": {"include_usage": True}})
            try:
                yield iter(stream)
            finally:
                stream.close()

    async def acomplete(self, request: dict[str, Any]) -> Any:
        """Async twin of complete."""
        async with self._asked(request) as response:
            return response

    @asynccontextmanager
    async def astreaming(self, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[Any]]:
        """Async twin of streaming."""
        async with self._asked(request | {"stream": True, "stream_options": {"include_usage": True}}) as stream:
            try:
                yield aiter(stream)
            finally:
                await stream.close()

    def close(self) -> None:
        """Close all connections. Safe to call twice."""
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()

    def __del__(self) -> None:
        with suppress(Exception):  # one that nobody closed, perhaps at the interpreter's end
            self.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _order(self, home: int | None, *, only: bool = False) -> Iterator[str]:
        if only and home is not None:
            return itertools.repeat(self.urls[home])
        start = next(self._turn) if home is None else home
        return itertools.islice(itertools.cycle(self.urls), start % len(self.urls), None)

    def _tried(
        self,
        request: dict[str, Any],
        home: int | None = None,
        rules: dict[str, Any] | None = None,
        check: Callable[[Any], None] | None = None,
        *,
        ingest: bool = False,
        only: bool = False,
    ) -> Any:
        import tenacity

        urls, url, seconds = self._order(home, only=only), "", self._seconds(request)
        limits = self._limits_of(seconds)

        def once() -> Any:
            nonlocal url
            url = next(urls)
            response = self.client(url, ingest=ingest).completions.create(**request, timeout=limits)
            if check is not None:
                check(response)
            return response

        try:
            return tenacity.Retrying(**self._rules() | (rules or {}))(once)
        except Exception as problem:
            raise_explained(problem, url, seconds, ingest=ingest)

    @asynccontextmanager
    async def _asked(self, request: dict[str, Any]) -> AsyncIterator[Any]:
        """A connection pool belongs to one event loop, so each call has a client of its own."""
        import openai
        import tenacity

        urls, url, seconds = self._order(None), "", self._seconds(request)
        limits = self._limits_of(seconds)
        http = openai.DefaultAsyncHttpxClient(verify=self._tls, timeout=self._limits)
        async with http:

            async def once() -> Any:
                nonlocal url
                url = next(urls)
                client = openai.AsyncOpenAI(base_url=f"{url}/v1", http_client=http, **self._options)
                return await client.completions.create(**request, timeout=limits)

            try:
                yield await tenacity.AsyncRetrying(**self._rules())(once)
            except Exception as problem:
                raise_explained(problem, url, seconds)

    def _seconds(self, request: dict[str, Any]) -> float:
        """Longest silence that a request is waited for."""
        tokens = 1 if request.get("stream") else int(request.get("max_tokens") or 1)
        return self.timeout * (1 + (tokens - 1) / TOKENS_IN_TIMEOUT)

    def _rules(self) -> dict[str, Any]:
        import tenacity

        return {
            "stop": self._ends,
            "wait": tenacity.wait_random_exponential(multiplier=self._backoff, max=20),
            "retry": tenacity.retry_if_exception(may_pass),
            "reraise": True,
            "before_sleep": lambda state: log.debug("another try: %s", state.outcome and state.outcome.exception()),
        }

    @cached_property
    def _ends(self) -> Any:
        import tenacity

        return tenacity.stop_after_attempt(self._attempts)

    def client(self, url: str, *, ingest: bool = False) -> openai.OpenAI:
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
                http = openai.DefaultHttpxClient(verify=self._tls, timeout=self._limits, **options)
                self._clients[name] = openai.OpenAI(base_url=f"{url}/v1", http_client=http, **self._options)
            return self._clients[name]

    @property
    def headers(self) -> dict[str, str]:
        """The API key as a header, if there is one."""
        key = self._api_key or api_key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    @cached_property
    def _options(self) -> dict[str, Any]:
        key = self._api_key or api_key() or "none"  # the client will not do without
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

        return ssl.create_default_context()  # once: every client would read all certificates again


# -- errors -----------------------------------------------------------------------------------------------------------

_TOO_LONG = re.compile(r"context length|max_model_len|maximum model length")


@contextmanager
def speaking(url: str, timeout: float) -> Iterator[None]:
    """Errors of the openai client leave as ours; errors of anything else pass."""
    try:
        yield
    except Exception as problem:
        raise_explained(problem, url, timeout)


def raise_explained(problem: Exception, url: str, timeout: float, *, ingest: bool = False) -> NoReturn:
    """Raise what a problem is to us, or the problem itself where it is none of the server's."""
    ours = explained(problem, url, timeout, ingest=ingest)
    if ours is None:
        raise problem
    raise ours from problem


def explained(problem: Exception, url: str, timeout: float, *, ingest: bool = False) -> LMCacheRAGError | None:
    """What a problem is to us; None where it is none of the server's.

    Args:
        problem: The problem.
        url: The server.
        timeout: How long it was waited for, in seconds.
        ingest: Whether the request was one for which a server may want the ingest key.
    """
    import openai

    reason = str(getattr(problem, "message", "") or problem)
    if isinstance(problem, openai.APITimeoutError) or _is_timeout(problem):
        return EngineUnavailableError(
            f"{url} said nothing for {timeout:g} s.",
            remedy="Look into the server's log, or wait longer: LMCACHE_RAG_ENGINE_TIMEOUT_S.",
        )
    if isinstance(problem, openai.APIConnectionError):
        return EngineUnavailableError(
            f"{url} cannot be reached ({problem.__cause__ or problem}).",
            remedy="Start it with lmcache-rag serve MODEL, or name another by --engine.",
        )
    if isinstance(problem, openai.AuthenticationError | openai.PermissionDeniedError):
        if ingest:
            return EngineError(
                f"{url} wants another ingest key, or another API key: {reason}",
                remedy=f"The ingest key: {INGEST_KEY_REMEDY} The API key: {API_KEY_REMEDY}",
            )
        return EngineError(f"{url} wants another API key.", remedy=API_KEY_REMEDY)
    if isinstance(problem, openai.NotFoundError):
        return EngineError(
            f"{url} does not know this request: {reason}",
            remedy="See what it serves now; a vLLM server's URL has the form http://host:8000.",
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


def may_pass(problem: BaseException) -> bool:
    """Whether another try may help. A server that accepts a request and says nothing is not asked again."""
    import openai

    if isinstance(problem, NotKeptError):
        return True
    if isinstance(problem, openai.APITimeoutError):
        return type(problem.__cause__).__name__ == "ConnectTimeout"
    return isinstance(problem, openai.APIConnectionError | openai.RateLimitError | openai.InternalServerError)


class RefusedError(EngineError):
    """The server does not take this request: status 400."""


class NotKeptError(EngineError):
    """The server answered, but says that its KV store was out of reach."""


def _is_transport(problem: Exception) -> bool:
    # A connection that breaks while a stream is read raises the HTTP client's own error, and that client's name changed
    # from httpx to httpx2 with openai 3.
    return type(problem).__module__.startswith(("httpx", "httpcore"))


def _is_timeout(problem: Exception) -> bool:
    return _is_transport(problem) and type(problem).__name__.endswith("Timeout")


# -- what a server serves ---------------------------------------------------------------------------------------------

STREAMS_TELL = (0, 33)  # first vLLM whose streams carry kv_transfer_params without our plugin
CHAT_TAKES_IDS = (0, 32)  # first whose chat completions take kv_transfer_params.prompt_token_ids
_PROBE = "The KV cache of 12,345 tokens: naïve façade, 日本語.\n\n  def f(x): return x"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of its model.

    Attributes:
        name: By which it is asked for.
        root: Where the server has it from: a Hugging Face name or a folder over there.
        context_length: Most tokens of prompt and answer together.
        streams_tell: Whether its streams carry reuse statistics.
        streams_may_tell: Whether they do if our plugin is loaded there, as it is where our connector runs.
        chat_takes_ids: Whether its chat completions take token ids.
        chunk: Tokens of an LMCache chunk; 0 where the server does not say.
        block: Tokens of a block of vLLM's own prefix cache; 0 where the server does not say.
        local: A folder here that was named for it; "" where none was.
    """

    name: str
    root: str
    context_length: int
    streams_tell: bool
    streams_may_tell: bool
    chat_takes_ids: bool
    chunk: int = 0
    block: int = 0
    local: str = ""


def served_model(servers: Servers, wanted: str | None) -> ServedModel:
    """The one model that all the servers serve.

    Args:
        servers: The servers.
        wanted: If given, it must be the model's name or root, or a folder here whose name they end with.

    Raises:
        EngineError: A server serves another model than wanted, or than the first server, or is no vLLM.
        EngineUnavailableError: It cannot be reached.
    """
    first, *others = [_served(servers, url, wanted) for url in servers.urls]
    for url, other in zip(servers.urls[1:], others, strict=True):
        if (other.name, other.root) != (first.name, first.root):
            raise EngineError(
                f"{url} serves {other.name} ({other.root}), {servers.urls[0]} serves {first.name} ({first.root}).",
                remedy="Name servers of the same model.",
            )
        if other.chunk and first.chunk and other.chunk != first.chunk:
            raise EngineError(
                f"{url} keeps KV in chunks of {other.chunk} tokens, {servers.urls[0]} of {first.chunk}.",
                remedy="Start them with the same --chunk-size.",
            )
    every = [first, *others]
    return replace(
        first,
        context_length=min(each.context_length for each in every),
        streams_tell=all(each.streams_tell for each in every),
        streams_may_tell=all(each.streams_may_tell for each in every),
        chat_takes_ids=all(each.chat_takes_ids for each in every),
        chunk=max(each.chunk for each in every),
        # Where they differ, the smaller: a chunk that is held may then count as missing, and is sent once more.
        block=min(each.block for each in every),
    )


def served_names(servers: Servers) -> list[str]:
    """Names of the models that the first server serves, adapters left out.

    Raises:
        EngineUnavailableError: It cannot be reached.
        EngineError: It is no vLLM.
    """
    url = servers.urls[0]
    with speaking(url, servers.timeout):
        cards = list(servers.client(url).models.list())
    return list(dict.fromkeys(card.id for card in cards if getattr(card, "parent", None) is None))


def check_tokenizer(servers: Servers, model: str, tokenizer: Any) -> None:
    """See that the servers tokenize as we do, where they have an endpoint for that.

    Raises:
        EngineError: One does not: prompts would mean something else over there.
    """
    body = {"model": model, "prompt": _PROBE, "add_special_tokens": False}
    for url in servers.urls:
        answer = _aside(partial(servers.client(url).post, f"{url}/tokenize", body=body, cast_to=object))
        theirs = answer.get("tokens")
        if theirs is not None and theirs != list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"]):
            raise EngineError(
                f"The tokenizer of {model} on {url} is not the one found here.",
                remedy="Name the very model that the server runs, by its Hugging Face name or a folder (--model).",
            )


def _served(servers: Servers, url: str, wanted: str | None) -> ServedModel:
    local = Path(wanted).resolve() if wanted and Path(wanted).is_dir() else None
    with speaking(url, servers.timeout):
        cards = list(servers.client(url).models.list())
    facts = [(card.id, str(getattr(card, "root", None) or card.id), card) for card in cards]
    if wanted:
        facts = [fact for fact in facts if _is(wanted, local, fact[:2])]
    facts.sort(key=lambda fact: getattr(fact[2], "parent", None) is not None)  # adapters come last
    if not facts:
        raise EngineError(
            f"{url} serves {', '.join(card.id for card in cards) or 'nothing'}, not {wanted or 'a model'}.",
            remedy="Name the server's model by --model, or another server by --engine.",
        )
    name, root, card = facts[0]
    length = getattr(card, "max_model_len", None)
    if not length:
        raise EngineError(
            f"{url} does not say how long its context is.", remedy="Name a vLLM server: lmcache-rag serve MODEL."
        )
    version, metrics = _version(servers, url), _metrics(servers, url)
    chunk = chunk_tokens(metrics)
    return ServedModel(
        name,
        root,
        int(length),
        streams_tell=version >= STREAMS_TELL,
        streams_may_tell=version >= STREAMS_TELL or chunk > 0,
        chat_takes_ids=version >= CHAT_TAKES_IDS,
        chunk=chunk,
        block=vllm_block(metrics),
        local=str(local or ""),
    )


def _is(wanted: str, local: Path | None, names: Sequence[str]) -> bool:
    return wanted in names or (local is not None and local.name in [Path(name).name for name in names])


def _version(servers: Servers, url: str) -> tuple[int, ...]:
    answer = _aside(partial(servers.client(url).get, f"{url}/version", cast_to=object))
    version = re.match(r"(\d+)\.(\d+)", str(answer.get("version", "")))
    return (int(version[1]), int(version[2])) if version else (0, 0)


def _metrics(servers: Servers, url: str) -> str:
    return str(_ask(partial(servers.client(url).get, f"{url}/metrics", cast_to=str)) or "")


def vllm_block(metrics: str) -> int:
    """Tokens of a block of vLLM's prefix cache, by the text of its /metrics; 0 when it does not say."""
    found = re.search(r'^vllm:cache_config_info\{(?:[^}]*,)?block_size="(\d+)"', metrics, re.MULTILINE)
    return int(found[1]) if found else 0


def _aside(ask: Callable[[], object]) -> dict[str, Any]:
    answer = _ask(ask)
    return answer if isinstance(answer, dict) else {}


def _ask(ask: Callable[[], object]) -> object:
    """Ask for something that a server need not have."""
    try:
        return ask()
    except Exception as problem:  # what it is shows as soon as it matters
        log.debug("%s: %s", type(problem).__name__, problem)
        return None
