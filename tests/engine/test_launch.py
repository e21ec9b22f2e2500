"""Ranks as processes: they start, they are missed when they go, and they leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from fake_executor import SPEC, FakeExecutor, Slow, continuation

from soloist.engine.launch import LocalRanks, launch
from soloist.engine.meeting import Job
from soloist.engine.options import EngineOptions
from soloist.errors import ClusterError, ConfigurationError
from soloist.frontend.frontend import FrontEnd
from soloist.placement.placement import Placement
from soloist.scheduling.request import SamplingParams
from soloist.specs.layout import Layout

LONG = SamplingParams(max_tokens=200, ignore_eos=True)


def job(layout: str, **options) -> Job:
    parsed = Layout.parse(layout)
    options = EngineOptions(device="cpu", **{"deadline_s": 200.0, "transport": "gloo", "block_size": 4, **options})
    return Job(SPEC, parsed, Placement.linear(SPEC, parsed.ep), options)


class Cluster:
    """Local ranks with a fake executor, and a front end."""

    def __init__(self, layout: str, make_executor=FakeExecutor, **options) -> None:
        self.job = job(layout, **options)
        self.ranks = LocalRanks(self.job, make_executor)
        self.front = FrontEnd(self.job.layout, SPEC.vocab, self.ranks.hub, 200.0, self.ranks.ended)

    def __enter__(self) -> Cluster:
        try:
            self.front.wait_ready(200, lambda ranks: None)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.front.close()
        self.ranks.close(120 if not self.ranks.ended() else 0)
        assert not any(process.is_alive() for process in self.ranks.processes)
        assert not self.ranks.folder.exists()


class NoMemory(FakeExecutor):
    def allocate(self, blocks):
        raise ClusterError("no memory left")


def test_sixteen_ranks_serve_and_end_when_asked():
    with Cluster("ep16") as cluster:
        request = cluster.front.submit([1, 2], SamplingParams(max_tokens=3))
        while not request.done:
            cluster.front.pump()
        assert request.sequences[0].tokens == continuation([1, 2], 3)
    assert [process.exitcode for process in cluster.ranks.processes] == [0] * 16


def test_a_killed_rank_is_missed_at_once_and_named():
    with Cluster("ep2", Slow) as cluster:
        request = cluster.front.submit([1, 2], LONG)
        cluster.front.pump(most=1)
        start = time.monotonic()
        cluster.ranks.processes[1].kill()
        while not request.done:
            cluster.front.pump()
        assert request.error == "rank 1 was killed by SIGKILL"
        assert time.monotonic() - start < 100


def test_a_rank_that_fails_to_start_gives_its_reason():
    with pytest.raises(ClusterError, match=r"rank \d: no memory left"), Cluster("ep2", NoMemory):
        pass


def test_a_world_of_another_size_is_refused(monkeypatch):
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigurationError, match="WORLD_SIZE = 2: layout ep16 needs 16 ranks"):
        launch(job("ep16"))


def test_more_ranks_than_this_machine_can_hold_are_refused():
    with pytest.raises(ConfigurationError, match="layout = 'dp90000': 90000 processes of 0.15 GB or more do not fit"):
        launch(job("dp90000"))


SCRIPT = """
import sys, time
sys.path[:0] = [{tests!r}]
from test_launch import Cluster, LONG, Slow
cluster = Cluster("ep2", Slow)      # no __main__ guard, as in many a user's script
cluster.front.wait_ready(200, lambda ranks: None)
request = cluster.front.submit([1, 2], LONG)
print(cluster.ranks.folder, *(process.pid for process in cluster.ranks.processes), flush=True)
while not request.done:
    cluster.front.pump()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_ranks_die_with_their_parent_and_leave_no_files(tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    folder, *pids = parent.stdout.readline().split()
    if end == signal.SIGINT:
        os.killpg(parent.pid, end)  # Ctrl-C reaches the ranks, too
    else:
        parent.send_signal(end)
    parent.wait(120)
    parent.stdout.close()
    limit = time.monotonic() + 120
    while time.monotonic() < limit and (Path(folder).exists() or any(map(alive, pids))):
        time.sleep(0.05)
    assert not any(map(alive, pids))
    assert not Path(folder).exists()


def test_ctrl_c_during_the_imports_ends_the_process_that_forks_without_a_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nsignal.raise_signal(signal.SIGINT)\nos._exit(7)\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    code = [sys.executable, "-c", "import soloist.engine.preload"]
    done = subprocess.run(code, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
