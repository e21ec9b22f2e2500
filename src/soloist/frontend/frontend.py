"""The front end: takes requests, hands them to leaders, gathers what they send back. One thread, no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from soloist import errors
from soloist.errors import ClusterError, SoloistError
from soloist.frontend.prefixes import PrefixIndex
from soloist.frontend.requests import Request, Requests
from soloist.frontend.sockets import Hub
from soloist.frontend.wire import (
    Abort,
    Figures,
    Loading,
    RankError,
    Ready,
    Shutdown,
    Starting,
    Tell,
    ToFrontEnd,
    Tokens,
    Wake,
    WakeMe,
)
from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.request import SamplingParams
from soloist.scheduling.scheduler import SchedulerStats
from soloist.specs.layout import Layout

POLL_S = 0.1  # between looks at the ranks' health
GRACE_S = 2.0  # for the rank that caused an error to say so, after others have said that they suffered from it
LAST_WORDS_S = 0.5  # of silence after which a rank that has ended had nothing to say


@dataclass
class RankReport:
    """What a rank has told about itself."""

    phases: dict[str, float] = field(default_factory=dict)  # of its start: when each of them began
    bytes_read: int = 0
    ready: bool = False
    sizes: SchedulerConfig | None = None  # of leaders
    stats: SchedulerStats | None = None  # of leaders, after their last step; at first, empty
    figures: Figures | None = None  # those that it was asked for last
    heard_s: float = field(default_factory=time.monotonic)  # when; or when it was last given work after a rest

    @property
    def phase(self) -> str:
        """The part of its start that it has come to."""
        return next(reversed(self.phases), "its process")


class FrontEnd:
    """Serves requests on the ranks of a layout.

    `ended_ranks` tells which processes have ended, and how. When a rank is lost, every waiting request ends with the
    cause, and every later call raises it.
    """

    def __init__(
        self,
        layout: Layout,
        vocab: int,
        hub: Hub[ToFrontEnd],
        deadline_s: float,
        ended_ranks: Callable[[], dict[int, str]],
    ) -> None:
        self.layout, self.hub, self.deadline_s, self._ended_ranks = layout, hub, deadline_s, ended_ranks
        self.ranks = {rank: RankReport() for rank in range(layout.size)}
        self.leaders = tuple(rank for rank in self.ranks if layout.at(rank).is_leader)
        self.requests = Requests(self.leaders, vocab)
        self.failure: SoloistError | None = None
        self.epoch = 0
        self._errors: dict[int, RankError] = {}
        self._next_look_s = 0.0
        self._woken: dict[tuple[int, ...], int] = {}  # leaders that step together → the last sleep they were woken from

    # -- start and end ----------------------------------------------------------------------------------------------
    def wait_ready(self, deadline_s: float, progress: Callable[[dict[int, RankReport]], None]) -> None:
        """Until every rank has loaded. Raises what a rank failed with, or ClusterError after `deadline_s`."""
        end = time.monotonic() + deadline_s
        while missing := [rank for rank, report in self.ranks.items() if not report.ready]:
            self.pump(POLL_S)
            self.raise_failure()
            if time.monotonic() > end:
                reached = f"rank {missing[0]} had come to: {self.ranks[missing[0]].phase}"
                raise ClusterError(f"ranks {missing} were not ready after start_deadline_s = {deadline_s:g}; {reached}")
            progress(self.ranks)
        sizes = [report.sizes for report in self.ranks.values() if report.sizes]
        if sizes[0].prefix_caching and len(sizes) > 1:
            self.requests.prefixes = PrefixIndex(sizes[0].block_size, sum(size.blocks for size in sizes))

    def close(self) -> None:
        """Ask all ranks to end; does not wait for them. Waiting requests end with an error."""
        if self.hub.closed:
            return
        self.hub.send(self.leaders, Shutdown())
        self.failure = self.failure or ClusterError("the engine was closed")
        self.requests.fail_all(str(self.failure))
        self.hub.close()

    def ask_figures(self) -> None:
        """Have every rank tell what it did since it was last asked: `RankReport.figures`, None until it has."""
        for report in self.ranks.values():
            report.figures = None
        self.hub.send(self.leaders, Tell())

    def figures(self) -> dict[int, Figures]:
        """What every rank did since it was last asked. Raises ClusterError if one does not answer in time."""
        self.ask_figures()
        end = time.monotonic() + self.deadline_s
        while missing := [rank for rank, report in self.ranks.items() if report.figures is None]:
            self.pump(POLL_S)
            self.raise_failure()
            if time.monotonic() > end:
                raise ClusterError(f"ranks {missing} did not send their figures within {self.deadline_s:g} s")
        return {rank: report.figures for rank, report in self.ranks.items() if report.figures}

    # -- requests ---------------------------------------------------------------------------------------------------
    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Hand a request to the ranks. Raises RequestError for one that cannot be served."""
        self.raise_failure()
        self._check_fits(len(prompt), params.max_tokens)
        busy = self.requests.waiting_for()
        request = self.requests.accept(prompt, params)
        for sequence in request.sequences:
            if sequence.leader not in busy:
                self.ranks[sequence.leader].heard_s = time.monotonic()
            self.hub.send([sequence.leader], sequence.submit)
        return request

    def abort(self, request: Request) -> None:
        """End a request with what it has. Nothing happens to one that has ended."""
        for sequence in self.requests.abort(request):
            self.hub.send([sequence.leader], Abort(sequence.submit.sequence))

    def pump(self, timeout_s: float = POLL_S, most: int | None = None) -> list[Request]:
        """Take in what the ranks have sent, waiting for the first message. Returns the requests that gained something.

        most: messages to take in at once; None takes all there are. A failure of the ranks is kept in `failure`, not
        raised here.
        """
        touched: list[Request] = []
        received = self.hub.receive(timeout_s)
        for taken in count(1):
            if received is None:
                break
            touched += self._take(*received)
            received = None if taken == most else self.hub.receive(0)
        if self.failure is None and (trouble := self._trouble()):
            self.failure = self._cause(trouble)
            touched += self.requests.fail_all(str(self.failure))
        return touched

    def raise_failure(self) -> None:
        """Raise what the ranks failed with, if they did."""
        if self.failure:
            raise self.failure

    @property
    def longest_sequence(self) -> int:
        """Tokens that a sequence may reach on every leader, prompt and continuation together."""
        return min(report.sizes.longest_sequence for report in self.ranks.values() if report.sizes)

    def _check_fits(self, prompt: int, max_tokens: int) -> None:
        """Refuse at the door what some leader could never finish."""
        for sizes in {report.sizes for report in self.ranks.values() if report.sizes}:
            sizes.check_lengths(prompt, max_tokens)

    # -- messages ---------------------------------------------------------------------------------------------------
    def _take(self, rank: int, message: ToFrontEnd) -> list[Request]:
        report = self.ranks[rank]
        report.heard_s = time.monotonic()
        match message:
            case Tokens():
                report.stats = message.stats
                return [request for delta in message.deltas if (request := self.requests.apply(delta))]
            case WakeMe():
                self._wake(rank, message.generation)
            case Starting(phase):
                report.phases[phase] = report.heard_s
            case Loading():
                report.bytes_read = message.bytes_read
            case Ready():
                report.ready, report.sizes = True, message.sizes
                if message.sizes:
                    report.stats = SchedulerStats(0, 0, 0, 0, message.sizes.blocks, 0, 0, 0)
            case Figures():
                report.figures = message
            case RankError():
                self._errors[rank] = message
        return []

    def _wake(self, rank: int, generation: int) -> None:
        """Once for each sleep, however many leaders ask."""
        leaders = self.layout.at(rank).leaders
        if generation > self._woken.get(leaders, 0):
            self._woken[leaders] = generation
            self.hub.send(leaders, Wake(self.epoch, generation))

    # -- failures ---------------------------------------------------------------------------------------------------
    def _trouble(self) -> str | None:
        """A first sign that a rank is lost. Silence is the last resort: stuck peers are found within the deadline."""
        if self._errors:
            return next(iter(self._errors.values())).text
        now = time.monotonic()
        if now < self._next_look_s:
            return None
        self._next_look_s = now + POLL_S
        if ended := self._ended_ranks():
            return "; ".join(f"rank {rank} {how}" for rank, how in ended.items())
        limit = 2 * self.deadline_s
        silent = sorted(r for r in self.requests.waiting_for() if self.ranks[r].heard_s < now - limit)
        return f"ranks {silent} have work and said nothing for {limit:g} s" if silent else None

    def _cause(self, trouble: str) -> SoloistError:
        """Ranks that suffer may speak before the one that fails: listen as long as somebody is left, then choose."""
        end = time.monotonic() + GRACE_S
        while all(error.is_collateral for error in self._errors.values()):
            late, ended = time.monotonic() > end, self._ended_ranks().keys()  # before the look for their last words
            if received := self.hub.receive(0 if late else LAST_WORDS_S):
                self._take(*received)
            elif late or self.ranks.keys() <= self._errors.keys() | ended:
                break
        for rank, error in self._errors.items():
            if not error.is_collateral:
                return _rebuilt(rank, error)
        for rank, how in self._ended_ranks().items():
            if rank not in self._errors:
                return ClusterError(f"rank {rank} {how}")
        for rank, error in self._errors.items():
            return _rebuilt(rank, error)
        return ClusterError(trouble)


def _rebuilt(rank: int, error: RankError) -> SoloistError:
    """The exception of a rank, of its own class where a user can help it, with its traceback as a note."""
    kinds = {"ConfigurationError", "CheckpointError", "CapacityError"}
    kind = getattr(errors, error.kind) if error.kind in kinds else ClusterError
    name = "" if hasattr(errors, error.kind) else f"{error.kind}: "
    text = name + error.text.removeprefix(f"rank {rank}: ")
    rebuilt = kind(f"rank {rank}: {text}")
    rebuilt.add_note(error.trace)
    return rebuilt
