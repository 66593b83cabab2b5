"""Time products of float32 matrices on a CPU: by MKL, which torch takes, and by oneDNN.

    python tools/benchmarks/float32_products.py [--rounds N] [--threads N]

y = x w^T for rows x, and both gradients, at the sizes of the layer benchmark's experts and of dense
layers. `dmoe.ops.matmul` takes oneDNN on processors where it was faster here.
"""

import statistics
from collections.abc import Callable

import torch
from harness import Settings, measure, parse_settings, ratio, report

from dmoe.ops import matmul

SIZES = {
    "narrow expert, up": (256, 512, 256),
    "narrow expert, down": (256, 128, 512),
    "wide expert, up": (512, 512, 2048),
    "wide expert, down": (512, 1024, 512),
    "router": (2048, 512, 32),
    "attention": (2048, 512, 1536),
    "logits": (2048, 512, 32000),
}
"""Rows, width of a row of x, and of y."""


def by(onednn: bool, product: Callable[[], object], repeats: int) -> Callable[[], None]:
    """Return what takes a product several times in one way or the other."""

    def run() -> None:
        matmul._ONEDNN_IS_FASTER = onednn
        for _ in range(repeats):
            product()

    return run


def timed_rows(settings: Settings) -> list[list[str]]:
    """Time all sizes, and return the rows of the table."""
    rows = []
    for name, (num_rows, size_x, size_y) in SIZES.items():
        x, dy = torch.randn(num_rows, size_x), torch.randn(num_rows, size_y)
        w = torch.randn(size_y, size_x)
        gflop = 2e-9 * num_rows * size_x * size_y
        repeats = max(1, round(1 / gflop))
        row = [name, f"{num_rows} x {size_x} x {size_y}"]
        products: list[Callable[[], object]] = [
            lambda x=x, w=w: matmul.linear_forward(x, w),
            lambda dy=dy, w=w: matmul.mm(dy, w),
            lambda dy=dy, x=x: matmul.outer(dy, x),
        ]
        for product in products:
            times = measure(
                {way: by(way == "oneDNN", product, repeats) for way in ("MKL", "oneDNN")}, settings
            )
            row += [f"{1e3 * gflop * repeats / statistics.median(times[way]):.0f}" for way in times]
            row.append(f"{ratio(times['oneDNN'], times['MKL']):.2f}")
        rows.append(row)
    return rows


def main() -> None:
    """Measure and write the table."""
    settings = parse_settings(__doc__)
    report(
        "Products in float32",
        "y = x w^T, the gradient of x, and that of w: GFLOP/s by MKL and by oneDNN, and the time "
        "by oneDNN over that by MKL.",
        [
            "product",
            "sizes",
            *(f"{of} {c}" for of in ("y", "dx", "dw") for c in ("MKL", "oneDNN", "time")),
        ],
        timed_rows(settings),
        settings=settings.describe(),
    )


if __name__ == "__main__":
    main()
