"""The DeepSpeed engine: ZeRO 1, 2 or 3 for the dense parameters of the layers.

DeepSpeed sees these alone. Experts, and what is kept in float32 in every precision (gates and
embeddings), are hidden from it and sharded, reduced and stepped as the native engine does. So
experts are right at every stage, with their optimizer state over edp. One norm and one clip span
all parts: DeepSpeed's own clipping and loss scaling are off.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dmoe.data import MicroBatch
from dmoe.engine.base import EngineConfig, StepPosition, StepResult
from dmoe.engine.gradients import Gradients, clip_factor
from dmoe.engine.loss_scale import LossScale
from dmoe.engine.passes import Passes
from dmoe.engine.sharding import global_state, reshard, shard_experts, shard_wide, sum_gradients
from dmoe.engine.zero_config import deepspeed_settings, uses_nvme
from dmoe.engine.zero_partitions import Partitions
from dmoe.engine.zero_setup import check_precision, load_async_io, load_deepspeed, silent_start
from dmoe.models import DecoderLM, ModelConfig, Recompute, build_model, init_weights
from dmoe.models.decoder import is_expert
from dmoe.models.precision import COMPUTE_DTYPES
from dmoe.optim import OptimConfig, build_optimizer, parameter_groups
from dmoe.parallel import ParallelDims


class DeepSpeedEngine:
    """Holds the model, DeepSpeed's engine for most of it, and an optimizer for the rest."""

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
        self.config, self.dims = config, dims
        dtype = COMPUTE_DTYPES[config.precision]
        deepspeed = load_deepspeed(device)
        check_precision(config.precision)
        self.model = build_model(model, dims=dims, device="meta", compute_dtype=dtype)
        given = _parameters_for_deepspeed(self.model)
        if dims.world_size > 1:
            _shard_the_rest(self.model, given, config, dims, dtype)
        self.model.to_empty(device=device)
        init_weights(self.model, seed=seed, dims=dims)
        parameters = dict(self.model.named_parameters())
        dense = {name: parameters[name] for name in given}
        self.own = {name: p for name, p in parameters.items() if name not in dense}
        self.optimizer = build_optimizer(self.own.values(), optim)
        self.dense_optimizer = _DenseAdamW(
            parameter_groups(dense.values(), optim),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,
        )
        # DeepSpeed rounds weights to the compute dtype before it takes its float32 copy of them.
        whole = {name: p.detach().to("cpu", copy=True) for name, p in dense.items()}
        settings = deepspeed_settings(
            stage=config.zero_stage,
            precision=config.precision,
            extra=config.deepspeed,
            num_elements=sum(p.numel() for p in dense.values()),
        )
        if uses_nvme(settings):
            load_async_io()
        with _out_of_sight(self.model, self.own), silent_start():
            self.zero, *_ = deepspeed.initialize(
                model=self.model, optimizer=self.dense_optimizer, config=settings
            )
        _check_groups(self.zero, dims)
        self.partitions = Partitions(
            self.zero.optimizer,
            {name: (p, whole[name].shape) for name, p in dense.items()},
            dims,
            device,
        )
        self.partitions.fill_masters(whole, dtype)
        self.loss_scale = LossScale(enabled=config.precision == "fp16")
        self.passes = Passes(
            self.model, dims, device, recompute, forward=self.zero, backward=self._backward
        )

    def forward_backward(self, batches: Sequence[MicroBatch], position: StepPosition) -> StepResult:
        """Compute the gradients of the global batch, of which `batches` are this rank's share."""
        result = self.passes.run(batches, position)
        for parameter in self.own.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return result

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to a global norm of `max_norm` (0: do not); return the norm."""
        own = Gradients.of(self.own.items(), self.dims)
        # Stage 3 takes the mean over the ranks, whatever it is told.
        share = self.dims.world_size if self.config.zero_stage == 3 else 1
        dense_norm = self.partitions.norm() * share
        norm = math.hypot(own.global_norm(), dense_norm) / self.loss_scale.value
        factor = clip_factor(norm, max_norm) / self.loss_scale.value
        own.scale(factor)
        self.dense_optimizer.gradient_factor = factor * share
        return norm

    def step(self, lr: float, result: StepResult) -> None:
        """Update parameters, let the routers adapt, and drop the gradients."""
        for group in (*self.optimizer.param_groups, *self.dense_optimizer.param_groups):
            group["lr"] = lr
        self._step_deepspeed()
        self.optimizer.step()
        self.optimizer.zero_grad()
        result.end_step(self.model.moe_layers)
        self.loss_scale.step_taken()

    def skip(self) -> None:
        """Drop the gradients of a step that is not taken."""
        self.dense_optimizer.gradient_factor = None
        self._step_deepspeed()
        self.optimizer.zero_grad()
        self.loss_scale.step_skipped()

    def state(self) -> dict[str, Tensor]:
        """Return parameters, buffers and optimizer state under global names and shapes."""
        reshard(self.model)
        buffers = {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}
        own = global_state(self.own, self.optimizer.state, self.dims)
        return buffers | own | self.partitions.to_rows()

    def load_state(self, state: dict[str, Tensor], scalars: dict[str, float]) -> None:
        """Take back what `state` and `scalars` returned, filled with other values."""
        with _out_of_sight(self.model, self.own):
            self.partitions.from_rows(state)
        own_steps = [moments["step"] for moments in self.optimizer.state.values()]
        for step in (*own_steps, *self.partitions.steps):
            step.fill_(scalars["optimizer_steps"])
        self.loss_scale.load(scalars)

    def scalars(self) -> dict[str, float]:
        """Return the numbers that belong to the state."""
        return {"optimizer_steps": self.partitions.steps[0].item(), **self.loss_scale.state()}

    def _step_deepspeed(self) -> None:
        # At stage 3 it cuts up again whatever parameters it finds in the model.
        with _out_of_sight(self.model, self.own):
            self.zero.step()

    def _backward(self, objective: Tensor, is_last: bool) -> None:
        self.zero.set_gradient_accumulation_boundary(is_last)
        self.zero.backward(objective * self.loss_scale.value)


class _DenseAdamW(torch.optim.AdamW):
    """AdamW over what DeepSpeed gives it: reduced gradients that are still to be scaled.

    DeepSpeed calls `step` once for each part of the parameters that it has made.
    """

    gradient_factor: float | None = 1.0
    """For the gradients of this step; None to change nothing."""

    def step(self, closure: Any = None) -> Any:
        """Scale the gradients and update."""
        if self.gradient_factor is None:
            return None
        if self.gradient_factor != 1:
            parameters = [p for group in self.param_groups for p in group["params"]]
            torch._foreach_mul_(
                [p.grad for p in parameters if p.grad is not None], self.gradient_factor
            )
        return super().step(closure)


def _parameters_for_deepspeed(model: DecoderLM) -> list[str]:
    """Return the names of the dense parameters that may be cast to the compute dtype."""
    wide = model.wide_parameters
    return [
        name for name, _ in model.named_parameters() if name not in wide and not is_expert(name)
    ]


def _shard_the_rest(
    model: DecoderLM,
    given: Sequence[str],
    config: EngineConfig,
    dims: ParallelDims,
    dtype: torch.dtype,
) -> None:
    """Share out what DeepSpeed does not get, at every stage."""
    parameters = dict(model.named_parameters())
    ignored = {parameters[name] for name in given}
    ignored |= {p for name, p in parameters.items() if is_expert(name)}
    reshard_after_forward = config.zero_stage == 3
    shard_wide(model, dims, reshard_after_forward=reshard_after_forward)
    shard_experts(model, dims, dtype, reshard_after_forward=reshard_after_forward)
    fully_shard(
        model,
        mesh=dims.dense_mesh,
        mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        ignored_params=ignored,
        reshard_after_forward=False,
    )
    sum_gradients(model)


@contextmanager
def _out_of_sight(model: nn.Module, hidden: Iterable[str]) -> Iterator[None]:
    """Take the modules that hold the hidden parameters out of the model, and put them back.

    DeepSpeed hooks, casts, broadcasts and cuts up what it finds in the model.
    """
    owners = {name.rpartition(".")[0].rpartition(".") for name in hidden}
    places = [(model.get_submodule(path), child) for path, _, child in owners]
    tables = [(parent._modules, dict(parent._modules)) for parent, _ in places]
    for parent, child in places:
        del parent._modules[child]
    try:
        yield
    finally:
        for table, content in tables:
            table.clear()
            table.update(content)


def _check_groups(zero: Any, dims: ParallelDims) -> None:
    """Assert that DeepSpeed reduces over the ranks that we mean, and knows of no experts."""
    assert not zero.has_moe_layers, "DeepSpeed has found experts of its own"
    assert (zero.dp_world_size, zero.mp_world_size) == (dims.world_size, 1), (
        f"DeepSpeed means {zero.dp_world_size} data-parallel and {zero.mp_world_size} "
        f"model-parallel ranks, but dense parameters are over all {dims.world_size}"
    )
