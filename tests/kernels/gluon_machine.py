"""A multiprocessor on which a kernel in Gluon runs: its memory, its barriers, its partitions.

Each partition of a program, which is a warpgroup or a few warps, is a thread here. One of them runs
at a time; wherever it meets a barrier or a wait, one of those that can goes on, by priorities that
are drawn anew now and then.

What a GPU does on the side, copies, products and stores, is done at once, or as late as the waits
allow: `Order` says which. Shared memory is NaN until written. So a kernel that reads too soon, or
writes over what is still read, gives wrong numbers in one of the orders, and barriers that do not
add up end in `DeadlockError`. Where the asynchronous proxy reads what threads wrote, without a
fence of the partition that reads, it raises.

Not modelled: layouts and registers, which compiling ahead of time checks; the warps within a
partition, which Triton's compiler keeps in step; programs beside each other.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

Work = Callable[[], None]


class FaultError(Exception):
    """A kernel did what a GPU does not allow."""


class DeadlockError(FaultError):
    """All partitions wait, and nothing is under way."""


class _Stop(BaseException):
    """Ends the other partitions of a program that failed."""


def check(holds: bool, fault: str) -> None:
    """Raise FaultError unless it holds."""
    if not holds:
        raise FaultError(fault)


class Order(NamedTuple):
    """When what is asynchronous is done."""

    copies_late: bool
    """Copies to shared memory: at once, or in any order when all partitions wait."""
    reads_late: bool
    """Products and stores from shared memory: at once, or when they are waited for."""


class Dtype(NamedTuple):
    """A dtype as Gluon has it."""

    of_torch: torch.dtype
    primitive_bitwidth: int

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Dtype":
        """Return that of torch's."""
        return cls(dtype, 8 * dtype.itemsize)


class Block(torch.Tensor):
    """Numbers in registers: a tensor with Gluon's way to call what torch calls otherwise."""

    def to(self, dtype: Any) -> "Block":
        """Round to a dtype."""
        return super().to(dtype.of_torch if isinstance(dtype, Dtype) else dtype)

    def split(self) -> Sequence["Block"]:
        """Return the halves along the last dim, which is of 2."""
        assert self.shape[-1] == 2
        return self.unbind(-1)


class Pointer(NamedTuple):
    """Places in a tensor of global memory, one or many."""

    memory: torch.Tensor
    places: Any = 0

    @property
    def dtype(self) -> Any:
        """What is pointed at."""
        return SimpleNamespace(element_ty=Dtype.of(self.memory.dtype))

    def __add__(self, places: Any) -> "Pointer":
        return Pointer(self.memory, self.places + places)

    def load(self, mask: Any = None, other: Any = None) -> Any:
        """Return the number, or the numbers, at the places."""
        memory = self.memory.view(-1)
        if not isinstance(self.places, torch.Tensor):
            if mask is False:
                return other
            self._check(torch.tensor(self.places))
            return memory[self.places].item()
        places, mask = torch.broadcast_tensors(
            self.places, torch.tensor(True) if mask is None else mask
        )
        self._check(places[mask])
        return torch.where(mask, memory[places.where(mask, 0)], other or 0).as_subclass(Block)

    def store(self, block: torch.Tensor, mask: torch.Tensor) -> None:
        """Write numbers where the mask holds."""
        places, mask = torch.broadcast_tensors(self.places, mask)
        self._check(places[mask])
        self.memory.view(-1)[places[mask]] = torch.Tensor(block)[mask]

    def _check(self, places: torch.Tensor) -> None:
        if isinstance(self.places, torch.Tensor) and self.places.ndim == 2:
            check(self.places.dtype == torch.int64, "rows times a width may exceed 31 bits")
        if places.numel():
            inside = places.min() >= 0 and places.max() < self.memory.numel()
            check(bool(inside), "a place outside the tensor")


class Descriptor:
    """What TMA is told of a matrix."""

    def __init__(self, tensor: torch.Tensor, block: list[int], layout: Any) -> None:
        self.tensor, self.block, self.layout = tensor, block, layout
        self.dtype = Dtype.of(tensor.dtype)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor, block: list[int], layout: Any) -> "Descriptor":
        """Describe a matrix whose rows begin at 16 bytes."""
        check(tensor.ndim == 2 and tensor.is_contiguous(), "no matrix of rows after each other")
        check(tensor.data_ptr() % 16 == 0, "a matrix that begins between 16 bytes")
        check(tensor.shape[1] * tensor.itemsize % 16 == 0, "rows that begin between 16 bytes")
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
        check(min(row, col) >= 0, f"a block at {corner}")
        return self.tensor[row : row + height, col : col + width]


class Shared:
    """A piece of shared memory, and which partitions need a fence to read it asynchronously."""

    def __init__(self, numbers: torch.Tensor, unfenced: torch.Tensor) -> None:
        self.numbers, self.unfenced = numbers, unfenced  # the latter with a bit a partition

    @classmethod
    def allocate(cls, dtype: Dtype, shape: list[int]) -> "Shared":
        """Return memory that nobody has written."""
        numbers = torch.full(shape, torch.nan, dtype=dtype.of_torch)
        return cls(numbers, torch.zeros(shape, dtype=torch.uint8))

    def index(self, place: int) -> "Shared":
        """Return one of its parts along the first dim."""
        check(0 <= place < len(self.numbers), f"no part {place} of {len(self.numbers)}")
        return self._each(lambda t: t[place])

    def permute(self, dims: tuple[int, ...]) -> "Shared":
        """Return the same memory with its dims in another order."""
        return self._each(lambda t: t.permute(dims))

    def _reinterpret(self, dtype: Dtype, shape: list[int], layout: Any) -> "Shared":
        # Rows of 128 bytes lie alike whatever their number; those of any other width do not.
        assert dtype.of_torch == self.numbers.dtype
        assert self.numbers.shape[-1] == shape[-1] == 1024 // dtype.primitive_bitwidth
        return self._each(lambda t: t.view(shape))

    def store(self, block: torch.Tensor) -> None:
        """Write numbers of registers."""
        self.write(block, by_threads=True)

    def load(self, layout: Any) -> Block:
        """Read to registers."""
        return self.numbers.clone().as_subclass(Block)

    def write(self, block: torch.Tensor, *, by_threads: bool) -> None:
        """Write what threads, or TMA, bring."""
        assert block.shape == self.numbers.shape
        assert block.dtype == self.numbers.dtype
        self.numbers.copy_(block)
        self.unfenced.fill_(0xFF if by_threads else 0)

    def read_asynchronously(self, partition: "Partition") -> torch.Tensor:
        """Return the numbers, as tensor cores and TMA read them."""
        fenced = not (self.unfenced & partition.bit).any()
        check(fenced, "written by threads and read by the asynchronous proxy without a fence")
        return self.numbers

    def fence(self, partition: "Partition") -> None:
        """Let a partition read asynchronously what threads wrote until now."""
        self.unfenced.bitwise_and_(0xFF - partition.bit)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Shared":
        return Shared(change(self.numbers), change(self.unfenced))


class Barrier:
    """An mbarrier: a phase ends when all arrived, and all bytes."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def set(self, count: int) -> None:
        """Say how many arrive in a phase."""
        self.count = self.missing = count

    def arrive(self, count: int = 1, more_bytes: int = 0) -> None:
        """Count arrivals, and bytes that are expected, or came, if negative."""
        self.missing -= count
        self.bytes += more_bytes
        check(self.missing >= 0, f"more arrivals than the {self.count} of a phase")
        if not self.missing and not self.bytes:
            self.missing, self.phase = self.count, self.phase ^ 1

    def has_ended(self, phase: int) -> bool:
        """Say whether the last phase that ended was an even (0) or an odd one (1), as asked."""
        check(phase in (0, 1), f"phase {phase}")
        return self.phase != phase


class Barriers:
    """Barriers in shared memory."""

    def __init__(self, number: int) -> None:
        self.each = [Barrier() for _ in range(number)]

    def index(self, place: int) -> Barrier:
        """Return one of them."""
        check(0 <= place < len(self.each), f"no barrier {place} of {len(self.each)}")
        return self.each[place]


class Partition:
    """A thread of a program, with what it has under way."""

    def __init__(self, number: int, warps: int) -> None:
        self.bit, self.warps = 1 << number, warps
        self.ready: Callable[[], bool] = lambda: True
        self.ended = False
        self.products: deque[Work] = deque()
        self.stores: deque[Work] = deque()
        self.copies: list[Work] = []
        """By its threads, since they last arrived after copies."""

    def leaves_work(self) -> bool:
        """Do what nobody waited for, and say whether there was any."""
        left = [*self.products, *self.stores]
        for work in left:
            work()
        return bool(left)


class Program:
    """The partitions of a program, of which one runs at a time."""

    def __init__(self, number: int, grid: int, warps: int, order: Order) -> None:
        self.number, self.grid, self.order = number, grid, order
        self.draw = random.Random(number)
        self.partitions = [Partition(0, warps)]
        self.running = self.partitions[0]
        self.turn = threading.Condition()
        self.copies: list[Work] = []
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
        check(not self.copies, "ended with copies under way")

    def copy(self, work: Work) -> None:
        """Do a copy to shared memory, at once or late."""
        if self.order.copies_late:
            self.copies.append(work)
        else:
            work()

    def hurry(self, work: Work) -> None:
        """Do a copy now, if it was not done yet."""
        if work in self.copies:
            self.copies.remove(work)
            work()

    def read(self, queue: deque[Work], work: Work) -> None:
        """Do what reads shared memory, at once or when the queue is waited for."""
        if self.order.reads_late:
            queue.append(work)
        else:
            work()

    def finish(self, queue: deque[Work], left: int) -> None:
        """Wait for all of a queue but the last few."""
        self.pause()
        while len(queue) > left:
            queue.popleft()()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let any partition go on that can, and return when this one does."""
        partition = self.running
        partition.ready = ready
        self._pass_turn()
        self._await_turn(partition)

    @torch.no_grad()  # that of a thread is its own
    def _run(self, partition: Partition, function: Callable[..., None], args: tuple) -> None:
        try:
            self._await_turn(partition)
            function(*args)
            check(not partition.leaves_work(), "ended with work under way")
        except _Stop:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        partition.ended = True
        self._pass_turn()

    def _pass_turn(self) -> None:
        with self.turn:
            try:
                self.running = self._next()
            except Exception as error:
                self.failure = self.failure or error
            self.turn.notify_all()

    def _next(self) -> Partition:
        if self.draw.random() < 0.1:
            self.draw.shuffle(self.partitions)
        left = [p for p in self.partitions if not p.ended]
        while left:
            for partition in left:
                if partition.ready():
                    return partition
            if not self.copies:
                raise DeadlockError(f"{len(left)} partitions wait")
            self.copies.pop(self.draw.randrange(len(self.copies)))()
        return self.running

    def _await_turn(self, partition: Partition) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.failure is not None or self.running is partition)
        if self.failure is not None:
            raise _Stop
