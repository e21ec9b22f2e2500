"""Sizes of what a scheduler schedules onto, and which requests fit into them at all."""

from __future__ import annotations

from soloist.errors import ConfigurationError, RequestError
from soloist.specs.model import Spec


class SchedulerConfig(Spec, frozen=True, kw_only=True):
    """Sizes of one attention group's KV cache and batches."""

    blocks: int  # of the KV cache
    block_size: int = 16  # tokens of a block
    max_batch_tokens: int = 2048  # of a batch
    max_sequences: int = 256  # of a batch
    max_positions: int  # tokens of a sequence, prompt and continuation together
    prefix_caching: bool = True
    in_flight: int = 1  # batches of different sequences that may be under way at once: the stages of a pipeline
    ahead: bool = False  # one more batch is made up before the oldest one under way is back; batches run in order

    def __post_init__(self) -> None:
        for key in ("blocks", "block_size", "max_batch_tokens", "max_sequences", "max_positions", "in_flight"):
            if getattr(self, key) < 1:
                raise ConfigurationError.of(key, getattr(self, key), "must be at least 1")

    @property
    def places(self) -> int:
        """Batches that may be under way at once."""
        return self.in_flight + self.ahead

    @property
    def longest_sequence(self) -> int:
        """Tokens that a sequence may reach; the last one needs no KV."""
        return min(self.max_positions, self.blocks * self.block_size + 1)

    @property
    def max_running(self) -> int:
        """Sequences that may hold blocks; each finds a place in some batch when all of them decode."""
        return min(self.max_sequences, self.max_batch_tokens) * self.in_flight

    def blocks_for(self, tokens: int) -> int:
        """Blocks that the KV of so many tokens takes."""
        return -(-tokens // self.block_size)

    def check_lengths(self, prompt: int, max_tokens: int) -> None:
        """Raise RequestError for a request that could not be finished even if it were alone."""
        if not prompt:
            raise RequestError("prompt = []: must hold at least one token")
        if prompt >= self.max_positions:
            raise RequestError(
                f"prompt of {prompt} tokens: at most {self.max_positions} positions are served, one of them for "
                f"the answer; shorten it to {self.max_positions - 1} tokens or raise max_positions"
            )
        needed = self.blocks_for(min(prompt + max_tokens, self.max_positions) - 1)
        if needed > self.blocks:
            raise RequestError(
                f"prompt of {prompt} tokens with max_tokens = {max_tokens}: needs {needed} KV blocks of "
                f"{self.block_size} tokens, the whole cache has {self.blocks}; keep prompt and max_tokens together "
                f"to {self.longest_sequence} tokens or enlarge the cache (kv_tokens)"
            )
