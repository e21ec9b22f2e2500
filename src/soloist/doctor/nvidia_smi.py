"""What `nvidia-smi` prints, read: the query of GPUs, NVLinks, and the matrix of paths."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess

from soloist.doctor.machine import GpuFacts
from soloist.doctor.nvml import slowdowns

FIELDS: tuple[str, ...] = (
    "index", "name", "driver_version", "memory.total", "memory.free", "clocks.sm", "clocks.max.sm",
    "clocks_throttle_reasons.active", "power.limit", "power.default_limit", "temperature.gpu", "persistence_mode",
    "mig.mode.current", "ecc.errors.uncorrected.volatile.total", "pcie.link.width.current", "pcie.link.width.max",
)  # fmt: skip
QUERY = ("--query-gpu=" + ",".join(FIELDS), "--format=csv,noheader,nounits")
PATHS = r"NV\d+|PIX|PXB|PHB|NODE|SYS"
LIMIT_S = 20.0


def run(*arguments: str) -> str:
    """Its output, "" where there is no nvidia-smi or it fails."""
    if not shutil.which("nvidia-smi"):
        return ""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def gpus(query: str, nvlinks: str = "") -> tuple[tuple[GpuFacts, ...], str]:
    """From the output of `QUERY` and of `nvlink --status`: the GPUs and the driver's version."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(query)) if len(row) == len(FIELDS)]
    links = links_by_gpu(nvlinks)
    found = [dict(zip(FIELDS, row, strict=True)) for row in rows]
    return tuple(_facts(row, links) for row in found), found[0]["driver_version"] if found else ""


def _facts(row: dict[str, str], links: dict[int, tuple[int, int]]) -> GpuFacts:
    index = int(row["index"])
    up, total = links.get(index, (0, 0))
    number = {name: _number(row[name]) for name in FIELDS}
    return GpuFacts(
        index=index,
        name=row["name"],
        memory_bytes=round((number["memory.total"] or 0) * (1 << 20)),
        memory_free_bytes=round((number["memory.free"] or 0) * (1 << 20)),
        sm_clock_MHz=_whole(number["clocks.sm"]),
        sm_clock_max_MHz=_whole(number["clocks.max.sm"]),
        slowdowns=slowdowns(_mask(row["clocks_throttle_reasons.active"])),
        power_limit_W=number["power.limit"],
        power_default_W=number["power.default_limit"],
        temperature_C=_whole(number["temperature.gpu"]),
        persistence=_flag(row["persistence_mode"]),
        mig=_flag(row["mig.mode.current"]),
        uncorrected_errors=_whole(number["ecc.errors.uncorrected.volatile.total"]),
        pcie_width=_whole(number["pcie.link.width.current"]),
        pcie_width_max=_whole(number["pcie.link.width.max"]),
        nvlinks_up=up,
        nvlinks=total,
    )


def links_by_gpu(text: str) -> dict[int, tuple[int, int]]:
    """From `nvidia-smi nvlink --status`: by GPU, links that are up and links in all."""
    found: dict[int, tuple[int, int]] = {}
    gpu = -1
    for line in text.splitlines():
        if head := re.match(r"GPU (\d+):", line):
            gpu = int(head[1])
            found[gpu] = (0, 0)
        elif link := re.match(r"\s+Link \d+: (.*)", line):
            up, total = found[gpu]
            found[gpu] = (up + ("inactive" not in link[1].lower()), total + 1)
    return found


def paths(text: str) -> dict[str, str]:
    """From `nvidia-smi topo -m`: "GPU0 NIC3" → PIX and so on, for every pair with a GPU in it. NICs by device name."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    header = next((line.split() for line in lines if line.split()[:1] == ["GPU0"] and " X " not in f" {line} "), [])
    names = dict(re.findall(r"^\s*(NIC\d+):\s*(\S+)", "\n".join(lines), re.MULTILINE))
    columns = [name for name in header if re.fullmatch(r"GPU\d+|NIC\d+|mlx\d+_\d+", name)]
    found = {}
    for line in lines:
        row, *cells = line.split() or [""]
        if re.fullmatch(r"GPU\d+", row) and "X" in cells:
            for column, cell in zip(columns, cells, strict=False):
                if re.fullmatch(PATHS, cell):
                    found[f"{row} {names.get(column, column)}"] = cell
    return found


def cuda_version(text: str) -> tuple[int, int] | None:
    """The newest CUDA that the driver serves, from the head of plain `nvidia-smi`."""
    match = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], [Not Supported]
        return None


def _whole(number: float | None) -> int | None:
    return None if number is None else round(number)


def _mask(text: str) -> int:
    return int(text, 16) if text.startswith("0x") else 0


def _flag(text: str) -> bool | None:
    return {"Enabled": True, "Disabled": False}.get(text)
