"""Runs inside LMCache's server, where `lmcache_rag.connector.server_guard` installs it; never inside vLLM.

index.py      which chunks may be blended, and where they are found in a prompt
removal.py    removes a chunk's KV from memory and second tiers, and evicts that of ingested chunks last
settings.py   the settings in --server-module, as `lmcache-rag serve` writes them
modules.py    patches LMCache's modules with all of that, and cuts its HTTP API down to the routes that are needed
"""
