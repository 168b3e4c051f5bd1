"""Which backend runs, and the words in which another is refused."""

from __future__ import annotations

import types

import pytest
import torch

from mmfast.ops import _dispatch, _library

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.zeros(2)


def on_gpu(dtype=torch.float16):
    return types.SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)


@pytest.fixture
def compiled(monkeypatch):
    """As on a machine with triton whose kernels are compiled."""
    monkeypatch.setattr(_dispatch, "interpreted", False)
    monkeypatch.setattr(_dispatch, "no_triton", None)


def gpu(monkeypatch, major, minor=0, hip=None):
    properties = types.SimpleNamespace(major=major, minor=minor, name="Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)


def test_triton_is_refused_with_a_reason(compiled, monkeypatch):
    refusal = _dispatch.triton_refusal
    assert refusal(CPU, dtypes=FLOATS) == "the tensors are on cpu, not on a GPU"
    gpu(monkeypatch, 9)
    assert refusal(on_gpu(), dtypes=FLOATS) is None
    assert refusal(on_gpu(torch.float64), dtypes=FLOATS) == "dtype float64 is not supported by the Triton kernels"
    gpu(monkeypatch, 7, 5)
    assert refusal(on_gpu(), dtypes=FLOATS) == "Some GPU is sm_75; sm_80 or newer is needed"
    gpu(monkeypatch, 9, 4, hip="7.0")
    assert refusal(on_gpu(), dtypes=FLOATS) is None
    monkeypatch.setattr(_dispatch, "no_triton", "triton is not installed: pip install triton")
    assert "pip install triton" in refusal(on_gpu(), dtypes=FLOATS)


def test_the_interpreter_takes_what_it_computes_rightly(compiled, monkeypatch):
    monkeypatch.setattr(_dispatch, "interpreted", True)
    assert _dispatch.triton_refusal(CPU, dtypes=FLOATS) is None
    assert "in bfloat16 wrong" in _dispatch.triton_refusal(CPU.bfloat16(), dtypes=FLOATS)
    assert "on the CPU, and the tensors are on cuda:0" in _dispatch.triton_refusal(on_gpu(), dtypes=FLOATS)


def test_interpreted_kernels_run_only_where_they_are_asked_for(compiled, monkeypatch):
    monkeypatch.setattr(_dispatch, "interpreted", True)
    refusals = {"cpu": lambda: "no module", "triton": lambda: None}
    assert _dispatch.choose("op", None, refusals) == "reference"
    assert _dispatch.choose("op", "triton", refusals) == "triton"
    with _dispatch.use_backend("triton"):
        assert _dispatch.choose("op", None, refusals) == "triton"
    monkeypatch.setattr(_dispatch, "interpreted", False)
    assert _dispatch.choose("op", None, refusals) == "triton"


def test_an_explicit_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="op: backend 'triton' cannot run: no GPU"):
        _dispatch.choose("op", "triton", {"triton": lambda: "no GPU"})
    with pytest.raises(RuntimeError, match="op has no such implementation"):
        _dispatch.choose("op", "triton", {"cpu": lambda: None})


def test_an_op_runs_the_implementation_that_was_chosen():
    from torch.library import opcheck

    op = _library.define(
        "test_two(Tensor x, float a, str backend) -> Tensor",
        cpu=lambda x, a: x + a,
        triton=lambda x, a: x - a,
        fake=lambda x, a: torch.empty_like(x),
        setup_context=lambda ctx, inputs, output: setattr(ctx, "backend", inputs[-1]),
        backward=lambda ctx, grad: (grad if ctx.backend == "cpu" else -grad, None, None),
    )
    x = torch.ones(3, requires_grad=True)
    for backend, sign in (("cpu", 1), ("triton", -1)):
        out = op(x, 0.25, backend)
        assert torch.equal(out, x + sign * 0.25)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], sign * torch.ones(3))
        opcheck(op.op, (x, 0.25, backend))
    with pytest.raises(ValueError, match="last argument must be 'str backend'"):
        _library.define("test_one(Tensor x) -> Tensor", cpu=None, triton=abs, fake=None)
