"""Ranks that somebody else started: who is missing, comes twice or differs is named to all of them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from fake_executor import SPEC
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from soloist.engine.meeting import Job, Meeting, Place, bounded, first_host, master_from
from soloist.engine.options import EngineOptions
from soloist.engine.roll_call import TWICE, await_everybody, checkpoint_digest, disagreement, passport_of, roll_call
from soloist.errors import ClusterError, ConfigurationError
from soloist.placement.placement import Placement
from soloist.specs.layout import Layout


def job(layout: str = "ep4", **options) -> Job:
    parsed = Layout.parse(layout)
    return Job(SPEC, parsed, Placement.linear(SPEC, parsed.ep), EngineOptions(**options))


def call(
    ranks: list[int],
    size: int,
    jobs: dict[int, Job] | None = None,
    deadline_s: float = 60.0,
    store: HashStore | None = None,
    rank_0_after: str = "",
) -> dict[int, str]:
    """What each of these ranks is told; "" where it may go on. Rank 0 comes when that key of the store is set."""
    store, told = store or HashStore(), {}

    def answer(rank: int, name: int) -> None:
        place = Place(rank, size, rank, size)
        while rank == 0 and rank_0_after and not store.check([rank_0_after]):
            time.sleep(0.01)
        try:
            roll_call(store, place, passport_of((jobs or {}).get(rank, job()), place), deadline_s)
            told[name] = ""
        except ClusterError as error:
            told[name] = str(error)

    together([lambda rank=rank, name=name: answer(rank, name) for name, rank in enumerate(ranks)])
    return told


def together(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)


def test_ranks_of_one_mind_go_on():
    assert call([0, 1, 2, 3], 4) == dict.fromkeys(range(4), "")


def test_a_missing_rank_is_named_to_all_others():
    start = time.monotonic()
    told = call([0, 1, 3], 4, deadline_s=4.0)
    assert time.monotonic() - start < 60
    for name, rank in enumerate([0, 1, 3]):
        assert told[name].startswith(f"rank {rank}: rank 2 of 4 did not come within 4 s: see whether they were started")


def test_without_rank_0_the_others_say_so():
    told = call([1, 2], 3, deadline_s=0.2)
    assert told[0].startswith("rank 1: rank 0 came to no verdict within 0.2 s")


NAMED = f"rank 1 came twice, from {socket.gethostname()} and {socket.gethostname()}: give every node its own node rank"


@pytest.mark.parametrize("size", [2, 3])  # in the second case rank 2 is missing, since another took its place
def test_a_rank_that_comes_twice_is_named_to_all(size):
    told = call([1, 1, 0], size, rank_0_after=TWICE)
    assert len(told) == 3
    assert all(NAMED in text for text in told.values())


def test_who_comes_twice_when_the_others_have_gone_on_is_turned_away_alone():
    store = HashStore()
    assert call([0, 1], 2, store=store) == {0: "", 1: ""}
    assert NAMED in call([1], 2, store=store)[0]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (
            job("tp2ep2"),
            "layout = ep2tp2 on rank 2, ep4 on the others, placement = ",
        ),
        (job(transport="gloo"), "option transport = gloo on rank 2, auto on the others"),
        (replace(job(), placement=Placement.linear(SPEC, 2)), "placement = "),
    ],
)
def test_who_differs_is_named_to_all_with_what(other, what):
    told = call([0, 1, 2, 3], 4, {2: other})
    assert all(f"rank {rank}: " in text and what in text for rank, text in told.items())


def test_versions():
    one = {"soloist": "0.1.0", "torch": "2.13.0"}
    other = {"soloist": "0.1.1", "torch": "2.13.0"}
    remedy = "install the same version on every node"
    assert disagreement([one, other, one]) == f"soloist = 0.1.1 on rank 1, 0.1.0 on the others: {remedy}"
    assert disagreement([one, other]) == f"soloist = 0.1.1 on rank 1, 0.1.0 on the others: {remedy}"
    assert disagreement([other, one, one]) == f"soloist = 0.1.1 on rank 0, 0.1.0 on the others: {remedy}"


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=9))
def test_the_fewer_are_named(values):
    text = disagreement([{"torch": value} for value in values])
    assert (text == "") == (len(set(values)) == 1)
    if text:
        assert text.count(" on the others") == 1
        assert values.count(text.removeprefix("torch = ")[0]) <= len(values) / 2


def test_checkpoints_differ_by_header_or_size(tmp_path: Path):
    def weights(name: str, header: bytes, data: bytes) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
        return folder

    one = weights("one", b'{"a":1}', b"1234")
    assert checkpoint_digest(one) == checkpoint_digest(weights("same", b'{"a":1}', b"1234"))
    for name, header, data in (("header", b'{"a":2}', b"1234"), ("size", b'{"a":1}', b"12")):
        assert checkpoint_digest(weights(name, header, data)) != checkpoint_digest(one)


# -- where rank 0 is ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[007-010,012]", "gpu007"), ("a1,a2", "a1"), ("n[3,5]-ib", "n3-ib"), ("login", "login"), ("", "")],
)
def test_first_host_of_a_slurm_list(nodes, host):
    assert first_host(nodes) == host


def test_where_rank_0_is():
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "gpu[1-2]"}
    assert master_from({}) == ("127.0.0.1", 29500)
    assert master_from(slurm) == ("gpu1", 29500)
    assert master_from(slurm | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}) == ("10.0.0.1", 4000)
    with pytest.raises(ConfigurationError, match="MASTER_PORT = 70000: must lie between"):
        master_from({"MASTER_PORT": "70000"})


@pytest.mark.parametrize("manner", ["silent", "closes", "talks"])
@pytest.mark.usefixtures("threads_end")
def test_an_address_where_something_else_listens(monkeypatch, manner):
    """Other programs' ports must not hold a rank up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while manner != "silent":
                try:
                    connection, _ = server.accept()
                    if manner == "talks":
                        connection.sendall(b"220 mail.example.org\r\n" * 20)
                    connection.close()
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        start = time.monotonic()
        with pytest.raises(ClusterError, match="rank 1 of 2 cannot meet the others at 127.0.0.1.*check MASTER_ADDR"):
            Meeting.at_master(Place(1, 2, 1, 2), deadline_s=0.5)
        assert time.monotonic() - start < 60


@pytest.mark.usefixtures("threads_end")
def test_a_port_that_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(ClusterError, match="rank 0 of 2.*MASTER_PORT free on it"):
            Meeting.at_master(Place(0, 2, 0, 2), deadline_s=20)


def test_what_takes_too_long():
    never = threading.Event()
    with pytest.raises(TimeoutError, match="0.1 s"):
        bounded(never.wait, 0.1)
    never.set()
    assert bounded(lambda: timedelta(1), 60) == timedelta(1)


def test_nobody_goes_on_before_the_last_has_loaded() -> None:
    store, went_on = HashStore(), []

    def rank(number: int) -> None:
        await_everybody(store, Place(number, 3, number, 3), 60.0, "loaded")
        went_on.append(number)

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in (0, 2)]
    for thread in threads:
        thread.start()
    while store.add("loaded", 0) < 2:
        time.sleep(0.01)
    assert went_on == []
    rank(1)
    for thread in threads:
        thread.join(60)
    assert sorted(went_on) == [0, 1, 2]


def test_who_has_not_loaded_in_time_is_named() -> None:
    with pytest.raises(ClusterError, match=r"rank 1: ranks 0, 2 had not loaded within 0\.2 s"):
        await_everybody(HashStore(), Place(1, 3, 1, 3), 0.2, "loaded")
