"""A node as the machine itself describes it: `nvidia-smi topo -m` and NCCL's topology XML → `ClusterSpec`.

Both name the links between the GPUs of one node. Rates follow from the number of NVLinks and the rate of one link;
GPUs without NVLink between them talk over PCIe or the socket link, whose rates below are what such paths usually give.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import msgspec

from soloist.errors import ConfigurationError
from soloist.specs.cluster import ClusterSpec, preset_gpus
from soloist.specs.files import read_text

LINKS_OF = {"A100-80GB": 12, "H100-80GB": 18, "H800": 8, "H200": 18, "H20": 18, "B200": 18, "GB200": 18}
UNDERLINE = r"\x1b?\[[0-9;]+m"  # around the header; texts that were copied from a web page have lost the escape
NIC_GBPS = 50.0  # of a NIC whose rate nobody says: 400 Gb/s
PATH_GBPS = {"PIX": 25.0, "PXB": 24.0, "PHB": 20.0, "NODE": 18.0, "SYS": 12.0}


def is_topology(text: str) -> bool:
    """Whether it may be one of the two."""
    return text.lstrip().startswith("<") or re.search(rf"^\s*({UNDERLINE})?\s*GPU0\s", text, re.MULTILINE) is not None


def read_topology(path: str | Path, gpu: str, nic_GBps: float = NIC_GBPS) -> ClusterSpec:
    """A node from a file of either kind. `gpu`: a preset's name, or its part before the memory (`H100`). `nic_GBps` of
    a NIC, where the file does not say it.

    Raises ConfigurationError for a file that cannot be read or is neither, and for an unknown GPU.
    """
    text = read_text(path, "topology")
    known = preset_gpus()
    name = next((key for key in known if gpu.lower() in (key.lower(), key.split("-")[0].lower())), None)
    if name is None:
        missing = "is no preset GPU" if gpu else "the file does not say which GPU it is"
        raise ConfigurationError.of("gpu", gpu or None, f"{missing}; write {path}#GPU with one of {', '.join(known)}")
    return from_nccl_xml(text, name) if text.lstrip().startswith("<") else from_nvidia_smi(text, name, nic_GBps)


def from_nvidia_smi(text: str, gpu: str, nic_GBps: float = NIC_GBPS) -> ClusterSpec:
    """`nvidia-smi topo -m` of one node. `gpu` names a preset GPU; the text does not say the NICs' rate.

    Raises ConfigurationError where the text holds no GPU matrix or an unknown kind of path.
    """
    lines = [re.sub(UNDERLINE, "", line).split() for line in text.splitlines()]
    header = next((line for line in lines if line[:1] == ["GPU0"] and "X" not in line), None)
    rows = [line for line in lines if line and re.fullmatch(r"GPU\d+", line[0]) and "X" in line]
    if header is None or not rows:
        raise ConfigurationError.of("topology", text[:40], "holds no GPU matrix; give the output of nvidia-smi topo -m")
    gpus = [name for name in header if re.fullmatch(r"GPU\d+", name)]
    named = {line[0] for line in lines if "X" in line[1:]}  # older drivers print devices: mlx5_0, bnxt_re0
    nics = [name for name in header if name not in gpus and (name in named or re.fullmatch(r"NIC\d+", name))]
    if len(rows) != len(gpus) or any(len(row) < 1 + len(gpus) for row in rows):
        remedy = f"the header names {len(gpus)} GPUs; give the whole matrix of one node"
        raise ConfigurationError.of("topology", f"{len(rows)} rows of GPUs", remedy)
    links = tuple(tuple(_rate(cell, gpu) for cell in row[1 : 1 + len(gpus)]) for row in rows)
    return _node(gpu, links, nics=len(nics), nic_GBps=nic_GBps * min(1.0, len(nics) / len(gpus)), source="nvidia-smi")


def from_nccl_xml(text: str, gpu: str) -> ClusterSpec:
    """The file that NCCL writes to `NCCL_TOPO_DUMP_FILE`. `gpu` names a preset GPU.

    NVLinks to a switch join every GPU to every other, of several hosts, too, where the dump has them; links that name
    another GPU's bus id join only these two.
    """
    try:
        system = ET.fromstring(text)
    except ET.ParseError as error:
        raise ConfigurationError.of("NCCL topology", text[:40], f"is not XML: {error}") from error
    found = [
        _XmlGpu(host.get("host_hash", ""), pci.get("busid", "").lower(), device)
        for host in (system.findall("cpu") or [system])
        for pci in host.iter("pci")
        if (device := pci.find("gpu")) is not None
    ]
    if system.tag != "system" or not found:
        raise ConfigurationError.of("NCCL topology", system.tag, "holds no GPU; give a dump of NCCL_TOPO_DUMP_FILE")
    links = tuple(tuple(_xml_rate(one, other, gpu) for other in found) for one in found)
    speeds = [_number(net, "speed", 0) for net in system.iter("net") if net.get("dev") is not None]
    per_gpu = sum(speeds) / 8e3 / len(found)  # Mb/s → GB/s
    return _node(gpu, links, nics=len(speeds), nic_GBps=per_gpu, source="NCCL topology")


class _XmlGpu(NamedTuple):
    """Hosts of one NVLink domain may stand in one dump, with equal bus ids."""

    host: str
    bus: str
    device: ET.Element


def _xml_rate(one: _XmlGpu, other: _XmlGpu, gpu: str) -> float:
    if one == other:
        return 0.0
    direct = switched = 0
    for link in one.device.findall("nvlink"):
        count = int(_number(link, "count", 1))
        direct += count * (one.host == other.host and link.get("target", "").lower() == other.bus)
        switched += count * link.get("tclass", "").startswith("0x0680")  # PCI class of an NVSwitch bridge
    return _nvlinks(direct or switched, gpu) or PATH_GBPS["PHB"]


def _number(element: ET.Element, key: str, missing: float) -> float:
    """An attribute that counts something. Raises ConfigurationError for anything but a number of zero or more."""
    text = element.get(key, str(missing))
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise ConfigurationError.of(f"NCCL topology, {key} of {element.tag}", text, "must be a number")
    return float(text)


def _rate(cell: str, gpu: str) -> float:
    if cell == "X":
        return 0.0
    if match := re.fullmatch(r"NV(\d+)", cell):
        return _nvlinks(int(match[1]), gpu)
    if cell not in PATH_GBPS:
        raise ConfigurationError.of("topology path", cell, f"unknown; known are NV#, {', '.join(PATH_GBPS)}")
    return PATH_GBPS[cell]


def _nvlinks(count: int, gpu: str) -> float:
    if gpu not in preset_gpus():
        raise ConfigurationError.of("gpu", gpu, f"unknown; known are {', '.join(preset_gpus())}")
    if count and gpu not in LINKS_OF:
        raise ConfigurationError.of("gpu", gpu, f"has no known NVLink rate; known are {', '.join(LINKS_OF)}")
    return count * preset_gpus()[gpu].nvlink_GBps / LINKS_OF[gpu] if count else 0.0


def _node(gpu: str, links: tuple[tuple[float, ...], ...], nics: int, nic_GBps: float, source: str) -> ClusterSpec:
    rates = {rate for i, row in enumerate(links) for j, rate in enumerate(row) if i != j}
    known = preset_gpus()
    if gpu not in known:
        raise ConfigurationError.of("gpu", gpu, f"unknown; known are {', '.join(known)}")
    node = ClusterSpec(
        name=f"{len(links)}x{gpu}", gpu=known[gpu], gpus_per_node=len(links), nic_GBps=nic_GBps, nics_per_node=nics,
        source=source,
    )  # fmt: skip
    if len(rates) > 1:
        return msgspec.structs.replace(node, links_GBps=links)
    return msgspec.structs.replace(node, nvlink_GBps=rates.pop() if rates else 0.0)
