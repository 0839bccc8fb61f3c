"""Requests that a careless or malicious client may send: none of them may harm the server or other requests."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Literal, TypeAlias

import httpx

from lmcache_rag import protocol

Leave: TypeAlias = Literal["", "while sending", "at once", "at the first token", "later"]
STAGES: Final[tuple[Leave, ...]] = ("while sending", "at once", "at the first token", "later")
KEYS: Final = (*protocol.REQUEST_KEYS, *protocol.LMCACHE_KEYS, *protocol.PD_KEYS)
HUGE_SPANS = 131_072  # as many as the longest prompts have tokens
DEEP = 100  # lists in lists
VALUES: Final[tuple[tuple[Any, ...], ...]] = (
    (None, True, False),
    (-1, 0, 1, 2**31, 2**70, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    ("", "x", "on", "query", "y" * 100_000, "\x00\r\nforged log line", "\ud800", "../../etc/passwd"),
    ([], [[]], [1, 2], [[0, 1]], [[5, 1]], [[-1, 2]], [[0, 2**40]], [[0, 1.5]], json.loads("[" * DEEP + "]" * DEEP)),
    ({}, {"a": {"b": []}}, {protocol.CHUNKS: []}),
    ("auto", {"tokens": 0}, {"tokens": 2**31 - 1}),  # budgets, and what is near one
    (
        {"tokens": -1},
        {"tokens": 2**70},
        {"tokens": True},
        {"tokens": 0.5},
        {"tokens": {"tokens": 1}},
        {"tokens": 1, "x": 1},
    ),
)
TOKENS = 100_000  # of a prompt that is too long for the model


@dataclass(frozen=True)
class HostileRequest:
    """A hostile request.

    Attributes:
        kind: Its name in messages.
        path: Of the endpoint.
        body: JSON.
        leave: When the client hangs up; "": it waits for the answer.
        headers: HTTP headers.
    """

    kind: str
    path: str
    body: dict[str, Any]
    leave: Leave = ""
    headers: dict[str, str] = field(default_factory=dict)


def values(rng: random.Random) -> Any:
    """Any type of JSON, and numbers and texts at their limits."""
    return rng.choice(rng.choice(VALUES))


class Hostile:
    """Draws hostile requests.

    Args:
        ordinary: Makes the body of an ordinary blended request.
        tokens: Length of the answers.
    """

    def __init__(self, ordinary: Callable[[], dict[str, Any]], tokens: int = 16) -> None:
        self._ordinary, self._tokens = ordinary, tokens
        self._kinds: Sequence[Callable[[random.Random], HostileRequest]] = (
            self._wrong_params,
            self._wrong_params,
            self._params_of_no_dictionary,
            self._wrong_elsewhere,
            self._disaggregated,
            self._huge_spans,
            self._overlapping_spans,
            self._hang_up,
            self._hang_up,
            self._beam_search,
            self._several_answers,
            self._forged_ingestion,
            self._forged_forget,
            self._prefix_of_one,
            self._too_long,
        )

    def draw(self, rng: random.Random) -> HostileRequest:
        """A request of a random kind."""
        return rng.choice(self._kinds)(rng)

    def _completion(self, **more: Any) -> dict[str, Any]:
        return self._ordinary() | more

    def _with(self, params: Any, **more: Any) -> dict[str, Any]:
        """An ordinary request with changed or added params."""
        body = self._completion(**more)
        body["kv_transfer_params"] = {**body["kv_transfer_params"], **params} if isinstance(params, dict) else params
        return body

    def _wrong_params(self, rng: random.Random) -> HostileRequest:
        params = {key: values(rng) for key in rng.sample(KEYS, rng.randint(1, 3))}
        if rng.random() < 0.3:
            params[rng.choice(("lmcache_rag.", "lmcache.", "", "x.")) + "unknown"] = values(rng)
        return HostileRequest(
            f"params {sorted(params)}", "/v1/completions", self._with(params, stream=rng.random() < 0.5)
        )

    def _params_of_no_dictionary(self, rng: random.Random) -> HostileRequest:
        return HostileRequest(
            "params of another type", "/v1/completions", self._completion(kv_transfer_params=values(rng))
        )

    def _wrong_elsewhere(self, rng: random.Random) -> HostileRequest:
        params = {rng.choice(KEYS): values(rng)}
        body = {"model": self._completion()["model"], "kv_transfer_params": params}
        endpoints: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}),
            ("/v1/responses", {"input": "Hello", "max_output_tokens": 2}),
            ("/inference/v1/generate", {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 2}}),
        ]
        path, fields = rng.choice(endpoints)
        return HostileRequest(f"params {sorted(params)}", path, body | fields)

    def _disaggregated(self, rng: random.Random) -> HostileRequest:
        params: dict[str, Any] = {
            "do_remote_prefill": True,
            "do_remote_decode": rng.random() < 0.5,
            "cached_token_stats": 1,
        }
        params |= {"remote_block_ids": [1, 2, 3], "remote_engine_id": "x", "remote_host": "127.0.0.1", "remote_port": 1}
        body = self._with(params, stream=rng.random() < 0.5)
        if rng.random() < 0.5:
            body |= {"use_beam_search": True, "n": 2}
        return HostileRequest("disaggregated prefill", "/v1/completions", body)

    def _huge_spans(self, rng: random.Random) -> HostileRequest:
        return HostileRequest("huge spans", "/v1/completions", self._with({protocol.CHUNKS: _huge_spans()}))

    def _overlapping_spans(self, rng: random.Random) -> HostileRequest:
        body = self._completion()
        end = len(body["prompt"])
        spans = [[rng.randrange(end), rng.randrange(1, 2 * end)] for _ in range(50)]
        return HostileRequest("spans that overlap", "/v1/completions", self._with({protocol.CHUNKS: spans}))

    def _hang_up(self, rng: random.Random) -> HostileRequest:
        stage = rng.choice(STAGES)
        body = self._completion(stream=stage in ("at the first token", "later"), n=rng.choice((1, 1, 3)))
        return HostileRequest(f"hang-up {stage}", "/v1/completions", body | {"temperature": 1.0}, stage)

    def _beam_search(self, rng: random.Random) -> HostileRequest:
        body = self._completion(use_beam_search=True, n=rng.choice((2, 4)), stream=rng.random() < 0.3)
        return HostileRequest("beam search", "/v1/completions", body, rng.choice(("", "", "at once")))

    def _several_answers(self, rng: random.Random) -> HostileRequest:
        body = self._completion(n=rng.choice((2, 5)), temperature=1.0, stream=rng.random() < 0.5)
        return HostileRequest("several answers", "/v1/completions", body)

    def _forged_ingestion(self, rng: random.Random) -> HostileRequest:
        """Real chunks, declared one chunk after another prefix: look-ups of others must never find its KV."""
        body = self._completion(max_tokens=1)
        prefix = rng.choice((0, 1, 64, len(body["prompt"]) // 2))
        body["kv_transfer_params"] = {protocol.INGEST: True, protocol.PREFIX: prefix, protocol.BLEND: "off"}
        return HostileRequest(
            "forged ingestion", "/v1/completions", body, headers={protocol.INGEST_KEY_HEADER: "not the key"}
        )

    def _forged_forget(self, rng: random.Random) -> HostileRequest:
        """Of tokens that were never ingested, so that the ordinary requests keep what they reuse."""
        prompt = [rng.randrange(100, 1000) for _ in range(256)]
        body = self._completion(prompt=prompt, max_tokens=1)
        body["kv_transfer_params"] = {protocol.FORGET: True, protocol.PREFIX: 64}
        return HostileRequest(
            "forged forget", "/v1/completions", body, headers={protocol.INGEST_KEY_HEADER: "not the key"}
        )

    def _prefix_of_one(self, rng: random.Random) -> HostileRequest:
        body = self._completion()
        params = {protocol.PREFIX: 1, protocol.CHUNKS: [[1, len(body["prompt"]) - 1]], protocol.RATIO: 0.0}
        return HostileRequest("prefix of one token", "/v1/completions", self._with(params))

    def _too_long(self, rng: random.Random) -> HostileRequest:
        return HostileRequest("too long", "/v1/completions", self._completion(prompt=[100] * TOKENS))


@cache
def _huge_spans() -> list[list[int]]:
    return [[at, at + 1] for at in range(HUGE_SPANS)]


class HostileError(Exception):
    """A server's answer to a hostile request that no server should give."""


class _Left(Exception):  # noqa: N818 - not an error: the client disconnects on purpose
    """The client hangs up."""


async def send(http: httpx.AsyncClient, request: HostileRequest, rng: random.Random) -> str:
    """Send it; returns "200", "400", "aborted" if the client hung up, or "other" for another rejection.

    Raises:
        HostileError: The server failed.
        httpx.HTTPError: It does not answer.
    """
    data = json.dumps(request.body).encode()  # with NaN and lone surrogates, which httpx would not send
    headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | request.headers
    seconds = rng.uniform(0.001, 0.05) if request.leave == "at once" else None
    try:
        async with asyncio.timeout(seconds):
            return await _send(http, request, data, headers, rng)
    except _Left:
        return "aborted"
    except TimeoutError:
        if request.leave != "at once":
            raise
        return "aborted"


async def _send(
    http: httpx.AsyncClient, request: HostileRequest, data: bytes, headers: dict[str, str], rng: random.Random
) -> str:
    content: Any = data
    if request.leave == "while sending":
        content = _half(data)
    lines = {"at the first token": 1, "later": rng.randint(2, 8)}.get(request.leave)
    async with http.stream("POST", request.path, content=content, headers=headers) as answer:
        status = answer.status_code
        async for line in answer.aiter_lines():
            if line.startswith('data: {"error"'):  # an error in a stream that had begun
                status = _code(line.removeprefix("data: "))
            if lines is not None and (lines := lines - 1) == 0:
                raise _Left
    if status >= 500:
        raise HostileError(f"{request.kind}, {request.path}: status {status}")
    return str(status) if status in (200, 400) else "other"


async def _half(data: bytes) -> AsyncIterator[bytes]:
    yield data[: len(data) // 2]
    await asyncio.sleep(0.01)
    raise _Left


def _code(document: str) -> int:
    try:
        return int(json.loads(document)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return 500
