"""Tests draw the same examples on every machine, are not timed, and do not fight for cores."""

import os

import torch
from hypothesis import settings

settings.register_profile("dmoe", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("dmoe")
torch.set_num_threads(1)
# Triton reads this when it is imported, which any module may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
