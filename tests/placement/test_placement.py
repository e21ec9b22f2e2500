from __future__ import annotations

from pathlib import Path

import pytest

from soloist.errors import ConfigurationError
from soloist.placement.placement import Placement
from soloist.specs.layout import Layout
from tests.specs.models import tiny_spec as spec


@pytest.mark.parametrize("groups", [1, 2, 4, 6, 9, 18])
@pytest.mark.parametrize("make", [Placement.linear, Placement.round_robin])
def test_standard_placements_hold_every_expert(make, groups: int) -> None:
    placement = make(spec(), groups)
    placement.check(spec(), Layout(ep=groups))
    assert len(placement.slots) == 2  # the dense layer has none
    sizes = [len(group) for group in placement.slots[0]]
    assert max(sizes) - min(sizes) <= 1


def test_replica_tables_repeat_cyclically() -> None:
    placement = Placement(experts=3, slots=(((0, 1), (2,), (), (0,), (0,)),))
    group, slot, count = placement.replica_tables(0)
    assert group.tolist() == [[0, 3, 4], [0, 0, 0], [1, 1, 1]]
    assert slot.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert count.tolist() == [3, 1, 1]


def test_file_round_trip(tmp_path: Path) -> None:
    placement = Placement.round_robin(spec(), 4)
    placement.save(tmp_path / "p.json")
    assert Placement.load(tmp_path / "p.json") == placement


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (((0, 1), (1,)), r"without experts \[2\]"),
        (((0, 1), (2, 3)), r"\[3\]"),
        (((0, 0), (1, 2)), "second replica"),
    ],
)
def test_inconsistent_placements_are_refused(slots, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Placement(experts=3, slots=(slots,))


def test_wrong_model_or_layout_is_refused() -> None:
    placement = Placement.linear(spec(), 2)
    with pytest.raises(ConfigurationError, match="groups"):
        placement.check(spec(), Layout(ep=3))
    with pytest.raises(ConfigurationError, match="experts"):
        placement.check(spec(experts=8), Layout(ep=2))


@pytest.mark.parametrize("content", ["", "[]", '{"experts": 2}', '{"experts": 2, "slots": [], "x": 1}'])
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"p\.json|slots"):
        Placement.load(tmp_path / "p.json")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Placement.load(tmp_path / "absent.json")
