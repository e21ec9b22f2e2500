"""The tables that calibrate and validate the cost model: CSV files whose columns are the fields of the rows below.

Rows have a role: `fit` rows may calibrate, `check` rows are only ever compared with. Unknown roles are kept and listed.
The tables that come with Soloist lie in `data/`; every row names its source.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from functools import cache
from math import inf
from pathlib import Path
from typing import TypeVar

import msgspec

from soloist.errors import ConfigurationError
from soloist.specs.files import read_text

PUBLISHED = Path(__file__).parent / "data"
WORDS = ("mode", "dispatch_dtype", "combine_dtype", "dtype", "precision", "phase", "metric", "collective")
MAY_BE_ZERO = ("columns", "output_tokens")  # of the numbers in a row


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What every table's rows have."""

    role: str
    source: str = ""

    def __post_init__(self) -> None:
        for key, value in zip(self.__struct_fields__, msgspec.structs.astuple(self), strict=True):
            if isinstance(value, float | int) and not isinstance(value, bool):
                least = 0 if key in MAY_BE_ZERO else 1 if isinstance(value, int) else sys.float_info.min
                if not least <= value < inf:
                    raise ValueError(f"{key} = {value} must be a finite number above zero")
        chosen, experts = getattr(self, "top_k", 1), getattr(self, "experts", 1)
        if chosen > experts:
            raise ValueError(f"top_k = {chosen} must be at most experts = {experts}")


class ExchangeRow(Row, frozen=True, kw_only=True):
    """Dispatch and combine of an expert-parallel group of `ep` groups of `tp` ranks. `tokens` per rank."""

    library: str
    mode: str
    fabric: str
    ep: int
    gpus_per_node: int
    tokens: int
    hidden: int
    top_k: int
    experts: int
    dispatch_dtype: str
    combine_dtype: str
    tp: int = 1
    dispatch_us: float | None = None
    combine_us: float | None = None

    @property
    def joined(self) -> int:
        """GPUs that NVLink joins: of a rack of 72 all of them, whatever a tray holds."""
        return max(self.gpus_per_node, 72) if "NVL72" in self.fabric else self.gpus_per_node


class CollectiveRow(Row, frozen=True, kw_only=True):
    """A collective over `gpus` GPUs of one node; `bytes` of each rank's buffer."""

    library: str
    fabric: str
    gpus: int
    collective: str
    bytes: int
    us: float


class ExpertRow(Row, frozen=True, kw_only=True):
    """The experts of one rank: `group_tokens` tokens of all `ep` ranks, routed as `routing` says.

    `library`: whose kernels, the source's where none is named; ours are two products that hold everything but what the
    exchange does, DeepGEMM's and InferSim's figures are products alone (`compute.PRODUCTS`), others whole layers.
    `active`: experts of the rank that had rows, where they were counted; as uniform routing has them otherwise.
    """

    gpu: str
    dtype: str
    hidden: int
    ffn: int
    experts: int
    top_k: int
    ep: int
    group_tokens: int
    routing: str
    us: float
    library: str = ""
    active: float | None = None


class MatmulRow(Row, frozen=True, kw_only=True):
    """One matrix multiplication, `[m, k] × [k, n]`, its weight read from memory."""

    gpu: str
    dtype: str
    m: int
    n: int
    k: int
    us: float


class StreamRow(Row, frozen=True, kw_only=True):
    """A copy within a GPU's memory: `bytes` read and as many written."""

    gpu: str
    bytes: int
    us: float


class SmallRow(Row, frozen=True, kw_only=True):
    """A layer's small kernels: its two norms with their residuals, rotation and cache, router and choice of slots.

    `columns`: of queries, keys and values side by side; 0 where these were left out.
    """

    gpu: str
    tokens: int
    hidden: int
    columns: int
    experts: int
    top_k: int
    us: float


class LaunchRow(Row, frozen=True, kw_only=True):
    """What the host takes to start one of `kernels` small kernels from Python, one after the other."""

    gpu: str
    kernels: int
    us: float


class AttentionRow(Row, frozen=True, kw_only=True):
    """Attention of one layer without its projections: `batch` sequences, `context` tokens each.

    `width`: of MLA's latent row in decode, else of a key and a value together. `kv_heads`: of grouped-query attention.
    `tokens`: in prefill, the last of the context that are new, where not all of them are.
    """

    gpu: str
    phase: str
    kind: str
    heads: int
    width: int
    batch: int
    context: int
    us: float
    kv_heads: int = 1
    dtype: str = "bf16"
    tokens: int | None = None

    @property
    def new(self) -> int:
        """Tokens of each sequence in this step."""
        return 1 if self.phase == "decode" else self.tokens or self.context


class DeploymentRow(Row, frozen=True, kw_only=True):
    """A whole deployment. `batch_per_gpu`: tokens a GPU in flight for prefill, sequences a GPU for decode."""

    system: str
    model: str
    gpu: str
    gpus: int
    layout: str
    precision: str
    phase: str
    input_tokens: int | None = None
    output_tokens: int | None = None
    batch_per_gpu: float | None = None
    context: int | None = None
    metric: str
    value: float
    unit: str


class RunRow(Row, frozen=True, kw_only=True):
    """Our own engine on the machine at hand (`soloist bench offline`): `sequences` in the whole deployment.

    `gpu`: a preset, where it was another than the calibration's. `tokens`: in prefill of each prompt, in decode the
    mean context. `seconds`: of all prompts, or of one step. `nvlink_sums`, `mixed_graphs`: as the engine was told.
    """

    system: str = "soloist"
    model: str
    layout: str
    phase: str
    sequences: int
    tokens: float
    seconds: float
    gpu: str = ""
    nvlink_sums: bool = True
    mixed_graphs: str = "off"


TABLES: dict[str, type[Row]] = {
    "all_to_all": ExchangeRow, "collectives": CollectiveRow, "moe_gemm": ExpertRow, "matmul": MatmulRow,
    "small": SmallRow, "attention": AttentionRow, "stream": StreamRow, "end_to_end": DeploymentRow, "runs": RunRow,
    "host": LaunchRow,
}  # fmt: skip
R = TypeVar("R", bound=Row)


def read_table(name: str, folder: str | Path | None = None) -> list[Row]:
    """Rows of a table; none where the folder has no such file. Raises ConfigurationError, naming file and line."""
    path = Path(folder or PUBLISHED) / f"{name}.csv"
    if not path.is_file():
        return []
    try:
        reader = csv.DictReader(read_text(path, "data").splitlines())
        if reader.fieldnames is None:
            raise ConfigurationError.of("data", str(path), "is empty; its first line names the columns")
        _check_columns(TABLES[name], reader.fieldnames, path)
        return [_row(TABLES[name], line, f"{path} line {reader.line_num}") for line in reader if any(line.values())]
    except csv.Error as error:
        raise ConfigurationError.of("data", str(path), f"cannot be read as CSV: {error}") from error


def _check_columns(kind: type[Row], found: Sequence[str], path: Path) -> None:
    needed = {field.name for field in msgspec.structs.fields(kind) if field.required}
    if absent := sorted(needed - set(found)):
        known = ", ".join(kind.__struct_fields__)
        raise ConfigurationError(f"{path} line 1: no column {', '.join(absent)}; the columns are {known}")


def read_measurements(path: str | Path) -> dict[str, list[Row]]:
    """Rows of our own measurements by table: JSON lines `{"what": table, "shape": {columns…}, "us": …, …}`.

    The measured value goes into the table's column `us`, `dispatch_us` or `combine_us` (by `shape.phase`), or `value`.
    Records of other kinds are left alone. Raises ConfigurationError, naming file and line.
    """
    tables: dict[str, list[Row]] = {name: [] for name in TABLES}
    if str(path).endswith(".csv"):
        raise ConfigurationError.of("data", str(path), "give the folder of CSV files, not one of them")
    for number, line in enumerate(read_text(path, "measurements").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            what = msgspec.json.decode(line, type=_Kind).what
            if what in RUNS:
                run = msgspec.json.decode(line, type=_Run)
                tables["runs"].append(_row(RunRow, run.columns(), where))
            elif what in TABLES:
                record = msgspec.json.decode(line, type=Measurement)
                tables[what].append(_row(TABLES[what], record.columns(), where))
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"{where}: {error}; a record has what, shape and us") from error
    return tables


class _Kind(msgspec.Struct, frozen=True):
    what: str


RUNS = {"prefill": "prefill", "TPOT": "decode"}  # what `soloist bench offline` calls the phases


class _Run(msgspec.Struct, frozen=True, kw_only=True):
    """A record of `soloist bench offline`. `shape` is `8x8000` for prefill, `256` sequences for decode."""

    what: str
    model: str
    layout: str
    shape: str
    seconds: float
    context: float = 192.0  # mean context of decode
    role: str = "check"
    source: str = "soloist bench offline"
    gpu: str = ""
    nvlink_sums: bool = True
    mixed_graphs: str = "off"

    def columns(self) -> dict[str, str | None]:
        """As a table's columns."""
        sequences, _, tokens = self.shape.partition("x")
        fields = {"role": self.role, "source": self.source, "model": self.model, "layout": self.layout}
        fields |= {"phase": RUNS[self.what], "sequences": sequences, "tokens": tokens or str(self.context)}
        fields |= {"gpu": self.gpu, "nvlink_sums": str(self.nvlink_sums).lower(), "mixed_graphs": self.mixed_graphs}
        return {**fields, "seconds": str(self.seconds)}


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One record of a measurement file. Fields beyond these (machine, ceiling, commit) are for people."""

    what: str
    shape: dict[str, str | float | None] = {}
    us: float | None = None
    role: str = "fit"
    source: str = "own measurement"

    def columns(self) -> dict[str, str | None]:
        """As a table's columns."""
        value = "us"
        if self.what == "all_to_all":
            value = f"{self.shape.get('phase', 'dispatch')}_us"
        filled = {"role": self.role, "source": self.source, **self.shape}
        if self.us is not None:
            filled[value] = self.us
        return {key: None if cell is None else str(cell) for key, cell in filled.items()}


@cache
def published(kind: type[R]) -> tuple[R, ...]:
    """Rows of that kind that come with Soloist, all roles."""
    name = next(name for name, row in TABLES.items() if row is kind)
    return tuple(row for row in read_table(name) if isinstance(row, kind))


def _row(kind: type[Row], line: dict[str, str | None], where: str) -> Row:
    """Columns that hold words of ours (`WORDS`) in either case."""
    given = {key: value for key, value in line.items() if key is not None and value not in ("", None)}
    filled = {key: value.lower() if value and key in WORDS else value for key, value in given.items()}
    try:
        return msgspec.convert(filled, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{where}: {error}; the columns are {', '.join(kind.__struct_fields__)}") from error
