"""The Triton kernels of contrastive_loss, interpreted where there is no GPU."""

import pytest
import torch
from test_contrastive import KINDS, features, run
from triton_cases import DEVICE, DTYPES, needs_triton

import mmfast
from mmfast.ops import contrastive as op
from mmfast.reference import contrastive as reference
from mmfast.testing.numeric import assert_close_to_oracle, poisoned_empty

pytestmark = needs_triton


def on_device(*tensors):
    return [t.to(DEVICE) for t in tensors]


def results(x, y, ids, kind, backend, dtype, **more):
    """As `run`, with scale and bias on the device."""
    if DEVICE == "cpu":
        return run(x, y, ids, kind, backend, dtype, **more)
    with torch.device(DEVICE):
        return run(x, y, ids, kind, backend, dtype, **more)


def check(x, y, ids, kind):
    dtype = x.dtype
    oracle, same = (results(x, y, ids, kind, "reference", t) for t in (torch.float64, dtype))
    with poisoned_empty():
        actual = results(x, y, ids, kind, "triton", dtype)
    for name, got, want, peer in zip(("loss", "dx", "dy", "dscale", "dbias"), actual, oracle, same):
        if want.dim():
            assert_close_to_oracle(name, got, want, peer, gradient=True)
        else:  # one number may be right by chance in the peer: no measure
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", [(1, 16), (2, 7), (63, 24), (65, 32), (129, 150)])
def test_against_oracle(n, d, dtype, kind):
    x, y, ids = on_device(*features(n, d, dtype))
    check(x, y, None, kind)
    check(x, y, ids, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_several_chunks_and_bands(kind, monkeypatch):
    """Programs of several tiles, and derivatives in several bands."""
    from mmfast.kernels import contrastive as kernels

    monkeypatch.setattr(kernels, "PARTS", 2)
    monkeypatch.setattr(kernels, "BAND", 64 * 256)
    x, y, ids = on_device(*features(200, 24))
    check(x, y, ids, kind)
    monkeypatch.setattr(op, "_KEPT_PRODUCTS", 0)
    check(x, y, ids, kind)
    check(x, y, None, kind)


@pytest.mark.parametrize("kept", [0, 1 << 22])
def test_kept_products_change_no_bit(kept, monkeypatch):
    x, y, ids = on_device(*features(150, 48))
    want = results(x, y, ids, "infonce", "triton", torch.float32)
    monkeypatch.setattr(op, "_KEPT_PRODUCTS", kept)
    assert all(torch.equal(a, b) for a, b in zip(want, results(x, y, ids, "infonce", "triton", torch.float32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_a_rectangle(dtype):
    """What one of several ranks computes: fewer rows than columns, positives off the diagonal."""
    x, y, ids = on_device(*features(180, 32, dtype))
    rows = slice(50, 130)
    scale, bias = on_device(torch.tensor(9.0), torch.tensor(-2.0))
    for few, all_ids in [(None, None), (ids[rows], ids)]:
        args = (few, all_ids, 50)
        want = reference.infonce_statistics(x[rows].double(), y.double(), scale.double(), *args)
        peer = reference.infonce_statistics(x[rows], y, scale, *args)
        got = op._infonce(x[rows], y, scale, *args, False, "triton")
        for name, a, b, c in zip(("row", "column", "diagonal"), got, want, peer):
            assert_close_to_oracle(name, a, b, c)
        want = reference.sigmoid_rows(x[rows].double(), y.double(), scale.double(), bias.double(), *args)
        peer = reference.sigmoid_rows(x[rows], y, scale, bias, *args)
        for gradients in (False, True):
            got = op._sigmoid(x[rows], y, scale, bias, *args, gradients, "triton")[0]
            torch.testing.assert_close(got.double(), want.mean(), rtol=1e-5, atol=(peer - want).abs().max().item())


def test_columns_that_no_row_counts_for():
    x, y, _ = features(4, 16)
    ids_y = torch.tensor([7, 7, 1, 2, 3, 7])
    x, y, ids_x, ids_y = on_device(x, torch.cat([y, y[:2]]), torch.tensor([7, 7, 7, 7]), ids_y)
    args = (ids_x, ids_y, 2)
    scale = torch.tensor(5.0, device=DEVICE, requires_grad=True)
    x.requires_grad_()
    got = op._infonce(x, y, scale, *args, False, "triton")[:3]
    want = reference.infonce_statistics(x, y, scale, *args)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert got[1][0] == -torch.inf and got[1][2].isfinite()
    used = got[1].isfinite()
    grads = [torch.autograd.grad((r + d).sum() + c[used].sum(), [x, scale]) for r, c, d in (got, want)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -3.0, 200.0, 2000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scales(kind, scale):
    x, y, ids = on_device(*features(100, 32))
    got = results(x, y, ids, kind, "triton", torch.float32, scale=scale)
    want = results(x, y, ids, kind, "reference", torch.float64, scale=scale)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * max(1, b.abs().max().item()))


def test_rare_negatives_are_counted():
    """With a bias of -16 a negative pair of the sigmoid loss costs e^-16: 1 + e^-16 is 1 or twice as far from it."""
    x = torch.zeros(100, 16, device=DEVICE)
    *_, dbias = results(x, x, None, "sigmoid", "triton", torch.float32, bias=-16.0)
    torch.testing.assert_close(dbias.cpu(), torch.tensor(99 * 1.1253516e-7 - 1), rtol=1e-6, atol=0)
    one = mmfast.contrastive_loss(x[:1], x[:1], scale=1.0, bias=16.0, kind="sigmoid", backend="triton")
    torch.testing.assert_close(one.cpu(), torch.tensor(1.1253517e-7), rtol=1e-5, atol=0)


def test_float16_gradients_do_not_vanish():
    """Of many pairs each derivative may be far below float16's smallest number, and with a loss scale far above 1."""
    x, y, _ = on_device(*features(100, 16, torch.float16))
    scale, grads = torch.tensor(9.0, device=DEVICE), []
    for factor in (1e-4, 1.0, 1000.0):
        leaf = x.clone().requires_grad_()
        row, column, diagonal, _ = op._infonce(leaf, y, scale, None, None, 0, True, "triton")
        total = (factor * (row + column - 2 * diagonal)).sum()
        grads.append(torch.autograd.grad(total, leaf)[0].double() / factor)
    assert grads[1].abs().max() > 1
    for other in (grads[0], grads[2]):
        torch.testing.assert_close(other, grads[1], rtol=2e-3, atol=2e-3)


def test_known_values():
    x = torch.zeros(100, 16, device=DEVICE)
    x[:, 0] = 1
    loss = mmfast.contrastive_loss(x, x, scale=3.0, backend="triton")
    torch.testing.assert_close(loss.cpu(), torch.tensor(100.0).log())
    zero = torch.zeros(100, 16, device=DEVICE)
    got = mmfast.contrastive_loss(zero, zero, scale=3.0, bias=0.0, kind="sigmoid", backend="triton")
    torch.testing.assert_close(got.cpu(), 100 * torch.tensor(2.0).log())
    same = torch.zeros(100, dtype=torch.int64, device=DEVICE)  # no negatives at all
    assert abs(mmfast.contrastive_loss(x, x, scale=3.0, ids=same, backend="triton").item()) < 1e-6
    for kind in KINDS:
        x[70, 3] = torch.nan
        assert mmfast.contrastive_loss(x, zero, scale=5.0, kind=kind, backend="triton").isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_repetition_changes_no_bit(kind):
    x, y, ids = on_device(*features(150, 40))
    first = results(x, y, ids, kind, "triton", torch.float32)
    for _ in range(2 if DEVICE == "cpu" else 50):
        assert all(torch.equal(a, b) for a, b in zip(first, results(x, y, ids, kind, "triton", torch.float32)))


def test_wrong_arguments_are_noticed():
    x, y, ids = on_device(*features(130, 32))
    right = results(x, y, ids, "sigmoid", "reference", torch.float64)
    for wrong in [{"scale": 15.01}, {"bias": -4.01}]:
        got = results(x, y, ids, "sigmoid", "triton", torch.float32, **wrong)
        assert (got[1] - right[1]).abs().max() > 1e-4 * right[1].abs().max()
    other = ids.clone()
    other[:2] = ids.max() + 1
    for kind in KINDS:
        a, b = (results(x, y, i, kind, "triton", torch.float32) for i in (ids, other))
        assert (a[1] - b[1]).abs().max() > 1e-5 * a[1].abs().max()


def test_partial_gradients_and_no_double_backward():
    x, y, _ = on_device(*features(90, 24))
    want = results(x, y, None, "infonce", "triton", torch.float32)
    frozen = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(mmfast.contrastive_loss(frozen, y, scale=15.0, backend="triton"), frozen)
    assert torch.equal(dx, want[1])
    for kind in KINDS:
        loss = mmfast.contrastive_loss(frozen, y, scale=2.0, kind=kind, backend="triton")
        (g,) = torch.autograd.grad(loss, frozen, create_graph=True)
        with pytest.raises(NotImplementedError, match="reference"):
            g.sum().backward()


def test_opcheck():
    x, y, ids = on_device(*features(20, 16))
    x.requires_grad_()
    scale, bias = (torch.tensor(v, device=DEVICE, requires_grad=True) for v in (2.0, 1.0))
    for gradients in (True, False):
        torch.library.opcheck(op._infonce, (x, y, scale, ids, ids, 0, gradients, "triton"))
    torch.library.opcheck(op._sigmoid, (x, y, scale, bias, None, None, 0, True, "triton"))
