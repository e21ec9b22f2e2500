"""Measurements: what runs side by side in one run, with the physical ceiling beside it."""
