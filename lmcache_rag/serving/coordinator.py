"""LMCache's coordinator, which has the index of chunks of several servers: the options that servers and it get.

Every server reports to it what it stores, and asks it which chunks a prompt has; see
lmcache_rag.connector.lmcache_server.fleet. It writes its index to a file, so that it outlives a restart.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lmcache_rag.credentials import state_file
from lmcache_rag.errors import ConfigError

START = "start"
LISTEN = "127.0.0.1:9300"
VARIABLE = "LMCACHE_COORDINATOR_URL"  # LMCache's
TIMEOUT_S = 0.25  # of a look-up: without an answer this server's own index is enough
CHECKPOINT_S = 10  # between two checkpoints: what a killed coordinator has to be told again
SHARED = ("resp", "valkey", "s3", "mooncake_store", "bigtable", "aerospike")  # tiers that are one store for all servers
_EXAMPLE = "For example --coordinator http://10.0.0.5:9300, or --coordinator start."


@dataclass(frozen=True)
class Coordinator:
    """Where the coordinator is, and how it is started.

    Attributes:
        url: Its address for a server on this machine.
        command: Arguments of ``lmcache`` that start it; empty: it runs already, elsewhere or not.
        instance_id: This server's name in it.
        files: Its checkpoint, and what operators set.
        open: Whether other machines can reach it where it is started here.
    """

    url: str
    command: tuple[str, ...] = ()
    instance_id: str = ""
    files: tuple[Path, ...] = ()
    open: bool = False

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return urlsplit(self.url).port or 80

    def server_options(self) -> list[str]:
        """Options of an LMCache server that uses it."""
        return [
            *("--coordinator-url", self.url),
            "--coordinator-event-reporting",
            *("--coordinator-blend-timeout", f"{TIMEOUT_S:g}"),
            *("--instance-id", self.instance_id),
        ]

    def prepare(self) -> None:
        """Make the folder of its files.

        Raises:
            ConfigError: It cannot be made.
        """
        for file in self.files:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as problem:
                raise ConfigError(
                    f"{file.parent} cannot be made: {problem.strerror or problem}.",
                    remedy="LMCACHE_RAG_STATE names another folder.",
                ) from None


def coordinator(where: str, *, listen: str, instance_id: str, chunk_size: int, lmcache_port: int) -> Coordinator | None:
    """The coordinator of a server; None without one.

    Args:
        where: "start", a URL, or "".
        listen: HOST:PORT for "start"; "": 127.0.0.1:9300.
        instance_id: The server's name in it; "": this machine's name and the server's port.
        chunk_size: Tokens of an LMCache chunk.
        lmcache_port: The server's port, by which servers of one machine differ.

    Raises:
        ConfigError: An address is not valid.
    """
    if not where:
        if listen:
            raise ConfigError("--coordinator-listen has no effect without --coordinator start.", remedy=_EXAMPLE)
        return None
    name = instance_id or f"{socket.gethostname()}-{lmcache_port}"
    if where != START:
        if listen:
            raise ConfigError("--coordinator-listen is for --coordinator start.", remedy=_EXAMPLE)
        return Coordinator(_url(where), instance_id=name)
    host, port = _place(listen or LISTEN)
    files = state_file(f"coordinator-{port}.checkpoint"), state_file(f"coordinator-{port}.metadata")
    command = (
        "coordinator",
        *("--host", host, "--port", str(port)),
        "--enable-blend-lookup",
        *("--chunk-size", str(chunk_size)),
        *("--checkpoint-path", str(files[0]), "--checkpoint-interval", str(CHECKPOINT_S)),
        *("--metadata-path", str(files[1])),
    )
    own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - nothing is bound here
    url = f"http://{f'[{own}]' if ':' in own else own}:{port}"
    return Coordinator(url, command, name, files, own not in ("127.0.0.1", "::1", "localhost") or own != host)


def shared_tier(tier: str) -> str:
    """LMCache's JSON of a second tier, for servers with a coordinator: whether it is one store for all of them."""
    settings: dict[str, Any] = json.loads(tier)
    if settings.get("type") in SHARED:
        settings.setdefault("shared", True)
    return json.dumps(settings)


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
        _ = parts.port
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ConfigError("--coordinator is neither start nor the address of a coordinator.", remedy=_EXAMPLE)
    return text.rstrip("/")


def _place(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--coordinator-listen {text!r} is not HOST:PORT.", remedy=f"For example {LISTEN}, or 10.0.0.5:9300."
        )
    return host, int(port)
