"""Time layers with a continuous space of experts: all samples at once, and blocks of neurons.

    python tools/benchmarks/infinite_layer.py [--rounds N] [--threads N] [--clock cpu]

T=1024 tokens through a layer of configs/infinite_gpt2_small.yaml: D=768, F=6144, d_z=52, plain GELU
networks, float32. All samples at once are timed against a network for each; `block` against
`neuron` and against top-k MoE at equal active parameters; both against the active fraction.
"""

import statistics
from collections.abc import Callable

import torch
from harness import Settings, measure, parse_settings, ratio, report
from torch import Tensor, nn

from dmoe.moe import BatchTotals, MoEConfig, MoEContext, SparseLayer
from dmoe.moe.infinite import NeuronLayer
from dmoe.moe.infinite.latent import Noise
from dmoe.ops.activation import activate

T, D, Z = 1024, 768, 52
WIDTH, BLOCK = 6144, 128
"""Neurons of a space, and of a block."""
SAMPLES = (1, 2, 4, 8)
FRACTIONS = (0.0625, 0.125, 0.25, 0.5, 1.0)
Passes = tuple[Callable[[], None], Callable[[], None]]
"""Forward without gradients, and forward with backward."""


def new_context() -> MoEContext:
    """Return the context of a new micro-batch, for which nothing is decided."""
    totals = BatchTotals(T, T, num_sequences=1, num_micro_batches=1)
    return MoEContext(seq_len=T, token_ids_T=torch.arange(T), totals=totals)


def build(section: dict[str, object]) -> SparseLayer:
    """Build a layer of plain GELU networks with weights of a usual size."""
    torch.manual_seed(0)
    layer = MoEConfig.model_validate(section).build(dim=D, activation="gelu")
    for name, parameter in layer.named_parameters():
        if any(part in name for part in ("neurons.", "experts.", "router.gate.weight")):
            nn.init.normal_(parameter, std=0.02)
    return layer


def build_infinite(granularity: str, *, samples: int = 2, fraction: float = 0.25) -> SparseLayer:
    """Build a layer over neurons, or blocks of them."""
    section = {
        "granularity": granularity,
        "ffn_dim": WIDTH,
        "latent_dim": Z,
        "samples": samples,
        "active_fraction": fraction,
    }
    if granularity == "block":
        section["block_size"] = BLOCK
    return build({"infinite": section})


def build_top_k(k: int) -> SparseLayer:
    """Build a layer of as many experts as there are blocks."""
    router = {"name": "top_k", "top_k": k}
    return build({"num_experts": WIDTH // BLOCK, "expert_ffn_dim": BLOCK, "router": router})


def passes(run: Callable[[Tensor], list[Tensor]], parameters: list[nn.Parameter]) -> Passes:
    """Return forward without gradients, and forward with backward."""
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dy_TD = torch.randn(T, D)

    def forward() -> None:
        with torch.no_grad():
            run(x_TD)

    def forward_backward() -> None:
        y_TD, *losses = run(x_TD)
        torch.autograd.backward([y_TD, *losses], [dy_TD, *(torch.ones_like(v) for v in losses)])
        x_TD.grad = None
        for parameter in parameters:
            parameter.grad = None

    return forward, forward_backward


def whole_layer(layer: SparseLayer) -> Passes:
    """Return the passes of a layer with its router, each micro-batch a new one."""

    def run(x_TD: Tensor) -> list[Tensor]:
        y_TD, output = layer(x_TD, new_context())
        return [y_TD, *output.losses.values()]

    return passes(run, list(layer.parameters()))


def networks(layer: NeuronLayer) -> dict[str, Passes]:
    """Return the passes of the masked network alone: samples are drawn and masks are chosen before.

    "each" is the estimator as it is written, a whole network for each sample. "shared" computes
    W_up x and its activation once, and a mask and a W_down product for each sample. "collapsed" is
    the layer.
    """
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z_TKZ = layer.router(x_TD, Noise(new_context()), layer.config.samples).z_TKZ
    z_TKZ.requires_grad_()
    context, neurons = new_context(), layer.neurons

    def act(x_TD: Tensor) -> Tensor:
        return activate(neurons.up_proj(x_TD), layer.activation)

    def each(x_TD: Tensor) -> list[Tensor]:
        return mean([act(x_TD) * layer.space.mask(z_TKZ, k, context) for k in samples])

    def shared(x_TD: Tensor) -> list[Tensor]:
        act_TF = act(x_TD)
        return mean([act_TF * layer.space.mask(z_TKZ, k, context) for k in samples])

    def mean(masked: list[Tensor]) -> list[Tensor]:
        outputs = [neurons.down_proj(a_TF) for a_TF in masked]
        return [layer.space.gain * torch.stack(outputs).mean(0)]

    def collapsed(x_TD: Tensor) -> list[Tensor]:
        a_TF, _ = layer.space(neurons.up_proj(x_TD), z_TKZ, layer.activation, context)
        return [neurons.down_proj(a_TF)]

    samples, parameters = range(z_TKZ.shape[1]), list(layer.parameters())
    runs = {"each": each, "shared": shared, "collapsed": collapsed}
    return {name: passes(run, parameters) for name, run in runs.items()}


def time_both(
    contenders: dict[str, Passes], settings: Settings
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the milliseconds of forward, and of forward with backward."""
    forward, both = (
        measure({name: pair[i] for name, pair in contenders.items()}, settings) for i in (0, 1)
    )
    return forward, both


def time_samples(settings: Settings) -> None:
    """Time all samples at once against a network for each."""
    rows = []
    for samples in SAMPLES:
        layer = build_infinite("neuron", samples=samples)
        assert isinstance(layer, NeuronLayer)
        for name, times in zip(("f", "f+b"), time_both(networks(layer), settings), strict=True):
            medians = [f"{statistics.median(own):.0f}" for own in times.values()]
            gains = [f"{ratio(times[loop], times['collapsed']):.2f}" for loop in ("each", "shared")]
            rows.append([f"{samples}", name, *medians, *gains, f"{(1 + samples) / 2:.1f}"])
    report(
        "Infinite experts: all samples at once",
        f"T={T}, D={D}, F={WIDTH}, d_z={Z}, a quarter active: the masked network of K samples, "
        "their masks chosen. Collapsed: one pair of products under the mean mask. Each: a whole "
        "network for each sample. Shared: W_up x and its activation once, a mask and a W_down "
        "product for each sample; by large products alone it would take (1 + K) / 2 times as long.",
        [
            "K",
            "pass",
            "each, ms",
            "shared, ms",
            "collapsed, ms",
            "each / collapsed",
            "shared / collapsed",
            "(1 + K) / 2",
        ],
        rows,
        settings=settings.describe(),
    )


def blocks_used(layer: SparseLayer) -> float:
    """Return how many blocks a token uses on average."""
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, output = layer(x_TD, new_context())
    return float(output.stats.counts_E.sum()) / T


def time_granularities(settings: Settings) -> None:
    """Time whole layers: blocks, neurons, and top-k MoE with the same active parameters."""
    block = build_infinite("block")
    used = blocks_used(block)
    k = round(used)
    names = {"top-k": f"top-{k} of {WIDTH // BLOCK}", "block": "block", "neuron": "neuron"}
    layers = {
        "top-k": whole_layer(build_top_k(k)),
        "block": whole_layer(block),
        "neuron": whole_layer(build_infinite("neuron")),
    }
    times = time_both(layers, settings)
    rows = []
    for name in layers:
        row = [names[name]]
        for part in times:
            row.append(f"{statistics.median(part[name]):.1f}")
            row.append(f"{ratio(part[name], part['top-k']):.2f}")
        rows.append(row)
    report(
        "Infinite experts: granularities and top-k",
        f"T={T}, D={D}, F={WIDTH}, d_z={Z}, K=2, a quarter active; whole layers with their "
        f"routers. Blocks have {BLOCK} neurons, as the experts have; a token uses {used:.2f} of "
        f"them on average, as two samples share some, and {k} experts.",
        ["layer", "f ms", "f it / top-k", "f+b ms", "f+b it / top-k"],
        rows,
        settings=settings.describe(),
    )


def time_fractions(settings: Settings) -> None:
    """Time the forward pass of both granularities against the active fraction."""
    runs: dict[str, Callable[[], object]] = {}
    for granularity in ("neuron", "block"):
        for fraction in FRACTIONS:
            layer = build_infinite(granularity, fraction=fraction)
            runs[f"{granularity} {fraction}"], _ = whole_layer(layer)
    times = measure(runs, settings)
    rows = []
    for fraction in FRACTIONS:
        row = [f"{fraction:.2%}"]
        for granularity in ("neuron", "block"):
            own = times[f"{granularity} {fraction}"]
            row.append(f"{statistics.median(own):.1f}")
            row.append(f"{ratio(own, times[f'{granularity} 1.0']):.2f}")
        rows.append(row)
    report(
        "Infinite experts: latency against the active fraction",
        f"T={T}, D={D}, F={WIDTH}, d_z={Z}, K=2; forward passes of whole layers.",
        ["active", "neuron, ms", "over all", "block, ms", "over all"],
        rows,
        settings=settings.describe(),
    )


def main() -> None:
    """Measure and write the tables."""
    settings = parse_settings(__doc__)
    time_samples(settings)
    time_granularities(settings)
    time_fractions(settings)


if __name__ == "__main__":
    main()
