"""One decoder for all families and layouts.

Shape legend: T all tokens of an attention group's step, t those that this rank holds (models/layers.py, TokenSplit),
D model width, C tokens whose logits are wanted, V vocabulary.

    ids ─ embed ─┬─ norm ─ attention ─ + ─ norm ─ feed-forward (experts, shared experts or dense) ─ + ─┬─ norm ─ logits
                 └──────────────────────────────── × layers of this stage ─────────────────────────────┘

A step goes through the layers whole, or as two halves (models/step.py), each of which computes while the other one's
tokens travel (moe/pauses.py):

    first     attention, router ┐              ┌ experts ┐               ┌ sum, attention, router ┐
    second                      └ attention, … ┘         └ experts ──────┘                        └ sum, attention, …
    travel                        first to experts, second to experts, first home, second home, …

Every rank holds its share of the embedding and of the output head (rows of the vocabulary), of the heads, and of the
dense and shared feed-forward, cut over its attention group; and the slots that the placement gives its expert group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from soloist.kernels.linear import linear, product
from soloist.models.attention import ATTENTION, Heads, LayerCache
from soloist.models.layers import Added, FeedForward, TokenSplit, add_norm
from soloist.models.rope import Rope
from soloist.models.step import StepInput
from soloist.models.weights import WeightSource
from soloist.moe.layer import MoELayer
from soloist.moe.pauses import Pausing, alone, in_turn
from soloist.specs.layout import Seat, share
from soloist.specs.model import ModelSpec
from soloist.specs.parameters import Param
from soloist.timing import Stopwatch
from soloist.transport.base import Transport

WEIGHT_PARTS = ("attention", "experts", "shared experts", "dense layers", "router", "embedding and head")


class Block:
    """One layer: attention and feed-forward, each with its norm and its residual."""

    dense: Any  # a FeedForward in a dense layer

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        seat: Seat,
        source: WeightSource,
        group: Transport | None,
        rope: Rope,
        moe: MoELayer | None,
        watch: Stopwatch,
    ) -> None:
        """`group` is the attention group, `moe` this layer's experts, None in a dense layer."""
        part = (seat.attention_index, seat.layout.attention_ranks)
        self.eps, self.seat, self.moe, self.watch = spec.norm_eps, seat, moe, watch
        self.where = f"layer {layer}"
        self.heads = Heads.of(spec.attention.heads, spec.attention.kv_heads, *part)
        self.attn_norm = source.read(Param("attn_norm", layer))
        self.attention = ATTENTION[spec.attention.kind](spec, source, layer, self.heads, group, rope)
        self.mlp_norm = source.read(Param("mlp_norm", layer))
        self.dense = FeedForward(spec, source, layer, "dense", part) if moe is None else None
        has_shared = moe is not None and spec.shared_width > 0
        self.shared = FeedForward(spec, source, layer, "shared", part) if has_shared else None
        self.fused = True

    def __call__(
        self, x_tD: Tensor, added: Added | None, step: StepInput, split: TokenSplit, cache: LayerCache
    ) -> Pausing[tuple[Tensor, Added]]:
        """The residual stream behind the attention, and what the feed-forward adds to it. Pauses while tokens travel.

        `x_tD` and `added` are those of the layer before: sums are made together with the norm that follows them.
        """
        x_tD, h_tD = split.add_norm(x_tD, added, self.attn_norm, self.eps, self.fused)
        h_TD = split.gather(h_tD, self.where)
        with self.watch("attention"):
            partial_TD = self.attention(h_TD, step, cache)
        mixed = Added(partial_TD, partial=True, where=self.where)
        x_tD, h_tD = split.add_norm(x_tD, mixed, self.mlp_norm, self.eps, self.fused)
        return x_tD, (yield from self._feed_forward(h_tD, split))

    def _feed_forward(self, h_tD: Tensor, split: TokenSplit) -> Pausing[Added]:
        if self.moe is None:
            return Added(self._in_group(self.dense, h_tD, split), partial=True, where=self.where)
        if split.replicated:
            return Added(self._replicated(h_tD, split), partial=True, where=self.where)
        return Added((yield from self._sharded(h_tD, split)), partial=False, where=self.where)

    def fuse(self, fused: bool) -> None:
        """See `Decoder.fuse`."""
        self.fused = self.attention.fused = fused
        if self.moe is not None:
            self.moe.fuse(fused)

    def _sharded(self, h_tD: Tensor, split: TokenSplit) -> Pausing[Tensor]:
        """Each rank dispatches its own tokens; the shared experts run while they travel."""
        network = self.shared
        shared = network and (lambda: split.reduce(self._in_group(network, h_tD, split), self.where))
        live_t = split.live(split.size, self.seat.attention_index)
        return self.moe.travel(h_tD, meanwhile=shared, live_T=live_t, most=split.most(split.size))

    def _in_group(self, network: FeedForward, h_tD: Tensor, split: TokenSplit) -> Tensor:
        """Partial sums [T, D] of a feed-forward whose width is cut over the attention group."""
        h_TD = split.gather(h_tD, self.where)
        with self.watch("experts"):
            return network(h_TD)

    def _replicated(self, h_TD: Tensor, split: TokenSplit) -> Tensor:
        """Partial sums: every rank has all tokens. Each uses its own experts, if all groups' ranks are here; otherwise
        the ranks of each `tp` dispatch a slice of the tokens."""
        slices, index = split.size // self.seat.layout.tp, self.seat.attention_index // self.seat.layout.tp
        start, stop = share(split.tokens, slices, index)
        if self.moe.own:
            part_TD = self.moe.own_part(h_TD, split.live_T, slice(start, stop))
            return self.shared(h_TD) + part_TD if self.shared else part_TD
        live_t, most = split.live(slices, index), split.most(slices)
        part_tD = alone(self.moe.travel(h_TD[start:stop], gather_in_group=False, live_T=live_t, most=most))
        if slices == 1:
            partial_TD = self.shared(h_TD) + part_tD if self.shared else part_tD
        else:
            partial_TD = self.shared(h_TD) if self.shared else torch.zeros_like(h_TD)
            partial_TD[start:stop] += part_tD
        return partial_TD


@dataclass(frozen=True)
class MicroBatch:
    """A step or a half of one, and how its tokens lie over the attention group."""

    step: StepInput
    split: TokenSplit


class Decoder:
    """The layers of one pipeline stage on one rank, with the embedding on the first and the output head on the last."""

    embedding: Any  # a Tensor on the first stage, and on the last one where it is the output head
    head: Any

    def __init__(
        self,
        spec: ModelSpec,
        seat: Seat,
        source: WeightSource,
        group: Transport | None,
        moe: dict[int, MoELayer],
        rope: Rope,
        watch: Stopwatch,
    ) -> None:
        """`moe` holds the experts of this stage's MoE layers, by layer."""
        self.spec, self.seat, self.group, self.watch = spec, seat, group, watch
        self.layers = seat.layout.stage_layers(seat.stage, spec.layers)
        self.vocab = share(spec.vocab, seat.layout.attention_ranks, seat.attention_index)
        needs_embedding = seat.is_first_stage or (seat.is_last_stage and spec.tied)
        self.embedding = source.read(Param("embed"), rows=self.vocab) if needs_embedding else None
        self.blocks = [
            Block(spec, layer, seat, source, group, rope, moe.get(layer), watch) for layer in self.layers
        ]  # fmt: skip
        if seat.is_last_stage:
            self.final_norm = source.read(Param("final_norm"))
            self.head = self.embedding if spec.tied else source.read(Param("lm_head"), rows=self.vocab)

    def weight_parts(self) -> dict[str, int]:
        """Bytes of the weights that this rank holds by part, as the planner's memory table has them.

        A storage that two parts share counts once; norms count as attention.
        """
        owners: list[tuple[str, Any]] = [("embedding and head", self)]
        for block in self.blocks:
            owners += [("attention", block), ("attention", block.attention), ("dense layers", block.dense)]
            owners.append(("shared experts", block.shared))
            owners += [("router", block.moe.router), ("experts", block.moe.experts)] if block.moe else []
        bytes_of: dict[str, int] = dict.fromkeys(WEIGHT_PARTS, 0)
        seen: set[int] = set()
        for part, owner in owners:
            for name, tensor in vars(owner).items() if owner else ():
                if isinstance(tensor, Tensor) and (at := tensor.untyped_storage().data_ptr()) not in seen:
                    seen.add(at)
                    # The gate of the shared experts is small and whole on every rank, like the router.
                    bytes_of["router" if name == "scale" else part] += tensor.untyped_storage().nbytes()
        return bytes_of

    def fuse(self, fused: bool) -> None:
        """Use the fused kernels where there are some, or the plain forms, which define them."""
        for block in self.blocks:
            block.fuse(fused)

    def micro_batches(self, step: StepInput) -> list[MicroBatch]:
        """What goes through the layers by itself."""
        return [MicroBatch(part, self._split(part)) for part in step.micro_batches()]

    def _split(self, step: StepInput) -> TokenSplit:
        replicated = step.replicated and self.group is not None
        return TokenSplit(self.group, step.tokens, replicated, self.watch, step.peak, step.live_T)

    def embed(self, batch: MicroBatch) -> Tensor:
        """x_tD of the first stage: each rank looks up the ids of its share of the vocabulary."""
        step, split = batch.step, batch.split
        if self.group is None:
            return F.embedding(step.ids_T, self.embedding)
        start, stop = self.vocab
        local_T = step.ids_T - start
        mine_T = (local_T >= 0) & (local_T < stop - start)
        partial_TD = F.embedding(local_T.where(mine_T, 0), self.embedding) * mine_T[:, None]
        return split.reduce(partial_TD, f"{step.name}, embedding")

    def forward(self, xs_tD: Sequence[Tensor], batches: Sequence[MicroBatch], caches: list[LayerCache]) -> list[Tensor]:
        """Through this stage's layers: each micro-batch's residual stream."""
        parts = zip(xs_tD, batches, strict=True)
        return in_turn([self.through_layers(x_tD, batch, caches) for x_tD, batch in parts])

    def through_layers(self, x_tD: Tensor, batch: MicroBatch, caches: list[LayerCache]) -> Pausing[Tensor]:
        """The same with one of them; it pauses while tokens travel."""
        added = None
        for block, cache in zip(self.blocks, caches, strict=True):
            x_tD, added = yield from block(x_tD, added, batch.step, batch.split, cache)
        return x_tD if added is None else batch.split.add(x_tD, added)

    def logits(
        self, xs_tD: Sequence[Tensor], step: StepInput, batches: Sequence[MicroBatch], out_CV: Tensor | None = None
    ) -> Tensor:
        """logits_CV of the tokens in `step.logits_rows`, on every rank of the last stage's attention group.

        In the model's dtype, and in `out_CV`, if given.
        """
        where = f"{step.name}, output head"
        parts = [batch.split.gather(x_tD, where) for x_tD, batch in zip(xs_tD, batches, strict=True)]
        x_CD = (parts[0] if len(parts) == 1 else torch.cat(parts))[step.logits_rows]
        _, h_CD = add_norm(x_CD, None, self.final_norm, self.spec.norm_eps)
        if self.group is None:
            return product(h_CD, self.head, out_CV)
        shares = [share(self.spec.vocab, self.group.size, index) for index in range(self.group.size)]
        counts = [stop - start for start, stop in shares]
        return self.group.gather_columns(linear(h_CD, self.head), counts, where, out_CV)
