"""Block pool: random operations against a plain model of who holds what."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from soloist.scheduling.blocks import ROOT, BlockPool, chain

TOTAL = 7


class PoolMachine(RuleBasedStateMachine):
    """Holders keep lists of blocks. The model knows each held block's holders and each named block's content."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.holders: Counter[int] = Counter()
        self.content: dict[int, bytes] = {}  # of named blocks; may be stale for blocks nobody holds

    @rule(target=tables, count=st.integers(0, TOTAL))
    def take(self, count: int) -> object:
        if count > self.pool.available:
            return multiple()
        blocks = self.pool.take(count)
        assert len(set(blocks)) == count
        assert not any(self.holders[block] for block in blocks)
        for block in blocks:
            self.content.pop(block, None)
        self.holders.update(blocks)
        return blocks

    @rule(table=consumes(tables))
    def release(self, table: tuple[int, ...]) -> None:
        self.pool.release(table)
        self.holders.subtract(table)

    @rule(table=tables, text=st.lists(st.integers(0, 1), min_size=TOTAL, max_size=TOTAL))
    def cache(self, table: tuple[int, ...], text: list[int]) -> None:
        digest = ROOT
        for block, token in zip(table, text, strict=False):
            digest = chain(digest, [token])
            if block in self.content:
                break
            if not self.pool.find([digest]):
                self.content[block] = digest
            self.pool.cache(block, digest)

    @precondition(lambda self: self.content)
    @rule(target=tables, data=st.data())
    def share(self, data: st.DataObject) -> object:
        digest = data.draw(st.sampled_from(sorted(self.content.values())))
        found = self.pool.find([digest])
        idle = self.pool.idle_among(found)
        assert idle == sum(not self.holders[block] for block in found)
        before = self.pool.available
        self.pool.hold(found)
        assert self.pool.available == before - idle
        self.holders.update(found)
        return found

    @invariant()
    def nothing_leaks(self) -> None:
        held = sum(count > 0 for count in self.holders.values())
        assert self.pool.used == held
        assert self.pool.available == TOTAL - held

    @invariant()
    def what_is_found_holds_what_it_should(self) -> None:
        for block, digest in self.content.items():
            found = self.pool.find([digest])
            assert not found or self.content[found[0]] == digest
            if self.holders[block]:  # while it is held, a name lasts
                assert found


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_prefixes_outlive_their_continuations() -> None:
    pool = BlockPool(3)
    blocks = pool.take(3)
    digests = [chain(ROOT, [1])]
    digests.append(chain(digests[0], [2]))
    digests.append(chain(digests[1], [3]))
    for block, digest in zip(blocks, digests, strict=True):
        pool.cache(block, digest)
    pool.release(blocks)
    assert pool.find(digests) == blocks
    pool.release(pool.take(1))
    assert pool.find(digests) == blocks[:2]


def test_least_recently_used_is_forgotten_first() -> None:
    pool = BlockPool(2)
    first, second = pool.take(2)
    pool.cache(first, chain(ROOT, [1]))
    pool.cache(second, chain(ROOT, [2]))
    pool.release([first])
    pool.release([second])
    pool.hold([first])
    pool.release([first])
    assert pool.take(1) == (second,)


def test_digest_depends_on_every_token_before() -> None:
    assert chain(chain(ROOT, [1, 2]), [3, 4]) != chain(chain(ROOT, [2, 1]), [3, 4])
    assert chain(ROOT, [1, 2]) != chain(ROOT, [1, 2, 0])
