"""segment_mean against a loop over the samples."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast import Layout
from mmfast.nn import segment_mean


def loop(x, layout):
    first, lengths = layout.cu_seqlens.tolist(), layout.lengths().tolist()
    rows = [x[first[b] : first[b] + n].double().sum(0) / max(n, 1) for b, n in enumerate(lengths)]
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1]).double()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 20), max_size=12), st.integers(0, 5), st.integers(0, 2**16))
def test_equals_the_loop(lengths, tail, seed):
    torch.manual_seed(seed)
    layout = Layout.from_lengths(lengths)
    x = torch.randn(sum(lengths) + tail, 7)
    x[sum(lengths) :] = torch.nan
    torch.testing.assert_close(segment_mean(x, layout).double(), loop(x, layout), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_unused_rows(dtype):
    torch.manual_seed(0)
    layout = Layout.from_lengths([5, 0, 70, 3])
    layout = dataclasses.replace(layout, seqused=torch.tensor([2, 0, 70, 0], dtype=torch.int32))
    x = torch.randn(78, 16).to(dtype)
    x[layout.samples() == layout.batch] = torch.nan
    x.requires_grad_()
    out = segment_mean(x, layout)
    assert out.dtype == dtype
    expected = loop(x, layout)
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    out.sum().backward()
    weight = torch.where(layout.samples() < 4, 1 / layout.lengths().clamp(min=1)[layout.samples().clamp(max=3)], 0)
    torch.testing.assert_close(x.grad, weight[:, None].to(dtype).expand_as(x))


def test_gradients_in_float64():
    layout = Layout.from_lengths([2, 0, 3])
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segment_mean(x, layout), x)
    assert torch.autograd.gradgradcheck(lambda x: segment_mean(x, layout) ** 2, x)


def test_refuses_padded_tokens():
    with pytest.raises(ValueError, match=r"must be \[T, D\]"):
        segment_mean(torch.zeros(2, 3, 4), Layout.from_lengths([3, 3]))
