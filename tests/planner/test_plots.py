"""A picture that cannot be drawn for want of matplotlib is told, and nothing else is hidden."""

from __future__ import annotations

from pathlib import Path

import pytest

from soloist.planner.plots import drawn


def lacks(module: str):
    def draw(path: Path) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    return draw


def test_a_picture_without_matplotlib(capsys: pytest.CaptureFixture[str]) -> None:
    assert drawn(lacks("matplotlib"), Path("x.png")) == []
    assert "no x.png: it needs matplotlib" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError, match="other"):
        drawn(lacks("other"), Path("x.png"))


def test_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    assert drawn(Path.touch, path) == [path]
    assert path.exists()
