"""The key that ingesting and forgetting need on a server that was started with `serve --ingest-key-file`.

Client and server read it the same way. It is a secret: never logged, never on a command line, sent as a header only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lmcache_rag.errors import ConfigError
from lmcache_rag.secret_file import LEAST_CHARACTERS, read_secret

if TYPE_CHECKING:
    from lmcache_rag.settings import Settings

VARIABLE = "LMCACHE_RAG_INGEST_KEY"
FILE_VARIABLE = "LMCACHE_RAG_INGEST_KEY_FILE"
REMEDY = f"Put it into the environment variable {VARIABLE}, or its file's path into {FILE_VARIABLE}."
_MAKE = "Make one with: (umask 077; openssl rand -hex 32 > ingest.key)"


def read_ingest_key(path: str | Path) -> str:
    """The key in a file that nobody but its owner can read.

    Raises:
        ConfigError: The file cannot be read, others can read it, or it holds no key.
    """
    try:
        return checked(read_secret(Path(path).expanduser()), f"{path}")
    except ConfigError as problem:
        raise ConfigError(f"The ingest key: {problem.message}", remedy=f"{problem.remedy} {_MAKE}") from None


def ingest_key(environment: Mapping[str, str] | None = None) -> str:
    """The key from the environment, "" where there is none.

    Args:
        environment: Variables; default: this process's.

    Raises:
        ConfigError: What is there is no key, or its file cannot be used.
    """
    found = os.environ if environment is None else environment
    if key := found.get(VARIABLE):
        return checked(key, VARIABLE)
    path = found.get(FILE_VARIABLE)
    return read_ingest_key(path) if path else ""


def key_of(settings: Settings) -> str:
    """The key from the environment, else from the file that the settings name; "" where there is none.

    Raises:
        ConfigError: What is there is no key, or its file cannot be used.
    """
    return ingest_key() or (read_ingest_key(settings.ingest_key_file) if settings.ingest_key_file else "")


def checked(key: str, where: str = "The ingest key") -> str:
    """A key without the space around it.

    Raises:
        ConfigError: It is too short, or cannot be sent as a header.
    """
    key = key.strip()
    if len(key) < LEAST_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{where} holds no key of at least {LEAST_CHARACTERS} ASCII letters and digits.", remedy=_MAKE
        )
    return key
