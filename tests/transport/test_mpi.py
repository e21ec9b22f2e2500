"""MPI under its own mpirun: the conformance suite, who is named for a lost peer, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from soloist.engine.options import EngineOptions
from soloist.errors import ClusterError, ConfigurationError
from soloist.transport.mpi_options import MpiOptions
from soloist.transport.mpi_process import check_launcher, family
from tests.mpirun import mpirun, needs_mpirun
from tests.transport.conformance import CHECKS

MPICH = "MPICH Version:      5.0.2\nMPICH Release date: ..."
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11\0"


@needs_mpirun
def test_conformance_and_lost_peers():
    options = '{"message_bytes": 65536}'  # large rows then go in many messages
    run = mpirun(3, "-m", "tests.transport.conformance", "failures", SOLOIST_TRANSPORT="mpi", SOLOIST_MPI=options)
    told = run.stdout  # in which mpirun joins the ranks' lines as they come, sometimes without the end of one between
    assert told.count(" passed") == len(CHECKS) + 1, run.stderr  # and the reductions
    for rank in (0, 1):
        assert f"one_stops: rank {rank}: rank 2: no answer within 4 s (in layer 3, dispatch)" in told
        assert f"one_closes: rank {rank}: rank 2: has closed (in layer 1, attention)" in told
    assert "one_never_sends: rank 0: rank 2: no answer within 4 s (in stage 1, input)" in told


@pytest.mark.parametrize(
    ("library", "environment"),
    [
        (MPICH, {"MPI_LOCALNRANKS": "2", "PMI_SIZE": "2"}),
        (OPEN_MPI, {"OMPI_COMM_WORLD_SIZE": "2"}),
        (MPICH, {"OMPI_COMM_WORLD_SIZE": "2", "MPI_LOCALNRANKS": "2"}),  # one inside the other: the sizes decide
        (OPEN_MPI, {"PMI_SIZE": "2"}),  # srun --mpi=pmi2
        ("Cray MPICH", {}),
    ],
)
def test_launchers_that_fit(library, environment):
    check_launcher(library, environment)


@pytest.mark.parametrize(
    ("library", "environment", "message"),
    [
        (MPICH, {"OMPI_COMM_WORLD_SIZE": "4"}, "started by Open MPI's mpirun, but mpi4py uses MPICH 5.0.2.*openmpi"),
        (OPEN_MPI, {"MPI_LOCALNRANKS": "4"}, "started by MPICH's mpirun, but mpi4py uses Open MPI v5.0.11.*mpich"),
    ],
)
def test_launcher_of_another_mpi_is_refused(library, environment, message):
    with pytest.raises(ClusterError, match=message):
        check_launcher(library, environment)


@needs_mpirun
def test_a_launcher_that_mpi_does_not_know_is_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from soloist.transport.mpi import MpiTransport\n"
        "MpiTransport.world(1, 4, torch.device('cpu'), 1.0)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=280, check=False)
    assert "this is rank 1 of 4, but to MPICH" in run.stderr
    assert "rank 0 of 1: start the ranks with that MPI's mpirun" in run.stderr


def test_options_from_the_command_line():
    options = EngineOptions.of({"transport": "mpi", "mpi.progress": "library", "mpi.message_bytes": "1024"})
    assert options.mpi == MpiOptions(progress="library", message_bytes=1024)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mpi.progres": "thread"}, "mpi.progres = 'thread': is no engine option; there is mpi.progress"),
        ({"mpi.progress": "magic"}, "mpi.progress = 'magic': Invalid enum value"),
        ({"mpi.message_bytes": "0"}, "mpi.message_bytes = 0: must lie between"),
        ({"mpi.thread_level": "funneled"}, "mpi.thread_level = 'funneled': excludes mpi.progress = thread"),
    ],
)
def test_options_that_cannot_be(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        EngineOptions.of(fields)


def test_names_of_libraries():
    assert (family(MPICH), family(OPEN_MPI)) == ("MPICH 5.0.2", "Open MPI v5.0.11")
