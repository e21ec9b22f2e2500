"""Ranks that run a model together, and the `LLM` in front of them."""
