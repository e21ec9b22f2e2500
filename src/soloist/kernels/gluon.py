"""Gluon as the Hopper kernels use it: imported only where Triton is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # a kernel's types are Gluon's, not Python's
    from soloist.kernels.language import tl as gl

    gluon = TensorDescriptor = fence_async_shared = mbarrier = tma = cast(Any, None)
    async_load = warpgroup_mma = warpgroup_mma_wait = cast(Any, None)
else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Triton 3.6 and later ones each know one of the names.
    async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

__all__ = [
    "TensorDescriptor",
    "async_load",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
