from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from soloist.cli import app
from soloist.placement.placement import Placement

MODEL = str(Path(__file__).parents[2] / "models" / "novels-moe-11m")


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})
    return result.exit_code, result.output


def test_solve_export_and_import(tmp_path: Path) -> None:
    placement, exported, back = tmp_path / "p.json", tmp_path / "p.yaml", tmp_path / "b.json"
    status, text = run("placement", "solve", MODEL, "--layout", "ep4", "--gpus-per-node", 2, "-o", placement)
    assert status == 0
    assert "solved" in text
    assert run("placement", "show", placement, "--trace", f"{MODEL}/routing.trace", "--gpus-per-node", 2)[0] == 0
    assert run("placement", "export", placement, MODEL, "--format", "tensorrt", "-o", exported)[0] == 0
    assert run("placement", "import", exported, MODEL, "--format", "tensorrt", "--groups", 4, "-o", back)[0] == 0
    assert Placement.load(back) == Placement.load(placement)


@pytest.mark.parametrize(
    "words",
    [
        ("solve", "ref-16l", "--layout", "ep16", "--trace", f"{MODEL}/routing.trace"),
        ("solve", MODEL, "--layout", "ep4", "--nic", -1),
        ("export", "none.json", MODEL, "--format", "sglang", "-o", "x"),
        ("read-dumps", MODEL, "none.npz"),
    ],
    ids=["another model's trace", "negative weight", "no such placement", "no such dump"],
)
def test_mistakes_are_the_users(words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("placement", *words)[0] == 2
    assert not list(tmp_path.iterdir())
