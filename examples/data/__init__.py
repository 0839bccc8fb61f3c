"""The sample documents and questions, as the package lmcache_rag.demo.sample_data."""
