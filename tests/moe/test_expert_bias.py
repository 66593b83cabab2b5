import torch

from dmoe.moe.expert_bias import update_expert_bias


def test_underloaded_experts_are_raised_and_overloaded_ones_lowered() -> None:
    bias_E = torch.zeros(4)
    update_expert_bias(bias_E, torch.tensor([10, 1, 4, 5]), rate=0.25)
    assert bias_E.tolist() == [-0.25, 0.25, 0.25, 0.0]
    update_expert_bias(bias_E, torch.tensor([0, 0, 0, 0]), rate=0.25)
    assert bias_E.tolist() == [-0.25, 0.25, 0.25, 0.0]
