"""The error rule of every numeric test, and inputs that find bugs.

A result is right when it is no farther from the float64 oracle than plain PyTorch in the same dtype, times two
(gradients: times three), plus one rounding of the largest value.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def assert_close_to_oracle(
    name: str, actual: Tensor, oracle: Tensor, same_dtype: Tensor, *, gradient: bool = False
) -> None:
    """Checks `max|actual - oracle| <= f * max|same_dtype - oracle| + eps(dtype) * max|oracle|`, f = 2 or 3.

    Args:
        name: for the message.
        actual: result under test.
        oracle: the reference in float64.
        same_dtype: the reference in the dtype of `actual`.
        gradient: the factor is 3 instead of 2.
    """
    if actual.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    if not actual.numel():
        return
    infinite = torch.isinf(oracle)
    if infinite.any():  # an lse of -inf must be exactly that
        assert torch.equal(actual.double()[infinite], oracle[infinite]), f"{name}: infinities differ"
        actual, oracle, same_dtype = (x.masked_fill(infinite, 0) for x in (actual, oracle, same_dtype))
    error = (actual.double() - oracle).abs().max().item()
    peer = (same_dtype.double() - oracle).abs().max().item()
    bound = (3 if gradient else 2) * peer + torch.finfo(actual.dtype).eps * oracle.abs().max().item()
    if not error <= bound:  # also catches NaN
        where = (actual.double() - oracle).abs().nan_to_num(float("inf")).flatten().argmax().item()
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(where), actual.shape))
        raise AssertionError(
            f"{name}: error {error:.3e} at {index} exceeds {bound:.3e} (plain PyTorch in the same dtype: {peer:.3e})"
        )


@contextlib.contextmanager
def poisoned_empty():
    """Within the context, `torch.empty` and its relatives are filled with NaN (integers: their maximum)."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    algorithms = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(algorithms)


EDGE_LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 239, 799, 1023)
