"""The native engine: FSDP2 for dense parameters; experts over ep, and over edp when sharding."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dmoe.data import MicroBatch
from dmoe.engine.base import EngineConfig, StepPosition, StepResult
from dmoe.engine.gradients import Gradients, all_reduce_coalesced, clip_factor
from dmoe.engine.loss_scale import LossScale
from dmoe.engine.passes import Passes
from dmoe.engine.sharding import (
    casting_policy,
    global_state,
    reshard,
    shard_experts,
    shard_wide,
    sum_gradients,
)
from dmoe.models import DecoderLM, ModelConfig, Recompute, build_model, init_weights
from dmoe.models.decoder import is_expert
from dmoe.models.precision import COMPUTE_DTYPES
from dmoe.optim import OptimConfig, build_optimizer
from dmoe.parallel import ParallelDims


class NativeEngine:
    """Holds the model and the optimizer of this rank."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        model: ModelConfig,
        optim: OptimConfig,
        dims: ParallelDims,
        device: torch.device,
        seed: int,
        recompute: Recompute = "none",
    ):
        self.config, self.dims, self.device, self.recompute = config, dims, device, recompute
        dtype = COMPUTE_DTYPES[config.precision]
        self.model = build_model(model, dims=dims, device="meta", compute_dtype=dtype)
        if config.compile:
            _compile_static_parts(self.model)
        if config.zero_stage and dims.world_size > 1:
            _shard(self.model, config, dims, dtype)
        self.model.to_empty(device=device)
        init_weights(self.model, seed=seed, dims=dims)
        self.optimizer = build_optimizer(self.model.parameters(), optim)
        self.loss_scale = LossScale(enabled=config.precision == "fp16")
        self.passes = Passes(
            self.model, dims, device, recompute, forward=self.model, backward=self._backward
        )

    def forward_backward(self, batches: Sequence[MicroBatch], position: StepPosition) -> StepResult:
        """Compute the gradients of the global batch, of which `batches` are this rank's share."""
        result = self.passes.run(batches, position)
        self._reduce_gradients()
        return result

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to a global norm of `max_norm` (0: do not); return the norm."""
        gradients = Gradients.of(self.model.named_parameters(), self.dims)
        norm = gradients.global_norm() / self.loss_scale.value
        gradients.scale(clip_factor(norm, max_norm) / self.loss_scale.value)
        return norm

    def step(self, lr: float, result: StepResult) -> None:
        """Update parameters, let the routers adapt, and drop the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        result.end_step(self.model.moe_layers)
        self.loss_scale.step_taken()

    def skip(self) -> None:
        """Drop the gradients of a step that is not taken."""
        self.optimizer.zero_grad()
        self.loss_scale.step_skipped()

    def state(self) -> dict[str, Tensor]:
        """Return parameters, buffers and optimizer state under global names and shapes."""
        reshard(self.model)
        buffers = {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}
        parameters = dict(self.model.named_parameters())
        return buffers | global_state(parameters, self.optimizer.state, self.dims)

    def scalars(self) -> dict[str, float]:
        """Return the numbers that belong to the state."""
        moments = next(iter(self.optimizer.state.values()))
        return {"optimizer_steps": moments["step"].item(), **self.loss_scale.state()}

    def load_state(self, state: dict[str, Tensor], scalars: dict[str, float]) -> None:
        """Take back what `state` and `scalars` returned, filled with other values."""
        for moments in self.optimizer.state.values():
            moments["step"].fill_(scalars["optimizer_steps"])
        self.loss_scale.load(scalars)

    def _backward(self, objective: Tensor, is_last: bool) -> None:
        (objective * self.loss_scale.value).backward()

    def _reduce_gradients(self) -> None:
        """Sum the gradients that FSDP has not: those of parameters it does not shard."""
        dense: list[Tensor] = []
        experts: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if not isinstance(parameter, DTensor):
                (experts if is_expert(name) else dense).append(parameter.grad)
        all_reduce_coalesced(dense, self.dims.world_group)
        all_reduce_coalesced(experts, self.dims.edp_group)


def _shard(model: DecoderLM, config: EngineConfig, dims: ParallelDims, dtype: torch.dtype) -> None:
    """Shard dense parameters over all ranks and experts over the ranks that hold the same ones."""
    policy = casting_policy(dtype)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    ignored = {p for name, p in model.named_parameters() if is_expert(name)}
    shard = partial(fully_shard, reshard_after_forward=config.zero_stage == 3)

    shard_wide(model, dims, reshard_after_forward=config.zero_stage == 3)
    shard_experts(model, dims, dtype, reshard_after_forward=config.zero_stage == 3)
    for block in model.blocks:
        shard(block, mesh=dims.dense_mesh, mp_policy=policy, ignored_params=ignored)
    # The rest is used at both ends of the pass, so it stays gathered; and in float32, in which the
    # gradients of a frequent token's embedding add up (in bfloat16 they soon cease to).
    fully_shard(
        model,
        mesh=dims.dense_mesh,
        mp_policy=exact,
        ignored_params=ignored,
        reshard_after_forward=False,
    )
    sum_gradients(model)


def _compile_static_parts(model: DecoderLM) -> None:
    """Compile what has fixed shapes; the MoE layer's sizes depend on the data."""
    for block in model.blocks:
        for part in (block.attn_norm, block.attn, block.ffn_norm, block.ffn):
            if part is not None:
                part.compile()
