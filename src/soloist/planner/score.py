"""What one candidate layout does under a load: time per token, time to the first token, throughput, memory.

Requests are served continuously: a decode step of every attention group's sequences, and between the steps the prefill
of the prompts that arrive meanwhile, so TPOT = step + prefill of `prompt / output` tokens for every sequence.

Attention groups meet at every layer's exchange, so all wait for the one that prefills; of its work only the experts' is
spread over all. If a group prefills in a share q of the steps and G groups do so independently of each
other, a step waits in a share 1 - (1 - q)^G of them, and q / (1 - (1 - q)^G) of the groups prefill in it on average.

Where nothing is decoded there are only steps of prompts: the batch's go together, in all groups at once, and the next
ones follow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count, takewhile
from math import ceil, expm1, floor, log2
from typing import NamedTuple

from soloist.planner import host
from soloist.planner.estimate import ZERO, Estimate, total
from soloist.planner.exchange import Mode
from soloist.planner.halves import FEWEST, Halves
from soloist.planner.kernels import OWN_LIBRARY, Kernels
from soloist.planner.layer import Deployment
from soloist.planner.memory import MemoryLoad, worst_rank
from soloist.planner.runtime import Runtime
from soloist.planner.step import Overlap, StepCost, StepModel
from soloist.specs.layout import Layout
from soloist.specs.model import Spec
from soloist.specs.workload import Load

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # sequences of an attention group that are tried
USABLE = 0.92  # share of a GPU's memory that is planned for


class Options(Spec, frozen=True, kw_only=True):
    """How a deployment is driven, apart from its layout."""

    chunk_tokens: int = 8192  # of a prefill step and attention group
    overlap: Overlap = "auto"
    micro_batches: int = 0
    spare_slots: int = 0
    nvlink_sums: bool = True  # our own engine's small sums by its own kernels
    mixed_graphs: str = "auto"  # tokens of prefill steps that our own engine holds in graphs, as in its options

    def __post_init__(self) -> None:
        host.stated(self.mixed_graphs)


class Score(NamedTuple):
    """A deployment under a load. Rates are tokens/s of the whole deployment; `batch` sequences an attention group.

    Where nothing is decoded, `tpot` and `decode` are nothing.
    """

    deployment: Deployment
    options: Options
    batch: float
    tpot: Estimate
    ttft: Estimate
    request_rate: Estimate  # requests/s
    output_rate: Estimate
    input_rate: Estimate
    decode: StepCost
    prefill: StepCost
    memory_of: Callable[[], dict[str, float]]  # most scores are never asked

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by part on the fullest GPU."""
        return self.memory_of()

    @property
    def gpus(self) -> int:
        return self.deployment.layout.size

    @property
    def decodes(self) -> bool:
        return self.tpot.value > 0

    @property
    def work(self) -> StepCost:
        """The steps that the deployment is there for."""
        return self.decode if self.decodes else self.prefill

    @property
    def rate(self) -> Estimate:
        """Output tokens/s, or prompt tokens/s where nothing is decoded."""
        return self.output_rate if self.decodes else self.input_rate

    @property
    def latency(self) -> Estimate:
        """TPOT, or TTFT where nothing is decoded."""
        return self.tpot if self.decodes else self.ttft

    @property
    def rate_per_gpu(self) -> float:
        """Tokens/s and GPU."""
        return self.rate.value / self.gpus

    @property
    def sequences(self) -> float:
        """In flight in the whole deployment."""
        return self.batch * self.deployment.layout.dp * self.deployment.layout.attention_groups


class Scorer:
    """Scores deployments on one cluster. Candidates share step models, which know their steps."""

    def __init__(self, kernels: Kernels, runtime: Runtime, load: Load) -> None:
        self.kernels, self.runtime, self.load = kernels, runtime, load
        self._models: dict[object, StepModel] = {}

    def most_sequences(self, deployment: Deployment, options: Options) -> float:
        """Sequences of an attention group whose KV cache fits; below 1 where not even one does.

        Where decoding steps of so many go as two halves, they have to fit beside the windows of both.
        """
        most = self._room(deployment, options, self._held_halves(deployment, options, 1))
        halves = self._held_halves(deployment, options, most)
        if halves.decode is None:
            return most
        return max(halves.decode // 2, self._room(deployment, options, halves))  # half as many do not pay

    def _room(self, deployment: Deployment, options: Options, halves: Halves) -> float:
        none, one = (sum(self._memory(deployment, options, batch, halves).values()) for batch in (0, 1))
        return (USABLE * 1e9 * self.kernels.cluster.gpu.memory_GB - none) / (one - none)

    def score(self, deployment: Deployment, options: Options, batch: float) -> Score:
        """`batch` sequences in flight in every attention group."""
        if not self.load.decodes:
            return self._of_prompts(deployment, options, batch)
        layout = deployment.layout
        decode = self._step("decode", deployment, options, batch)
        prefill = self._step("prefill", deployment, options, options.chunk_tokens)
        tpot = total((decode.seconds, self._arriving(deployment, options, batch)))
        groups = layout.dp * layout.attention_groups
        output_rate = tpot.inverse(batch * groups)
        return Score(
            deployment=deployment,
            options=options,
            batch=batch,
            tpot=tpot,
            ttft=self._first_token(deployment, options, decode),
            request_rate=output_rate.times(1 / self.load.output),
            output_rate=output_rate,
            input_rate=prefill.seconds.inverse(options.chunk_tokens * groups),
            decode=decode,
            prefill=prefill,
            memory_of=partial(self.memory, deployment, options, batch),
        )

    def _of_prompts(self, deployment: Deployment, options: Options, batch: float) -> Score:
        """`batch` prompts at once, in as few equal steps as they need."""
        tokens, groups = batch * self.load.fresh, deployment.layout.dp * deployment.layout.attention_groups
        steps = ceil(tokens / options.chunk_tokens)
        step = self._step("prefill", deployment, options, tokens / steps)
        through = self._step("prefill", deployment, options, tokens / steps, micro_batches=1)
        request_rate = step.seconds.inverse(batch * groups / steps)
        return Score(
            deployment=deployment,
            options=options,
            batch=batch,
            tpot=ZERO,
            ttft=through.seconds.times(steps),
            request_rate=request_rate,
            output_rate=request_rate.times(self.load.output),
            input_rate=request_rate.times(self.load.fresh),
            decode=StepCost(ZERO, {}, False),
            prefill=step,
            memory_of=partial(self.memory, deployment, options, batch),
        )

    def halves(self, score: Score) -> Halves:
        """The steps of a deployment that are faster as two halves, as the largest are and all down to these."""
        return self._halves(score.deployment, score.options, score.batch)

    def _halves(self, deployment: Deployment, options: Options, batch: float) -> Halves:
        each = ceil(batch / max(1, min(options.micro_batches or deployment.layout.pp, int(batch))))
        return Halves(
            self._halved_from("prefill", deployment, options, options.chunk_tokens),
            self._halved_from("decode", deployment, options, each) if self.load.decodes else None,
        )

    def _halved_from(self, phase: str, deployment: Deployment, options: Options, most: int) -> int | None:
        sizes = takewhile(lambda tokens: tokens >= FEWEST, (most >> power for power in count()))
        pays = takewhile(lambda n: self._step(phase, deployment, options, n, micro_batches=1).is_overlapped, sizes)
        return min(pays, default=None)

    def _arriving(self, deployment: Deployment, options: Options, batch: float) -> Estimate:
        """Prefill, for each decode step, of the prompts that take the place of those that end."""
        groups = deployment.layout.attention_groups
        prompts, new = batch / self.load.output, self.load.fresh  # of a group in a step
        chunk = options.chunk_tokens
        busy = -expm1(-prompts * max(1.0, new / chunk))  # share of the steps in which a group prefills
        some = 1 - (1 - busy) ** groups  # the same of steps in which any does
        step = self._uneven(deployment, options, min(1.0, busy / some))
        return step.times(some / busy * prompts * new / chunk)

    def _uneven(self, deployment: Deployment, options: Options, share: float) -> Estimate:
        """Prefill of the largest step while this share of the groups has one: between powers of two, which candidates
        have in common."""
        below, model = 2.0 ** floor(log2(share)), self.step_model(deployment, options)
        at = partial(model.prefill, options.chunk_tokens, self.load.prompt / 2, options.micro_batches)
        if share == below:
            return at(share).seconds
        nearer = share / below - 1
        return total((at(below).seconds.times(1 - nearer), at(2 * below).seconds.times(nearer)))

    def _first_token(self, deployment: Deployment, options: Options, decode: StepCost) -> Estimate:
        """Prefill of one prompt behind the decode step that is running; queueing is the simulator's matter."""
        return total((self._prompt(deployment, options), decode.seconds))

    def _prompt(self, deployment: Deployment, options: Options) -> Estimate:
        """Prefill of one prompt while no other group prefills: all groups share its rows.

        In as few equal chunks as the largest step allows, one after the other through all stages, since a sequence is
        in one batch at a time.
        """
        chunks = ceil(self.load.fresh / options.chunk_tokens)
        model, share = self.step_model(deployment, options), 1 / deployment.layout.attention_groups
        return model.prefill(self.load.fresh / chunks, self.load.prompt / 2, 1, share).seconds.times(chunks)

    def _step(
        self, phase: str, deployment: Deployment, options: Options, tokens: float, micro_batches: int = 0
    ) -> StepCost:
        """A step of one of the `dp` equal replicas. `micro_batches` 0: as the options say."""
        context = self.load.context if phase == "decode" else self.load.prompt / 2
        model = self.step_model(deployment, options)
        step = model.decode if phase == "decode" else model.prefill
        return step(tokens, context, micro_batches or options.micro_batches)

    def step_model(self, deployment: Deployment, options: Options) -> StepModel:
        """What its steps take, one by one. Graphs of prefill steps are our own engine's, on GPUs."""
        key = self._key(deployment, options)
        if key not in self._models:
            has_graphs = self.kernels.library == OWN_LIBRARY and self.kernels.cluster.gpu.name != "cpu"
            fp8 = deployment.precision.experts == "fp8"
            given = (options.mixed_graphs, deployment.model, deployment.layout, options.chunk_tokens, fp8)
            buckets = host.buckets_of(*given) if has_graphs else ()
            self._models[key] = StepModel(deployment, self.kernels, self.runtime, options.overlap, buckets)
        return self._models[key]

    def _key(self, deployment: Deployment, options: Options) -> object:
        """What step times depend on: not on `dp`."""
        layout = deployment.layout
        traced = (deployment.node_copies, deployment.rank_copies)
        fits = layout.stages_fit(self.kernels.cluster.gpus_per_node)
        return (layout.pp, layout.attention_ranks, layout.ep, layout.tp, fits, deployment.slots, traced, options)

    def _mode(self, layout: Layout) -> Mode:
        """Of the exchange whose buffers stay: Soloist's own inside a node."""
        inside = layout.stages_fit(self.kernels.cluster.gpus_per_node)
        return "pushed" if self.runtime.name == OWN_LIBRARY and inside else "normal"

    def memory(self, deployment: Deployment, options: Options, batch: float) -> dict[str, float]:
        """Bytes by part on the fullest GPU with `batch` sequences in every attention group."""
        return self._memory(deployment, options, batch, self._held_halves(deployment, options, batch))

    def _held_halves(self, deployment: Deployment, options: Options, batch: float) -> Halves:
        """Those that need windows of their own: of the pushed exchange."""
        is_pushed = (deployment.mode or self._mode(deployment.layout)) == "pushed"
        return self._halves(deployment, options, batch) if is_pushed else Halves()

    def _memory(self, deployment: Deployment, options: Options, batch: float, halves: Halves) -> dict[str, float]:
        graphs, longest = self.step_model(deployment, options).mixed_graphs, self.load.longest
        mode, tokens = deployment.mode or self._mode(deployment.layout), options.chunk_tokens
        load = MemoryLoad(
            sequences=batch,
            longest=longest,
            captured=max(graphs, default=0),
            eager=host.largest_eager(graphs, tokens, longest),
            step_tokens=tokens,
            replicated=self.kernels.replicates_below(deployment.layout.attention_ranks),
            spare_slots=options.spare_slots,
            halves=halves,
        )
        return worst_rank(deployment.model, deployment.layout, deployment.precision, load, mode, deployment.slots)
