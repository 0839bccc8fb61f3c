"""What runs inside vLLM: the connector for an LMCache blend server."""
