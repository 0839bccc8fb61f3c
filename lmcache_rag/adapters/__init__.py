"""What the integrations share: KV for the texts of another store, and blended prompts for another client.

Nothing here imports a framework.
"""
