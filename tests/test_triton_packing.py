"""The Triton kernels of mmfast.pack and of gathering rows, interpreted where there is no GPU."""

import pytest
import torch
from test_packing import batch, convert, leaves_of
from test_packing_errors import part
from triton_cases import DEVICE, DTYPES, needs_triton

from mmfast import (
    LayerNorm,
    Layout,
    Part,
    RMSNorm,
    contrastive_loss,
    from_padded,
    pack,
    perturb_,
    rotary,
    to_padded,
    unpack,
)
from mmfast.ops import _pack_layout, packing
from mmfast.ops._pack_op import _pack, _pack_backward
from mmfast.testing.numeric import assert_close_to_oracle, poisoned_empty

pytestmark = needs_triton


def moved(x):
    """Parts and arguments on the device, lengths too."""
    if isinstance(x, dict):
        return {k: moved(v) for k, v in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(moved(v) for v in x))
    if isinstance(x, (tuple, list)):
        return type(x)(moved(v) for v in x)
    return x.to(DEVICE) if torch.is_tensor(x) else x


def run(parts, kwargs, grad, backend):
    leaf = lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()  # noqa: E731
    parts, kwargs = convert(parts, leaf), convert(kwargs, leaf)
    x, _ = pack(parts, **kwargs, backend=backend)
    return [x, *torch.autograd.grad(x, leaves_of(parts, kwargs), grad.to(x.dtype))]


def check(parts, kwargs):
    parts, kwargs = moved(parts), moved(kwargs)
    tokens = [p[0] for p in parts.values()]
    grad = torch.randn(sum(t.shape[0] for t in tokens), tokens[0].shape[1], device=DEVICE).to(tokens[0].dtype)
    with poisoned_empty():
        got = run(parts, kwargs, grad, "triton")
    double = torch.Tensor.double
    want = run(convert(parts, double), convert(kwargs, double), grad, "reference")
    peer = run(parts, kwargs, grad, "reference")
    for i, (a, b, c) in enumerate(zip(got, want, peer)):
        assert_close_to_oracle("x" if i == 0 else f"gradient {i}", a, b, c, gradient=i > 0)
    return got


LENGTHS = [[7, 0, 4], [0, 9, 3], [2, 1, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "dim, kind",
    [(1, None), *((dim, kind) for dim in (7, 72) for kind in ("layer", "rms", "bare", None)), (300, "layer")],
)
def test_against_oracle(dtype, dim, kind):
    check(*batch(dtype, dim, lengths=LENGTHS, kind=kind))


@pytest.mark.parametrize("kind", ["layer", None])
def test_parameters_in_float32(kind):
    got = check(*batch(DTYPES[-1], 40, lengths=LENGTHS, param_dtype=torch.float32, kind=kind))
    assert [g.dtype for g in got] == [DTYPES[-1]] * 4 + [torch.float32] * (len(got) - 4)


@pytest.mark.parametrize("positions", ["one", "two", "random"])
def test_runs_that_cross_chunks(positions, monkeypatch):
    """Rows that share an embedding row: all of them, runs of several chunks, runs that end with a chunk."""
    from mmfast.kernels import packing as kernels

    monkeypatch.setattr(kernels, "_CHUNKS", 32)  # four rows each
    parts, kwargs = batch(torch.float32, 40, lengths=[[100], [20], [5]])
    place = parts["image"].positions
    if positions == "one":
        place = torch.zeros_like(place)
    elif positions == "two":
        place = (torch.arange(100, dtype=torch.int32) >= 48).to(torch.int32)[:, None].expand(-1, 2).contiguous()
    parts["image"] = parts["image"]._replace(positions=place)
    check(parts, kwargs)


def test_without_some_parts():
    """No type embedding, no tables, tables of a second axis only, one part, no rows at all."""
    parts, kwargs = batch(torch.float32, 24, lengths=LENGTHS)
    check(parts, {"norm": kwargs["norm"]})
    check(parts, {"norm": kwargs["norm"], "type_embedding": kwargs["type_embedding"]})
    check(parts, {"position_embedding": {"image": kwargs["position_embedding"]["image"][:1]}})
    check({"image": parts["image"]}, {"position_embedding": {"image": kwargs["position_embedding"]["image"]}})
    for lengths in ([[], [], []], [[0], [0], [0]], [[0, 0], [5, 0], [0, 0]]):
        check(*batch(lengths=lengths, dim=8))


def test_partial_gradients():
    parts, kwargs = map(moved, batch(dim=40, lengths=LENGTHS))
    grad = torch.randn(26, 40, device=DEVICE)
    _, *full = run(parts, kwargs, grad, "triton")
    for i, want in enumerate(full):
        fresh, arguments = convert(parts, torch.clone), convert(kwargs, torch.clone)
        leaf = leaves_of(fresh, arguments)[i].requires_grad_()
        (got,) = torch.autograd.grad(pack(fresh, **arguments, backend="triton")[0], leaf, grad)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_strided_tokens_and_gradients():
    parts, kwargs = map(moved, batch(dim=24, lengths=LENGTHS))
    wide = {}
    for name, p in parts.items():
        buffer = torch.full((p[0].shape[0], 100), float("nan"), device=DEVICE)
        buffer[:, 7:31] = p[0]
        wide[name] = Part(buffer[:, 7:31], *p[1:])
    want, _ = pack(parts, **kwargs, backend="triton")
    assert torch.equal(pack(wide, **kwargs, backend="triton")[0], want)
    leaf, grad = parts["text"].tokens.requires_grad_(), torch.randn(26, 48, device=DEVICE)[:, ::2]
    a, b = (torch.autograd.grad(pack(parts, **kwargs, backend="triton")[0], leaf, g)[0] for g in (grad, grad.clone()))
    assert torch.equal(a, b)


def test_backward_repeats_bit_equal():
    parts, kwargs = map(moved, batch(torch.float32, 16, lengths=LENGTHS))
    grad = torch.randn(26, 16, device=DEVICE)
    first = run(parts, kwargs, grad, "triton")
    for _ in range(3 if DEVICE == "cpu" else 50):
        assert all(torch.equal(a, b) for a, b in zip(first, run(parts, kwargs, grad, "triton")))


def test_wrong_arguments_are_noticed():
    parts, kwargs = map(moved, batch(dim=40, lengths=LENGTHS))
    x, _ = pack(parts, **kwargs, backend="reference")
    tables = kwargs["position_embedding"]
    shifted = dict(parts, image=parts["image"]._replace(positions=(parts["image"].positions + 1) % 9))
    rolled = dict(kwargs, type_embedding=kwargs["type_embedding"].roll(1, 0))
    swapped = dict(kwargs, position_embedding=dict(tables, image=[t[:9] for t in reversed(tables["image"])]))
    other = dict(kwargs, norm=RMSNorm(kwargs["norm"].weight, 1e-5))
    for p, k in ((shifted, kwargs), (parts, rolled), (parts, swapped), (parts, other)):
        with pytest.raises(AssertionError):
            assert_close_to_oracle("x", pack(p, **k, backend="triton")[0], x.double(), x)


def test_limits(monkeypatch):
    with pytest.raises(RuntimeError, match="D is 16385; the Triton kernels hold whole rows, up to 16384"):
        pack(moved({"a": part(dim=16385)}), backend="triton")
    monkeypatch.setattr(packing, "checks_values", lambda device: True)
    for value in (9, -1):
        positions = torch.tensor([[0], [8], [value], [1]], dtype=torch.int32)
        tables = moved({"a": torch.zeros(9, 8)})
        with pytest.raises(ValueError, match=rf"position_embedding\[a\]: position {value} of row 2 on axis 0.*9 rows"):
            pack(moved({"a": part(positions=positions)}), position_embedding=tables, backend="triton")


def test_a_wrong_position_reads_no_foreign_memory(monkeypatch):
    """Unless values are checked, a position outside its table adds nothing."""
    for module in (packing, _pack_layout):
        monkeypatch.setattr(module, "checks_values", lambda device: False)
    positions = torch.tensor([[0], [1 << 30], [-5], [1]], dtype=torch.int32)
    parts, tables = moved({"a": part(positions=positions)}), moved({"a": torch.ones(9, 8)})
    x, _ = pack(parts, position_embedding=tables, backend="triton")
    assert x[:, 0].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_rows_of_any_dtype(dtype, shape):
    layout = Layout.from_lengths([3, 0, 5, 1]).to(DEVICE)
    x = (torch.randn(9, *shape) * 3).abs().to(DEVICE, dtype)
    value = 0.1 if dtype.is_floating_point else 1
    padded = to_padded(x, layout, length=5, value=value, backend="triton")
    assert torch.equal(padded, to_padded(x, layout, length=5, value=value, backend="reference"))
    assert torch.equal(from_padded(padded, layout, 9, backend="triton"), x)


def test_rows_wide_strided_and_outside():
    layout = Layout(torch.tensor([1, 4, 4, 9], dtype=torch.int32), seqused=torch.tensor([2, 0, 5], dtype=torch.int32))
    layout = layout.to(DEVICE)
    x = torch.randn(11, 2 * 1500, device=DEVICE)
    x[[0, 3, 9, 10]] = float("nan")
    x = x[:, 1::2][:, :1300].requires_grad_()
    padded = to_padded(x, layout, length=7, backend="triton")
    assert torch.equal(padded, to_padded(x, layout, length=7, backend="reference"))
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert grad[:, 0].tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0]
    packed = from_padded(padded, layout, 11, backend="triton")
    assert not packed[[0, 3, 9, 10]].any() and torch.equal(packed[1:3], x[1:3])


def test_unpack_twice_differentiable():
    parts, _ = batch(torch.float64 if DEVICE == "cpu" else torch.float32, 4, lengths=LENGTHS)
    parts = moved(parts)
    x, layout = pack(parts, backend="reference")
    assert all(torch.equal(t, parts[n][0]) for n, t in unpack(x, layout, backend="triton").items())
    if DEVICE == "cpu":
        leaf = x[:5].clone().requires_grad_()
        small = pack({"a": (x[:5], [3, 2])}, backend="reference")[1]
        assert torch.autograd.gradcheck(lambda t: unpack(t, small, backend="triton")["a"].square(), leaf)
        assert torch.autograd.gradgradcheck(lambda t: unpack(t, small, backend="triton")["a"].square(), leaf)


def test_opcheck():
    parts, kwargs = map(moved, batch(dim=8, lengths=[[3, 1], [0, 2], [1, 1]]))
    _, layout = pack(parts, **kwargs, backend="reference")
    tokens = [p[0].requires_grad_() for p in parts.values()]
    tables = [*kwargs["position_embedding"]["image"], kwargs["position_embedding"]["text"]]
    norm: LayerNorm = kwargs["norm"]
    arguments = [tokens, layout.source, layout.modality, layout.position, kwargs["type_embedding"].requires_grad_(),
                 tables, [0, 2, 3, 3], list(parts), 1, norm.weight, norm.bias, 1e-5, "triton"]  # fmt: skip
    torch.library.opcheck(_pack.op, arguments)
    arguments = convert(arguments, torch.Tensor.detach)
    x, mean, rstd = _pack(*arguments)
    needs = [True, False, True, True, True, False, True, True, False]
    sizes = [t.shape[0] for t in tokens]
    torch.library.opcheck(_pack_backward.op, [x, *arguments[:11], mean, rstd, sizes, needs, "triton"])
    index = torch.tensor([2, -1, 0, 5], device=DEVICE)
    rows = torch.randn(8, 3, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.mmfast.gather_rows.default, ([rows], index, 0.5, "triton"))
    torch.library.opcheck(torch.ops.mmfast.scatter_rows.default, (rows[:4], index, [7], "triton"))


def test_compile_with_the_other_ops():
    """Ragged batches through every op but attention: two compilations for all of them."""
    torch.compiler.reset()
    linear, types = torch.nn.Linear(8, 16).to(DEVICE), torch.randn(2, 8, device=DEVICE)
    norm = torch.nn.LayerNorm(8).to(DEVICE)

    def step(image, text, lengths_image, lengths_text, delta):
        parts = {"image": (linear(image)[:, :8] + delta, lengths_image), "text": (text, lengths_text)}
        x, layout = pack(parts, type_embedding=types, norm=norm, backend="triton")
        qk = linear(x).unflatten(1, (2, 2, 4))
        q, k = rotary(qk[:, 0], qk[:, 1], layout, backend="triton")
        pooled = to_padded(q.flatten(1), layout, length=30, backend="triton").sum(1)
        loss = contrastive_loss(pooled, pooled.detach() + 1, scale=2.0, backend="triton") + k.square().mean()
        own = Layout.from_lengths(lengths_image)
        perturb_(delta, torch.ones_like(delta), step_size=0.1, eps=0.2, norm="l2", layout=own, backend="triton")
        return loss, unpack(x, layout, backend="triton")["text"]

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for number in range(4 if DEVICE == "cpu" else 20):
        g = torch.Generator().manual_seed(number)
        lengths = torch.randint(1, 10, (2, 3 + number), generator=g, dtype=torch.int32)
        image, text = (torch.randn(int(n.sum()), 8, generator=g).to(DEVICE) for n in lengths)
        results = []
        for function in (compiled, step):
            delta = torch.zeros_like(image)
            loss, back = function(image, text, *lengths.to(DEVICE), delta)
            results.append((loss, back, delta, *torch.autograd.grad(loss, linear.parameters())))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2
    torch.compiler.reset()
