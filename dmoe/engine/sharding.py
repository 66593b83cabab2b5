"""How experts are sharded by FSDP2, and how a shard tells its place in the global tensor."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from dmoe.models import DecoderLM
from dmoe.models.decoder import is_expert
from dmoe.parallel import ParallelDims
from dmoe.parallel.placement import expert_shard_dim


def casting_policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Gather weights in the compute dtype, and sum gradients in float32 at least."""
    return MixedPrecisionPolicy(
        param_dtype=dtype if dtype.itemsize < 4 else None,
        reduce_dtype=torch.promote_types(dtype, torch.float32),
        # Gates are float32 in a bfloat16 model and must stay so.
        cast_forward_inputs=False,
    )


def shard_wide(model: DecoderLM, dims: ParallelDims, *, reshard_after_forward: bool) -> None:
    """Share out what computes in float32, so that its weights are not gathered in bfloat16."""
    for layer in model.moe_layers:
        for module in layer.wide_modules:
            fully_shard(
                module,
                mesh=dims.dense_mesh,
                mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
                reshard_after_forward=reshard_after_forward,
            )


def shard_experts(
    model: DecoderLM, dims: ParallelDims, dtype: torch.dtype, *, reshard_after_forward: bool
) -> None:
    """Share out the routed experts over the ranks that hold the same ones, where there are such."""
    if dims.edp == 1:
        return
    assert dims.expert_mesh is not None
    for layer in model.moe_layers:
        experts = getattr(layer, "experts", None)
        if experts is not None:
            fully_shard(
                experts,
                mesh=dims.expert_mesh["edp"],
                mp_policy=casting_policy(dtype),
                reshard_after_forward=reshard_after_forward,
                shard_placement_fn=lambda p: Shard(expert_shard_dim(p.shape, dims.edp)),
            )


def sum_gradients(model: nn.Module) -> None:
    """Let FSDP sum gradients over ranks; it would take their mean."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Put shards back in place of what FSDP has gathered.

    Without resharding after forward, a pass without gradients leaves whole parameters in place.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def global_state(
    parameters: Mapping[str, Tensor],
    moments: Mapping[Tensor, Mapping[str, Tensor]],
    dims: ParallelDims,
) -> dict[str, Tensor]:
    """Return parameters and their AdamW moments under global names, as live global views."""
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state[f"model.{name}"] = global_view(name, parameter.detach(), dims)
        for key in ("exp_avg", "exp_avg_sq"):
            moment = moments[parameter][key]
            state[f"optimizer.{key}.{name}"] = global_view(name, moment, dims)
    return state


def global_view(name: str, tensor: Tensor, dims: ParallelDims) -> Tensor:
    """Return a view of `tensor` that knows its place in the global tensor of that name."""
    if dims.expert_mesh is None or not is_expert(name):
        return tensor
    local: Tensor = tensor
    over_edp: Placement = Replicate()
    if isinstance(tensor, DTensor):
        local, [over_edp] = tensor.to_local(), tensor.placements
    shape = torch.Size((tensor.shape[0] * dims.ep, *tensor.shape[1:]))
    return DTensor.from_local(
        local,
        dims.expert_mesh,
        [Shard(0), over_edp],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
