"""PEER against its equations, a token at a time, and what else every layer promises."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmoe.models import ModelConfig
from dmoe.models.counts import flops_per_token, num_active_params, params_by_kind
from dmoe.moe import BatchTotals, MoEConfig, MoEContext
from dmoe.moe.peer import PeerLayer
from dmoe.parallel import ParallelDims
from dmoe.testing import run_distributed

TOKENS, DIM, NUM, HEADS, TOP_K = 10, 6, 4, 3, 2
CONTEXT = MoEContext(seq_len=TOKENS, totals=BatchTotals(TOKENS, TOKENS, 1, 1))


def moe_config(num_experts: int = NUM**2, **options: object) -> MoEConfig:
    router = {"name": "peer", "heads": HEADS, "top_k": TOP_K, **options}
    tree = {"num_experts": num_experts, "expert_ffn_dim": 1, "router": router}
    return MoEConfig.model_validate(tree)


def build(dims: ParallelDims | None = None, **options: object) -> PeerLayer:
    layer = moe_config(**options).build(dim=DIM, activation="gelu", dims=dims).double()
    assert isinstance(layer, PeerLayer)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.router.parameters():
        parameter.data.normal_(generator=generator)
    owned = (dims or ParallelDims()).local_experts(NUM)
    for parameter in layer.experts.parameters():
        whole = torch.randn(NUM, NUM, DIM, generator=generator).double()
        parameter.data.copy_(whole[owned.start : owned.stop])
    return layer


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(TOKENS, DIM, generator=generator).double().requires_grad_()


def fresh(**changes: object) -> MoEContext:
    return dataclasses.replace(CONTEXT, replay=type(CONTEXT.replay)(), **changes)


def peer_loop(layer: PeerLayer, x_TD: Tensor) -> Tensor:
    """Define the layer: for each head the best of all n^2 sums of sub-key scores."""
    gate, config = layer.router.gate, layer.router.config
    queries_TF, rows = x_TD @ gate.query.T, []
    if config.query_norm == "batch":
        norm = gate.query_norm
        parameters = {"weight": norm.weight, "bias": norm.bias, "training": True}
        queries_TF = F.batch_norm(queries_TF, None, None, **parameters)
    for x, queries in zip(x_TD, queries_TF, strict=True):
        y = torch.zeros_like(x)
        for query in queries.view(HEADS, 2, -1):
            if config.query_norm == "rms":
                query = query / (query.square().mean(1, keepdim=True) + 1e-6).sqrt()
            first, second = gate.sub_keys[0] @ query[0], gate.sub_keys[1] @ query[1]
            scores = torch.stack([s1 + s2 for s1 in first for s2 in second])
            best = sorted(range(NUM**2), key=lambda e: (-scores[e].item(), e))[:TOP_K]
            for expert, weight in zip(best, scores[best].softmax(0), strict=True):
                i, j = divmod(expert, NUM)
                z = layer.experts.w_in_nnD[i, j] @ x
                hidden = F.relu(z) if config.activation == "relu" else F.gelu(z, approximate="tanh")
                y = y + weight * hidden * layer.experts.w_out_nnD[i, j]
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("query_norm", ["rms", "batch", "none"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("query_dim", [None, 4])
def test_equals_the_loop(query_norm: str, activation: str, query_dim: int | None) -> None:
    options = {"query_norm": query_norm, "activation": activation, "query_dim": query_dim}
    results = []
    for forward in (lambda layer, x: layer(x, fresh())[0], peer_loop):
        layer, x_TD = build(**options), tokens()
        y_TD = forward(layer, x_TD)
        y_TD.square().sum().backward()
        results.append([y_TD.detach(), x_TD.grad, *(p.grad for p in layer.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert got.any(), "everything learns"


def test_counts_are_of_first_sub_keys_and_padding_has_none() -> None:
    layer, x_TD = build(), tokens()
    valid_T = torch.arange(TOKENS) % 3 > 0
    y_TD, output = layer(x_TD, fresh(valid_T=valid_T))
    ids_TK, gates_TK, _ = layer.router(x_TD, fresh())
    assert output.stats.counts_E.tolist() == [
        int((ids_TK[valid_T] // NUM == i).sum()) for i in range(NUM)
    ]
    torch.testing.assert_close(
        gates_TK.view(TOKENS, HEADS, -1).sum(-1), torch.ones(TOKENS, HEADS).double()
    )
    assert not y_TD[~valid_T].any()
    y_TD.sum().backward()
    assert not x_TD.grad[~valid_T].any()
    for rows in (x_TD[:0], x_TD):
        none_T = torch.zeros(len(rows), dtype=torch.bool)
        y_TD, output = layer(rows, fresh(valid_T=none_T))
        assert not y_TD.any()
        assert not output.stats.counts_E.any()


def test_recompute_never_looks_up_others() -> None:
    layer, x_TD, context = build(), tokens(), fresh()
    first, again = (layer.router(x, context).ids_TK for x in (x_TD, -x_TD))
    assert torch.equal(first, again)
    gradients = []
    for again in (False, True):
        x_TD, context = tokens(), fresh()
        y_TD, _ = (
            checkpoint(layer, x_TD, context, use_reentrant=False) if again else layer(x_TD, context)
        )
        y_TD.square().sum().backward()
        gradients.append(x_TD.grad)
    assert torch.equal(*gradients)


def on_ranks(ep: int) -> dict[str, Tensor]:
    """Output and gradients of this rank's share of the tokens; the last rank has the fewest."""
    dims = ParallelDims.create(ep=ep)
    layer = build(dims)
    bounds = [0, 3, 7, 9, TOKENS] if ep == 4 else [0, 7, TOKENS]
    part = slice(bounds[dims.rank], bounds[dims.rank + 1])
    x_TD = tokens().detach()[part].requires_grad_()
    y_TD, output = layer(x_TD, fresh(valid_T=torch.arange(TOKENS)[part] != 4))
    y_TD.square().sum().backward()
    gradients = {f"experts {n}": p.grad for n, p in layer.experts.named_parameters()}
    dense = {n: p.grad for n, p in layer.router.named_parameters()}
    return {
        "y": y_TD.detach(),
        "x": x_TD.grad,
        "counts": output.stats.counts_E,
        **gradients,
        **dense,
    }


@pytest.mark.parametrize("ep", [2, 4])
def test_experts_on_several_ranks_are_those_of_one(ep: int) -> None:
    layer, x_TD = build(), tokens()
    y_TD, output = layer(x_TD, fresh(valid_T=torch.arange(TOKENS) != 4))
    y_TD.square().sum().backward()
    expected = {"y": y_TD.detach(), "x": x_TD.grad, "counts": output.stats.counts_E}
    expected |= {f"experts {n}": p.grad for n, p in layer.experts.named_parameters()}
    expected |= {n: p.grad for n, p in layer.router.named_parameters()}
    ranks = run_distributed(on_ranks, ep, ep)
    for name, want in expected.items():
        parts = [rank[name] for rank in ranks]
        joined = name in ("y", "x") or name.startswith("experts")
        got = torch.cat(parts) if joined else torch.stack(parts).sum(0)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 15}, "num_experts = 15 is no square.*take 16 or 25"),
        ({"router": {"name": "peer", "top_k": 5}}, "router.top_k = 5 is more than the 4 sub-keys"),
        ({"router": {"name": "peer", "top_k": 2, "query_dim": 3}}, "query_dim = 3 is odd"),
        ({"expert_ffn_dim": 8}, "an expert is one neuron: set it to 1"),
        ({"capacity": {"factor": 1}}, "leave capacity out"),
        ({"num_shared_experts": 1}, "leave num_shared_experts out"),
        ({"backend": "triton"}, "leave backend out"),
        ({"losses": {"z_loss_weight": 1}}, "leave losses out"),
        ({"elastic": {"k_max": 2}}, "elastic does not go with router.name = peer"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    tree = {"num_experts": 16, "expert_ffn_dim": 1, "router": {"name": "peer", "top_k": 2}}
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({**tree, **change})


def test_parameters_and_flops_by_hand() -> None:
    """Two layers of 64 x 64 neurons, of which 2 heads look up 4 each."""
    moe = {"num_experts": 4096, "expert_ffn_dim": 1}
    moe["router"] = {"name": "peer", "heads": 2, "top_k": 4, "query_dim": 8}
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 32, "moe": moe}
    config = ModelConfig.model_validate(sizes)
    counts = params_by_kind(config)
    assert counts["experts"] == 2 * 4096 * 2 * 16
    assert counts["router"] == 2 * (2 * 8) * 16
    assert counts["sub_keys"] == 2 * 2 * 64 * 4
    total = sum(counts.values())
    assert num_active_params(config) == total - 2 * (4096 - 8) * 2 * 16
    looked_up = 2 * 8 * 2 * 16
    matrices = counts["attention"] + counts["output"] + counts["router"] + 2 * counts["sub_keys"]
    attention = 4 * 2 * 2 * 8 * 10
    forward = 2 * (matrices + looked_up) + attention
    assert flops_per_token(config, 10, training=False) == forward
