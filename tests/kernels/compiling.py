"""Compiles every kernel for an H100 that is not there, through the functions that launch them:

    python -O -m tests.kernels.compiling [whole]

Triton's interpreter, which the other tests use, knows neither layouts nor the types that the compiler insists on. Here
a launch compiles and runs nothing; what the kernels would have written is zeros, so `-O` leaves assertions out. It
stops before LLVM, which takes half of the time, but for kernels of several parts, whose beginning is checked; `whole`
goes on to the machine code. Prints the kernels' names.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

os.environ.pop("TRITON_INTERPRET", None)

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from soloist.bench.attention import changed
from soloist.kernels import grouped_gemm, paged_attention_triton
from soloist.kernels.choose_triton import choose_fused
from soloist.kernels.compile_ahead import compile_ahead
from soloist.kernels.experts import FP32_ROWS, swiglu_experts
from soloist.moe import router
from tests.kernels import small_cases, test_paged_attention_triton
from tests.kernels.test_paged_attention_triton import Case

# What differs from step to step, layer to layer or rank to rank: see kernels/language.py.
VARYING = {"rows", "tokens", "slots", "count", "first", "first_row", "span", "behind", "capacity", "code", "me"}


class AbsentGpu:
    """What Triton asks its driver for before a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(patch: pytest.MonkeyPatch, whole: bool) -> set[str]:
    """From here on launches only compile; the names of the kernels, as they come."""
    compiled, run = set[str](), JITFunction.run

    def compile_it(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.add(kernel.__name__)
        _check_numbers(kernel, args)
        return run(kernel, *args, grid=grid, warmup=True, **kwargs)

    driver.set_active(cast(Any, AbsentGpu()))
    patch.setattr(JITFunction, "run", compile_it)
    make_llir, make_ptx = CUDABackend.make_llir, CUDABackend.make_ptx

    def to_llir(backend: CUDABackend, module: Any, *rest: Any) -> Any:
        in_parts = whole or "ttg.warp_specialize" in str(module)
        return make_llir(backend, module, *rest) if in_parts else _described(backend, module, *rest)

    def to_ptx(backend: CUDABackend, source: str, *rest: Any) -> str:
        return _checked(make_ptx(backend, source, *rest)) if source else ""

    patch.setattr(CUDABackend, "make_llir", to_llir)
    patch.setattr(CUDABackend, "make_ptx", to_ptx)
    if not whole:
        patch.setattr(CUDABackend, "make_cubin", lambda *_: "")
    return compiled


def _check_numbers(kernel: JITFunction, args: tuple[Any, ...]) -> None:
    """No kernel is compiled for their values: it would be compiled anew while somebody waits."""
    for param, value in zip(kernel.params, args, strict=False):
        if isinstance(value, int) and param.name in VARYING and not param.do_not_specialize:
            raise SystemExit(f"{kernel.__name__} is compiled for values of {param.name}")


def _checked(ptx: str) -> str:
    """Before its parts begin a kernel reads no shared memory: there Triton 3.6 lays down their arguments, and no
    barrier keeps one warp from doing so while another still reads."""
    beginning, parts, _ = ptx.partition("barrier.sync")
    if parts and "ld.shared" in beginning:
        raise SystemExit("a kernel reads shared memory before its parts begin")
    return ptx


def _described(backend: CUDABackend, module: Any, metadata: dict[str, Any], *_: Any) -> str:
    """In place of LLVM's code, with what a kernel has to know of itself."""
    sizes = "shared", "tmem_size", "global_scratch_size", "profile_scratch_size"
    metadata.update(dict.fromkeys(sizes, 0), global_scratch_align=1, profile_scratch_align=1, name="kernel")
    return ""


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU pass for those of an H100, and memory that nobody wrote holds zeros."""
    patch.setattr(torch, "empty", torch.zeros)
    patch.setattr(torch, "empty_like", torch.zeros_like)
    patch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)
    patch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=132))
    patch.setattr(grouped_gemm, "_is_hopper", lambda _: True)
    patch.setattr(paged_attention_triton, "generation", lambda _: 9)
    patch.setattr(router, "_is_cuda_half", lambda tensor: tensor.dtype == torch.bfloat16)
    patch.setattr(router.Router, "logits", lambda self, x_TD: torch.zeros(len(x_TD), self.experts))
    for module in (small_cases, test_paged_attention_triton):
        patch.setattr(module, "DEVICE", torch.device("cpu"))
    patch.setattr(small_cases, "_near", lambda *_: None)


def attention() -> None:
    """Own choices of tiles: a context in parts, grouped queries, with sinks and a window, and the latent form."""
    for case in (
        Case([0] * 4, 64, 64, chunks=((1, 3000),)),
        Case([0] * 4, 64, 64),
        Case([0] * 7, 128, 128, sinks=True, window=11),
        Case([0] * 3, 576, 512, shared=True),
        Case([0] * 4, 128, 128, block=64),
        Case([0] * 64, 576, 512, shared=True, block=64),
    ):
        replace(case, dtype=torch.bfloat16).run()
    latent = Case([0] * 64, 576, 512, shared=True, block=64, dtype=torch.bfloat16)
    for context in (200, 3000):
        replace(latent, chunks=((1, context),)).run()
        replace(latent, chunks=((1, context),)).run(changed(hopper=False))


def fp32_experts() -> None:
    rows, gate_up, down = small_cases._rows(), torch.zeros(3, 256, 256), torch.zeros(3, 256, 128)
    swiglu_experts(rows[0].float(), *rows[1:], gate_up, down, FP32_ROWS)


def choices() -> None:
    choose_fused(torch.zeros(3, 9000), torch.ones(3, 1), torch.zeros(3, 2, dtype=torch.int32))


def ahead() -> None:
    """What was gone through under `compile_ahead` is compiled: no launch does it again."""
    with compile_ahead(2):
        choices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", None)
        choices()


def main() -> None:
    patch = pytest.MonkeyPatch()
    compiled = compile_only(patch, "whole" in sys.argv)
    pretend(patch)
    for case in (*small_cases.CASES.values(), attention, fp32_experts, ahead):
        case()
    print(*sorted(compiled))


if __name__ == "__main__":
    main()
