"""Accepted requests and their tokens, the choice of a leader, and the messages to and from the ranks. Torch-free."""
