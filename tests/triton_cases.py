"""Where the tests of the Triton kernels run: on the GPU, or interpreted on the CPU."""

import pytest
import torch

from mmfast.ops import _dispatch

needs_triton = pytest.mark.skipif(
    _dispatch.no_triton is not None or not (_dispatch.interpreted or torch.cuda.is_available()),
    reason=_dispatch.no_triton or "kernels are compiled and there is no GPU",
)
DEVICE = "cpu" if _dispatch.interpreted else "cuda"
# The interpreter gets products in bfloat16 wrong.
DTYPES = (torch.float32, torch.float16) if _dispatch.interpreted else (torch.float32, torch.float16, torch.bfloat16)
