"""Time what more experts cost at constant active parameters: E = 8 to 128 with K and F fixed.

    python tools/benchmarks/expert_growth.py [--rounds N] [--threads N] [--clock cpu]

The layer of `moe_layer.py` (forward with backward), and a training step of the quickstart model.
"""

import statistics

import torch
from harness import measure, parse_settings, ratio, report
from moe_layer import NARROW, D, T, build_ours, passes
from training_throughput import CONFIG, our_step, random_batch

from dmoe.config import load_config
from dmoe.trainer.config import Config

NUM_EXPERTS = (8, 16, 32, 64, 128)


def main() -> None:
    """Measure and write the table."""
    settings = parse_settings(__doc__)
    x_TD, dy_TD = torch.randn(T, D, requires_grad=True), torch.randn(T, D)
    layers, steps = {}, {}
    for num_experts in NUM_EXPERTS:
        ours = build_ours(torch.float32, NARROW._replace(num_experts=num_experts))
        _, layers[f"{num_experts}"] = passes(ours, x_TD, dy_TD)
        overrides = ["parallel.ep=1", f"model.moe.num_experts={num_experts}"]
        config = load_config(CONFIG, overrides, Config)
        steps[f"{num_experts}"] = our_step(config, random_batch(config))
    times = {"layer": measure(layers, settings), "step": measure(steps, settings)}
    first = str(NUM_EXPERTS[0])
    rows = []
    for name in layers:
        row = [name]
        for kind in ("layer", "step"):
            median = statistics.median(times[kind][name])
            row += [f"{median:.1f}", f"{ratio(times[kind][name], times[kind][first]):.2f}"]
        rows.append(row)
    report(
        "Growth of experts at constant active parameters",
        f"Layer: T={T}, D={D}, F={NARROW.ffn_dim}, K={NARROW.top_k}, float32, forward with "
        "backward. Step: a training step of configs/quickstart.yaml with that many experts.",
        ["experts", "layer ms", f"/ {first} experts", "step ms", f"/ {first} experts"],
        rows,
        settings=settings.describe(),
    )


if __name__ == "__main__":
    main()
