from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.errors import ConfigurationError
from soloist.placement.balance import place
from soloist.placement.eplb import EplbMaps, eplb, imbalance
from soloist.placement.formats import export_placement, import_placement
from soloist.placement.layer import Target
from soloist.placement.placement import Placement
from soloist.placement.sglang import read_sglang_dumps
from soloist.placement.solve import solve
from soloist.placement.torch_file import read_torch_file
from soloist.specs.layout import Layout
from tests.placement.cases import tiny_spec

SPEC = tiny_spec()  # layers 1 and 2 of three have six experts


def even_placement() -> Placement:
    return place(np.arange(12).reshape(2, 6) + 1, np.array([4, 4]))


@pytest.mark.parametrize("form", ["sglang", "tensorrt", "eplb"])
def test_round_trip(form: str, tmp_path: Path) -> None:
    notices = export_placement(even_placement(), SPEC, form, tmp_path / "p")
    assert notices
    assert import_placement(SPEC, 2, form, tmp_path / "p") == (even_placement(), [])


def test_sglang_file_holds_one_key_and_all_layers(tmp_path: Path) -> None:
    notices = export_placement(even_placement(), SPEC, "sglang", tmp_path / "p.json")
    content = json.loads((tmp_path / "p.json").read_text())
    assert list(content) == ["physical_to_logical_map"]
    rows = content["physical_to_logical_map"]
    assert [len(row) for row in rows] == [8] * 3
    assert rows[1] == [expert for group in even_placement().slots[0] for expert in group]
    assert set(rows[0]) == set(range(6))
    assert "--ep-num-redundant-experts 2" in notices[0]
    assert "layers 0 are dense" in notices[1]


def test_tensorrt_file_counts_all_layers(tmp_path: Path) -> None:
    export_placement(even_placement(), SPEC, "tensorrt", tmp_path / "p.yaml")
    content = yaml.safe_load((tmp_path / "p.yaml").read_text())
    assert sorted(content["initial_global_assignments"]) == [1, 2]
    assert content["num_slots"] == 8
    assert content["layer_updates_per_iter"] == 0


def test_eplb_maps_agree(tmp_path: Path) -> None:
    export_placement(even_placement(), SPEC, "eplb", tmp_path / "p.npz")
    maps = np.load(tmp_path / "p.npz")
    for layer in range(2):
        for expert in range(6):
            places = maps["log2phy"][layer, expert]
            assert (places >= 0).sum() == maps["logcnt"][layer, expert]
            assert all(maps["phy2log"][layer, place] == expert for place in places[places >= 0])


def test_what_cannot_be_expressed_is_an_error(tmp_path: Path) -> None:
    uneven = Placement.linear(tiny_spec(), 4)
    for form in ("sglang", "tensorrt", "eplb"):
        with pytest.raises(ConfigurationError, match=r"\[1, 2\].*equal numbers"):
            export_placement(uneven, SPEC, form, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    with pytest.raises(ConfigurationError, match="no released form"):
        export_placement(even_placement(), SPEC, "vllm", tmp_path / "p")
    with pytest.raises(ConfigurationError, match="sglang, tensorrt, eplb"):
        export_placement(even_placement(), SPEC, "other", tmp_path / "p")
    with pytest.raises(ConfigurationError, match="experts"):
        export_placement(even_placement(), tiny_spec(experts=8), "sglang", tmp_path / "p")


def test_second_replicas_of_a_group_are_said(tmp_path: Path) -> None:
    rows = [[0, 1, 2, 3, 4, 5, 0, 0]] * 3
    (tmp_path / "p.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    placement, notices = import_placement(SPEC, 2, "sglang", tmp_path / "p.json")
    assert placement.slots[0] == ((0, 1, 2, 3), (4, 5, 0))
    assert "2 slots" in notices[0]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"physical_to_logical_map": 3}', '{"physical_to_logical_map": [[0, 1]]}',
     '{"physical_to_logical_map": [[0, 1, 2, 3, 4, 5], [0, 1, 2], [0, 1, 2, 3, 4, 5]]}',
     '{"physical_to_logical_map": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 5]]}'],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ConfigurationError):
        import_placement(SPEC, 2, "sglang", tmp_path / "p.json")
    with pytest.raises(ConfigurationError):
        import_placement(SPEC, 2, "tensorrt", tmp_path / "p.json")
    with pytest.raises(ConfigurationError):
        import_placement(SPEC, 2, "eplb", tmp_path / "p.json")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        import_placement(SPEC, 2, "eplb", tmp_path / "none")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), nodes=st.sampled_from([1, 2]), router_groups=st.sampled_from([1, 2, 4]))
def test_eplb_holds_every_expert_and_replicates_the_hottest(seed: int, nodes: int, router_groups: int) -> None:
    load_LE = np.random.default_rng(seed).random((2, 8)) + 0.1
    maps = eplb(load_LE, 12, router_groups, nodes, 4)
    assert maps.physical_LR.shape == (2, 12)
    assert (maps.count_LE >= 1).all()
    assert maps.count_LE.sum(axis=1).tolist() == [12, 12]
    if nodes == 1 or router_groups == 1:
        assert (maps.count_LE[np.arange(2), load_LE.argmax(axis=1)] == maps.count_LE.max(axis=1)).all()
    assert imbalance(maps, load_LE, 4) >= 1


def test_eplb_keeps_router_groups_on_a_node() -> None:
    load_LE = np.random.default_rng(0).random((1, 8))
    row = eplb(load_LE, 12, 4, 2, 4).physical_LR[0]
    node_of_group = [{e // 2 for e in half} for half in (row[:6].tolist(), row[6:].tolist())]
    assert not node_of_group[0] & node_of_group[1]


def test_eplb_with_one_replica_a_gpu_cannot_even_out() -> None:
    load_LE = np.array([[4.0, 3, 2, 1]])
    assert eplb(load_LE, 4, 1, 1, 4).physical_LR.tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ConfigurationError, match="replicas = 5"):
        eplb(load_LE, 5, 1, 1, 4)


def test_maps_from_rows() -> None:
    maps = EplbMaps.of(np.array([[1, 0, 1, 2]]), 3)
    assert maps.logical_LEM.tolist() == [[[1, -1], [0, 2], [3, -1]]]


# -- SGLang's dumps -------------------------------------------------------------------------------------------------
def test_counts_of_a_dump(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 50, (4, 3, 6))
    torch.save({"rank": 0, "logical_count": torch.from_numpy(counts)}, tmp_path / "d.pt")
    np.savez(tmp_path / "d.npz", logical_count=counts)
    (tmp_path / "d.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    for name in ("d.pt", "d.npz", "d.json"):
        trace = read_sglang_dumps(SPEC, [tmp_path / name])
        assert np.array_equal(trace.counts_LE, counts.sum(axis=0)[1:])
        assert trace.sample is None
    solve(trace, Target.of(6, [0, 0, 1])).placement.check(SPEC, Layout(ep=3))


def test_choices_of_a_dump_are_physical(tmp_path: Path) -> None:
    physical = torch.tensor([[[-1, -1], [-1, -1], [-1, -1]], [[0, 7], [5, 1], [-1, -1]], [[2, 3], [4, 6], [-1, -1]]])
    logical = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1], [5, 4, 3, 2, 1, 0, 3, 2], [0, 1, 2, 3, 4, 5, 0, 1]])
    record = {"rank": 1, "topk_ids_of_layer": physical[:, :, :], "input_ids": torch.tensor([7, 8, 0])}
    record["positions"] = torch.tensor([4, 5, 0])
    torch.save({"records": [record], "last_physical_to_logical_map": logical}, tmp_path / "d.pt")
    trace = read_sglang_dumps(SPEC, [tmp_path / "d.pt", tmp_path / "d.pt"])
    assert trace.tokens == 4
    assert trace.sample.ids_LTK[:, :2].tolist() == [[[5, 2], [0, 4]], [[2, 3], [4, 0]]]
    assert trace.sample.token_T.tolist() == [7, 8, 7, 8]
    assert trace.sample.sequence_T.tolist() == [0, 0, 1, 1]


def test_dumps_of_another_model_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", logical_count=np.ones((4, 3, 9)))
    with pytest.raises(ConfigurationError, match="6 experts"):
        read_sglang_dumps(SPEC, [tmp_path / "d.npz"])
    (tmp_path / "d.json").write_text('{"records": [{}], "last_physical_to_logical_map": [[0]]}')
    with pytest.raises(ConfigurationError, match="no choices, as mode per_pass"):
        read_sglang_dumps(SPEC, [tmp_path / "d.json"])
    (tmp_path / "d.json").write_text('{"records": [], "last_physical_to_logical_map": [[0]]}')
    with pytest.raises(ConfigurationError, match="no records"):
        read_sglang_dumps(SPEC, [tmp_path / "d.json"])


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(24).reshape(2, 3, 4).transpose(0, 2)[1:], torch.tensor(3.5), torch.zeros(0, 3), torch.tensor([True])],
    ids=["strided", "scalar", "empty", "bool"],
)
def test_tensors_are_read_as_torch_does(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"a": [tensor, "text"]}, tmp_path / "t.pt")
    found = read_torch_file(tmp_path / "t.pt")
    assert found["a"][1] == "text"
    assert np.array_equal(found["a"][0], tensor.numpy())


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": Path("/")}, tmp_path / "t.pt")
    with pytest.raises(ConfigurationError, match="it holds a pathlib"):
        read_torch_file(tmp_path / "t.pt")
    (tmp_path / "t.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match="by torch.save"):
        read_torch_file(tmp_path / "t.pt")
