import pytest

from dmoe.models import ModelConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 10, "num_heads": 4}, r"dim = 10 .* num_heads = 4"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_heads = 4 .* num_kv_heads = 3"),
        ({"dim": 12, "num_heads": 4}, r"head_dim = 3 is odd"),
        ({"family": "gpt2", "num_kv_heads": 2}, r"gpt2 has neither num_kv_heads"),
        ({"family": "gpt2", "qk_norm": "head"}, r"gpt2 has neither"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


def test_what_is_left_out_follows_from_the_rest() -> None:
    config = ModelConfig(dim=64, num_heads=4)
    assert (config.kv_heads, config.width_of_head, config.activation) == (4, 16, "swiglu")
    assert config.moe_layers == []
    config = ModelConfig(family="gpt2", dim=12, num_heads=4, head_dim=5)
    assert (config.width_of_head, config.activation) == (5, "gelu")
