"""attention of few queries that see all keys, which are read in place, and of many, whose rows are weighed together."""

from __future__ import annotations

import pytest
import torch
from test_attention import DTYPES, ISAS, check, inputs, one_thread, results

from mmfast import Layout
from mmfast._native import cpu_refusal

pytestmark = pytest.mark.skipif(cpu_refusal is not None, reason=str(cpu_refusal))

__all__ = ["one_thread"]  # a fixture of every test here


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_k, dim, softcap", [(2, 64, 0.0), (1, 24, 0.0), (2, 136, 0.0), (2, 64, 3.0)])
def test_few_queries_onto_many_keys(heads_k, dim, softcap, dtype, isa):
    """Up to 128 queries of a group: scores are computed transposed, in one or two panels of 64 and chunks of keys."""
    layout = Layout.from_lengths([1, 6, 17, 32, 64, 65, 127, 128, 129])
    other = Layout.from_lengths([300, 129, 1, 257, 128, 2, 127, 64, 86])
    check(inputs(layout, other, 2, heads_k, dim, dtype), layout, other, isa=isa, softcap=softcap)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 64, 136])
def test_many_queries_that_see_everything(dim, dtype, isa):
    layout, other = Layout.from_lengths([131, 200, 290]), Layout.from_lengths([260, 70, 515])
    check(inputs(layout, other, 1, dim=dim, dtype=dtype), layout, other, isa=isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_queries_with_rows_that_cannot_be_read_in_place(dtype):
    """Rows of an odd number of elements: pairs of bfloat16 would begin in the middle of one."""
    layout, other = Layout.from_lengths([9, 20]), Layout.from_lengths([70, 33])
    tensors = inputs(layout, other, 1, dim=64, dtype=dtype)
    odd = [torch.nn.functional.pad(x, (0, 1))[..., :64] for x in tensors]
    for a, b in zip(results(odd, layout, other), results(tensors, layout, other)):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    check(odd, layout, other)
