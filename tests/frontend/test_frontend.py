"""The front end against ranks that are sockets in the same thread: readiness, waking, and who is to blame."""

from __future__ import annotations

import pytest

from soloist.errors import CheckpointError, ClusterError, RequestError
from soloist.frontend import frontend
from soloist.frontend.frontend import FrontEnd
from soloist.frontend.sockets import Hub, Spoke
from soloist.frontend.wire import (
    Abort,
    Delta,
    Loading,
    RankError,
    Ready,
    Shutdown,
    Starting,
    Submit,
    ToFrontEnd,
    Tokens,
    ToLeader,
    Wake,
    WakeMe,
)
from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.request import SamplingParams
from soloist.scheduling.scheduler import SchedulerStats
from soloist.specs.layout import Layout

STATS = SchedulerStats(0, 1, 0, 1, 8, 0, 0, 0)
SIZES = SchedulerConfig(blocks=8, block_size=4, max_positions=64)


class World:
    """A front end, and the ranks' ends of its connections."""

    def __init__(self, folder, layout: str, deadline_s: float) -> None:
        self.gone: dict[int, str] = {}
        self.hub: Hub[ToFrontEnd] = Hub(f"ipc://{folder}/front", ToFrontEnd)
        self.front = FrontEnd(Layout.parse(layout), 50, self.hub, deadline_s, lambda: self.gone)
        self.ranks = [Spoke(self.hub.address, rank, ToLeader) for rank in range(self.front.layout.size)]

    def ready(self) -> World:
        for rank, spoke in enumerate(self.ranks):
            spoke.send(Ready(SIZES if rank in self.front.leaders else None))
        self.front.wait_ready(60, lambda ranks: None)
        return self

    def close(self) -> None:
        self.front.close()
        for spoke in self.ranks:
            spoke.close()


@pytest.fixture
def world(short_path):
    worlds = []

    def make(layout: str, deadline_s: float = 60.0) -> World:
        worlds.append(World(short_path, layout, deadline_s))
        return worlds[-1]

    yield make
    for made in worlds:
        made.close()


def test_ready_means_every_rank(world):
    ep2 = world("ep2")
    seen = []
    ep2.ranks[0].send(Loading(1000))
    ep2.ranks[1].send(Starting("weights"))
    ep2.ranks[0].send(Ready(SIZES))
    while not (ep2.front.ranks[0].ready and ep2.front.ranks[1].phases):
        ep2.front.pump(5)
    with pytest.raises(
        ClusterError, match=r"ranks \[1\] were not ready after start_deadline_s = 0.3; rank 1 had come to: weights"
    ):
        ep2.front.wait_ready(0.3, lambda ranks: seen.append(ranks[0].bytes_read))
    assert seen[-1] == 1000


def test_leaders_that_have_had_no_work_are_known_to_be_empty(world):
    ranks = world("pp2ep2").ready().front.ranks
    assert [report.stats and report.stats.blocks_total for report in ranks.values()] == [8, 8, None, None]


def test_a_start_fails_with_the_ranks_own_error(world):
    ep2 = world("ep2")
    ep2.ranks[1].send(RankError("CheckpointError", "x.safetensors: truncated", "trace"))
    with pytest.raises(CheckpointError, match="rank 1: x.safetensors: truncated") as failure:
        ep2.front.wait_ready(60, lambda ranks: None)
    assert failure.value.__notes__ == ["trace"]


def test_only_leaders_get_work_and_only_their_replica_is_woken(world):
    dp2 = world("dp2tp2").ready()
    assert dp2.front.leaders == (0, 2)
    request = dp2.front.submit([1, 2], SamplingParams(n=2, seed=1))
    for leader, spoke in ((0, dp2.ranks[0]), (2, dp2.ranks[2])):
        submit = spoke.receive(60)
        assert isinstance(submit, Submit)
        assert submit in [sequence.submit for sequence in request.sequences if sequence.leader == leader]
    dp2.ranks[2].send(WakeMe(1))
    dp2.ranks[2].send(WakeMe(1))
    dp2.front.pump(60)
    dp2.front.pump(0.05)
    assert dp2.ranks[2].receive(60) == Wake(0, 1)
    assert [spoke.receive(0.05) for spoke in dp2.ranks] == [None] * 4


def test_leaders_that_step_together_are_woken_together_once_for_each_sleep(world):
    ep4 = world("ep4").ready()
    for rank, generation in ((1, 1), (3, 1), (3, 2), (0, 2), (2, 1)):
        ep4.ranks[rank].send(WakeMe(generation))
        ep4.front.pump(60)
    for spoke in ep4.ranks:
        assert [spoke.receive(60), spoke.receive(60), spoke.receive(0.05)] == [Wake(0, 1), Wake(0, 2), None]


def test_tokens_reach_their_request_and_an_abort_its_leader(world):
    ep2 = world("ep2").ready()
    one, two = (ep2.front.submit([1], SamplingParams(max_tokens=3)) for _ in range(2))
    first, second = (request.sequences[0].submit.sequence for request in (one, two))
    ep2.ranks[0].send(Tokens(1, (Delta(first, (7,), "a", "stop"),), STATS))
    assert ep2.front.pump(60) == [one]
    assert one.done
    assert ep2.front.ranks[0].stats == STATS
    ep2.front.abort(two)
    assert [type(ep2.ranks[1].receive(60)) for _ in range(2)] == [Submit, Abort]
    ep2.ranks[1].send(Tokens(1, (Delta(second, (7,), "a"),), STATS))
    assert ep2.front.pump(60) == []


def test_a_request_that_cannot_fit_is_refused_at_the_door(world):
    ep2 = world("ep2").ready()
    with pytest.raises(RequestError, match="KV blocks"):
        ep2.front.submit([1] * 30, SamplingParams(max_tokens=20))
    assert ep2.ranks[0].receive(0.05) is None


@pytest.mark.parametrize(
    ("errors", "gone", "blamed"),
    [
        ([(0, "CommunicationError", "rank 1 is late"), (1, "ValueError", "bug")], {}, "rank 1: ValueError: bug"),
        ([(1, "CapacityError", "no memory")], {}, "rank 1: no memory"),
        ([(0, "CommunicationError", "rank 1 is late")], {1: "was killed by SIGKILL"}, "rank 1 was killed by SIGKILL"),
        ([(0, "CommunicationError", "rank 1 is late")], {0: "ended with exit code 1"}, "rank 0: rank 1 is late"),
        ([], {1: "ended with exit code 1"}, "rank 1 ended with exit code 1"),
    ],
)
def test_the_rank_to_blame_is_named_not_the_first_to_complain(world, errors, gone, blamed):
    ep2 = world("ep2").ready()
    request = ep2.front.submit([1], SamplingParams())
    for rank, kind, text in errors:
        ep2.ranks[rank].send(RankError(kind, text, ""))
    ep2.gone = gone
    while not request.done:
        ep2.front.pump(0.05)
    assert request.error == blamed
    with pytest.raises(ClusterError if "memory" not in blamed else Exception, match=blamed):
        ep2.front.submit([1], SamplingParams())


class Queue:
    """A hub whose messages have all come."""

    def __init__(self, *messages):
        self.messages = list(messages)

    def receive(self, timeout_s):
        return self.messages.pop(0) if self.messages else None


def test_a_front_end_that_was_held_up_hears_all_there_is_before_it_blames(monkeypatch):
    monkeypatch.setattr(frontend, "GRACE_S", -1.0)
    late, bug = RankError("CommunicationError", "rank 1 is late", ""), RankError("ValueError", "bug", "")
    front = FrontEnd(Layout.parse("ep2"), 50, Queue((0, late), (1, bug)), 60.0, lambda: {1: "ended with exit code 1"})
    front.pump(most=1)
    assert str(front.failure) == "rank 1: ValueError: bug"


def test_a_leader_with_work_must_speak(world):
    ep2 = world("ep2", deadline_s=1.0).ready()
    request = ep2.front.submit([1], SamplingParams())
    while not request.done:
        ep2.front.pump(0.05)
    assert request.error == "ranks [0] have work and said nothing for 2 s"


def test_close_ends_ranks_and_requests_and_can_be_repeated(world):
    ep2 = world("ep2").ready()
    request = ep2.front.submit([1], SamplingParams())
    ep2.front.close()
    ep2.front.close()
    assert request.error == "the engine was closed"
    assert isinstance(ep2.ranks[1].receive(60), Shutdown)
    with pytest.raises(ClusterError, match="closed"):
        ep2.front.submit([1], SamplingParams())


def test_an_address_in_use_is_told(world, tmp_path):
    hub: Hub[ToFrontEnd] = Hub("tcp://127.0.0.1:*", ToFrontEnd)
    with pytest.raises(ClusterError, match="cannot listen on tcp"):
        Hub(hub.address, ToFrontEnd)
    hub.close()
