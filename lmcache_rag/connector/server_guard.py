"""Loaded by LMCache's server through its option --server-module; see lmcache_rag.connector.lmcache_server.

LMCache 0.5.6 calls `build_server_modules`. 0.5.7 looks for subclasses of its DiscoverableModule here: `ServerGuard`,
which is made on first access, since this module is imported where LMCache is not, or should not be loaded.
"""

from __future__ import annotations

import functools
from typing import Any

from lmcache_rag.connector.lmcache_server.settings import MODULE
from lmcache_rag.protocol import UNTIL

__all__ = ["MODULE", "UNTIL", "build_server_modules"]


def build_server_modules(context: Any) -> None:
    """LMCache 0.5.6's hook: patches the modules that were built; adds none.

    Args:
        context: LMCache's ExtServerModuleBuildContext.
    """
    from lmcache_rag.connector.lmcache_server.modules import install

    install(context.server_context, context.modules, context.config)


@functools.cache
def _server_guard() -> Any:
    from lmcache.v1.multiprocess.engine_module import DiscoverableModule

    class ServerGuard(DiscoverableModule):  # type: ignore[misc]
        """LMCache 0.5.7's hook: patches the modules that were built; adds none."""

        module_name = "lmcache_rag"
        deferred = True  # built when the others are

        @classmethod
        def create(cls, build_ctx: Any) -> None:
            """Patch LMCache's modules.

            Args:
                build_ctx: LMCache's ModuleBuildContext.
            """
            from lmcache_rag.connector.lmcache_server.modules import install

            install(build_ctx.engine_context, build_ctx.built, build_ctx.config_for(cls))

    return ServerGuard


def __dir__() -> list[str]:
    return [*globals(), "ServerGuard"]


def __getattr__(name: str) -> Any:
    if name == "ServerGuard":
        try:
            return _server_guard()
        except ImportError:  # LMCache 0.5.6, or none
            pass
    raise AttributeError(name)
