"""mmfast.pack against the float64 oracle and plain loops over samples."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmfast
from mmfast import LayerNorm, Order, Part, RMSNorm, _native, pack, to_padded, unpack
from mmfast.ops._pack_op import _pack, _pack_backward
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


def test_exports():
    for name in ("Part", "Order", "pack", "unpack", "to_padded", "from_padded", "LayerNorm", "RMSNorm"):
        assert name in mmfast.__all__ and hasattr(mmfast, name)
