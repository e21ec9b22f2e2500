"""The messages between processes: front end ↔ ranks, leader ↔ the ranks of its sequences. msgpack over ZeroMQ.

front end ──Submit, Abort, Wake, Tell, Shutdown──► leader ──Allocate, Step, Tell, Shutdown──► peers
front end ◄──Tokens, WakeMe── leader ◄──Hello, Result── peers
front end ◄──Starting, Loading, Ready, Figures, RankError── every rank
"""

from __future__ import annotations

import msgspec

from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.request import FinishReason, Sampled, SamplingParams, StepBatch, TokenLogprob
from soloist.scheduling.scheduler import SchedulerStats


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; the first element of the array names the kind."""


# -- front end → leader ---------------------------------------------------------------------------------------------
class Submit(Message, frozen=True):
    """Continue a prompt. `sequence` is unique within the front end."""

    sequence: int
    prompt: tuple[int, ...]
    params: SamplingParams


class Abort(Message, frozen=True):
    """Forget a sequence; nothing is reported for it any more."""

    sequence: int


class Wake(Message, frozen=True):
    """Leave sleep number `generation` of world `epoch`, or do not begin it."""

    epoch: int
    generation: int


class Tell(Message, frozen=True):
    """Send the front end your figures. Sent to every leader, and by each of them to its peers."""


class Shutdown(Message, frozen=True):
    """Leave the step loop. Sent to every leader, and by each of them to its peers."""


# -- rank → front end -----------------------------------------------------------------------------------------------
class Starting(Message, frozen=True):
    """The rank has come to this part of its start."""

    phase: str


class Loading(Message, frozen=True):
    """Bytes of weights that this rank has read so far."""

    bytes_read: int


class Ready(Message, frozen=True):
    """The rank serves. A leader says what it schedules onto."""

    sizes: SchedulerConfig | None = None


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one sequence gained. Text may lag behind the tokens; it is complete when `finish_reason` is set."""

    sequence: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    margin: float = float("inf")
    error: str | None = None  # with finish_reason "error"
    cached: int = 0  # tokens of the prompt that were found in the cache; with the first token


class Tokens(Message, frozen=True):
    """What one step of one leader brought, or a refusal between steps. `stats` are the scheduler's figures after it."""

    step: int
    deltas: tuple[Delta, ...]
    stats: SchedulerStats


class Figures(Message, frozen=True):
    """What a rank did since it was last asked: seconds of each phase, bytes to each rank, memory, routing."""

    rank: int
    seconds: dict[str, float]  # by phase; with options.measure only
    waited_for_s: dict[int, float]  # by peer, inside the phase "exchange"; by itself where it is not known for whom
    bytes_to: dict[int, int]
    weight_bytes: int
    kv_bytes: int
    steps: int
    routing: bytes = b""  # what the rank recorded (placement/recording.py); with options.record only
    chosen: dict[int, list[int]] = {}  # by layer: tokens that chose each logical expert; with options.count_experts
    rows: dict[int, int] = {}  # by layer: rows that came for this rank's experts; with options.count_experts
    exchange: list[str] = []  # how its tokens crossed nodes, and why, where there was a choice
    memory: dict[str, int] = {}  # bytes by part (engine/memory.py)
    device_bytes: tuple[int, int] = (0, 0)  # of its GPU, whoever holds them: used, and in all

    @property
    def waited_s(self) -> float:
        return sum(self.waited_for_s.values())

    @property
    def busy_s(self) -> float:
        """Of the phases in which it neither exchanged nor waited for another stage."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase not in ("exchange", "waiting"))


class WakeMe(Message, frozen=True):
    """A leader in sleep number `generation` has got work."""

    generation: int


class RankError(Message, frozen=True):
    """The rank is lost. `kind` is the exception's class, `trace` where it was raised."""

    kind: str
    text: str
    trace: str

    @property
    def is_collateral(self) -> bool:
        """The cause probably lies on another rank."""
        return self.kind == "CommunicationError"


# -- leader ↔ peers -------------------------------------------------------------------------------------------------
class Allocate(Message, frozen=True):
    """Make the KV cache: blocks that every rank of the sequences can hold."""

    blocks: int


class Step(Message, frozen=True):
    """Of a leader to its peers: run this batch."""

    batch: StepBatch


class Hello(Message, frozen=True):
    """A peer has loaded; `kv_blocks` fit on it."""

    kv_blocks: int


class Result(Message, frozen=True):
    """What the sampler chose in a step."""

    step: int
    sampled: tuple[Sampled, ...]


ToLeader = Submit | Abort | Wake | Tell | Shutdown
ToFrontEnd = Starting | Loading | Ready | Tokens | Figures | WakeMe | RankError
ToPeer = Allocate | Step | Tell | Shutdown
FromPeer = Hello | Result
