"""Rotary position embedding: default, linear, llama3 and yarn.

Shape legend: T tokens, H heads, W rotated elements of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from soloist.specs.model import RopeSpec


class Rope:
    """Cosines and sines of a step's positions, computed once and shared by all layers."""

    def __init__(self, spec: RopeSpec, device: torch.device) -> None:
        self.spec = spec
        self.frequencies = inverse_frequencies(spec).to(device)
        self._table: tuple[torch.dtype, Tensor, Tensor] | None = None

    def prepare(self, positions: int, dtype: torch.dtype) -> None:
        """Compute the angles of all positions once: `angles` then looks them up."""
        self._table = (dtype, *self._angles(torch.arange(positions, device=self.frequencies.device), dtype))

    def angles(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, 1, W/2], in `dtype`, of positions (int64); the angles themselves are fp32."""
        if self._table is None or self._table[0] != dtype:
            return self._angles(positions_T, dtype)
        _, cos, sin = self._table
        return cos[positions_T], sin[positions_T]

    def _angles(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions_T[:, None, None].float() * self.frequencies
        factor = self.spec.attention_factor
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def rotate(self, x_THW: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate each pair of elements by its angle."""
        if self.spec.interleaved:
            first, second = x_THW[..., ::2], x_THW[..., 1::2]
        else:
            first, second = x_THW.chunk(2, dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.stack(turned, -1).flatten(-2) if self.spec.interleaved else torch.cat(turned, -1)


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """Radians a position of each pair, fp32 [W/2]."""
    base = spec.theta ** -(torch.arange(0, spec.width, 2, dtype=torch.int64).float() / spec.width)
    match spec.kind:
        case "default":
            return base
        case "linear":
            return base / spec.factor
        case "llama3":
            return _llama3(spec, base)
        case "yarn":
            return _yarn(spec, base)


def _llama3(spec: RopeSpec, base: Tensor) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between blended."""
    turns = spec.original_max_positions * base / (2 * math.pi)  # over the original context
    keep = ((turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0, 1)
    return base * keep + base / spec.factor * (1 - keep)


def _yarn(spec: RopeSpec, base: Tensor) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a linear ramp between interpolated and kept dimensions."""

    def dimension(turns: float) -> float:
        """The pair that turns so often over the original context."""
        return spec.width * math.log(spec.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.width - 1)
    ramp = (torch.arange(spec.width // 2).float() - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return base * keep + base / spec.factor * (1 - keep)
