"""Attention over the paged KV cache, cut by heads over an attention group: grouped-query and latent.

Shape legend: T tokens of the step, D model width, H this rank's query heads, C its KV heads, Q and V widths of keys
and values, L and W latent and rotated widths of MLA.

Heads that do not divide are split unevenly; a KV head that serves query heads of two ranks is held by both. Each rank
returns a partial sum over its heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soloist.kernels.attention import attention_of
from soloist.kernels.language import AVAILABLE
from soloist.kernels.linear import linear
from soloist.kernels.norm import fused_heads
from soloist.models.layers import add_norm, rms_norm
from soloist.models.rope import Rope
from soloist.models.step import StepInput
from soloist.models.weights import Span, WeightSource
from soloist.specs.layout import share
from soloist.specs.model import ModelSpec
from soloist.specs.parameters import Param
from soloist.transport.base import Transport


@dataclass(frozen=True)
class Heads:
    """This rank's query heads and the KV heads that serve them, as spans over all heads."""

    query: Span
    kv: Span
    kv_owned: Span  # of the KV heads held, those that no lower rank holds

    @classmethod
    def of(cls, heads: int, kv_heads: int, index: int, size: int) -> Heads:
        """The share of rank `index` in an attention group of `size`."""
        start, stop = share(heads, size, index)
        each = heads // kv_heads
        kv = (start // each, -(-stop // each)) if stop > start else (0, 0)
        return cls((start, stop), kv, (min(-(-start // each), kv[1]), kv[1]))

    def kv_of_query(self, heads: int, kv_heads: int) -> Tensor:
        """int64 [H]: index of each query head's KV head among those held."""
        return torch.arange(*self.query) // (heads // kv_heads) - self.kv[0]


def _scaled(span: Span, width: int) -> Span:
    return span[0] * width, span[1] * width


class LayerCache:
    """The KV cache of one layer on one rank, flat over slots: keys [slots, C, Q] and values [slots, C, V].

    MLA holds one latent row a token, of which the values are the first part.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    @classmethod
    def allocate(
        cls, spec: ModelSpec, heads: Heads, slots: int, device: torch.device, dtype: torch.dtype
    ) -> LayerCache:
        """Zeros for `slots` tokens and this rank's KV heads."""
        a = spec.attention
        if a.kind == "mla":
            keys = torch.zeros(slots, 1, a.kv_rank + a.rope_dim, device=device, dtype=dtype)
            return cls(keys, keys[..., : a.kv_rank])
        held = heads.kv[1] - heads.kv[0]
        keys = torch.zeros(slots, held, a.head_dim, device=device, dtype=dtype)
        return cls(keys, torch.zeros(slots, held, a.v_head_dim, device=device, dtype=dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        shared = self.values.untyped_storage().data_ptr() == self.keys.untyped_storage().data_ptr()
        return self.keys.nbytes + (0 if shared else self.values.nbytes)

    @staticmethod
    def bytes_per_token(spec: ModelSpec, heads: Heads, itemsize: int) -> int:
        """Bytes that one token takes in one layer."""
        a = spec.attention
        if a.kind == "mla":
            return (a.kv_rank + a.rope_dim) * itemsize
        return (heads.kv[1] - heads.kv[0]) * (a.head_dim + a.v_head_dim) * itemsize


class GroupedQueryAttention:
    """Classic attention: `heads` query heads share `kv_heads` keys and values."""

    q_norm: Any  # a Tensor where the model has it
    k_norm: Any

    def __init__(
        self, spec: ModelSpec, source: WeightSource, layer: int, heads: Heads, group: Transport | None, rope: Rope
    ) -> None:
        a = self.spec = spec.attention
        self.eps, self.heads, self.group, self.rope = spec.norm_eps, heads, group, rope
        self.where = f"layer {layer}, attention"
        q, k, v = (
            _scaled(heads.query, a.head_dim), _scaled(heads.kv, a.head_dim), _scaled(heads.kv, a.v_head_dim)
        )  # fmt: skip

        def read(name: str, rows: Span | None = None) -> Tensor:
            return source.read(Param(name, layer), rows=rows)

        self.qkv = torch.cat([read("q", q), read("k", k), read("v", v)])
        self.bias = torch.cat([read("q_bias", q), read("k_bias", k), read("v_bias", v)]) if a.bias else None
        self.widths = [stop - start for start, stop in (q, k, v)]
        full = a.qk_norm == "full"
        self.q_norm = read("q_norm", q if full else None) if a.qk_norm != "none" else None
        self.k_norm = read("k_norm", k if full else None) if a.qk_norm != "none" else None
        self.sinks = read("sinks", heads.query) if a.sinks else None
        self.o = source.read(Param("o", layer), columns=_scaled(heads.query, a.v_head_dim))
        is_first = heads.query[0] == 0 and heads.query[1] > 0
        self.o_bias = read("o_bias") if a.out_bias and is_first else None
        self.fused = True
        self.serves = AVAILABLE and a.qk_norm != "full" and a.clip is None and a.head_dim == a.v_head_dim
        kv_head_H = heads.kv_of_query(a.heads, a.kv_heads).to(self.qkv.device)
        self.attend = attention_of(
            kv_head_H, a.scale, spec.window(layer), self.sinks, self.qkv.dtype, a.head_dim, a.v_head_dim
        )

    def __call__(self, h_TD: Tensor, step: StepInput, cache: LayerCache) -> Tensor:
        """Partial sums [T, D] over this rank's heads; writes this step's keys and values into the cache."""
        qkv_TN = linear(h_TD, self.qkv, self.bias)
        if self.fused and self.serves and qkv_TN.is_cuda:
            norms = None if self.q_norm is None else (self.q_norm, self.k_norm)
            turned = (step.cos, step.sin, self.rope.spec.interleaved)
            q_THQ = fused_heads(qkv_TN, norms, self.eps, *turned, step.cache_slots_T, cache.keys, cache.values)
        else:
            q_THQ = self._plain_heads(qkv_TN, step, cache)
        mixed_THV = self.attend(q_THQ, cache.keys, cache.values, step.paged)
        return linear(mixed_THV.flatten(1), self.o, self.o_bias)

    def _plain_heads(self, qkv_TN: Tensor, step: StepInput, cache: LayerCache) -> Tensor:
        """The queries, normed and rotated; keys and values go into the cache."""
        a = self.spec
        q, k, v = qkv_TN.split(self.widths, dim=-1)
        if a.qk_norm == "full":
            q, k = self._norm_over_group(q, k)
        if a.clip is not None:
            q, k, v = (x.clamp(-a.clip, a.clip) for x in (q, k, v))
        q_THQ, k_TCQ, v_TCV = (
            x.unflatten(-1, (-1, w)) for x, w in ((q, a.head_dim), (k, a.head_dim), (v, a.v_head_dim))
        )
        if a.qk_norm == "head":
            q_THQ, k_TCQ = rms_norm(q_THQ, self.q_norm, self.eps), rms_norm(k_TCQ, self.k_norm, self.eps)
        cache.keys[step.cache_slots_T] = self._rotate(k_TCQ, step)
        cache.values[step.cache_slots_T] = v_TCV
        return self._rotate(q_THQ, step)

    def _rotate(self, x_THQ: Tensor, step: StepInput) -> Tensor:
        width = self.rope.spec.width
        if width == x_THQ.shape[-1]:
            return self.rope.rotate(x_THQ, step.cos, step.sin)
        return torch.cat([self.rope.rotate(x_THQ[..., :width], step.cos, step.sin), x_THQ[..., width:]], -1)

    def _norm_over_group(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """RMSNorm over the whole projection, of which this rank holds some heads: the group sums the squares.

        A KV head that two ranks hold counts once.
        """
        a, (first, last) = self.spec, self.heads.kv_owned
        owned = slice((first - self.heads.kv[0]) * a.head_dim, (last - self.heads.kv[0]) * a.head_dim)
        squares_T2 = torch.stack([q.float().square().sum(-1), k[:, owned].float().square().sum(-1)], dim=-1)
        if self.group is not None:
            squares_T2 = self.group.all_reduce(squares_T2, self.where)
        squares_T1 = (squares_T2[:, :1] / (a.heads * a.head_dim), squares_T2[:, 1:] / (a.kv_heads * a.head_dim))
        scaled = [x.float() * torch.rsqrt(square + self.eps) for x, square in zip((q, k), squares_T1, strict=True)]
        return self.q_norm * scaled[0].to(q.dtype), self.k_norm * scaled[1].to(k.dtype)


class LatentAttention:
    """DeepSeek's multi-head latent attention in its absorbed form (arXiv 2405.04434, section 2.1).

    The cache holds one row a token: the normalised latent and the rotated key part that all heads share. The key
    up-projection is applied to the query, the value up-projection to the mixed latent, so that attention is that of
    one KV head of width L + W.
    """

    q_a_norm: Any  # a Tensor where the query is of low rank

    def __init__(
        self, spec: ModelSpec, source: WeightSource, layer: int, heads: Heads, group: Transport | None, rope: Rope
    ) -> None:
        a = self.spec = spec.attention
        self.eps, self.rope, self.fused = a.latent_norm_eps, rope, True

        def read(name: str, rows: Span | None = None) -> Tensor:
            return source.read(Param(name, layer), rows=rows)

        q = _scaled(heads.query, a.head_dim)
        self.q_a = read("q_a") if a.q_rank is not None else None
        self.q_a_bias = read("q_a_bias") if self.q_a is not None and a.bias else None
        self.q_a_norm = read("q_a_norm") if self.q_a is not None else None
        self.q_b = read("q" if self.q_a is None else "q_b", q)
        self.kv_a, self.kv_a_norm = read("kv_a"), read("kv_a_norm")
        self.kv_a_bias = read("kv_a_bias") if a.bias else None
        kv_b = read("kv_b", _scaled(heads.query, a.nope_dim + a.v_head_dim))
        kv_b_HXL = kv_b.unflatten(0, (-1, a.nope_dim + a.v_head_dim))
        self.k_up_HNL, self.v_up_HVL = kv_b_HXL[:, : a.nope_dim].contiguous(), kv_b_HXL[:, a.nope_dim :].contiguous()
        self.o = source.read(Param("o", layer), columns=_scaled(heads.query, a.v_head_dim))
        is_first = heads.query[0] == 0 and heads.query[1] > 0
        self.o_bias = read("o_bias") if a.out_bias and is_first else None
        kv_head_H = torch.zeros(heads.query[1] - heads.query[0], dtype=torch.int64, device=self.o.device)
        width = a.kv_rank + a.rope_dim
        self.attend = attention_of(kv_head_H, a.scale, spec.window(layer), None, self.o.dtype, width, a.kv_rank)

    def __call__(self, h_TD: Tensor, step: StepInput, cache: LayerCache) -> Tensor:
        """Partial sums [T, D] over this rank's heads; writes this step's latent rows into the cache."""
        a = self.spec
        latent_TL, key_TW = linear(h_TD, self.kv_a, self.kv_a_bias).split([a.kv_rank, a.rope_dim], dim=-1)
        key_T1W = self.rope.rotate(key_TW[:, None], step.cos, step.sin)
        latent_T1L = self._norm(latent_TL, self.kv_a_norm)[:, None]
        cache.keys[step.cache_slots_T] = torch.cat([latent_T1L, key_T1W], dim=-1)

        if self.q_a is not None:
            h_TD = self._norm(linear(h_TD, self.q_a, self.q_a_bias), self.q_a_norm)
        q_THQ = linear(h_TD, self.q_b).unflatten(-1, (-1, a.head_dim))
        nope_THN, rope_THW = q_THQ.split([a.nope_dim, a.rope_dim], dim=-1)
        absorbed_THL = torch.einsum("thn,hnl->thl", nope_THN, self.k_up_HNL)
        q_THX = torch.cat([absorbed_THL, self.rope.rotate(rope_THW, step.cos, step.sin)], dim=-1)
        mixed_THL = self.attend(q_THX, cache.keys, cache.values, step.paged)
        mixed_THV = torch.einsum("thl,hvl->thv", mixed_THL, self.v_up_HVL)
        return linear(mixed_THV.flatten(1), self.o, self.o_bias)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return add_norm(x, None, weight, self.eps, self.fused)[1]


ATTENTION = {"gqa": GroupedQueryAttention, "mla": LatentAttention}
