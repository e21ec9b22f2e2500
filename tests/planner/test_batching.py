"""Chunks and messages follow from the links: joined where latency rules, split where two stages can overlap."""

from __future__ import annotations

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soloist.errors import ConfigurationError
from soloist.planner.batching import MOST_CHUNKS, Link, Links, Traffic, choose, links_of, pipeline_seconds
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.presets import preset

TRAFFIC = Traffic(nodes=1.0, groups=2.0, inside=2.0, row_bytes=1000)


def links(network: str, inside: str, flat: str = "") -> Links:
    return Links(
        network=Link.parse(network), inside=Link.parse(inside), flat=Link.parse(flat or network), source="declared"
    )


def test_small_messages_are_joined() -> None:
    assert choose(4, TRAFFIC, links("1000,100", "1000,100"), "hierarchical").chunks == 1


def test_a_huge_one_is_split_so_that_stages_overlap() -> None:
    found = choose(8192, TRAFFIC, links("10,100", "20,50"), "hierarchical")
    unsplit = pipeline_seconds(1, 8192e3, 2 * 8192e3, links("10,100", "20,50"))
    assert found.chunks > 4
    assert found.seconds < 0.6 * unsplit


def test_the_number_of_chunks_is_that_of_the_formula() -> None:
    """c = sqrt(n_2 / (W_2 L_1)) where the network is the longer stage and no bound is met."""
    tokens, given = 1000, links("10,2000", "100,1")
    wanted = sqrt(tokens * 2 * 1000 / 100e6 / 2000e-6)
    assert choose(tokens, TRAFFIC, given, "hierarchical").chunks == round(wanted) == 3


def test_a_chunk_fits_into_the_buffer() -> None:
    found = choose(4096, TRAFFIC, links("1000,5000", "1000,5000"), "hierarchical", buffer_bytes=1 << 20)
    assert found.chunks == 8  # of 8 MB inside the node
    assert max(found.network_bytes, found.inside_bytes) <= 1 << 20


@given(
    st.integers(1, 100_000),
    st.floats(0.1, 1e6),
    st.floats(0, 1e5),
    st.floats(0.1, 1e6),
    st.floats(0, 1e5),
)
def test_no_other_number_of_chunks_is_faster(tokens: int, w1: float, l1: float, w2: float, l2: float) -> None:
    given = links(f"{w1},{l1}", f"{w2},{l2}")
    found = choose(tokens, TRAFFIC, given, "hierarchical", buffer_bytes=1 << 40)
    others = [pipeline_seconds(c, tokens * 1e3, tokens * 2e3, given) for c in range(1, min(MOST_CHUNKS, tokens) + 1)]
    assert found.seconds == min(others)


def test_by_node_only_where_the_network_is_the_slower_link() -> None:
    slow, fast = links("10,100", "1000,100"), links("1000,100", "1000,100")
    assert choose(2048, TRAFFIC, slow).hierarchical
    assert not choose(2048, TRAFFIC, fast).hierarchical  # a second stage, and nothing gained
    assert not choose(2048, TRAFFIC, slow, "flat").hierarchical
    assert choose(2048, TRAFFIC, fast, "hierarchical").hierarchical


def test_the_users_number_stands() -> None:
    assert choose(2048, TRAFFIC, links("10,100", "20,50"), "hierarchical", chunks=3).chunks == 3


def test_group_limited_routing_reaches_fewer_nodes() -> None:
    """DeepSeek-V3: 8 of 256 experts in at most 4 of 8 groups, a group on each of 8 nodes."""
    found = Traffic.of(preset("deepseek-v3"), Layout(ep=64), 8, 7168)
    assert found.nodes < 4 * 7 / 8
    assert found.groups > 2 * found.nodes


def test_a_clusters_links_are_its_declared_ones() -> None:
    found = links_of(cluster("h100-ib"))
    assert found.network.rate == 50e9
    assert "12 chunks" in str(choose(2048, TRAFFIC, found, "hierarchical", chunks=12))


@pytest.mark.parametrize("text", ["", "12", "a,b", "0,5", "5,-1", "1,2,3"])
def test_a_wrong_link_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="network_link"):
        Link.parse(text, "network_link")
