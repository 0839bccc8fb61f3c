"""LMCache's command line, with passwords that do not appear on it.

``python -m lmcache_rag.serving.lmcache_server server ... --l2-adapter '{"password": "${NAME}", ...}'`` is ``lmcache
server ...`` with the placeholders of lmcache_rag.serving.tiers filled in after the process has started: what `ps` shows
is unchanged. The variables are then removed from the process's environment. It also knows the serde that checks what
second tiers return.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from lmcache_rag.connector.lmcache_server.settings import SERDE
from lmcache_rag.errors import LMCacheRAGError
from lmcache_rag.serving.tiers import OPTION, filled, placeholders, variables


def arguments(command_line: Sequence[str]) -> list[str]:
    """Arguments for LMCache. Removes the variables from the environment.

    Raises:
        LMCacheRAGError: A variable is not set, or a file cannot be read.
    """
    made = list(command_line)
    tiers = [n + 1 for n, word in enumerate(command_line[:-1]) if word == OPTION and placeholders(command_line[n + 1])]
    for at in tiers:
        made[at] = filled(command_line[at], os.environ)
    for name in variables([command_line[at] for at in tiers]):
        os.environ.pop(name, None)
    return made


def main() -> None:
    """Run LMCache."""
    try:
        made = arguments(sys.argv[1:])
    except LMCacheRAGError as problem:
        print(problem, file=sys.stderr)  # noqa: T201 - this is a command line
        raise SystemExit(2) from None
    if any(
        json.loads(made[n + 1]).get("serde", {}).get("type") == SERDE for n in range(len(made)) if made[n] == OPTION
    ):
        from lmcache_rag.connector.lmcache_server.tier_check import register

        register()
    from lmcache.cli.main import main as lmcache

    sys.argv = ["lmcache", *made]
    lmcache(made)


if __name__ == "__main__":
    main()
