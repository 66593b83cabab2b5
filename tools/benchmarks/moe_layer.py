"""Time the MoE layer on a CPU against those of others and against the GEMMs none can avoid.

    pip install -e .[bench] && python tools/benchmarks/moe_layer.py [--rounds N] [--threads N]

T=2048 tokens, D=512, dropless (DeepSpeed: capacity 1.25), with router; many narrow experts (E=32,
F=128, K=4), then few wide ones (E=8, F=1024, K=2). Forward, and forward with backward, in float32
and bfloat16. All have the same weights and tokens.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import Settings, measure, parse_settings, peer_version, ratio, report
from peers import Layer, deepspeed, hugging_face, plain_loop
from torch import Tensor, nn

from dmoe.moe import BatchTotals, MoEConfig, MoEContext, MoELayer
from dmoe.ops import matmul

T, D = 2048, 512


class Sizes(NamedTuple):
    """Sizes of a layer, beside T and D."""

    num_experts: int
    ffn_dim: int
    top_k: int

    def __str__(self) -> str:
        return f"T={T}, D={D}, F={self.ffn_dim}, E={self.num_experts}, K={self.top_k}"


NARROW, WIDE = Sizes(32, 128, 4), Sizes(8, 1024, 2)
CAPACITY = 1.25
TOTALS = BatchTotals(num_tokens=T, num_targets=T, num_sequences=1, num_micro_batches=1)


def build_ours(
    dtype: torch.dtype, sizes: Sizes
) -> tuple[MoELayer, Callable[[Tensor], list[Tensor]]]:
    """Build our layer with weights of `dtype`; the router computes in float32 all the same."""
    torch.manual_seed(0)
    config = MoEConfig(
        num_experts=sizes.num_experts,
        expert_ffn_dim=sizes.ffn_dim,
        router={"name": "top_k", "top_k": sizes.top_k},
    )
    layer = MoELayer(config, dim=D)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.05)

    def forward(x_TD: Tensor) -> list[Tensor]:
        y_TD, output = layer(x_TD, MoEContext(seq_len=T, totals=TOTALS))
        return [y_TD, output.losses["load_balance"]]

    return layer.to(dtype), forward


def contenders(dtype: torch.dtype, sizes: Sizes) -> dict[str, Layer | None]:
    """Return every layer by its name; None where it is not installed."""
    source, _ = build_ours(torch.float32, sizes)
    layers: dict[str, Layer | None] = {"dmoe": build_ours(dtype, sizes)}
    if dtype != torch.float32:
        layers["dmoe, float32 masters"] = build_ours(torch.float32, sizes)
    layers["transformers, eager"] = hugging_face(source, dtype, "eager")
    layers["transformers, grouped_mm"] = hugging_face(source, dtype, "grouped_mm")
    layers[f"deepspeed, capacity {CAPACITY}"] = deepspeed(source, dtype, CAPACITY)
    layers["plain loop"] = plain_loop(source, dtype)
    return layers


def passes(layer: Layer, x_TD: Tensor, dy_TD: Tensor) -> tuple[Callable[[], None], ...]:
    """Return forward without gradients, and forward with backward."""
    module, run = layer

    def forward() -> None:
        with torch.no_grad():
            run(x_TD)

    def forward_backward() -> None:
        y_TD, *losses = run(x_TD)
        torch.autograd.backward([y_TD, *losses], [dy_TD, *(torch.ones_like(v) for v in losses)])
        x_TD.grad = None
        module.zero_grad()

    return forward, forward_backward


def bare_gemms(
    counts_E: list[int], ffn_dim: int, dtype: torch.dtype
) -> tuple[Callable[[], None], ...]:
    """Return the two products of every expert, and the six with those of the backward pass.

    By the library that is faster on this processor.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    size_h = 2 * ffn_dim
    groups = [
        (random(n, D), random(n, size_h), random(n, ffn_dim), random(size_h, D), random(D, ffn_dim))
        for n in counts_E
    ]

    def forward() -> None:
        for x, _, a, w_up, w_down in groups:
            matmul.mm(x, w_up.t())
            matmul.mm(a, w_down.t())

    def forward_backward() -> None:
        forward()
        for x, z, a, w_up, w_down in groups:
            # x stands in for dy, which has its shape.
            matmul.mm(x, w_down)
            matmul.outer(x, a)
            matmul.outer(z, x)
            matmul.mm(z, w_up)

    return forward, forward_backward


def saved_bytes(layer: Layer, x_TD: Tensor) -> tuple[int, int]:
    """Return the bytes kept for backward beside parameters: in x's dtype, and in all others."""
    module, run = layer
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, tuple[bool, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = (tensor.dtype == x_TD.dtype, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept: Any = run(x_TD)
    del kept
    wide = sum(size for same, size in sizes.values() if same)
    return wide, sum(size for _, size in sizes.values()) - wide


def timed_rows(sizes: Sizes, settings: Settings) -> list[list[str]]:
    """Time all layers in both precisions, and return the rows of the table."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x_TD = torch.randn(T, D).to(dtype).requires_grad_()
        dy_TD = torch.randn(T, D).to(dtype)
        layers = contenders(dtype, sizes)
        ours, _ = layers["dmoe"]
        counts_E = ours.router(x_TD, MoEContext(seq_len=T)).counts_E.tolist()
        runs = {name: passes(layer, x_TD, dy_TD) for name, layer in layers.items() if layer}
        runs["bare GEMMs"] = bare_gemms(counts_E, sizes.ffn_dim, dtype)
        forward, both = (
            measure({name: pair[i] for name, pair in runs.items()}, settings) for i in (0, 1)
        )
        precision = str(dtype).removeprefix("torch.")
        for name in [*layers, "bare GEMMs"]:
            row = [precision, name]
            for times in (forward, both):
                if name not in times:
                    row += ["not installed", "", ""]
                    continue
                row += [
                    f"{statistics.median(times[name]):.1f}",
                    f"{ratio(times['dmoe'], times[name]):.2f}",
                    f"{ratio(times[name], times['bare GEMMs']):.2f}",
                ]
            rows.append(row)
    return rows


def saved_rows(sizes: Sizes) -> list[list[str]]:
    """Measure what all layers keep in bfloat16, and return the rows of the table."""
    x_TD = torch.randn(T, D).bfloat16().requires_grad_()
    rows = []
    for name, layer in contenders(torch.bfloat16, sizes).items():
        if layer:
            wide, rest = saved_bytes(layer, x_TD)
            share = wide / (2 * T * D + 4 * T * sizes.top_k * sizes.ffn_dim)
            rows.append([name, f"{wide / 1e6:.2f}", f"{rest / 1e6:.2f}", f"{share:.2f}"])
    return rows


def main() -> None:
    """Measure and write the tables."""
    settings = parse_settings(__doc__)
    peers = f"{peer_version('transformers')}, {peer_version('deepspeed')}"
    columns = ["ms", "dmoe / it", "it / bare"]
    header = ["precision", "layer", *(f"f {c}" for c in columns), *(f"f+b {c}" for c in columns)]
    for title, sizes in (("MoE layer", NARROW), ("MoE layer of few wide experts", WIDE)):
        report(
            title,
            f"{sizes}; forward, then forward with backward.",
            header,
            timed_rows(sizes, settings),
            settings=settings.describe(),
            peers=peers,
        )
    report(
        "MoE layer: activations saved for backward",
        f"{NARROW}, in bfloat16; unique storages in MB, parameters excluded. The bound is "
        "2TD + 4TKF bytes, x and gate/up alone; routing is what is not in bfloat16.",
        ["layer", "in bfloat16", "other dtypes", "bfloat16 / bound"],
        saved_rows(NARROW),
        peers=peers,
    )


if __name__ == "__main__":
    main()
