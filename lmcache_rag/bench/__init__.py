"""Measure a server: speed with and without blending, exactness, and stability under every kind of request."""
