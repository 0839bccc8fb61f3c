"""Whether a request may ingest and forget, where the server has an ingest key.

The API server compares the header with the key, and signs the request for the scheduler, which is another process:
what arrives there without a valid signature was not authorised, however it came.
"""

from __future__ import annotations

import hashlib
import hmac
from array import array
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from lmcache_rag.credentials import read_ingest_key
from lmcache_rag.protocol import FORGET, INGEST, INGEST_KEY_HEADER, MOST_TOKENS, PREFIX

MIDDLEWARE: Final = "lmcache_rag.connector.authorization.IngestKeyMiddleware"  # for vLLM's --middleware
SIGNATURE: Final = "lmcache_rag.signature"  # in kv_transfer_params, between API server and scheduler only
UNAUTHORIZED, FORBIDDEN = 401, 403
_HEADER = INGEST_KEY_HEADER.lower().encode()
_presented: ContextVar[bytes | None] = ContextVar("lmcache_rag_ingest_key", default=None)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class IngestKeyMiddleware:
    """ASGI middleware: keeps the ingest key of a request at hand for as long as the request is served.

    Args:
        app: The application.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name.lower() == _HEADER]
        token = _presented.set(given[0] if len(given) == 1 else b"")
        try:
            await self._app(scope, receive, send)
        finally:
            _presented.reset(token)


@dataclass(frozen=True)
class Refusal:
    """Why a request is refused.

    Attributes:
        status: HTTP status.
        message: For the client.
    """

    status: int
    message: str


def needs_key(params: Any) -> str:
    """Which key of kv_transfer_params needs the ingest key; "" where none does."""
    if not isinstance(params, Mapping):
        return ""
    return next((key for key in (INGEST, FORGET) if params.get(key) is True), "")


class IngestKey:
    """The server's ingest key.

    Args:
        key: The key.
    """

    def __init__(self, key: str) -> None:
        self._digest = hashlib.sha256(key.encode()).digest()

    @classmethod
    def read(cls, path: str) -> IngestKey | None:
        """The key in a file; None for no path.

        Raises:
            ConfigError: See lmcache_rag.credentials.read_ingest_key.
        """
        return cls(read_ingest_key(path)) if path else None

    def refusal(self, params: Any) -> Refusal | None:
        """Why the request that is being served may not do what it asks for; None where it may. API server."""
        key = needs_key(params)
        if not key:
            return None
        presented = _presented.get()
        if presented is None:
            return Refusal(UNAUTHORIZED, f"{key} needs the ingest key, which is not read on this way to the server")
        if not presented:
            return Refusal(UNAUTHORIZED, f"{key} needs the server's ingest key in one header {INGEST_KEY_HEADER}")
        if not hmac.compare_digest(hashlib.sha256(presented).digest(), self._digest):
            return Refusal(FORBIDDEN, f"{key}: the ingest key in header {INGEST_KEY_HEADER} is not this server's")
        return None

    def signature(self, params: Mapping[str, Any], prompt: Sequence[int] | None) -> str:
        """What shows the scheduler that this request was authorised. It is no use for another prompt."""
        given = params.get(PREFIX)
        prefix = given if isinstance(given, int) and 0 <= given <= MOST_TOKENS else -1
        said = array("q", (params.get(INGEST) is True, params.get(FORGET) is True, prefix, *(prompt or ())))
        return hmac.new(self._digest, said.tobytes(), hashlib.sha256).hexdigest()

    def permitted(self, params: Any, prompt: Sequence[int] | None) -> Any:
        """What of a request's kv_transfer_params counts in the scheduler.

        All but the signature; and where that is not valid, nothing that needs the key.
        """
        if not isinstance(params, Mapping) or not (needs_key(params) or SIGNATURE in params):
            return params
        signature, kept = params.get(SIGNATURE), {key: value for key, value in params.items() if key != SIGNATURE}
        valid = isinstance(signature, str) and signature.isascii()
        if valid and hmac.compare_digest(str(signature), self.signature(params, prompt)):
            return kept
        return {key: value for key, value in kept.items() if key not in (INGEST, FORGET)} if needs_key(params) else kept
