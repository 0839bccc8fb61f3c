"""Measure a server: time to the first token with and without blending."""
