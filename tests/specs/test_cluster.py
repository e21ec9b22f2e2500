from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from soloist.errors import ConfigurationError
from soloist.specs.cluster import ClusterSpec, cluster, load_clusters, preset_clusters, preset_gpus
from soloist.specs.topology import from_nccl_xml, from_nvidia_smi, read_topology

TOPO = """
\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV12\tNV12\tSYS\tPXB\tSYS\t0-31\t0
GPU1\tNV12\t X \tNV12\tSYS\tPXB\tSYS\t0-31\t0
GPU2\tNV12\tNV12\t X \tSYS\tSYS\tPXB\t32-63\t1
GPU3\tSYS\tSYS\tSYS\t X \tSYS\tPXB\t32-63\t1
NIC0\tPXB\tPXB\tSYS\tSYS\t X \tSYS
NIC1\tSYS\tSYS\tPXB\tPXB\tSYS\t X

Legend:
  X    = Self
"""

XML = """<system version="1">
  <cpu numaid="0" arch="x86_64" vendor="GenuineIntel">
    <pci busid="0000:19:00.0" class="0x030200"><gpu dev="0" sm="90" rank="0" gdr="1">
      <nvlink target="0000:07:00.0" count="5" tclass="0x068000"/>
      <nvlink target="0000:08:00.0" count="4" tclass="0x068000"/>
      <nvlink target="0000:09:00.0" count="9" tclass="0x068000"/></gpu></pci>
    <pci busid="0000:3b:00.0" class="0x030200"><gpu dev="1" sm="90" rank="1" gdr="1">
      <nvlink target="0000:07:00.0" count="18" tclass="0x068000"/></gpu></pci>
    <nic><net name="mlx5_0" dev="0" speed="400000" port="1" guid="0x1" gdr="1"/></nic>
    <nic><net name="mlx5_1" dev="1" speed="400000" port="1" guid="0x2" gdr="1"/></nic>
  </cpu>
</system>"""


def test_every_preset_has_a_source_and_a_size() -> None:
    for spec in preset_clusters().values():
        assert spec.source
        assert spec.gpu.source
        assert spec.gpus_per_node >= 1
    for wanted in ("dgx-h100", "hgx-h100", "hgx-h200", "hgx-b200", "gb200-nvl72", "dgx-a100", "hgx-h20", "card-400tf"):
        assert wanted in preset_clusters()
    assert preset_gpus()["card-400tf"].mfu == 0.60


def test_matrices_follow_nodes_and_rails() -> None:
    spec = cluster("dgx-h100")
    bandwidth, latency = spec.bandwidth_matrix(16), spec.latency_matrix(16)
    assert bandwidth[0, 7] == 450e9
    assert bandwidth[0, 8] == 50e9
    assert np.isinf(bandwidth[3, 3])
    assert latency[0, 7] < latency[0, 8] < latency[0, 9]  # same node, same rail, another rail
    assert (latency == latency.T).all()
    assert spec.rails(16).tolist() == [*range(8), *range(8)]


def test_fewer_nics_than_gpus_share_rails() -> None:
    spec = ClusterSpec(gpu=preset_gpus()["H100-80GB"], gpus_per_node=8, nic_GBps=25, nics_per_node=4)
    assert spec.rails(8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_own_file_overrides_and_refers_to_presets(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("clusters: {mine: {gpu: H200, gpus_per_node: 4, nvlink_GBps: 200, nic_GBps: 25}}")
    spec = cluster(str(path))
    assert (spec.name, spec.gpu.name, spec.nvlink, spec.nic) == ("mine", "H200", 200e9, 25e9)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("clusters: {a: {gpu: H100-80GB, gpus_per_node: 8, nic_GBps: -1}}", "nic_GBps"),
        ("clusters: {a: {gpu: H100-80GB, gpus_per_node: 8, nik_GBps: 1}}", "nik_GBps"),
        ("clusters: {a: {gpu: H1000, gpus_per_node: 8}}", "H1000"),
        ("clusters: {a: {gpu: H100-80GB, gpus_per_node: 0}}", "gpus_per_node"),
        ("clusters: {a: {gpu: H100-80GB, gpus_per_node: many}}", "gpus_per_node"),
        ("clusters: {a: {gpu: H100-80GB, gpus_per_node: 2, links_GBps: [[0, 1]]}}", "links_GBps"),
        ("gpus: {g: {tflops: {fp8: 1}, memory_GB: 1, memory_TBps: 1}}", "tflops"),
        ("gpus: {g: {tflops: {bf16: 1}, memory_GB: 1, memory_TBps: 1, mfu: 2}}", "mfu"),
        ("gpus: {g: {tflops: {bf16: 1}, memory_GB: .nan, memory_TBps: 1}}", "memory_GB"),
        ("gpus: {g: {tflops: {bf16: .inf}, memory_GB: 1, memory_TBps: 1}}", "tflops.bf16"),
        ("clusters: {a: {gpu: H100-80GB, gpus_per_node: 1, links_GBps: [[.nan]]}}", "links_GBps"),
        ("machines: {}", "machines"),
        ("clusters: [", "YAML"),
    ],
)
def test_nonsense_is_named(tmp_path: Path, text: str, names: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=names):
        load_clusters(path)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigurationError, match="dgx-h100"):
        cluster("no-such-cluster")


def test_more_gpus_than_there_are() -> None:
    with pytest.raises(ConfigurationError, match="gpus"):
        cluster("2xh100").nodes(4)


def test_nvidia_smi_matrix_with_unequal_links() -> None:
    spec = from_nvidia_smi(TOPO, "A100-80GB", nic_GBps=25)
    assert (spec.gpus_per_node, spec.nics_per_node, spec.nic_GBps) == (4, 2, 12.5)
    assert spec.bandwidth_matrix(4)[0, 1] == 300e9
    assert spec.bandwidth_matrix(4)[0, 3] == 12e9


def test_a_gpu_by_its_short_name_and_nics_by_their_devices(tmp_path: Path) -> None:
    """As nvidia-smi prints it to a terminal: the header underlined. Older drivers name the devices."""
    lines = ["\t\x1b[4mGPU0\tGPU1\tbnxt_re0\trocep12s0\tCPU Affinity\x1b[0m", "GPU0\t X \tNV18\tPIX\tSYS\t0-47"]
    lines += ["GPU1\tNV18\t X \tSYS\tPIX\t0-47", "bnxt_re0\tPIX\tSYS\t X \tSYS", "rocep12s0\tSYS\tPIX\tSYS\t X "]
    (tmp_path / "topo.txt").write_text("\n".join(lines))
    spec = read_topology(tmp_path / "topo.txt", "h100", nic_GBps=25)
    assert (spec.gpu.name, spec.nics_per_node, spec.nic_GBps, spec.nvlink_GBps) == ("H100-80GB", 2, 25, 450)
    with pytest.raises(ConfigurationError, match="is no preset GPU"):
        read_topology(tmp_path / "topo.txt", "H9000")


def test_nvidia_smi_refuses_other_text() -> None:
    with pytest.raises(ConfigurationError, match="GPU matrix"):
        from_nvidia_smi("no GPUs here", "H100-80GB")
    with pytest.raises(ConfigurationError, match="QPI"):
        from_nvidia_smi(TOPO.replace("PXB", "QPI").replace("SYS", "QPI"), "H100-80GB")


def test_nccl_xml_over_a_switch() -> None:
    spec = from_nccl_xml(XML, "H100-80GB")
    assert (spec.gpus_per_node, spec.nics_per_node, spec.nic_GBps) == (2, 2, 50.0)
    assert spec.nvlink == 450e9


@pytest.mark.parametrize("begin", ["\x1b[4m", "[4m"])
def test_nvidia_smi_underlines_its_header_also_where_the_escape_was_lost(begin: str, tmp_path: Path) -> None:
    text = TOPO.replace("GPU0", f"{begin}GPU0", 1)
    for name, data in ("utf8", text.encode()), ("powershell", text.replace("\n", "\r\n").encode("utf-16")):
        (tmp_path / name).write_bytes(data)
        assert cluster(f"{tmp_path / name}#A100-80GB") == from_nvidia_smi(TOPO, "A100-80GB")


def test_gpu_and_nic_are_for_topologies(tmp_path: Path) -> None:
    (tmp_path / "topo.txt").write_text(TOPO)
    for spec in cluster(f"{tmp_path}/topo.txt", "A100", 25), cluster(f"{tmp_path}/topo.txt#A100", nic_GBps=25):
        assert spec == from_nvidia_smi(TOPO, "A100-80GB", nic_GBps=25)
    with pytest.raises(ConfigurationError, match="--gpu = 'H200': is for a topology"):
        cluster("dgx-h100", "H200")
    with pytest.raises(ConfigurationError, match="--nic = 25: is for a topology"):
        cluster("dgx-h100", nic_GBps=25)


def test_nccl_xml_of_two_hosts_with_equal_bus_ids() -> None:
    """As of trays of one NVLink domain."""
    inside = XML[XML.index("<pci") : XML.index("</cpu>")]
    hosts = "".join(f'<cpu host_hash="0x{host}" numaid="0">{inside}</cpu>' for host in (1, 2))
    spec = from_nccl_xml(f'<system version="1">{hosts}</system>', "GB200")
    assert (spec.gpus_per_node, spec.nics_per_node, spec.nic_GBps, spec.nvlink) == (4, 4, 50.0, 900e9)


def test_nccl_xml_with_links_from_gpu_to_gpu() -> None:
    """A bridge joins two; bus ids in either case. The third is reached over PCIe."""
    gpus = "".join(
        f'<pci busid="0000:{own}:00.0"><gpu dev="{i}">{link}</gpu></pci>'
        for i, (own, link) in enumerate(
            [
                ("3b", '<nvlink target="0000:5E:00.0" count="4" tclass="0x030200"/>'),
                ("5e", '<nvlink target="0000:3B:00.0" count="4" tclass="0x030200"/>'),
                ("af", ""),
            ]
        )
    )
    spec = from_nccl_xml(f'<system version="1"><cpu numaid="0">{gpus}</cpu></system>', "A100-80GB")
    assert spec.links_GBps == ((0, 100, 20), (100, 0, 20), (20, 20, 0))


@pytest.mark.parametrize(("was", "wrong"), [('speed="400000"', 'speed="fast"'), ('count="18"', 'count="-1"')])
def test_nccl_xml_whose_numbers_are_none(was: str, wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="must be a number"):
        from_nccl_xml(XML.replace(was, wrong), "H100-80GB")


def test_nccl_xml_refuses_other_files() -> None:
    with pytest.raises(ConfigurationError, match="not XML"):
        from_nccl_xml("<system", "H100-80GB")
    with pytest.raises(ConfigurationError, match="no GPU"):
        from_nccl_xml("<graphs/>", "H100-80GB")


@pytest.mark.parametrize(
    "rest", ['"cluster":{"na', '"machine":"a GPU"}', '"cluster":{"gpu":"H200","gpus_per_node":8}}']
)
def test_a_damaged_record_of_a_machine_is_named(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"what":"machine",' + rest + "\n")
    with pytest.raises(ConfigurationError, match="mine.jsonl"):
        cluster(str(path))
