"""Engines: what computes chunk KV and answers from it."""
