"""One rank's life: meet the others, load, then serve steps until the front end ends it."""

from __future__ import annotations

import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from tokenizers import Tokenizer
from torch.distributed import PrefixStore

from soloist.engine.blame import cause, tell
from soloist.engine.crew import CACHE, Crew, Executor, follow
from soloist.engine.leader import Leader
from soloist.engine.meeting import FRONT_END, Job, Meeting
from soloist.engine.roll_call import await_everybody
from soloist.engine.world import World
from soloist.errors import CommunicationError, ConfigurationError
from soloist.frontend.sockets import Spoke
from soloist.frontend.wire import Loading, RankError, Ready, Starting, ToLeader
from soloist.models.weights import WeightSource
from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.scheduler import Scheduler
from soloist.transport.base import Transport
from soloist.transport.connect import connect, local_world
from soloist.transport.shared_memory import SharedMemoryTransport
from soloist.transport.shared_segment import has_shared_memory
from soloist.transport.symmetric import SymmetricGroup

PROGRESS_S = 0.2  # between reports of a rank that loads
SHARED = "shared_memory"
MakeExecutor = Callable[[Job, World, torch.device, Callable[[int], None]], Executor]
MakeWorld = Callable[[Job, Meeting, torch.device], World]
_groups: Counter[str] = Counter()  # that share memory, by their members: each has a store of its own


def run_rank(
    job: Job, meeting: Meeting, make_executor: MakeExecutor | None = None, make_world: MakeWorld | None = None
) -> Exception | None:
    """Everything that a rank does. Returns what ended it, after telling the front end; None if that was asked for."""
    inbox: Spoke[ToLeader] = Spoke(meeting.find(FRONT_END), meeting.place.rank, ToLeader)
    try:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // meeting.place.local_size))
        device = device_of(job, meeting)
        inbox.send(Starting("connecting"))
        with closing((make_world or build_world)(job, meeting, device)) as world:
            try:
                serve(job, world, meeting, inbox, device, make_executor or load_runner)
            except CommunicationError as error:
                tell(meeting, error)
                raise
            except Exception as error:
                inbox.send(_told(error))  # before its connections break, of which the others complain
                return error
    except Exception as found:
        error = cause(meeting, found)
        inbox.send(_told(error))
        return error
    else:
        return None
    finally:
        inbox.close()


def _told(error: Exception) -> RankError:
    """Called where it is handled, whose traceback goes with it."""
    return RankError(type(error).__name__, str(error), traceback.format_exc())


def serve(
    job: Job, world: World, meeting: Meeting, inbox: Spoke[ToLeader], device: torch.device, make_executor: MakeExecutor
) -> None:
    """Load, then lead or follow. A leader can be found before it has loaded, however long that takes."""

    def report(bytes_read: int) -> None:
        inbox.send(Loading(bytes_read))

    job = replace(job, options=job.options.on(device.type, job.layout.pp, job.layout.attention_ranks))
    inbox.send(Starting("weights"))
    if not world.seat.is_leader:
        follow(make_executor(job, world, device, report), world.seat, meeting, inbox.send)
        return
    with closing(Crew(world.seat, meeting, job.options.deadline_s)) as crew:
        runner = make_executor(job, world, device, report)
        blocks = crew.agree_on_blocks(runner.kv_blocks, job.options.start_deadline_s)
        inbox.send(Starting(CACHE))
        runner.allocate(blocks)
        sizes = scheduler_sizes(job, blocks)
        tokenizer = Tokenizer.from_file(str(job.tokenizer)) if job.tokenizer else None
        inbox.send(Ready(sizes))
        Leader(Scheduler(sizes, job.spec.eos_ids), runner, crew, inbox, world.control, tokenizer).serve()


def scheduler_sizes(job: Job, blocks: int) -> SchedulerConfig:
    """What a leader schedules onto."""
    options = job.options
    return SchedulerConfig(
        blocks=blocks,
        block_size=options.block_size,
        max_batch_tokens=options.max_batch_tokens,
        max_sequences=options.max_sequences,
        max_positions=options.longest(job.spec),
        prefix_caching=options.prefix_caching,
        in_flight=options.micro_batches,
        ahead=options.ahead == "on",
    )


# -- the parts of a rank --------------------------------------------------------------------------------------------
def device_of(job: Job, meeting: Meeting) -> torch.device:
    """The GPU with this rank's index on its host, or the CPU. Raises ConfigurationError where there is no such GPU."""
    wanted, gpus, index = job.options.device, torch.cuda.device_count(), meeting.place.local_rank
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return torch.device("cpu")
    if index >= gpus:
        remedy = (
            f"rank {meeting.place.rank} needs GPU {index} of a host that has {gpus}; use device = cpu or fewer ranks"
        )
        raise ConfigurationError.of("layout", str(job.layout), remedy)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def build_world(job: Job, meeting: Meeting, device: torch.device) -> World:
    """This rank's transports. On GPUs the leaders agree over a CPU group of their own."""
    place, options = meeting.place, job.options
    if place.size == 1:
        return World.build(local_world(1, options.deadline_s)[0], job.layout, options.gpus_per_node)
    kind = transport_kind(job, meeting, device)
    store, deadline_s = meeting.store, options.deadline_s
    root = connect(kind, place.rank, place.size, store, device, deadline_s, meeting.host, options.mpi)
    control = leaders_only(job, meeting) if device.type == "cuda" else None
    windows = partial(symmetric_group, meeting, device) if options.transport == "auto" and nvlink(meeting) else None
    inside, rails = node_ranks(job, meeting, device), may_go_by_node(job) and kind != SHARED
    world = World.build(root, job.layout, options.gpus_per_node, control, windows, inside, rails, options.nvlink_sums)
    world.await_everybody = partial(await_everybody, store, place, options.start_deadline_s)
    return world


def nvlink(meeting: Meeting) -> bool:
    """Whether this host's GPUs that ranks use can read and write each other's memory."""
    gpus = range(meeting.place.local_size) if torch.cuda.device_count() >= meeting.place.local_size else range(0)
    pairs = [(one, other) for one in gpus for other in gpus if one != other]
    return bool(pairs) and all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)


def symmetric_group(meeting: Meeting, device: torch.device, ranks: Sequence[int]) -> SymmetricGroup:
    """Memory that some ranks of a node share. Every rank asks for the same kinds of groups in the same order."""
    index = list(ranks).index(meeting.place.rank)
    members = " ".join(map(str, ranks))
    store = PrefixStore(f"symmetric {members}, {_groups[members]}", meeting.store)
    _groups[members] += 1
    return SymmetricGroup(store, index, len(ranks), device)


def transport_kind(job: Job, meeting: Meeting, device: torch.device) -> str:
    """As asked for; by default NCCL on GPUs, shared memory on one machine's CPUs, gloo on several.

    Nodes are declared: where tokens are to cross them by node, they share no memory, though one machine has them all.
    """
    kind = job.options.transport
    if kind == "local":
        raise ConfigurationError.of("transport", kind, "serves one process only; use shared_memory, gloo, nccl or mpi")
    by_node = job.options.exchange == "hierarchical" and may_go_by_node(job)
    if kind == SHARED and by_node:
        remedy = "joins the ranks of one node; with exchange = hierarchical use auto, gloo, nccl or mpi"
        raise ConfigurationError.of("transport", kind, remedy)
    if kind != "auto":
        return kind
    if device.type == "cuda":
        return "nccl"
    return SHARED if meeting.place.one_host and not by_node else "gloo"


def may_go_by_node(job: Job) -> bool:
    """Whether tokens may cross nodes by hierarchical exchange: several nodes, each of them with whole expert groups."""
    options, tp = job.options, job.layout.tp
    if options.exchange == "flat" or job.layout.size <= options.gpus_per_node:
        return False
    if options.gpus_per_node % tp and options.exchange == "hierarchical":
        remedy = f"cuts expert groups of tp = {tp} ranks; hierarchical exchange needs a multiple of tp"
        raise ConfigurationError.of("gpus_per_node", options.gpus_per_node, remedy)
    return options.gpus_per_node % tp == 0


def node_ranks(job: Job, meeting: Meeting, device: torch.device) -> Transport | None:
    """Shared memory among the ranks of the own declared node, where other nodes are reached over a network.

    None on GPUs, on a single node, where a node has ranks on several machines, and where the user chose a transport for
    flat exchange.
    """
    place, options = meeting.place, job.options
    node = place.rank // options.gpus_per_node
    ranks = range(node * options.gpus_per_node, min(place.size, (node + 1) * options.gpus_per_node))
    here = range(place.rank - place.local_rank, place.rank - place.local_rank + place.local_size)
    chosen = options.transport != "auto" and options.exchange == "flat"
    if device.type == "cuda" or chosen or transport_kind(job, meeting, device) == SHARED:
        return None
    if len(ranks) in (1, place.size) or not set(ranks) <= set(here) or not has_shared_memory():
        return None
    store = PrefixStore(f"node {node}", meeting.store)
    return SharedMemoryTransport(store, ranks, ranks.index(place.rank), options.deadline_s)


def leaders_only(job: Job, meeting: Meeting) -> Transport | None:
    """A gloo transport among the leaders of this rank's replica, None on other ranks or where there is one leader."""
    seat = job.layout.at(meeting.place.rank)
    if not seat.is_leader or len(seat.leaders) == 1:
        return None
    store = PrefixStore(f"leaders {seat.replica}", meeting.store)
    deadline_s = job.options.deadline_s
    return connect("gloo", seat.leaders.index(seat.rank), len(seat.leaders), store, "cpu", deadline_s, meeting.host)


def load_runner(job: Job, world: World, device: torch.device, report: Callable[[int], None]) -> Executor:
    """The decoder with this rank's weights."""
    from soloist.engine.runner import Runner

    source = weight_source(job, device, Progress(report))
    return Runner(job.spec, job.layout, job.placement, world, source, job.options)


def weight_source(job: Job, device: torch.device, progress: Callable[[int], None]) -> WeightSource:
    """The checkpoint, or weights made up from a seed."""
    from soloist.models.checkpoint import Checkpoint
    from soloist.models.random_weights import RandomWeights

    dtype = getattr(torch, job.options.dtype or (job.spec.dtype if device.type == "cuda" else "float32"))
    if job.options.random_weights is not None:
        return RandomWeights(job.spec, job.options.random_weights, dtype, device)
    assert job.folder is not None, "a job has a folder or random weights"
    return Checkpoint(job.folder, job.spec, dtype, device, progress)


@dataclass
class Progress:
    """Adds up bytes read and reports the sum now and then."""

    report: Callable[[int], None]
    _total: int = 0
    _next_s: float = 0.0

    def __call__(self, increment: int) -> None:
        self._total += increment
        if time.monotonic() > self._next_s:
            self._next_s = time.monotonic() + PROGRESS_S
            self.report(self._total)
