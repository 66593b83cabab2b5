"""How alike the experts of a layer are: the cosine between what they make of the same token.

Called by `dmoe eval --similarity`. Shapes: T tokens, D model dim, E experts, L MoE layers.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from dmoe.config.base import ConfigError
from dmoe.data import MicroBatch
from dmoe.evaluation.perplexity import inputs_of
from dmoe.models import DecoderLM, ModelConfig
from dmoe.moe import MoEContext, MoELayer
from dmoe.moe.routing import make_routing


@torch.no_grad()
def expert_similarity(
    model: DecoderLM, batches: Iterable[MicroBatch], *, max_tokens: int = 1024
) -> tuple[float, ...]:
    """Return the similarity of the experts of each MoE layer, (L,) numbers from -1 to 1.

    Every routed expert of a layer, chosen or not, is run on the layer's input, without a gate. The
    similarity of a token is the mean of the cosine of the angle between two experts' outputs over
    all pairs of different experts (the mean of the cosine matrix off its diagonal); an output of
    zero counts as 0. It is averaged over tokens. 1 says that all experts do the same, 0 that their
    outputs are orthogonal.

    Args:
        model: a decoder with experts; its inputs to later layers follow from the k it is set to.
        batches: what it reads, until there are `max_tokens`.
        max_tokens: of all batches, without padding, the first so many.

    Raises:
        ConfigError: the model is dense, or its layers have no two experts.
        ValueError: the batches hold no token.
    """
    check_two_experts(model.config)
    layers = [layer for layer in model.moe_layers if isinstance(layer, MoELayer)]
    sums_L = torch.zeros(len(layers), dtype=torch.float64)
    num_tokens = 0
    for batch in batches:
        inputs = _layer_inputs(model, batch)
        for index, (layer, x_TD) in enumerate(zip(layers, inputs, strict=True)):
            sums_L[index] += mean_cosine(layer, x_TD[: max_tokens - num_tokens]).sum().cpu()
        num_tokens += min(len(inputs[0]), max_tokens - num_tokens)
        if num_tokens == max_tokens:
            break
    if not num_tokens:
        raise ValueError("the batches hold no token")
    return tuple((sums_L / num_tokens).tolist())


def check_two_experts(config: ModelConfig) -> None:
    """Check that there are experts to compare.

    Raises:
        ConfigError: the model is dense, or its layers have no two experts.
    """
    moe = config.moe
    if moe is None or moe.expert_layer or not moe.is_grouped or moe.num_shards < 2:
        raise ConfigError(
            "the similarity of experts takes two of them, but the model is dense, has "
            "model.moe.num_experts = 1, or has single neurons or whole layers for experts"
        )


def mean_cosine(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Return (T,) float64 mean cosine between the outputs of any two experts for a token.

    The sum over pairs of unit vectors u_e is |sum_e u_e|^2 - sum_e |u_e|^2, so that no more than
    one expert's output is held at a time.
    """
    num_experts = layer.config.num_networks
    sum_TD = torch.zeros_like(x_TD, dtype=torch.float64)
    squares_T = sum_TD.new_zeros(len(x_TD))
    for expert in range(num_experts):
        y_TD = expert_output(layer, x_TD, expert).double()
        unit_TD = y_TD / y_TD.norm(dim=1, keepdim=True).clamp(min=1e-300)
        sum_TD += unit_TD
        squares_T += unit_TD.square().sum(1)
    return (sum_TD.square().sum(1) - squares_T) / (num_experts * (num_experts - 1))


def expert_output(layer: MoELayer, x_TD: Tensor, expert: int) -> Tensor:
    """Return the (T, D) output of one expert for every token, without a gate."""
    ids_T1 = torch.full((len(x_TD), 1), expert, device=x_TD.device)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    nothing_TE = x_TD.new_zeros(len(x_TD), layer.config.num_networks, dtype=wide)
    ones_T1 = x_TD.new_ones(len(x_TD), 1, dtype=wide)
    routing = make_routing(nothing_TE, nothing_TE, ids_T1, ones_T1)
    rows, counts_e, handle = layer.dispatcher.dispatch(x_TD, routing)
    return layer.dispatcher.combine(layer.experts(rows, counts_e), handle)


def _layer_inputs(model: DecoderLM, batch: MicroBatch) -> list[Tensor]:
    """Return what each MoE layer reads, without padding, (T, D) each."""
    inputs: list[Tensor] = []

    def keep(_module: object, arguments: tuple[Any, ...]) -> None:
        x_TD: Tensor = arguments[0]
        context: MoEContext = arguments[1]
        inputs.append(x_TD if context.valid_T is None else x_TD[context.valid_T])

    with ExitStack() as stack:
        for layer in model.moe_layers:
            stack.callback(layer.register_forward_pre_hook(keep).remove)
        model(inputs_of(batch.to(model.embed.weight.device)))
    return inputs
