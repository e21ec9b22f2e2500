"""In which data types a deployment keeps and moves things."""

from __future__ import annotations

import msgspec

from soloist.errors import ConfigurationError
from soloist.planner.compute import BYTES, dtype_named
from soloist.specs.layout import share
from soloist.specs.model import Dtype, ModelSpec, Spec

FP8_BLOCK = 128  # rows and columns of an fp8 checkpoint that share a scale


class Precision(Spec, frozen=True, kw_only=True):
    """Data types by use. `linear` are attention's, dense and shared matrices; embedding, head and norms are `other`."""

    experts: str = "bf16"
    linear: str = "bf16"
    other: str = "bf16"
    kv: str = "bf16"
    dispatch: str = "bf16"
    combine: str = "bf16"

    def __post_init__(self) -> None:
        for key in self.__struct_fields__:
            if getattr(self, key) not in BYTES:
                raise ConfigurationError.of(f"precision.{key}", getattr(self, key), f"choose from {', '.join(BYTES)}")

    @classmethod
    def named(cls, name: str) -> Precision:
        """`bf16`, `fp16`, `fp32`, `fp8` (experts, linear, dispatch in fp8), `fp4` (experts in fp4, the rest as fp8)."""
        name = dtype_named(name)
        if name in ("fp8", "fp4"):
            return cls(experts=name, linear="fp8", dispatch="fp8")
        return cls(experts=name, linear=name, other=name, kv=name, dispatch=name, combine=name)

    @classmethod
    def of(cls, spec: ModelSpec, dtype: Dtype | None = None, keep_fp8: bool = True) -> Precision:
        """What the runtime uses for that model: its own data type (or `dtype`) for everything, but for experts that its
        checkpoint has in fp8."""
        own = cls.named(dtype or spec.dtype)
        return msgspec.structs.replace(own, experts="fp8") if spec.fp8_experts and keep_fp8 else own

    def experts_on(self, spec: ModelSpec, tp: int, tp_index: int | None = None) -> str:
        """The experts' data type where each is cut over `tp` ranks: on one of them, or where they agree.

        Our kernels serve the experts of an fp8 checkpoint as gated units without biases whose shares are whole blocks
        (moe/fp8_experts.py). Others are loaded as numbers of the model's own data type.
        """
        if self.experts != "fp8" or not spec.fp8_experts:
            return self.experts
        expert, indices = spec.expert, range(tp) if tp_index is None else (tp_index,)
        ends = [end for index in indices for end in share(expert.width, tp, index)]
        is_gated = expert.kind == "swiglu" and expert.activation == "silu" and not expert.bias
        return "fp8" if is_gated and not any(end % FP8_BLOCK for end in (*ends, spec.d_model)) else self.other
