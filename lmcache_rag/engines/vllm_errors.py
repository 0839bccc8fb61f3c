"""What a failed request to a vLLM server means to us, and whether another try may help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lmcache_rag.api_key import REMEDY
from lmcache_rag.errors import ContextLengthError, EngineError, EngineUnavailableError, LMCacheRAGError
from lmcache_rag.ingest_key import REMEDY as INGEST_REMEDY

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
                remedy=f"The ingest key: {INGEST_REMEDY} The API key: {REMEDY}",
            )
        return EngineError(f"{url} wants another API key.", remedy=REMEDY)
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
