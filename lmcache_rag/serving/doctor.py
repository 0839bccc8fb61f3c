"""Every check in order."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from lmcache_rag.api_key import LOOPBACK
from lmcache_rag.errors import ConfigError
from lmcache_rag.serving import api, live_checks, machine
from lmcache_rag.serving.environment import version
from lmcache_rag.serving.machine import Check


def examine(
    url: str = "", *, lmcache_url: str = "", model: str = "", api_key: str = "", ingest_key: str = ""
) -> Iterator[Check]:
    """Check this machine, and with a URL the servers too. Yields each check when it is done.

    Args:
        url: Address of a vLLM server.
        lmcache_url: HTTP address of the LMCache server; default: port 8089 of this machine.
        model: Folder or Hugging Face name; default: what the server serves.
        api_key: vLLM's key, or "".
        ingest_key: Its key for ingestion, or "".

    Raises:
        ConfigError: An address has no meaning.
    """
    here = not url or _host(url) in LOOPBACK
    if here:
        yield from machine.gpu()
        yield from machine.versions()
        yield machine.compiled()
        yield from machine.connector()
    else:
        yield Check("This machine", "skipped", "the server is elsewhere", "Run lmcache-rag doctor there.")
    if lmcache_url:
        _host(lmcache_url)
    known, status = live_checks.lmcache(
        (lmcache_url or "http://127.0.0.1:8089").rstrip("/"), needed=bool(lmcache_url) or bool(url and here)
    )
    yield from known
    if not url:
        if model:
            yield machine.model(model)
        yield Check("vLLM", "skipped", "no URL was given", "lmcache-rag doctor http://127.0.0.1:8000")
        return
    with api.VLLM(url, api_key, ingest_key=ingest_key) as server:
        known, served = live_checks.vllm(server, version("vllm") if here else "")
        yield from known
        if model or served:
            yield machine.model(model or (served.root if served else ""))
        if served is None:
            return
        yield live_checks.sizes(server, status)
        yield from live_checks.live(server, served, status)


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise ConfigError(f"{url!r} is no address of a server.", remedy="For example http://127.0.0.1:8000.")
    return host
