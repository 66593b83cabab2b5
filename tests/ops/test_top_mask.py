import pytest
import torch

from dmoe.ops.top_mask import (
    count_by_column,
    count_ones,
    pack_bits,
    pack_bits_torch,
    top_bits,
    top_mask,
    top_mask_sorted,
    unpack_bits,
    unpack_bits_torch,
    unpack_bytes,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 5, 16])
def test_equals_the_stable_sort(dtype, n) -> None:
    torch.manual_seed(0)
    random = torch.randn(50, 16, dtype=dtype)
    # Few distinct values make many ties; signed zeros are equal.
    ties = torch.randint(-1, 2, (50, 16)).to(dtype)
    special = torch.tensor([[0.0, -0.0, 1.0, float("-inf")] * 4, [float("nan"), 1.0] * 8])
    for scores in (random, ties, special.to(dtype), random[:0]):
        mask = top_mask(scores, n)
        assert torch.equal(mask, top_mask_sorted(scores, n))
        assert (mask.sum(1) == n).all()
        assert torch.equal(unpack_bits(top_bits(scores, n)), mask)


def test_ties_go_to_the_lowest_index() -> None:
    assert top_mask(torch.zeros(1, 8), 3).int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert top_bits(torch.zeros(1, 8), 3).tolist() == [[0b111]]


def test_bits_come_back() -> None:
    every_byte = (torch.arange(256)[:, None] >> torch.arange(8) & 1).bool()
    random = torch.rand(5, 64) > 0.7
    for mask in (every_byte, random, random[:0]):
        bits = pack_bits(mask)
        assert bits.shape == (len(mask), mask.shape[1] // 8)
        assert torch.equal(unpack_bits(bits), mask)
        assert torch.equal(unpack_bytes(bits), mask.to(torch.uint8))
        assert torch.equal(pack_bits_torch(mask), bits)
        assert torch.equal(unpack_bits_torch(bits), mask)
    assert pack_bits(every_byte).flatten().tolist() == list(range(256))


@pytest.mark.parametrize("rows", [0, 3, 255, 600])
def test_bits_are_counted(rows) -> None:
    mask = torch.rand(rows, 24) > 0.1
    bits = pack_bits(mask)
    assert torch.equal(count_by_column(bits), mask.sum(0))
    assert count_ones(bits) == mask.sum()
