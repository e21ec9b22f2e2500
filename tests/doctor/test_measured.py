"""Measurements beside expectations: the slow GPU or link is named; and the command on this machine."""

from __future__ import annotations

import json

import msgspec
import pytest
import torch
from outputs import gpu_line, hgx
from typer.testing import CliRunner

import soloist.doctor.measured as module
from soloist import cli
from soloist.doctor.examination import examine_host
from soloist.doctor.measured import Measured, check_measured, measure
from soloist.planner.plan import Plan
from soloist.specs.cluster import cluster, preset_gpus
from tests.ranks import RankPool

NAMES = tuple(f"GPU {i}" for i in range(4))
LINK = 390e9


def measured(**changes) -> Measured:
    pairs = tuple(tuple(0.0 if a == b else LINK for b in range(4)) for a in range(4))
    usual = {"names": NAMES, "memory": (3.0e12,) * 4, "arithmetic": (770e12,) * 4, "pairs": pairs}
    return Measured(**{**usual, "exchange": 370e9, "all_reduce": 360e9, **changes})


def faults(found: Measured, **more) -> list[str]:
    gpu = preset_gpus()["H100-80GB"]
    return [finding.what for finding in check_measured(found, gpu, **more) if finding.severity != "ok"]


def test_a_fit_node_has_no_fault():
    assert faults(measured()) == []


def test_the_slow_gpu_is_named():
    (told,) = faults(measured(arithmetic=(770e12, 770e12, 520e12, 765e12)))
    assert told == "GPU 2 is slow: 520 TFLOP/s (usual here 768 TFLOP/s, datasheet 989 TFLOP/s)"
    (told,) = faults(measured(memory=(3.0e12, 1.6e12, 3.0e12, 3.0e12)))
    assert told.startswith("GPU 1 is slow: 1.6 TB/s")


def test_all_equally_slow_are_told_by_the_datasheet():
    assert len(faults(measured(memory=(1.5e12,) * 4))) == 4


def test_the_slow_link_is_named_by_its_direction():
    pairs = [list(row) for row in measured().pairs]
    pairs[3][0] = 20e9
    (told,) = faults(measured(pairs=tuple(map(tuple, pairs))))
    assert told.startswith("GPU 3 → GPU 0 is slow: 20 GB/s")


def test_links_across_nodes_are_measured_against_their_own_kind():
    pairs = tuple(tuple(0.0 if a == b else LINK if a // 2 == b // 2 else 45e9 for b in range(4)) for a in range(4))
    nodes = msgspec.structs.replace(cluster("h100-ib"), gpus_per_node=2)
    assert faults(measured(pairs=pairs), cluster=nodes) == []
    slow = tuple(tuple(rate if (a, b) != (0, 2) else 4e9 for b, rate in enumerate(row)) for a, row in enumerate(pairs))
    (told,) = faults(measured(pairs=slow), cluster=nodes)
    assert told.startswith("GPU 0 → GPU 2 is slow: 4 GB/s (usual here 45 GB/s")


def measure_briefly(transport) -> Measured:
    module.MESSAGE_BYTES = {"cpu": 1 << 16}
    return measure(torch.device("cpu"), "CPU", transport)


def test_all_ranks_measure_together(ranks: RankPool):
    first, second = ranks.run(2, "local", measure_briefly)
    assert first == second
    assert first.names == ("CPU 0", "CPU 1")
    assert min(*first.memory, *first.arithmetic, first.pairs[0][1], first.pairs[1][0], first.exchange) > 0


# -- against a plan --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    arguments = ["plan", "mixtral-8x7b", "--cluster", "h100-ib", "--gpus", "4", "--out", str(file)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    return str(file)


def test_a_node_as_planned(plan):
    findings = examine_host(hgx(), Plan.load_file(plan))
    assert [f.what for f in findings if f.check == "plan" and f.severity == "ok"][0].endswith("as found here")


def test_a_node_unlike_the_plan(plan):
    lines = [gpu_line(i, "NVIDIA H200", memory__free=20000) for i in range(3)]
    told = [f.what for f in examine_host(hgx(lines=lines), Plan.load_file(plan)) if f.check == "plan"]
    assert told[0] == "3 GPUs, the plan puts 4 ranks on a node"
    assert told[1] == "this is NVIDIA H200, the plan is for H100-80GB"
    assert [text.split(",")[0] for text in told[2:]] == [f"GPU {i} has 21.0 GB free" for i in range(3)]


def test_the_command_here(plan, monkeypatch):
    monkeypatch.setenv("NCCL_LL_THRESHOLD", "0")
    result = CliRunner().invoke(cli.app, ["doctor", plan, "--json", "--no-measure"])
    told = {(entry["severity"], entry["check"]) for entry in json.loads(result.stdout)}
    assert ("warning", "environment") in told
    if not torch.cuda.is_available():
        assert result.exit_code == 1  # the plan wants GPUs
        assert ("error", "plan") in told


def test_a_file_that_is_no_plan(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    result = CliRunner().invoke(cli.app, ["doctor", str(tmp_path / "plan.json")])
    assert result.exit_code == cli.USER_ERROR
    assert "is not a plan file" in result.stderr
