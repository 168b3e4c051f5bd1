"""Projected steps of adversarial perturbations and their random start, in place, one launch for all modalities.

Formulas: `mmfast/reference/perturbation.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import _native
from mmfast.layout import Layout
from mmfast.ops._dispatch import choose, cpu_refusal, cuda_refusal, triton_refusal, wish
from mmfast.ops._library import define, plain
from mmfast.reference import perturbation as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_UNBOUNDED = (-math.inf, math.inf)
_NORMS = ("linf", "l2")
_NUMBERS = {int, float}
_GRANULARITIES = ("sample", "token")


def _perturb_cpu(delta, grad, momentum, previous, *args) -> None:
    _native.cpu().perturb(delta, grad, momentum, previous, *args)
    _changed([*delta, *momentum, *previous])


def _random_start_cpu(delta, *args) -> None:
    _native.cpu().random_start(delta, *args)
    _changed(delta)


def _perturb_triton(delta, grad, momentum, previous, *args) -> None:
    from mmfast.kernels import perturbation as kernels

    kernels.perturb(delta, grad, momentum, previous, *args)
    _changed([*delta, *momentum, *previous])


def _random_start_triton(delta, *args) -> None:
    from mmfast.kernels import perturbation as kernels

    kernels.random_start(delta, *args)
    _changed(delta)


def _perturb_cuda(delta, grad, momentum, previous, *args) -> None:
    _, _, _, cu_seqlens, *_, l2, token, _, _ = args
    room = _workspace(delta, cu_seqlens, l2, token, bool(momentum))
    _native.cuda().perturb(delta, grad, momentum, previous, *args, room, _native.stream_of(delta[0]))
    _changed([*delta, *momentum, *previous])


def _random_start_cuda(delta, *args) -> None:
    _, _, cu_seqlens, *_, l2, token, _ = args
    room = _workspace(delta, cu_seqlens, l2, token, False)
    _native.cuda().random_start(delta, *args, room, _native.stream_of(delta[0]))
    _changed(delta)


def _workspace(delta, *args) -> Tensor:
    size = _native.cuda().perturb_workspace(delta, *args)
    return torch.empty(size, dtype=torch.float64, device=delta[0].device)


def _changed(tensors: list[Tensor]) -> None:
    """Autograd notices the change of a saved tensor; torch.library does this for single tensors only."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


_perturb = define(
    "perturb_(Tensor(a!)[] delta, Tensor[] grad, Tensor(b!)[] momentum, Tensor(c!)[] previous, Tensor?[] origin,"
    " Tensor?[] step_size, Tensor?[] eps, Tensor?[] cu_seqlens, Tensor?[] seqused, float[] step_values,"
    " float[] eps_values, float[] low, float[] high, bool l2, bool token, float decay, float blend,"
    " str backend) -> ()",
    cpu=_perturb_cpu,
    triton=_perturb_triton,
    cuda=_perturb_cuda,
    fake=lambda *args: None,
)

_random_start = define(
    "random_start_(Tensor(a!)[] delta, Tensor?[] origin, Tensor?[] eps, Tensor?[] cu_seqlens, Tensor?[] seqused,"
    " float[] eps_values, float[] low, float[] high, bool l2, bool token, Tensor seed, str backend) -> ()",
    cpu=_random_start_cpu,
    triton=_random_start_triton,
    cuda=_random_start_cuda,
    fake=lambda *args: None,
)


def perturb_(
    delta: Tensor | Sequence[Tensor],
    grad: Tensor | Sequence[Tensor],
    *,
    step_size: float | Tensor | Sequence[float | Tensor],
    eps: float | Tensor | Sequence[float | Tensor],
    norm: str = "linf",
    granularity: str = "sample",
    origin: Tensor | Sequence[Tensor | None] | None = None,
    bounds: tuple[float, float] | Sequence[tuple[float, float] | None] | None = None,
    momentum: Tensor | Sequence[Tensor] | None = None,
    decay: float = 0.0,
    previous: Tensor | Sequence[Tensor] | None = None,
    blend: float = 1.0,
    layout: Layout | Sequence[Layout | None] | None = None,
    backend: str | None = None,
) -> Tensor | Sequence[Tensor]:
    """One ascent step of an attack on the perturbation `delta`, projected, in place.

        linf: c = clamp(delta + step_size * sign(g), -eps, eps)
        l2:   c = project(delta + step_size * g / |g|_2), project(v) = v * min(1, eps / |v|_2)
        delta <- c, or with `previous`: project(delta + blend * (c - delta) + (1 - blend) * (delta - previous))

    where g is `grad`, or with `momentum` the updated m <- decay * m + grad / |grad|_1. With `bounds`, every projection
    ends with `origin + delta` clamped into them; where `origin` lies within the bounds this never leaves the ball.
    A zero gradient makes no step. NaN in the gradient counts as 0, infinities as the largest finite number.

    Every argument but `norm`, `granularity`, `decay` and `blend` may be a list with one entry per tensor of `delta`
    (modalities, each with its own ball); numbers, the pair of bounds and the layout are shared where they are no list.

    Args:
        delta: perturbation `[B, ...]`, or packed `[T, ...]` with `layout`; float32, bfloat16, float16 (float64:
            reference). Changed in place, like a parameter by an optimizer: also a leaf that requires a gradient.
        grad: gradient of what is to be increased, as `delta`.
        step_size: length of a step, in the unit of delta; a number or `[B]`; negative descends (torchattacks `alpha`,
            FreeLB `adv_lr`).
        eps: radius of the ball, in the unit of delta; a number or `[B]`, not negative (FreeLB `adv_max_norm`).
        norm: "linf" or "l2".
        granularity: what norms are over: "sample", or "token", the last dimension (TAVAT, VILLA's text side).
        origin: the unperturbed input, as `delta`; needed with `bounds`.
        bounds: `(low, high)` of `origin + delta`, such as (0, 1) for pixels.
        momentum: MI-FGSM's accumulated gradient, as `delta`, changed in place; the step uses its stored value.
        decay: factor of the momentum (MI-FGSM `mu`).
        previous: delta one step ago, as `delta`, changed in place to the delta before this step (APGD).
        blend: APGD's `alpha`: weight of the new step against the last movement.
        layout: whose samples the rows of a packed `delta` are. Rows outside it are neither read nor written.
        backend: "cpu", "triton", "cuda", "reference", or None for the best that can run.

    Returns:
        `delta`. Stored values keep the L-inf ball exactly; the L2 ball and the bounds up to one rounding of the dtype.
        Not differentiable.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.
        RuntimeError: the explicit backend cannot run.

    Sources: Goodfellow et al. 2015 (FGSM); Madry et al. 2018, eq. 1 (PGD); Dong et al. 2018, eq. 6 and 7 (MI-FGSM);
    Croce and Hein 2020, section 3.1 (APGD); Zhu et al. 2020, algorithm 1 (FreeLB).
    """
    simple = layout is None and momentum is None and previous is None and wish(backend) in (None, "cpu")
    if simple and _step_at_once(delta, grad, step_size, eps, norm, granularity, origin, bounds):
        return delta
    op = "perturb_"
    with torch.no_grad():
        arguments = _Arguments(op, delta, norm, granularity, layout, origin, bounds)
        grads = _list(op, "grad", grad, len(arguments.delta))
        arguments.check_like("grad", grads)
        momenta = arguments.optional("momentum", momentum)
        previouses = arguments.optional("previous", previous)
        steps, step_values = arguments.numbers("step_size", step_size)
        limits, eps_values = arguments.numbers("eps", eps, minimum=0.0)
        chosen = choose(op, backend, arguments.refusals())
        if chosen == "reference":
            for i, d in enumerate(arguments.delta):
                new, m, p = reference.perturb(
                    d,
                    grads[i],
                    step_size=step_values[i] if steps[i] is None else steps[i],
                    eps=eps_values[i] if limits[i] is None else limits[i],
                    momentum=momenta[i] if momenta else None,
                    decay=decay,
                    previous=previouses[i] if previouses else None,
                    blend=blend,
                    **arguments.reference(i),
                )
                d.copy_(new)
                if momenta:
                    momenta[i].copy_(m)
                if previouses:
                    previouses[i].copy_(p)
            return delta
        low, high = arguments.limits()
        with _InPlace(arguments, chosen) as flat:
            _perturb(
                flat.mutable(arguments.delta),
                flat.read(grads),
                flat.mutable(momenta),
                flat.mutable(previouses),
                flat.read(arguments.origin),
                steps,
                limits,
                *arguments.rows(),
                step_values,
                eps_values,
                low,
                high,
                norm == "l2",
                granularity == "token",
                float(decay),
                float(blend),
                chosen,
            )
    return delta


def _step_at_once(delta, grad, step_size, eps, norm, granularity, origin, bounds) -> bool:
    """One tensor's step on the CPU where nothing has to be converted: small ones take less time than all the checks.

    False, and nothing is changed, where it is not that simple or where the kernel, which checks too, refuses.
    """
    if bounds is not None and (type(bounds) is not tuple or len(bounds) != 2):
        return False
    low, high = _UNBOUNDED if bounds is None else bounds
    numbers = {type(step_size), type(eps), type(low), type(high)} <= _NUMBERS
    if not numbers or not (step_size == step_size and eps >= 0 and low <= high):
        return False
    if norm not in _NORMS or granularity not in _GRANULARITIES or (origin is None) != (bounds is None):
        return False
    if not plain((delta, grad, origin)):
        return False
    origins = [] if origin is None else [origin]
    options = [step_size], [eps], [low], [high], norm == "l2", granularity == "token", 0.0, 1.0
    try:
        _native.cpu().perturb([delta], [grad], [], [], origins, [], [], [], [], *options)
    except (RuntimeError, TypeError, ValueError):
        return False
    _changed([delta])
    return True


@torch.no_grad()
def random_start_(
    delta: Tensor | Sequence[Tensor],
    *,
    eps: float | Tensor | Sequence[float | Tensor],
    norm: str = "linf",
    seed: int | Tensor,
    granularity: str = "sample",
    layout: Layout | Sequence[Layout | None] | None = None,
    origin: Tensor | Sequence[Tensor | None] | None = None,
    bounds: tuple[float, float] | Sequence[tuple[float, float] | None] | None = None,
    backend: str | None = None,
) -> Tensor | Sequence[Tensor]:
    """Fills `delta` with a random point of the ball, in place: the same numbers on every backend.

        linf: eps * (2 u - 1), u uniform in [0, 1) per element
        l2:   eps * u^(1 / n) * z / |z|_2, z normal per element, u uniform in (0, 1] per unit of n elements

    Numbers are Philox4x32-10 of the seed, the sample, the place within the sample and the tensor's place in the list;
    so a packed and a padded form of the same samples start alike. L-inf values are equal bit by bit on all backends,
    L2 values up to the logarithm, sine and cosine of the backend (about 1e-6).

    Args:
        delta, eps, norm, granularity, layout, origin, bounds, backend: as for `perturb_`.
        seed: a number, or one int64 on delta's device.

    Returns:
        `delta`. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.
        RuntimeError: the explicit backend cannot run.

    Sources: Madry et al. 2018 (random start); Box and Muller 1958; Salmon et al. 2011 (Philox).
    """
    op = "random_start_"
    arguments = _Arguments(op, delta, norm, granularity, layout, origin, bounds)
    limits, eps_values = arguments.numbers("eps", eps, minimum=0.0)
    first = arguments.delta[0]
    if not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=first.device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"{op}: seed is {_describe(seed)}; expected a number or one int64")
    chosen = choose(op, backend, arguments.refusals())
    if chosen == "reference":
        for i, d in enumerate(arguments.delta):
            value = eps_values[i] if limits[i] is None else limits[i]
            d.copy_(reference.random_start(d, eps=value, seed=seed, index=i, **arguments.reference(i)))
        return delta
    low, high = arguments.limits()
    with _InPlace(arguments, chosen, keep_order=True) as flat:
        _random_start(
            flat.mutable(arguments.delta),
            flat.read(arguments.origin),
            limits,
            *arguments.rows(),
            eps_values,
            low,
            high,
            norm == "l2",
            granularity == "token",
            seed,
            chosen,
        )
    return delta


class _Arguments:
    """What both ops check and bring into lists."""

    def __init__(self, op, delta, norm, granularity, layout, origin, bounds):
        self.op, self.norm, self.granularity = op, norm, granularity
        self.delta = [delta] if isinstance(delta, Tensor) else list(delta)
        self.single = isinstance(delta, Tensor)
        count = len(self.delta)
        if norm not in _NORMS:
            raise ValueError(f"{op}: norm is {norm!r}; expected 'linf' or 'l2'")
        if granularity not in _GRANULARITIES:
            raise ValueError(f"{op}: granularity is {granularity!r}; expected 'sample' or 'token'")
        if not count:
            raise ValueError(f"{op}: delta is an empty list; expected at least one tensor")
        for d in self.delta:
            if not isinstance(d, Tensor) or not d.is_floating_point() or d.dim() < (2 if granularity == "token" else 1):
                shape = "[..., D] of two or more dimensions" if granularity == "token" else "[B, ...]"
                raise ValueError(f"{op}: delta is {_describe(d)}; expected a floating-point tensor {shape}")
            if d.dtype != self.delta[0].dtype or d.device != self.delta[0].device:
                raise ValueError(
                    f"{op}: delta holds {_describe(self.delta[0])} on {self.delta[0].device} and {_describe(d)} on "
                    f"{d.device}; expected one dtype and device, call {op} once for each"
                )
        layouts = [layout] * count if layout is None or isinstance(layout, Layout) else list(layout)
        self.layout = _list(op, "layout", layouts, count)
        self.bounds = self._bounds(bounds, count)
        self.origin = [None] * count if origin is None else _list(op, "origin", origin, count)
        for i, pair in enumerate(self.bounds):
            if pair is not None and self.origin[i] is None:
                raise ValueError(f"{op}: bounds need origin, the unperturbed input; pass origin=")
            if pair is None:
                self.origin[i] = None
        self.check_like("origin", self.origin)

    def _bounds(self, bounds, count) -> list[tuple[float, float] | None]:
        pair = isinstance(bounds, Sequence) and len(bounds) == 2 and all(isinstance(x, (int, float)) for x in bounds)
        pairs = [bounds] * count if bounds is None or pair else _list(self.op, "bounds", bounds, count)
        for p in pairs:
            if p is not None and not (len(p) == 2 and p[0] <= p[1]):
                raise ValueError(f"{self.op}: bounds are {p}; expected (low, high) with low <= high")
        return pairs

    def check_like(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        for d, t in zip(self.delta, tensors):
            if t is None:
                continue
            if not isinstance(t, Tensor) or t.shape != d.shape or t.dtype != d.dtype or t.device != d.device:
                raise ValueError(
                    f"{self.op}: {name} is {_describe(t)}; expected delta's dtype, shape and device, {_describe(d)} on "
                    f"{d.device}"
                )

    def optional(self, name: str, value) -> list[Tensor]:
        """Tensors that are changed in place beside delta; empty where there are none."""
        if value is None:
            return []
        tensors = _list(self.op, name, value, len(self.delta))
        self.check_like(name, tensors)
        if any(t is None or t is d for t, d in zip(tensors, self.delta)):
            raise ValueError(f"{self.op}: {name} must be tensors of their own, one for each tensor of delta")
        return tensors

    def refusals(self) -> dict:
        return {
            "cpu": lambda: cpu_refusal(*self.delta, dtypes=_DTYPES),
            "triton": lambda: triton_refusal(*self.delta, dtypes=_DTYPES),
            "cuda": lambda: cuda_refusal(*self.delta, dtypes=_DTYPES),
        }

    def batch(self, i: int) -> int:
        return self.delta[i].shape[0] if self.layout[i] is None else self.layout[i].batch

    def numbers(self, name: str, value, minimum: float = -math.inf) -> tuple[list[Tensor | None], list[float]]:
        """Per tensor: float32 [B] or None, and the number to take where it is None."""
        shared = isinstance(value, (int, float, Tensor))
        values = [value] * len(self.delta) if shared else _list(self.op, name, value, len(self.delta))
        tensors, numbers = [], []
        for i, v in enumerate(values):
            if isinstance(v, Tensor):
                if v.dim() == 0:
                    v = v.expand(self.batch(i))
                if v.shape != (self.batch(i),):
                    raise ValueError(f"{self.op}: {name} is {_describe(v)}; expected a number or [{self.batch(i)}]")
                tensors.append(v.to(self.delta[i].device, torch.float32).contiguous())
                numbers.append(0.0)
            else:
                if not v >= minimum:
                    raise ValueError(f"{self.op}: {name} is {v}; expected a number not below {minimum:g}")
                tensors.append(None)
                numbers.append(float(v))
        return tensors, numbers

    def limits(self) -> tuple[list[float], list[float]]:
        pairs = [_UNBOUNDED if p is None else p for p in self.bounds]
        return [float(p[0]) for p in pairs], [float(p[1]) for p in pairs]

    def rows(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        given = self.layout
        return (
            [x and x.cu_seqlens.contiguous() for x in given],
            [None if x is None or x.seqused is None else x.seqused.contiguous() for x in given],
        )

    def reference(self, i: int) -> dict:
        return {
            "norm": self.norm,
            "granularity": self.granularity,
            "origin": self.origin[i],
            "bounds": self.bounds[i],
            "layout": self.layout[i],
        }


class _InPlace:
    """Contiguous forms of the tensors in a dtype that the kernels take, written back where they are copies.

    A dense tensor in another order (channels_last) is used as it lies, where the order within a sample is of no
    consequence.
    """

    def __init__(self, arguments: _Arguments, backend: str, keep_order: bool = False):
        self.widened = torch.float16 if backend == "cpu" else None
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.orders = [
            None if d.is_contiguous() else _order(d, arguments.granularity == "token" or keep_order)
            for d in arguments.delta
        ]

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is None:
            for view, work in self.copies:
                view.copy_(work)

    def _plain(self, i: int, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.orders[i] is None and t.dtype != self.widened and t.is_contiguous():
            return t, t
        view = t if self.orders[i] is None else t.permute(self.orders[i])
        dtype = torch.float32 if t.dtype == self.widened else t.dtype
        return view, view.to(dtype).contiguous()

    def read(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else self._plain(i, t)[1] for i, t in enumerate(tensors)]

    def mutable(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        result = []
        for i, t in enumerate(tensors):
            view, work = self._plain(i, t)
            if work is not view:
                self.copies.append((view, work))
            result.append(work)
        return result


def _order(t: Tensor, keep: bool) -> list[int] | None:
    """The order of dimensions 1, 2, ... in which `t` lies contiguously, or None."""
    if keep:
        return None
    order = [0, *sorted(range(1, t.dim()), key=lambda d: -t.stride(d))]
    return order if t.permute(order).is_contiguous() else None


def _list(op: str, name: str, value, count: int) -> list:
    values = [value] if isinstance(value, Tensor) else list(value)
    if len(values) != count:
        raise ValueError(f"{op}: {name} has {len(values)} entries; expected {count}, one for each tensor of delta")
    return values


def _describe(value) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
