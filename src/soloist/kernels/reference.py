"""Plain forms of what surrounds and makes up the expert GEMMs. Every fast kernel stands beside one of these.

Shape legend: R rows, D model width, X expanded rows (one per row and local slot chosen), S slots, F expert width,
N output width of a weight, P sums, J most terms of a sum.

    rows_RD ─expand─► rows_XD ─grouped_linear─► hidden_XF ─activate, grouped_linear─► out_XD ─weighted_sum─► y_RD
             row_X              offsets_S                            offsets_S              row_X, weight_X

The expanded rows are ordered by slot, then row. Entries behind the last offset are unused and may hold anything, NaN
included: nothing of them reaches a result.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from soloist.kernels.linear import grouped_mm, linear
from soloist.specs.model import ExpertSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}

GroupedLinear = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def expand(rows_RD: Tensor, row_X: Tensor) -> Tensor:
    """rows_XD: each row once for every slot that it chose."""
    return rows_RD.index_select(0, row_X)


# -- grouped GEMM ---------------------------------------------------------------------------------------------------
def grouped_linear_loop(x_XD: Tensor, weight_SND: Tensor, offsets_S: Tensor, bias_SN: Tensor | None) -> Tensor:
    """out_XN: slot s applies its weight to the rows `offsets_S[s - 1] … offsets_S[s]`, one product after the other."""
    out_XN = x_XD.new_empty(len(x_XD), weight_SND.shape[1])
    for slot, (start, stop) in enumerate(pairwise([0, *offsets_S.tolist()])):
        if stop > start:
            bias_N = None if bias_SN is None else bias_SN[slot]
            out_XN[start:stop] = linear(x_XD[start:stop], weight_SND[slot], bias_N)
    return out_XN


def grouped_linear(x_XD: Tensor, weight_SND: Tensor, offsets_S: Tensor, bias_SN: Tensor | None) -> Tensor:
    """The same with `F.grouped_mm`, which reads the offsets on the device. `choose_grouped_linear` knows its limits."""
    out_XN = grouped_mm(x_XD, weight_SND, offsets_S)
    if bias_SN is None:
        return out_XN
    slot_X = torch.searchsorted(offsets_S, _count_to(len(x_XD), offsets_S), right=True)
    return out_XN + bias_SN[slot_X.clamp_max(len(bias_SN) - 1)]


def choose_grouped_linear(*weights_SND: Tensor) -> GroupedLinear:
    """The form that can take these weights.

    `F.grouped_mm` wants strides that are multiples of 16 bytes; on CUDA only its bf16 form stays on the device.
    """
    aligned = all(w.shape[-1] > 0 and w.shape[-1] * w.itemsize % 16 == 0 for w in weights_SND)
    on_device = all(not w.is_cuda or w.dtype == torch.bfloat16 for w in weights_SND)
    return grouped_linear if aligned and on_device else grouped_linear_loop


def activate(hidden_XF: Tensor, spec: ExpertSpec) -> Tensor:
    """What stands between the two products. With a gate, `hidden_XF` holds gate and up side by side."""
    activation = ACTIVATIONS[spec.activation]
    if spec.kind == "mlp":
        return activation(hidden_XF)
    gate_XF, up_XF = hidden_XF.chunk(2, dim=-1)
    if spec.kind == "swiglu":
        return activation(gate_XF) * up_XF
    gate_XF = gate_XF.clamp(max=spec.limit)
    return gate_XF * torch.sigmoid(spec.alpha * gate_XF) * (up_XF.clamp(-spec.limit, spec.limit) + 1)


# -- sums in a fixed order ------------------------------------------------------------------------------------------
def weighted_sum(
    out_XD: Tensor,
    row_X: Tensor,
    weight_X: Tensor,
    offsets_S: Tensor,
    rows: int,
    most: int,
    dense: bool = True,
) -> Tensor:
    """y_RD: the gate-weighted sum of each row's entries, fp32 in slot order, rounded once to `out_XD`'s dtype.

    `rows` is R; a row has at most `most` entries. dense: it has at least one, so with a single slot the entries are the
    rows. Deterministic on every device, unlike `index_add_`.
    """
    if dense and len(offsets_S) == 1:
        return (out_XD[:rows] * weight_X[:rows, None]).to(out_XD.dtype)
    used_X = _count_to(len(row_X), offsets_S) < offsets_S[-1]
    member_RJ = member_table(row_X.where(used_X, rows), rows, most)
    return ordered_sum(out_XD * weight_X[:, None], member_RJ).to(out_XD.dtype)


def member_table(sum_X: Tensor, sums: int, most: int) -> Tensor:
    """member_PJ (int64): the entries of each sum, in ascending order, then X.

    sum_X: the sum that each entry belongs to; entries with `sum_X == sums` belong to none. Needs no host
    synchronisation. No sum may have more than `most` entries.
    """
    sorted_X, order_X = sum_X.sort(stable=True)
    first_P = torch.searchsorted(sorted_X, _count_to(sums + 1, sum_X))
    place_X = (_count_to(len(sum_X), sum_X) - first_P[sorted_X]).clamp_max(most - 1)
    member_PJ = sum_X.new_full((sums + 1, most), len(sum_X))
    member_PJ[sorted_X, place_X] = order_X
    return member_PJ[:sums]


def ordered_sum(values_XD: Tensor, member_PJ: Tensor) -> Tensor:
    """total_PD (fp32): the sums that `member_PJ` lists, term by term from the left; a sum without terms is 0."""
    total_PD = values_XD.new_zeros(len(member_PJ), values_XD.shape[1], dtype=torch.float32)
    ended_XD = torch.cat([values_XD, values_XD.new_zeros(1, values_XD.shape[1])])  # what a table's X stands for
    for member_P in member_PJ.unbind(1):
        total_PD += ended_XD.index_select(0, member_P)
    return total_PD


def _count_to(stop: int, like: Tensor) -> Tensor:
    return torch.arange(stop, device=like.device, dtype=like.dtype)
