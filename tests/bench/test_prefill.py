"""The steps of the prefill benchmark; times come from GPUs."""

from __future__ import annotations

from soloist.bench.prefill import SEEN, STEPS, WARM_UP, steps


def test_steps_are_full_and_prompts_have_blocks_of_their_own() -> None:
    found = list(steps(100, prompt=40, block_size=16, vocab=50, seed=1))
    assert len(found) == WARM_UP + STEPS + SEEN
    sequences = set[int]()
    for batch in found:
        assert [len(chunk.tokens) for chunk in batch.chunks] == [40, 40, 20]
        assert batch.peak == batch.tokens == 100
        assert [chunk.blocks for chunk in batch.chunks] == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
        assert max(token for chunk in batch.chunks for token in chunk.tokens) < 50
        assert sequences.isdisjoint(chunk.sequence for chunk in batch.chunks)
        sequences.update(chunk.sequence for chunk in batch.chunks)
