"""Which leader probably has which prefix in its KV cache, and the choice of a leader by that.

The front end does not ask: it remembers what it sent where, block by block, as the leaders' own caches do. A belief may
be out of date, since a leader forgets what it has no room for. That costs a detour, never an answer, and not twice: the
leader then computes the prefix and has it again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from soloist.scheduling.blocks import ROOT, chain

MOST_BLOCKS = 1 << 18  # that the index remembers, about 60 MB
LONGEST = 1024  # blocks of a prompt that are looked at
SLACK = 0.25  # of the leaders' mean load by which one may be ahead for the sake of a prefix


class PrefixIndex:
    """Digest of a block and of all before it → leaders that have it. Least recently used blocks are forgotten.

    A block is always used together with those before it, and they count as used later than it. So blocks are
    forgotten from the end of a prefix, and none is remembered without those before it.
    """

    def __init__(self, block_size: int, blocks: int) -> None:
        """`blocks`: of all leaders' KV caches together; the index remembers no more, and at most `MOST_BLOCKS`."""
        self.block_size, self.most = block_size, min(blocks, MOST_BLOCKS)
        self._leaders: OrderedDict[bytes, int] = OrderedDict()  # a bit for each leader; least recently used first

    def __len__(self) -> int:
        return len(self._leaders)

    def digests(self, tokens: Sequence[int]) -> list[bytes]:
        """Of the full blocks that a sequence may find in a cache: its last token is always computed."""
        size, digest, found = self.block_size, ROOT, list[bytes]()
        for start in range(0, min(len(tokens) - size, LONGEST * size), size):
            digest = chain(digest, tokens[start : start + size])
            found.append(digest)
        return found

    def add(self, leader: int, digests: Sequence[bytes]) -> None:
        """A leader was given these blocks, which begin at the start of a sequence."""
        for digest in reversed(digests):
            self._leaders[digest] = self._leaders.pop(digest, 0) | 1 << leader
        while len(self._leaders) > self.most:
            self._leaders.popitem(last=False)

    def cached(self, digests: Sequence[bytes]) -> dict[int, int]:
        """Leader → tokens of the longest prefix that it has; leaders without any are left out."""
        found: dict[int, int] = {}
        alive = -1
        for depth, digest in enumerate(digests):
            still = alive & self._leaders.get(digest, 0)
            if depth and still != alive:
                found |= dict.fromkeys(_bits(alive & ~still), depth * self.block_size)
            alive = still
            if not alive:
                return found
        return found | dict.fromkeys(_bits(alive), len(digests) * self.block_size) if digests else found


def choose(load: Mapping[int, int], cached: Mapping[int, int], cost: int) -> int:
    """A leader for a request of `cost`: the one with the least to do after what its cache spares it.

    load: tokens that each leader there is has still to compute. A leader takes part only while its load is at most
    (1 + SLACK) · mean load + `cost`. So it is ahead of the idlest by no more than the prefix spares, and whatever
    prefixes clients send, no load exceeds the mean by more than SLACK and two requests.
    """
    limit = (1 + SLACK) * sum(load.values()) / len(load) + cost
    fit = (leader for leader, tokens in load.items() if tokens <= limit)
    return min(fit, key=lambda leader: (load[leader] - cached.get(leader, 0), load[leader]))


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
