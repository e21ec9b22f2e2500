"""Scheduler: whatever happens to it, every request gets exactly the tokens that it would get alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from soloist.errors import ConfigurationError, RequestError
from soloist.scheduling.request import UNKNOWN, Output, Sampled, SamplingParams, StepBatch
from soloist.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.scheduling.fake_executor import EOS, VOCAB, FakeExecutor, alone, digest

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)


class Driver:
    """A scheduler with a fake executor. Batches are executed when scheduled or when answered, as `eager` says."""

    def __init__(self, config: SchedulerConfig, eager: bool = True) -> None:
        self.config, self.eager = config, eager
        self.scheduler = Scheduler(config, eos_ids=(EOS,))
        self.executor = FakeExecutor(config.blocks, config.block_size)
        self.flying: list[tuple[StepBatch, list[Sampled] | None]] = []
        self.outputs: dict[int, list[Output]] = {}
        self.finished: list[int] = []
        self.steps = 0

    def schedule(self) -> StepBatch:
        batch = self.scheduler.schedule()
        self.steps += 1
        assert batch.step == self.steps
        self._check(batch)
        if batch.chunks:
            self.flying.append((batch, self.executor.run(batch) if self.eager else None))
        return batch

    def _check(self, batch: StepBatch) -> None:
        assert batch.tokens <= self.config.max_batch_tokens
        assert len(batch.chunks) <= self.config.max_sequences
        assert all(chunk.tokens for chunk in batch.chunks)
        under_way = [c.sequence for b, _ in self.flying for c in b.chunks] + [c.sequence for c in batch.chunks]
        assert max(map(under_way.count, under_way), default=0) <= 1 + self.config.ahead
        assert len(self.flying) + bool(batch.chunks) <= self.config.places

    def answer(self, index: int = 0) -> list[Output]:
        batch, sampled = self.flying.pop(index)
        outputs = self.scheduler.update(batch, self.executor.run(batch) if sampled is None else sampled)
        for output in outputs:
            self.outputs.setdefault(output.sequence, []).append(output)
        self.finished += [output.sequence for output in outputs if output.finish_reason]
        return outputs

    def step(self) -> StepBatch:
        batch = self.schedule()
        if batch.chunks:
            self.answer()
        return batch

    def run(self) -> None:
        """To the end, keeping as many batches in flight as may be."""
        while self.scheduler.has_work:
            assert self.steps < 20_000, "no progress"
            while self.scheduler.can_schedule:
                self.schedule()
            assert self.flying, "work, but nothing to do"
            self.answer()

    def tokens(self, sequence: int) -> list[int]:
        return [token for output in self.outputs.get(sequence, []) for token in output.tokens]

    def assert_as_alone(self, sequence: int, prompt: list[int], params: SamplingParams) -> None:
        tokens, reason = alone(prompt, params, self.config.max_positions)
        assert self.tokens(sequence) == tokens
        assert [o.finish_reason for o in self.outputs[sequence]] == [None] * (len(tokens) - 1) + [reason]
        scored = [t for o in self.outputs[sequence] for t in o.prompt_logprobs]
        asked = range(1, len(prompt)) if params.prompt_logprobs is not None else ()
        assert [(t.token, t.logprob) for t in scored] == [(prompt[p], -float(digest(prompt[:p]))) for p in asked]

    def assert_empty(self) -> None:
        stats = self.scheduler.stats
        assert (stats.waiting, stats.running, stats.in_flight, stats.blocks_used) == (0, 0, 0, 0)
        assert not self.scheduler.has_work
        assert not self.scheduler.can_schedule


def config(**changes: int | bool) -> SchedulerConfig:
    return SchedulerConfig(**{"blocks": 32, "block_size": 4, "max_positions": 64, **changes})


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
    SamplingParams,
    max_tokens=st.integers(1, 16),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
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


def test_nobody_overtakes_a_request_that_waits_for_room() -> None:
    driver = Driver(config(blocks=8))
    driver.scheduler.add(0, [1] * 16, GREEDY)
    driver.scheduler.add(1, [2] * 20, GREEDY)
    driver.scheduler.add(2, [3], GREEDY)
    driver.run()
    assert list(driver.outputs) == [0, 1, 2]


def test_a_cached_prefix_is_not_computed_again() -> None:
    driver = Driver(config())
    prompt = list(range(1, 13))
    driver.scheduler.add(0, prompt, GREEDY)
    driver.run()
    answer = driver.tokens(0)
    driver.scheduler.add(1, prompt, GREEDY)  # all of it is known, yet its last token's logits are wanted
    (chunk,) = driver.step().chunks
    assert (chunk.start, chunk.tokens) == (8, tuple(prompt[8:]))
    follow_up = [*prompt, *answer, 4]  # the answer's last token was never computed
    driver.scheduler.add(2, follow_up, GREEDY)
    chunk = next(c for c in driver.step().chunks if c.sequence == 2)
    assert chunk.start == 16
    stats = driver.scheduler.stats
    assert (stats.prefix_hits, stats.prefix_queries) == (8 + 16, 12 + 12 + len(follow_up))
    driver.run()
    driver.assert_as_alone(2, follow_up, GREEDY)


def test_sequences_that_run_together_share_a_prefix() -> None:
    driver = Driver(config(max_batch_tokens=16))
    prompt = [1] * 16
    driver.scheduler.add(0, prompt, GREEDY)
    driver.step()
    for sequence in range(1, 4):
        driver.scheduler.add(sequence, [*prompt, sequence], GREEDY)
    driver.step()
    assert driver.scheduler.stats.blocks_used == 4 + 4  # the prefix, and the last block of each


def test_prompt_log_probabilities_are_never_cut_by_the_cache() -> None:
    driver = Driver(config(max_batch_tokens=5))
    wish = replace(GREEDY, prompt_logprobs=0)
    for sequence in range(2):
        driver.scheduler.add(sequence, [3] * 13, wish)
        driver.run()
        driver.assert_as_alone(sequence, [3] * 13, wish)


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


def test_no_more_batches_are_under_way_than_may_be() -> None:
    driver = Driver(config())
    driver.scheduler.add(0, [1], GREEDY)
    driver.schedule()
    driver.scheduler.add(1, [2], GREEDY)
    assert not driver.scheduler.can_schedule
    assert driver.schedule().chunks == ()
    driver.answer()
    assert [c.sequence for c in driver.schedule().chunks] == [0, 1]


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
