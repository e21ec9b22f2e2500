"""A model of what Gluon's Hopper kernels stand on, in numpy: parts that run in any order, barriers with phases,
copies that arrive at any time, products that read shared memory until they are waited for.

Nothing here is timed: one part runs at a time, and a seed chooses which one goes on at each operation. What would be a
fault on a GPU is an error: a wait that nobody ends, memory read outside of a tensor, shared memory that changes under a
product, a result that is used before its product has ended, or written twice.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np


class Number(np.float32):
    """The type of what lies in shared memory."""

    primitive_bitwidth = 8


class FaultError(Exception):
    """What a GPU would do wrong, or not at all."""


class Block(np.ndarray):
    """A tensor of the language."""

    type = SimpleNamespace(layout=None)

    def __iadd__(self, other: Any) -> Any:  # values, not places
        return self + other

    def expand_dims(self, axis: int) -> Any:
        return np.expand_dims(self, axis)

    def permute(self, axes: tuple[int, ...]) -> Any:
        return self.transpose(axes)

    def split(self) -> tuple[Any, Any]:
        return self[..., 0], self[..., 1]

    def to(self, dtype: Any) -> Any:
        return self.astype(dtype)


def block(values: Any) -> Any:
    return np.asarray(values).view(Block)


# -- who goes on ----------------------------------------------------------------------------------------------------
class Parts:
    """The parts of a program, of which one runs at a time, and the copies under way."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.waiting: dict[int, Callable[[], bool]] = {}
        self.turns: list[threading.Semaphore] = []
        self.fault: BaseException | None = None
        self.local = threading.local()

    def run(self, bodies: list[Callable[[], None]]) -> None:
        self.turns = [threading.Semaphore(0) for _ in bodies]
        self.waiting = dict.fromkeys(range(len(bodies)), lambda: True)
        threads = [threading.Thread(target=self._body, args=each, daemon=True) for each in enumerate(bodies)]
        for thread in threads:
            thread.start()
        self._pass_on()
        for thread in threads:
            thread.join()
        if self.fault:
            raise self.fault
        if self.copies:
            raise FaultError("a copy is under way when the program ends")

    def _body(self, index: int, body: Callable[[], None]) -> None:
        self.local.index = index
        self.turns[index].acquire()
        try:
            if not self.fault:
                body()
        except BaseException as fault:  # the one who started the parts raises it
            self.fault = self.fault or fault
        del self.waiting[index]
        self._pass_on()

    def wait(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on; come back when `ready`."""
        index = self.local.index
        self.waiting[index] = ready
        self._pass_on()
        self.turns[index].acquire()
        if self.fault:
            raise self.fault

    def _pass_on(self) -> None:
        while self.waiting:
            able = [index for index, ready in self.waiting.items() if self.fault or ready()]
            choice = self.random.randrange(len(able) + len(self.copies)) if able or self.copies else -1
            if 0 <= choice < len(able):
                self.turns[able[choice]].release()
                return
            if choice < 0:
                self.fault = FaultError("all parts wait, and nothing is under way")
            else:
                self.copies.pop(choice - len(able))()


# -- memory ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pointer:
    """Into a tensor of the GPU, which is read and written inside of its bounds only, and written once."""

    memory: np.ndarray
    offset: Any = 0
    written: set[int] = field(default_factory=set)
    dtype: Any = field(default_factory=lambda: SimpleNamespace(element_ty=np.float32))

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more, self.written, self.dtype)

    __radd__ = __add__

    def __sub__(self, less: Any) -> Pointer:
        return self + -less

    def inside(self, mask: Any) -> tuple[Any, Any]:
        offset, mask = np.broadcast_arrays(self.offset, mask)
        if ((offset[mask] < 0) | (offset[mask] >= self.memory.size)).any():
            raise FaultError("outside of the tensor")
        return np.where(mask, offset, 0), mask

    def load(self, mask: Any = True, other: Any = 0) -> Any:
        offset, mask = self.inside(mask)
        found = np.where(mask, self.memory.reshape(-1)[offset], other)
        return block(found) if found.ndim else found.item()

    def store(self, value: Any, mask: Any = True) -> None:
        offset, mask = self.inside(mask)
        where = offset[mask].tolist()
        if self.written & set(where):
            raise FaultError("written twice")
        self.written.update(where)
        self.memory.reshape(-1)[offset[mask]] = np.broadcast_to(value, mask.shape)[mask]


@dataclass(frozen=True)
class Shared:
    """A block of shared memory, or a view of it."""

    memory: np.ndarray
    dtype: Any = Number

    def load(self, layout: Any) -> Any:
        return block(self.memory.copy())

    def store(self, value: Any) -> None:
        self.memory[:] = value

    def index(self, at: int) -> Shared:
        return Shared(self.memory[at])

    def slice(self, start: int, length: int, axis: int) -> Shared:
        return Shared(self.memory[(slice(None),) * axis + (slice(start, start + length),)])

    def permute(self, axes: tuple[int, ...]) -> Shared:
        return Shared(self.memory.transpose(axes))


@dataclass(frozen=True)
class Descriptor:
    """A tensor that is copied by blocks; behind its end stand zeros."""

    memory: np.ndarray
    shape: tuple[int, int]
    dtype: Any = None
    layout: Any = None

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(nbytes=self.shape[0] * self.shape[1])

    def block(self, row: int, column: int) -> np.ndarray:
        found = self.memory[row : row + self.shape[0], column : column + self.shape[1]]
        return np.pad(found, [(0, wanted - got) for wanted, got in zip(self.shape, found.shape, strict=True)])


class Barrier:
    """Of shared memory: a phase ends when all have arrived, and all bytes that they announced."""

    def __init__(self) -> None:
        self.count = self.left = self.bytes = self.phase = 0

    def add(self, arrivals: int, more_bytes: int) -> None:
        self.left -= arrivals
        self.bytes += more_bytes
        if self.left < 0 or not self.count:
            raise FaultError("more arrivals than the phase has")
        if self.left == 0 and self.bytes == 0:
            self.left, self.phase = self.count, self.phase + 1

    def passed(self, parity: int) -> bool:
        return self.phase & 1 != parity


class Barriers:
    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, at: int) -> Barrier:
        return self.barriers[at]


# -- products -------------------------------------------------------------------------------------------------------
class Product:
    """Under way until it is waited for: it has read its operands, or has still to."""

    def __init__(self, x: Shared, w: Shared, before: Any) -> None:
        self.operands, self.before = (x.memory, w.memory), before
        self.seen, self.value = [memory.copy() for memory in self.operands], None

    def end(self) -> None:
        for memory, seen in zip(self.operands, self.seen, strict=True):
            if not np.array_equal(memory, seen, equal_nan=True):
                raise FaultError("shared memory changed under a product")
        if np.isnan(self.seen[0]).any() or np.isnan(self.seen[1]).any():
            raise FaultError("a product of what nobody wrote")
        before = self.before.ended() if isinstance(self.before, Product) else self.before
        with np.errstate(invalid="ignore"):  # infinite is what should not be read, but may be
            self.value = before + block(self.seen[0] @ self.seen[1])

    def ended(self) -> Any:
        if self.value is None:
            raise FaultError("used before its product has ended")
        return self.value

    def reshape(self, shape: Any) -> Any:
        return self.ended().reshape(shape)

    def __mul__(self, other: Any) -> Any:
        return self.ended() * other

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.ended()


class Machine:
    """One program's view of the language: what a kernel finds under `gl`, `mbarrier` and the other names.

    `place` is the program's in the `grid`.
    """

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...], seed: int) -> None:
        self.parts, self.under_way, self.place, self.grid = Parts(seed), threading.local(), place, grid

    def names(self) -> dict[str, Any]:
        return {
            "gluon": SimpleNamespace(jit=lambda function=None, **_: function or (lambda one: one)),
            "gl": self.language(),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: Barrier, init=self.init, wait=self.wait, expect=self.expect, arrive=self.arrive
            ),
            "fence_async_shared": lambda: None,
            "release_next": lambda: None,
            "async_load": self.async_load,
            "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.product_wait,
        }

    def language(self) -> Any:
        layouts = "BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "SwizzledSharedLayout"
        nothing = dict.fromkeys(layouts, lambda *_: None)
        return SimpleNamespace(
            **nothing,
            constexpr=lambda value: value, int64=np.int64, float32=np.float32,
            program_id=self.place.__getitem__, num_programs=self.grid.__getitem__, static_range=range,
            static_assert=self.static_assert, warp_specialize=self.specialize,
            zeros=lambda shape, dtype, _: block(np.zeros(shape, dtype)),
            arange=lambda start, stop, _: block(np.arange(start, stop)),
            full=lambda shape, value, dtype, _: block(np.full(shape, value, dtype)), where=self.where,
            cast=lambda value, dtype: dtype(value), sum=self.sum, max=lambda value, axis: block(np.max(value, axis)),
            minimum=np.minimum, maximum=np.maximum, exp=np.exp, exp2=np.exp2,
            convert_layout=lambda value, _: value, load=Pointer.load, store=Pointer.store,
            allocate_shared_memory=self.allocate,
        )  # fmt: skip

    @staticmethod
    def static_assert(condition: bool) -> None:
        assert condition

    @staticmethod
    def where(condition: Any, first: Any, second: Any) -> Any:
        found = np.where(condition, first, second)
        return block(found) if found.ndim else found.item()

    @staticmethod
    def sum(value: Any, axis: int) -> Any:
        found = value.sum(axis)
        return block(found) if np.ndim(found) else int(found)

    @staticmethod
    def allocate(_: Any, shape: list[int], layout: Any) -> Shared | Barriers:
        return Barriers(shape[0]) if layout is Barrier else Shared(np.full(shape, np.nan, np.float32))

    def specialize(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        self.parts.run([lambda part=part, given=given: part(*given) for part, given in parts])

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.left = count

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.parts.wait(lambda: barrier.passed(parity))

    def expect(self, barrier: Barrier, more_bytes: int) -> None:
        self.parts.wait()
        barrier.add(1, more_bytes)

    def arrive(self, barrier: Barrier) -> None:
        self.parts.wait()
        barrier.add(1, 0)

    def async_load(self, source: Descriptor, corner: list[int], barrier: Barrier, into: Shared) -> None:
        def arrives() -> None:
            into.memory[:] = source.block(*corner)
            barrier.add(0, -source.block_type.nbytes)

        self.parts.copies.append(arrives)
        self.parts.wait()

    def product(self, x: Shared, w: Shared, acc: Any, use_acc: bool, is_async: bool) -> Product:
        assert is_async
        product = Product(x, w, acc if use_acc else 0 * np.zeros(acc.shape if hasattr(acc, "shape") else ()))
        self._queue().append(product)
        self.parts.wait()
        return product

    def product_wait(self, left: int, products: list[Product]) -> Product:
        """All but the last `left` of a part's products have ended."""
        self.parts.wait()
        queue = self._queue()
        while len(queue) > left:
            queue.pop(0).end()
        return products[0]

    def _queue(self) -> list[Product]:
        if not hasattr(self.under_way, "queue"):
            self.under_way.queue = []
        return self.under_way.queue


def stumbles(run: Callable[[str], None], kernel: str) -> bool:
    """Whether a run with that text of the kernel makes the machine stumble, or gives a wrong result."""
    try:
        run(kernel)
    except (FaultError, AssertionError):
        return True
    return False
