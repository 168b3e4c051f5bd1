"""mmfast.pack, unpack, to_padded and from_padded against the float64 oracle and plain loops over samples."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmfast
from mmfast import LayerNorm, Layout, Order, Part, RMSNorm, _native, from_padded, pack, to_padded, unpack
from mmfast.ops._pack_op import _pack, _pack_backward
from mmfast.reference import packing as reference
from mmfast.testing.numeric import EDGE_LENGTHS, assert_close_to_oracle, poisoned_empty

needs_cpu = pytest.mark.skipif(_native.cpu_refusal is not None, reason=str(_native.cpu_refusal))
isas = _native.available_isas() if _native.cpu_refusal is None else ()


def batch(dtype=torch.float32, dim=72, items=5, lengths=None, param_dtype=None, seed=0, kind="layer"):
    """Three parts: one with two position axes, one with one table on default positions, one with none."""
    g = torch.Generator().manual_seed(seed)
    param_dtype = param_dtype or dtype
    lengths = lengths or [[int(torch.randint(0, 40, (1,), generator=g)) for _ in range(items)] for _ in range(3)]
    tokens = [torch.randn(sum(n), dim, generator=g).to(dtype) for n in lengths]
    positions = torch.randint(0, 9, (tokens[0].shape[0], 2), generator=g, dtype=torch.int32)
    parts = {
        "image": Part(tokens[0], torch.tensor(lengths[0], dtype=torch.int32), positions),
        "text": Part(tokens[1], lengths[1]),
        "sensor": (tokens[2], lengths[2]),
    }

    def param(*shape):
        return torch.randn(*shape, generator=g).to(param_dtype)

    kwargs = {
        "type_embedding": param(3, dim),
        "position_embedding": {
            "image": [param(9, dim), param(11, dim)],
            "text": param(max(lengths[1], default=0) + 1, dim),
        },
        "norm": {
            "layer": LayerNorm(param(dim), param(dim), 1e-5),
            "rms": RMSNorm(param(dim), 1e-6),
            "bare": LayerNorm(None, None, 1e-5),
            None: None,
        }[kind],
    }
    return parts, kwargs


def leaves_of(parts, kwargs):
    tables = kwargs.get("position_embedding") or {}
    found = [part[0] for part in parts.values()] + [kwargs.get("type_embedding")]
    found += [t for mine in tables.values() for t in ([mine] if torch.is_tensor(mine) else mine)]
    found += [t for t in (kwargs.get("norm") or ()) if torch.is_tensor(t)]
    return [t for t in found if t is not None]


def convert(x, function):
    """Every float tensor in nested parts and arguments."""
    if torch.is_tensor(x):
        return function(x) if x.is_floating_point() else x
    if isinstance(x, dict):
        return {k: convert(v, function) for k, v in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(convert(v, function) for v in x))
    if isinstance(x, (tuple, list)):
        return type(x)(convert(v, function) for v in x)
    return x


def run(parts, kwargs, grad, **more):
    """x, layout and the gradients of all leaves."""
    leaf = lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()  # noqa: E731
    parts, kwargs = convert(parts, leaf), convert(kwargs, leaf)
    x, layout = pack(parts, **kwargs, **more)
    leaves = leaves_of(parts, kwargs)
    return x, layout, torch.autograd.grad(x, leaves, grad.to(x.dtype))


def check(parts, kwargs, order=None, backend="cpu"):
    total = sum(part[0].shape[0] for part in parts.values())
    dim = next(iter(parts.values()))[0].shape[1]
    grad = torch.randn(total, dim, generator=torch.Generator().manual_seed(9)).to(next(iter(parts.values()))[0].dtype)
    with poisoned_empty():
        x, layout, grads = run(parts, kwargs, grad, order=order, backend=backend)
    exact = run(
        convert(parts, torch.Tensor.double),
        convert(kwargs, torch.Tensor.double),
        grad,
        order=order,
        backend="reference",
    )
    same = run(parts, kwargs, grad, order=order, backend="reference")
    assert_close_to_oracle("x", x, exact[0], same[0])
    for i, (got, want, peer) in enumerate(zip(grads, exact[2], same[2])):
        assert_close_to_oracle(f"gradient {i}", got, want, peer, gradient=True)
    return x, layout, grads


@needs_cpu
@pytest.mark.parametrize("isa", isas)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layer", "rms", "bare", None])
@pytest.mark.parametrize("dim", [7, 16, 72, 256])
def test_against_oracle(isa, dtype, kind, dim):
    with _native.use_isa(isa):
        check(*batch(dtype, dim, kind=kind))
        check(*batch(dtype, 1, kind=None))


@needs_cpu
@pytest.mark.parametrize("isa", isas)
@pytest.mark.parametrize("kind", ["layer", None])
def test_parameters_in_float32(isa, kind):
    with _native.use_isa(isa):
        x, _, grads = check(*batch(torch.bfloat16, 40, param_dtype=torch.float32, kind=kind))
    assert x.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3 + [torch.float32] * (len(grads) - 3)


@needs_cpu
@pytest.mark.parametrize("length", EDGE_LENGTHS)
def test_edge_lengths(length):
    check(*batch(torch.float32, 24, lengths=[[length, 0], [0, length], [3, 1]]))


@needs_cpu
def test_many_rows_several_columns_blocks():
    """More rows than chunks, more columns than one block of the table's gradient; every row at one position."""
    parts, kwargs = batch(torch.float32, 600, lengths=[[2500], [300], [6000]])
    parts["image"] = parts["image"]._replace(positions=torch.zeros_like(parts["image"].positions))
    check(parts, kwargs)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_stores_are_bit_equal(dtype):
    """An output larger than the cache equals the concatenation of its pieces, which are smaller; so do gradients."""
    dim, pieces = 1024, 8
    rows = pieces * (_native.cpu().streamed_bytes() // (dim * dtype.itemsize) // 4)
    tokens, grad = torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).to(dtype)
    types, weight, bias = (torch.randn(*n, dim).to(dtype) for n in ((1,), (), ()))

    def run(tokens, grad):
        tokens = tokens.detach().requires_grad_()
        parts = {"a": (tokens, [tokens.shape[0]])}
        x, _ = pack(parts, type_embedding=types, norm=LayerNorm(weight, bias), backend="cpu")
        return x.detach(), torch.autograd.grad(x, tokens, grad)[0]

    found = [run(*piece) for piece in zip(tokens.split(rows // pieces), grad.split(rows // pieces))]
    for whole, split in zip(run(tokens, grad), zip(*found)):
        assert torch.equal(whole, torch.cat(split))


@needs_cpu
def test_unpack_of_more_than_the_cache():
    """Together the parts are larger than the cache, one alone is not."""
    dim = 1024
    rows = _native.cpu().streamed_bytes() // (4 * dim) * 3 // 4
    _, layout = pack({name: (torch.zeros(rows, 1), [rows]) for name in "ab"}, backend="reference")
    x = torch.randn(2 * rows, dim)
    for m, part in enumerate(unpack(x, layout, backend="cpu").values()):
        assert torch.equal(part, x[layout.modality == m])


@needs_cpu
def test_streamed_bytes_are_of_one_cache():
    """Not of all caches of the chip, of which a core reaches one."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not size.exists():
        pytest.skip("the system does not say how large the cache is")
    assert _native.cpu().streamed_bytes() == int(size.read_text().strip().removesuffix("K")) * 1024 // 2


@needs_cpu
def test_empty_batches():
    for lengths in ([[], [], []], [[0], [0], [0]], [[0, 0], [5, 0], [0, 0]]):
        parts, kwargs = batch(lengths=lengths, dim=8)
        _, layout, _ = check(parts, kwargs)
        assert layout.batch == len(lengths[0])


@needs_cpu
def test_float16_and_float64():
    parts, kwargs = batch(torch.float16, param_dtype=torch.float16)
    x, _ = pack(parts, **kwargs, backend="cpu")
    assert x.dtype == torch.float16
    want, _ = pack(convert(parts, torch.Tensor.float), **convert(kwargs, torch.Tensor.float), backend="cpu")
    assert torch.equal(x, want.half())
    parts, kwargs = batch(torch.float64)
    with pytest.raises(RuntimeError, match="float64 is not supported"):
        pack(parts, **kwargs, backend="cpu")
    assert pack(parts, **kwargs)[0].dtype == torch.float64


@needs_cpu
def test_strided_tokens_and_gradients():
    parts, kwargs = batch(dim=24)
    wide = {}
    for name, part in parts.items():
        buffer = torch.full((part[0].shape[0], 100), float("nan"))
        buffer[:, 7:31] = part[0]
        wide[name] = Part(buffer[:, 7:31], *part[1:])
    want, _ = pack(parts, **kwargs)
    assert torch.equal(pack(wide, **kwargs)[0], want)
    check(wide, kwargs)
    transposed = {n: Part(p[0].t().contiguous().t(), *p[1:]) for n, p in parts.items()}
    assert torch.equal(pack(transposed, **kwargs)[0], want)
    leaf = parts["text"].tokens.requires_grad_()
    grad = torch.randn(want.shape[0], 2 * 24)[:, ::2]
    a = torch.autograd.grad(pack(parts, **kwargs)[0], leaf, grad)[0]
    b = torch.autograd.grad(pack(parts, **kwargs)[0], leaf, grad.contiguous())[0]
    assert torch.equal(a, b)


@needs_cpu
def test_determinism_and_threads():
    parts, kwargs = batch(torch.bfloat16, 200, items=40)
    total = sum(p[0].shape[0] for p in parts.values())
    grad = torch.randn(total, 200)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            x, _, grads = run(parts, kwargs, grad, backend="cpu")
            results.append((x, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_cpu
def test_backward_repeats_bit_equal():
    parts, kwargs = batch(torch.float32, 64, items=20)
    parts = convert(parts, torch.Tensor.requires_grad_)
    kwargs = convert(kwargs, torch.Tensor.requires_grad_)
    x, _ = pack(parts, **kwargs)
    leaves, grad = leaves_of(parts, kwargs), torch.randn(x.shape)
    first = torch.autograd.grad(x, leaves, grad, retain_graph=True)
    for _ in range(50):
        again = torch.autograd.grad(x, leaves, grad, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@needs_cpu
@pytest.mark.parametrize("kind", ["layer", "rms", None])
def test_partial_gradients(kind):
    """Any subset of inputs may need gradients."""
    parts, kwargs = batch(dim=40, kind=kind)
    grad = torch.randn(sum(p[0].shape[0] for p in parts.values()), 40)
    _, _, full = run(parts, kwargs, grad)
    for i, want in enumerate(full):
        fresh, arguments = convert(parts, torch.clone), convert(kwargs, torch.clone)
        leaf = leaves_of(fresh, arguments)[i].requires_grad_()
        (got,) = torch.autograd.grad(pack(fresh, **arguments)[0], leaf, grad)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@needs_cpu
@pytest.mark.parametrize("isa", isas)
def test_mutations_are_caught(isa):
    """One changed argument by one step must leave the oracle: the comparison has teeth."""
    parts, kwargs = batch(dim=40)
    x, _ = pack(parts, **kwargs, backend="reference")
    shifted = dict(parts, image=parts["image"]._replace(positions=(parts["image"].positions + 1) % 9))
    rolled = dict(kwargs, type_embedding=kwargs["type_embedding"].roll(1, 0))
    swapped = dict(
        kwargs,
        position_embedding=dict(
            kwargs["position_embedding"], image=[t[:9] for t in reversed(kwargs["position_embedding"]["image"])]
        ),
    )
    other_norm = dict(kwargs, norm=RMSNorm(kwargs["norm"].weight, 1e-5))
    with _native.use_isa(isa):
        for p, k in ((shifted, kwargs), (parts, rolled), (parts, swapped), (parts, other_norm)):
            with pytest.raises(AssertionError):
                assert_close_to_oracle("x", pack(p, **k, backend="cpu")[0], x.double(), x)


# The layout


def expected_layout(lengths, order, positions):
    """Fields of the layout by loops: lengths per part, order as (part, item) per sample, positions per part or None."""
    offset, first = 0, []
    for mine in lengths:
        first.append([offset + sum(mine[:i]) for i in range(len(mine))])
        offset += sum(mine)
    axes = max([len(p[0]) if p else 1 for p in positions if p is not None], default=0)
    fields = {"cu_seqlens": [0], "modality": [], "item": [], "source": [], "position": []}
    slot = 0
    for sample in order:
        for part, item in sample:
            for r in range(lengths[part][item]):
                source = first[part][item] + r
                fields["modality"].append(part)
                fields["item"].append(slot)
                fields["source"].append(source)
                own = positions[part][source - first[part][0]] if positions[part] is not None else [r]
                fields["position"].append([*own, *[0] * (axes - len(own))])
            slot += 1
        fields["cu_seqlens"].append(len(fields["source"]))
    return fields, axes


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_layout_against_loops(data):
    count = data.draw(st.integers(1, 4))
    free = data.draw(st.booleans())
    items = data.draw(st.integers(0, 5))
    size = st.integers(0, 6)
    lengths = [
        data.draw(st.lists(size, max_size=5) if free else st.lists(size, min_size=items, max_size=items))
        for _ in range(count)
    ]
    names = [f"m{i}" for i in range(count)]
    positions = []
    for mine in lengths:
        axes = data.draw(st.integers(0, 3))
        positions.append([[7 * r + a for a in range(axes)] for r in range(sum(mine))] if axes and sum(mine) else None)
    parts = {}
    for name, mine, pos in zip(names, lengths, positions):
        tokens = torch.randn(sum(mine), 3)
        parts[name] = Part(tokens, mine, None if pos is None else torch.tensor(pos, dtype=torch.int32))
    if free:
        slots = data.draw(st.permutations([(p, i) for p in range(count) for i in range(len(lengths[p]))]))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(slots)), max_size=4)))
        sliced = [list(slots[a:b]) for a, b in zip([0, *cuts], [*cuts, len(slots)])]
        order = Order.from_lists([[(names[p], i) for p, i in sample] for sample in sliced], names)
    else:
        sliced, order = [[(p, b) for p in range(count)] for b in range(items)], None
    x, layout = pack(parts, order=order)
    fields, axes = expected_layout(lengths, sliced, positions)
    for field in ("cu_seqlens", "modality", "item", "source"):
        assert getattr(layout, field).tolist() == fields[field], field
    if axes:
        assert layout.position.tolist() == fields["position"]
    else:
        assert layout.position is None
    assert layout.names == tuple(names) and layout.sizes == tuple(map(sum, lengths))
    concatenated = torch.cat([p.tokens for p in parts.values()])
    assert torch.equal(x, concatenated[torch.tensor(fields["source"], dtype=torch.long)])
    back = unpack(x, layout)
    for name in names:
        assert torch.equal(back[name], parts[name].tokens)


# Memory of large outputs


@needs_cpu
def test_large_outputs_reuse_memory():
    """Memory goes to the next output only once nothing refers to the last one: neither a view nor autograd."""
    rows = (33 << 20) // 4096
    tokens = torch.randn(rows, 1024)
    _native._kept.clear()
    x = pack({"a": (tokens, [rows])})[0]
    place, view = x.data_ptr(), x[7:9]
    del x
    other = pack({"a": (tokens, [rows])})[0]
    assert other.data_ptr() != place and torch.equal(view, tokens[7:9])
    square = other.requires_grad_().square().sum()
    del view, other
    again = pack({"a": (-tokens, [rows])})[0]
    assert again.data_ptr() == place and torch.equal(again, -tokens)
    square.backward()
    smaller = pack({"a": (tokens[:-100], [rows - 100])})[0]  # the saved tensor's memory, free after backward
    assert torch.equal(smaller, tokens[:-100]) and not _native._kept
    del smaller, again
    assert len(_native._kept) == 2
    for size in (100, 160, 90):
        _native.empty(size << 20, dtype=torch.uint8)
    assert sum(map(len, _native._kept)) <= _native._KEPT_BYTES
    _native._kept.clear()


# Back to parts and padding


@needs_cpu
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (16,)])
def test_rows_of_any_dtype(dtype, shape):
    layout = Layout.from_lengths([3, 0, 5, 1])
    x = (torch.randn(9, *shape) * 3).abs().to(dtype)
    padded = to_padded(x, layout, value=1.0)
    assert padded.shape == (4, 5, *shape) and padded.dtype == dtype
    for b, (begin, end) in enumerate([(0, 3), (3, 3), (3, 8), (8, 9)]):
        assert torch.equal(padded[b, : end - begin], x[begin:end])
        assert torch.equal(padded[b, end - begin :], torch.ones_like(padded[b, end - begin :]))
    assert torch.equal(from_padded(padded, layout), x)
    both = dataclasses.replace(layout, source=torch.randperm(9), sizes=(4, 5), names=("a", "b"))
    parts = unpack(x, both)
    assert torch.equal(torch.cat([parts["a"], parts["b"]])[both.source], x)


@needs_cpu
def test_padding_outside_the_layout():
    """Rows outside the layout may hold NaN; they are zero in outputs and in gradients."""
    layout = Layout(
        torch.tensor([1, 4, 4, 9], dtype=torch.int32),
        seqused=torch.tensor([2, 0, 5], dtype=torch.int32),
        modality=torch.zeros(11, dtype=torch.uint8),
    )
    x = torch.randn(11, 6)
    x[[0, 3, 9, 10]] = float("nan")
    x.requires_grad_()
    padded = to_padded(x, layout, length=7)
    assert not padded.isnan().any() and torch.equal(padded[0, :2], x[1:3]) and torch.equal(padded[2, :5], x[4:9])
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert grad[:, 0].tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0]
    full = torch.full((3, 7, 6), float("nan"))
    for b, n in enumerate([2, 0, 5]):
        full[b, :n] = torch.randn(n, 6)
    full.requires_grad_()
    packed = from_padded(full, layout)
    assert packed.shape == (11, 6) and not packed.isnan().any() and not packed[[0, 3, 9, 10]].any()
    (grad,) = torch.autograd.grad(packed.sum(), full)
    assert grad.sum() == 7 * 6
    assert torch.equal(to_padded(packed, layout, length=7), full.nan_to_num(0.0))


def check_float16_fill(backend, device="cpu"):
    layout, x = Layout.from_lengths([1, 0]).to(device), torch.zeros(1, 3, dtype=torch.float16, device=device)
    for value in (-1e-7, 6e-8, 2e-8, 3.05e-5, 0.1, -3.3, 2049.0, 2051.0, 65519.0, 65520.0, -1e9, -torch.inf, torch.nan):
        padded = to_padded(x, layout, length=1, value=value, backend=backend)
        want = torch.full((3,), value).half()
        assert torch.equal(padded[1, 0].cpu().nan_to_num(7.0), want.nan_to_num(7.0)), value


@needs_cpu
def test_float16_is_filled_with_the_nearest():
    check_float16_fill("cpu")


@needs_cpu
def test_rows_differentiate_twice():
    layout = Layout.from_lengths([3, 0, 2])
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda x: to_padded(x, layout).square(),
        lambda x: from_padded(to_padded(x, layout).square(), layout),
        lambda x: unpack(x, pack({"a": (x, [3, 2])})[1])["a"].square(),
    ):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@needs_cpu
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_backends_agree(backend):
    parts, _ = batch(dim=10)
    x, layout = pack(parts, backend=backend)
    parts_back = unpack(x, layout, backend=backend)
    assert all(torch.equal(parts_back[n], p[0]) for n, p in parts.items())
    padded = to_padded(x, layout, value=-1.5, backend=backend)
    assert torch.equal(padded, to_padded(x, layout, value=-1.5, backend="cpu"))
    assert torch.equal(from_padded(padded, layout, backend=backend), x)


# Torch around it


def test_gradcheck_of_the_reference():
    for kind in ("layer", "rms", None):
        parts, kwargs = batch(torch.float64, 4, lengths=[[3, 1], [0, 2], [1, 1]], kind=kind)
        leaves = [t.requires_grad_() for t in leaves_of(parts, kwargs)]

        def function(*_, parts=parts, kwargs=kwargs):
            return pack(parts, **kwargs, backend="reference")[0]

        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@needs_cpu
def test_second_derivative_raises():
    tokens = torch.randn(4, 8, requires_grad=True)
    x, _ = pack({"a": (tokens, [4])}, norm=RMSNorm())
    (grad,) = torch.autograd.grad(x.square().sum(), tokens, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        grad.sum().backward()


@needs_cpu
@pytest.mark.parametrize("kind", ["layer", None])
def test_opcheck(kind):
    parts, kwargs = batch(dim=16, lengths=[[3, 1], [0, 2], [1, 1]], kind=kind)
    _, layout = pack(parts, **kwargs)
    tokens = [p[0].requires_grad_() for p in parts.values()]
    tables = [*kwargs["position_embedding"]["image"], kwargs["position_embedding"]["text"]]
    norm = kwargs["norm"] or (None, None)
    arguments = [tokens, layout.source, layout.modality, layout.position, kwargs["type_embedding"].requires_grad_(),
                 tables, [0, 2, 3, 3], list(parts), 1 if kind else 0, norm[0], norm[1], 1e-5, "cpu"]  # fmt: skip
    torch.library.opcheck(_pack.op, arguments)
    arguments = convert(arguments, torch.Tensor.detach)
    tokens = arguments[0]
    x, mean, rstd = _pack(*arguments)
    torch.library.opcheck(
        _pack_backward.op,
        [torch.randn_like(x), tokens if kind else [], *arguments[1:11], mean, rstd, [t.shape[0] for t in tokens],
         [True, False, True, True, True, False, True, bool(kind), False], "cpu"],
    )  # fmt: skip
    index = torch.tensor([2, -1, 0, 5])
    torch.library.opcheck(
        torch.ops.mmfast.gather_rows.default,
        ([torch.randn(n, 3, requires_grad=True) for n in (2, 6)], index, 0.5, "cpu"),
    )
    torch.library.opcheck(
        torch.ops.mmfast.scatter_rows.default, (torch.randn(4, 3, requires_grad=True), index, [3, 0, 4], "cpu")
    )


@needs_cpu
def test_compile():
    torch.compiler.reset()
    linear = torch.nn.Linear(16, 16)
    norm = torch.nn.LayerNorm(16)
    types = torch.randn(2, 16)

    def step(image, text, lengths_image, lengths_text):
        x, layout = pack(
            {"image": (linear(image), lengths_image), "text": (text, lengths_text)}, type_embedding=types, norm=norm
        )
        back = unpack(x * 2, layout)
        return x, back["text"], to_padded(x, layout, length=40), layout.cu_seqlens

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 20, (2, 3 + seed), generator=g, dtype=torch.int32)
        image, text = torch.randn(int(lengths[0].sum()), 16), torch.randn(int(lengths[1].sum()), 16)
        got, want = compiled(image, text, *lengths), step(image, text, *lengths)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
        got[0].square().mean().backward()
    assert counter.frame_count <= 2
    torch.compiler.reset()


@needs_cpu
def test_autocast_and_checkpointing():
    parts, kwargs = batch(dim=24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, _ = pack(parts, **kwargs)
    assert x.dtype == torch.bfloat16
    want, _ = pack(convert(parts, torch.Tensor.bfloat16), **kwargs)
    assert torch.equal(x, want)
    leaf = parts["text"].tokens.requires_grad_()
    direct = torch.autograd.grad(pack(parts, **kwargs)[0].square().sum(), leaf)[0]

    def again(tokens):
        return pack(dict(parts, text=parts["text"]._replace(tokens=tokens)), **kwargs)[0]

    x = torch.utils.checkpoint.checkpoint(again, leaf, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(x.square().sum(), leaf)[0], direct)


@pytest.mark.parametrize("backend", ["cpu", "reference"] if isas else ["reference"])
def test_torch_modules_as_norm(backend):
    parts, _ = batch(dim=24)
    plain, _ = pack(parts)
    for module in (torch.nn.LayerNorm(24), torch.nn.LayerNorm(24, elementwise_affine=False), torch.nn.RMSNorm(24),
                   torch.nn.RMSNorm(24, eps=1e-3)):  # fmt: skip
        for p in module.parameters():
            torch.nn.init.normal_(p)
        x, _ = pack(parts, norm=module, backend=backend)
        torch.testing.assert_close(x, module(plain), rtol=1e-5, atol=1e-5)


# Errors


def part(rows=4, dim=8, lengths=(4,), positions=None, dtype=torch.float32):
    return Part(torch.zeros(rows, dim, dtype=dtype), torch.tensor(lengths, dtype=torch.int32), positions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack({}), "got 0 parts"),
        (lambda: pack({f"m{i}": part() for i in range(17)}), "got 17 parts; expected 1 to 16"),
        (lambda: pack({"a": Part(torch.zeros(4), [4])}), r"tokens of 'a' must be a float tensor \[Tm, D\]"),
        (lambda: pack({"a": part(), "b": part(dim=9)}), "'b' has D = 9, 'a' has 8"),
        (lambda: pack({"a": part(), "b": part(dtype=torch.bfloat16)}), "dtype of 'b' is torch.bfloat16"),
        (lambda: pack({"a": part(lengths=(3,))}), "'a' add up to 3, but its tokens have 4 rows"),
        (lambda: pack({"a": part(lengths=(-1, 5))}), "item_lengths of 'a' holds -1"),
        (lambda: pack({"a": Part(torch.zeros(4, 8), torch.tensor([4.0]))}), "item_lengths of 'a' must be int32"),
        (lambda: pack({"a": part(), "b": part(lengths=(2, 2))}), "one item per sample.*a 1, b 2"),
        (lambda: pack({"a": part(positions=torch.zeros(3, 1, dtype=torch.int32))}), "positions of 'a' must be int32"),
        (lambda: pack({"a": part()}, type_embedding=torch.zeros(2, 8)), r"type_embedding must be a tensor \[1, 8\]"),
        (lambda: pack({"a": part()}, position_embedding={"b": torch.zeros(9, 8)}), "names 'b', which is no part"),
        (lambda: pack({"a": part()}, position_embedding={"a": torch.zeros(9, 7)}), r"must be a tensor \[N, 8\]"),
        (lambda: pack({"a": part()}, position_embedding={"a": [torch.zeros(9, 8)] * 2}), "2 tables.*1 axes"),
        (lambda: pack({"a": part()}, norm=torch.nn.LayerNorm(9)), r"norm is over \(9,\); expected \(8,\)"),
        (lambda: pack({"a": part()}, norm=torch.nn.BatchNorm1d(8)), "norm is a BatchNorm1d"),
        (lambda: pack({"a": part()}, norm=RMSNorm(torch.zeros(7))), r"norm's weight must be a tensor \[8\]"),
        (lambda: pack({"a": part()}, backend="cuda7"), "expected one of"),
        (lambda: Order.from_lists([[("b", 0)]], ["a"]), "no parts"),
        (lambda: unpack(torch.zeros(4, 8), Layout.from_lengths([4])), "no source"),
        (lambda: unpack(torch.zeros(5, 8), pack({"a": part()})[1]), r"x has shape \[5, 8\].*T = 4"),
        (
            lambda: unpack(torch.zeros(4, 8), dataclasses.replace(pack({"a": part()})[1], sizes=(3,))),
            "sizes add up to 3, but x has 4 rows",
        ),
        (lambda: to_padded(torch.zeros(4, 8), Layout.from_lengths([4]), length=3), "has 4 rows.*length is 3"),
        (lambda: from_padded(torch.zeros(2, 5, 8), Layout.from_lengths([4])), "B = 1"),
        (lambda: from_padded(torch.zeros(1, 3, 8), Layout.from_lengths([4])), "has 4 rows.*length is 3"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@needs_cpu
def test_rows_are_gathered_from_several_parts():
    parts = [torch.randn(n, 5) for n in (3, 0, 4, 1)]
    index = torch.tensor([7, 0, 3, 2, 6, -1, 4, 1, 5, 2])
    wanted = torch.cat(parts)[index] * (index >= 0)[:, None]
    assert torch.equal(torch.ops.mmfast.gather_rows.default(parts, index, 0.0, "cpu"), wanted)


@needs_cpu
def test_kernels_refuse_rows_outside():
    """What would read or write out of bounds is refused below the public functions too."""
    gather, scatter = torch.ops.mmfast.gather_rows.default, torch.ops.mmfast.scatter_rows.default
    x, index = torch.zeros(4, 8), torch.tensor([0, 9])
    with pytest.raises(ValueError, match=r"index\[1\] is 9, but x has 8 rows"):
        gather([x, x], index, 0.0, "cpu")
    with pytest.raises(ValueError, match=r"index\[1\] is 9, but the output has 5 rows"):
        scatter(x[:2], index, [2, 3], "cpu")
    with pytest.raises(ValueError, match="x and out have different rows"):
        gather([x, torch.zeros(4, 7)], torch.tensor([0, 5]), 0.0, "cpu")
    part = torch.zeros(2, dtype=torch.uint8)
    for source, modality, message in (
        ([0, 2], part, r"source\[1\] is 2, outside part a"),
        ([-1, 0], part, r"source\[0\] is -1"),
        ([0, 1], part + 1, r"modality\[0\] is 1; expected less than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            _pack([x[:2]], torch.tensor(source), modality, None, None, [], [0, 0], ["a"], 0, None, None, 0.0, "cpu")


@needs_cpu
def test_position_outside_its_table():
    for value in (9, -1):
        positions = torch.tensor([[0], [8], [value], [1]], dtype=torch.int32)
        with pytest.raises(ValueError, match=rf"position_embedding\[a\]: position {value} of row 2 on axis 0.*9 rows"):
            pack({"a": part(positions=positions)}, position_embedding={"a": torch.zeros(9, 8)}, backend="cpu")


@needs_cpu
def test_last_position_outside_its_table():
    """Rows shared by threads, and a second axis: every row's positions are looked at."""
    positions = torch.zeros(5000, 2, dtype=torch.int32)
    positions[-1, 1] = 9
    tables = [torch.zeros(20, 64), torch.zeros(9, 64)]
    with pytest.raises(ValueError, match=r"position_embedding\[a\]: position 9 of row 4999 on axis 1.*9 rows"):
        pack({"a": (torch.zeros(5000, 64), [5000], positions)}, position_embedding={"a": tables}, backend="cpu")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([[("a", 0), ("b", 0)]], "order names 2 parts.*3 items"),
        ([[("a", 0), ("b", 0), ("b", 0)]], "uses item 1 of 'b' 0 times|uses item 0 of 'b' 2 times"),
        ([[("a", 0), ("b", 0), ("b", 2)]], "names item 2 of 'b', which has 2 items"),
        ([[("a", 0), ("a", 1), ("b", 1)]], "names item 1 of 'a', which has 1 items"),
    ],
)
def test_order_errors(order, message):
    parts = {"a": part(), "b": part(lengths=(2, 2))}
    with pytest.raises(ValueError, match=message):
        pack(parts, order=Order.from_lists(order, ["a", "b"]))


def test_order_whose_samples_leave_items_out():
    order = Order.from_lists([[("a", 0), ("b", 0)], [("b", 1)]], ["a", "b"])
    parts = {"a": part(), "b": part(lengths=(2, 2))}
    for samples, total in (([2, 0], 2), ([2, 2], 4), ([-1, 4], 3)):
        wrong = order._replace(samples=torch.tensor(samples, dtype=torch.int32))
        with pytest.raises(ValueError, match=f"order.samples add up to {total}; expected 3"):
            pack(parts, order=wrong)


def test_exports():
    for name in ("Part", "Order", "pack", "unpack", "to_padded", "from_padded", "LayerNorm", "RMSNorm"):
        assert name in mmfast.__all__ and hasattr(mmfast, name)


def test_reference_rows():
    x = torch.randn(3, 2)
    assert torch.equal(reference.gather_rows(x, torch.tensor([1, -1]), 4.0), torch.stack([x[1], torch.full((2,), 4.0)]))
    assert torch.equal(
        reference.scatter_rows(x, torch.tensor([3, -1, 0]), 4)[[3, 0, 1]], torch.stack([x[0], x[2], x[0] * 0])
    )
