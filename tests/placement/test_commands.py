from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from soloist.errors import ConfigurationError
from soloist.placement import commands
from soloist.placement.layer import Weights
from soloist.placement.placement import Placement
from soloist.placement.trace import RoutingTrace
from soloist.specs.named import shape_of

MODEL = Path(__file__).parents[2] / "models" / "novels-moe-11m"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_solve_show_export_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    placement, sglang, back = tmp_path / "p.json", tmp_path / "s.json", tmp_path / "b.json"
    commands.run_solve(str(MODEL), "ep8", placement, gpus_per_node=4, slots=3)
    shown = capsys.readouterr().out
    assert "greedy" in shown
    assert "lower bound" in shown
    commands.run_show(placement, MODEL / "routing.trace", gpus_per_node=4, layer=5)
    shown = capsys.readouterr().out
    assert "6 MoE layers of 16 experts on 8 groups, 24 to 24 slots" in shown
    assert "2 nodes" in shown
    commands.run_export(placement, str(MODEL), "sglang", sglang)
    assert "--ep-num-redundant-experts 8" in capsys.readouterr().out
    commands.run_import(sglang, str(MODEL), "sglang", 8, back)
    assert Placement.load(back) == Placement.load(placement)


def test_solve_from_a_current_placement_on_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    commands.run_solve(str(MODEL), "ep8tp2", first, cluster="h100-ib")
    commands.run_solve(str(MODEL), "ep8tp2", second, cluster="h100-ib", current=first, weights=Weights(migration=100))
    assert Placement.load(first) == Placement.load(second)


def test_traces_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="novels-moe-11m.*ref-16l"):
        commands.run_solve("ref-16l", "ep16", tmp_path / "p.json", MODEL / "routing.trace")
    with pytest.raises(ConfigurationError, match=r"routing\.trace"):
        commands.run_solve("ref-16l", "ep16", tmp_path / "p.json")
    placement = tmp_path / "p.json"
    Placement.linear(shape_of(str(MODEL)), 4).save(placement)
    with pytest.raises(ConfigurationError, match="layer = 6"):
        commands.run_show(placement, layer=6)


def test_dumps_become_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "d.npz", logical_count=np.ones((2, 6, 16), np.int64))
    commands.run_read_dumps(str(MODEL), [tmp_path / "d.npz"], tmp_path / "t.trace")
    assert "counts only" in capsys.readouterr().out
    trace = RoutingTrace.load(tmp_path / "t.trace")
    assert trace.counts_LE.tolist() == [[2] * 16] * 6
    commands.run_solve(str(MODEL), "ep4", tmp_path / "p.json", tmp_path / "t.trace", gpus_per_node=2)
