from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soloist.errors import ConfigurationError
from soloist.specs.layout import Layout, share
from tests.specs.models import tiny_spec as spec

degrees = st.integers(1, 4)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    ep, tp = draw(degrees), draw(degrees)
    options = [tp * m for m in range(1, ep + 1) if ep % m == 0]
    return Layout(pp=draw(degrees), dp=draw(degrees), ep=ep, tp=tp, attn_tp=draw(st.sampled_from([0, *options])))


@given(layouts())
def test_text_round_trip(layout: Layout) -> None:
    again = Layout.parse(str(layout))
    assert (again.pp, again.dp, again.ep, again.tp) == (layout.pp, layout.dp, layout.ep, layout.tp)
    assert again.attention_ranks == layout.attention_ranks


@given(layouts())
def test_groups_partition_the_ranks(layout: Layout) -> None:
    seats = [layout.at(rank) for rank in range(layout.size)]
    for name in ("expert_peers", "tp_peers", "attention_peers", "pipeline_peers", "sequence_peers"):
        groups = {getattr(seat, name) for seat in seats}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.size)), name
        assert all(seat.rank in getattr(seat, name) for seat in seats), name
    assert {seat.leader for seat in seats} == {seat.rank for seat in seats if seat.is_leader}
    assert all(layout.at(seat.sampler).is_last_stage for seat in seats)
    assert {leader for seat in seats for leader in seat.leaders} == {seat.leader for seat in seats}


@given(layouts())
def test_expert_peers_are_one_of_each_group_in_order(layout: Layout) -> None:
    for rank in range(layout.size):
        seat = layout.at(rank)
        peers = [layout.at(peer) for peer in seat.expert_peers]
        assert [peer.group for peer in peers] == list(range(layout.ep))
        assert {(peer.tp_index, peer.stage, peer.replica) for peer in peers} == {
            (seat.tp_index, seat.stage, seat.replica)
        }


@given(st.integers(0, 100), st.integers(1, 20))
def test_shares_cover_everything_once_and_evenly(total: int, parts: int) -> None:
    spans = [share(total, parts, index) for index in range(parts)]
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == total
    sizes = [stop - start for start, stop in spans]
    assert max(sizes) - min(sizes) <= 1


def test_known_layouts() -> None:
    assert Layout.parse("tp8pp2").size == 16
    assert Layout.parse("tp8pp2").at(9).attention_peers == tuple(range(8, 16))
    assert Layout.parse("tp8pp2").at(9).pipeline_peers == (1, 9)
    assert Layout.parse("attn8ep8").attention_groups == 1
    assert Layout.parse("ep16").attention_groups == 16
    assert [len(Layout.parse("pp4ep4").stage_layers(stage, 6)) for stage in range(4)] == [2, 2, 1, 1]


@pytest.mark.parametrize("text", ["", "ep", "ep0", "xp4", "ep4ep4", "ep4 tp2", "16", "attn3ep8", "attn2tp4", "ep-1"])
def test_nonsense_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigurationError, match="layout"):
        Layout.parse(text)


@pytest.mark.parametrize(("layout", "message"), [("pp8", "pp <= 3"), ("tp6", "tp <= 5"), ("attn12ep12", "attn <= 11")])
def test_a_layout_that_cannot_cut_the_model_is_refused(layout: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Layout.parse(layout).check(spec())
