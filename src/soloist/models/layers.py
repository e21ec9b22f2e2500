"""The small parts of a decoder: normalisation, dense feed-forward, and how a group of ranks shares a step's tokens.

Shape legend: T all tokens of an attention group's step, t those of one rank, D model width, F this rank's share of a
feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soloist.kernels.language import AVAILABLE
from soloist.kernels.linear import linear
from soloist.kernels.norm import fused_norm
from soloist.kernels.reference import ACTIVATIONS
from soloist.models.weights import WeightSource
from soloist.specs.layout import share
from soloist.specs.model import ModelSpec
from soloist.specs.parameters import Param
from soloist.timing import Stopwatch
from soloist.transport.base import Transport
from soloist.transport.nvlink import NvlinkTransport


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension; computed in fp32, rounded to x's dtype before the weight."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_norm(
    x_TD: Tensor, added_TD: Tensor | None, weight_D: Tensor, eps: float, fused: bool = True
) -> tuple[Tensor, Tensor]:
    """x + added (x where there is nothing to add), and its `rms_norm`; `fused`: in one kernel, where there is one."""
    if fused and AVAILABLE and x_TD.is_cuda:
        return fused_norm(x_TD, added_TD, weight_D, eps)
    sum_TD = x_TD if added_TD is None else x_TD + added_TD
    return sum_TD, rms_norm(sum_TD, weight_D, eps)


@dataclass(frozen=True)
class Added:
    """What is still to be added to the residual stream: `x`, or its sum over the attention group where it is partial.

    Left open as long as possible, since a sum over the group, the residual and the norm behind them can be one kernel.
    """

    x: Tensor
    partial: bool
    where: str


@dataclass(frozen=True)
class TokenSplit:
    """How the residual stream of one step lies over an attention group.

    Sharded: rank i holds its share of the tokens; attention gathers them and ends in a reduce-scatter, so that each
    rank routes and dispatches its own. Replicated: every rank holds all tokens and sums are all-reduces, which is
    faster below some number of tokens. A group of one is sharded.
    """

    group: Transport | None
    tokens: int
    replicated: bool
    watch: Stopwatch
    peak: int  # the most tokens of any attention group
    live_T: Tensor | None = None  # bool: tokens that do not only fill up a batch

    @property
    def size(self) -> int:
        return self.group.size if self.group else 1

    @property
    def counts(self) -> list[int]:
        """Tokens of each rank when sharded."""
        spans = [share(self.tokens, self.size, index) for index in range(self.size)]
        return [stop - start for start, stop in spans]

    def tokens_here(self, index: int) -> int:
        """Tokens that rank `index` of the group holds."""
        return self.tokens if self.group is None or self.replicated else self.counts[index]

    def most(self, parts: int) -> int:
        """The most tokens that any rank sends to experts, where a group's tokens are cut into `parts`."""
        return -(-self.peak // parts)

    def live(self, parts: int, index: int) -> Tensor | None:
        """Part `index` of live_T."""
        return None if self.live_T is None else self.live_T[slice(*share(self.tokens, parts, index))]

    def gather(self, x_tD: Tensor, where: str = "") -> Tensor:
        """All tokens of the group, from what each rank holds."""
        if self.group is None or self.replicated:
            return x_tD
        with self.watch("exchange"):
            return self.group.all_gather_rows(x_tD, self.counts, where)

    def reduce(self, partial_TD: Tensor, where: str = "") -> Tensor:
        """The sum over the group of what each rank computed for all tokens; every rank gets what it holds."""
        if self.group is None:
            return partial_TD
        with self.watch("exchange"):
            if self.replicated:
                return self.group.all_reduce(partial_TD, where)
            return self.group.reduce_scatter_rows(partial_TD, self.counts, where)

    def add(self, x_tD: Tensor, added: Added) -> Tensor:
        """The residual stream with it."""
        return x_tD + (self.reduce(added.x, added.where) if added.partial else added.x)

    def add_norm(
        self, x_tD: Tensor, added: Added | None, weight_D: Tensor, eps: float, fused: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The same and its norm, as the function of this name."""
        if added is None or not added.partial:
            return add_norm(x_tD, added and added.x, weight_D, eps, fused)
        group = self.group
        if fused and self.replicated and isinstance(group, NvlinkTransport) and group.serves(added.x):
            with self.watch("exchange"):
                return group.all_reduce_norm(added.x, x_tD, weight_D, eps, added.where)
        return add_norm(x_tD, self.reduce(added.x, added.where), weight_D, eps, fused)


class FeedForward:
    """A dense feed-forward, or the shared experts, its width cut over the attention group. Returns partial sums."""

    def __init__(self, spec: ModelSpec, source: WeightSource, layer: int, kind: str, part: tuple[int, int]) -> None:
        """`kind` is "dense" or "shared"; `part` is (index, size) of this rank in its attention group."""
        width = spec.dense_width if kind == "dense" else spec.shared_width
        index, size = part
        span = share(width, size, index)
        self.activation = ACTIVATIONS[spec.expert.activation]
        gated = spec.expert.kind != "mlp"
        self.gate = source.read(Param(f"{kind}_gate", layer), rows=span) if gated else None
        self.up = source.read(Param(f"{kind}_up", layer), rows=span)
        self.down = source.read(Param(f"{kind}_down", layer), columns=span)
        has_scale = kind == "shared" and spec.shared_gate
        self.scale = source.read(Param("shared_expert_gate", layer)) if has_scale else None

    def __call__(self, x_TD: Tensor) -> Tensor:
        up_TF = linear(x_TD, self.up)
        hidden_TF = self.activation(up_TF) if self.gate is None else self.activation(linear(x_TD, self.gate)) * up_TF
        out_TD = linear(hidden_TF, self.down)
        if self.scale is None:
            return out_TD
        return torch.sigmoid(linear(x_TD, self.scale)) * out_TD
