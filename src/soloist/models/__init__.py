"""The decoder for all families, and the reading of its weights."""
