"""Moves rows between ranks. Knows no experts."""
