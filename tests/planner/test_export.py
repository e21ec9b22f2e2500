"""A plan in other engines' words."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from soloist.errors import ConfigurationError
from soloist.planner.calibration import Calibration
from soloist.planner.export import export
from soloist.planner.halves import Halves
from soloist.planner.kernels import Kernels
from soloist.planner.layer import Deployment
from soloist.planner.plan import Plan, plan_of
from soloist.planner.precision import Precision
from soloist.planner.runtime import Runtime
from soloist.planner.score import Options, Scorer
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.presets import preset
from soloist.specs.workload import Load


def plan(layout: str, model: str = "qwen3-30b-a3b") -> Plan:
    spec, used, load = preset(model), Calibration.published(), Load.parse("prompt=1000,output=200")
    scorer = Scorer(Kernels(cluster("dgx-h100"), used), Runtime.named("soloist", used), load)
    deployment = Deployment(model=spec, layout=Layout.parse(layout), precision=Precision.named("bf16"))
    return plan_of(scorer.score(deployment, Options(), 8), cluster("dgx-h100"), load, used.name)


def lines(layout: str, engine: str, folder: Path, **environment: str) -> list[str]:
    return list(export(plan(layout), engine, folder, environment))


def test_commands(tmp_path: Path) -> None:
    assert lines("ep8", "vllm", tmp_path)[0].startswith(
        "command: vllm serve Qwen/Qwen3-30B-A3B -tp 1 -dp 8 --enable-expert"
    )
    assert "--tp-size 8" in lines("ep8", "sglang", tmp_path)[0]
    assert "--tp_size 8 --ep_size 8 --pp_size 1" in lines("ep8", "tensorrt", tmp_path)[0]
    assert lines("ep8", "soloist", tmp_path)[0].startswith("command: soloist serve Qwen/Qwen3-30B-A3B --layout ep8")


def test_halves_that_overlap_are_said_to_those_that_know_them(tmp_path: Path) -> None:
    made = plan("ep8")
    halved = msgspec.structs.replace(made, halves=Halves(prefill=4096, decode=64))
    found = {engine: next(export(halved, engine, tmp_path, {})) for engine in ("soloist", "vllm")}
    assert found["soloist"].endswith(" --set overlap=prefill=4096,decode=64")
    assert found["vllm"].endswith(" --enable-dbo")
    assert any("two half batches" in line for line in export(halved, "tensorrt", tmp_path, {}))
    of_another = msgspec.structs.replace(halved, system="vllm")  # what pays there says nothing of our own engine
    for whole in (made, of_another):
        assert "overlap" not in next(export(whole, "soloist", tmp_path, {}))


def test_a_shape_without_a_checkpoint(tmp_path: Path) -> None:
    found = plan("ep8", "ref-16l")
    assert next(export(found, "vllm", tmp_path, {})) == "no command: ref-16l is a shape without a checkpoint"
    assert "serve ref-16l --random-weights 1 --layout" in next(export(found, "soloist", tmp_path, {}))


def test_what_cannot_be_said_is_said(tmp_path: Path) -> None:
    assert any("vLLM 0.33 has no released form" in line for line in lines("ep8", "vllm", tmp_path))
    assert lines("dp2ep4", "vllm", tmp_path)[0].startswith("2 replicas are so many servers")
    assert any(line.startswith("no command: vllm has no flags for") for line in lines("ep4tp2", "vllm", tmp_path))


def test_placement_and_environment(tmp_path: Path) -> None:
    found = lines("ep8", "sglang", tmp_path, NCCL_TREE_THRESHOLD="0")
    assert len(json.loads((tmp_path / "placement.json").read_text())["physical_to_logical_map"]) == 48
    assert any(line.startswith("set now: NCCL_TREE_THRESHOLD: obsolete") for line in found)
    assert any("NCCL_LL_THRESHOLD" in line for line in found)


def test_one_group_needs_no_placement(tmp_path: Path) -> None:
    for engine in ("sglang", "tensorrt", "eplb"):
        assert "no placement: one group of GPUs holds all experts" in lines("tp2", engine, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_spaces_is_quoted_in_flags(tmp_path: Path) -> None:
    folder = tmp_path / "my plans"
    folder.mkdir()
    assert any(f"--init-expert-location '{folder}/placement.json'" in line for line in lines("ep8", "sglang", folder))


def test_an_unknown_engine(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="choose one of"):
        lines("ep8", "nonsense", tmp_path)
