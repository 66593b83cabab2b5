import pytest
import torch

from dmoe.metrics import Throughput, peak_flops


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_window_counts_training_time_alone():
    clock = Clock()
    meter = Throughput(clock)
    with meter.waiting_for_data():
        clock.now += 1
    clock.now += 3
    meter.add(400)
    with meter.paused():
        clock.now += 100
    clock.now += 4
    meter.add(400)
    window = meter.lap()
    assert (window.tokens, window.steps, window.seconds, window.waiting) == (800, 2, 8.0, 1.0)
    assert window.tokens_per_second == 100.0
    assert window.step_seconds == 4.0
    assert window.data_seconds == 0.5
    # 100 tokens a second at 6 FLOPs each, of 2400.
    assert window.mfu(6.0, 2400.0) == 0.25


def test_a_lap_starts_a_new_window():
    clock = Clock()
    meter = Throughput(clock)
    meter.add(100)
    clock.now += 1
    meter.lap()
    clock.now += 1
    meter.add(50)
    assert meter.lap().tokens_per_second == 50.0


def test_an_empty_window_has_no_speed():
    window = Throughput(Clock()).lap()
    assert (window.tokens_per_second, window.step_seconds, window.data_seconds) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_of_known_devices(name, flops):
    assert peak_flops("cuda", name, torch.bfloat16) == flops


def test_no_peak_is_claimed_for_a_cpu_or_another_dtype():
    assert peak_flops("cpu", "AMD EPYC", torch.bfloat16) is None
    assert peak_flops("cuda", "NVIDIA H200", torch.float32) is None
