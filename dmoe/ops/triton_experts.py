"""The Triton back end of `expert_ffn`: the door to `dmoe_kernels`, opened when it is needed.

Shapes: N sources, R routed rows, E experts, D model dim, F expert dim, H = 2F if gated, else F.
"""

from torch import Tensor

from dmoe.ops.activation import Activation
from dmoe.ops.rows import RowMap


def forward_by_triton(
    x_ND: Tensor,
    rows: RowMap,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up: Tensor,
    w_down_EDF: Tensor,
    activation: Activation,
    *,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    """Return z_RH and y_ND; the arguments are those of `expert_ffn`, `fp8` its dtype."""
    from dmoe_kernels.experts import experts_forward

    y_ND, z_RH = experts_forward(
        x_ND.contiguous(),
        rows.contiguous(),
        weights_R.contiguous(),
        counts_E.contiguous(),
        *_in_dtype_of(x_ND, w_up, w_down_EDF),
        activation,
        fp8=fp8,
    )
    return z_RH, y_ND


def backward_by_triton(
    dy_ND: Tensor,
    x_ND: Tensor,
    rows: RowMap,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up: Tensor,
    w_down_EDF: Tensor,
    z_RH: Tensor | None,
    activation: Activation,
    main_grads: tuple[Tensor, Tensor] | None,
    *,
    fp8: bool,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x_ND, weights_R, w_up and w_down_EDF, each in its dtype.

    Args:
        dy_ND: gradient of the output, contiguous.
        x_ND: as in the forward pass, as are the others not named here.
        rows: as in the forward pass.
        weights_R: as in the forward pass.
        counts_E: as in the forward pass.
        w_up: as in the forward pass.
        w_down_EDF: as in the forward pass.
        z_RH: what the forward pass returned; None to compute it again.
        activation: as in the forward pass.
        main_grads: what the gradients of the weights are added to and returned as, or None.
        fp8: as in the forward pass.
        trained: whether the weights get gradients; else these are None.
    """
    from dmoe_kernels.experts import experts_backward

    return experts_backward(
        dy_ND,
        x_ND.contiguous(),
        z_RH,
        rows.contiguous(),
        weights_R.contiguous(),
        counts_E.contiguous(),
        *_in_dtype_of(x_ND, w_up, w_down_EDF),
        activation,
        w_up.dtype,
        accumulate=main_grads,
        fp8=fp8,
        trained=trained,
    )


def _in_dtype_of(x_ND: Tensor, *weights: Tensor) -> list[Tensor]:
    return [w.to(x_ND.dtype).contiguous() for w in weights]
