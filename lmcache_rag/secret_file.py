"""Secrets in files that their owner alone can read.

A secret is a line of text. It is made once, with mode 0600, and read by every process that needs it; it never stands on
a command line or in a log.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from lmcache_rag.errors import ConfigError

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
            with contextlib.suppress(FileExistsError):  # another process was first: its secret counts
                _make(path, f"{secrets.token_hex(_BYTES)}\n".encode())
    except OSError as problem:
        raise ConfigError(
            f"The secret file {path} cannot be made: {problem.strerror or problem}.",
            remedy="Name a file in a folder that this user can write to.",
        ) from None
    return read_secret(path)


def _make(path: Path, text: bytes) -> None:
    """Have the whole file appear at once, and only where there is none."""
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
        raise ConfigError(f"The secret file {path} is no ordinary file.", remedy="Name another.")
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
