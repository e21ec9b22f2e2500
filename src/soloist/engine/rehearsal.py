"""Steps that are run once before the first request comes, so that none is slow because it is the first of its kind.

A kernel is compiled, or loaded, when a step first needs it: seconds within somebody's answer. Which ones a step needs
depends on its number of tokens (tiles of the experts, form of the exchange, split of the attention), on whether
contexts are long, and on whether sequences with one token stand beside those with several. Powers of two go through
all of that, since no form serves less than such a span of sizes. One layer of each kind is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from soloist.placement.placement import Placement
from soloist.scheduling.request import Chunk, SamplingParams, StepBatch
from soloist.specs.model import ModelSpec

LONG_CONTEXT = 32_768  # tokens of a long one
FEW = 2048  # tokens of a step; more fill the GPU without contexts being cut into parts
_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def rehearsals(max_tokens: int, longest: int, max_sequences: int, block: int, block_size: int) -> Iterator[StepBatch]:
    """Steps of 1, 2, 4 … max_tokens tokens, the first of them a single token: new prompts, then the ends of long ones.

    longest: tokens that a sequence may reach. block: the one that all sequences write to, which nobody else owns.
    """
    sizes = [1 << power for power in range(max_tokens.bit_length()) if 1 << power < max_tokens] + [max_tokens]
    most = 1 + (max_sequences - 1) * longest
    for size in sorted({min(size, most) for size in sizes}):
        for context in (0, min(longest, LONG_CONTEXT)) if size <= FEW else (0,):
            pieces = [1] + [min(longest, size - at) for at in range(1, size, longest)]
            starts = [max(0, context - tokens) for tokens in pieces]
            chunks = (
                Chunk(row, (0,) * tokens, start, (block,) * -(-(start + tokens) // block_size), True, _GREEDY)
                for row, (tokens, start) in enumerate(zip(pieces, starts, strict=True))
            )
            yield StepBatch(0, tuple(chunks), peak=size)


def kinds(spec: ModelSpec, placement: Placement, layers: Sequence[int]) -> list[int]:
    """The index in `layers`, those of a stage, of the first of each kind; the same on all ranks of the stage."""
    found = dict[object, int]()
    for index, layer in enumerate(layers):
        is_moe = layer in spec.moe_layers
        slots = placement.slots[spec.moe_layers.index(layer)] if is_moe else ()
        found.setdefault((spec.window(layer), is_moe, tuple(map(len, slots))), index)
    return list(found.values())
