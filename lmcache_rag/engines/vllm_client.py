"""Connections to one or several vLLM servers that serve the same model: openai clients, retries, errors."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lmcache_rag.api_key import api_key
from lmcache_rag.engines.vllm_errors import may_pass, raise_explained, speaking
from lmcache_rag.errors import ConfigError
from lmcache_rag.protocol import INGEST_KEY_HEADER

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
            LMCacheRAGError: See lmcache_rag.engines.vllm_errors.explained.
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

        from lmcache_rag.ingest_key import ingest_key

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
