"""Where numbers stop being finite, found in one process; test_step has it on two ranks."""

import math
from contextlib import nullcontext
from pathlib import Path

import poison
import pytest
import torch
from tiny import tiny_config

from dmoe.engine import StepPosition
from dmoe.testing import run_distributed
from dmoe.trainer.build import open_run
from dmoe.trainer.nonfinite import find_non_finite

PLACES = {
    "parameter": "parameter layers.1.attn.o_proj.weight is not finite",
    "embedding_row": "the output of embed was the first that is not finite",
    "gate_gradient": "the gradient of layers.1.moe.router.gate.weight is not",
    "nothing": "every number of this rank is finite",
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_names_the_first_place(
    name: str, recompute: str, token_store: Path, tmp_path: Path
) -> None:
    config = tiny_config(token_store, tmp_path, train={"recompute": recompute})
    train = config.train
    position = StepPosition(1, 0, train.global_batch_size, train.num_micro_batches)
    with open_run(config, torch.device("cpu")) as run:
        engine, batches = run.trainer.engine, run.trainer.loader.next_step()
        with poison.ALL[name](engine) if name in poison.ALL else nullcontext():
            found = find_non_finite(engine, batches, position)
        assert PLACES[name] in found
        assert not any(module._forward_hooks for module in engine.model.modules())


def found_under_deepspeed(store: Path, folder: Path) -> list[str]:
    """What is found at each stage, where the gradient of a weight that DeepSpeed has is NaN."""
    found = []
    for stage in (1, 2, 3):
        section = {"name": "deepspeed", "zero_stage": stage, "precision": "fp32"}
        config = tiny_config(store, folder / str(stage), engine=section)
        train = config.train
        position = StepPosition(1, 0, train.global_batch_size, train.num_micro_batches)
        with open_run(config, torch.device("cpu")) as run:
            engine, batches = run.trainer.engine, run.trainer.loader.next_step()
            weight = engine.model.layers[1].attn.o_proj.weight
            weight.register_hook(poison.nan_like)
            engine.forward_backward(batches, position)
            assert not math.isfinite(engine.clip(1.0))
            found.append(find_non_finite(engine, batches, position))
    return found


def test_names_the_gradient_that_deepspeed_has_taken(token_store: Path, tmp_path: Path) -> None:
    [found] = run_distributed(found_under_deepspeed, 1, token_store, tmp_path, timeout=280)
    assert [text.split(";")[1] for text in found] == [
        " the gradient of layers.1.attn.o_proj.weight is not"
    ] * 3
