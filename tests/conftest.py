"""Every test draws the same numbers in every run and in any order; without a GPU, Triton's kernels are interpreted."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton or mmfast is imported

from mmfast.testing.checkout import use_kernels

use_kernels()
pytest.register_assert_rewrite("gpu_perturbation")  # tests that other files run


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
