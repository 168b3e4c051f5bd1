"""perturb_ and random_start_ against the reference in float64, on every instruction set."""

import math

import pytest
import torch

import mmfast
from mmfast import Layout, _native
from mmfast.ops import perturbation as ops
from mmfast.reference import perturbation as reference
from mmfast.testing.numeric import assert_close_to_oracle

pytestmark = pytest.mark.skipif(_native.cpu_refusal is not None, reason=str(_native.cpu_refusal))
ISAS = _native.available_isas() if _native.cpu_refusal is None else ()
DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    {},
    {"box": True},
    {"momentum": True},
    {"previous": True},
    {"previous": True, "box": True, "momentum": True},
]


def make(shape, dtype, case, seed=0, eps=0.5):
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    tensors = {"delta": noise(0.3).clamp(-eps, eps), "grad": noise(1e-3)}
    if case.get("box"):
        tensors["origin"] = torch.rand(shape, generator=generator).to(dtype)
    if case.get("momentum"):
        tensors["momentum"] = noise(0.01)
    if case.get("previous"):
        tensors["previous"] = noise(0.3).clamp(-eps, eps)
    return tensors


def options(case, **more):
    result = dict(more)
    if case.get("box"):
        result["bounds"] = (0.0, 1.0)
    if case.get("momentum"):
        result["decay"] = 0.9
    if case.get("previous"):
        result["blend"] = 0.75
    return result


def check(tensors, keywords):
    """Runs the kernel on copies and compares delta, momentum and previous with the oracle."""
    oracle = reference.perturb(**{k: v.double() for k, v in tensors.items()}, **keywords)
    same = reference.perturb(**tensors, **keywords)
    actual = {k: v.clone() for k, v in tensors.items()}
    mmfast.perturb_(**actual, **keywords, backend="cpu")
    for name, want, peer in zip(("delta", "momentum", "previous"), oracle, same):
        if want is not None:
            assert_close_to_oracle(name, actual[name], want, peer)
    return actual


@pytest.mark.parametrize("case", CASES, ids=lambda c: "+".join(c) or "plain")
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_dense(isa, dtype, norm, case):
    with _native.use_isa(isa):
        for shape in [(3, 5), (2, 3, 17, 16), (1, 70_001), (4, 1), (5, 2, 64)]:
            eps = 0.5 if norm == "linf" else 0.2 * math.sqrt(math.prod(shape[1:]))
            step = 0.2 if norm == "linf" else 0.5 * eps
            check(make(shape, dtype, case), options(case, norm=norm, eps=eps, step_size=step))


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_packed_with_limits_per_sample(isa, dtype, norm, granularity):
    lengths = [0, 1, 17, 0, 129, 3]
    layout = Layout.from_lengths(lengths)
    eps = torch.linspace(0.1, 2, len(lengths))
    with _native.use_isa(isa):
        for case in CASES:
            tensors = make((sum(lengths), 24), dtype, case)
            check(
                tensors, options(case, norm=norm, eps=eps, step_size=0.3 * eps, granularity=granularity, layout=layout)
            )


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_rows_outside_the_layout(norm, granularity):
    layout = Layout(torch.tensor([2, 7, 7, 20], dtype=torch.int32), seqused=torch.tensor([3, 0, 13], dtype=torch.int32))
    outside = layout.samples(25) == layout.batch
    case = CASES[-1]
    clean = make((25, 16), torch.float32, case)
    dirty = {k: v.clone() for k, v in clean.items()}
    for v in dirty.values():
        v[outside] = float("nan")
    keywords = options(case, norm=norm, eps=1.0, step_size=0.3, granularity=granularity, layout=layout)
    mmfast.perturb_(**clean, **keywords)
    mmfast.perturb_(**dirty, **keywords)
    for name in ("delta", "momentum", "previous"):
        assert torch.equal(clean[name][~outside], dirty[name][~outside])
        assert dirty[name][outside].isnan().all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_list_equals_one_by_one(norm):
    shapes = [(3, 8, 4), (3, 100), (3, 2)]
    tensors = [make(s, torch.float32, CASES[-1], seed=i) for i, s in enumerate(shapes)]
    keywords = {"norm": norm, "decay": 0.9, "blend": 0.75}
    eps, steps, bounds = [0.1, torch.tensor([0.5, 1, 2]), 3.0], [0.1, 0.2, torch.ones(3)], [(0, 1), None, (-1, 2)]
    alone = [{k: v.clone() for k, v in t.items()} for t in tensors]
    for i, t in enumerate(alone):
        mmfast.perturb_(**t, **keywords, eps=eps[i], step_size=steps[i], bounds=bounds[i])
    together = {k: [t[k].clone() for t in tensors] for k in tensors[0]}
    mmfast.perturb_(**together, **keywords, eps=eps, step_size=steps, bounds=bounds)
    for i, t in enumerate(alone):
        for name in ("delta", "momentum", "previous"):
            assert torch.equal(t[name], together[name][i])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("norm, granularity", [("linf", "sample"), ("l2", "sample"), ("l2", "token")])
def test_every_thread_has_its_share(norm, granularity, threads):
    """More than one group for each thread, cut within samples, at empty ones and between tensors."""
    layout = Layout.from_lengths([0, 0, 3000, 1, 0, 4900, 1500, 0])
    shapes = [(9401, 24), (0, 5), (70, 1001), (1, 120_000), (3, 0)]
    layouts = [layout, None, None, None, None]
    tensors = [make(s, torch.float32, CASES[-1], seed=i) for i, s in enumerate(shapes)]
    keywords = {"norm": norm, "granularity": granularity, "eps": 0.4, "step_size": 0.1, **options(CASES[-1])}
    together = {k: [t[k].clone() for t in tensors] for k in tensors[0]}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        mmfast.perturb_(**together, **keywords, layout=layouts, backend="cpu")
    finally:
        torch.set_num_threads(before)
    for i, (t, own) in enumerate(zip(tensors, layouts)):
        oracle = reference.perturb(**{k: v.double() for k, v in t.items()}, **keywords, layout=own)
        same = reference.perturb(**t, **keywords, layout=own)
        for name, want, peer in zip(("delta", "momentum", "previous"), oracle, same):
            if want.numel():
                assert_close_to_oracle(f"{name} {i}", together[name][i], want, peer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_at_once_equals_step_by_step(norm, granularity, dtype, monkeypatch):
    for case in CASES[:2]:
        for bounds in [(0, 1), (-0.25, 0.75)] if case else [None]:
            tensors = make((3, 5, 24), dtype, case)
            keywords = {"norm": norm, "granularity": granularity, "eps": 1, "step_size": -0.1, "bounds": bounds}
            inputs = [tensors["delta"].clone().requires_grad_() for _ in range(2)]
            short, full = inputs
            origin = tensors.get("origin")
            assert ops._step_at_once(short, tensors["grad"], origin=origin, **keywords)
            monkeypatch.setattr(ops, "_step_at_once", lambda *args: False)
            mmfast.perturb_(full, tensors["grad"], origin=origin, **keywords)
            monkeypatch.undo()
            assert torch.equal(short, full) and not torch.equal(short, tensors["delta"])
            assert short._version == full._version > 0


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [
        {"delta": torch.zeros(3, 8).as_subclass(Sub)},
        {"delta": torch.zeros(3, 8).half()},
        {"delta": torch.zeros(3, 8).double()},
        {"delta": torch.zeros(8, 3).T},
        {"delta": torch._neg_view(torch.zeros(3, 8))},
        {"delta": [torch.zeros(3, 8)]},
        {"delta": torch.zeros(3, 8), "grad": None},
        {"grad": torch.ones(3, 7)},
        {"grad": torch.ones(3, 8).to_sparse()},
        {"grad": torch.ones(3, 8, device="meta")},
        {"step_size": torch.ones(3)},
        {"step_size": math.nan},
        {"eps": -1.0},
        {"eps": math.nan},
        {"norm": "l1"},
        {"granularity": "row"},
        {"origin": torch.ones(3, 8)},
        {"bounds": (0, 1)},
        {"origin": torch.ones(3, 8), "bounds": [(0, 1)]},
        {"origin": torch.ones(3, 8), "bounds": (1, 0)},
        {"origin": torch.ones(3, 8), "bounds": (0, math.nan)},
        {"origin": torch.ones(3, 8), "bounds": torch.tensor([0.0, 1.0])},
    ],
    ids=lambda change: "+".join(
        f"{k} {v if isinstance(v, (int, float, str)) else type(v).__name__}" for k, v in change.items()
    ),
)
def test_not_at_once(change):
    """What is not simple, or wrong, changes nothing."""
    arguments = {"delta": torch.zeros(3, 8), "grad": torch.ones(3, 8), "step_size": 1.0, "eps": 1.0, "norm": "linf"}
    arguments |= {"granularity": "sample", "origin": None, "bounds": None, **change}
    assert not ops._step_at_once(**arguments)
    delta = arguments["delta"]
    assert not (delta[0] if isinstance(delta, list) else delta).any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_strange_gradients(norm, backend):
    inf, nan = math.inf, math.nan
    grad = torch.tensor([[0, 0, 0], [nan, 0, 0], [nan, 2, -1], [inf, 1, 0], [-inf, inf, nan], [1e-38, 0, -1e-38]])
    grad = torch.cat([grad, torch.tensor([[1e-44, 0, 0], [3e38, 3e38, 0], [1e-25, 1e-25, 0]])])
    delta = torch.zeros_like(grad)
    mmfast.perturb_(delta, grad, step_size=1.0, eps=2.0, norm=norm, backend=backend)
    s, u = math.sqrt(0.5), math.sqrt(0.2)
    if norm == "linf":
        want = grad.nan_to_num(nan=0).sign()
    else:
        want = [[0, 0, 0], [0, 0, 0], [0, 2 * u, -u], [1, 0, 0], [-s, s, 0], [s, 0, -s], [1, 0, 0], [s, s, 0]]
        want = torch.tensor([*want, [s, s, 0]])
    torch.testing.assert_close(delta, want, rtol=1e-5, atol=1e-6)
    momentum = torch.zeros_like(grad)
    mmfast.perturb_(delta, grad, step_size=1.0, eps=2.0, norm=norm, momentum=momentum, decay=1.0, backend=backend)
    assert delta.isfinite().all() and momentum.isfinite().all()
    torch.testing.assert_close(momentum[:3].abs().sum(1), torch.tensor([0.0, 0, 1]))


def test_limits_hold():
    for dtype in DTYPES:
        d, g = torch.zeros(4, 999, dtype=dtype), torch.randn(4, 999).to(dtype)
        for eps in (8 / 255, 0.1, 1 / 3):
            mmfast.perturb_(d, g, step_size=1.0, eps=eps)
            assert (d.double().abs() <= torch.tensor(eps).double()).all()
            mmfast.random_start_(d, eps=eps, seed=1)
            assert (d.double().abs() <= torch.tensor(eps).double()).all()
    x, d, g = torch.rand(4, 999), torch.zeros(4, 999), torch.randn(4, 999)
    for _ in range(5):
        mmfast.perturb_(d, g, step_size=0.3, eps=0.5, origin=x, bounds=(0, 1))
        assert (x + d).min() >= 0 and (x + d).max() <= 1 and d.abs().max() <= 0.5


def test_cancellation():
    """delta far outside the ball, and a step that leads back into its middle."""
    g = torch.randn(64, 4096)  # many samples: the rounding of one factor decides the error of a whole sample
    d = -10 * g / g.norm(dim=1, keepdim=True) + 1e-3 * torch.randn(64, 4096)
    check({"delta": d, "grad": g}, {"norm": "l2", "eps": 0.01, "step_size": 10.0})


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("memory", ["channels_last", "sliced", "transposed_tokens"])
def test_strides_and_half(norm, memory):
    keywords = {"norm": norm, "eps": 1.0, "step_size": 0.4, "decay": 0.5, "blend": 0.75, "bounds": (0, 1)}
    if memory == "transposed_tokens":
        keywords["granularity"] = "token"
    tensors = make((2, 6, 7, 5), torch.float32, CASES[-1])
    want = {k: v.clone() for k, v in tensors.items()}
    mmfast.perturb_(**want, **keywords)
    for dtype in (torch.float32, torch.float16):
        if memory == "channels_last":
            strided = {k: v.to(dtype).to(memory_format=torch.channels_last) for k, v in tensors.items()}
        elif memory == "sliced":
            strided = {k: torch.zeros(2, 6, 7, 10, dtype=dtype)[..., ::2].copy_(v) for k, v in tensors.items()}
        else:
            strided = {k: v.to(dtype).transpose(1, 3).contiguous().transpose(1, 3) for k, v in tensors.items()}
        mmfast.perturb_(**strided, **keywords)
        for name in ("delta", "momentum", "previous"):
            limit = 1e-6 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(strided[name].float(), want[name], rtol=limit, atol=limit)
        start = mmfast.random_start_(strided["delta"], eps=1.0, norm=norm, seed=5)
        plain = mmfast.random_start_(torch.zeros(2, 6, 7, 5), eps=1.0, norm=norm, seed=5)
        torch.testing.assert_close(start.float(), plain, rtol=limit, atol=limit)


def test_threads_and_repetition_change_no_bit():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            for norm in ("linf", "l2"):
                for shape in [(1, 300_001), (7, 1000, 64)]:
                    t = make(shape, torch.float32, CASES[-1])
                    mmfast.perturb_(**t, norm=norm, eps=0.4, step_size=0.1, decay=0.9, blend=0.7, bounds=(0, 1))
                    mmfast.random_start_(t["grad"], eps=1.0, norm=norm, seed=3)
                    results.append((threads, list(t.values())))
    finally:
        torch.set_num_threads(before)
    for i, (_, tensors) in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(tensors, results[i % 4][1]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_random_start_matches_the_reference(isa, granularity):
    layout = Layout.from_lengths([3, 0, 40, 1])
    for norm in ("linf", "l2"):
        for dtype in DTYPES:
            deltas = [torch.empty(44, 23, dtype=dtype), torch.empty(44, 2, 6, dtype=dtype)]
            with _native.use_isa(isa):
                mmfast.random_start_(deltas, eps=0.7, norm=norm, seed=-9, granularity=granularity, layout=layout)
            for i, d in enumerate(deltas):
                keywords = {"eps": 0.7, "norm": norm, "seed": torch.tensor(-9), "granularity": granularity}
                want = reference.random_start(d, layout=layout, index=i, **keywords)
                if norm == "linf" and dtype == torch.float32:
                    assert torch.equal(d, want)
                else:
                    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
                    torch.testing.assert_close(d, want, rtol=tolerance, atol=tolerance)


def test_random_start_distribution():
    d = mmfast.random_start_(torch.empty(2000, 50), eps=2.0, norm="linf", seed=1)
    assert abs(d.mean()) < 0.02 and abs(d.var() - 4 / 3) < 0.02 and d.abs().max() <= 2
    d = mmfast.random_start_(torch.empty(4000, 3), eps=2.0, norm="l2", seed=1)
    volume = (d.norm(dim=1) / 2) ** 3  # uniform in the ball: uniform
    assert abs(volume.mean() - 0.5) < 0.02 and abs(volume.var() - 1 / 12) < 0.01
    assert d.mean(0).abs().max() < 0.06
    corr = torch.corrcoef(d.T) - torch.eye(3)
    assert corr.abs().max() < 0.05
    x = torch.rand(100, 50)
    d = mmfast.random_start_(torch.empty(100, 50), eps=2.0, seed=1, origin=x, bounds=(0, 1))
    assert (x + d).min() >= 0 and (x + d).max() <= 1


def test_random_start_is_the_same_packed_and_padded():
    layout = Layout.from_lengths([4, 2, 5])
    packed = mmfast.random_start_(torch.zeros(11, 6), eps=1.0, seed=7, layout=layout)
    padded = mmfast.random_start_(torch.zeros(3, 5, 6), eps=1.0, seed=7)
    assert torch.equal(packed, torch.cat([padded[b, :n] for b, n in enumerate((4, 2, 5))]))
    assert not torch.equal(padded, mmfast.random_start_(torch.zeros(3, 5, 6), eps=1.0, seed=8))
    other = mmfast.random_start_([torch.zeros(3, 5, 6), torch.zeros(3, 5, 6)], eps=1.0, seed=7)
    assert torch.equal(other[0], padded) and not torch.equal(other[1], padded)


def test_wrong_arguments_change_the_result():
    """The comparison with the oracle would notice an argument that is off by a little."""
    tensors = make((4, 300), torch.float32, CASES[-1])
    right = {"norm": "l2", "eps": 3.0, "step_size": 0.5, "decay": 0.9, "blend": 0.75, "bounds": (0.0, 1.0)}
    for name, wrong in [("eps", 3.01), ("step_size", 0.51), ("decay", 0.8), ("blend", 0.7), ("bounds", (0.01, 1.0))]:
        oracle = reference.perturb(**{k: v.double() for k, v in tensors.items()}, **right)
        same = reference.perturb(**tensors, **right)
        actual = {k: v.clone() for k, v in tensors.items()}
        mmfast.perturb_(**actual, **{**right, name: wrong})
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close_to_oracle("delta", actual["delta"], oracle[0], same[0])


def test_leaf_and_version():
    d = torch.zeros(3, 8, requires_grad=True)
    version = d._version
    (g,) = torch.autograd.grad((d * torch.randn(3, 8)).sum(), d)
    mmfast.perturb_(d, g, step_size=0.1, eps=0.5)
    assert d._version > version and d.requires_grad and d.is_leaf and d.abs().max() > 0


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(compiler):
    @torch.compile(fullgraph=True, backend=compiler)
    def step(d, g, x, layout):
        mmfast.perturb_([d], [g], step_size=0.1, eps=0.05, norm="l2", origin=[x], bounds=(0, 1), layout=layout)
        return d * 2

    layout = Layout.from_lengths([3, 4])
    d, g, x = torch.zeros(7, 8), torch.randn(7, 8), torch.rand(7, 8)
    want = mmfast.perturb_(
        d.clone(), g, step_size=0.1, eps=0.05, norm="l2", origin=x, bounds=(0, 1), layout=layout, backend="reference"
    )
    torch.testing.assert_close(step(d, g, x, layout), 2 * want)
    torch.testing.assert_close(d, want)


def test_opcheck():
    from mmfast.ops.perturbation import _perturb, _random_start

    layout = Layout.from_lengths([3, 4])
    x = [torch.randn(7, 8) for _ in range(5)]
    args = ([x[0]], [x[1]], [x[2]], [x[3]], [x[4]], [None], [torch.ones(2)], [layout.cu_seqlens], [None], [0.1], [0.0])
    args += ([0.0], [1.0], True, False, 0.9, 0.75, "cpu")
    torch.library.opcheck(_perturb.op, args)
    args = ([x[0]], [None], [None], [None], [None], [0.1], [0.0], [1.0], True, False, torch.tensor(3), "cpu")
    torch.library.opcheck(_random_start.op, args)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm": "l1"}, "norm is 'l1'"),
        ({"granularity": "row"}, "granularity is 'row'"),
        ({"grad": torch.zeros(3, 5)}, r"grad is float32 \[3, 5\]"),
        ({"grad": torch.zeros(3, 4).double()}, "grad is float64"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": torch.ones(2)}, r"eps is float32 \[2\]; expected a number or \[3\]"),
        ({"eps": math.nan}, "eps is nan"),
        ({"bounds": (0, 1)}, "bounds need origin"),
        ({"bounds": (1, 0), "origin": torch.zeros(3, 4)}, "low <= high"),
        ({"momentum": [torch.zeros(3, 4)] * 2}, "momentum has 2 entries"),
        ({"delta": []}, "empty list"),
        ({"delta": torch.zeros(3, 4, dtype=torch.int32)}, "floating-point"),
        ({"layout": Layout.from_lengths([9])}, "cu_seqlens_layout ends at row 9"),
    ],
)
def test_errors(change, message):
    arguments = {"delta": torch.zeros(3, 4), "grad": torch.zeros(3, 4), "step_size": 1.0, "eps": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        mmfast.perturb_(**arguments)


def test_empty_and_refusal():
    for shape in [(0, 4), (3, 0)]:
        mmfast.perturb_(torch.zeros(shape), torch.zeros(shape), step_size=1.0, eps=1.0, norm="l2")
        mmfast.random_start_(torch.zeros(shape), eps=1.0, norm="l2", seed=0)
    d = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        mmfast.perturb_(d, d, step_size=1.0, eps=1.0, backend="cpu")
    mmfast.perturb_(d, torch.ones_like(d), step_size=1.0, eps=0.5)
    assert (d == 0.5).all()
