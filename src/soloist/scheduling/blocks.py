"""The blocks of a paged KV cache: which are free, who holds which, and which hold a known prefix.

A block is in one of three states:

    free ── take ──► held (references ≥ 1) ── last release ──► idle (content cached, no reference)
      ▲                 │        ▲                                │
      └─ last release ──┘        └──────────── hold ──────────────┤   found again as a prefix
         (content not cached)    └──────────── take ──────────────┘   least recently used: content forgotten
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

ROOT = b""  # parent of a sequence's first block


def chain(parent: bytes, tokens: Iterable[int]) -> bytes:
    """Digest of a full block and of all before it; equal digests stand for equal token prefixes."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Hands out block numbers 0 … `total` - 1. Knows nothing of sequences; holds no KV itself.

    A block's content may be shared once it is full and computed: `cache` names it by its digest, `find` finds it,
    and nobody writes to it again while the name lasts.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._references = [0] * total
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can hand out."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.total - self.available

    def take(self, count: int) -> tuple[int, ...]:
        """`count` blocks of undefined content, held once each. The caller has checked `available`."""
        assert count <= self.available
        return tuple(self._take() for _ in range(count))

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._digest_of.pop(block)]
        self._references[block] = 1
        return block

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder of cached blocks."""
        for block in blocks:
            self._references[block] += 1
            self._idle.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less of a sequence's blocks. Its last ones are forgotten first: prefixes are worth more."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if self._references[block]:
                continue
            if block in self._digest_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def cache(self, block: int, digest: bytes) -> None:
        """Offer a full, computed block to later sequences. Where the content is known already, that copy stays."""
        assert self._references[block]
        assert block not in self._digest_of
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def find(self, digests: Iterable[bytes]) -> tuple[int, ...]:
        """The blocks of the longest cached prefix. They are not held yet."""
        found: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def idle_among(self, blocks: Iterable[int]) -> int:
        """How many of these nobody holds: holding them leaves that many less `available`."""
        return sum(block in self._idle for block in blocks)
