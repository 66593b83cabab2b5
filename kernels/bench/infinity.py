"""Infinity-MoE over neurons, forward: the kernels beside plain torch, over the active fraction.

Shapes: T tokens, K samples, Z latent dim, F neurons, D model dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from dmoe_kernels.chosen_masks import chosen_activation
from measure import relative_error, times_ms
from torch import Tensor


class NeuronShape(NamedTuple):
    """The sizes of a layer and of its batch."""

    num_tokens: int
    dim: int
    num_neurons: int
    latent_dim: int
    samples: int


LAYER = NeuronShape(32768, 768, 3072, 64, 2)
"""Of GPT-2 small, with the samples of the paper (arXiv 2601.17680)."""
TINY = NeuronShape(9, 16, 64, 3, 2)
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass
class Neurons:
    """Random tensors that all contenders share; GELU and soft masks, as in the paper."""

    x_TD: Tensor
    z_TKZ: Tensor
    w_z_FZ: Tensor
    w_up_FD: Tensor
    w_down_DF: Tensor

    @classmethod
    def make(cls, shape: NeuronShape, device: torch.device, dtype: torch.dtype) -> "Neurons":
        """Draw a layer from a fixed seed; z and W_z are in float32."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, std: float = 1.0) -> Tensor:
            return torch.randn(size, generator=generator, device=device) * std

        tokens, dim, width, latent, samples = shape
        return cls(
            draw(tokens, dim).to(dtype),
            draw(tokens, samples, latent),
            draw(width, latent, std=latent**-0.5),
            draw(width, dim, std=dim**-0.5).to(dtype),
            draw(dim, width, std=width**-0.5).to(dtype),
        )

    def to(self, dtype: torch.dtype) -> "Neurons":
        """Return the same numbers in a dtype; z and W_z stay as they are."""
        x, up, down = (t.to(dtype) for t in (self.x_TD, self.w_up_FD, self.w_down_DF))
        return Neurons(x, self.z_TKZ, self.w_z_FZ, up, down)


def ours(layer: Neurons, num_active: int) -> Tensor:
    """Run the kernels: masks of all samples, and the activation under their mean."""
    hidden_TF = F.linear(layer.x_TD, layer.w_up_FD)
    options = {"hard": False, "scale": 1.0}
    a_TF, _ = chosen_activation(hidden_TF, layer.z_TKZ, layer.w_z_FZ, num_active, "gelu", **options)
    return F.linear(a_TF, layer.w_down_DF)


def each_sample(layer: Neurons, num_active: int) -> Tensor:
    """Run the paper's formula in torch: a mask and an output a sample, then their mean."""
    a_TF = F.gelu(F.linear(layer.x_TD, layer.w_up_FD), approximate="tanh")
    outputs = [F.linear(a_TF * mask, layer.w_down_DF) for mask in _masks(layer, num_active)]
    return torch.stack(outputs).mean(0)


def mean_mask(layer: Neurons, num_active: int) -> Tensor:
    """Run the same in torch with one product, under the mean of the masks."""
    a_TF = F.gelu(F.linear(layer.x_TD, layer.w_up_FD), approximate="tanh")
    return F.linear(a_TF * torch.stack(_masks(layer, num_active)).mean(0), layer.w_down_DF)


def _masks(layer: Neurons, num_active: int) -> list[Tensor]:
    masks = []
    for z_TZ in layer.z_TKZ.unbind(1):
        best = F.linear(z_TZ, layer.w_z_FZ).topk(num_active)
        empty_TF = z_TZ.new_zeros(len(z_TZ), len(layer.w_z_FZ))
        masks.append(empty_TF.scatter_(1, best.indices, best.values).to(layer.x_TD.dtype))
    return masks


CONTENDERS: dict[str, Callable[[Neurons, int], Tensor]] = {
    "ours": ours,
    "torch, a sample at a time": each_sample,
    "torch, mean mask": mean_mask,
}


def error(shape: NeuronShape, device: torch.device, dtype: torch.dtype) -> float:
    """Return how far our output is from the formula's in float32, relative by norm."""
    layer = Neurons.make(shape, device, dtype)
    num_active = shape.num_neurons // 4
    return relative_error(ours(layer, num_active), each_sample(layer.to(torch.float32), num_active))


def table(repeats: int) -> str:
    """Measure all contenders over the fractions and return the section of the page."""
    layer = Neurons.make(LAYER, torch.device("cuda"), torch.bfloat16)
    lines = []
    for fraction in FRACTIONS:
        n = round(fraction * LAYER.num_neurons)
        steps = {name: _step(run, layer, n) for name, run in CONTENDERS.items()}
        times = times_ms(steps, repeats)
        for name, milliseconds in times.items():
            ratio = milliseconds / times["ours"]
            lines.append(f"| {fraction:g} | {name} | {milliseconds:.2f} | {ratio:.2f} |")
            print(lines[-1], flush=True)
    tokens, dim, width, latent, samples = LAYER
    return (
        f"\n## Infinity-MoE over neurons, forward\n\n"
        f"T = {tokens}, D = {dim}, F = {width}, Z = {latent}, K = {samples} samples, soft masks, "
        f"GELU, bfloat16.\n\n"
        "| active fraction | contender | ms | of ours |\n| ---: | --- | ---: | ---: |\n"
        + "\n".join(lines)
        + "\n"
    )


def _step(
    run: Callable[[Neurons, int], Tensor], layer: Neurons, num_active: int
) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            run(layer, num_active)

    return step
