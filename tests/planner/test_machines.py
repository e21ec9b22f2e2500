"""Machines as others describe them, from the command line's point of view."""

from __future__ import annotations

from pathlib import Path

import pytest

from soloist.errors import ConfigurationError
from soloist.planner.machines import calibration_of_logs, description, matrices, presets, save_cluster
from soloist.planner.refit import calibrate_from
from soloist.specs.cluster import ClusterSpec, GpuSpec, cluster, preset_clusters
from tests.specs.test_cluster import TOPO, XML
from tests.specs.test_nccl_tests import LOG


def test_a_topology_stands_where_a_cluster_is_asked_for(tmp_path: Path) -> None:
    topo, xml = tmp_path / "topo.txt", tmp_path / "topo.xml"
    topo.write_text(TOPO)
    xml.write_text(XML)
    assert cluster(f"{topo}#A100-80GB").gpus_per_node == 4
    assert cluster(f"{xml}#H100-80GB").nvlink == 450e9
    for text, message in ((str(topo), "does not say which GPU"), (f"{xml}#H1000", "H1000")):
        with pytest.raises(ConfigurationError, match=message):
            cluster(text)
    topo.write_text(TOPO.replace("PXB", "QPI").replace("SYS", "QPI"))
    with pytest.raises(ConfigurationError, match="QPI"):
        cluster(f"{topo}#A100-80GB")
    topo.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        cluster(str(topo))


@pytest.mark.parametrize("name", ["dgx-h100", "gb200-nvl72", "2xh100"])
def test_written_and_read_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / "own.yaml"
    save_cluster(preset_clusters()[name], path)
    assert cluster(str(path)) == preset_clusters()[name]


def test_a_gpu_of_one_s_own_is_written_out(tmp_path: Path) -> None:
    gpu = GpuSpec(name="mine", tflops={"bf16": 1.0}, memory_GB=2, memory_TBps=3)
    spec = ClusterSpec(name="lab", gpu=gpu, gpus_per_node=2)
    save_cluster(spec, tmp_path / "own.yaml")
    assert cluster(str(tmp_path / "own.yaml")) == spec


def test_what_is_shown() -> None:
    spec = preset_clusters()["dgx-h100"]
    assert "16 GPUs in 2 node(s) of 8 × H100-80GB, 8 rail(s)" in description(spec, 16)[0]
    assert [len(table.rows) for table in matrices(spec, 128)] == [16, 16]
    assert len(presets().rows) == len(preset_clusters())


def test_logs_of_nccl_tests_make_a_calibration(tmp_path: Path) -> None:
    log, out, spec = tmp_path / "alltoall.log", tmp_path / "mine.jsonl", preset_clusters()["2xh100"]
    log.write_text(LOG)
    assert not calibration_of_logs([log], spec, out)
    found = calibrate_from(out, "mine")
    assert found.machine == spec
    assert found.fitted["collectives/nccl/all_to_all"].rows == 2
    log.write_text(LOG.replace("alltoall_perf", "broadcast_perf"))
    assert "broadcast is not modelled" in calibration_of_logs([log], spec, out)[0]
    log.write_text("nothing")
    with pytest.raises(ConfigurationError, match="log"):
        calibration_of_logs([log], spec, out)
