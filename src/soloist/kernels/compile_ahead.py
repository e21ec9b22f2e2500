"""Kernels compiled side by side before they are needed: a first launch would wait for each of them in turn."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from soloist.kernels.language import AVAILABLE, INTERPRETED, triton


@contextmanager
def compile_ahead(threads: int) -> Iterator[None]:
    """Launches inside compile their kernels, as many as `threads` at a time, and start none: what these would have
    written is left as it was. All are compiled at the end. Does nothing where nothing is compiled.
    """
    if not AVAILABLE or INTERPRETED:
        yield
        return
    run = triton.JITFunction.run

    def compile_it(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *args, grid=grid, warmup=True, **options)

    triton.JITFunction.run = compile_it
    try:
        with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        triton.JITFunction.run = run
