"""Batches under way: how many, how even, and the next one made up before the last is back."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from soloist.scheduling.request import UNKNOWN
from tests.scheduling.driver import GREEDY, Driver, config


def test_no_more_batches_are_under_way_than_may_be() -> None:
    driver = Driver(config())
    driver.scheduler.add(0, [1], GREEDY)
    driver.schedule()
    driver.scheduler.add(1, [2], GREEDY)
    assert not driver.scheduler.can_schedule
    assert driver.schedule().chunks == ()
    driver.answer()
    assert [c.sequence for c in driver.schedule().chunks] == [0, 1]


@pytest.mark.parametrize("sequences", [4, 8, 9, 13])
def test_batches_in_flight_are_about_equal(sequences: int) -> None:
    driver = Driver(config(in_flight=4, blocks=200))
    for sequence in range(sequences):
        driver.scheduler.add(sequence, [sequence + 1] * 3, replace(GREEDY, max_tokens=40))
    sizes = []
    for _ in range(30):
        while driver.scheduler.can_schedule:
            driver.schedule()
        sizes.append([len(batch.chunks) for batch, _ in driver.flying])
        driver.answer()
    assert sizes[0] == sorted((len(range(i, sequences, 4)) for i in range(4)), reverse=True)
    assert all(len(turn) == 4 and max(turn) - min(turn) <= 1 for turn in sizes)


def test_batches_that_have_become_unequal_are_evened_out_before_anybody_joins() -> None:
    driver = Driver(config(in_flight=4, blocks=200))
    for sequence in range(20):
        stays = sequence < 5 or sequence in (5, 10, 15)
        driver.scheduler.add(sequence, [sequence + 1] * 3, replace(GREEDY, max_tokens=40 if stays else 1))
    sizes = []
    for turn in range(9):
        while driver.scheduler.can_schedule:
            driver.schedule()
        sizes.append([len(batch.chunks) for batch, _ in driver.flying])
        if turn == 4:  # the batch of five is about to return
            driver.scheduler.add(20, [9] * 3, replace(GREEDY, max_tokens=40))
        driver.answer()
    assert sizes[0] == [5, 5, 5, 5]
    assert sizes[4:] == [[5, 1, 1, 1], [1, 1, 1, 2], [1, 1, 2, 2], [1, 2, 2, 2], [2, 2, 2, 3]]


def ahead() -> Driver:
    """Two sequences that decode, their newest batch not yet back."""
    driver = Driver(config(ahead=True))
    for sequence in range(2):
        driver.scheduler.add(sequence, [sequence + 1] * 4, GREEDY)
    driver.schedule()
    return driver


def test_the_next_step_is_scheduled_before_the_one_under_way_is_back() -> None:
    driver = ahead()
    batch = driver.schedule()
    assert [(c.start, c.tokens, c.samples) for c in batch.chunks] == [(4, (UNKNOWN,), True)] * 2
    assert not driver.scheduler.can_schedule
    assert driver.schedule().chunks == ()
    driver.answer()
    assert driver.scheduler.can_schedule
    driver.run()
    driver.assert_as_alone(1, [2] * 4, GREEDY)
    driver.assert_empty()


def test_what_ends_by_its_length_is_not_scheduled_once_too_often() -> None:
    driver = ahead()
    steps = 1
    while driver.scheduler.has_work:
        while driver.scheduler.can_schedule:
            steps += bool(driver.schedule().chunks)
        driver.answer()
    assert steps == GREEDY.max_tokens


def test_a_sequence_that_ends_unforeseen_is_dropped_one_step_later() -> None:
    driver = ahead()
    later = driver.schedule()
    driver.scheduler.finish(0, "stop")
    driver.answer()
    assert driver.scheduler.stats.blocks_used == 4  # the later batch still writes to the blocks of both
    assert [c.sequence for c in driver.schedule().chunks] == [1]
    assert [output.sequence for output in driver.answer()] == [1]
    assert [c.sequence for c in later.chunks] == [0, 1]
    assert driver.scheduler.stats.blocks_used == 2
    driver.run()
    driver.assert_as_alone(1, [2] * 4, GREEDY)
    driver.assert_empty()


def test_an_older_sequence_waits_for_the_blocks_of_a_younger_one_that_is_under_way() -> None:
    driver = Driver(config(blocks=4, prefix_caching=False, ahead=True))
    prompts = {0: [1] * 5, 1: [2] * 3}
    for sequence, prompt in prompts.items():
        driver.scheduler.add(sequence, prompt, GREEDY)
    driver.schedule()
    for _ in range(3):  # in the second of them the younger one takes the last block
        driver.schedule()
        driver.answer()
    assert driver.schedule().chunks == ()
    driver.answer()
    assert [c.sequence for c in driver.schedule().chunks] == [0]
    assert driver.scheduler.stats.preemptions == 1
    driver.run()
    for sequence, prompt in prompts.items():
        driver.assert_as_alone(sequence, prompt, GREEDY)
    driver.assert_empty()


def test_an_aborted_sequence_in_flight_keeps_its_blocks_until_the_batch_returns() -> None:
    driver = Driver(config())
    driver.scheduler.add(0, [1] * 8, GREEDY)
    driver.schedule()
    driver.scheduler.abort(0)
    driver.scheduler.abort(0)
    assert driver.scheduler.stats.blocks_used == 2
    assert driver.scheduler.has_work
    assert driver.answer() == []
    driver.assert_empty()
