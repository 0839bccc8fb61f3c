"""Measure a server: speed with and without blending, exactness, and soundness under every kind of request."""
