"""Who may open the page from elsewhere: a password from the environment or a file, compared in constant time."""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path

from lmcache_rag.credentials import LOOPBACK
from lmcache_rag.errors import ConfigError

VARIABLE = "LMCACHE_RAG_DEMO_PASSWORD"
LEAST_CHARACTERS = 12
_MOST_BYTES = 4096
REMEDY = f"Put one into the environment variable {VARIABLE}, or into a file of your own that --password-file names."


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    return host in LOOPBACK or (host.startswith("127.") and host.replace(".", "").isdigit())


def page_password(host: str, file: Path | None) -> str:
    """The password that the page asks for; "" where it asks for none.

    Args:
        host: Where the page listens. Elsewhere than on this machine alone it needs a password.
        file: A file that holds the password; None: the environment variable counts.

    Raises:
        ConfigError: There is none where one is needed, it is too short, or others can read the file.
    """
    password = _from_file(file) if file is not None else os.environ.get(VARIABLE, "")
    if not password and not is_loopback(host):
        raise ConfigError(f"{host} can be reached from other machines, and there is no password.", remedy=REMEDY)
    if password and len(password) < LEAST_CHARACTERS:
        raise ConfigError(
            f"The page's password is shorter than {LEAST_CHARACTERS} characters.",
            remedy="Make one with `openssl rand -hex 16`.",
        )
    return password


def matches(given: str, password: str) -> bool:
    """Whether they are equal; takes the same time for any wrong one of a length."""
    return hmac.compare_digest(given.encode(), password.encode())


def _from_file(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            text = stream.read(_MOST_BYTES + 1)
    except OSError as problem:
        raise ConfigError(
            f"The password file {file} cannot be read: {problem.strerror or problem}.",
            remedy="Name a file that this user can read.",
        ) from None
    if facts.st_mode & 0o077:
        raise ConfigError(
            f"The password file {file} can be read by others: its mode is {stat.S_IMODE(facts.st_mode):04o}.",
            remedy=f"Run `chmod 600 {file}`.",
        )
    try:
        password = text.decode().strip()
    except UnicodeDecodeError:
        password = ""
    if not password or len(text) > _MOST_BYTES or not password.isprintable():
        raise ConfigError(
            f"The password file {file} does not hold one line of text.", remedy="Write the password into it."
        )
    return password
