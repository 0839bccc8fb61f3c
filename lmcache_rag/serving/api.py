"""LMCache's HTTP API, and whether a server answers at all."""

from __future__ import annotations

from typing import Any

import httpx

from lmcache_rag.credentials import LMCACHE_KEY_REMEDY, lmcache_headers
from lmcache_rag.errors import EngineError

SHORT_S = 3.0


def get_json(url: str, path: str) -> dict[str, Any] | None:
    """A JSON document from an LMCache server; None when it does not answer as it should.

    Raises:
        EngineError: It asks for a key.
    """
    try:
        response = httpx.get(
            url + path,
            timeout=SHORT_S,
            verify=False,  # noqa: S501
            trust_env=False,
            headers=lmcache_headers(url),
        )
        if response.status_code in (401, 403):
            raise EngineError(f"{url}{path} asks for a key.", remedy=LMCACHE_KEY_REMEDY)
        document = response.raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    return document if isinstance(document, dict) else None


def get_text(url: str, path: str) -> str:
    """A page of an LMCache server; "" when it does not answer as it should."""
    headers = lmcache_headers(url)
    try:
        response = httpx.get(url + path, timeout=SHORT_S, verify=False, trust_env=False, headers=headers)  # noqa: S501
        return response.raise_for_status().text
    except (httpx.HTTPError, httpx.InvalidURL):
        return ""


def answers(url: str, path: str) -> bool:
    """Whether a server answers this path with 200."""
    try:
        # Certificates are not checked: only "it is up" is asked here, of a server beside us.
        return httpx.get(url + path, timeout=SHORT_S, verify=False, trust_env=False).status_code == 200  # noqa: S501
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
