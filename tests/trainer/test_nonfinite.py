"""Where numbers stop being finite, found in one process; test_step has it on two ranks."""

from contextlib import nullcontext
from pathlib import Path

import poison
import pytest
import torch
from tiny import tiny_config

from dmoe.engine import StepPosition
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
