"""From what a user calls a model to its shape: a folder, a repository of the hub, or a preset."""

from __future__ import annotations

from pathlib import Path

from soloist.specs.hf import read_config
from soloist.specs.hub import locate
from soloist.specs.model import ModelSpec
from soloist.specs.presets import preset


def is_folder_or_hub_id(name: Path | str) -> bool:
    """What is not the name of a preset."""
    return Path(name).expanduser().is_dir() or "/" in str(name)


def shape_of(name: Path | str) -> ModelSpec:
    """The spec as the checkpoint has it; weights are not fetched. Raises what `locate`, `read_config`, `preset` do."""
    return read_config(locate(name, weights=False)) if is_folder_or_hub_id(name) else preset(str(name))
