"""Runs the kernels in Gluon on a CPU, which no interpreter of Triton does.

The parts of Gluon that the kernels use are replaced, in their modules, by ones that work on torch's
tensors, on a `gluon_machine.Program`.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gluon_machine import (
    Barrier,
    Barriers,
    Block,
    Descriptor,
    Dtype,
    Order,
    Pointer,
    Program,
    Shared,
)

ORDERS = (
    Order(copies_late=False, reads_late=True),
    Order(copies_late=True, reads_late=False),
    Order(copies_late=True, reads_late=True),
)

_DTYPES = {
    name: Dtype.of(getattr(torch, name))
    for name in ("bfloat16", "float16", "float32", "int32", "int64")
}


class Layout:
    """Layouts say nothing here."""

    def __init__(self, *sizes: Any) -> None:
        pass

    @classmethod
    def get_default_for(cls, *sizes: Any) -> "Layout":
        """Return the layout of a block."""
        return cls()


class BarrierLayout(Layout):
    """That of barriers, by which memory for them is told from memory for numbers."""


class Interpreter:
    """What the kernels call, on the program that runs."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.program: Program

    def names(self) -> dict[str, Any]:
        """Return what stands for the parts of Gluon that the kernels import."""
        return {
            "TensorDescriptor": Descriptor,
            "async_copy": SimpleNamespace(
                async_copy_global_to_shared=self._copy_by_threads,
                mbarrier_arrive=self._arrive_after_copies,
            ),
            "fence_async_shared": self._fence,
            "gl": SimpleNamespace(
                **_DTYPES,
                NVMMASharedLayout=Layout,
                NVMMADistributedLayout=Layout,
                BlockedLayout=Layout,
                SliceLayout=Layout,
                allocate_shared_memory=self._allocate,
                arange=_arange,
                convert_layout=lambda block, layout, assert_trivial: block,
                exp=torch.exp,
                load=Pointer.load,
                maximum=max,
                minimum=min,
                num_programs=lambda axis: self.program.grid,
                program_id=lambda axis: self.program.number,
                static_range=range,
                store=Pointer.store,
                to_tensor=int,
                warp_specialize=lambda functions, warps, _: self.program.specialize(
                    functions, warps
                ),
                where=_where,
                zeros=_zeros,
            ),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=BarrierLayout,
                arrive=self._arrive,
                expect=self._expect,
                init=Barrier.set,
                wait=self._wait,
            ),
            "tma": SimpleNamespace(
                async_copy_global_to_shared=self._copy_by_tma,
                async_copy_shared_to_global=self._store_by_tma,
                store_wait=self._wait_for_stores,
            ),
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._wait_for_products,
        }

    def _allocate(self, dtype: Dtype, shape: list[int], layout: Layout) -> Any:
        if isinstance(layout, BarrierLayout):
            return Barriers(shape[0])
        self.program.memory.append(Shared.allocate(dtype, shape))
        return self.program.memory[-1]

    def _fence(self) -> None:
        for shared in self.program.memory:
            shared.fence(self.program.running)

    def _expect(self, barrier: Barrier, num_bytes: int) -> None:
        self.program.pause()
        barrier.arrive(more_bytes=num_bytes)

    def _arrive(self, barrier: Barrier, *, pred: bool = True) -> None:
        if pred:
            barrier.arrive()
            self.program.pause()

    def _wait(self, barrier: Barrier, phase: int, pred: bool = True) -> None:
        if pred:
            self.program.pause(lambda: barrier.has_ended(phase))

    def _copy_by_tma(
        self, source: Descriptor, corner: list[int], barrier: Barrier, shared: Shared
    ) -> None:
        def copy() -> None:
            block = source.read(corner)
            shared.write(block, by_threads=False)
            barrier.arrive(0, -block.numel() * block.element_size())

        self.program.copy(copy)

    def _copy_by_threads(self, shared: Shared, pointer: Pointer, mask: Any = None) -> None:
        def copy() -> None:
            shared.write(pointer.load(mask, 0), by_threads=True)

        self.program.running.copies.append(copy)
        self.program.copy(copy)

    def _arrive_after_copies(self, barrier: Barrier, increment_count: bool) -> None:
        assert not increment_count
        partition = self.program.running
        before, partition.copies = partition.copies, []

        def arrive() -> None:
            for copy in before:
                self.program.hurry(copy)
            barrier.arrive(32 * partition.warps)

        self.program.copy(arrive)

    def _store_by_tma(self, target: Descriptor, corner: list[int], shared: Shared) -> None:
        partition = self.program.running

        def store() -> None:
            target.write(corner, shared.read_asynchronously(partition))

        self.program.read(partition.stores, store)

    def _wait_for_stores(self, left: int) -> None:
        self.program.finish(self.program.running.stores, left)

    def _multiply(self, a: Shared, b: Shared, acc: Block, is_async: bool) -> Block:
        assert is_async
        partition = self.program.running

        def multiply() -> None:
            left, right = (side.read_asynchronously(partition).float() for side in (a, b))
            acc.add_(left @ right)

        self.program.read(partition.products, multiply)
        return acc

    def _wait_for_products(self, left: int, deps: tuple[Block]) -> Block:
        self.program.finish(self.program.running.products, left)
        return deps[0]


class Kernel:
    """A kernel that is launched as Triton's are, a program after the other."""

    def __init__(self, fn: Callable[..., None], interpreter: Interpreter) -> None:
        self.fn, self.interpreter = fn, interpreter

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            args = tuple(Pointer(a) if isinstance(a, torch.Tensor) else a for a in args)
            order = self.interpreter.order
            # In both directions, so that what a program writes to rows of another does not always
            # vanish under what that one writes later.
            for number in sorted(range(grid[0]), reverse=order.copies_late):
                self.interpreter.program = Program(number, grid[0], num_warps, order)
                self.fn(*args, **constants)

        return launch


def interpret(monkeypatch: pytest.MonkeyPatch, order: Order) -> None:
    """Let the kernels in Gluon run here, whatever Triton there is; again with another order."""
    from dmoe_kernels import gluon_common, gluon_outer, gluon_up

    interpreter = Interpreter(order)
    for module in (gluon_common, gluon_up, gluon_outer):
        for name, value in list(vars(module).items()):
            # What Triton makes of a function, and `Kernel`, both have it as `fn`.
            if fn := getattr(value, "fn", None):
                is_kernel = name.endswith("_kernel")
                monkeypatch.setattr(module, name, Kernel(fn, interpreter) if is_kernel else fn)
        for name, value in interpreter.names().items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setattr(module, "check_suited", lambda *tensors: None)


def _arange(first: int, end: int, layout: Layout) -> Block:
    return torch.arange(first, end, dtype=torch.int32).as_subclass(Block)


def _zeros(shape: tuple[int, ...], dtype: Dtype, layout: Layout) -> Block:
    return torch.zeros(shape, dtype=dtype.of_torch).as_subclass(Block)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no
