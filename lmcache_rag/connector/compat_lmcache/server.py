"""The server as a whole: not there yet, gone, back, and whether it is the one that is needed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger("lmcache_rag")

PROTOCOL = 1
FIRST_WAIT_S = 10.0  # vLLM's start waits so long for a server that is not there yet
_ASK_S = 5.0


@contextlib.contextmanager
def may_be_absent(chunk_size: int) -> Iterator[list[Any]]:
    """Have LMCache's adapters made also while no server answers, which they wait for and then give up vLLM's start.

    Args:
        chunk_size: Tokens of an LMCache chunk to go by until it answers; 0: none, and no start.

    Yields:
        The clients that were not answered.
    """
    from lmcache.integration.vllm import vllm_multi_process_adapter as adapters

    ask, experimental = adapters.get_lmcache_chunk_size, adapters.get_experimental
    absent: list[Any] = []

    def size(client: Any, timeout: float = FIRST_WAIT_S) -> int:
        try:
            return int(ask(client, timeout=min(timeout, FIRST_WAIT_S) if chunk_size else timeout))
        except TimeoutError:
            if not chunk_size:
                raise
            absent.append(client)
            return chunk_size

    adapters.get_lmcache_chunk_size = size
    adapters.get_experimental = lambda client, timeout: set() if absent else experimental(client, timeout=timeout)
    try:
        yield absent
    finally:
        adapters.get_lmcache_chunk_size, adapters.get_experimental = ask, experimental


@contextlib.contextmanager
def registering(adapter: Any, *, may_fail: bool) -> Iterator[list[Exception]]:
    """Have the KV caches registered, or else later, when the server comes: LMCache's heartbeat does that.

    Args:
        adapter: LMCache's worker adapter.
        may_fail: Whether to go on without a server.

    Yields:
        What went wrong.
    """
    failed: list[Exception] = []
    wait = adapter._mq_timeout
    if not adapter.is_healthy:
        adapter._mq_timeout = min(wait, FIRST_WAIT_S)
    try:
        yield failed
    except ConnectionError as problem:
        if not may_fail:
            raise
        failed.append(problem)
        is_absent(adapter)
    finally:
        adapter._mq_timeout = wait


def is_absent(adapter: Any) -> None:
    """The adapter is to take its server for dead until a heartbeat is answered."""
    for event in getattr(adapter, "_health_events", {}).values() or [adapter._health_event]:
        event.clear()


def watch(adapter: Any, blends: Callable[[], bool]) -> None:
    """Scheduler side: watch the server from now on; one that comes back as another is not used.

    Args:
        adapter: LMCache's scheduler adapter.
        blends: Whether the workers blend, and a blend server is needed.
    """
    adapter._ensure_heartbeat_started()
    for url, heartbeat in adapter._heartbeats.items():
        client = adapter.req_clients[url]
        heartbeat.register_recover_callback(
            lambda client=client: same_chunks(adapter, client) and (not blends() or not handshake(client, _ASK_S))
        )


def same_chunks(adapter: Any, client: Any) -> bool:
    """Whether a server that is back has the chunk size that the adapter goes by."""
    try:
        found = client.get_chunk_size().result(_ASK_S)
    except Exception:  # it is asked again with the next heartbeat
        return False
    if found != adapter.lmcache_tokens_per_chunk:
        log.error(
            "LMCache has chunks of %d tokens now, not %d, and is not used: start it, or vLLM, again with the other's.",
            found,
            adapter.lmcache_tokens_per_chunk,
        )
    return bool(found == adapter.lmcache_tokens_per_chunk)


def handshake(client: Any, seconds: float) -> str:
    """Why the server does not blend with us; empty when it does."""
    try:
        version, agreed = client.cb_protocol_handshake(PROTOCOL).result(seconds)
    except TimeoutError:
        return "the LMCache server did not answer the blend handshake: start it with --engine-type blend"
    except Exception as problem:
        return f"the blend handshake with the LMCache server failed: {said(problem)}"
    return "" if agreed else f"the LMCache server speaks blend protocol {version}, not {PROTOCOL}"


def ensure_heartbeat(adapter: Any) -> None:
    """Watch the server from now on rather than from the first transfer on."""
    adapter._ensure_heartbeat_started()


def said(problem: Exception) -> str:
    """An error in one line."""
    return f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
