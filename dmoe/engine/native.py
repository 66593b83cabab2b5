"""The native engine: FSDP2 for the dense parameters, experts over ep, and over edp when sharding.

Losses are divided by the sizes of the global batch before the backward pass, so gradients are plain
sums over micro-batches and ranks: dense ones over all ranks, an expert's over the ranks that hold
it (the all-to-all has already brought it the gradients of its tokens).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from dmoe.data import MicroBatch
from dmoe.engine.base import EngineConfig, StepPosition, StepResult
from dmoe.engine.gradients import Gradients, all_reduce_coalesced
from dmoe.engine.loss_scale import LossScale
from dmoe.engine.tally import Tally
from dmoe.models import DecoderLM, ModelConfig, ModelInputs, Recompute, build_model, init_weights
from dmoe.models.decoder import is_expert, lm_loss, valid_tokens
from dmoe.models.precision import COMPUTE_DTYPES
from dmoe.moe import BatchTotals, MoEContext
from dmoe.optim import OptimConfig, build_optimizer
from dmoe.parallel import ParallelDims, all_reduce_sum
from dmoe.parallel.placement import expert_shard_dim


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
        self.optimizer = build_optimizer(self.model, optim)
        self.loss_scale = LossScale(enabled=config.precision == "fp16")
        self.aux_weights = model.moe.losses.weights() if model.moe else {}

    def forward_backward(self, batches: Sequence[MicroBatch], position: StepPosition) -> StepResult:
        """Compute the gradients of the global batch, of which `batches` are this rank's share."""
        totals = self._totals(batches, position)
        batches = [batch.to(self.device) for batch in batches]
        counts_LE = self._count_beforehand(batches, position)
        tally = Tally(self.model.config)
        for batch in batches:
            context = _context(batch, position, totals, counts_LE)
            output = self.model(_inputs(batch), context, recompute=self.recompute)
            loss = lm_loss(output.logits, batch.labels_BS) / totals.num_targets
            objective = loss
            for layer in output.moe:
                for name, weight in self.aux_weights.items():
                    objective = objective + weight * layer.losses[name]
            (objective * self.loss_scale.value).backward()
            tally.add(loss, output.moe)
        self._reduce_gradients()
        return tally.result(self.dims.world_group, totals)

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to a global norm of `max_norm` (0: do not); return the norm."""
        gradients = Gradients.of(self.model, self.dims)
        norm = gradients.global_norm() / self.loss_scale.value
        factor = 1 / self.loss_scale.value
        if max_norm and norm > max_norm:
            factor *= max_norm / norm
        if factor != 1:
            gradients.scale(factor)
        return norm

    def step(self, lr: float, counts_LE: Tensor) -> None:
        """Update parameters and selection biases, and drop the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        for layer, counts_E in zip(self.model.moe_layers, counts_LE, strict=True):
            layer.end_step(counts_E)
        self.loss_scale.step_taken()

    def skip(self) -> None:
        """Drop the gradients of a step that is not taken."""
        self.optimizer.zero_grad()
        self.loss_scale.step_skipped()

    def state(self) -> dict[str, Tensor]:
        """Return parameters, buffers and optimizer state under global names and shapes."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # At stage 2 a forward pass without gradients leaves whole parameters in place.
                module.reshard()
        state = {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            state[f"model.{name}"] = self._global(name, parameter.detach())
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"optimizer.{key}.{name}"] = self._global(name, moments[key])
        return state

    def scalars(self) -> dict[str, float]:
        """Return the numbers that belong to the state."""
        moments = next(iter(self.optimizer.state.values()))
        return {"optimizer_steps": moments["step"].item(), **self.loss_scale.state()}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """Take back what `scalars` returned; call after `state` has been filled."""
        for moments in self.optimizer.state.values():
            moments["step"].fill_(scalars["optimizer_steps"])
        self.loss_scale.load(scalars)

    def _totals(self, batches: Sequence[MicroBatch], position: StepPosition) -> BatchTotals:
        sizes = torch.tensor(
            [
                sum(int(batch.valid_BS.sum()) for batch in batches),
                sum(batch.num_targets for batch in batches),
            ]
        )
        num_tokens, num_targets = all_reduce_sum(sizes, self.dims.world_group).tolist()
        # A batch of nothing but padding has a loss of zero, not of 0 / 0.
        return BatchTotals(
            max(1, num_tokens),
            max(1, num_targets),
            position.num_sequences,
            position.num_micro_batches,
        )

    @torch.no_grad()
    def _count_beforehand(
        self, batches: Sequence[MicroBatch], position: StepPosition
    ) -> Tensor | None:
        """Return (L, E) slots per expert over the global batch, if no single pass can know them.

        The global balance loss of one micro-batch depends on the choices in all the others. With
        one micro-batch a rank an all-reduce in the layer tells; with more, a pass without
        gradients counts first, so that accumulation does not change the loss.
        """
        moe = self.model.config.moe
        if moe is None or not moe.losses.needs_global_counts or len(batches) == 1:
            return None
        counts_LE = torch.zeros(
            len(self.model.moe_layers), moe.num_experts, dtype=torch.int64, device=self.device
        )
        totals = BatchTotals(1, 1, position.num_sequences, position.num_micro_batches)
        for batch in batches:
            # Any counts do: the losses of this pass are not used.
            context = _context(batch, position, totals, counts_LE)
            output = self.model(_inputs(batch), context, last_only=True)
            counts_LE += torch.stack([layer.stats.counts_E for layer in output.moe])
        return all_reduce_sum(counts_LE, self.dims.world_group)

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

    def _global(self, name: str, tensor: Tensor) -> Tensor:
        """Return a view of `tensor` that knows its place in the global tensor of that name."""
        if self.dims.expert_mesh is None or not is_expert(name):
            return tensor
        local: Tensor = tensor
        over_edp: Placement = Replicate()
        if isinstance(tensor, DTensor):
            local, [over_edp] = tensor.to_local(), tensor.placements
        shape = torch.Size((tensor.shape[0] * self.dims.ep, *tensor.shape[1:]))
        return DTensor.from_local(
            local,
            self.dims.expert_mesh,
            [Shard(0), over_edp],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )


def _inputs(batch: MicroBatch) -> ModelInputs:
    return ModelInputs(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS)


def _context(
    batch: MicroBatch, position: StepPosition, totals: BatchTotals, counts_LE: Tensor | None
) -> MoEContext:
    seq_len = batch.tokens_BS.shape[1]
    first = batch.sample_ids_B.to(batch.tokens_BS.device) * seq_len
    offsets = torch.arange(seq_len, device=batch.tokens_BS.device)
    return MoEContext(
        seq_len=seq_len,
        valid_T=valid_tokens(_inputs(batch)),
        token_ids_T=(first[:, None] + offsets).flatten(),
        totals=totals,
        counts_LE=counts_LE,
        seed=position.seed,
        step=position.step,
        micro_batch=batch.index,
    )


def _shard(model: DecoderLM, config: EngineConfig, dims: ParallelDims, dtype: torch.dtype) -> None:
    """Shard dense parameters over all ranks and experts over the ranks that hold the same ones."""
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype.itemsize < 4 else None,
        reduce_dtype=torch.promote_types(dtype, torch.float32),
        # Gates are float32 in a bfloat16 model and must stay so.
        cast_forward_inputs=False,
    )
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    ignored = {p for name, p in model.named_parameters() if is_expert(name)}
    shard = partial(fully_shard, reshard_after_forward=config.zero_stage == 3)

    for layer in model.moe_layers:
        # The router computes in float32, so its weights are not gathered in bfloat16.
        shard(layer.router.gate, mesh=dims.dense_mesh, mp_policy=exact)
        if dims.edp > 1:
            assert dims.expert_mesh is not None
            shard(
                layer.experts,
                mesh=dims.expert_mesh["edp"],
                mp_policy=policy,
                shard_placement_fn=lambda p: Shard(expert_shard_dim(p.shape, dims.edp)),
            )
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
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _compile_static_parts(model: DecoderLM) -> None:
    """Compile what has fixed shapes; the MoE layer's sizes depend on the data."""
    for block in model.blocks:
        for part in (block.attn_norm, block.attn, block.ffn_norm, block.ffn):
            if part is not None:
                part.compile()
