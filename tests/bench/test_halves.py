"""The steps of the benchmark of halves; times come from GPUs."""

from __future__ import annotations

from soloist.bench.halves import BLOCK, CONTEXT, decode, prefill


def test_prompts_fill_a_step() -> None:
    batch = prefill(100, 40, range(100))
    assert [len(chunk.tokens) for chunk in batch.chunks] == [40, 40, 20]
    assert [chunk.blocks for chunk in batch.chunks] == [(0,), (1,), (2,)]
    assert (batch.tokens, batch.peak, batch.decodes) == (100, 100, False)


def test_decoding_sequences_have_blocks_for_their_contexts() -> None:
    batch = decode(3, range(3))
    assert (batch.tokens, batch.peak, batch.decodes) == (3, 3, True)
    assert all(chunk.stop == CONTEXT == BLOCK * len(chunk.blocks) for chunk in batch.chunks)
    assert len({block for chunk in batch.chunks for block in chunk.blocks}) == 9
