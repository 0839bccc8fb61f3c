"""Engines: they compute chunk KV and answer from it."""
