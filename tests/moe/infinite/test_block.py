"""Blocks are experts of the ordinary layer, and a neuron model whose rows of W_z repeat."""

import pytest
import torch
from small_space import (
    BLOCK,
    DIM,
    TOKENS,
    VALID_T,
    WIDTH,
    build,
    build_block,
    context,
    gradients,
    tokens,
)

from dmoe.moe.infinite.convert import block_to_neuron

BLOCKS = WIDTH // BLOCK


def as_neurons(layer, activation: str, **options):
    """The neuron layer with the weights of a layer of blocks."""
    twin = build(activation, active_fraction=0.5, **options)
    state = {f"moe.{name}": tensor for name, tensor in layer.state_dict().items()}
    converted = block_to_neuron(state, block_size=BLOCK, gated=activation == "swiglu")
    twin.load_state_dict({name.removeprefix("moe."): value for name, value in converted.items()})
    return twin


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("mask", ["soft", "hard"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_equals_the_neuron_layer_whose_directions_repeat(activation, mask, samples) -> None:
    options = {"mask": mask, "samples": samples}
    layer = build_block(activation, **options)
    twin = as_neurons(layer, activation, **options)
    x_TD = tokens()
    for place in (context, lambda: context(training=False, samples=5)):
        y_TD, _ = layer(x_TD, place())
        y_twin, _ = twin(x_TD, place())
        torch.testing.assert_close(y_TD, y_twin, rtol=1e-12, atol=1e-12)
    block, neuron = (
        dict(zip(names, gradients(y, [x_TD, *of.parameters()]), strict=True))
        for y, of, names in (
            (y_TD, layer, ["x", *dict(layer.named_parameters())]),
            (y_twin, twin, ["x", *dict(twin.named_parameters())]),
        )
    )
    torch.testing.assert_close(block["x"], neuron["x"], rtol=1e-10, atol=1e-10)
    # A row of the blocks' W_z stands for all the rows that repeat it.
    repeated_FZ = neuron["space.w_z_FZ"].view(BLOCKS, BLOCK, -1).sum(1)
    torch.testing.assert_close(block["router.gate.w_z_FZ"], repeated_FZ, rtol=1e-10, atol=1e-10)
    for name in ("mean.weight", "log_variance.weight", "log_variance.bias"):
        want = neuron[f"router.{name}"]
        torch.testing.assert_close(
            block[f"router.gate.latent.{name}"], want, rtol=1e-10, atol=1e-10
        )
        assert want.any()
    down_DF = block["experts.w_down_EDF"].transpose(0, 1).flatten(1)
    torch.testing.assert_close(down_DF, neuron["neurons.down_proj.weight"])


def test_a_token_goes_to_the_blocks_of_all_its_samples() -> None:
    layer, x_TD = build_block(samples=2, active_fraction=0.25), tokens()
    routing = layer.router(x_TD, context())
    scores_TSE, _, _ = layer.router.gate(x_TD, context())
    assert routing.expert_ids_TK.shape == (TOKENS, 2)
    for t in range(TOKENS):
        best = [scores.argmax().item() for scores in scores_TSE[t]]
        used = [i for i in routing.expert_ids_TK[t].tolist() if i >= 0]
        assert used == (sorted(set(best)) if VALID_T[t] else [])
        for slot, block in enumerate(used):
            chosen = [s[block] for s, b in zip(scores_TSE[t], best, strict=True) if b == block]
            gate = layer.router.gain * sum(chosen) / 2
            torch.testing.assert_close(routing.weights_TK[t, slot], gate)
    both = sum(len(set(row)) == 1 for row in routing.expert_ids_TK[VALID_T].clamp(min=0).tolist())
    assert routing.counts_E.sum() < 20, "some token's samples share a block"
    assert both < 10


def test_capacity_and_balance_are_those_of_experts() -> None:
    layer = build_block(
        moe={"capacity": {"factor": 0.5, "minimum": 0}, "losses": {"load_balance_weight": 0.1}}
    )
    x_TD = tokens()
    _, output = layer(x_TD, context())
    assert output.stats.dropped > 0
    [loss] = torch.autograd.grad(output.losses["load_balance"], [layer.router.gate.w_z_FZ])
    assert loss.any()


def test_there_are_no_losses_unless_asked_for() -> None:
    _, output = build_block()(tokens(), context())
    assert output.losses == {}


def test_padding_and_no_tokens() -> None:
    layer, x_TD = build_block(), tokens()
    y_TD, _ = layer(x_TD, context())
    assert not y_TD[~VALID_T].any()
    nothing, _ = layer(x_TD[:0], context(valid_T=None, token_ids_T=torch.arange(0)))
    nothing.sum().backward()
    assert nothing.shape == (0, DIM)
