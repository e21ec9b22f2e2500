"""What is found behind a model's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from soloist.engine.model import Model
from soloist.errors import CheckpointError

NOVELS = Path(__file__).parents[2] / "models" / "novels-moe-11m"


def test_a_tokenizer_is_read() -> None:
    assert Model.find(NOVELS, random_weights=False).read_tokenizer().encode("The old house").ids


@pytest.mark.parametrize("content", ["", "version https://git-lfs.github.com/spec/v1\n", "{}", "\xff"])
def test_a_file_that_is_no_tokenizer_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((NOVELS / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is no tokenizer"):
        Model.find(tmp_path, random_weights=False).read_tokenizer()
