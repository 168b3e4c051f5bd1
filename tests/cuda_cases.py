"""Where the tests of the CUDA kernels run: on the GPU, or each thread as a fibre on the CPU (cuda_shim)."""

import cuda_shim
import pytest
import torch

from mmfast import _native

ON_GPU = torch.cuda.is_available() and torch.version.hip is None and _native.cuda_refusal is None
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

needs_cuda = [
    pytest.mark.skipif(not ON_GPU and cuda_shim.refusal is not None, reason=str(cuda_shim.refusal)),
    pytest.mark.usefixtures("cuda_kernels"),
]


@pytest.fixture(scope="session")
def cuda_module():
    """The module of the kernels: compiled by nvcc for a GPU, or by g++ for the CPU."""
    return _native.cuda() if ON_GPU else cuda_shim.load(cuda_shim.build())


@pytest.fixture
def cuda_kernels(cuda_module):
    with _native.use_cuda(cuda_module):
        yield cuda_module
