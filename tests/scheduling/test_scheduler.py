"""Scheduler: whatever happens to it, every request gets exactly the tokens that it would get alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from soloist.errors import ConfigurationError, RequestError
from soloist.scheduling.request import Sampled, SamplingParams, StepBatch
from soloist.scheduling.scheduler import SchedulerConfig
from tests.scheduling.driver import GREEDY, Driver, config
from tests.scheduling.fake_executor import VOCAB, alone

configs = st.builds(
    SchedulerConfig,
    blocks=st.integers(2, 16),
    block_size=st.integers(1, 5),
    max_batch_tokens=st.integers(1, 24),
    max_sequences=st.integers(1, 6),
    max_positions=st.integers(4, 40),
    prefix_caching=st.booleans(),
    in_flight=st.integers(1, 4),
    ahead=st.booleans(),
)
# Few different tokens, and prompts that begin with the same text, so that prefixes are shared often.
prompts = st.builds(
    lambda shared, own: [1, 2, 3, 2, 1, 1, 2, 3, 1, 2, 2, 1][:shared] + own,
    st.integers(0, 12),
    st.lists(st.integers(1, 3), min_size=1, max_size=14),
)
params = st.builds(
    lambda max_tokens, min_tokens, **other: SamplingParams(
        max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens), **other
    ),
    max_tokens=st.integers(1, 16),
    min_tokens=st.sampled_from([0, 0, 3, 16]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
    prompt_logprobs=st.sampled_from([None, None, 0]),
)


@settings(max_examples=250, deadline=None)
@given(
    config=configs,
    requests=st.lists(st.tuples(prompts, params), min_size=1, max_size=12),
    eager=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_request_gets_what_it_gets_alone(
    config: SchedulerConfig, requests: list[tuple[list[int], SamplingParams]], eager: bool, seed: int
) -> None:
    driver, chance = Driver(config, eager), random.Random(seed)
    accepted, given_up, todo = set(), set(), list(enumerate(requests))
    while todo or driver.scheduler.has_work:
        assert driver.steps < 20_000, "no progress"
        act = chance.random()
        if todo and act < 0.2:
            sequence, (prompt, wish) = todo.pop()
            try:
                driver.scheduler.add(sequence, prompt, wish)
                accepted.add(sequence)
            except RequestError:
                assert len(prompt) + wish.max_tokens > config.longest_sequence or len(prompt) >= config.max_positions
        elif accepted and act < 0.22:
            sequence = chance.choice(sorted(accepted))
            chance.choice([driver.scheduler.abort, lambda s: driver.scheduler.finish(s, "stop")])(sequence)
            given_up.add(sequence)
        elif driver.flying and (act < 0.6 or not driver.scheduler.can_schedule):
            driver.answer(0 if config.ahead else chance.randrange(len(driver.flying)))
        else:
            driver.schedule()
    driver.assert_empty()
    for sequence in accepted:
        prompt, wish = requests[sequence]
        if sequence in given_up:
            got = driver.tokens(sequence)
            assert got == alone(prompt, wish, config.max_positions)[0][: len(got)]
        else:
            driver.assert_as_alone(sequence, prompt, wish)


def test_decodes_go_first_then_prefills_in_chunks() -> None:
    driver = Driver(config(max_batch_tokens=6))
    driver.scheduler.add(0, [1] * 3, GREEDY)
    driver.step()
    driver.scheduler.add(1, [2] * 12, GREEDY)
    driver.scheduler.add(2, [3] * 2, GREEDY)
    batches = [[(c.sequence, len(c.tokens), c.samples) for c in driver.step().chunks] for _ in range(4)]
    assert batches == [
        [(0, 1, True), (1, 5, False)],
        [(0, 1, True), (1, 5, False)],
        [(0, 1, True), (1, 2, True), (2, 2, True)],
        [(0, 1, True), (1, 1, True), (2, 1, True)],
    ]


def test_nobody_overtakes_a_request_that_waits_for_room() -> None:
    driver = Driver(config(blocks=8))
    driver.scheduler.add(0, [1] * 16, GREEDY)
    driver.scheduler.add(1, [2] * 20, GREEDY)
    driver.scheduler.add(2, [3], GREEDY)
    driver.run()
    assert list(driver.outputs) == [0, 1, 2]


def test_an_id_can_be_used_again_after_an_abort() -> None:
    driver = Driver(config())
    driver.scheduler.add(0, [1] * 8, GREEDY)
    driver.scheduler.abort(0)
    driver.scheduler.add(0, [2] * 8, GREEDY)
    driver.run()
    driver.assert_as_alone(0, [2] * 8, GREEDY)


def test_a_row_that_is_not_finite_ends_its_sequence_only() -> None:
    driver = Driver(config())
    for sequence in range(2):
        driver.scheduler.add(sequence, [sequence + 1], GREEDY)
    batch = driver.scheduler.schedule()
    bad, good = driver.executor.run(batch)
    outputs = driver.scheduler.update(batch, [Sampled(bad.sequence, None), good])
    assert [(o.tokens, o.finish_reason) for o in outputs] == [((), "error"), ((good.token,), None)]
    assert driver.scheduler.stats.running == 1


def test_hints_and_counts() -> None:
    driver = Driver(config(in_flight=2))
    assert driver.scheduler.schedule() == StepBatch(1)
    assert not driver.scheduler.can_schedule
    driver.steps = 1
    driver.scheduler.add(0, [1] * 8, GREEDY)
    assert driver.scheduler.can_schedule
    driver.schedule()
    assert not driver.scheduler.can_schedule  # its only sequence is in flight
    driver.schedule()
    stats = driver.scheduler.stats
    assert (stats.waiting, stats.running, stats.in_flight, stats.blocks_used, stats.blocks_total) == (0, 1, 1, 2, 32)


@pytest.mark.parametrize(
    ("prompt", "wish", "says"),
    [
        ([], GREEDY, "at least one token"),
        ([1] * 64, GREEDY, "prompt of 64 tokens: at most 64 positions"),
        ([1] * 30, replace(GREEDY, max_tokens=20), "needs 13 KV blocks of 4 tokens, the whole cache has 10"),
        ([1], SamplingParams(top_p=0.0), "top_p = 0.0"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(prompt: list[int], wish: SamplingParams, says: str) -> None:
    driver = Driver(config(blocks=10))
    driver.scheduler.add(0, [5], GREEDY)
    with pytest.raises(RequestError, match=says):
        driver.scheduler.add(1, prompt, wish)
    driver.run()
    driver.assert_as_alone(0, [5], GREEDY)


def test_sizes_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="in_flight = 0: must be at least 1"):
        config(in_flight=0)
