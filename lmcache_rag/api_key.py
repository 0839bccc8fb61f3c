"""The keys that servers ask for: vLLM's API, and from LMCache 0.5.7 on LMCache's HTTP API.

vLLM's comes from the environment: a variable of ours, or the one that vLLM itself reads. OPENAI_API_KEY is none of
them: it is a secret that no other server should see. LMCache's comes from the variables that LMCache itself reads, or
from the file that `lmcache-rag serve` makes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from lmcache_rag.errors import ConfigError
from lmcache_rag.secret_file import read_secret, state_file

NAMES = ("LMCACHE_RAG_API_KEY", "VLLM_API_KEY")
LMCACHE_NAMES = ("LMCACHE_API_KEY", "LMCACHE_HTTP_API_KEY")
LMCACHE_FILES = ("LMCACHE_API_KEY_FILE", "LMCACHE_HTTP_API_KEY_FILE")
LMCACHE_REMEDY = f"Put LMCache's key into {LMCACHE_NAMES[1]}, or the path of a file with it into {LMCACHE_FILES[1]}."
LOOPBACK = ("localhost", "127.0.0.1", "::1")
REMEDY = f"Put it into the environment variable {NAMES[0]} or {NAMES[1]}."


def api_key(first: str = NAMES[0], environment: Mapping[str, str] | None = None) -> str:
    """The key, "" where there is none.

    Args:
        first: Which of the two variables counts where both are set.
        environment: Variables; default: this process's.
    """
    found = os.environ if environment is None else environment
    return next((key for name in (first, *NAMES) if (key := found.get(name))), "")


def lmcache_key_file() -> Path:
    """Where `lmcache-rag serve` keeps the key of LMCache's HTTP API."""
    return state_file("lmcache-http-key")


def lmcache_headers(url: str, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a request to LMCache's HTTP API needs to carry; empty where there is no key.

    Args:
        url: Its address. The key that `serve` made is sent to this machine only.
        environment: Variables; default: this process's.
    """
    found = os.environ if environment is None else environment
    key = next((key for name in LMCACHE_NAMES if (key := found.get(name))), "")
    file = next((Path(path) for name in LMCACHE_FILES if (path := found.get(name))), None)
    try:
        if not key and file is not None:
            key = file.expanduser().read_text(encoding="utf-8").strip()
        elif not key and urlsplit(url).hostname in LOOPBACK and lmcache_key_file().exists():
            key = read_secret(lmcache_key_file())
    except (OSError, ValueError, ConfigError):
        key = ""  # the server's answer says that one is needed
    return {"Authorization": f"Bearer {key}"} if key else {}
