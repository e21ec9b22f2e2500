"""The choice of a leader by cached prefix: what it may believe, how much it remembers, and that loads stay even."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from soloist.frontend.prefixes import LONGEST, SLACK, PrefixIndex, choose
from soloist.frontend.requests import Requests
from soloist.frontend.wire import Delta
from soloist.scheduling.request import SamplingParams

BLOCK = 4
VOCAB = 50
LEADERS = (0, 4, 8)
# Few different tokens, so that prompts share beginnings of all lengths.
PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=30)


def common_blocks(first, second) -> int:
    """Full blocks that two prompts have in common and that the first may find: its last token is computed."""
    same = 0
    while same < min(len(first) - 1, len(second) - 1) and first[same] == second[same]:
        same += 1
    return same // BLOCK


@given(st.lists(st.tuples(st.sampled_from(LEADERS), PROMPTS), max_size=20), PROMPTS)
def test_the_longest_prefix_of_every_leader_is_found(sent, prompt):
    index = PrefixIndex(BLOCK, 10_000)
    for leader, earlier in sent:
        index.add(leader, index.digests(earlier))
    best = {
        leader: BLOCK * max(common_blocks(prompt, earlier) for to, earlier in sent if to == leader)
        for leader in {to for to, _ in sent}
    }
    assert index.cached(index.digests(prompt)) == {leader: tokens for leader, tokens in best.items() if tokens}


@given(st.lists(st.tuples(st.sampled_from(LEADERS), PROMPTS), max_size=40), st.integers(1, 12))
def test_memory_is_bounded_and_no_block_outlives_those_before_it(sent, most):
    index = PrefixIndex(BLOCK, most)
    for leader, prompt in sent:
        digests = index.digests(prompt)
        index.add(leader, digests)
        assert len(index) <= most
        assert index.cached(digests).get(leader, 0) == BLOCK * min(len(digests), most)  # the newest is remembered
        for _, earlier in sent:
            there = [digest in index._leaders for digest in index.digests(earlier)]
            assert there == sorted(there, reverse=True)


def test_only_the_beginning_of_a_long_prompt_is_looked_at():
    assert len(PrefixIndex(BLOCK, 10).digests([1] * (LONGEST * BLOCK * 3))) == LONGEST


@given(
    st.dictionaries(st.integers(0, 200), st.integers(0, 10**6), min_size=1, max_size=20),
    st.dictionaries(st.integers(0, 200), st.integers(1, 10**6), max_size=20),
    st.integers(1, 10**6),
)
def test_a_leader_that_is_absent_or_overloaded_is_never_chosen(load, cached, cost):
    leader = choose(load, cached, cost)
    assert leader in load  # whatever the index remembers of others
    assert load[leader] <= (1 + SLACK) * sum(load.values()) / len(load) + cost
    assert load[leader] - min(load.values()) <= cached.get(leader, 0)


@given(
    st.lists(st.tuples(PROMPTS, st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=60),
)
def test_loads_stay_even_whatever_prefixes_clients_send(events):
    """At any time no leader's load is above the mean by more than SLACK and the two largest requests."""
    requests = Requests(LEADERS, VOCAB)
    requests.prefixes = PrefixIndex(BLOCK, 1000)
    largest, running = 0, []
    for prompt, most, ends in events:
        sequence = requests.accept(prompt, SamplingParams(max_tokens=most)).sequences[0]
        running.append(sequence)
        largest = max(largest, len(prompt) + most)
        load = requests._load
        before = load[sequence.leader] - sequence.cost
        mean = (sum(load.values()) - sequence.cost) / len(load)
        assert before <= (1 + SLACK) * mean + largest
        for _ in range(min(ends, len(running))):
            requests.apply(Delta(running.pop(0).submit.sequence, (1,), "", "stop"))


def test_a_conversation_goes_back_to_where_it_was():
    requests = Requests((0, 1, 2, 3), VOCAB)
    requests.prefixes = PrefixIndex(BLOCK, 1000)
    chats = [[10 + chat] * 40 for chat in range(8)]
    homes: list[set[int]] = [set() for _ in chats]
    for _ in range(3):
        open_sequences = []
        for chat, prompt in enumerate(chats):
            (sequence,) = requests.accept(prompt, SamplingParams(max_tokens=8)).sequences
            homes[chat].add(sequence.leader)
            open_sequences.append((chat, sequence))
        assert max(requests._load.values()) <= 1.5 * min(requests._load.values())
        for chat, sequence in open_sequences:
            requests.apply(Delta(sequence.submit.sequence, (3,) * 8, "", "length"))
            chats[chat] = [*chats[chat], *[3] * 8, *[5] * 4]
    assert [len(home) for home in homes] == [1] * len(chats)
    assert sequence.fresh <= BLOCK + 4 + 8  # of 64 tokens


def test_a_short_common_beginning_does_not_gather_everything_on_one_leader():
    requests = Requests((0, 1, 2, 3), VOCAB)
    requests.prefixes = PrefixIndex(BLOCK, 1000)
    for other in range(4):
        requests.accept([1] * 8 + [10 + other] * 20, SamplingParams(max_tokens=8))
    assert len(requests.waiting_for()) == 4
