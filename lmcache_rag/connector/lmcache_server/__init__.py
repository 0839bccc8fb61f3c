"""Runs inside LMCache's server, where `lmcache_rag.connector.server_guard` installs it; never inside vLLM.

index.py      which chunks may be blended, and where they are found in a prompt
forget.py     removes a chunk's KV from memory, second tiers and the index
eviction.py   evicts the KV of ingested chunks last
http.py       cuts LMCache's HTTP API down to the routes that are needed
settings.py   the settings in --server-module, as `lmcache-rag serve` writes them
modules.py    patches LMCache's modules with all of that
"""
