"""`lmcache-rag plan`: what keeping chunk KV takes, what it gains, and what is worth keeping."""
