"""The similarity of experts against each expert computed from its weights."""

import pytest
import torch
import torch.nn.functional as F
from evaluated import EXPERTS, LAYERS, batches, model_of
from torch import Tensor

from dmoe.config.base import ConfigError
from dmoe.evaluation import expert_similarity
from dmoe.evaluation.similarity import expert_output, mean_cosine
from dmoe.models import DecoderLM, ModelConfig, ModelInputs, build_model
from dmoe.moe import MoEConfig, MoELayer


def outputs_by_hand(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Return (E, T, D) outputs of all experts."""
    outputs = []
    for gate_up, down in zip(layer.experts.w_gate_up_E2FD, layer.experts.w_down_EDF, strict=True):
        gate, up = (x_TD @ gate_up.T).chunk(2, dim=1)
        outputs.append((F.silu(gate) * up) @ down.T)
    return torch.stack(outputs)


def similarity_by_hand(layer: MoELayer, x_TD: Tensor) -> list[float]:
    """Return the mean of each token's cosine matrix off its diagonal."""
    values = []
    for y_ED in outputs_by_hand(layer, x_TD).transpose(0, 1):
        cosines = F.cosine_similarity(y_ED[:, None], y_ED[None], dim=-1)
        values.append(((cosines.sum() - cosines.trace()) / (EXPERTS * (EXPERTS - 1))).item())
    return values


@pytest.fixture
def layer() -> MoELayer:
    return model_of().moe_layers[1]


def test_one_expert_alone_equals_its_weights(layer: MoELayer) -> None:
    x_TD = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        found = torch.stack([expert_output(layer, x_TD, expert) for expert in range(EXPERTS)])
        assert found.allclose(outputs_by_hand(layer, x_TD), rtol=0, atol=1e-12)


def test_the_mean_cosine_equals_the_matrix(layer: MoELayer) -> None:
    x_TD = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        found = mean_cosine(layer, x_TD).tolist()
        assert found == pytest.approx(similarity_by_hand(layer, x_TD), abs=1e-12)
    assert max(map(abs, found)) > 0.01


def test_equal_and_opposite_experts() -> None:
    """Two of each sign: of the six pairs two agree and four are opposed."""
    layer = MoELayer(MoEConfig(num_experts=4, expert_ffn_dim=8), dim=16).double()
    for weight in layer.experts.parameters():
        weight.data.copy_(weight.data[:1].expand_as(weight))
    x_TD = torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad():
        assert mean_cosine(layer, x_TD).tolist() == pytest.approx([1] * 3)
        layer.experts.w_down_EDF.data[2:] *= -1
        assert mean_cosine(layer, x_TD).tolist() == pytest.approx([-1 / 3] * 3)


def test_an_output_of_zero_is_like_none() -> None:
    layer = MoELayer(MoEConfig(num_experts=2, expert_ffn_dim=8), dim=16).double()
    layer.experts.w_down_EDF.data[1] = 0
    with torch.no_grad():
        x_TD = torch.randn(3, 16, dtype=torch.float64)
        assert mean_cosine(layer, x_TD).tolist() == pytest.approx([0] * 3, abs=1e-12)


def test_the_model_gives_each_layer_its_own_inputs() -> None:
    model, sums, num_tokens = model_of(), [0.0] * LAYERS, 0
    for batch in batches(1):
        valid = batch.valid_BS[0]
        num_tokens += int(valid.sum())
        tensors = (batch.tokens_BS, batch.positions_BS, batch.document_ids_BS)
        with torch.no_grad():
            inputs = inputs_of_routers(model, ModelInputs(*(t[:, valid] for t in tensors)))
            for index, layer in enumerate(model.moe_layers):
                sums[index] += sum(similarity_by_hand(layer, inputs[index]))
    expected = [value / num_tokens for value in sums]
    for size in (1, 3):
        assert expert_similarity(model, batches(size)) == pytest.approx(expected, abs=1e-9)
    assert len({round(value, 6) for value in expected}) == LAYERS


def inputs_of_routers(model: DecoderLM, inputs: ModelInputs) -> list[Tensor]:
    """Return what each router reads, which is what its experts read."""
    seen: list[Tensor] = []
    hooks = [
        layer.router.register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
        for layer in model.moe_layers
    ]
    model(inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_so_many_tokens_and_no_more() -> None:
    model, first = model_of(), batches(1)[:1]
    whole = expert_similarity(model, first)
    num_tokens = int(first[0].valid_BS.sum())
    assert expert_similarity(model, batches(1), max_tokens=num_tokens) == whole
    assert expert_similarity(model, batches(1), max_tokens=num_tokens + 1) != whole
    assert expert_similarity(model, batches(3), max_tokens=num_tokens) == pytest.approx(whole)


@pytest.mark.parametrize("moe", [None, {"num_experts": 1, "expert_ffn_dim": 8}])
def test_experts_that_cannot_be_compared_are_refused(moe) -> None:
    router = {"router": {"name": "top_k", "top_k": 1}}
    model = build_model(ModelConfig(vocab_size=19, dim=16, ffn_dim=16, moe=moe and moe | router))
    with pytest.raises(ConfigError, match="takes two of them"):
        expert_similarity(model, batches())


def test_no_batches_are_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        expert_similarity(model_of(), [])
