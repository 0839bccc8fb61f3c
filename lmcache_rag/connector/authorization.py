"""Which requests the API server rejects: invalid kv_transfer_params (400), or no ingest key (401, 403).

Where the server has an ingest key, only requests with that key in a header may ingest and forget. The API server
compares the header with the key, and signs the request for the scheduler, which is another process: a request that
arrives there without a valid signature was not authorised, however it came.
"""

from __future__ import annotations

import hashlib
import hmac
from array import array
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from lmcache_rag.connector.config import ConnectorOptions
from lmcache_rag.credentials import read_ingest_key
from lmcache_rag.protocol import (
    FORGET,
    INGEST,
    INGEST_KEY_HEADER,
    MOST_TOKENS,
    PIN,
    PREFIX,
    accepted,
    complaints,
    joined,
    pins,
)

MIDDLEWARE: Final = "lmcache_rag.connector.authorization.IngestKeyMiddleware"  # for vLLM's --middleware
SIGNATURE: Final = "lmcache_rag.signature"  # in kv_transfer_params, between API server and scheduler only
INVALID, UNAUTHORIZED, FORBIDDEN = 400, 401, 403
_SHOWN = 8  # complaints in one message
_HEADER = INGEST_KEY_HEADER.lower().encode()
_presented: ContextVar[bytes | None] = ContextVar("lmcache_rag_ingest_key", default=None)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class IngestKeyMiddleware:
    """ASGI middleware: keeps the ingest key that a request presents for as long as the request is served.

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
        keys = [value for name, value in scope["headers"] if name.lower() == _HEADER]
        token = _presented.set(keys[0] if len(keys) == 1 else b"")
        try:
            await self._app(scope, receive, send)
        finally:
            _presented.reset(token)


@dataclass(frozen=True)
class Refusal:
    """Why a request is rejected.

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
    if pins(params) is not None:
        return PIN
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
        """API server: why the request that is being served lacks the permission it needs; None if it has it."""
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
        """Sign a request that is authorised, for the scheduler. The signature is not valid for another prompt."""
        named = params.get(PREFIX)
        prefix = named if isinstance(named, int) and 0 <= named <= MOST_TOKENS else -1
        asked = (params.get(INGEST) is True, params.get(FORGET) is True, {None: 0, False: 1, True: 2}[pins(params)])
        signed = array("q", (*asked, prefix, *(prompt or ())))
        return hmac.new(self._digest, signed.tobytes(), hashlib.sha256).hexdigest()

    def permitted(self, params: Any, prompt: Sequence[int] | None) -> Any:
        """The part of a request's kv_transfer_params that the scheduler may act on.

        The signature is removed; if it is not valid, so is everything that needs the ingest key.
        """
        if not isinstance(params, Mapping) or not (needs_key(params) or SIGNATURE in params):
            return params
        signature, kept = params.get(SIGNATURE), {key: value for key, value in params.items() if key != SIGNATURE}
        valid = isinstance(signature, str) and signature.isascii()
        if valid and hmac.compare_digest(str(signature), self.signature(params, prompt)):
            return kept
        unsigned = {key: value for key, value in kept.items() if key not in (INGEST, FORGET, PIN)}
        return unsigned if needs_key(params) else kept


def checked(
    params: Any, prompt: Sequence[int] | None, block: int, key: IngestKey | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """The part of a request's kv_transfer_params that the scheduler acts on, and what is wrong with them.

    Args:
        params: The request's kv_transfer_params.
        prompt: Its token ids.
        block: Tokens of a block of vLLM's prefix cache.
        key: The ingest key; None: every client may ingest and forget.

    Returns:
        (the parameters, a clause for each error); with an error none are accepted.
    """
    if key is not None:
        params = key.permitted(params, prompt)
    tokens = len(prompt or ())
    wrong = complaints(params, tokens)
    return None if wrong else accepted(params, tokens, block) or None, wrong


@dataclass(frozen=True)
class RequestValidation:
    """Checks kv_transfer_params of requests to one engine.

    Attributes:
        longest: Tokens of the longest prompt that the engine takes.
        block: Tokens of a block of its prefix cache.
        key: The ingest key; None: every client may ingest and forget.
    """

    longest: int
    block: int
    key: IngestKey | None = None

    @classmethod
    def of(cls, vllm_config: Any) -> RequestValidation | None:
        """The validation for an engine with this configuration; None for one without a KV connector.

        Raises:
            ConfigError: The file of the ingest key cannot be used.
        """
        transfer = vllm_config.kv_transfer_config
        if transfer is None:
            return None
        options = ConnectorOptions.read(transfer.get_from_extra_config)
        block = vllm_config.cache_config.block_size
        return cls(
            int(vllm_config.model_config.max_model_len),
            block if isinstance(block, int) else 1,
            IngestKey.read(options.ingest_key_file),
        )

    def refusal(self, params: Any, tokens: int | None = None, *, beams: bool = False) -> Refusal | None:
        """Why a request is rejected; None if it is accepted.

        Args:
            params: Its kv_transfer_params.
            tokens: Length of its prompt; None: not known yet.
            beams: Whether it asks for beam search.
        """
        wrong = complaints(params, self.longest if tokens is None else min(tokens, self.longest))
        if beams and (key := needs_key(params)):
            wrong.append(f"{key} cannot be combined with use_beam_search")
        if wrong:
            return Refusal(INVALID, f"kv_transfer_params: {joined(wrong[:_SHOWN])}")
        return self.key.refusal(params) if self.key else None

    def for_engine(self, params: Any, prompt: Sequence[int] | None, tokens: int) -> dict[str, Any]:
        """The kv_transfer_params that the engine gets, of a request that is not rejected.

        They are signed for the scheduler if they need the ingest key.

        Args:
            params: A request's kv_transfer_params.
            prompt: Its token ids; None: it has none.
            tokens: Length of its prompt.
        """
        kept = accepted(params, tokens, self.block)
        if self.key and needs_key(kept):
            kept[SIGNATURE] = self.key.signature(kept, prompt)
        return kept
