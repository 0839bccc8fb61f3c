"""`python -m lmcache_rag` is the command `lmcache-rag`."""

from lmcache_rag.cli import main

if __name__ == "__main__":
    main()
