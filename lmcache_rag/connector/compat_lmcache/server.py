"""The server as a whole: not there yet, gone, back, and whether it is the one that is needed."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger("lmcache_rag")

PROTOCOL = 1
FIRST_WAIT_S = 10.0  # vLLM's start waits so long for a server that is not there yet
_ASK_S = 5.0
_SILENT_S = 20.0  # LMCache forgets a worker that it did not hear of for 30 s or more


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

    def size(client: Any, timeout: float = FIRST_WAIT_S, **more: Any) -> int:
        try:
            return int(ask(client, timeout=min(timeout, FIRST_WAIT_S) if chunk_size else timeout, **more))
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
    alignment = getattr(adapter, "_required_chunk_alignment", None)  # since 0.5.7 the chunk size is agreed on
    try:
        asked = client.get_chunk_size() if alignment is None else client.negotiate_chunk_size(alignment)
        found = asked.result(_ASK_S)
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


class Registration:
    """Has a worker registered again when LMCache no longer knows it.

    LMCache forgets a worker that was not heard of for some time (vLLM was paused), or is another process since the last
    heartbeat, and answers heartbeats all the same. It then stores nothing.

    Patches RequestClient.ping of the worker's client: one heartbeat is taken as failed, so that LMCache's adapter
    registers at the next.

    Args:
        adapter: LMCache's worker adapter.
    """

    def __init__(self, adapter: Any) -> None:
        self._ping = adapter.req_client.ping
        self._silent = max(_SILENT_S, 2.5 * adapter._heartbeat_interval)
        self._last: float | None = None
        self._unknown = False
        adapter.req_client.ping = self.ping

    def renew(self) -> None:
        """LMCache answered that it does not know this worker."""
        self._unknown = True

    def ping(self, instance_id: int | None) -> Any:
        """LMCache's heartbeat, which fails once when the worker has to be registered again."""
        from lmcache.v1.multiprocess.futures import MessagingFuture

        now = time.monotonic()
        silent = self._last is not None and now - self._last > self._silent
        self._last = now
        if not silent and not self._unknown:
            return self._ping(instance_id)
        log.warning(
            "This worker is registered with LMCache again: %s",
            "LMCache did not know it" if self._unknown else f"it sent no heartbeat for over {self._silent:.0f} s",
        )
        self._unknown = False
        failed: Any = MessagingFuture()
        failed.set_result(False)
        return failed


def has_ended(address: tuple[str, int] | None) -> bool:
    """Whether no process listens there; False where that cannot be seen."""
    if address is None:
        return False
    try:
        socket.create_connection(address, timeout=0.2).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def said(problem: Exception) -> str:
    """An error in one line."""
    return f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
