"""The Triton kernels of perturb_ and random_start_, interpreted where there is no GPU."""

import gpu_perturbation
import pytest
from triton_cases import DEVICE, DTYPES, needs_triton

pytestmark = needs_triton


def check(tensors, keywords):
    return gpu_perturbation.check(tensors, keywords, "triton", DEVICE)


class TestTriton(gpu_perturbation.PerturbationTests):
    backend, device, dtypes = "triton", DEVICE, DTYPES

    @pytest.fixture(params=[True, False], ids=["one pass", "passes"])
    def one_pass(self, request, monkeypatch):
        """Small units lie in one tile; without that, they take the passes of large ones."""
        from mmfast.kernels import _perturbation_tiles as kernels

        if not request.param:
            monkeypatch.setattr(kernels, "WHOLE", 0)

    @pytest.fixture
    def few_tensors(self, monkeypatch):
        from mmfast.kernels import perturbation as kernels

        monkeypatch.setattr(kernels, "MAX_TENSORS", 4)
