"""The short way past torch.library's dispatcher: the same results, and taken only where nobody looks at the call."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast
from mmfast import _native
from mmfast.ops import _library
from mmfast.ops.attention import _attention

pytestmark = pytest.mark.skipif(_native.cpu_refusal is not None, reason=str(_native.cpu_refusal))


def inputs(rows=20, heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, dim, generator=generator) for _ in range(4)]


def seen(function) -> list[str]:
    """Names of the ops that a mode sees."""
    names = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Log():
        function()
    return names


def test_both_ways_give_the_same_bits(monkeypatch):
    layout = mmfast.Layout.from_lengths([7, 13])
    *qkv, dout = inputs()

    def results():
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = mmfast.attention(*leaves, layout, None, mmfast.ModalityMask.causal())
        with torch.no_grad():
            assert torch.equal(out, mmfast.attention(*leaves, layout, None, mmfast.ModalityMask.causal()))
        return out, *torch.autograd.grad(out, leaves, dout)

    short = results()
    assert type(short[0].grad_fn).__name__ == "attentionBackward"
    monkeypatch.setattr(_library, "_observed", lambda: True)
    full = results()
    assert type(full[0].grad_fn).__name__ != "attentionBackward"
    assert all(torch.equal(a, b) for a, b in zip(short, full))


@pytest.mark.parametrize("norm", [False, True])
def test_lists_of_tensors_both_ways(norm, monkeypatch):
    layout = mmfast.Layout.from_lengths([7, 13])
    q, k, *grads = inputs()
    weight = torch.linspace(0.5, 1.5, 16)
    parts = {
        "text": (torch.randn(5, 8), torch.tensor([2, 3], dtype=torch.int32), None),
        "image": (torch.randn(4, 8), torch.tensor([4, 0], dtype=torch.int32), None),
    }

    def results():
        leaves = [x.clone().requires_grad_() for x in (q, k, weight)]
        qk_norm = (leaves[2], None, 1e-6) if norm else None
        out = mmfast.rotary(*leaves[:2], layout, base=100.0, qk_norm=qk_norm)
        rotated = torch.autograd.grad(out, leaves if norm else leaves[:2], grads)
        tokens = {n: x.clone().requires_grad_() for n, (x, _, _) in parts.items()}
        packed, _ = mmfast.pack({n: (tokens[n], *rest) for n, (_, *rest) in parts.items()})
        frozen, _ = mmfast.pack({n: (x.detach() if n == "text" else x, *parts[n][1:]) for n, x in tokens.items()})
        own = torch.autograd.grad(packed.square().sum(), list(tokens.values()))
        return *out, *rotated, packed, *own, *torch.autograd.grad(frozen.square().sum(), tokens["image"])

    short = results()
    assert type(short[0].grad_fn).__name__ == "rotaryBackward"
    monkeypatch.setattr(_library, "_observed", lambda: True)
    assert all(torch.equal(a, b) for a, b in zip(short, results(), strict=True))


def test_modes_and_profilers_see_the_op():
    layout = mmfast.Layout.from_lengths([7, 13])
    q, k, v, dout = inputs()
    assert "mmfast.attention.default" in seen(lambda: mmfast.attention(q, k, v, layout))
    q.requires_grad_()
    names = seen(lambda: torch.autograd.grad(mmfast.attention(q, k, v, layout), q, dout))
    assert {"mmfast.attention.default", "mmfast.attention_backward.default"} <= set(names)
    with torch.profiler.profile() as profile:
        mmfast.attention(q, k, v, layout)
    assert any(event.name == "mmfast::attention" for event in profile.events())


def test_tensors_that_are_not_what_they_seem():
    layout = mmfast.Layout.from_lengths([7, 13])
    q, k, v, _ = inputs()
    want = mmfast.attention(-q, k, v, layout)
    negated = torch._neg_view(q)  # its memory holds q
    assert torch.equal(mmfast.attention(negated, k, v, layout), want)

    class Sub(torch.Tensor):
        pass

    assert torch.equal(mmfast.attention((-q).as_subclass(Sub), k, v, layout), want)
    nothing = torch._efficientzerotensor(q.shape)  # has no memory
    with pytest.raises(ValueError, match="q has no memory"):
        mmfast.attention(nothing, k, v, layout)


def test_parameters_inference_and_repeated_backward():
    layout = mmfast.Layout.from_lengths([7, 13])
    q, k, v, dout = inputs()
    q = torch.nn.Parameter(q)
    out = mmfast.attention(q, k, v, layout)
    first, second = (torch.autograd.grad(out, q, dout, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.inference_mode():
        assert torch.equal(mmfast.attention(q, k, v, layout), out)
    changed = q.detach().clone().requires_grad_()
    doubled = changed * 1
    out = mmfast.attention(doubled, k, v, layout)
    doubled.data.add_(0)
    with torch.no_grad():
        doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


def test_a_tensor_in_several_places_gets_the_sum_of_its_gradients():
    layout = mmfast.Layout.from_lengths([7, 13])
    x, *_, dout = inputs()
    own = [x.clone().requires_grad_() for _ in range(3)]
    parts = torch.autograd.grad(mmfast.attention(*own, layout), own, dout)
    x.requires_grad_()
    out = mmfast.attention(x, x, x, layout)
    assert type(out.grad_fn).__name__ == "attentionBackward"
    torch.testing.assert_close(torch.autograd.grad(out, x, dout)[0], sum(parts))
    frozen = mmfast.attention(own[0].detach(), own[1], own[2].detach(), layout)
    assert torch.equal(torch.autograd.grad(frozen, own[1], dout)[0], parts[1])


def test_the_schema_of_every_op_is_reachable():
    assert _attention.op is torch.ops.mmfast.attention.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_binding_reads_ordinary_tensors_and_subclasses_alike(dtype):
    """Ordinary ones by one call of DLPack, others by their attributes."""
    layout = mmfast.Layout.from_lengths([7, 13])
    fused = torch.randn(20, 3, 2, 16).to(dtype).requires_grad_()
    rest = ([layout.cu_seqlens, None, None, None, None],) * 2
    rest += (mmfast.ModalityMask.causal().table(), -1, -1, 0.25, 0.0, 0.0, None)

    class Sub(torch.Tensor):
        pass

    def results(kind):
        q, k, v = (kind(x) for x in fused.unbind(1))
        out, lse = torch.zeros(20, 2, 16, dtype=dtype), torch.zeros(2, 20)
        _native.cpu().attention_forward(q, k, v, kind(out), kind(lse), *rest)
        return out, lse

    version = fused._version
    ordinary = results(lambda x: x)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(ordinary, results(lambda x: x.as_subclass(Sub))))
    parameters = results(lambda x: torch.nn.Parameter(x.detach()))
    assert all(torch.equal(a, b) for a, b in zip(ordinary, parameters))
    assert fused._version == version and fused.requires_grad


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.zeros(20, 2, 16).to_sparse(), "storage"),
        (torch.zeros(20, 2, 16, device="meta"), "q is not on the CPU"),
        (torch.zeros(20, 2, 16, dtype=torch.complex64), "q has dtype another dtype"),
        (torch.zeros(20, 2, 16, dtype=torch.bool), "q has dtype another dtype"),
        (torch.zeros(20, 2, 16).half(), "q has dtype float16"),
        (torch.zeros(1, 1, 1, 20, 2, 16), "6 dimensions; at most 5"),
        (torch._efficientzerotensor((20, 2, 16)), "q has no memory"),
        (torch.zeros(20, 16, 2).mT, "q is not contiguous in its last dimension"),
        ([1.0], "shape"),
    ],
    ids=["sparse", "meta", "complex", "bool", "half", "6 dimensions", "zero tensor", "columns", "no tensor"],
)
def test_a_binding_refuses_what_it_cannot_read(bad, message):
    layout = [mmfast.Layout.from_lengths([20]).cu_seqlens, None, None, None, None]
    k, v, out = (torch.zeros(20, 2, 16) for _ in range(3))
    rest = (layout, layout, (0,) * 16, -1, -1, 0.25, 0.0, 0.0, None)
    with pytest.raises((ValueError, RuntimeError, AttributeError, NotImplementedError), match=message):
        _native.cpu().attention_forward(bad, k, v, out, torch.zeros(2, 20), *rest)
