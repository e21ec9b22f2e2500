"""Moves tokens to their experts and the results back."""
