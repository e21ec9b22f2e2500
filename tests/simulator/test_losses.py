"""Losses are read from their compact form, and name the groups that they end."""

from __future__ import annotations

import pytest

from soloist.errors import ConfigurationError
from soloist.simulator.losses import Loss
from soloist.specs.layout import Layout


def test_compact_form() -> None:
    assert Loss.parse("gpu=3, at=10s, recovery=500ms") == Loss(gpus=(3,), at_s=10, recovery_s=0.5)
    assert Loss.parse("node=1,at=2.5", gpus_per_node=4) == Loss(gpus=(4, 5, 6, 7), at_s=2.5)


@pytest.mark.parametrize(
    ("layout", "gpus", "groups"),
    [
        ("ep8", (3,), {0: {3}}),
        ("attn2ep8", (2, 3), {0: {1}}),
        ("pp2ep4", (5,), {0: {1}}),
        ("dp2ep4", (3, 4), {0: {3}, 1: {0}}),
    ],
)
def test_groups_that_need_the_lost_ranks(layout: str, gpus: tuple[int, ...], groups: dict[int, set[int]]) -> None:
    assert Loss(gpus=gpus, at_s=0).groups(Layout.parse(layout)) == groups


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu=3", "and at="), ("at=3", "one of gpu= and node="), ("gpu=1,node=1,at=3", "one of"), ("gpu=x,at=1", "'x'"),
        ("gpu=1,at=soon", "lose.at = 'soon'"), ("gpu=1,at=-1", "lose.at = '-1'"), ("rank=1,at=1", "rank=1"),
    ],
)  # fmt: skip
def test_nonsense_is_named(text: str, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        Loss.parse(text)


def test_ranks_that_do_not_exist() -> None:
    with pytest.raises(ConfigurationError, match="lose.gpus = 9: layout ep8 has the ranks 0 to 7"):
        Loss(gpus=(9,), at_s=0).groups(Layout.parse("ep8"))
    with pytest.raises(ConfigurationError, match="recovery_s"):
        Loss(gpus=(1,), at_s=0, recovery_s=float("nan"))
