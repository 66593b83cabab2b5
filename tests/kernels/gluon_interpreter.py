"""Runs the kernels in Gluon on a CPU, which no interpreter of Triton does.

The parts of Gluon that the kernels use are replaced, in their modules, by ones that work on torch's
tensors. Each partition of a program is a thread. One of them runs at a time; wherever it meets a
barrier or a wait, a draw says who goes on.

What a GPU does on the side, copies, products and stores, is done at once, or as late as the waits
allow: `Order` says which. Shared memory is NaN until written. So a kernel that reads too soon, or
writes over what is still read, gives wrong numbers in one of the orders, and barriers that do not
add up end in `DeadlockError`. Where the asynchronous proxy reads what threads wrote, without a
fence between, it raises. Layouts and registers are not modelled: compiling ahead of time checks
these.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch


class Order(NamedTuple):
    """When what is asynchronous is done, and the seed of who goes on."""

    copies_late: bool
    """Copies to shared memory: at once, or when all partitions wait."""
    reads_late: bool
    """Products and stores from shared memory: at once, or when they are waited for."""
    seed: int = 0


ORDERS = (Order(False, True), Order(True, False), Order(True, True, 1), Order(False, False, 2))


class DeadlockError(Exception):
    """All partitions wait, and nothing is under way."""


class _Stop(BaseException):
    """Ends the other partitions of a program that failed."""


class Dtype(NamedTuple):
    """A dtype by its name in Gluon."""

    of_torch: torch.dtype
    primitive_bitwidth: int


_DTYPES = {
    name: Dtype(getattr(torch, name), getattr(torch, name).itemsize * 8)
    for name in ("bfloat16", "float16", "float32", "int32", "int64")
}


def _dtype_of(tensor: torch.Tensor) -> Dtype:
    return Dtype(tensor.dtype, tensor.element_size() * 8)


class Block(torch.Tensor):
    """Numbers in registers: a tensor with Gluon's way to call what torch calls otherwise."""

    def to(self, dtype: Any) -> "Block":
        """Round to a dtype."""
        return super().to(dtype.of_torch if isinstance(dtype, Dtype) else dtype)

    def split(self) -> tuple["Block", ...]:
        """Return the halves along the last dim, which is of 2."""
        assert self.shape[-1] == 2
        return self.unbind(-1)


class Pointer(NamedTuple):
    """Places in a tensor of global memory, one or many."""

    memory: torch.Tensor
    places: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=_dtype_of(self.memory))

    def __add__(self, places: Any) -> "Pointer":
        return Pointer(self.memory, self.places + places)


class Descriptor:
    """What TMA is told of a tensor."""

    def __init__(self, tensor: torch.Tensor, block: list[int], layout: Any) -> None:
        self.tensor, self.block, self.layout = tensor, block, layout
        self.dtype = _dtype_of(tensor)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor, block: list[int], layout: Any) -> "Descriptor":
        """Describe a matrix whose rows begin at 16 bytes."""
        assert tensor.ndim == 2
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
        return cls(tensor, block, layout)

    def read(self, corner: Sequence[int]) -> torch.Tensor:
        """Return a block; what it has beyond the edges is zero."""
        block = torch.zeros(self.block, dtype=self.tensor.dtype)
        inside = self._inside(corner)
        block[: inside.shape[0], : inside.shape[1]] = inside
        return block

    def write(self, corner: Sequence[int], block: torch.Tensor) -> None:
        """Store a block; what it has beyond the edges is dropped."""
        inside = self._inside(corner)
        inside.copy_(block[: inside.shape[0], : inside.shape[1]])

    def _inside(self, corner: Sequence[int]) -> torch.Tensor:
        (row, col), (height, width) = corner, self.block
        assert min(row, col) >= 0
        return self.tensor[row : row + height, col : col + width]


class Shared(NamedTuple):
    """A piece of shared memory, and which partitions need a fence to read it asynchronously."""

    numbers: torch.Tensor
    unfenced: torch.Tensor
    """Of as many numbers: a bit a partition."""

    def index(self, place: int) -> "Shared":
        return self._each(lambda t: t[place])

    def permute(self, dims: tuple[int, ...]) -> "Shared":
        return self._each(lambda t: t.permute(dims))

    def _reinterpret(self, dtype: Dtype, shape: list[int], layout: Any) -> "Shared":
        # Rows of 128 bytes lie alike whatever their number; those of any other width do not.
        assert dtype == _dtype_of(self.numbers)
        assert self.numbers.shape[-1] == shape[-1] == 1024 // dtype.primitive_bitwidth
        return self._each(lambda t: t.view(shape))

    def store(self, block: torch.Tensor) -> None:
        assert block.shape == self.numbers.shape
        self.write(block, by_threads=True)

    def load(self, layout: Any) -> Block:
        return self.numbers.clone().as_subclass(Block)

    def write(self, block: torch.Tensor, *, by_threads: bool) -> None:
        assert block.dtype == self.numbers.dtype
        self.numbers.copy_(block)
        self.unfenced.fill_(0xFF if by_threads else 0)

    def read_asynchronously(self, partition: "Partition") -> torch.Tensor:
        """Return the numbers, as tensor cores and TMA read them."""
        fenced = not (self.unfenced & partition.bit).any()
        assert fenced, "written by threads and read by the asynchronous proxy without a fence"
        return self.numbers

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Shared":
        return Shared(change(self.numbers), change(self.unfenced))


class Barrier:
    """An mbarrier: a phase ends when all arrived, and all bytes."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def arrive(self, count: int = 1, more_bytes: int = 0) -> None:
        """Count arrivals, and bytes that are expected, or came, if negative."""
        self.missing -= count
        self.bytes += more_bytes
        assert self.missing >= 0, "more arrivals than the barrier counts"
        if not self.missing and not self.bytes:
            self.missing, self.phase = self.count, self.phase ^ 1


class Partition:
    """A thread of a program, with what it has under way."""

    def __init__(self, number: int, warps: int) -> None:
        self.bit, self.warps = 1 << number, warps
        self.ready: Callable[[], bool] = lambda: True
        self.ended = False
        self.products: deque[Callable[[], None]] = deque()
        self.stores: deque[Callable[[], None]] = deque()


class Program:
    """The partitions of a program, of which one runs at a time."""

    def __init__(self, number: int, grid: int, warps: int, seed: int) -> None:
        self.number, self.grid = number, grid
        self.draw = random.Random(f"{seed} {number}")
        self.partitions = [Partition(0, warps)]
        self.running = self.partitions[0]
        self.turn = threading.Condition()
        self.copies: deque[Callable[[], None]] = deque()
        self.memory: list[Shared] = []
        self.failure: BaseException | None = None

    def specialize(self, functions: Sequence[tuple[Any, tuple]], warps: Sequence[int]) -> None:
        """Run the functions, each in a partition, to their ends."""
        assert len(functions) == len(warps) + 1
        self.partitions += [Partition(1 + i, count) for i, count in enumerate(warps)]
        threads = [
            threading.Thread(target=self._run, args=(partition, *function))
            for partition, function in zip(self.partitions, functions, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        assert not self.copies, "ended with copies under way"

    @torch.no_grad()  # that of a thread is its own
    def _run(self, partition: Partition, function: Callable[..., None], args: tuple) -> None:
        try:
            self._await_turn(partition)
            function(*args)
            assert not [*partition.products, *partition.stores], "ended with work under way"
        except _Stop:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        partition.ended = True
        self._pass_turn()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let any partition go on that can, and return when this one does."""
        partition = self.running
        partition.ready = ready
        self._pass_turn()
        self._await_turn(partition)

    def _pass_turn(self) -> None:
        with self.turn:
            try:
                self.running = self._next()
            except Exception as error:
                self.failure = self.failure or error
            self.turn.notify_all()

    def _next(self) -> Partition:
        left = [p for p in self.partitions if not p.ended]
        while left:
            able = [p for p in left if p.ready()]
            if able:
                return self.draw.choice(able)
            if not self.copies:
                raise DeadlockError(f"{len(left)} partitions wait")
            self.copies.popleft()()
        return self.running

    def _await_turn(self, partition: Partition) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.failure is not None or self.running is partition)
        if self.failure is not None:
            raise _Stop


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
    memory = pointer.memory.view(-1)
    if not isinstance(pointer.places, torch.Tensor):
        return memory[pointer.places].item() if mask is None or mask else other
    if mask is None:
        return memory[pointer.places].as_subclass(Block)
    places, mask = torch.broadcast_tensors(pointer.places, mask)
    return torch.where(mask, memory[places.where(mask, 0)], other).as_subclass(Block)


def _store(pointer: Pointer, block: torch.Tensor, mask: torch.Tensor) -> None:
    places, mask = torch.broadcast_tensors(pointer.places, mask)
    pointer.memory.view(-1)[places[mask]] = torch.Tensor(block)[mask]


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


class Layout:
    """Layouts say nothing here."""

    def __init__(self, *sizes: Any) -> None:
        pass

    @classmethod
    def get_default_for(cls, *sizes: Any) -> "Layout":
        """Return the layout of a block."""
        return cls()


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
                arange=lambda first, end, layout: torch.arange(first, end).as_subclass(Block),
                convert_layout=lambda block, layout, assert_trivial: block,
                exp=torch.exp,
                load=_load,
                maximum=max,
                minimum=min,
                num_programs=lambda axis: self.program.grid,
                program_id=lambda axis: self.program.number,
                static_range=range,
                store=_store,
                to_tensor=int,
                warp_specialize=lambda functions, warps, _: self.program.specialize(
                    functions, warps
                ),
                where=_where,
                zeros=lambda shape, dtype, layout: torch.zeros(
                    shape, dtype=dtype.of_torch
                ).as_subclass(Block),
            ),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: Barrier,
                arrive=self._arrive,
                expect=self._expect,
                init=self._init,
                wait=self._wait,
            ),
            "tma": SimpleNamespace(
                async_copy_global_to_shared=self._copy_by_tma,
                async_copy_shared_to_global=self._store_by_tma,
                store_wait=lambda left: self._finish(self.program.running.stores, left),
            ),
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._wait_for_products,
        }

    def _allocate(self, dtype: Dtype, shape: list[int], layout: Any) -> Any:
        if layout is Barrier:
            return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__)
        numbers = torch.full(shape, torch.nan, dtype=dtype.of_torch)
        self.program.memory.append(Shared(numbers, torch.zeros(shape, dtype=torch.uint8)))
        return self.program.memory[-1]

    def _fence(self) -> None:
        for shared in self.program.memory:
            shared.unfenced.bitwise_and_(0xFF - self.program.running.bit)

    def _init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def _expect(self, barrier: Barrier, num_bytes: int) -> None:
        self.program.pause()
        barrier.arrive(more_bytes=num_bytes)

    def _arrive(self, barrier: Barrier, *, pred: bool = True) -> None:
        if pred:
            barrier.arrive()
            self.program.pause()

    def _wait(self, barrier: Barrier, phase: int, pred: bool = True) -> None:
        if pred:
            self.program.pause(lambda: barrier.phase != phase)

    def _copy(self, copy: Callable[[], None]) -> None:
        if self.order.copies_late:
            self.program.copies.append(copy)
        else:
            copy()

    def _copy_by_tma(
        self, source: Descriptor, corner: list[int], barrier: Barrier, shared: Shared
    ) -> None:
        def copy() -> None:
            block = source.read(corner)
            shared.write(block, by_threads=False)
            barrier.arrive(0, -block.numel() * block.element_size())

        self._copy(copy)

    def _copy_by_threads(self, shared: Shared, pointer: Pointer, mask: Any = None) -> None:
        assert pointer.places.shape == shared.numbers.shape
        self._copy(lambda: shared.write(_load(pointer, mask, 0), by_threads=True))

    def _arrive_after_copies(self, barrier: Barrier, increment_count: bool) -> None:
        assert not increment_count
        threads = 32 * self.program.running.warps
        self._copy(lambda: barrier.arrive(threads))

    def _read(self, work: deque[Callable[[], None]], read: Callable[[], None]) -> None:
        if self.order.reads_late:
            work.append(read)
        else:
            read()

    def _finish(self, work: deque[Callable[[], None]], left: int) -> None:
        self.program.pause()
        while len(work) > left:
            work.popleft()()

    def _store_by_tma(self, target: Descriptor, corner: list[int], shared: Shared) -> None:
        partition = self.program.running
        self._read(
            partition.stores,
            lambda: target.write(corner, shared.read_asynchronously(partition)),
        )

    def _multiply(self, a: Shared, b: Shared, acc: Block, is_async: bool) -> Block:
        assert is_async
        partition = self.program.running

        def multiply() -> None:
            left, right = (side.read_asynchronously(partition).float() for side in (a, b))
            acc.add_(left @ right)

        self._read(partition.products, multiply)
        return acc

    def _wait_for_products(self, left: int, deps: tuple[Block]) -> Block:
        self._finish(self.program.running.products, left)
        return deps[0]


class Kernel:
    """A kernel that is launched as Triton's are, a program after the other."""

    def __init__(self, fn: Callable[..., None], interpreter: Interpreter) -> None:
        self.fn, self.interpreter = fn, interpreter

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            args = tuple(Pointer(a) if isinstance(a, torch.Tensor) else a for a in args)
            for number in range(grid[0]):
                program = Program(number, grid[0], num_warps, self.interpreter.order.seed)
                self.interpreter.program = program
                self.fn(*args, **constants)

        return launch


def interpret(monkeypatch: pytest.MonkeyPatch, order: Order) -> None:
    """Let the kernels in Gluon run here, whatever Triton there is."""
    from dmoe_kernels import gluon_common, gluon_outer, gluon_up

    interpreter = Interpreter(order)
    for module in (gluon_common, gluon_up, gluon_outer):
        for name, value in list(vars(module).items()):
            if fn := getattr(value, "fn", None):
                is_kernel = name.endswith("_kernel")
                monkeypatch.setattr(module, name, Kernel(fn, interpreter) if is_kernel else fn)
        for name, value in interpreter.names().items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setattr(module, "check_suited", lambda *tensors: None)
