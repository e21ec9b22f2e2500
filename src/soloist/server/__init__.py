"""The OpenAI-compatible server in front of the ranks: requests over HTTP, metrics, a dashboard. Imports no torch."""
