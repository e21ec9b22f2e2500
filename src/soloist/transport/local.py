"""Ranks as threads of one process: the plainest implementation, which the others are compared with."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soloist.errors import CommunicationError
from soloist.transport.base import Transport
from soloist.transport.exchange import ExchangeTransport, parts_of


@dataclass
class Mailbox:
    """What was sent to one member and not yet taken, in order for each key."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    letters: defaultdict[Hashable, deque[Tensor]] = field(default_factory=lambda: defaultdict(deque))

    def put(self, key: Hashable, letter: Tensor) -> None:
        with self.changed:
            self.letters[key].append(letter)
            self.changed.notify_all()


class LocalGroup:
    """The memory that the members of one world or sub-world share."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.mailboxes = [Mailbox() for _ in ranks]
        self.closed: set[int] = set()
        self._subgroups: dict[Hashable, LocalGroup] = {}
        self._lock = threading.Lock()

    def subgroup(self, members: tuple[int, ...], nth: int) -> LocalGroup:
        """The same group for all who ask for the nth sub-world of these members."""
        with self._lock:
            return self._subgroups.setdefault((members, nth), LocalGroup([self.ranks[i] for i in members]))

    def close(self, member: int) -> None:
        """What this member has sent stays; nobody waits for more."""
        self.closed.add(member)
        for mailbox in self.mailboxes:
            with mailbox.changed:
                mailbox.changed.notify_all()


@dataclass(frozen=True)
class _Rows:
    """An exchange under way."""

    take: Callable[[int], Tensor]
    size: int

    def wait(self) -> tuple[Tensor, list[int]]:
        parts = [self.take(source) for source in range(self.size)]
        return torch.cat(parts), [len(part) for part in parts]


class LocalTransport(ExchangeTransport):
    """One member of a `LocalGroup`. Messages are copied when sent, so senders never wait."""

    def __init__(self, group: LocalGroup, rank: int, deadline_s: float = 60.0) -> None:
        super().__init__(group.ranks, rank, deadline_s)
        self.group = group
        self._exchanges = 0
        self._subgroups: defaultdict[tuple[int, ...], int] = defaultdict(int)

    def _start(
        self, rows_RW: Tensor, send_counts: Sequence[int] | None, recv_counts: Sequence[int] | None, where: str
    ) -> _Rows:
        nth, self._exchanges = self._exchanges, self._exchanges + 1
        for mailbox, part in zip(self.group.mailboxes, parts_of(rows_RW, send_counts, self.size), strict=True):
            mailbox.put((self.rank, nth), part.clone())
        return _Rows(lambda source: self._take(source, nth, where), self.size)

    def send(self, x_N: Tensor, peer: int, where: str = "") -> None:
        self.traffic.count_message(peer, x_N.nbytes)
        self.group.mailboxes[peer].put((self.rank, "message"), x_N.clone(memory_format=torch.contiguous_format))

    def recv(self, shape: Sequence[int], dtype: torch.dtype, peer: int, where: str = "") -> Tensor:
        message = self._take(peer, "message", where)
        assert message.dtype == dtype, f"{message.dtype} came from rank {self.ranks[peer]}, {dtype} was expected"
        return message.view(*shape)

    def _take(self, source: int, kind: Hashable, where: str) -> Tensor:
        mailbox, key = self.group.mailboxes[self.rank], (source, kind)
        with self.traffic.waiting(source), mailbox.changed:
            mailbox.changed.wait_for(lambda: mailbox.letters[key] or source in self.group.closed, self.deadline_s)
            if not mailbox.letters[key]:
                closed = source in self.group.closed
                reason = "has closed" if closed else f"no answer within {self.deadline_s:g} s"
                raise CommunicationError(self.ranks[self.rank], self.ranks[source], where, reason)
            letter = mailbox.letters[key].popleft()
            if not mailbox.letters[key]:
                del mailbox.letters[key]
            return letter

    def subgroup(self, members: Sequence[int]) -> Transport:
        chosen = tuple(members)
        group = self.group.subgroup(chosen, self._subgroups[chosen])
        self._subgroups[chosen] += 1
        return LocalTransport(group, chosen.index(self.rank), self.deadline_s)

    def close(self) -> None:
        self.group.close(self.rank)
