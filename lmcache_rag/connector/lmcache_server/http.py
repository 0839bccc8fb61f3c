"""Cuts LMCache's HTTP API down to the routes that are needed.

By default it needs no key, and shows the environment and the second tier's password, runs scripts, and changes the
server's settings.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

from lmcache_rag.connector.patching import Patch

log = logging.getLogger("lmcache_rag")

HTTP_SERVER = "lmcache.v1.multiprocess.http_server"
ROUTES = Patch(
    f"{HTTP_SERVER}:app.routes",
    "The HTTP port has only harmless routes, and /config shows no secret.",
    "LMCache's HTTP API has a key and shows no secret",
)
KEPT = frozenset(
    {
        "/",
        "/healthcheck",
        "/status",
        "/config",
        "/config/adapters",
        "/metrics",
        "/version",
        "/lmc_version",
        "/commit_id",
        "/cache/clear",
        "/cache/objects",
        "/cache/prefetches",
        "/cache/prefetches/{request_id}",
        "/quota",
        "/quota/{cache_salt}",
    }
)
MASK = "***"
_SECRET = re.compile(r"pass|secret|token|credential|key|auth|user|sas|dsn|connection_string", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]*@")


def cut_routes(app: Any = None) -> list[str]:
    """Remove every route but those in KEPT, and have /config mask secrets.

    Args:
        app: A FastAPI application; default: that of LMCache's HTTP server, where this process has one.

    Returns:
        The paths that were removed.
    """
    if app is None:
        app = getattr(sys.modules.get(HTTP_SERVER), "app", None)
    if app is None:
        return []
    routes = app.router.routes
    gone = sorted({str(getattr(route, "path", "")) for route in routes if getattr(route, "path", None) not in KEPT})
    config = [route for route in routes if getattr(route, "path", None) == "/config"]
    routes[:] = [route for route in routes if getattr(route, "path", None) in KEPT and route not in config]
    for route in config:
        app.add_api_route("/config", _masking(route.endpoint), methods=["GET"], response_model=None)
    app.openapi_schema = None
    log.info("LMCache's HTTP API does not offer %s", ", ".join(gone))
    return gone


def _masking(endpoint: Any) -> Any:
    from fastapi import Request, Response

    async def config(request: Request) -> Response:
        """LMCache's settings, secrets masked."""
        answer: Response = await endpoint(request)
        body = json.dumps(masked(json.loads(bytes(answer.body))), indent=2)
        return Response(body, answer.status_code, media_type="application/json")

    # FastAPI reads the annotations, which are names of this function's here.
    config.__annotations__ = {"request": Request, "return": Response}
    return config


def masked(value: Any, *, secret: bool = False) -> Any:
    """A JSON document with secrets replaced: texts under keys that sound like one, and users in addresses."""
    if isinstance(value, dict):
        return {name: masked(each, secret=secret or bool(_SECRET.search(str(name)))) for name, each in value.items()}
    if isinstance(value, list):
        return [masked(each, secret=secret) for each in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if secret else _IN_ADDRESS.sub(f"{MASK}@", value)
