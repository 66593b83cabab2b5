"""The tile table: each row of each expert is in one tile, and no tile crosses experts."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from on_device import DEVICE, twice  # first: it skips this file where Triton is missing

tiles = pytest.importorskip("dmoe_kernels.tiles")


@given(
    counts=st.lists(st.integers(0, 150), min_size=1, max_size=9),
    spare=st.integers(0, 70),
    block_m=st.sampled_from([16, 32, 128]),
)
@example(counts=[0, 0, 0], spare=0, block_m=32)
@example(counts=[0, 0, 300, 0], spare=0, block_m=32)
@example(counts=[0], spare=64, block_m=128)
@example(counts=[1] * 64, spare=0, block_m=16)
@example(counts=[32, 16, 33, 31], spare=1, block_m=16)
@example(counts=[5, 16 * 300 + 1, 7], spare=0, block_m=16)  # more tiles than are written at once
def test_covers_each_row_once(counts: list[int], spare: int, block_m: int) -> None:
    num_rows, num_experts = sum(counts) + spare, len(counts)

    def written() -> list[torch.Tensor]:
        table, offsets, _ = tiles.tile_rows(torch.tensor(counts, device=DEVICE), num_rows, block_m)
        # What is past the table's own length is never read.
        return [torch.tensor(table.shape[1]), offsets, table[:, : offsets[-1]]]

    bound, offsets, table = (t.tolist() for t in twice(written))
    assert bound == -(-num_rows // block_m) + num_experts
    assert offsets[-1] == sum(-(-count // block_m) for count in counts) <= bound
    starts = [sum(counts[:expert]) for expert in range(num_experts + 1)]
    assert offsets[:-1] == starts
    covered = []
    for expert, row, end in zip(*table, strict=True):
        assert end == starts[expert + 1]
        assert starts[expert] <= row < end
        covered += [(expert, r) for r in range(row, min(row + block_m, end))]
    assert covered == [(e, r) for e in range(num_experts) for r in range(*starts[e : e + 2])]
