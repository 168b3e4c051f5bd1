"""What the kernels of perturb_ and random_start_ for GPUs must do, whatever they are written in."""

import math

import pytest
import torch
from test_perturbation import CASES, make, options

import mmfast
from mmfast import Layout
from mmfast.ops.perturbation import _perturb, _random_start
from mmfast.reference import perturbation as reference
from mmfast.testing.numeric import assert_close_to_oracle, poisoned_empty

IDS = lambda c: "+".join(c) or "plain"  # noqa: E731
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(tensors, keywords, backend, device):
    """Runs the kernels on copies and compares delta, momentum and previous with the oracle."""
    tensors = {k: v.to(device) for k, v in tensors.items()}
    oracle = reference.perturb(**{k: v.double() for k, v in tensors.items()}, **keywords)
    same = reference.perturb(**tensors, **keywords)
    actual = {k: v.clone() for k, v in tensors.items()}
    with poisoned_empty():
        mmfast.perturb_(**actual, **keywords, backend=backend)
    for name, want, peer in zip(("delta", "momentum", "previous"), oracle, same):
        if want is not None:
            assert_close_to_oracle(name, actual[name], want, peer)
    return actual


class PerturbationTests:
    """A class that inherits has the fixtures `one_pass` (units of one tile, or of several) and `few_tensors`."""

    backend: str
    device: str
    dtypes: tuple
    shapes = ((3, 5), (2, 3, 17, 16), (4, 1), (1, 3001))

    def check(self, tensors, keywords):
        return check(tensors, keywords, self.backend, self.device)

    def needs(self, dtype):
        if dtype not in self.dtypes:
            pytest.skip(f"{dtype} does not run here")

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_list_equals_one_by_one(self, norm, few_tensors):
        """Tensors of several shapes, with and without a layout, a box, numbers per sample; for several launches."""
        layout = Layout(
            torch.tensor([0, 4, 4, 9], dtype=torch.int32), seqused=torch.tensor([3, 0, 5], dtype=torch.int32)
        )
        shapes = [(3, 8, 4), (9, 30), (3, 100), (3, 2), (3, 5)]
        tensors = [
            {k: v.to(self.device) for k, v in make(s, torch.float32, CASES[-1], seed=i).items()}
            for i, s in enumerate(shapes)
        ]
        rest, keywords = len(shapes) - 4, {"norm": norm, "decay": 0.9, "blend": 0.75, "backend": self.backend}
        lists = {
            "eps": [0.1, torch.tensor([0.5, 1, 2], device=self.device), 3.0, 1.0, *[1.0] * rest],
            "step_size": [0.1, 0.2, torch.ones(3, device=self.device), 0.3, *[0.1] * rest],
            "bounds": [(0, 1), None, (-1, 2), None, *[None] * rest],
            "layout": [None, layout.to(self.device), None, None, *[None] * rest],
        }
        alone = [{k: v.clone() for k, v in t.items()} for t in tensors]
        for i, t in enumerate(alone):
            mmfast.perturb_(**t, **keywords, **{k: v[i] for k, v in lists.items()})
        together = {k: [t[k].clone() for t in tensors] for k in tensors[0]}
        mmfast.perturb_(**together, **keywords, **lists)
        for i, t in enumerate(alone):
            for name in ("delta", "momentum", "previous"):
                # Another list has tiles of another width, and so adds in another order.
                torch.testing.assert_close(t[name], together[name][i], rtol=2e-6, atol=1e-7)

    @pytest.mark.parametrize("case", CASES, ids=IDS)
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dense(self, dtype, norm, case, one_pass):
        self.needs(dtype)
        for shape in self.shapes:
            eps = 0.5 if norm == "linf" else 0.2 * math.sqrt(math.prod(shape[1:]))
            self.check(make(shape, dtype, case), options(case, norm=norm, eps=eps, step_size=0.4 * eps))

    @pytest.mark.parametrize("granularity", ["sample", "token"])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_packed_with_limits_per_sample(self, dtype, norm, granularity, one_pass):
        self.needs(dtype)
        lengths = [0, 1, 17, 0, 33, 3]
        layout = Layout.from_lengths(lengths).to(self.device)
        eps = torch.linspace(0.1, 2, len(lengths), device=self.device)
        for case in (CASES[0], CASES[-1]):
            more = options(case, norm=norm, eps=eps, step_size=0.3 * eps, granularity=granularity, layout=layout)
            self.check(make((sum(lengths), 24), dtype, case), more)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("granularity", ["sample", "token"])
    def test_rows_outside_the_layout(self, norm, granularity):
        layout = Layout(
            torch.tensor([2, 7, 7, 20], dtype=torch.int32), seqused=torch.tensor([3, 0, 13], dtype=torch.int32)
        )
        layout = layout.to(self.device)
        outside = layout.samples(25) == layout.batch
        clean = {k: v.to(self.device) for k, v in make((25, 16), torch.float32, CASES[-1]).items()}
        dirty = {k: v.clone() for k, v in clean.items()}
        for v in dirty.values():
            v[outside] = float("nan")
        more = options(CASES[-1], norm=norm, eps=1.0, step_size=0.3, granularity=granularity, layout=layout)
        mmfast.perturb_(**clean, **more, backend=self.backend)
        mmfast.perturb_(**dirty, **more, backend=self.backend)
        for name in ("delta", "momentum", "previous"):
            assert torch.equal(clean[name][~outside], dirty[name][~outside])
            assert dirty[name][outside].isnan().all()
        kept = dirty["delta"].clone()
        mmfast.random_start_(
            kept, eps=1.0, norm=norm, granularity=granularity, seed=1, layout=layout, backend=self.backend
        )
        assert kept[outside].isnan().all() and kept[~outside].isfinite().all()

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_strange_gradients(self, norm, one_pass):
        inf, nan = math.inf, math.nan
        grad = torch.tensor([[0, 0, 0], [nan, 0, 0], [nan, 2, -1], [inf, 1, 0], [-inf, inf, nan], [1e-38, 0, -1e-38],
                             [1e-44, 0, 0], [3e38, 3e38, 0], [1e-25, 1e-25, 0]], device=self.device)  # fmt: skip
        delta = torch.zeros_like(grad)
        mmfast.perturb_(delta, grad, step_size=1.0, eps=2.0, norm=norm, backend=self.backend)
        s, u = math.sqrt(0.5), math.sqrt(0.2)
        if norm == "linf":
            want = grad.nan_to_num(nan=0).sign()
        else:
            want = [[0, 0, 0], [0, 0, 0], [0, 2 * u, -u], [1, 0, 0], [-s, s, 0], [s, 0, -s], [1, 0, 0], [s, s, 0]]
            want = torch.tensor([*want, [s, s, 0]], device=self.device)
        torch.testing.assert_close(delta, want, rtol=1e-5, atol=1e-6)
        momentum = torch.zeros_like(grad)
        mmfast.perturb_(
            delta, grad, step_size=1.0, eps=2.0, norm=norm, momentum=momentum, decay=1.0, backend=self.backend
        )
        assert delta.isfinite().all() and momentum.isfinite().all()
        torch.testing.assert_close(momentum[:3].abs().sum(1), torch.tensor([0.0, 0, 1], device=self.device))

    def test_limits_hold(self):
        for dtype in self.dtypes:
            d, g = (
                torch.zeros(4, 999, dtype=dtype, device=self.device),
                torch.randn(4, 999, device=self.device).to(dtype),
            )
            for eps in (8 / 255, 0.1, 1 / 3, 0.0):
                limit = torch.tensor(eps, dtype=torch.float32).double().item()
                mmfast.perturb_(d, g, step_size=1.0, eps=eps, backend=self.backend)
                assert d.double().abs().max() <= limit
                mmfast.random_start_(d, eps=eps, seed=1, backend=self.backend)
                assert d.double().abs().max() <= limit
        x, d, g = torch.rand(4, 999), torch.zeros(4, 999), torch.randn(4, 999)
        x, d, g = (t.to(self.device) for t in (x, d, g))
        for _ in range(3):
            mmfast.perturb_(d, g, step_size=0.3, eps=0.5, origin=x, bounds=(0, 1), backend=self.backend)
            assert (x + d).min() >= 0 and (x + d).max() <= 1 and d.abs().max() <= 0.5

    def test_cancellation(self, one_pass):
        """delta far outside the ball, and a step that leads back into its middle."""
        g = torch.randn(16, 4096)  # many samples: the rounding of one factor decides the error of a whole sample
        d = -10 * g / g.norm(dim=1, keepdim=True) + 1e-3 * torch.randn(16, 4096)
        self.check({"delta": d, "grad": g}, {"norm": "l2", "eps": 0.01, "step_size": 10.0})

    @pytest.mark.parametrize("granularity", ["sample", "token"])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_random_start_matches_the_reference(self, norm, granularity, one_pass):
        layout = Layout.from_lengths([3, 0, 20, 1]).to(self.device)
        for dtype in self.dtypes:
            deltas = [
                torch.empty(24, 23, dtype=dtype, device=self.device),
                torch.empty(24, 2, 6, dtype=dtype, device=self.device),
            ]
            more = {"eps": 0.7, "norm": norm, "granularity": granularity, "layout": layout}
            with poisoned_empty():
                mmfast.random_start_(deltas, **more, seed=-(9 << 40) - 9, backend=self.backend)
            for i, d in enumerate(deltas):
                seed = torch.tensor(-(9 << 40) - 9, device=self.device)
                want = reference.random_start(d, index=i, seed=seed, **more)
                if norm == "linf" and dtype == torch.float32:
                    assert torch.equal(d, want)
                else:
                    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
                    torch.testing.assert_close(d, want, rtol=tolerance, atol=tolerance)

    def test_random_start_equals_the_cpu_kernel_bit_by_bit(self):
        d, x = torch.zeros(3, 5, 7), torch.rand(3, 5, 7)
        for norm, granularity in [("linf", "sample"), ("l2", "sample"), ("l2", "token")]:
            more = {"eps": 0.3, "norm": norm, "granularity": granularity, "seed": 77, "origin": x, "bounds": (0, 1)}
            want = mmfast.random_start_(d.clone(), **more)
            more["origin"] = x.to(self.device)
            got = mmfast.random_start_(d.to(self.device), **more, backend=self.backend).cpu()
            assert torch.equal(got, want) if norm == "linf" else torch.allclose(got, want, rtol=2e-6, atol=1e-7)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_memory_formats(self, norm):
        keywords = {"norm": norm, "eps": 1.0, "step_size": 0.4, "decay": 0.5, "blend": 0.75, "bounds": (0, 1)}
        tensors = {k: v.to(self.device) for k, v in make((2, 6, 7, 5), torch.float32, CASES[-1]).items()}
        want = {k: v.clone() for k, v in tensors.items()}
        mmfast.perturb_(**want, **keywords, backend=self.backend)
        for strided in (
            {k: v.to(memory_format=torch.channels_last) for k, v in tensors.items()},
            {k: torch.zeros(2, 6, 7, 10, device=self.device)[..., ::2].copy_(v) for k, v in tensors.items()},
        ):
            mmfast.perturb_(**strided, **keywords, backend=self.backend)
            for name in ("delta", "momentum", "previous"):
                torch.testing.assert_close(strided[name], want[name], rtol=1e-6, atol=1e-6)

    def test_repetition_changes_no_bit(self):
        def results():
            for norm in ("linf", "l2"):
                t = {k: v.to(self.device) for k, v in make((3, 3000), torch.float32, CASES[-1]).items()}
                more = {"norm": norm, "eps": 0.4, "step_size": 0.1, "decay": 0.9, "blend": 0.7, "bounds": (0, 1)}
                mmfast.perturb_(**t, **more, backend=self.backend)
                mmfast.random_start_(t["grad"], eps=1.0, norm=norm, seed=3, backend=self.backend)
                yield from t.values()

        first = list(results())
        for _ in range(2 if self.device == "cpu" else 50):
            assert all(torch.equal(a, b) for a, b in zip(first, results()))

    def test_wrong_arguments_are_noticed(self):
        tensors = {k: v.to(self.device) for k, v in make((4, 300), torch.float32, CASES[-1]).items()}
        right = {"norm": "l2", "eps": 3.0, "step_size": 0.5, "decay": 0.9, "blend": 0.75, "bounds": (0.0, 1.0)}
        oracle = reference.perturb(**{k: v.double() for k, v in tensors.items()}, **right)
        same = reference.perturb(**tensors, **right)
        for name, wrong in [
            ("eps", 3.01),
            ("step_size", 0.51),
            ("decay", 0.8),
            ("blend", 0.7),
            ("bounds", (0.01, 1.0)),
        ]:
            actual = {k: v.clone() for k, v in tensors.items()}
            mmfast.perturb_(**actual, **{**right, name: wrong}, backend=self.backend)
            with pytest.raises(AssertionError, match="exceeds"):
                assert_close_to_oracle("delta", actual["delta"], oracle[0], same[0])

    def test_leaf_version_and_no_elements(self):
        d = torch.zeros(3, 8, requires_grad=True, device=self.device)
        version = d._version
        (g,) = torch.autograd.grad((d * torch.randn(3, 8, device=self.device)).sum(), d)
        mmfast.perturb_(d, g, step_size=0.1, eps=0.5, backend=self.backend)
        assert d._version > version and d.requires_grad and d.is_leaf and d.abs().max() > 0
        for shape in [(0, 4), (3, 0)]:
            empty = torch.zeros(shape, device=self.device)
            mmfast.perturb_([d, empty], [g, empty], step_size=1.0, eps=1.0, norm="l2", backend=self.backend)
            mmfast.random_start_(empty, eps=1.0, norm="l2", seed=0, backend=self.backend)

    def test_opcheck(self):
        ends = Layout.from_lengths([3, 4]).to(self.device).cu_seqlens
        x = [torch.randn(7, 8, device=self.device) for _ in range(5)]
        limits = torch.ones(2, device=self.device)
        args = ([x[0]], [x[1]], [x[2]], [x[3]], [x[4]], [None], [limits], [ends], [None], [0.1], [0.0])
        torch.library.opcheck(_perturb.op, (*args, [0.0], [1.0], True, False, 0.9, 0.75, self.backend))
        seed = torch.tensor(3, device=self.device)
        args = ([x[0]], [None], [None], [None], [None], [0.1], [0.0], [1.0], True, False, seed, self.backend)
        torch.library.opcheck(_random_start.op, args)
