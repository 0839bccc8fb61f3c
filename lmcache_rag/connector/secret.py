"""The secret of this process: without it no client can compute the cache_salts and token ids that KV has in LMCache.

The scheduler and all workers must have the same one, and so must servers that share KV by a second tier. It comes from
the setting ``lmcache_rag.secret_file`` of the connector, from the variable LMCACHE_RAG_SECRET_FILE, or from
LMCACHE_RAG_SECRET. A file that does not exist is created. Without any of these, vLLM's first process draws a secret
(`draw_secret`), and the others inherit it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from lmcache_rag.credentials import LEAST_CHARACTERS, ensure_secret
from lmcache_rag.errors import ConfigError

VARIABLE, FILE_VARIABLE = "LMCACHE_RAG_SECRET", "LMCACHE_RAG_SECRET_FILE"

log = logging.getLogger("lmcache_rag")


def draw_secret(environment: MutableMapping[str, str] = os.environ) -> None:
    """Put a new secret into the environment where there is none: processes that are started from here inherit it.

    A variable of blanks is none, as for `find_secret`.
    """
    if not environment.get(VARIABLE, "").strip() and not environment.get(FILE_VARIABLE):
        environment[VARIABLE] = secrets.token_hex(32)


def find_secret(file: str = "", environment: Mapping[str, str] = os.environ) -> bytes:
    """The secret, as a key of 32 bytes; empty where there is none.

    Args:
        file: The connector's setting; "" where it is not set.
        environment: Variables.

    Raises:
        ConfigError: The file cannot be made or read, can be read by others, or holds no secret.
    """
    if path := file or environment.get(FILE_VARIABLE):
        text = ensure_secret(Path(path).expanduser())
    else:
        text = environment.get(VARIABLE, "").strip()
        if text and len(text) < LEAST_CHARACTERS:
            raise ConfigError(
                f"{VARIABLE} is too short: it needs {LEAST_CHARACTERS} characters.",
                remedy="Fill it with `openssl rand -hex 32`.",
            )
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() if text else b""
