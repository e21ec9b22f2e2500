"""From what a user calls a model to its spec and files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from soloist.errors import CheckpointError, ConfigurationError
from soloist.specs.hf import read_config
from soloist.specs.hub import locate
from soloist.specs.model import ModelSpec
from soloist.specs.named import is_folder_or_hub_id
from soloist.specs.presets import preset


@dataclass(frozen=True)
class Model:
    """A shape, and the folder of its checkpoint if it has one."""

    spec: ModelSpec
    folder: Path | None

    @classmethod
    def find(cls, name: Path | str, random_weights: bool) -> Model:
        """A folder, a hub id (`owner/name`, downloaded), or the name of a preset, which runs with random weights only.

        Random weights are in the model's own data type, whatever the checkpoint has.

        Raises ConfigurationError for a name that is none of these, CheckpointError where a model cannot be fetched.
        """
        if is_folder_or_hub_id(name):
            folder = locate(name, weights=not random_weights)
            spec = read_config(folder)
            return cls(msgspec.structs.replace(spec, fp8_experts=False) if random_weights else spec, folder)
        spec = preset(str(name))
        if not random_weights:
            raise ConfigurationError.of("model", str(name), "a preset has no weights: give random_weights a seed")
        return cls(spec, None)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's file, None if there is none."""
        file = self.folder / "tokenizer.json" if self.folder else None
        return file if file and file.exists() else None

    def read_tokenizer(self) -> Any:
        """The tokenizer, None if there is none. Raises CheckpointError for a file that holds something else."""
        if self.tokenizer is None:
            return None
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self.tokenizer))
        except Exception as error:  # the library has no other kind
            raise CheckpointError(f"{self.tokenizer}: is no tokenizer ({error}); download it again") from error
