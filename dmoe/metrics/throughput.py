"""How fast a run trains: tokens a second and the share of the hardware's peak, between two logs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Dense (no sparsity) bf16 and fp16 FLOPs a second from the vendors' data sheets; the two are equal
# on all of these. The first name contained in the device's name decides, so variants come first.
_PEAK_16_BIT = (
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("MI300X", 1307e12),
)


def peak_flops(device_type: str, device_name: str, dtype: torch.dtype) -> float | None:
    """Return the peak of one device in FLOPs a second.

    Args:
        device_type: As in `torch.device`.
        device_name: As `torch.cuda.get_device_name` tells it.
        dtype: Of the matrix products.

    Returns:
        None where no number is known, as for every CPU: MFU is then not reported, unless the user
        gives the peak.
    """
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((flops for name, flops in _PEAK_16_BIT if name in device_name), None)


@dataclass(frozen=True)
class Window:
    """What was trained between two logs."""

    tokens: int
    steps: int
    seconds: float
    """Without evaluation and checkpoints."""

    waiting: float
    """The part of `seconds` spent waiting for data."""

    @property
    def tokens_per_second(self) -> float:
        """Training speed; of all ranks together where `tokens` are those of the global batch."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def step_seconds(self) -> float:
        """Mean seconds a step."""
        return self.seconds / max(self.steps, 1)

    @property
    def data_seconds(self) -> float:
        """Mean seconds a step spent waiting for data."""
        return self.waiting / max(self.steps, 1)

    def mfu(self, flops_per_token: float, peak_flops: float) -> float:
        """Return the model FLOPs utilisation, 0-1.

        Args:
            flops_per_token: Forward and backward, of active parameters, without recomputation.
            peak_flops: Of all ranks together, a second.
        """
        return self.tokens_per_second * flops_per_token / peak_flops


class Throughput:
    """Counts tokens and time between logs.

    Args:
        clock: Seconds that only go forward; tests give their own.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start_window()

    def add(self, tokens: int) -> None:
        """Count one finished step."""
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block out, as of an evaluation or a checkpoint."""
        began = self._clock()
        yield
        self._start += self._clock() - began

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of a block as waiting for data."""
        began = self._clock()
        yield
        self._waiting += self._clock() - began

    def lap(self) -> Window:
        """Return the window since the last lap and start a new one."""
        seconds = self._clock() - self._start
        window = Window(self._tokens, self._steps, seconds, self._waiting)
        self._start_window()
        return window

    def _start_window(self) -> None:
        self._start = self._clock()
        self._tokens = 0
        self._steps = 0
        self._waiting = 0.0
