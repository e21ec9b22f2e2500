"""One measurement as a line of a calibration file, and what all lines of a run have in common."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Record:
    """`what` is a table of the planner (`planner/tables.py`), `shape` its columns; the measured column is `us`."""

    what: str
    shape: Mapping[str, Any]
    seconds: float

    def line(self, **common: object) -> str:
        """As JSON; `us` is the median."""
        fields = {"what": self.what, "shape": dict(self.shape), "us": round(1e6 * self.seconds, 4), **common}
        return json.dumps(fields, separators=(",", ":"))


def commit(file: Path = Path(__file__)) -> str:
    """The commit of the checkout that `file` belongs to, "-dirty" behind it where something was changed since.

    A copy that no checkout knows, though it may lie in the folder of some repository: SOLOIST_COMMIT, or "unknown".
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(file.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    found = git("ls-files", file.name) and git("describe", "--always", "--dirty", "--exclude=*")
    return found or os.environ.get("SOLOIST_COMMIT", "unknown")


def device_name(device: torch.device) -> str:
    """As people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() or "CPU"
