"""The names of precisions in a configuration, and the dtype that each computes in."""

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16", "fp64"]

COMPUTE_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
