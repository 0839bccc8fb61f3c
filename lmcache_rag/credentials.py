"""Keys of servers, and secrets in files that only their owner can read.

A secret is a line of text. It is made once, with mode 0600, and read by every process that needs it; it is never on
a command line or in a log.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lmcache_rag.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_rag.settings import Settings


LEAST_CHARACTERS = 32  # 128 bits in hexadecimal digits
_BYTES = 32
_MOST_BYTES = 4096


def state_file(name: str) -> Path:
    """Where a file of this name belongs in the user's state folder; LMCACHE_RAG_STATE names another folder."""
    import platformdirs

    named = os.environ.get("LMCACHE_RAG_STATE")
    folder = Path(named).expanduser() if named else platformdirs.user_state_path("lmcache-rag", appauthor=False)
    return folder / name


def read_secret(path: Path) -> str:
    """The secret in a file.

    Raises:
        ConfigError: There is no such file, others can read it, or it holds no secret.
    """
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            _check(path, facts)
            text = file.read(_MOST_BYTES + 1)
    except OSError as problem:
        raise ConfigError(
            f"The secret file {path} cannot be read: {problem.strerror or problem}.",
            remedy="Name a file that this user can read.",
        ) from None
    secret = _text(text)
    if secret is None:
        raise ConfigError(
            f"The secret file {path} holds no secret: one line of at least {LEAST_CHARACTERS} characters.",
            remedy="Remove it and a new one is made, or fill it with `openssl rand -hex 32`.",
        )
    return secret


def ensure_secret(path: Path) -> str:
    """The secret in a file, which is made with mode 0600 where there is none. Safe in several processes at once.

    Raises:
        ConfigError: It cannot be made or read.
    """
    try:
        if not os.path.lexists(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another process was first: its secret is used
                _make(path, f"{secrets.token_hex(_BYTES)}\n".encode())
    except OSError as problem:
        raise ConfigError(
            f"The secret file {path} cannot be made: {problem.strerror or problem}.",
            remedy="Name a file in a folder that this user can write to.",
        ) from None
    return read_secret(path)


def _make(path: Path, text: bytes) -> None:
    """Create the file in one step with its whole content, and only if there is none."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    finally:
        draft.unlink()


def _check(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise ConfigError(f"The secret file {path} is not a regular file.", remedy="Name another.")
    if facts.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"The secret file {path} belongs to another user, who knows it.", remedy="Name a file of your own."
        )
    if facts.st_mode & 0o077:
        raise ConfigError(
            f"The secret file {path} can be read by others: its mode is {stat.S_IMODE(facts.st_mode):04o}.",
            remedy=f"Run `chmod 600 {path}`, or make a new one if others may have read it.",
        )


def _text(text: bytes) -> str | None:
    try:
        secret = text.decode("ascii").strip()
    except UnicodeDecodeError:
        return None
    fits = LEAST_CHARACTERS <= len(secret) <= _MOST_BYTES and secret.isprintable()
    return secret if fits else None


# -- API keys of servers: vLLM's API, and from LMCache 0.5.7 on LMCache's HTTP API ------------------------------------
#
# vLLM's comes from the environment: a variable of ours, or the one that vLLM itself reads. OPENAI_API_KEY is not read:
# it is a secret that no other server should see. LMCache's comes from the variables that LMCache itself reads, or from
# the file that `lmcache-rag serve` makes.

API_KEY_NAMES = ("LMCACHE_RAG_API_KEY", "VLLM_API_KEY")
LMCACHE_KEY_NAMES = ("LMCACHE_API_KEY", "LMCACHE_HTTP_API_KEY")
LMCACHE_KEY_FILES = ("LMCACHE_API_KEY_FILE", "LMCACHE_HTTP_API_KEY_FILE")
LMCACHE_KEY_REMEDY = (
    f"Put LMCache's key into {LMCACHE_KEY_NAMES[1]}, or the path of a file with it into {LMCACHE_KEY_FILES[1]}."
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# For httpx's `mounts`: no proxy reaches this machine itself, whatever HTTP_PROXY says.
DIRECT: dict[str, None] = {f"all://{f'[{host}]' if ':' in host else host}": None for host in LOOPBACK}
API_KEY_REMEDY = f"Put it into the environment variable {API_KEY_NAMES[0]} or {API_KEY_NAMES[1]}."


def proxy_remedy(url: str) -> str:
    """A sentence, after a blank, about the proxy through which requests to a server go; "" if there is none."""
    import urllib.request

    parts = urlsplit(url)
    host, proxies = parts.hostname or "", urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    if not proxy or host in LOOPBACK or urllib.request.proxy_bypass(host):
        return ""
    shown = (proxy if "://" in proxy else f"http://{proxy}").rpartition("@")  # without name and password
    scheme = f"{shown[0].partition('://')[0]}://" if shown[0] else ""
    return f" Requests go through the proxy {scheme}{shown[2]}; NO_PROXY={host} leaves it out."


def api_key(first: str = API_KEY_NAMES[0], environment: Mapping[str, str] | None = None) -> str:
    """The key, "" where there is none.

    Args:
        first: The variable that takes precedence if both are set.
        environment: Variables; default: this process's.
    """
    found = os.environ if environment is None else environment
    return next((key for name in (first, *API_KEY_NAMES) if (key := found.get(name))), "")


def lmcache_key_file() -> Path:
    """Where `lmcache-rag serve` keeps the key of LMCache's HTTP API."""
    return state_file("lmcache-http-key")


def lmcache_headers(url: str, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The headers that a request to LMCache's HTTP API needs; empty if there is no key.

    Args:
        url: Its address. The key that `serve` made is sent to this machine only.
        environment: Variables; default: this process's.
    """
    found = os.environ if environment is None else environment
    key = next((key for name in LMCACHE_KEY_NAMES if (key := found.get(name))), "")
    file = next((Path(path) for name in LMCACHE_KEY_FILES if (path := found.get(name))), None)
    try:
        if not key and file is not None:
            key = file.expanduser().read_text(encoding="utf-8").strip()
        elif not key and urlsplit(url).hostname in LOOPBACK and lmcache_key_file().exists():
            key = read_secret(lmcache_key_file())
    except (OSError, ValueError, ConfigError):
        key = ""  # the server's answer then asks for one
    return {"Authorization": f"Bearer {key}"} if key else {}


# -- the key that ingesting and forgetting need on a server that was started with `serve --ingest-key-file` -----------
#
# Client and server read it the same way. It is a secret: never logged, never on a command line, sent as a header only.

INGEST_KEY_VARIABLE = "LMCACHE_RAG_INGEST_KEY"
INGEST_KEY_FILE_VARIABLE = "LMCACHE_RAG_INGEST_KEY_FILE"
INGEST_KEY_REMEDY = (
    f"Put it into the environment variable {INGEST_KEY_VARIABLE}, or its file's path into {INGEST_KEY_FILE_VARIABLE}."
)
_MAKE = "Make one with: (umask 077; openssl rand -hex 32 > ingest.key)"


def read_ingest_key(path: str | Path) -> str:
    """The key in a file that only its owner can read.

    Raises:
        ConfigError: The file cannot be read, others can read it, or it holds no key.
    """
    try:
        return check_ingest_key(read_secret(Path(path).expanduser()), f"{path}")
    except ConfigError as problem:
        raise ConfigError(f"The ingest key: {problem.message}", remedy=f"{problem.remedy} {_MAKE}") from None


def ingest_key(environment: Mapping[str, str] | None = None) -> str:
    """The key from the environment, "" where there is none.

    Args:
        environment: Variables; default: this process's.

    Raises:
        ConfigError: The value is not a valid key, or its file cannot be used.
    """
    found = os.environ if environment is None else environment
    if key := found.get(INGEST_KEY_VARIABLE):
        return check_ingest_key(key, INGEST_KEY_VARIABLE)
    path = found.get(INGEST_KEY_FILE_VARIABLE)
    return read_ingest_key(path) if path else ""


def ingest_key_for(settings: Settings) -> str:
    """The key from the environment, else from the file that the settings name; "" where there is none.

    Raises:
        ConfigError: The value is not a valid key, or its file cannot be used.
    """
    return ingest_key() or (read_ingest_key(settings.ingest_key_file) if settings.ingest_key_file else "")


def check_ingest_key(key: str, where: str = "The ingest key") -> str:
    """Check a key; returns it without surrounding white space.

    Raises:
        ConfigError: It is too short, or cannot be sent as a header.
    """
    key = key.strip()
    if len(key) < LEAST_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{where} holds no key of at least {LEAST_CHARACTERS} ASCII letters and digits.", remedy=_MAKE
        )
    return key
