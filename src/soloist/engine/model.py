"""From what a user calls a model to its spec and files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from soloist.engine.options import EngineOptions
from soloist.errors import ConfigurationError
from soloist.specs.hf import read_config
from soloist.specs.hub import locate
from soloist.specs.model import ModelSpec
from soloist.specs.presets import PRESETS, preset


@dataclass(frozen=True)
class Model:
    """A shape, and the folder of its checkpoint if it has one."""

    spec: ModelSpec
    folder: Path | None

    @classmethod
    def find(cls, name: str | Path, options: EngineOptions) -> Model:
        """A folder, a hub id (`owner/name`, downloaded), or the name of a preset, which runs with random weights.

        Raises ConfigurationError for a name that is nothing of these, CheckpointError where it cannot be fetched.
        """
        if str(name) in PRESETS:
            if options.random_weights is None:
                remedy = "a preset has no weights: give random_weights a seed"
                raise ConfigurationError.of("model", str(name), remedy)
            return cls(preset(str(name)), None)
        folder = locate(name, weights=options.random_weights is None)
        return cls(read_config(folder), folder)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's file, None if there is none."""
        file = self.folder / "tokenizer.json" if self.folder else None
        return file if file and file.exists() else None
