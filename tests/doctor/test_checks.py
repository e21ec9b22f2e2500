"""Findings about machines of several kinds: each fault is named with its remedy, and a healthy machine has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from outputs import (
    HGX_TOPOLOGY,
    NCCL_GOOD,
    NCCL_SOCKETS,
    PCIE_TOPOLOGY,
    VERSIONS,
    ethernet,
    gpu_line,
    hgx,
    infiniband,
    machine,
    nvlink_status,
)

from soloist.doctor import host, nvidia_smi, nvml
from soloist.doctor.among import Visit, check_among, gather, hosts_of
from soloist.doctor.examination import examine_host, report
from soloist.doctor.finding import Finding, exit_code, note
from soloist.doctor.limits import numbers
from soloist.doctor.planned import preset_of
from soloist.errors import ClusterError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two active rails and an Ethernet interface."""
    for device in ("mlx5_0", "mlx5_1"):
        infiniband(tmp_path, device)
    ethernet(tmp_path, "eth0")
    (tmp_path / "sys/module/nvidia_peermem").mkdir(parents=True)
    return tmp_path


def faults(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity in ("warning", "error")]


def the_fault(findings: list[Finding], severity: str, check: str) -> Finding:
    """The only one there is."""
    (found,) = faults(findings)
    assert (found.severity, found.check) == (severity, check), found
    assert found.why
    assert found.remedy
    return found


# -- readers ---------------------------------------------------------------------------------------------------------
def test_nvidia_smi_is_read():
    query = "\n".join([gpu_line(0), gpu_line(1, temperature__gpu="[N/A]", power__limit="[Not Supported]")])
    gpus, driver = nvidia_smi.gpus(query, nvlink_status(2, 4, down=((1, 3),)))
    assert driver == "580.65.06"
    assert [gpu.memory_bytes for gpu in gpus] == [81559 << 20] * 2
    assert (gpus[0].temperature_C, gpus[1].temperature_C, gpus[1].power_limit_W) == (31, None, None)
    assert [(gpu.nvlinks_up, gpu.nvlinks) for gpu in gpus] == [(4, 4), (3, 4)]
    assert gpus[0].persistence
    assert gpus[0].mig is False
    assert nvidia_smi.gpus("") == ((), "")


def test_paths_of_a_topology():
    paths = nvidia_smi.paths(HGX_TOPOLOGY)
    assert paths["GPU0 GPU3"] == "NV18"
    assert paths["GPU3 mlx5_1"] == "PXB"
    assert len(paths) == 4 * 5
    assert nvidia_smi.paths("") == {}


def test_cuda_version_of_the_driver():
    head = "| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06    CUDA Version: 13.0     |"
    assert nvidia_smi.cuda_version(head) == (13, 0)
    assert nvidia_smi.cuda_version("") is None


def test_reasons_of_clocks():
    assert nvml.slowdowns(0x1 | 0x2) == ()  # idle, and clocks that somebody has set
    assert nvml.slowdowns(0x4 | 0x40) == ("power cap", "thermal, by hardware")


def test_this_host_is_read():
    found = host.examine()
    assert found.cores >= 1
    assert found.memory_bytes > found.memory_free_bytes > 0
    assert found.versions["soloist"]


# -- a healthy machine -----------------------------------------------------------------------------------------------
def test_a_healthy_node_has_no_fault(root):
    findings = examine_host(hgx(root), None, NCCL_GOOD)
    assert faults(findings) == []
    assert "4 × NVIDIA H100 80GB HBM3" in findings[0].what
    assert exit_code(findings, strict=True) == 0


def test_a_machine_without_gpus_is_examined_too():
    findings = examine_host(machine(), None)
    assert [finding.check for finding in findings if finding.severity == "note"] == ["gpus"]
    assert faults(findings) == []


# -- GPUs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "severity", "check", "what"),
    [
        ({"power__limit": "450.00"}, "warning", "power limit", "GPU 2 is limited to 450 W, by default 700 W"),
        ({"memory__free": 12000}, "warning", "memory", "GPU 2 has 72.9 of 86 GB in use"),
        ({"mig__mode__current": "Enabled"}, "error", "mig", "GPU 2 is cut"),
        ({"ecc__errors__uncorrected__volatile__total": 3}, "error", "memory errors", "GPU 2 has 3 uncorrected"),
        ({"pcie__link__width__current": 8}, "warning", "PCIe", "GPU 2 runs on 8 of 16"),
        ({"pcie__link__width__current": 4}, "error", "PCIe", "GPU 2 runs on 4 of 16"),
        ({"temperature__gpu": 91}, "warning", "temperature", "GPU 2 has 91 °C"),
        (
            {"clocks_throttle_reasons__active": "0x0000000000000040", "clocks__sm": 1005},
            "warning",
            "clocks",
            "GPU 2 is held down at 1005 of 1980 MHz: thermal, by hardware",
        ),
    ],
)
def test_a_sick_gpu_is_named(root, changes, severity, check, what):
    lines = [gpu_line(0), gpu_line(1), gpu_line(2, **changes), gpu_line(3)]
    assert the_fault(examine_host(hgx(root, lines), None), severity, check).what.startswith(what)


def test_gpus_of_two_kinds(root):
    lines = [gpu_line(0), gpu_line(1), gpu_line(2), gpu_line(3, "NVIDIA H200")]
    assert (
        "3 × NVIDIA H100 80GB HBM3, 1 × NVIDIA H200"
        in the_fault(examine_host(hgx(root, lines), None), "warning", "gpus").what
    )


# -- links -----------------------------------------------------------------------------------------------------------
def test_nvlinks_that_are_down(root):
    found = the_fault(examine_host(hgx(root, down=((1, 4), (1, 5))), None), "error", "NVLink")
    assert found.what == "GPU 1 has 16 of 18 NVLinks up"


def test_gpus_without_nvlink():
    lines = "\n".join(
        gpu_line(i, "NVIDIA L40S", power__limit="350.00", power__default_limit="350.00") for i in range(2)
    )
    found = the_fault(examine_host(machine(lines, "", PCIE_TOPOLOGY), None), "warning", "NVLink")
    assert found.what == "no NVLink between the GPUs: SYS for 1 pair(s)"


def test_peers_that_cannot_be_addressed(root):
    peers = {"0 1": False, "1 0": False, "0 2": True}
    found = the_fault(examine_host(hgx(root, peers=peers), None), "error", "peer access")
    assert "0 → 1, 1 → 0" in found.what
    assert "fabricmanager" in found.remedy


def test_a_port_that_is_down(tmp_path):
    infiniband(tmp_path, "mlx5_0")
    infiniband(tmp_path, "mlx5_1", "1: DOWN")
    (tmp_path / "sys/module/nvidia_peermem").mkdir(parents=True)
    assert the_fault(examine_host(hgx(tmp_path), None), "warning", "NIC").what == "mlx5_1 port 1 is DOWN"


def test_rails_of_different_rates_and_no_gpudirect(tmp_path):
    infiniband(tmp_path, "mlx5_0")
    infiniband(tmp_path, "mlx5_1", rate="100 Gb/sec (4X EDR)")
    told = {finding.check: finding.what for finding in faults(examine_host(hgx(tmp_path), None))}
    assert told == {
        "NIC": "rates differ (Gb/s): mlx5_0 400, mlx5_1 100",
        "GPUDirect": "no module lets the NICs read GPU memory",
    }


def test_a_gpu_far_from_every_nic(root):
    topology = HGX_TOPOLOGY.replace("GPU3\tNV18\tNV18\tNV18\t X \tSYS\tPXB", "GPU3\tNV18\tNV18\tNV18\t X \tSYS\tSYS")
    found = the_fault(examine_host(hgx(root, paths=nvidia_smi.paths(topology)), None), "warning", "NIC")
    assert found.what == "no NIC near GPU3"


# -- environment, limits, versions -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("environment", "severity", "what"),
    [
        ({"NCCL_TREE_THRESHOLD": "0"}, "warning", "NCCL_TREE_THRESHOLD=0 is obsolete"),
        ({"OMPI_MCA_orte_base_help_aggregate": "0"}, "warning", "is obsolete"),
        ({"OMPI_MCA_btl": "self,openib"}, "warning", "names openib"),
        ({"NCCL_P2P_DISABLE": "1"}, "error", "NCCL_P2P_DISABLE=1 on a host with NVLink"),
        ({"NCCL_IB_DISABLE": "1"}, "error", "NCCL_IB_DISABLE=1 beside 2 active RDMA NICs"),
        ({"NCCL_SOCKET_IFNAME": "ens3"}, "error", "there is no interface ens3"),
        ({"NCCL_IB_HCA": "=mlx5_0,mlx5_7"}, "error", "there is no RDMA device mlx5_7"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "warning", "shows 2 of 4 GPUs"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "warning", "CUDA_LAUNCH_BLOCKING=1"),
        ({"OMP_NUM_THREADS": "64"}, "warning", "OMP_NUM_THREADS=64 for 4 ranks on 112 cores"),
    ],
)
def test_variables_that_harm(root, environment, severity, what):
    assert what in the_fault(examine_host(hgx(root, environment=environment), None), severity, "environment").what


@pytest.mark.parametrize(
    "environment",
    [
        {"NCCL_SOCKET_IFNAME": "eth", "NCCL_IB_HCA": "mlx5"},
        {"NCCL_SOCKET_IFNAME": "^docker0,lo", "CUDA_LAUNCH_BLOCKING": "0", "OMP_NUM_THREADS": "28"},
        {"NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
    ],
)
def test_variables_that_do_no_harm(root, environment):
    assert faults(examine_host(hgx(root, environment=environment), None)) == []


@pytest.mark.parametrize(
    ("facts", "severity", "check", "what"),
    [
        ({"locked_bytes": 64 << 10}, "error", "locked memory", "may lock 0 MB"),
        ({"shm_bytes": 64 << 20}, "warning", "shared memory", "/dev/shm has 67 MB free"),
        ({"open_files": 1024}, "warning", "open files", "may open 1024 files"),
        ({"ports_taken": (29500,)}, "error", "ports", "port 29500 is taken"),
        ({"cores": 4}, "warning", "cores", "4 cores for 4 GPUs"),
        ({"driver_cuda": (12, 4)}, "error", "versions", "serves CUDA 12.4, torch wants 13.0"),
        ({"versions": VERSIONS | {"torch": "2.9.1"}}, "error", "versions", "torch 2.9.1"),
        ({"versions": {k: v for k, v in VERSIONS.items() if k != "cuda"}}, "error", "versions", "built without CUDA"),
        ({"versions": {k: v for k, v in VERSIONS.items() if k != "triton"}}, "error", "versions", "triton is not"),
    ],
)
def test_limits_and_versions(root, facts, severity, check, what):
    assert what in the_fault(examine_host(hgx(root, **facts), None), severity, check).what


def test_numbers_of_a_version():
    assert numbers("2.11.0+cu130") == (2, 11, 0)
    assert numbers("2.13.0rc1") == (2, 13)


# -- NCCL's log ------------------------------------------------------------------------------------------------------
def test_a_log_with_sockets_and_host_memory(root):
    told = {finding.what: finding.severity for finding in faults(examine_host(hgx(root), None, NCCL_SOCKETS))}
    assert told == {
        "NCCL uses sockets although there are RDMA NICs": "error",
        "1 channels go through host memory (SHM) although there is NVLink": "error",
        "1 × NET/Socket : peer 10.0.0.2<41231> message truncated": "warning",
    }


def test_a_log_without_gpudirect(root):
    log = NCCL_GOOD.replace("/GDRDMA", "")
    assert "no GDRDMA" in the_fault(examine_host(hgx(root), None, log), "warning", "NCCL log").what


# -- plans -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", ""),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("Tesla T4", ""),
    ],
)
def test_presets_of_names(name, preset):
    assert preset_of(name) == preset


# -- several hosts ---------------------------------------------------------------------------------------------------
def test_hosts_are_compared():
    other = machine(host="node2", versions=VERSIONS | {"nccl": "2.27.3"})
    visits = [Visit(machine()), Visit(machine()), Visit(other, 4.2, 0.01), Visit(other, 4.1, 0.02)]
    told = [finding.what for finding in check_among(visits)]
    assert told == [
        "rank 2 on node2 is 4.2 s ahead of rank 0",
        "rank 3 on node2 is 4.1 s ahead of rank 0",
        "nccl 2.27.3 on node2 (rank 2), 2.28.9 on rank 0",
    ]
    assert [found.host for found in hosts_of(visits)] == ["node1", "node2"]
    assert [finding.severity for finding in check_among([Visit(machine())] * 2)] == ["ok"]


def test_visits_are_gathered(tmp_path):
    import threading

    from torch.distributed import HashStore

    from soloist.engine.meeting import Meeting, Place

    store, found = HashStore(), {}

    def visit(rank: int) -> None:
        found[rank] = gather(Meeting(Place(rank, 3, rank, 3), store), machine(host=f"node{rank}"), 60.0)

    threads = [threading.Thread(target=visit, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [visit.machine.host for visit in found[0]] == ["node0", "node1", "node2"]
    assert all(abs(visit.ahead_s) <= visit.uncertain_s + 1e-3 for visit in found[0])
    assert found[1] == found[2] == []


@pytest.mark.parametrize(("rank", "told"), [(0, "rank 1 of 2 did not come"), (1, "rank 0 did not turn to rank 1")])
def test_a_rank_that_does_not_come_is_named(rank, told):
    from torch.distributed import HashStore

    from soloist.engine.meeting import Meeting, Place

    with pytest.raises(ClusterError, match=f"{told} within 0.1 s"):
        gather(Meeting(Place(rank, 2, rank, 2), HashStore()), machine(), 0.1)


# -- the report ------------------------------------------------------------------------------------------------------
def test_exit_codes():
    def found(severity: str) -> list[Finding]:
        return [Finding(check="x", severity=severity, what="y")]  # type: ignore[arg-type]

    assert [exit_code(found(s)) for s in ("ok", "note", "warning", "error")] == [0, 0, 0, 1]
    assert [exit_code(found(s), strict=True) for s in ("ok", "note", "warning", "error")] == [0, 0, 1, 1]
    assert exit_code([]) == 0


def test_json_has_every_field(capsys):
    report(examine_host(hgx(environment={"NCCL_TREE_THRESHOLD": "0"}), None), as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert all(set(entry) == {"check", "severity", "what", "why", "remedy", "host"} for entry in listed)
    assert [entry["remedy"] for entry in listed if entry["severity"] == "warning"] == ["unset NCCL_TREE_THRESHOLD"]


def test_the_table_names_remedies(capsys):
    report(examine_host(hgx(environment={"NCCL_TREE_THRESHOLD": "0"}), None), as_json=False)
    assert "unset NCCL_TREE_THRESHOLD" in capsys.readouterr().out
    report([note("versions", "no torch", "none runs", "pip install soloist[run]")], as_json=False)
    assert "soloist[run]" in capsys.readouterr().out  # brackets are no markup
