"""Who am I: what each launcher of ranks tells them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from soloist.engine.meeting import Meeting, Place, place_from
from soloist.errors import ClusterError, ConfigurationError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script, which srun has not started
        (TORCHRUN, Place(5, 8, 1, 4)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "3",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            },
            Place(3, 4, 3, 4),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}, Place(1, 2, 0, 1)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, Place(0, 1, 0, 1)),
        (
            {
                "SLURM_PROCID": "9",
                "SLURM_STEP_NUM_TASKS": "16",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
            },
            Place(9, 16, 1, 8),
        ),
        (TORCHRUN | {"PMI_RANK": "0", "PMI_SIZE": "1"}, Place(5, 8, 1, 4)),
    ],
)
def test_a_launcher_is_understood(environment, place):
    assert place_from(environment) == place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "8"}, "RANK = 8: must lie between 0 and WORLD_SIZE - 1 = 7"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE = 'many': must be a number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK = '': must be a number"),
    ],
)
def test_what_makes_no_sense_is_named(change, message):
    with pytest.raises(ConfigurationError, match=message):
        place_from(TORCHRUN | change)


def test_addresses_are_found_where_they_were_announced(tmp_path):
    one, other = (Meeting.in_folder(tmp_path, Place(rank, 2, rank, 2)) for rank in range(2))
    assert one.address("leader 0") == f"ipc://{tmp_path}/leader-0"
    one.announce("leader 0", "tcp://10.0.0.1:5")
    assert other.find("leader 0") == "tcp://10.0.0.1:5"


@pytest.mark.usefixtures("threads_end")
def test_ranks_that_cannot_meet_are_told_where_they_tried(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ClusterError, match="rank 1 of 2 cannot meet the others at 127.0.0.1:1"):
        Meeting.at_master(Place(1, 2, 1, 2), deadline_s=1)


def test_a_name_that_nobody_announces_is_told(tmp_path):
    meeting = Meeting.in_folder(tmp_path, Place(0, 1, 0, 1))
    meeting.store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(ClusterError, match="nobody announced the leader 7 in time"):
        meeting.find("leader 7")


def test_without_a_folder_ranks_listen_on_any_port():
    assert Meeting(Place(0, 2, 0, 1), store=None, host="10.0.0.7").address("front end") == "tcp://10.0.0.7:*"
