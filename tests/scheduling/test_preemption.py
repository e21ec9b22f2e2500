"""Blocks run short: who loses them, who waits for them, and that no token is lost."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from soloist.scheduling.request import SamplingParams
from tests.scheduling.driver import GREEDY, Driver, config


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("in_flight", [1, 2, 3, 4])
def test_preempted_sequences_lose_nothing(in_flight: int, ahead: bool) -> None:
    driver = Driver(config(blocks=10, max_batch_tokens=16, in_flight=in_flight, ahead=ahead))
    wish = SamplingParams(temperature=0, ignore_eos=True, max_tokens=24, prompt_logprobs=0)
    prompts = {i: [i + 1] * (6 + i) for i in range(8)}
    for sequence, prompt in prompts.items():
        driver.scheduler.add(sequence, prompt, wish)
    driver.run()
    assert driver.scheduler.stats.preemptions > 0
    for sequence, prompt in prompts.items():
        driver.assert_as_alone(sequence, prompt, wish)
    driver.assert_empty()


def test_the_oldest_finishes_first_and_is_never_preempted() -> None:
    driver = Driver(config(blocks=10, prefix_caching=False))
    for sequence in range(5):
        driver.scheduler.add(sequence, [sequence + 1] * 7, replace(GREEDY, max_tokens=30))
    computed, admitted = [], []
    while driver.scheduler.has_work:
        chunks = driver.step().chunks
        computed += [c.start for c in chunks if c.sequence == 0]
        admitted += [c.sequence for c in chunks if c.start == 0]
    assert driver.scheduler.stats.preemptions > 0
    assert computed == [0, *range(7, 36)]
    assert admitted[:7] == [0, 1, 2, 1, 2, 3, 4]
    assert driver.finished == [0, 1, 2, 3, 4]


def test_a_sequence_that_fills_the_whole_cache_finishes() -> None:
    driver = Driver(config(blocks=4, block_size=4))
    wish = replace(GREEDY, max_tokens=7)
    driver.scheduler.add(0, [1] * 10, wish)
    driver.scheduler.add(1, [1] * 10, wish)
    driver.run()
    driver.assert_as_alone(0, [1] * 10, wish)
    driver.assert_as_alone(1, [1] * 10, wish)


def test_a_decode_that_is_youngest_waits_for_a_block_rather_than_lose_its_own() -> None:
    driver = Driver(config(blocks=15, block_size=1, max_batch_tokens=1, in_flight=2, prefix_caching=False))
    wishes = {0: ([1] * 13, replace(GREEDY, max_tokens=2)), 1: ([2], replace(GREEDY, max_tokens=12))}
    for sequence, (prompt, wish) in wishes.items():
        driver.scheduler.add(sequence, prompt, wish)
    while driver.scheduler.has_work:
        driver.schedule()
        driver.schedule()
        for _ in list(driver.flying):
            driver.answer()
    assert driver.scheduler.stats.preemptions == 1
    for sequence, (prompt, wish) in wishes.items():
        driver.assert_as_alone(sequence, prompt, wish)


def test_a_preempted_sequence_stays_out_until_all_its_tokens_fit() -> None:
    driver = Driver(config(blocks=6))
    for sequence in range(2):
        driver.scheduler.add(sequence, [sequence + 1] * 4, replace(GREEDY, max_tokens=16))
    driver.run()
    assert driver.finished == [0, 1]
    assert driver.scheduler.stats.preemptions == 1


def test_room_to_grow_is_left_when_another_is_admitted() -> None:
    driver = Driver(config(blocks=4))
    for sequence in range(2):
        driver.scheduler.add(sequence, [sequence + 1] * 8, replace(GREEDY, max_tokens=5))
    driver.run()
    assert driver.finished == [0, 1]
    assert driver.scheduler.stats.preemptions == 0


def test_the_rest_of_a_prompt_under_way_is_not_promised_to_another() -> None:
    driver = Driver(config(blocks=10, max_batch_tokens=4, in_flight=2))
    for sequence in range(2):
        driver.scheduler.add(sequence, [sequence + 1] * 24, GREEDY)
    driver.run()
    assert driver.finished == [0, 1]
    assert driver.scheduler.stats.preemptions == 0


def test_idle_blocks_of_a_found_prefix_count_as_taken() -> None:
    driver = Driver(config(blocks=4))
    prompt = list(range(1, 10))
    driver.scheduler.add(0, prompt, replace(GREEDY, max_tokens=1))
    driver.run()
    driver.scheduler.add(1, [1] * 4, replace(GREEDY, max_tokens=6))
    driver.step()
    driver.scheduler.add(2, [*prompt, 1, 2, 3], replace(GREEDY, max_tokens=4))
    driver.run()
    assert driver.finished == [0, 1, 2]
    assert driver.scheduler.stats.preemptions == 0


def test_a_prefill_cut_short_by_preemption_scores_each_prompt_token_once() -> None:
    driver = Driver(config(blocks=12, block_size=1, max_batch_tokens=2))
    wish = replace(GREEDY, max_tokens=3, prompt_logprobs=0)
    driver.scheduler.add(0, [1], GREEDY)
    driver.step()
    driver.scheduler.add(1, [2, 3, 1, 2, 1, 3, 3, 1], wish)
    driver.run()
    assert driver.scheduler.stats.preemptions == 1
    driver.assert_as_alone(0, [1], GREEDY)
    driver.assert_as_alone(1, [2, 3, 1, 2, 1, 3, 3, 1], wish)


def test_a_young_decode_goes_before_an_old_prefill_but_takes_no_block_from_it() -> None:
    driver = Driver(config(blocks=6, max_batch_tokens=4, in_flight=2, prefix_caching=False))
    driver.scheduler.add(0, [1] * 13, replace(GREEDY, max_tokens=8))
    driver.schedule()
    driver.scheduler.add(1, [2] * 3, replace(GREEDY, max_tokens=8))
    driver.schedule()
    driver.answer()
    driver.answer()
    first, second = driver.schedule(), driver.schedule()
    assert [(c.sequence, len(c.tokens)) for c in first.chunks + second.chunks] == [(1, 1), (0, 4)]
    driver.run()
    assert driver.scheduler.stats.preemptions > 0
    driver.assert_as_alone(0, [1] * 13, replace(GREEDY, max_tokens=8))
    driver.assert_as_alone(1, [2] * 3, replace(GREEDY, max_tokens=8))
