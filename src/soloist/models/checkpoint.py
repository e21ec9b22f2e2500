"""Weights from safetensors: the logical weights of a spec, each read in the rectangle that a rank keeps.

The names come from `models/families.py`, the files from `models/shards.py`. fp8 and MXFP4 are dequantised on the
target device while reading.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from soloist.errors import CheckpointError
from soloist.models.families import MXFP4_GROUP, Stored, is_harmless, locations
from soloist.models.quantised import FP8_BLOCK, dequantise_fp8, dequantise_mxfp4
from soloist.models.reading import THREADS
from soloist.models.shards import Shards
from soloist.models.weights import Span, dtype_of
from soloist.moe.reader import Fp8Form
from soloist.specs.hub import locate
from soloist.specs.model import ModelSpec
from soloist.specs.parameters import Param, Shape, parameters

_PLAIN = ("F64", "F32", "BF16", "F16")
_SHOWN = 5  # tensors that a message lists


class Checkpoint:
    """The `WeightSource` of a checkpoint folder, or of a repository on the Hugging Face hub.

    The headers of all files are checked against the spec at once: anything missing, left over, duplicated, truncated
    or of a wrong shape or dtype raises CheckpointError. Values that are not finite do so when they are read.
    `bytes_read` counts bytes of the files, so quantised weights count as what they occupy there; `progress` is called
    with each increment, and `total_bytes` is what reading everything once would give. `read` may be called from
    several threads, and should be: one weight is often less than a disk needs to have in hand.
    """

    threads = THREADS

    def __init__(
        self,
        model: Path | str,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.spec, self.dtype, self.device = spec, dtype, torch.device(device)
        self._shards = Shards(locate(model), progress, pinned=self.device.type == "cuda")
        self._places: dict[Param, tuple[Stored, Shape]] = {}
        self._own = threading.local()  # each thread's last slab of interleaved weights
        self._check()

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return self._shards.bytes_read

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors that the model needs."""
        names = {name for place, _ in self._places.values() for name in self._tensors(place)}
        return sum(self._shards.tensors[name].bytes for name in names)

    def read(self, param: Param, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """See `WeightSource`."""
        place, shape = self._places[param]
        spans = [span or (0, n) for n, span in zip(shape, (rows, columns), strict=False)]
        assert all(0 <= start <= stop <= n for n, (start, stop) in zip(shape, spans, strict=True)), (param, spans)
        sizes = [stop - start for start, stop in spans]
        out = torch.empty(sizes, dtype=dtype_of(param, self.dtype), device=self.device)
        if out.numel():
            out.copy_(self._values(place, spans))
            self._refuse_not_finite(out, place.tensor)
        return out

    def fp8_form(self, param: Param) -> Fp8Form | None:
        """See `Fp8Reader`."""
        place, _ = self._places[param]
        form = self._form_of(place)
        return form if form == "row" or (form == "block" and place.first % FP8_BLOCK == 0) else None

    def read_fp8(self, param: Param, rows: Span | None = None, columns: Span | None = None) -> tuple[Tensor, Tensor]:
        """See `Fp8Reader`."""
        place, shape = self._places[param]
        (start, stop), across = (span or (0, n) for n, span in zip(shape, (rows, columns), strict=True))
        weight, scale = self._fetch_fp8(place, (place.first + start, place.first + stop), across)
        self._refuse_not_finite(weight.bfloat16(), place.tensor)
        self._refuse_not_finite(scale, self._scales(place.tensor))
        return weight, scale.float().squeeze(1) if self._form_of(place) == "row" else scale.float()

    def _form_of(self, place: Stored) -> Fp8Form | None:
        if self._shards.tensors[place.tensor].dtype != "F8_E4M3":
            return None
        return "row" if self._scales(place.tensor).endswith("_scale") else "block"

    def _values(self, place: Stored, spans: list[Span]) -> Tensor:
        """The wanted rectangle in any float dtype; may be a view of memory that is not the caller's."""
        (start, stop), *inner = spans
        group = place.first % place.step  # interleaved weights are read together, and told apart afterwards
        first = place.first - group
        slab = self._read_slab(place, (first + place.step * start, first + place.step * stop), inner)
        return slab[group :: place.step]

    def _read_slab(self, place: Stored, outer: Span, inner: list[Span]) -> Tensor:
        """Rows `outer` of a tensor; the last slab of interleaved weights is kept for the sibling, which comes next."""
        key = (place.tensor, place.index, outer, *inner)
        kept = getattr(self._own, "slab", None)
        if kept is not None and kept[0] == key:
            return kept[1]
        slab = self._read_transposed(place, outer, inner) if place.transposed else self._read_rows(place, outer, inner)
        self._own.slab = (key, slab) if place.step > 1 else None
        return slab

    def _read_transposed(self, place: Stored, outer: Span, inner: list[Span]) -> Tensor:
        return self._fetch(place.tensor, place.index, [*inner, outer]).t()

    def _read_rows(self, place: Stored, outer: Span, inner: list[Span]) -> Tensor:
        if place.form == "mxfp4":
            return self._read_mxfp4(place, outer, inner[0])
        if self._shards.tensors[place.tensor].dtype == "F8_E4M3":
            return self._read_fp8(place, outer, inner[0])
        return self._fetch(place.tensor, place.index, [outer, *inner])

    def _read_fp8(self, place: Stored, rows: Span, columns: Span) -> Tensor:
        weight, scale = self._fetch_fp8(place, rows, columns)
        return dequantise_fp8(weight, scale, rows[0] % FP8_BLOCK, columns[0] % FP8_BLOCK)

    def _fetch_fp8(self, place: Stored, rows: Span, columns: Span) -> tuple[Tensor, Tensor]:
        """Values, and the scales of all blocks that they touch, or of their rows `[rows, 1]`."""
        by_row = self._form_of(place) == "row"
        scaled = [rows, (0, 1)] if by_row else [_touched(span, FP8_BLOCK) for span in (rows, columns)]
        scale = self._fetch(self._scales(place.tensor), place.index, scaled).clone()  # the next read may overwrite it
        return self._fetch(place.tensor, place.index, [rows, columns]), scale

    def _read_mxfp4(self, place: Stored, rows: Span, columns: Span) -> Tensor:
        groups = _touched(columns, MXFP4_GROUP)
        blocks = self._fetch(place.tensor, place.index, [rows, groups])
        values = dequantise_mxfp4(blocks, self._fetch(self._scales(place.tensor), place.index, [rows, groups]))
        start = columns[0] - groups[0] * MXFP4_GROUP
        return values[:, start : start + columns[1] - columns[0]]

    def _fetch(self, tensor: str, index: int | None, spans: list[Span]) -> Tensor:
        """A rectangle as it is in the file, on the target device."""
        head = () if index is None else (index,)
        return self._shards.read(tensor, *head, *(slice(*span) for span in spans)).to(self.device)

    def _refuse_not_finite(self, values: Tensor, tensor: str) -> None:
        low, high = torch.aminmax(values)
        if not (low.isfinite() & high.isfinite()):
            count = int((~values.isfinite()).sum())
            path = self._shards.tensors[tensor].path
            kind = str(values.dtype).removeprefix("torch.")
            raise CheckpointError(f"{tensor}: expected finite numbers in {path}, found {count} that are not, as {kind}")

    def _check(self) -> None:
        """Find every weight, and refuse what is missing, of a wrong shape, or left over."""
        missing: list[str] = []
        used: set[str] = set()
        for param, shape in parameters(self.spec):
            options = list(locations(self.spec, param, shape))
            place = next((option for option in options if option.tensor in self._shards.tensors), None)
            if place is None:
                missing.append(f"{options[-1 if options[0].form == 'mxfp4' else 0].tensor} ({param})")
                continue
            self._places[param] = (place, shape)
            if place.tensor not in used:
                self._check_tensor(place, is_matrix=len(shape) == 2)
                used.update(self._tensors(place))
        self._refuse("missing", list(dict.fromkeys(missing)))
        left = [name for name in self._shards.tensors.keys() - used if not is_harmless(self.spec, name)]
        self._refuse("left over", sorted(left))

    def _tensors(self, place: Stored) -> list[str]:
        """The tensors that hold a weight: itself, and its scales where it is quantised."""
        quantised = place.form == "mxfp4" or self._shards.tensors[place.tensor].dtype == "F8_E4M3"
        return [place.tensor, self._scales(place.tensor)] if quantised else [place.tensor]

    def _scales(self, tensor: str) -> str:
        """The name of what holds a tensor's scales; that of blocks where none is there."""
        if tensor.endswith("_blocks"):
            return tensor.removesuffix("_blocks") + "_scales"
        by_block, by_row = f"{tensor}_scale_inv", f"{tensor}_scale"
        return by_row if by_row in self._shards.tensors and by_block not in self._shards.tensors else by_block

    def _check_tensor(self, place: Stored, is_matrix: bool) -> None:
        if place.form == "mxfp4":
            self._expect(place.tensor, place.shape, ("U8",))
            self._expect(self._scales(place.tensor), place.shape[:-1], ("U8",))
            return
        may_be_fp8 = is_matrix and not place.transposed
        self._expect(place.tensor, place.shape, (*_PLAIN, "F8_E4M3") if may_be_fp8 else _PLAIN)
        if self._shards.tensors[place.tensor].dtype == "F8_E4M3":
            *head, rows, columns = place.shape
            of_blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
            size = (rows, 1) if self._form_of(place) == "row" else of_blocks
            self._expect(self._scales(place.tensor), (*head, *size), _PLAIN)

    def _expect(self, name: str, shape: Shape, dtypes: tuple[str, ...]) -> None:
        found = self._shards.tensors.get(name)
        if found is None:
            raise CheckpointError(f"{name}: is missing; it should hold scales of shape {shape}")
        if found.shape != shape:
            raise CheckpointError(f"{name}: expected shape {shape}, found {found.shape} in {found.path}")
        if found.dtype not in dtypes:
            raise CheckpointError(f"{name}: expected dtype {' or '.join(dtypes)}, found {found.dtype} in {found.path}")

    def _refuse(self, what: str, names: list[str]) -> None:
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            shown = ", ".join(names[:_SHOWN])
            raise CheckpointError(f"{self._shards.folder}: {len(names)} tensors {what}: {shown}{more}")


def _touched(span: Span, block: int) -> Span:
    """The blocks that a span touches."""
    return span[0] // block, -(-span[1] // block)
