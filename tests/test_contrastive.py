"""contrastive_loss against the reference in float64, on every instruction set, and over two processes."""

import functools
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mmfast
from mmfast import _native
from mmfast.reference import contrastive as reference
from mmfast.testing.numeric import assert_close_to_oracle, poisoned_empty

pytestmark = pytest.mark.skipif(_native.cpu_refusal is not None, reason=str(_native.cpu_refusal))
ISAS = _native.available_isas() if _native.cpu_refusal is None else ()
DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("infonce", "sigmoid")


def features(n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    y = torch.randn(n, d, generator=generator) + x
    normalize = functools.partial(torch.nn.functional.normalize, dim=1)
    return normalize(x).to(dtype), normalize(y).to(dtype), torch.randint(0, n // 2 + 1, (n,), generator=generator)


def run(x, y, ids, kind, backend, dtype, scale=15.0, bias=-4.0, **more):
    """loss and gradients of x, y, scale (and bias)."""
    x, y = (t.to(dtype, copy=True).requires_grad_() for t in (x, y))
    number = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = {"scale": torch.tensor(scale, dtype=number, requires_grad=True)}
    if kind == "sigmoid":
        numbers["bias"] = torch.tensor(bias, dtype=number, requires_grad=True)
    loss = mmfast.contrastive_loss(x, y, kind=kind, ids=ids, backend=backend, **numbers, **more)
    return [loss.detach(), *torch.autograd.grad(loss, [x, y, *numbers.values()])]


def check(x, y, ids, kind):
    dtype = x.dtype
    oracle, same = (run(x, y, ids, kind, "reference", t) for t in (torch.float64, dtype))
    with poisoned_empty():
        actual = run(x, y, ids, kind, "cpu", dtype)
    for name, got, want, peer in zip(("loss", "dx", "dy", "dscale", "dbias"), actual, oracle, same):
        if want.dim():
            assert_close_to_oracle(name, got, want, peer, gradient=True)
        else:  # one number may be right by chance in the peer: no measure
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_against_the_oracle(isa, dtype, kind):
    with _native.use_isa(isa):
        sizes = [(1, 16), (2, 7), (63, 24), (65, 32), (129, 80), (523, 16)]
        for n, d in [*sizes, *([(1100, 48)] if isa == ISAS[-1] else [])]:  # several blocks of a chunk
            x, y, ids = features(n, d, dtype)
            check(x, y, None, kind)
            check(x, y, ids, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_a_rectangle(dtype):
    """What one of several ranks computes: fewer rows than columns, positives off the diagonal."""
    from mmfast.ops.contrastive import _infonce, _sigmoid

    x, y, ids = features(300, 32, dtype)
    rows = slice(100, 230)
    scale, bias = torch.tensor(9.0), torch.tensor(-2.0)
    for few, all_ids in [(None, None), (ids[rows], ids)]:
        args = (few, all_ids, 100)
        want = reference.infonce_statistics(x[rows].double(), y.double(), scale.double(), *args)
        peer = reference.infonce_statistics(x[rows], y, scale, *args)
        for name, a, b, c in zip(
            ("row", "column", "diagonal"), _infonce(x[rows], y, scale, *args, False, "cpu"), want, peer
        ):
            assert_close_to_oracle(name, a, b, c)
        want = reference.sigmoid_rows(x[rows].double(), y.double(), scale.double(), bias.double(), *args)
        peer = reference.sigmoid_rows(x[rows], y, scale, bias, *args)
        for gradients in (False, True):
            got = _sigmoid(x[rows], y, scale, bias, *args, gradients, "cpu")[0]
            torch.testing.assert_close(got.double(), want.mean(), rtol=1e-5, atol=(peer - want).abs().max().item())


def test_columns_that_no_row_counts_for():
    from mmfast.ops.contrastive import _infonce

    x, y, _ = features(4, 16)
    ids_y = torch.tensor([7, 7, 1, 2, 3, 7])
    args = (torch.tensor([7, 7, 7, 7]), ids_y, 2)
    y = torch.cat([y, y[:2]])
    scale = torch.tensor(5.0, requires_grad=True)
    x.requires_grad_()
    got, want = _infonce(x, y, scale, *args, False, "cpu")[:3], reference.infonce_statistics(x, y, scale, *args)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert got[1][0] == -torch.inf and got[1][2].isfinite()
    used = got[1].isfinite()
    grads = [torch.autograd.grad((r + d).sum() + c[used].sum(), [x, scale]) for r, c, d in (got, want)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -3.0, 200.0, 2000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scales(kind, scale):
    x, y, ids = features(200, 32)
    got = run(x, y, ids, kind, "cpu", torch.float32, scale=scale)
    want = run(x, y, ids, kind, "reference", torch.float64, scale=scale)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * max(1, b.abs().max().item()))


def test_known_values():
    """All scores equal: log N; with a bias of 0 every pair of the sigmoid loss costs log 2."""
    x = torch.zeros(100, 16)
    x[:, 0] = 1
    torch.testing.assert_close(mmfast.contrastive_loss(x, x, scale=3.0), torch.tensor(100.0).log())
    zero = torch.zeros(100, 16)
    got = mmfast.contrastive_loss(zero, zero, scale=3.0, bias=0.0, kind="sigmoid")
    torch.testing.assert_close(got, 100 * torch.tensor(2.0).log())
    same = torch.zeros(100, dtype=torch.int64)  # no negatives at all
    assert abs(mmfast.contrastive_loss(x, x, scale=3.0, ids=same).item()) < 1e-6


def test_nan_and_infinity_are_not_hidden():
    for kind in KINDS:
        x, y, _ = features(200, 32)
        x[150, 3] = torch.nan
        assert mmfast.contrastive_loss(x, y, scale=5.0, kind=kind).isnan()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_repetition_change_no_bit(dtype, kind):
    before = torch.get_num_threads()
    x, y, ids = features(1500, 40, dtype)
    results = []
    try:
        for threads in (1, 2, 3, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(x, y, ids, kind, "cpu", dtype))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result[1:], results[0][1:]))


def test_wrong_arguments_change_the_result():
    x, y, ids = features(130, 32)
    right = run(x, y, ids, "sigmoid", "reference", torch.float64)
    for wrong in [{"scale": 15.01}, {"bias": -4.01}]:
        got = run(x, y, ids, "sigmoid", "cpu", torch.float32, **wrong)
        assert (got[1] - right[1]).abs().max() > 1e-4 * right[1].abs().max()
    other = ids.clone()
    other[0] = ids.max() + 1
    other[1] = other[0]
    for kind in KINDS:
        a, b = (run(x, y, i, kind, "cpu", torch.float32) for i in (ids, other))
        assert (a[1] - b[1]).abs().max() > 1e-5 * a[1].abs().max()


def test_partial_gradients_half_strides_autocast_checkpoint():
    x, y, _ = features(90, 24)
    want = run(x, y, None, "infonce", "cpu", torch.float32)
    frozen = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(mmfast.contrastive_loss(frozen, y, scale=15.0), frozen)
    torch.testing.assert_close(dx, want[1])
    half = run(x, y, None, "infonce", "cpu", torch.float16)
    assert half[1].dtype == torch.float16
    torch.testing.assert_close(half[1].float(), want[1], rtol=1e-2, atol=1e-4)
    strided = torch.stack([x, x], 2)[..., 0]
    torch.testing.assert_close(mmfast.contrastive_loss(strided, y, scale=15.0), want[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss = mmfast.contrastive_loss(frozen, y, scale=15.0)
    torch.testing.assert_close(
        loss, mmfast.contrastive_loss(x.bfloat16(), y.bfloat16(), scale=15.0).detach().requires_grad_()
    )
    loss = torch.utils.checkpoint.checkpoint(
        lambda a: mmfast.contrastive_loss(a, y, scale=15.0), frozen, use_reentrant=False
    )
    torch.testing.assert_close(torch.autograd.grad(loss, frozen)[0], want[1])


def test_reference_gradients():
    x, y, ids = features(6, 5)
    x, y = x.double().requires_grad_(), y.double().requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def infonce(x, y, scale):
        return mmfast.contrastive_loss(x, y, scale=scale, ids=ids, backend="reference")

    def sigmoid(x, y, scale, bias):
        return mmfast.contrastive_loss(x, y, scale=scale, bias=bias, kind="sigmoid", ids=ids, backend="reference")

    assert torch.autograd.gradcheck(infonce, (x, y, scale)) and torch.autograd.gradgradcheck(infonce, (x, y, scale))
    inputs = (x, y, scale, bias)
    assert torch.autograd.gradcheck(sigmoid, inputs) and torch.autograd.gradgradcheck(sigmoid, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_no_double_backward(kind):
    x, y, _ = features(20, 16)
    x.requires_grad_()
    (g,) = torch.autograd.grad(mmfast.contrastive_loss(x, y, scale=2.0, kind=kind), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        g.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    def loss(x, y, scale, bias, ids):
        more = {"bias": bias} if kind == "sigmoid" else {}
        return mmfast.contrastive_loss(x, y, scale=scale.exp(), kind=kind, ids=ids, **more)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (40, 70):
        x, y, ids = features(n, 20)
        x.requires_grad_()
        scale, bias = (torch.tensor(v, requires_grad=True) for v in (2.0, -3.0))
        used = [x, scale] + ([bias] if kind == "sigmoid" else [])
        want, got = (torch.autograd.grad(f(x, y, scale, bias, ids), used) for f in (loss, compiled))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, kept", [(1, 1), (63, 63), (200, 200), (1100, 1100), (1100, 600)])
def test_kept_products_change_no_bit(n, kept, dtype, isa, monkeypatch):
    from mmfast.ops import contrastive as op

    x, y, ids = features(n, 48, dtype)

    def gradients(rows):
        monkeypatch.setattr(op, "_KEPT_PRODUCTS", rows * 64 * ((n + 63) // 64))
        leaves = [t.detach().clone().requires_grad_() for t in (x, y, torch.tensor(9.0))]
        with _native.use_isa(isa), poisoned_empty():
            loss = mmfast.contrastive_loss(*leaves[:2], scale=leaves[2], ids=ids, backend="cpu")
            return [loss, *torch.autograd.grad(loss, leaves)]

    assert all(torch.equal(a, b) for a, b in zip(gradients(kept), gradients(0)))


def test_memory_grows_with_n():
    """16,384 pairs have 1 GiB of scores; a step needs 64 MiB of kept products beside features and gradients."""
    code = """
import resource, torch, mmfast
x, y = (torch.nn.functional.normalize(torch.randn(16384, 16), dim=1).requires_grad_() for _ in range(2))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
def step(n, kind): mmfast.contrastive_loss(x[:n], y[:n], scale=5.0, kind=kind).backward()
for kind in ("infonce", "sigmoid"): step(64, kind)
before = peak()
for kind in ("infonce", "sigmoid"): step(16384, kind)
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 64 + 48, out.stdout


def test_opcheck():
    from mmfast.ops.contrastive import _infonce, _sigmoid

    x, y, ids = features(20, 16)
    x.requires_grad_()
    scale, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    torch.library.opcheck(_infonce.op, (x, y, scale, ids, ids, 0, True, "cpu"))
    torch.library.opcheck(_infonce.op, (x, y, scale, ids, ids, 0, False, "cpu"))
    torch.library.opcheck(_sigmoid.op, (x, y, scale, bias, None, None, 0, True, "cpu"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "triplet"}, "kind is 'triplet'"),
        ({"y": torch.zeros(3, 8)}, r"y is float32 \[3, 8\]"),
        ({"x": torch.zeros(4), "y": torch.zeros(4)}, r"x is float32 \[4\]"),
        ({"x": torch.zeros(0, 8), "y": torch.zeros(0, 8)}, "N >= 1"),
        ({"bias": 1.0}, "bias belongs to kind='sigmoid'"),
        ({"ids": torch.zeros(4)}, "ids are float32"),
        ({"scale": torch.ones(2)}, "expected one number"),
        ({"scale": None}, "scale must be a number or a torch.Tensor, got NoneType"),
        ({"x": [[1.0]]}, "x must be a torch.Tensor, got list"),
        ({"ids": [1, 2, 3, 4]}, "ids must be a torch.Tensor, got list"),
        ({"y": torch.zeros(4, 8).bfloat16()}, r"y is bfloat16 \[4, 8\]"),
        ({"x": torch.zeros(4, 8).int(), "y": torch.zeros(4, 8).int()}, "x is int32"),
    ],
)
def test_errors(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mmfast.contrastive_loss(**{"x": torch.zeros(4, 8), "y": torch.zeros(4, 8), "scale": 1.0, **change})
    double = torch.zeros(4, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        mmfast.contrastive_loss(double, double, scale=1.0, backend="cpu")


def _worker(rank, world, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    x, y, ids = features(60, 24)
    mine = slice(rank * 30, (rank + 1) * 30)
    for kind in KINDS:
        for i in (None, ids):
            for backend in ("cpu", "reference"):
                own = None if i is None else i[mine]
                want = run(x, y, i, kind, backend, torch.float32)
                got = run(x[mine], y[mine], own, kind, backend, torch.float32, group=dist.group.WORLD)
                torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
                for a, b in zip(got[1:3], want[1:3]):
                    torch.testing.assert_close(a / world, b[mine], rtol=1e-4, atol=1e-6)
                for a, b in zip(got[3:], want[3:]):
                    dist.all_reduce(a)
                    torch.testing.assert_close(a / world, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="equally many"):
        mmfast.contrastive_loss(x[: 30 + rank], y[: 30 + rank], scale=1.0, group=dist.group.WORLD)
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(_worker, args=(2, tmp_path / "store"), nprocs=2)
