"""What a model knows of its sparse layers: `layer(x_TD, context) -> (y_TD, MoEOutput)`.

Shapes: T tokens, D model dim, E experts.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from dmoe.moe.routing import MoEContext
from dmoe.moe.stats import MoEOutput


class SparseLayer(nn.Module):
    """A feed-forward layer of which each token uses a part."""

    router: nn.Module
    """Decides which part."""

    @property
    def wide_modules(self) -> list[nn.Module]:
        """What computes in float32 at least, whatever the precision of the model."""
        raise NotImplementedError

    def forward(self, x_TD: Tensor, context: MoEContext) -> tuple[Tensor, MoEOutput]:
        """Return y_TD, without the residual, and the layer's losses and statistics."""
        raise NotImplementedError

    def end_step(
        self, counts_E: Tensor, num_tokens: int, means: Mapping[str, Tensor] | None = None
    ) -> None:
        """Adapt to a training step, as `Router.end_step` does."""
