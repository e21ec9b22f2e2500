"""Triton where it is installed. Without it the kernels can be imported, not launched."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from soloist.errors import ConfigurationError

# Kernels run in Triton's interpreter, on CPU tensors. Triton reads the same variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class _Missing:
    """Stands for a kernel where Triton is missing."""

    def __init__(self, kernel: Any) -> None:
        self.name = kernel.__name__

    def __getitem__(self, grid: object) -> NoReturn:
        raise ConfigurationError.of("kernel", self.name, "install Triton, which comes with PyTorch for CUDA")


if TYPE_CHECKING:  # a kernel's types are Triton's, not Python's

    class _Language(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_Language):
        class constexpr(Any): ...

    triton: Any
    TensorDescriptor: Any
else:
    try:
        import triton
        import triton.language as tl
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ModuleNotFoundError:
        triton = SimpleNamespace(jit=lambda kernel=None, **options: _Missing(kernel) if kernel else _Missing)
        tl = SimpleNamespace(constexpr=lambda value: value)
        TensorDescriptor = None

AVAILABLE = importlib.util.find_spec("triton") is not None


def next_power(size: int) -> int:
    """The next power of two, at least 1: what Triton's ranges want."""
    return 1 << (max(size, 1) - 1).bit_length()
