"""Runs inside LMCache's server, where `lmcache_rag.connector.server_guard` installs it; never inside vLLM.

index.py      which chunks may be blended, and where they are found in a prompt
forget.py     takes a chunk's KV out of memory, second tiers and the index
eviction.py   evicts the KV of ingested chunks last
http.py       cuts LMCache's HTTP API down to what is needed
settings.py   what `lmcache-rag serve` says in --server-module
modules.py    puts all of that into LMCache's modules
"""
