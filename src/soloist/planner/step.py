"""Time of one decode step and of one prefill step of a deployment.

    stage  = layers of the slowest stage, with overlap or without, + output head
    decode = micro-batches in flight · stage(batch / micro-batches) + hops + host's part   (pipeline full)
    prefill = stage(chunk) · (1 + bubble)
    stage at least as long as the host's launches where no graph holds the step: `host`

Overlap of two half batches: each half's compute C and exchange M take 2C + 2M − η · min(2C, 2M), which pays only if the
fixed costs that both halves pay, and the launches of both, are less than what is hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from soloist.planner import host
from soloist.planner.calibration import UNMEASURED
from soloist.planner.estimate import Estimate, total
from soloist.planner.kernels import OWN_LIBRARY, Kernels, Parts
from soloist.planner.layer import COMMUNICATION, Batch, Deployment, dense_parts, moe_parts, way_of
from soloist.planner.runtime import Runtime
from soloist.specs.model import ModelSpec

Overlap = Literal["on", "off", "auto"]
WORTH = 0.05  # of a step, which halves have to save; the prediction of a small gain is not worth much


class StepCost(NamedTuple):
    """`seconds` of the whole step; `parts` of it, by what they are spent on; whether two half batches overlapped."""

    seconds: Estimate
    parts: Parts
    is_overlapped: bool

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name].value)


class StepModel:
    """Step times of one deployment on one cluster."""

    def __init__(
        self,
        deployment: Deployment,
        kernels: Kernels,
        runtime: Runtime,
        overlap: Overlap = "auto",
        mixed_graphs: tuple[int, ...] = (),
    ) -> None:
        """mixed_graphs: tokens of prefill steps that graphs are asked to hold, as in the engine's option of this name.

        Those that none can hold are left out.
        """
        self.deployment, self.kernels, self.runtime, self.overlap = deployment, kernels, runtime, overlap
        self.mixed_graphs = tuple(tokens for tokens in mixed_graphs if not self._crosses(tokens))
        self._known: dict[tuple[Batch, float], StepCost] = {}

    def decode(self, sequences: float, context: float, micro_batches: int = 0) -> StepCost:
        """One token for each of `sequences` sequences of every attention group, `context` tokens each on average.

        `micro_batches` in flight in the pipeline; 0: one for each stage.
        """
        pp = self.deployment.layout.pp
        flights = max(1, min(micro_batches or pp, int(max(1.0, sequences))))
        tokens = sequences / flights
        batch = Batch("decode", tokens, context, 0.0 if self._crosses(tokens) else tokens)
        cost = self._step(batch, max(flights, pp))
        return _waiting(cost, 1e-6 * self.runtime["sequence_us"] * tokens if pp > 1 else 0.0)

    def prefill(self, tokens: float, context: float, micro_batches: int = 0, share: float = 1.0) -> StepCost:
        """A chunk of `tokens` new tokens of every attention group, each seeing `context` tokens on average.

        `share`: of them that a group has on average, where some have none.
        The time is that after which the next chunk ends, the pipeline being kept full by `micro_batches` chunks.
        """
        pp = self.deployment.layout.pp
        bucket = host.bucket_of(self.mixed_graphs, tokens) if 2 * context <= host.SHORT_CONTEXT else None
        flights = max(1, micro_batches or 8 * pp)
        bubble = (flights + pp - 1) / flights / (self.runtime["pipeline"] if pp > 1 else 1.0)
        return self._step(Batch("prefill", tokens, context, float(bucket or 0), share), bubble)

    def _step(self, batch: Batch, factor: float) -> StepCost:
        """A stage's cost `factor` times, and what a step costs once, in the form that is faster."""
        if (batch, factor) not in self._known:
            self._known[batch, factor] = self._fastest_step(batch, factor)
        return self._known[batch, factor]

    def _fastest_step(self, batch: Batch, factor: float) -> StepCost:
        stages = self._stages(batch)
        if batch.is_captured or not self._launches:  # the same is added to every form
            return self._with_step(self._fastest(stages), factor, batch.tokens)

        def cost(stage: StepCost) -> StepCost:
            started = self._launching(batch).times(2.0 if stage.is_overlapped else 1.0)
            found = self._with_step(stage, factor, batch.tokens)
            return _slowed(found, started, stage.seconds.value, factor)

        return self._fastest([cost(stage) for stage in stages])

    @property
    def _launches(self) -> bool:
        """Whether this is our own engine, whose launches are known, on GPUs."""
        return self.kernels.library == OWN_LIBRARY and self.kernels.cluster.gpu.name != "cpu"

    def _crosses(self, tokens: float) -> bool:
        """Whether a step is in no graph because its tokens cross nodes."""
        return self._launches and way_of(self.deployment, tokens, self.kernels) == "across"

    def _launching(self, batch: Batch) -> Estimate:
        """Of a stage's kernels on the slowest host."""
        model, layout = self.deployment.model, self.deployment.layout
        each = total((self.kernels.launch, Estimate(1e-6 * self.runtime["python_us"], 0.3, "interpolated")))
        ranks = layout.size // layout.dp
        crosses = self._crosses(batch.tokens)
        found = each.times(host.launches(model, layout, crosses) * -(-model.layers // layout.pp) * host.slowest(ranks))
        return Estimate(found.value, max(found.band, UNMEASURED), "extrapolated") if crosses else found

    def _with_step(self, stage: StepCost, factor: float, tokens: float) -> StepCost:
        """A stage's cost `factor` times, plus what a step costs once."""
        parts = {name: part.times(factor) for name, part in stage.parts.items()}
        layout = self.deployment.layout
        if layout.pp > 1:
            same_node = layout.size <= self.kernels.cluster.gpus_per_node
            size = tokens / layout.attention_ranks * self.deployment.model.d_model * 2
            parts["pipeline hops"] = self.kernels.send(size, same_node).times(layout.pp)
        parts["step"] = Estimate(1e-6 * self.runtime["step_us"], 0.3, "interpolated")
        return StepCost(total(parts.values()), parts, stage.is_overlapped)

    def _stages(self, batch: Batch) -> list[StepCost]:
        """The slowest stage in each form that may be taken: the first, which has the most layers, with the output head
        as if it were the last. Whole, and as two halves."""
        head = self._head(batch)
        found, can_overlap = list[StepCost](), self._travels(batch.tokens)
        if self.overlap != "on" or not can_overlap:
            found.append(_stage(self._layers(batch), head, is_overlapped=False))
        if self.overlap != "off" and can_overlap:
            found.append(_stage(self._overlapped(batch), head, is_overlapped=True))
        return found

    def _travels(self, tokens: float) -> bool:
        """Whether halves could overlap; our own engine cuts no step whose tokens all ranks of a group have."""
        layout = self.deployment.layout
        shared = layout.attention_ranks > 1 and tokens < self.kernels.replicates_below(layout.attention_ranks)
        return layout.ep > 1 and not (self.kernels.library == OWN_LIBRARY and shared)

    def _fastest(self, costs: Sequence[StepCost]) -> StepCost:
        """The last, halves, where it is faster: in our own engine by what makes it worth their while."""
        worth = WORTH if self.kernels.library == OWN_LIBRARY else 0.0
        return costs[-1] if costs[-1].seconds.value < (1 - worth) * costs[0].seconds.value else costs[0]

    def _overlapped(self, batch: Batch) -> Parts:
        """Of two half batches, with what is not hidden of their exchange."""
        parts = self._layers(batch.half, 2.0)
        travelling = [name for name in self._beside if name in parts]
        exchange = sum(parts[name].value for name in travelling)
        compute = sum(part.value for name, part in parts.items() if name not in COMMUNICATION)
        hidden = self.runtime[f"overlap_{batch.phase}"] * min(exchange, compute)
        if exchange > 0:
            parts |= {name: parts[name].times(1 - hidden / exchange) for name in travelling}
        return parts

    @property
    def _beside(self) -> tuple[str, ...]:
        """What travels beside the other half's kernels. In our own engine inside a node that is what copy engines move:
        results go home by a kernel, which shares the SMs with them."""
        inside = self.deployment.layout.stages_fit(self.kernels.cluster.gpus_per_node)
        return ("dispatch",) if inside and self.kernels.library == OWN_LIBRARY else ("dispatch", "combine")

    def _layers(self, batch: Batch, times: float = 1.0) -> Parts:
        """Of the stage with the most layers, taken to be a mixture like the whole model's. Pipelines of any depth, and
        the halves of larger batches, share what all layers take."""
        parts, factor = self.kernels.once((self._shared, batch), lambda: self._all_layers(batch)), times * self._share
        return {name: part.times(factor) for name, part in parts.items()}

    @cached_property
    def _shared(self) -> object:
        """What the layers' times depend on beside the batch: neither on `pp` nor on `dp`."""
        d, layout = self.deployment, self.deployment.layout
        stage = layout.ep, layout.tp, layout.attention_ranks, layout.stages_fit(self.kernels.cluster.gpus_per_node)
        routing = d.slots, d.skew, d.mode, d.node_copies, d.rank_copies
        return ("layers", d.model.name, d.precision, stage, routing, self.runtime.name)

    @cached_property
    def _share(self) -> float:
        layers = self.deployment.model.layers
        return -(-layers // self.deployment.layout.pp) / layers

    def _all_layers(self, batch: Batch) -> Parts:
        parts: dict[str, list[Estimate]] = {}
        for (is_dense, window), count in _kinds(self.deployment.model).items():
            make = dense_parts if is_dense else moe_parts
            for name, part in make(self.deployment, batch, self.kernels, self.runtime, window).items():
                parts.setdefault(name, []).append(part.times(count))
        return {name: total(found) for name, found in parts.items()}

    def _head(self, batch: Batch) -> Estimate:
        """Logits of each sequence's last token; in our own engine gathered, and read by the choice."""
        d, ranks, kernels = self.deployment, self.deployment.layout.attention_ranks, self.kernels
        rows = batch.tokens if batch.is_decode else max(1.0, batch.tokens / max(1.0, 2 * batch.context))
        product = kernels.matmul(rows, d.model.vocab / ranks, d.model.d_model, d.precision.other)
        if kernels.library != OWN_LIBRARY:
            return product.times(self.runtime["kernels"])
        logits = rows * d.model.vocab
        gathered, read = kernels.gather(ranks, 2 * logits / ranks), kernels.stream(2 * logits)
        return total((product.times(self.runtime["kernels"]), gathered, read))


def _stage(layers: Parts, head: Estimate, is_overlapped: bool) -> StepCost:
    parts = {**layers, "output head": head}
    return StepCost(total(parts.values()), parts, is_overlapped)


def _waiting(cost: StepCost, seconds: float) -> StepCost:
    """With what GPUs wait for the host."""
    return _slowed(cost, Estimate(seconds, 0.3, "interpolated"), 0.0, 1.0)


def _slowed(cost: StepCost, taken: Estimate, hidden: float, factor: float) -> StepCost:
    """With what the host takes beyond the seconds that GPUs hide, `factor` times. Then it decides how wide the sum's
    band is: what the GPUs' part has of it already is taken off."""
    seconds = taken.value - hidden
    if seconds < 1e-9:
        return cost
    width = max(0.0, taken.value * taken.band - hidden * cost.seconds.band)
    waits = Estimate(seconds * factor, width / seconds, taken.origin)
    return StepCost(total((cost.seconds, waits)), {**cost.parts, "host": waits}, cost.is_overlapped)


@lru_cache(maxsize=1024)
def _kinds(model: ModelSpec) -> dict[tuple[bool, int | None], int]:
    """Layers by kind: whether dense, and the attention's window."""
    return Counter((layer in model.dense_layers, model.window(layer)) for layer in range(model.layers))
