"""Every kernel compiled and run once on small shapes on one GPU, ranks in turn, for tests and for a memory checker:

    compute-sanitizer --tool memcheck python -m tests.kernels.small_cases [CASE …]

Shape legend: T tokens of a rank, D model width, K top-k, R rows, X expanded rows, S slots, F expert width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from soloist.bench.attention import AttentionLoad, check, triton_attention
from soloist.dispatch.base import SlotChoice
from soloist.dispatch.forms import COPY, LATENCY, PUSH, Form
from soloist.dispatch.lane import ExchangeShape, Lane, WindowPlan
from soloist.dispatch.local import LocalDispatcher, LocalIndex
from soloist.dispatch.one_sided import OneSidedDispatcher
from soloist.kernels.choose import choose
from soloist.kernels.choose_triton import choose_fused
from soloist.kernels.count import count_choices
from soloist.kernels.experts import (
    FEW_ROWS,
    FP8_BLOCKS,
    FP8_FEW_ROWS,
    FP8_ROWS,
    LONE_ROWS,
    LOW_ROWS,
    MANY_ROWS,
    MANY_ROWS_NARROW,
    ExpertTiles,
    Fp8Experts,
    swiglu_experts,
)
from soloist.kernels.grouped_gemm import BLOCK
from soloist.kernels.index import make_index
from soloist.kernels.norm import fused_heads, fused_norm
from soloist.kernels.paged_attention_triton import tiling
from soloist.models.layers import rms_norm
from soloist.models.rope import Rope
from soloist.moe.choice import Chooser
from soloist.moe.router import Router, SlotTable
from soloist.placement.placement import Placement
from soloist.specs.model import RopeSpec, RouterSpec
from soloist.transport.connect import local_world
from soloist.transport.nvlink import Channels, NvlinkTransport
from soloist.transport.symmetric import Watch, windows_in_process

DEVICE = torch.device("cuda")
RANKS, SLOTS, TOP_K, D_MODEL, TOKENS = 2, 3, 3, 256, (24, 17)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """bf16, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


# -- exchange -------------------------------------------------------------------------------------------------------
def _world(form: Form, fp8: bool) -> list[OneSidedDispatcher]:
    shape = ExchangeShape(RANKS, 1, SLOTS, TOP_K, D_MODEL, max(TOKENS), torch.bfloat16, fp8)
    windows = windows_in_process(RANKS, WindowPlan(shape).size, DEVICE)
    watches = [Watch(rank, tuple(range(RANKS)), DEVICE, 5.0) for rank in range(RANKS)]
    return [
        OneSidedDispatcher.of(shape, (Lane(window, shape),), watch, form)
        for window, watch in zip(windows, watches, strict=True)
    ]


def _inputs(rank: int) -> tuple[Tensor, SlotChoice]:
    """Some tokens go nowhere."""
    generator, tokens = torch.Generator().manual_seed(50 + rank), TOKENS[rank]
    ids_TK = torch.rand(tokens, RANKS * SLOTS, generator=generator).topk(TOP_K).indices
    group_TK, slot_TK = ids_TK // SLOTS, ids_TK % SLOTS
    group_TK[::5], slot_TK[::5] = -1, -1
    choice = SlotChoice(
        group_TK.to(DEVICE), slot_TK.to(DEVICE), torch.rand(ids_TK.shape, generator=generator).to(DEVICE)
    )
    return draw(tokens, D_MODEL, seed=rank), choice


def exchange(form: Form, fp8: bool = False) -> None:
    """Rows with experts that answer x / 2 + rank; then the same from expanded rows, weighed and summed."""
    dispatchers, inputs = _world(form, fp8), [_inputs(rank) for rank in range(RANKS)]
    for expand in (False, True):
        arriving = [d.start_dispatch(*given) for d, given in zip(dispatchers, inputs, strict=True)]
        torch.cuda.synchronize()  # in turn: nobody waits on the GPU
        back = []
        for rank, (dispatcher, pending) in enumerate(zip(dispatchers, arriving, strict=True)):
            if expand:
                batch, x_XD = pending.wait_expanded()
                used = int(batch.offsets_S[-1])
                y_XD = torch.full_like(x_XD, torch.nan)
                y_XD[:used] = x_XD[:used] * 0.5 + rank
                back.append(dispatcher.start_combine_expanded(y_XD, batch))
            else:
                batch = pending.wait()
                rows = batch.row_X[: int(batch.offsets_S[-1])].unique()
                y_RD = torch.full_like(batch.rows_RD, torch.nan, dtype=torch.bfloat16)
                came_RD = batch.rows_RD[rows].float()
                if fp8:
                    came_RD = came_RD * dispatcher.lanes[0].scale_R(dispatcher.shape)[rows, None]
                y_RD[rows] = (came_RD * 0.5 + rank).bfloat16()
                back.append(dispatcher.start_combine(y_RD, batch))
        torch.cuda.synchronize()
        for (x_TD, choice), dispatcher, pending in zip(inputs, dispatchers, back, strict=True):
            out_TD = pending.wait()
            dispatcher.watch.check()
            want_TD = torch.zeros_like(x_TD, dtype=torch.float32)
            for group in range(RANKS):
                here_TK = choice.group_TK == group
                share_T = (choice.weight_TK * here_TK).sum(1) if expand else here_TK.any(1).float()
                want_TD += share_T[:, None] * (x_TD.float() * 0.5 + group)
            _near(out_TD, want_TD, 0.04 if fp8 else 0.01)


def local() -> None:
    x_TD, choice = _inputs(0)
    dispatcher = LocalDispatcher(SLOTS, LocalIndex.of(TOKENS[0], TOP_K, SLOTS, DEVICE))
    # A slot is chosen once at most, as the router does.
    slot_TK = torch.stack([torch.randperm(SLOTS) for _ in range(TOKENS[0])]).to(DEVICE)
    choice = SlotChoice(torch.zeros_like(slot_TK), slot_TK, choice.weight_TK)
    batch, x_XD = dispatcher.start_dispatch(x_TD, choice).wait_expanded()
    out_TD = dispatcher.start_combine_expanded(x_XD * 0.5, batch).wait()
    _near(out_TD, x_TD.float() * 0.5 * choice.weight_TK.sum(1, keepdim=True), 0.01)


def many_rows() -> None:
    """The index that is made in parts: row r chooses slot r modulo 3, and every fifth row slot 7 as well."""
    row_R, rows = torch.arange(4100, device=DEVICE), 4100
    slots_RK = torch.stack([row_R % 3, torch.where(row_R % 5 == 0, 7, -1)], 1).int()
    row_X, place_RK = torch.zeros(2 * rows, device=DEVICE).long(), torch.zeros(rows, 2, device=DEVICE).int()
    weight_X, offsets_S = torch.zeros(2 * rows, device=DEVICE), torch.zeros(8, device=DEVICE).int()
    make_index(slots_RK, slots_RK.float(), rows, 2, 8, (row_X, weight_X, place_RK, offsets_S))
    wanted_X = torch.cat([row_R[row_R % 3 == 0], row_R[row_R % 3 == 1], row_R[row_R % 3 == 2], row_R[::5]])
    _near(row_X[: len(wanted_X)], wanted_X, 1e-6)
    _near(weight_X[: len(wanted_X)], slots_RK[slots_RK >= 0].float().sort().values, 1e-6)


# -- experts --------------------------------------------------------------------------------------------------------
COUNTS = (130, 0, 61)  # rows of a slot: more than a tile, none, less


def _rows() -> tuple[Tensor, Tensor, Tensor]:
    row_X = torch.randint(0, 64, (sum(COUNTS) + 9,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return draw(64, D_MODEL), row_X, torch.tensor(COUNTS).cumsum(0).int().to(DEVICE)


def _definition(rows_RD: Tensor, row_X: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    parts, ends = [], [0, *torch.tensor(COUNTS).cumsum(0).tolist()]
    for slot, (start, stop) in enumerate(pairwise(ends)):
        gate, up = (rows_RD[row_X[start:stop]].float() @ gate_up[slot].float().T).chunk(2, -1)
        parts.append((F.silu(gate) * up) @ down[slot].float().T)
    return torch.cat(parts)


def experts(tiles: ExpertTiles) -> None:
    rows, width = _rows(), 256
    gate_up, down = draw(3, 2 * width, D_MODEL, seed=5) / 16, draw(3, D_MODEL, width, seed=6) / 16
    y_XD = swiglu_experts(*rows, gate_up, down, tiles)
    _near(y_XD[: sum(COUNTS)], _definition(*rows[:2], gate_up, down), 0.01)


def fp8_experts(width: int | None, tiles: ExpertTiles) -> None:
    rows = _rows()
    gate_up, down = draw(3, 512, D_MODEL, seed=5) / 16, draw(3, D_MODEL, 256, seed=6) / 16
    y_XD = Fp8Experts.quantised(gate_up, down, width).forward(*rows, tiles)
    _near(y_XD[: sum(COUNTS)], _definition(*rows[:2], gate_up, down), 0.08)


# -- around the experts ---------------------------------------------------------------------------------------------
def router() -> None:
    """In one kernel, and behind a product for many tokens."""
    spec = RouterSpec(top_k=4, groups=4, kept_groups=2, group_score="top2", scoring="sigmoid", scaling=2.5)
    table = SlotTable(Placement(experts=32, slots=((tuple(range(16)), tuple(range(16, 32))),)), 0, 0, DEVICE)
    chooser = Chooser(Router(spec, draw(32, D_MODEL, seed=8) / 16), table)
    for tokens in (19, 300):
        x_TD = draw(tokens, D_MODEL, seed=9)
        live_T = torch.arange(tokens, device=DEVICE) % 7 != 0
        found, choice = chooser.in_one_kernel(x_TD, live_T)
        wanted = chooser.router.route(x_TD)
        assert float((found.expert_ids_TK == wanted.expert_ids_TK).float().mean()) > 0.98  # ties aside
        assert (choice.slot_TK[~live_T] == -1).all()


def norms() -> None:
    x_TD, added_TD, weight_D = draw(5, D_MODEL), draw(5, D_MODEL, seed=1), draw(D_MODEL, seed=2)
    sum_TD, normed_TD = fused_norm(x_TD, added_TD, weight_D, 1e-5)
    _near(sum_TD, x_TD.float() + added_TD.float(), 0.01)
    _near(normed_TD, rms_norm(sum_TD, weight_D, 1e-5), 0.01)
    cos, sin = Rope(RopeSpec(width=64), DEVICE).angles(torch.arange(5, device=DEVICE), torch.bfloat16)
    keys, values = torch.zeros(8, 2, 64, device=DEVICE).bfloat16(), torch.zeros(8, 2, 64, device=DEVICE).bfloat16()
    qkv_TN, norms = draw(5, 8 * 64), (draw(64, seed=3), draw(64, seed=4))
    fused_heads(qkv_TN, norms, 1e-5, cos, sin, False, torch.arange(5, device=DEVICE), keys, values)
    _near(values[:5], qkv_TN[:, 6 * 64 :].view(5, 2, 64).float(), 1e-6)


def latent_decoding(context: int) -> None:
    """The last tile is not full."""
    load = AttentionLoad("latent", 3, 1, context, 100, 1, 576, 512, latent=True, block_size=64)
    check(load, DEVICE, triton_attention(load, tiling, DEVICE))


def choices() -> None:
    logits_CV, keys_C2 = draw(3, 9000).float(), torch.randint(0, 99, (3, 2), dtype=torch.int32).to(DEVICE)
    arguments = logits_CV, torch.tensor([[0.0], [0.7], [1.0]]).to(DEVICE), keys_C2
    assert torch.equal(choose(*arguments)[0], choose_fused(*arguments)[0])


def counters() -> None:
    """More tokens than rows, and the other way round; added to what stands there."""
    for tokens, rows, has_padding in ((300, 5, True), (1, 200, False)):
        generator = torch.Generator().manual_seed(tokens)
        ids_TK = torch.rand(tokens, 12, generator=generator).argsort(1)[:, :3].contiguous()
        slots_RK = torch.randint(-1, 2, (rows, 3), generator=generator, dtype=torch.int32)
        live_T = torch.rand(tokens, generator=generator) < (0.5 if has_padding else 1)
        came = (slots_RK >= 0).any(1).sum()[None]
        wanted = torch.arange(13) + torch.cat([ids_TK[live_T].flatten().bincount(minlength=12), came])
        counts, padding = torch.arange(13).to(DEVICE), live_T.to(DEVICE) if has_padding else None
        count_choices(ids_TK.to(DEVICE), padding, slots_RK.to(DEVICE), counts)
        assert torch.equal(counts.cpu(), wanted)


def collectives() -> None:
    """Everybody sends, then everybody receives."""
    windows = windows_in_process(RANKS, Channels.size(RANKS), DEVICE)
    members = [
        NvlinkTransport(beneath, Channels(window), Watch(window.rank, tuple(range(RANKS)), DEVICE, 5.0))
        for beneath, window in zip(local_world(RANKS), windows, strict=True)
    ]
    parts, residual = [draw(5, D_MODEL, seed=rank) for rank in range(RANKS)], draw(5, D_MODEL, seed=7)
    more = {"residual_TD": residual, "weight_D": draw(D_MODEL, seed=8), "eps": 1e-5}
    for member, part in zip(members, parts, strict=True):
        member.start_sum(part, **more, receive=False)
    for member, part in zip(members, parts, strict=True):
        found_TD, _ = member.start_sum(part, **more, send=False)
        _near(found_TD, sum(part.float() for part in parts) + residual.float(), 0.01)
        member.watch.check()
    widths, shards = (4099, 4098), [draw(3, 4099), draw(3, 4098, seed=1)]
    out = [torch.empty(3, sum(widths), device=DEVICE) for _ in members]
    for member, shard, into in zip(members, shards, out, strict=True):
        member.start_gather(shard, into, widths, receive=False)
    for member, shard, into in zip(members, shards, out, strict=True):
        member.start_gather(shard, into, widths, send=False)
        assert torch.equal(into, torch.cat(shards, 1).float())
        member.watch.check()


def _near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    assert error < tolerance, f"{error:.4f} from what was wanted"


CASES: dict[str, Callable[[], None]] = {
    "exchange, latency": lambda: exchange(LATENCY),
    "exchange, latency, fp8": lambda: exchange(LATENCY, fp8=True),
    "exchange, push": lambda: exchange(replace(PUSH, stages=2)),
    "exchange, push, fp8": lambda: exchange(PUSH, fp8=True),
    "exchange, copy": lambda: exchange(COPY),
    "exchange, copy, fp8": lambda: exchange(COPY, fp8=True),
    "exchange, copied home": lambda: exchange(replace(COPY, pull=False)),
    "local": local,
    "index of many rows": many_rows,
    "experts, a row here and there": lambda: experts(LONE_ROWS),
    "experts, low rows": lambda: experts(LOW_ROWS),
    "experts, few rows": lambda: experts(FEW_ROWS),
    "experts, many rows": lambda: experts(MANY_ROWS),
    "experts, many rows, narrow": lambda: experts(MANY_ROWS_NARROW),
    "fp8 experts, a scale a row": lambda: fp8_experts(None, FP8_ROWS),
    "fp8 experts, a scale a row, few rows": lambda: fp8_experts(None, FP8_FEW_ROWS),
    "fp8 experts, blocks, few rows": lambda: fp8_experts(BLOCK, FP8_FEW_ROWS),
    "fp8 experts, blocks": lambda: fp8_experts(BLOCK, FP8_BLOCKS),
    "router": router,
    "norms": norms,
    "latent decoding": lambda: latent_decoding(200),
    "latent decoding, split": lambda: latent_decoding(1000),
    "choices": choices,
    "counters": counters,
    "collectives": collectives,
}


def main() -> None:
    """Those named, or all."""
    for name in sys.argv[1:] or CASES:
        CASES[name]()
        torch.cuda.synchronize()
        print(f"{name}: as defined", flush=True)


if __name__ == "__main__":
    main()
