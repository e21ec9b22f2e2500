"""From what a user calls a model to a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from soloist.errors import CheckpointError, ConfigurationError
from soloist.specs.hub import locate


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert locate(tmp_path) == locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["no-such-folder", "./a/b/c", "a b/c", "/nowhere/at-all"])
def test_neither_folder_nor_repository(name: str) -> None:
    with pytest.raises(ConfigurationError, match="is no folder, and no owner/name"):
        locate(name)


def test_a_repository_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="someone/some-model: cannot be downloaded .* give a local folder"):
        locate("someone/some-model")


def test_only_top_level_weights_and_configs_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []

    def download(repository: str, **options: object) -> str:
        asked.append({"repository": repository, **options})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("someone/some-model") == locate("someone/some-model", weights=False) == tmp_path
    assert [("*.safetensors" in call["allow_patterns"]) for call in asked] == [True, False]
    assert all(call["ignore_patterns"] == ["*/*"] for call in asked)
