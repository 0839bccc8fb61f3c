"""Integrations with other frameworks, and what they share: blended prompts, and KV for the texts of another store.

Each framework's package needs only its own framework; the shared modules need none.
"""
