"""NumPy archives of plain arrays that users name: damaged in whatever way, they are one kind of error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def read_arrays(path: Path) -> dict[str, Array]:
    """All arrays of an archive, by name. Raises OSError where it cannot be read, ValueError where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib, NumPy and its parser of headers each have errors of their own
        raise ValueError(f"is no archive of arrays, or a damaged one: {error!r}") from error
