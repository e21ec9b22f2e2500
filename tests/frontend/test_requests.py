"""The front end's account: every request ends once, and loads are fair."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soloist.errors import RequestError
from soloist.frontend.requests import Requests
from soloist.frontend.wire import Delta
from soloist.scheduling.request import SamplingParams, TokenLogprob

VOCAB = 50


def test_n_continuations_have_consecutive_seeds_and_score_the_prompt_once():
    request = Requests((0,), VOCAB).accept([1, 2], SamplingParams(n=3, seed=10, prompt_logprobs=2))
    shares = [sequence.submit.params for sequence in request.sequences]
    assert [share.seed for share in shares] == [10, 11, 12]
    assert [share.n for share in shares] == [1, 1, 1]
    assert [share.prompt_logprobs for share in shares] == [2, None, None]


def test_a_missing_seed_is_drawn_so_that_the_request_can_be_repeated():
    requests = Requests((0,), VOCAB)
    seeds = {requests.accept([1], SamplingParams()).sequences[0].submit.params.seed for _ in range(8)}
    assert None not in seeds
    assert len(seeds) > 1


def test_work_goes_to_the_leader_with_the_least():
    requests = Requests((0, 4), VOCAB)
    big = requests.accept([1] * 30, SamplingParams(max_tokens=30))
    small = [requests.accept([1], SamplingParams(max_tokens=9)) for _ in range(3)]
    assert big.sequences[0].leader == 0
    assert [request.sequences[0].leader for request in small] == [4, 4, 4]
    assert requests.waiting_for() == {0, 4}


@pytest.mark.parametrize(
    ("prompt", "params", "reason"),
    [
        ([], SamplingParams(), "at least one token"),
        ([1, VOCAB], SamplingParams(), "prompt: token 50 must lie between 0 and 49"),
        ([-1], SamplingParams(), "token -1"),
        ([1], SamplingParams(n=0), "n = 0"),
        ([1], SamplingParams(max_tokens=0), "max_tokens = 0"),
    ],
)
def test_a_request_that_is_wrong_in_itself_is_refused(prompt, params, reason):
    requests = Requests((0,), VOCAB)
    with pytest.raises(RequestError, match=reason):
        requests.accept(prompt, params)
    assert not requests.waiting_for()


def test_deltas_add_up():
    requests = Requests((0,), VOCAB)
    request = requests.accept([1], SamplingParams(n=2))
    first, second = (sequence.submit.sequence for sequence in request.sequences)
    requests.apply(Delta(first, (5,), "a", logprobs=(TokenLogprob(5, -1.0),), margin=2.0))
    requests.apply(Delta(second, (6,), "x", "stop", margin=3.0))
    assert not request.done
    assert requests.apply(Delta(first, (7, 8), "b", "length", margin=0.5)) is request
    assert request.done
    one, two = request.sequences
    assert (one.tokens, one.text, one.finish_reason, one.margin) == ([5, 7, 8], "ab", "length", 0.5)
    assert (two.tokens, two.text, two.finish_reason) == ([6], "x", "stop")
    assert [(index, delta.text) for index, delta in request.news] == [(0, "a"), (1, "x"), (0, "b")]
    assert 0 < request.arrival_s <= one.first_token_s <= one.last_token_s


def test_what_comes_after_an_abort_is_dropped():
    requests = Requests((0,), VOCAB)
    request = requests.accept([1], SamplingParams(n=2))
    first, second = (sequence.submit.sequence for sequence in request.sequences)
    requests.apply(Delta(first, (5,), "a", "stop"))
    assert [sequence.submit.sequence for sequence in requests.abort(request)] == [second]
    assert requests.apply(Delta(second, (5,), "late")) is None
    assert [sequence.finish_reason for sequence in request.sequences] == ["stop", "abort"]
    assert requests.abort(request) == []


def test_a_lost_engine_ends_everything_once():
    requests, ends = Requests((0,), VOCAB), []
    waiting = [requests.accept([1], SamplingParams(n=2)) for _ in range(2)]
    for request in waiting:
        request.on_done = lambda: ends.append(1)
    requests.fail_all("rank 3 is lost")
    assert [request.error for request in waiting] == ["rank 3 is lost"] * 2
    assert len(ends) == 2
    assert requests.fail_all("again") == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.sampled_from(["go", "stop", "abort"])), max_size=60))
def test_load_is_what_is_left_to_do(events):
    """At any time a leader's load is the sum of the costs of its waiting sequences, and nothing when all have ended."""
    requests, open_requests = Requests((0, 1, 2), VOCAB), []
    for which, tokens, what in events:
        if what == "go" or not open_requests:
            open_requests.append(requests.accept([1] * tokens, SamplingParams(max_tokens=10)))
            continue
        request = open_requests[which % len(open_requests)]
        if what == "abort":
            requests.abort(request)
        else:
            requests.apply(Delta(request.sequences[0].submit.sequence, (1,), "", "stop" if tokens == 5 else None))
        left = dict.fromkeys((0, 1, 2), 0)
        for request in open_requests:
            left[request.sequences[0].leader] += request.sequences[0].cost
        assert requests._load == left
    for request in open_requests:
        requests.abort(request)
    assert not requests.waiting_for()
