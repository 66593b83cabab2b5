import pytest
import torch

from dmoe.models.norm import LayerNorm, RMSNorm


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_norms_equal_their_formulas(dtype, tolerance) -> None:
    rms, layer = RMSNorm(32, 1e-5), LayerNorm(32, 1e-5)
    for parameter in (*rms.parameters(), *layer.parameters()):
        torch.nn.init.normal_(parameter)
    if dtype == torch.float64:
        rms, layer = rms.double(), layer.double()
    x = (10 + torch.randn(4, 32)).to(dtype)
    wide, gain, shift = x.double(), layer.weight.double(), layer.bias.double()
    expected_rms = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * rms.weight.double()
    centred = wide - wide.mean(-1, keepdim=True)
    expected_layer = (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift
    )
    for actual, expected in ((rms(x), expected_rms), (layer(x), expected_layer)):
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()
