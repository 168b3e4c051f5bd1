"""Every test draws the same numbers in every run and in any order."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
