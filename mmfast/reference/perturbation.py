"""One step of a projected gradient attack, and its random start, in plain PyTorch.

    g = grad, NaN as 0, infinities as the largest finite number
    m = decay * m + g / |g|_1, then g = m                                  (MI-FGSM: Dong et al. 2018, eq. 6)
    L-inf: c = clamp(d + a * sign(g), -eps, eps)                           (PGD: Madry et al. 2018, eq. 1)
    L2:    c = project(d + a * g / |g|_2), project(v) = v * min(1, eps / |v|_2)
    d' = project(d + blend * (c - d) + (1 - blend) * (d - d_previous))     (APGD: Croce, Hein 2020, section 3.1)

After every projection `origin + d` is brought into the bounds. Norms are over a sample, or over a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfast.layout import Layout
from mmfast.reference.philox import philox, uniform

# Third counter word of the random start: the kind of number; the tensor's index stands above it.
UNIFORM, NORMAL, RADIUS = 0, 1, 2


class Units:
    """Rows `[R, C]` of a tensor, and the unit (sample or token) and sample of each row.

    Args:
        x: tensor `[B, ...]`, or packed `[T, ...]` with a layout.
        granularity: "sample" or "token" (the last dimension).
        layout: of packed rows.
    """

    def __init__(self, x: Tensor, granularity: str, layout: Layout | None):
        first = x.shape[0]
        token = granularity == "token"
        width = x.shape[-1] if token else math.prod(x.shape[1:])
        per_first = math.prod(x.shape[1:-1]) if token and x.dim() > 1 else 1
        self.shape = (first * per_first, width)
        sample = torch.arange(first, device=x.device) if layout is None else layout.samples(first)
        self.batch = first if layout is None else layout.batch
        row = torch.arange(first, device=x.device)
        if layout is not None:
            begin = torch.nn.functional.pad(layout.cu_seqlens.long(), (0, 1))
            row = row - begin[sample]
        else:
            row = torch.zeros_like(row)
        self.sample = sample.repeat_interleave(per_first)
        # Number of the row within its sample: the counter of the random start.
        self.row = (row[:, None] * per_first + torch.arange(per_first, device=x.device)).flatten()
        self.inside = self.sample < self.batch
        if token:
            self.unit, self.count = torch.arange(self.shape[0], device=x.device), self.shape[0]
        else:
            self.unit, self.count = self.sample, self.batch + 1

    def sum(self, values: Tensor) -> Tensor:
        """`[R, C]` summed over each unit, given back to its rows as `[R, 1]`."""
        total = values.new_zeros(self.count).index_add(0, self.unit, values.sum(1))
        return total[self.unit][:, None]

    def maximum(self, values: Tensor) -> Tensor:
        """As `sum`, the maximum of non-negative values."""
        if not values.numel():
            return values.new_zeros(self.shape[0], 1)
        total = values.new_zeros(self.count).scatter_reduce(0, self.unit, values.amax(1), "amax")
        return total[self.unit][:, None]

    def per_sample(self, value: float | Tensor, like: Tensor) -> Tensor:
        """A number, or `[B]` numbers, as `[R, 1]`."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(1, 1)
        padded = torch.nn.functional.pad(value.to(like.dtype), (0, 1))
        return padded[self.sample][:, None]


def perturb(
    delta: Tensor,
    grad: Tensor,
    *,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: str = "linf",
    granularity: str = "sample",
    origin: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    momentum: Tensor | None = None,
    decay: float = 0.0,
    previous: Tensor | None = None,
    blend: float = 1.0,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The new delta, momentum and previous; arguments as `mmfast.perturb_`, which writes in place."""
    units = Units(delta, granularity, layout)
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32

    def rows(x: Tensor) -> Tensor:
        # Rows outside the layout are not read: zero here, and restored at the end.
        return x.reshape(units.shape).to(dtype).masked_fill(~units.inside[:, None], 0)

    d, g = rows(delta), torch.nan_to_num(rows(grad), nan=0.0)
    a, limit = units.per_sample(step_size, d), units.per_sample(eps, d)

    def direction(v: Tensor, power: int) -> Tensor:
        """v over its norm; zero where v is zero. Scaled by the maximum first, so that nothing over- or underflows."""
        peak = units.maximum(v.abs())
        v = v / torch.where(peak == 0, 1, peak)
        size = units.sum(v.abs()) if power == 1 else units.sum(v * v).sqrt()
        return v / torch.where(size == 0, 1, size)

    def project(v: Tensor) -> Tensor:
        if norm == "linf":
            v = torch.minimum(torch.maximum(v, -limit), limit)
        else:
            size = units.sum(v * v).sqrt()
            v = v * torch.where(size > limit, limit / torch.where(size == 0, 1, size), 1)
        if bounds is not None:
            x = rows(origin)
            v = torch.minimum(torch.maximum(v, bounds[0] - x), bounds[1] - x)
        return v

    if momentum is not None:
        g = (decay * rows(momentum) + direction(g, 1)).to(momentum.dtype).to(dtype)
        new_momentum = g
    new = project(d + a * (g.sign() if norm == "linf" else direction(g, 2)))
    if previous is not None:
        new = project(d + blend * (new - d) + (1 - blend) * (d - rows(previous)))

    def restore(value: Tensor, old: Tensor) -> Tensor:
        value = value.to(old.dtype)
        return torch.where(units.inside[:, None], value, old.reshape(units.shape)).reshape(old.shape)

    return (
        restore(new, delta),
        None if momentum is None else restore(new_momentum, momentum),
        None if previous is None else restore(d, previous),
    )


def random_start(
    delta: Tensor,
    *,
    eps: float | Tensor,
    norm: str,
    seed: Tensor,
    granularity: str = "sample",
    layout: Layout | None = None,
    origin: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    index: int = 0,
) -> Tensor:
    """A random point of the ball; arguments as `mmfast.random_start_`, `index` is the tensor's place in the list.

    Element e of sample b takes word `e % 4` of `Philox(seed; e // 4, b, 4 * index + kind, (e // 4) >> 32)`.
    """
    units = Units(delta, granularity, layout)
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
    width = units.shape[1]
    element = units.row[:, None] * width + torch.arange(width, device=delta.device)
    block, word = element // 4, element % 4
    sample = units.sample[:, None]

    def words(kind: int) -> Tensor:
        return torch.stack(philox(seed, block, sample, 4 * index + kind, block >> 32))

    limit = units.per_sample(eps, torch.empty(0, dtype=dtype, device=delta.device))
    if norm == "linf":
        u = uniform(words(UNIFORM).gather(0, word[None])[0]).to(dtype)
        new = limit * (2 * u - 1)
    else:
        bits = words(NORMAL)
        radius = (-2 * (uniform(bits[0::2]).to(dtype) + 2.0**-24).log()).sqrt()  # Box-Muller on (0, 1] x [0, 1)
        angle = 2 * math.pi * uniform(bits[1::2]).to(dtype)
        pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten(0, 1)
        z = pairs.gather(0, word[None])[0].masked_fill(~units.inside[:, None], 0)
        count = units.sum(torch.ones_like(z))
        token = units.row if granularity == "token" else torch.zeros_like(units.row)
        u = uniform(philox(seed, token, units.sample, 4 * index + RADIUS, token >> 32)[0]).to(dtype) + 2.0**-24
        size = units.sum(z * z).sqrt()
        new = z * (limit * (u[:, None].log() / count).exp() / torch.where(size == 0, 1, size))
    if bounds is not None:
        x = origin.reshape(units.shape).to(dtype)
        new = torch.minimum(torch.maximum(new, bounds[0] - x), bounds[1] - x)
    return torch.where(units.inside[:, None], new.to(delta.dtype), delta.reshape(units.shape)).reshape(delta.shape)
