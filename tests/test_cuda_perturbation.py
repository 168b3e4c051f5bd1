"""The CUDA kernels of perturb_ and random_start_, with fibres for threads where there is no GPU."""

import math
from types import SimpleNamespace

import gpu_perturbation
import pytest
import torch
from cuda_cases import DEVICE, DTYPES, ON_GPU, cuda_kernels, cuda_module, needs_cuda  # noqa: F401
from test_perturbation import CASES, make, options

import mmfast
from mmfast import Layout, _native
from mmfast.ops._dispatch import use_backend
from mmfast.reference import perturbation as reference

pytestmark = needs_cuda
TILE, WARP_UNIT, TENSORS = 8192, 1024, 16  # kTile, kWarpUnit, kTensors of csrc/cuda/perturbation.cu


class TestCuda(gpu_perturbation.PerturbationTests):
    backend, device, dtypes = "cuda", DEVICE, DTYPES
    # Around the limits of a warp's unit, of a tile, and of two; lengths that 16 bytes divide, and others.
    shapes = (
        *gpu_perturbation.PerturbationTests.shapes,
        (9, WARP_UNIT),
        (2, WARP_UNIT + 1),
        (1, TILE),
        (2, TILE + 8),
        (1, 2 * TILE + 1),
    )

    @pytest.fixture
    def one_pass(self):
        """The shapes above, and what follows below, have units of one tile and of several."""

    @pytest.fixture
    def few_tensors(self):
        """See test_more_tensors_than_a_launch_takes."""


def check(tensors, keywords):
    return gpu_perturbation.check(tensors, keywords, "cuda", DEVICE)


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_samples_of_several_tiles(dtype, norm, granularity):
    """Samples that begin and end anywhere within tiles, rows as long as a sixteenth of one."""
    lengths = [0, 40, 1, 0, 0, 16, 17, 2, 0]
    layout = Layout.from_lengths(lengths).to(DEVICE)
    eps = torch.linspace(1, 9, len(lengths), device=DEVICE)
    for case, width in ((CASES[0], 520), (CASES[-1], 511)):
        more = options(case, norm=norm, eps=eps, step_size=0.3 * eps, granularity=granularity, layout=layout)
        check(make((sum(lengths), width), dtype, case), more)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_layout_with_gaps_over_several_tiles(norm):
    """Rows before, between and behind the samples are neither read nor written, and change no bit."""
    ends, used = torch.tensor([5, 40, 40, 91], dtype=torch.int32), torch.tensor([33, 0, 40], dtype=torch.int32)
    layout = Layout(ends, seqused=used).to(DEVICE)
    outside = layout.samples(100) == layout.batch
    clean = {k: v.to(DEVICE) for k, v in make((100, 500), torch.float32, CASES[-1]).items()}
    dirty = {k: v.masked_fill(outside[:, None], math.nan) for k, v in clean.items()}
    more = options(CASES[-1], norm=norm, eps=3.0, step_size=0.5, layout=layout)
    check(clean, more)
    for tensors in (clean, dirty):
        mmfast.perturb_(**tensors, **more, backend="cuda")
    for name in ("delta", "momentum", "previous"):
        assert torch.equal(clean[name][~outside], dirty[name][~outside])
        assert dirty[name][outside].isnan().all()
    kept = dirty["delta"].clone()
    mmfast.random_start_(kept, eps=1.0, norm=norm, seed=1, layout=layout, backend="cuda")
    assert kept[outside].isnan().all() and kept[~outside].isfinite().all()
    want = reference.random_start(kept, eps=1.0, norm=norm, seed=torch.tensor(1, device=DEVICE), layout=layout)
    torch.testing.assert_close(kept, want, rtol=2e-6, atol=2e-6, equal_nan=True)


def shifted(t):
    """A copy whose address 16 does not divide."""
    room = torch.full((t.numel() + 1,), math.nan, dtype=t.dtype, device=DEVICE)
    return room[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_that_16_does_not_divide(dtype):
    for case in (CASES[0], CASES[-1]):
        tensors = {k: v.to(DEVICE) for k, v in make((3, 1040), dtype, case).items()}
        more = options(case, eps=0.5, step_size=0.2)
        want = {k: v.clone() for k, v in tensors.items()}
        mmfast.perturb_(**want, **more, backend="cuda")
        for name in tensors:
            got = {k: shifted(v) if k == name else v.clone() for k, v in tensors.items()}
            mmfast.perturb_(**got, **more, backend="cuda")
            assert all(torch.equal(got[k], want[k]) for k in tensors), name


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_wrong_layouts_reach_no_other_memory(norm, granularity, monkeypatch):
    """The host does not look at cu_seqlens on a device: the kernels clamp."""
    monkeypatch.setattr(Layout, "_check_values", lambda *args: None)
    for ends, used in [
        ([-50, 4, 900, 12], None),
        ([9, 3, 2, 50], None),
        ([0, 4, 8, 12], [70, -3, 4]),
        ([2**31 - 1, -(2**31), 2**31 - 1, 5], [2**31 - 1] * 3),
    ]:
        ends = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        used = None if used is None else torch.tensor(used, dtype=torch.int32, device=DEVICE)
        layout = Layout(ends, seqused=used)
        rooms = {k: torch.full((36, 600), 7.0, device=DEVICE) for k in ("delta", "grad", "momentum", "previous")}
        inner = {k: room[12:24] for k, room in rooms.items()}
        more = {"norm": norm, "granularity": granularity, "layout": layout, "eps": 1.0}
        mmfast.perturb_(**inner, **more, step_size=0.5, decay=0.5, blend=0.5, backend="cuda")
        mmfast.random_start_(inner["delta"], **more, seed=1, backend="cuda")
        for room in rooms.values():
            assert (room[:12] == 7).all() and (room[24:] == 7).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_tensors_than_a_launch_takes(norm):
    count = 2 * TENSORS + 3
    tensors = [
        {k: v.to(DEVICE) for k, v in make((2, 8 + i), torch.float32, CASES[-1], i).items()} for i in range(count)
    ]
    more = {"norm": norm, "step_size": 0.1, "bounds": (0, 1), "decay": 0.9, "blend": 0.75, "backend": "cuda"}
    eps = [0.1 + 0.01 * i for i in range(count)]
    together = {k: [t[k].clone() for t in tensors] for k in tensors[0]}
    mmfast.perturb_(**together, **more, eps=eps)
    for i, t in enumerate(tensors):
        mmfast.perturb_(**t, **more, eps=eps[i])
        for name in ("delta", "momentum", "previous"):
            assert torch.equal(t[name], together[name][i])
    deltas = [t["delta"] for t in tensors]
    want = mmfast.random_start_([d.cpu().clone() for d in deltas], eps=eps, norm=norm, seed=5, backend="cpu")
    mmfast.random_start_(deltas, eps=eps, norm=norm, seed=5, backend="cuda")
    for got, one in zip(deltas, want):
        assert torch.equal(got.cpu(), one) if norm == "linf" else torch.allclose(got.cpu(), one, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linf_random_start_equals_the_cpu_kernel_bit_by_bit(dtype):
    """Over several tiles, for widths that 16 bytes divide and others, dense and packed."""
    layout = Layout(torch.tensor([2, 40, 40, 61], dtype=torch.int32))
    for width in (512, 511):
        for given in (None, layout):
            want, got = (torch.zeros(64, width, dtype=dtype) for _ in range(2))
            more = {"eps": 8 / 255, "seed": -(1 << 60) + 7}
            mmfast.random_start_(want, **more, layout=given, backend="cpu")
            got = got.to(DEVICE)
            mmfast.random_start_(got, **more, layout=given and given.to(DEVICE), backend="cuda")
            assert torch.equal(got.cpu(), want)


def test_large_norms_are_bit_equal_in_every_order():
    """The shim runs blocks and threads in another order each time."""

    def results():
        tensors = {k: v.to(DEVICE) for k, v in make((2, 3 * TILE + 5), torch.float32, CASES[-1]).items()}
        more = options(CASES[-1], norm="l2", eps=9.0, step_size=3.0)
        mmfast.perturb_(**tensors, **more, backend="cuda")
        mmfast.random_start_(tensors["grad"], eps=1.0, norm="l2", seed=3, backend="cuda")
        return tensors.values()

    first = list(results())
    for _ in range(50 if ON_GPU else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, results()))


def test_runs_only_where_it_is_asked_for():
    d, g = torch.zeros(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    calls = []
    module = SimpleNamespace(
        device=DEVICE, perturb_workspace=lambda *args: 0, perturb=lambda *args: calls.append("perturb")
    )
    with _native.use_cuda(module):
        mmfast.perturb_(d, g, step_size=0.1, eps=1.0)
        assert not calls
        mmfast.perturb_(d, g, step_size=0.1, eps=1.0, backend="cuda")
        with use_backend("cuda"):
            mmfast.perturb_(d, g, step_size=0.1, eps=1.0)
    assert calls == ["perturb"] * 2


def test_refusals(cuda_kernels):  # noqa: F811
    d = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="'cuda' cannot run: dtype float64"):
        mmfast.perturb_(d, d, step_size=0.1, eps=1.0, backend="cuda")
    d, none = d.float(), [None]
    arguments = ([d], [d], [], [], none, none, none, none, none, [0.1], [1.0], [0.0], [0.0], True, False, 0.0, 1.0)
    room = torch.empty(0, dtype=torch.float64, device=DEVICE)
    cuda_kernels.perturb(*arguments, room, 0)
    large = torch.zeros(2, TILE + 1, device=DEVICE)
    with pytest.raises(ValueError, match="workspace has 0 numbers; expected"):
        cuda_kernels.perturb([large], [large], *arguments[2:], room, 0)
    with pytest.raises(ValueError, match="grad must have delta's shape"):
        cuda_kernels.perturb([large], [d], *arguments[2:], room, 0)
    with pytest.raises(ValueError, match="momentum has dtype float16"):
        cuda_kernels.perturb([d], [d], [d.half()], *arguments[3:], room, 0)
