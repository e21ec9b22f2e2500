"""Steps, sleep, failures: ranks that are threads and have no model."""

from __future__ import annotations

import random
import threading
import time
from contextlib import contextmanager

import pytest
from fake_executor import SPEC, VOCAB, Deployment, FakeExecutor, continuation
from hypothesis import given, settings
from hypothesis import strategies as st
from test_detokenise import BYTES

from soloist.errors import ClusterError, RequestError
from soloist.frontend.wire import Abort, Shutdown, Submit
from soloist.scheduling.request import SamplingParams

LAYOUTS = ["ep1", "ep4", "pp2", "pp2ep2", "tp2", "dp2ep2", "attn2ep4pp2"]


@pytest.fixture(params=[*LAYOUTS, "ep1 ahead", "ep4 ahead", "tp2 ahead", "dp2ep2 ahead"])
def deployment(request, short_path):
    layout, *ahead = request.param.split()
    with Deployment(short_path, layout, ahead="on" if ahead else "off") as deployment:
        yield deployment


@pytest.fixture
def text_deployment(short_path):
    """One that has a tokenizer: token i is a byte."""
    BYTES.save(str(short_path / "tokenizer.json"))
    with Deployment(short_path, "ep2", tokenizer=short_path / "tokenizer.json") as deployment:
        yield deployment


def prompts(count: int) -> list[list[int]]:
    return [[1 + (7 * i + j) % (VOCAB - 1) for j in range(1 + 3 * i % 11)] for i in range(count)]


# -- steps ----------------------------------------------------------------------------------------------------------
def test_every_request_gets_its_own_continuation(deployment):
    requests = [deployment.front.submit(prompt, SamplingParams(max_tokens=9)) for prompt in prompts(12)]
    deployment.finish(*requests)
    for request in requests:
        (sequence,) = request.sequences
        assert sequence.tokens == continuation(request.prompt, 9)
        assert sequence.finish_reason == ("stop" if sequence.tokens[-1] in SPEC.eos_ids else "length")
        assert sequence.margin == min(sequence.tokens)
        assert [entry.token for entry in sequence.logprobs] == sequence.tokens


def test_all_sleep_and_wake_again_and_again(deployment):
    """Requests come one by one, so that each may find some leaders asleep and others on their way to it."""
    wait = random.Random(5)
    for prompt in prompts(25):
        assert deployment.answer(prompt, max_tokens=2) == continuation(prompt, 2)
        time.sleep(wait.choice((0, 0, 0.0003, 0.001, 0.003)))


def test_more_work_than_the_cache_holds_is_done_in_turn(deployment):
    """64 blocks of 4 tokens: sequences are preempted and come back."""
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    requests = [deployment.front.submit(prompt, params) for prompt in prompts(12)]
    deployment.finish(*requests)
    for request in requests:
        assert request.sequences[0].tokens == continuation(request.prompt, 60, ignore_eos=True)


def test_an_aborted_request_leaves_nothing_behind_and_others_go_on(deployment):
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    long, other = (deployment.front.submit([5, 6], params) for _ in range(2))
    while len(long.sequences[0].tokens) < 3:
        deployment.front.pump(most=1)  # message by message: on a busy machine there is always one more
    deployment.front.abort(long)
    assert long.sequences[0].finish_reason == "abort"
    deployment.finish(other)
    assert other.sequences[0].tokens == continuation([5, 6], 200, ignore_eos=True)
    deployment.finish(*(deployment.front.submit([9], SamplingParams(max_tokens=1)) for _ in deployment.front.leaders))
    for leader in deployment.front.leaders:
        assert deployment.front.ranks[leader].stats.blocks_used == 0
    assert len(long.sequences[0].tokens) < 200


def test_figures_come_from_every_rank_awake_or_asleep(deployment):
    deployment.answer([1, 2], max_tokens=2)
    for _ in range(2):
        assert set(deployment.front.figures()) == set(range(deployment.layout.size))


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.booleans()), min_size=1, max_size=25), st.data())
def test_whatever_comes_and_goes_is_accounted_for(tmp_path_factory, work, data):
    """Requests of any length, some of them aborted at any time, over a pipeline and several leaders."""
    with Deployment(tmp_path_factory.mktemp("any"), "pp2ep2") as deployment:
        requests = []
        for length, max_tokens, doomed in work:
            params = SamplingParams(max_tokens=max_tokens)
            requests.append(deployment.front.submit(range(1, length + 1), params))
            for _ in range(data.draw(st.integers(0, 3))):
                deployment.front.pump(0.001)
            if doomed:
                deployment.front.abort(requests[-1])
        deployment.finish(*requests)
        for request in requests:
            expected = continuation(request.prompt, request.params.max_tokens)
            (sequence,) = request.sequences
            assert sequence.tokens == expected[: len(sequence.tokens)]
            assert sequence.finish_reason == "abort" or sequence.tokens == expected


# -- text -----------------------------------------------------------------------------------------------------------
def test_a_stop_string_ends_text_and_sequence(text_deployment):
    tokens = continuation([5, 6, 7], 30, ignore_eos=True)
    whole = BYTES.decode(tokens)
    stop = whole[10:13]
    params = SamplingParams(max_tokens=30, stop=(stop, "never"), ignore_eos=True)
    request = text_deployment.front.submit([5, 6, 7], params)
    text_deployment.finish(request)
    (sequence,) = request.sequences
    assert sequence.finish_reason == "stop"
    assert sequence.text == whole[: whole.find(stop)]
    assert len(sequence.tokens) < 30
    assert sequence.tokens == tokens[: len(sequence.tokens)]


def test_without_a_tokenizer_stop_strings_are_refused_and_others_unharmed(short_path):
    with Deployment(short_path, "ep2") as deployment:
        refused = deployment.front.submit([1], SamplingParams(stop=("x",)))
        served = deployment.front.submit([1], SamplingParams(max_tokens=3))
        deployment.finish(refused, served)
        assert "no tokenizer" in refused.error
        assert served.sequences[0].tokens == continuation([1], 3)


# -- requests that cannot be served ---------------------------------------------------------------------------------
class SmallCache(FakeExecutor):
    kv_blocks = 16


def test_what_can_never_fit_is_refused_at_the_door(short_path):
    with Deployment(short_path, "ep2", SmallCache) as deployment:
        for prompt, params, reason in (
            (range(1, 50), SamplingParams(max_tokens=20), "needs 17 KV blocks of 4 tokens, the whole cache has 16"),
            ([1] * 256, SamplingParams(max_tokens=1), "at most 256 positions"),
            ([], SamplingParams(), "at least one token"),
            ([3, VOCAB], SamplingParams(), f"token {VOCAB}"),
            ([1], SamplingParams(stop=("a",) * 17), "at most 16 texts"),
            ([1], SamplingParams(temperature=-1.0), "temperature"),
        ):
            with pytest.raises(RequestError, match=reason):
                deployment.front.submit(prompt, params)
        assert deployment.answer([1, 2], max_tokens=3) == continuation([1, 2], 3)


def test_what_only_the_leader_refuses_ends_in_an_error_of_that_request(short_path):
    with Deployment(short_path, "ep2") as deployment:
        request = deployment.front.requests.accept([1] * 300, SamplingParams())  # past the door
        deployment.hub.send([request.sequences[0].leader], request.sequences[0].submit)
        other = deployment.front.submit([2], SamplingParams(max_tokens=2))
        deployment.finish(request, other)
        assert "positions" in request.error
        assert other.error is None


# -- failures -------------------------------------------------------------------------------------------------------
class BreaksAt13(FakeExecutor):
    """Rank 1 fails in the step that computes token 13."""

    def answer(self, chunk):
        if self.world.seat.rank == 1 and 13 in chunk.tokens:
            raise ValueError("thirteen")
        return super().answer(chunk)


class HangsAt13(FakeExecutor):
    """Rank 1 does not come back from the step that computes token 13."""

    release = threading.Event()

    @classmethod
    @contextmanager
    def until_the_end(cls):
        cls.release.clear()
        try:
            yield
        finally:
            cls.release.set()

    def answer(self, chunk):
        if self.world.seat.rank == 1 and 13 in chunk.tokens:
            self.release.wait(400)
        return super().answer(chunk)


@pytest.mark.parametrize("layout", ["ep2", "tp2", "pp2"])
def test_a_failing_rank_ends_all_requests_with_its_name_and_reason(short_path, layout):
    with Deployment(short_path, layout, BreaksAt13, deadline_s=5.0) as deployment:
        requests = [deployment.front.submit([13], SamplingParams()) for _ in range(4)]
        deployment.finish(*requests)
        assert {request.error for request in requests} == {"rank 1: ValueError: thirteen"}
        with pytest.raises(ClusterError, match="thirteen") as failure:
            deployment.front.submit([1], SamplingParams())
        assert "fake" in failure.value.__notes__[0] or "test_rank" in failure.value.__notes__[0]


@pytest.mark.parametrize("layout", ["ep2", "tp2", "pp2"])
def test_a_hanging_rank_ends_all_requests_within_the_deadline(short_path, layout):
    with Deployment(short_path, layout, HangsAt13, deadline_s=4.0) as deployment, HangsAt13.until_the_end():
        start = time.monotonic()
        requests = [deployment.front.submit([13], SamplingParams()) for _ in range(4)]
        deployment.finish(*requests)
        assert time.monotonic() - start < 100
        assert all("rank 1" in request.error for request in requests), requests[0].error


def test_a_leader_that_says_nothing_is_missed(short_path):
    """Nobody waits for a lone rank, so nobody else can report it."""

    class Alone(HangsAt13):
        def answer(self, chunk):
            self.release.wait(400)

    with Deployment(short_path, "ep1", Alone, deadline_s=0.5) as deployment, Alone.until_the_end():
        request = deployment.front.submit([1], SamplingParams())
        deployment.finish(request)
        assert "ranks [0] have work and said nothing for 1 s" in request.error


def test_a_rank_that_cannot_start_fails_the_start(short_path):
    class Broken(FakeExecutor):
        def __init__(self, job, world, *rest):
            super().__init__(job, world, *rest)
            if world.seat.rank == 1:
                raise ValueError("no weights")

    deployment = Deployment(short_path, "tp2", Broken, start_deadline_s=4.0)  # as long as its leader waits for it
    with pytest.raises(ClusterError, match="rank 1: ValueError: no weights"), deployment:
        pass


def test_closing_ends_what_is_under_way(short_path):
    with Deployment(short_path, "pp2ep2") as deployment:
        request = deployment.front.submit([1], SamplingParams(max_tokens=250, ignore_eos=True))
        deployment.front.pump(most=1)
    assert request.error == "the engine was closed"


def test_messages_for_sequences_that_are_gone_do_no_harm(short_path):
    with Deployment(short_path, "ep2") as deployment:
        deployment.hub.send([0, 1], Abort(77))
        assert deployment.answer([4], max_tokens=2) == continuation([4], 2)
        deployment.hub.send([0], Submit(78, (1,), SamplingParams(max_tokens=1)))  # of nobody: its tokens are dropped
        assert deployment.answer([4], max_tokens=2) == continuation([4], 2)
        deployment.hub.send([0, 1], Shutdown())
