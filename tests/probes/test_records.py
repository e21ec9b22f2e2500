"""What a measurement says of the code that made it."""

from __future__ import annotations

from pathlib import Path

import pytest

from soloist.probes.records import commit


def test_the_commit_of_a_copy_is_what_its_maker_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "records.py"
    copy.touch()
    monkeypatch.delenv("SOLOIST_COMMIT", raising=False)
    assert commit(copy) == "unknown"
    monkeypatch.setenv("SOLOIST_COMMIT", "0123abc")
    assert commit(copy) == "0123abc"
