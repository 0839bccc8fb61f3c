"""`python -m lmcache_rag.cli` is `lmcache-rag`."""

from __future__ import annotations

from lmcache_rag.cli import main

main()
