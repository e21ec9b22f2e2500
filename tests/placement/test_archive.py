"""Files with bytes changed, left out or cut off: read as something, or refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soloist.errors import ConfigurationError
from soloist.placement.archive import read_arrays
from soloist.placement.formats import export_placement, import_placement
from soloist.placement.placement import Placement
from soloist.placement.sglang import read_sglang_dumps
from soloist.placement.torch_file import read_torch_file
from soloist.placement.trace import RoutingTrace
from tests.placement.cases import random_trace, tiny_spec

SPEC = tiny_spec()
COUNTS = np.ones((1, 2, 6), np.int64)
FORMS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {  # how it is written, and read
    "trace": (random_trace().save, RoutingTrace.load),
    "eplb.npz": (
        lambda path: export_placement(Placement.linear(SPEC, 2), SPEC, "eplb", path),
        lambda path: import_placement(SPEC, 2, "eplb", path),
    ),
    "dump.npz": (
        lambda path: np.savez_compressed(path, logical_count=COUNTS),
        lambda path: read_sglang_dumps(SPEC, [path]),
    ),
    "dump.pt": (
        lambda path: torch.save({"logical_count": torch.from_numpy(COUNTS)}, path),
        lambda path: read_torch_file(path),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_damage_of_any_kind_is_a_users_error(form: str, tmp_path: Path) -> None:
    write, read = FORMS[form]
    write(tmp_path / form)
    whole, choose = (tmp_path / form).read_bytes(), random.Random(form)
    for _ in range(300):
        content, at = bytearray(whole), choose.randrange(len(whole))
        damage = choose.choice(("change", "change", "leave out", "cut off"))
        if damage == "change":
            content[at] ^= choose.randrange(1, 256)
        else:
            del content[at : at + choose.randrange(1, 20) if damage == "leave out" else len(whole)]
        (tmp_path / form).write_bytes(content)
        with suppress(ConfigurationError):
            read(tmp_path / form)


def test_arrays_and_what_is_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=COUNTS)
    assert read_arrays(tmp_path / "a.npz")["a"].tolist() == COUNTS.tolist()
    np.save(tmp_path / "lone.npy", COUNTS)
    with pytest.raises(ValueError, match="no archive"):
        read_arrays(tmp_path / "lone.npy")
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "none.npz")
