"""What the cache holds of a prompt is not computed again."""

from __future__ import annotations

from msgspec.structs import replace

from tests.scheduling.driver import GREEDY, Driver, config


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
