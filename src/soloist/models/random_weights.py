"""Weights made up from a seed: full-size models without a checkpoint.

Linear weights keep the variance of their input; those that write to the residual stream are smaller by √(2 · layers),
as in GPT-2, so that a token's own embedding decides its experts and routing is close to uniform.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from soloist.models.weights import Span, dtype_of
from soloist.specs.model import ModelSpec
from soloist.specs.parameters import Param, Shape, parameters

_BIAS_STD = 0.02


class RandomWeights:
    """A `WeightSource` that gives the same model under every layout.

    Each weight has a generator of its own, seeded from `seed` and its name, layer and expert; it is made whole and then
    cut, so a rank makes only the weights that it keeps a part of. The same on all devices of one kind, not across
    kinds: a CPU draws in fp32, a GPU in `dtype`.
    """

    bytes_read = 0
    threads = 1

    def __init__(self, spec: ModelSpec, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.spec, self.seed, self.dtype, self.device = spec, seed, dtype, torch.device(device)
        self._shapes: dict[Param, Shape] = dict(parameters(spec))
        self._generator = torch.Generator(self.device)

    def read(self, param: Param, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """See `WeightSource`."""
        cut = tuple(slice(*(span or (None,))) for span in (rows, columns))
        whole = self._make(param, self._shapes[param])
        part = whole[cut[: whole.dim()]].contiguous().to(dtype_of(param, self.dtype))
        return part if part.numel() == whole.numel() else part.clone()  # a view would keep the whole

    def _make(self, param: Param, shape: Shape) -> Tensor:
        if param.name.endswith("norm"):
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        self._generator.manual_seed(_seed(self.seed, param))
        drawn = self.dtype if self.device.type == "cuda" else torch.float32
        return torch.empty(shape, dtype=drawn, device=self.device).normal_(
            0.0, self._std(param, shape), generator=self._generator
        )

    def _std(self, param: Param, shape: Shape) -> float:
        if len(shape) == 1:
            return _BIAS_STD
        if param.name == "embed" and not self.spec.tied:
            return 1.0
        to_residual = param.name == "o" or param.name.endswith("down")
        return (shape[-1] * (2 * self.spec.layers if to_residual else 1)) ** -0.5


def _seed(seed: int, param: Param) -> int:
    name = f"{seed} {param.name} {param.layer} {param.expert}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1
