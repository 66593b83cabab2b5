"""Tensors written on one layout and read on another; each expert has values of its own."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dmoe.checkpoint.ranks import ALONE, CheckpointError, Ranks
from dmoe.checkpoint.storage import load_tensors, save_tensors, snapshot
from dmoe.testing import run_distributed

EXPERTS = "model.layers.0.moe.experts.w_down"


def full_tensors():
    """Every tensor of a small training state with its global shape."""
    w_EDF = torch.arange(8.0)[:, None, None] + torch.rand(8, 3, 2, generator=torch.Generator())
    return {
        EXPERTS: w_EDF,
        f"optimizer.exp_avg.{EXPERTS}": -w_EDF.double(),
        "model.uneven": torch.arange(35.0).reshape(5, 7),
        "model.fewer_rows_than_ranks": torch.arange(6.0).reshape(2, 3),
        "model.no_rows": torch.empty(0, 3),
        "model.transposed": torch.arange(12.0).reshape(3, 4).bfloat16().t(),
        "model.replicated": torch.arange(9).half(),
        "model.mask": torch.tensor([True, False, True]),
        "model.bytes": torch.arange(5, dtype=torch.uint8),
        "optimizer.step": torch.tensor(7),
        "optimizer.scale": torch.tensor(0.1, dtype=torch.float64),
    }


def sharded_tensors(ep, edp, filled):
    """The same state on an (ep, edp) mesh; zeros unless `filled`."""
    mesh = init_device_mesh("cpu", (ep, edp), mesh_dim_names=("ep", "edp"))
    flat = init_device_mesh("cpu", (ep * edp,))
    state = {}
    for name, tensor in full_tensors().items():
        if not filled:
            tensor = torch.zeros_like(tensor)
        if name == EXPERTS:
            state[name] = distribute_tensor(tensor, mesh, [Shard(0), Shard(0)])
        elif EXPERTS in name:
            state[name] = distribute_tensor(tensor, mesh, [Shard(0), Replicate()])
        elif tensor.ndim == 2:
            state[name] = distribute_tensor(tensor, flat, [Shard(0)])
        else:
            state[name] = tensor
    return state


def check_filled(tensors):
    for name, expected in full_tensors().items():
        actual = tensors[name]
        actual = actual.full_tensor() if isinstance(actual, DTensor) else actual
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=0, msg=lambda m, n=name: f"{n} {m}"
        )


def _save(folder, ep, edp):
    ranks = Ranks(dist.group.WORLD)
    tensors = sharded_tensors(ep, edp, filled=True)
    save_tensors(snapshot(tensors, ranks), folder, ranks)


def _load_and_save(jobs):
    ranks = Ranks(dist.group.WORLD)
    for folder, ep, edp, out in jobs:
        tensors = sharded_tensors(ep, edp, filled=False)
        load_tensors(tensors, folder, ranks)
        check_filled(tensors)
        save_tensors(snapshot(tensors, ranks), out, ranks)


def load_alone(folder):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in full_tensors().items()}
    load_tensors(tensors, folder)
    check_filled(tensors)


@pytest.fixture
def folders(tmp_path):
    paths = [tmp_path / name for name in "abcd"]
    for path in paths:
        path.mkdir()
    return paths


def test_one_rank_to_two_meshes_and_back(folders):
    one, first, second, _ = folders
    save_tensors(snapshot(full_tensors()), one)
    run_distributed(_load_and_save, 2, [(one, 2, 1, first), (first, 1, 2, second)])
    load_alone(first)
    load_alone(second)


@pytest.mark.slow
def test_four_ranks_to_two_and_one(folders):
    four, two, *_ = folders
    run_distributed(_save, 4, four, 2, 2)
    load_alone(four)
    # What is equal on all ranks is written once, and not all of it by one rank.
    files = sorted(four.iterdir())
    assert len(files) == 4
    data = sum(tensor.nbytes for tensor in full_tensors().values())
    assert data < sum(path.stat().st_size for path in files) < data + 4 * 4096
    run_distributed(_load_and_save, 2, [(four, 2, 1, two)])
    load_alone(two)


@pytest.mark.slow
def test_one_rank_to_four_and_between_meshes(folders):
    first, *others = folders
    save_tensors(snapshot(full_tensors()), first)
    meshes = [(1, 4), (2, 2), (4, 1)]
    jobs = [
        (source, ep, edp, out)
        for source, (ep, edp), out in zip(folders, meshes, others, strict=False)
    ]
    run_distributed(_load_and_save, 4, jobs)
    load_alone(others[-1])


def test_shared_and_strided_memory_alone(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "b": base, "column": base[:, 1], "p": torch.nn.Parameter(base.t())}
    save_tensors(snapshot(state), tmp_path)
    target = torch.zeros(4, 6)
    out = {"a": target[:3, :4], "b": torch.zeros(4, 3).t(), "column": torch.zeros(3)}
    out["p"] = torch.nn.Parameter(torch.zeros(4, 3))
    load_tensors(out, tmp_path)
    for name, tensor in state.items():
        assert torch.equal(out[name], tensor)
    assert target[3:].eq(0).all()
    assert target[:, 4:].eq(0).all()


def test_a_snapshot_keeps_what_was(tmp_path):
    state = {"w": torch.ones(4)}
    taken = snapshot(state)
    state["w"].zero_()
    save_tensors(taken, tmp_path)
    load_tensors(state, tmp_path)
    assert state["w"].eq(1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("w.a"), r"w.a: saved torch.float32 \[2\], expected nothing"),
        (
            lambda s: s.update({"w.c": torch.ones(1)}),
            r"w.c: saved nothing, expected torch.float32 \[1\]",
        ),
        (
            lambda s: s.update({"w.a": torch.ones(1, 2)}),
            r"w.a: saved torch.float32 \[2\], .*\[1, 2\]",
        ),
        (
            lambda s: s.update({"w.a": torch.ones(2).half()}),
            r"w.a: saved torch.float32 .*torch.float16",
        ),
        (lambda s: s.update({f"w.x{i}": torch.ones(1) for i in range(20)}), r"; and 12 more$"),
    ],
)
def test_a_mismatch_is_listed_and_changes_nothing(tmp_path, change, message):
    save_tensors(snapshot({"w.a": torch.ones(2), "w.b": torch.ones(2)}), tmp_path)
    state = {"w.a": torch.zeros(2), "w.b": torch.zeros(2)}
    change(state)
    with pytest.raises(CheckpointError, match=message):
        load_tensors(state, tmp_path)
    assert state["w.b"].eq(0).all()


def test_a_part_may_be_left_out_whole(tmp_path):
    save_tensors(snapshot({"model.a": torch.ones(2), "optimizer.a": torch.ones(3)}), tmp_path)
    state = {"model.a": torch.zeros(2)}
    load_tensors(state, tmp_path)
    assert state["model.a"].eq(1).all()


def _fail_on_rank_one(folder):
    ranks = Ranks(dist.group.WORLD)
    messages = []
    with pytest.raises(CheckpointError) as caught:
        snapshot({"w": torch.ones(2 + ranks.rank)}, ranks)
    messages.append(str(caught.value))
    taken = snapshot({"w": torch.ones(2), "v": torch.ones(2)}, ranks)
    if ranks.rank == 1:
        taken.shards.clear()
    with pytest.raises(CheckpointError) as caught:
        save_tensors(taken, folder, ranks)
    messages.append(str(caught.value))
    return messages


@pytest.mark.slow
def test_every_rank_learns_which_one_failed(tmp_path):
    results = run_distributed(_fail_on_rank_one, 2, tmp_path)
    assert results[0] == results[1]
    differ, missing = results[0]
    assert "failed on rank 1: tensors differ: w: saved torch.float32 [2], expected" in differ
    assert "failed on rank 1: KeyError" in missing


def test_without_a_process_group_nothing_is_warned(tmp_path, recwarn):
    save_tensors(snapshot({"a": torch.ones(2)}, ALONE), tmp_path, ALONE)
    load_tensors({"a": torch.ones(2)}, tmp_path, ALONE)
    assert not [str(entry.message) for entry in recwarn]
