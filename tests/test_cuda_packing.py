"""The CUDA kernels of mmfast.pack and of gathering rows: on a GPU, or each thread as a fibre on the CPU."""

import pytest
import torch
from cuda_cases import DEVICE, DTYPES, cuda_kernels, cuda_module, needs_cuda  # noqa: F401
from test_packing import batch, convert, leaves_of
from test_packing_errors import part
from test_packing_rows import check_float16_fill

from mmfast import LayerNorm, Layout, Part, RMSNorm, _native, from_padded, pack, to_padded, unpack
from mmfast.ops import _pack_layout, _pack_op, packing
from mmfast.ops._pack_op import _pack, _pack_backward
from mmfast.testing.numeric import assert_close_to_oracle, poisoned_empty

pytestmark = needs_cuda

LENGTHS = [[7, 0, 4], [0, 9, 3], [2, 1, 0]]


def moved(x):
    """Parts and arguments on the device, lengths too."""
    if isinstance(x, dict):
        return {k: moved(v) for k, v in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(moved(v) for v in x))
    if isinstance(x, (tuple, list)):
        return type(x)(moved(v) for v in x)
    return x.to(DEVICE) if torch.is_tensor(x) else x


def amid_nan(x):
    """Rows between rows of NaN."""
    x = x.to(DEVICE)
    wide = x.new_full((x.shape[0] + 2, *x.shape[1:]), float("nan"))
    wide[1:-1] = x
    return wide[1:-1]


def run(parts, kwargs, grad, backend):
    leaf = lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()  # noqa: E731
    parts, kwargs = convert(parts, leaf), convert(kwargs, leaf)
    x, _ = pack(parts, **kwargs, backend=backend)
    return [x, *torch.autograd.grad(x, leaves_of(parts, kwargs), grad.to(x.dtype))]


def check(parts, kwargs):
    """x and all gradients by the error rule."""
    parts, kwargs = moved(parts), moved(kwargs)
    tokens = [p[0] for p in parts.values()]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(sum(t.shape[0] for t in tokens), tokens[0].shape[1], generator=generator)
    grad = grad.to(DEVICE, tokens[0].dtype)
    with poisoned_empty():
        got = run(parts, kwargs, grad, "cuda")
    double = torch.Tensor.double
    want = run(convert(parts, double), convert(kwargs, double), grad, "reference")
    peer = run(parts, kwargs, grad, "reference")
    for i, (a, b, c) in enumerate(zip(got, want, peer)):
        assert_close_to_oracle("x" if i == 0 else f"gradient {i}", a, b, c, gradient=i > 0)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms", "bare", None])
@pytest.mark.parametrize("dim", [1, 7, 8, 24, 100])
def test_against_oracle(dtype, kind, dim):
    if dim > 1 or kind is None:
        check(*batch(dtype, dim, lengths=LENGTHS, kind=kind))


# One warp or several to a row, 8 to 32 elements to a thread, 16 bytes at a time or one number.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [256, 257, 264, 512, 513, 768, 1000, 1001, 1024, 1032, 4096, 8191, 8192])
def test_wide_rows(dtype, dim):
    kind = "rms" if dim % 2 else "layer"
    check(*batch(dtype, dim, lengths=[[3, 0, 1], [0, 2, 3], [2, 1, 0]], kind=kind))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["layer", None])
@pytest.mark.parametrize("dim", [40, 41, 520])
def test_parameters_in_float32(dtype, kind, dim):
    got = check(*batch(dtype, dim, lengths=LENGTHS, param_dtype=torch.float32, kind=kind))
    assert [g.dtype for g in got] == [dtype] * 4 + [torch.float32] * (len(got) - 4)


@pytest.mark.parametrize("dim", [12, 264, 520])
@pytest.mark.parametrize("positions", ["one", "two", "random", "own"])
def test_runs_that_cross_chunks(positions, dim):
    """Rows that share a table's row: all of them, runs of several chunks, runs that end with a chunk."""
    parts, kwargs = batch(torch.float32, dim, lengths=[[150], [40], [5]])
    place = parts["image"].positions
    if positions == "one":
        place = torch.zeros_like(place)
    elif positions == "two":
        place = (torch.arange(150, dtype=torch.int32) >= 64).to(torch.int32)[:, None].expand(-1, 2).contiguous()
    elif positions == "own":
        place = torch.arange(150, dtype=torch.int32)[:, None].expand(-1, 2).contiguous()
        tables = [torch.randn(151, dim), torch.randn(150, dim)]
        kwargs["position_embedding"] = dict(kwargs["position_embedding"], image=tables)
    parts["image"] = parts["image"]._replace(positions=place)
    check(parts, kwargs)


@pytest.mark.parametrize("dim", [4, 100, 300])
@pytest.mark.parametrize(("threads", "least"), [(131072, 1), (512, 3), (1, 1)])
def test_chunks_of_other_sizes(dim, threads, least, monkeypatch):
    monkeypatch.setattr(_pack_op, "_THREADS", threads)
    monkeypatch.setattr(_pack_op, "_CHUNK_ROWS", least)
    check(*batch(torch.float32, dim, lengths=[[30, 0, 3], [17, 6, 0], [1, 0, 8]]))


def test_many_parts():
    g = torch.Generator().manual_seed(3)
    parts, tables = {}, {}
    for i in range(16):
        rows = [0, 1, 17, 5][i % 4]
        positions = torch.randint(0, 6, (rows, 3), generator=g, dtype=torch.int32)
        parts[f"m{i}"] = Part(torch.randn(rows, 24, generator=g), [rows], positions if i % 3 else None)
        tables[f"m{i}"] = [torch.randn(17 if a == 0 else 6, 24, generator=g) for a in range(i % 3 + 1)]
    kwargs = {
        "type_embedding": torch.randn(16, 24, generator=g),
        "position_embedding": tables,
        "norm": LayerNorm(torch.randn(24, generator=g), None),
    }
    check(parts, kwargs)


def test_without_some_parts():
    """No type embedding, no tables, tables of a second axis only, one part, one row, no rows at all."""
    parts, kwargs = batch(torch.float32, 24, lengths=LENGTHS)
    check(parts, {"norm": kwargs["norm"]})
    check(parts, {"norm": kwargs["norm"], "type_embedding": kwargs["type_embedding"]})
    check(parts, {"norm": LayerNorm(None, kwargs["norm"].bias)})
    check(parts, {"position_embedding": {"image": kwargs["position_embedding"]["image"][:1]}})
    check({"image": parts["image"]}, {"position_embedding": {"image": kwargs["position_embedding"]["image"]}})
    for lengths in ([[], [], []], [[0], [0], [0]], [[0], [1], [0]], [[0, 0], [5, 0], [0, 0]]):
        check(*batch(lengths=lengths, dim=8))


@pytest.mark.parametrize("dim", [40, 300])
def test_partial_gradients(dim):
    """Each gradient alone has the bits that it has among all."""
    parts, kwargs = map(moved, batch(dim=dim, lengths=LENGTHS))
    grad = torch.randn(26, dim, device=DEVICE)
    _, *full = run(parts, kwargs, grad, "cuda")
    for i, want in enumerate(full):
        fresh, arguments = convert(parts, torch.clone), convert(kwargs, torch.clone)
        leaf = leaves_of(fresh, arguments)[i].requires_grad_()
        with poisoned_empty():
            (got,) = torch.autograd.grad(pack(fresh, **arguments, backend="cuda")[0], leaf, grad)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [7, 8])
def test_strided_tokens_and_gradients(dtype, first):
    """Rows amid NaN, aligned to 16 bytes and not; a gradient with strides."""
    parts, kwargs = map(moved, batch(dtype, dim=24, lengths=LENGTHS))
    wide = {}
    for name, p in parts.items():
        buffer = torch.full((p[0].shape[0], 104), float("nan"), device=DEVICE, dtype=dtype)
        buffer[:, first : first + 24] = p[0]
        wide[name] = Part(buffer[:, first : first + 24], *p[1:])
    want, _ = pack(parts, **kwargs, backend="cuda")
    got, _ = pack(wide, **kwargs, backend="cuda")
    torch.testing.assert_close(got, want, rtol=0 if first == 8 else 1e-2, atol=0 if first == 8 else 1e-2)
    check(wide, kwargs)
    leaf = wide["text"].tokens.requires_grad_()
    for grad in (torch.randn(26, 48, device=DEVICE, dtype=dtype)[:, ::2],
                 torch.randn(26, 32, device=DEVICE, dtype=dtype)[:, :24]):  # fmt: skip
        a, b = (torch.autograd.grad(pack(wide, **kwargs, backend="cuda")[0], leaf, g)[0] for g in (grad, grad.clone()))
        assert torch.equal(a, b) and not a.isnan().any()


@pytest.mark.parametrize("dim", [16, 520])
def test_backward_repeats_bit_equal(dim):
    parts, kwargs = map(moved, batch(torch.float32, dim, lengths=[[40, 0, 31], [0, 9, 3], [2, 1, 0]]))
    grad = torch.randn(86, dim, device=DEVICE)
    first = run(parts, kwargs, grad, "cuda")
    for _ in range(5 if DEVICE == "cpu" else 50):
        assert all(torch.equal(a, b) for a, b in zip(first, run(parts, kwargs, grad, "cuda")))


def test_large_mean():
    """The variance is that of the centred row: a sum of squares would have no digits left."""
    parts, kwargs = batch(torch.float32, 64, lengths=LENGTHS)
    parts = convert(parts, lambda t: t + 3000)
    check(parts, kwargs)


def test_limits(monkeypatch):
    with pytest.raises(RuntimeError, match="D is 8193; the CUDA kernels hold whole rows, up to 8192"):
        pack(moved({"a": part(dim=8193)}), backend="cuda")
    with pytest.raises(RuntimeError, match="dtype float64 is not supported by the CUDA kernels"):
        pack(moved({"a": part(dtype=torch.float64)}), backend="cuda")
    monkeypatch.setattr(packing, "checks_values", lambda device: True)
    for value in (9, -1):
        positions = torch.tensor([[0], [8], [value], [1]], dtype=torch.int32)
        tables = moved({"a": torch.zeros(9, 8)})
        with pytest.raises(ValueError, match=rf"position_embedding\[a\]: position {value} of row 2 on axis 0.*9 rows"):
            pack(moved({"a": part(positions=positions)}), position_embedding=tables, backend="cuda")


def test_a_wrong_position_touches_no_foreign_memory(monkeypatch):
    """Unless values are checked, a position outside its table adds nothing, and gets no gradient."""
    for module in (packing, _pack_layout):
        monkeypatch.setattr(module, "checks_values", lambda device: False)
    positions = torch.tensor([[0], [1 << 30], [-1], [1], [9]], dtype=torch.int32)
    table = amid_nan(torch.ones(9, 8)).requires_grad_()
    parts = moved({"a": part(rows=5, lengths=(5,), positions=positions)})
    x, _ = pack(parts, position_embedding={"a": table}, backend="cuda")
    assert x[:, 0].tolist() == [1, 0, 0, 1, 0]
    (grad,) = torch.autograd.grad(x.sum(), table)
    assert grad[:, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_wrong_rows_touch_no_foreign_memory():
    """A source outside its part, a part that is none: such rows are zero, and the others get their gradients."""
    tokens = [amid_nan(torch.full((n, 8), float(n))).requires_grad_() for n in (3, 2, 4)]
    source = torch.tensor([0, 1 << 40, 2, 3, 2, 5, -1, 4, 8], device=DEVICE)
    modality = torch.tensor([0, 0, 0, 1, 1, 1, 0, 200, 2], dtype=torch.uint8, device=DEVICE)
    rest = (source, modality, None, None, [], [0, 0, 0, 0], ["a", "b", "c"])
    x, *_ = _pack(tokens, *rest, 0, None, None, 0.0, "cuda")
    assert x[:, 0].tolist() == [3, 0, 3, 2, 0, 0, 0, 0, 4]
    weight = torch.ones(8, device=DEVICE)
    x, _, rstd = _pack(tokens, *rest, 2, weight, None, 1e-6, "cuda")
    a, b, c = torch.autograd.grad(x.sum(), tokens)
    assert torch.isfinite(rstd).all()
    assert all(torch.isfinite(g).all() for g in (a[[0, 2]], b[0], c[3]))


def test_rows_of_the_wrong_part_touch_no_foreign_memory():
    """More rows of the first part than it has: one lies where the second part's rows are looked for."""
    module, tokens = _native.cuda(), torch.ones(4, 8, device=DEVICE)
    source = torch.arange(4, device=DEVICE)
    modality = torch.tensor([0, 0, 0, 1], dtype=torch.uint8, device=DEVICE)
    position = torch.tensor([[0], [0], [5], [1]], dtype=torch.int32, device=DEVICE)
    tables, grads = ([amid_nan(torch.zeros(n, 8)) for n in (1, 2)] for _ in range(2))
    call = (tokens, [], source, modality, position, None, tables, [0, 1, 2], ["a", "b"], 0, None, None, None, None)
    wanted = ([None, None], None, grads, None, None, [2, 2], 0)
    key = torch.empty(4, dtype=torch.int32, device=DEVICE)
    module.pack_keys(*call, *wanted, key, 0)
    assert key.tolist() == [0, 0, 1, 3]
    for chunk_rows in (1, 16):
        workspace = torch.empty(2 * 4 * 8, device=DEVICE)
        module.pack_backward(*call, *wanted, torch.arange(4, device=DEVICE), key, chunk_rows, workspace, 0)
        assert grads[0][0, 0] == 2 and grads[1][:, 0].tolist() == [0, 1]
        for grad in grads:
            assert grad._base[[0, -1]].isnan().all()


def test_the_module_checks_what_python_does_not():
    module, tokens = _native.cuda(), torch.zeros(2, 8, device=DEVICE)
    source = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    modality = torch.zeros(2, dtype=torch.uint8, device=DEVICE)
    rest = (None, None, [], [0, 0], ["a"], 0, None, None, 0.0)
    with pytest.raises(ValueError, match="source has dtype int32; expected int64"):
        module.pack_forward([tokens], source.int(), modality, *rest, tokens, None, None, 0)
    with pytest.raises(ValueError, match="tokens has size 8 in dimension 1; expected 7"):
        module.pack_forward([tokens], source, modality, *rest, tokens[:, :7].contiguous(), None, None, 0)
    with pytest.raises(ValueError, match="x and out have different rows"):
        module.gather_rows([tokens, tokens[:, :7]], source, 0.0, torch.empty(2, 8, device=DEVICE), 0)
    with pytest.raises(RuntimeError, match="rows of 17 tensors; at most 16 are supported"):
        module.gather_rows([tokens] * 17, source, 0.0, torch.empty(2, 8, device=DEVICE), 0)
    grads = ([None], None, [], None, None, [2], -1)
    call = (tokens, [], source, modality, None, None, [], [0, 0], ["a"], 0, None, None, None, None)
    with pytest.raises(ValueError, match="order must be given"):
        module.pack_backward(*call, *grads, None, None, 1, tokens.new_empty(0), 0)
    grads = ([None], None, [], None, tokens[0], [2], -1)
    with pytest.raises(ValueError, match="workspace has 3 numbers; expected 16"):
        module.pack_backward(*call, *grads, source, None, 1, tokens.new_empty(3), 0)
    with pytest.raises(RuntimeError, match="D is more than 8192"):
        wide = torch.zeros(2, 8200, device=DEVICE)
        module.pack_forward([wide], source, modality, *rest, wide, None, None, 0)


# Rows


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 8), (3, 1500)])
def test_rows_of_any_dtype(dtype, shape):
    """Pieces of 1, 2, 4 and 16 bytes, one and several to a thread."""
    layout = Layout.from_lengths([3, 0, 5, 1]).to(DEVICE)
    x = (torch.randn(9, *shape) * 3).abs().to(DEVICE, dtype)
    value = 0.1 if dtype.is_floating_point else 1
    padded = to_padded(x, layout, length=5, value=value, backend="cuda")
    assert torch.equal(padded, to_padded(x, layout, length=5, value=value, backend="reference"))
    assert torch.equal(from_padded(padded, layout, 9, backend="cuda"), x)


def test_float16_is_filled_with_the_nearest():
    check_float16_fill("cuda", DEVICE)


def test_rows_wide_strided_and_outside():
    layout = Layout(torch.tensor([1, 4, 4, 9], dtype=torch.int32), seqused=torch.tensor([2, 0, 5], dtype=torch.int32))
    layout = layout.to(DEVICE)
    x = torch.randn(11, 2 * 1500, device=DEVICE)
    x[[0, 3, 9, 10]] = float("nan")
    x = x[:, 1::2][:, :1300].requires_grad_()
    padded = to_padded(x, layout, length=7, backend="cuda")
    assert torch.equal(padded, to_padded(x, layout, length=7, backend="reference"))
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert grad[:, 0].tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0]
    packed = from_padded(padded, layout, 11, backend="cuda")
    assert not packed[[0, 3, 9, 10]].any() and torch.equal(packed[1:3], x[1:3])


@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("first", [0, 7, 16])
def test_rows_amid_others(dtype, first):
    """Rows any stride apart, aligned to 16 bytes and not; scattered back, and there again."""
    layout = Layout.from_lengths([3, 0, 5, 1]).to(DEVICE)
    wide = (torch.randn(9, 80) * 3).abs().to(DEVICE, dtype)
    x = wide[:, first : first + 48]
    padded = to_padded(x, layout, length=5, backend="cuda")
    assert torch.equal(padded, to_padded(x, layout, length=5, backend="reference"))
    packed = from_padded(padded[:, :, 16:40], layout, 9, backend="cuda")
    assert torch.equal(packed, x[:, 16:40])


def test_rows_from_several_tensors_and_outside():
    parts = [amid_nan(torch.randn(n, 5)) for n in (3, 0, 4, 1)]
    index = torch.tensor([7, 0, 3, 2, 6, -1, 4, 1, 5, 2, 8, 1 << 40], device=DEVICE)
    inside = (index >= 0) & (index < 8)
    wanted = torch.cat(parts)[torch.where(inside, index, 0)] * inside[:, None]
    assert torch.equal(torch.ops.mmfast.gather_rows.default(parts, index, 0.0, "cuda"), wanted)
    index = torch.tensor([4, 1, 6, 7], device=DEVICE)  # the last is outside
    outs = torch.ops.mmfast.scatter_rows.default(parts[2], index, [3, 4], "cuda")
    assert torch.equal(torch.cat(outs)[index[:3]], parts[2][:3])
    assert not torch.cat(outs)[[0, 2, 3, 5]].any()


def test_unpack_twice_differentiable():
    parts, _ = batch(torch.float64, 4, lengths=LENGTHS)
    parts = moved(parts)
    x, layout = pack(parts, backend="reference")
    assert all(torch.equal(t, parts[n][0]) for n, t in unpack(x, layout, backend="cuda").items())
    leaf = x[:5].clone().requires_grad_()
    small = pack({"a": (x[:5], [3, 2])}, backend="reference")[1]
    assert torch.autograd.gradcheck(lambda t: unpack(t, small, backend="cuda")["a"].square(), leaf)
    assert torch.autograd.gradgradcheck(lambda t: unpack(t, small, backend="cuda")["a"].square(), leaf)


# Torch around it


def test_opcheck():
    parts, kwargs = map(moved, batch(dim=8, lengths=[[3, 1], [0, 2], [1, 1]]))
    _, layout = pack(parts, **kwargs, backend="reference")
    tokens = [p[0].requires_grad_() for p in parts.values()]
    tables = [*kwargs["position_embedding"]["image"], kwargs["position_embedding"]["text"]]
    norm: LayerNorm = kwargs["norm"]
    arguments = [tokens, layout.source, layout.modality, layout.position, kwargs["type_embedding"].requires_grad_(),
                 tables, [0, 2, 3, 3], list(parts), 1, norm.weight, norm.bias, 1e-5, "cuda"]  # fmt: skip
    torch.library.opcheck(_pack.op, arguments)
    arguments = convert(arguments, torch.Tensor.detach)
    x, mean, rstd = _pack(*arguments)
    needs = [True, False, True, True, True, False, True, True, False]
    sizes = [t.shape[0] for t in tokens]
    torch.library.opcheck(_pack_backward.op, [x, *arguments[:11], mean, rstd, sizes, needs, "cuda"])
    index = torch.tensor([2, -1, 0, 5], device=DEVICE)
    rows = torch.randn(8, 3, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.mmfast.gather_rows.default, ([rows], index, 0.5, "cuda"))
    torch.library.opcheck(torch.ops.mmfast.scatter_rows.default, (rows[:4], index, [7], "cuda"))


def test_second_derivative_raises():
    leaf = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    y, _ = pack({"a": (leaf, [4])}, norm=RMSNorm(), backend="cuda")
    (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        grad.sum().backward()


def test_compile():
    """Ragged batches, both directions: at most two compilations."""
    torch.compiler.reset()
    linear, types = torch.nn.Linear(8, 16).to(DEVICE), torch.randn(2, 8, device=DEVICE)
    norm, table = torch.nn.LayerNorm(8).to(DEVICE), torch.randn(9, 8, device=DEVICE, requires_grad=True)

    def step(image, text, lengths_image, lengths_text):
        parts = {"image": (linear(image)[:, :8], lengths_image), "text": (text, lengths_text)}
        x, layout = pack(parts, type_embedding=types, position_embedding={"text": table}, norm=norm, backend="cuda")
        padded = to_padded(x, layout, length=30, backend="cuda")
        return padded.square().sum(), unpack(x, layout, backend="cuda")["text"]

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for number in range(4):
        g = torch.Generator().manual_seed(number)
        lengths = torch.randint(1, 10, (2, 3 + number), generator=g, dtype=torch.int32)
        image, text = (torch.randn(int(n.sum()), 8, generator=g).to(DEVICE) for n in lengths)
        results = []
        for function in (compiled, step):
            loss, back = function(image, text, *lengths.to(DEVICE))
            results.append((loss, back, *torch.autograd.grad(loss, [*linear.parameters(), *norm.parameters(), table])))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2
    torch.compiler.reset()
