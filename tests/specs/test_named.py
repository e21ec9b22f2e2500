from __future__ import annotations

from pathlib import Path

import pytest

from soloist.errors import ConfigurationError
from soloist.specs.hf import read_config
from soloist.specs.named import shape_of
from soloist.specs.presets import preset

NOVELS = Path(__file__).parents[2] / "models" / "novels-moe-11m"


def test_a_folder_and_a_preset_have_shapes() -> None:
    assert shape_of(NOVELS) == shape_of(str(NOVELS)) == read_config(NOVELS)
    assert shape_of("ref-16l-mlp-top1@2") == preset("ref-16l-mlp-top1@2")


def test_a_name_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no folder and no preset"):
        shape_of("ref-17l")
    with pytest.raises(ConfigurationError, match="no folder, and no owner/name"):
        shape_of(tmp_path / "none")
