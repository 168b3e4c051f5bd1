"""One step of an attack beside the forms that people use today.

`functional` is the step as attack libraries write it (every operation makes a tensor), `in place` the same formula with
in-place operations, `torch.compile` the functional form compiled. Bytes that must move: perturbation, gradient and
input read, perturbation written. Nothing is allocated, so the step is held to a copy into memory that is there. What
the others allocate costs most where the system hands out new pages each time, as by default at this size: so both.
"""

from __future__ import annotations

from functools import partial

import torch

import mmfast
from mmfast.testing.cases import DTYPES, Case, Contest, agree

LARGE = "64x3x224x224"
SIZES = {LARGE: (64, 3, 224, 224), "in cache, 32x3x32x32": (32, 3, 32, 32)}
LIMITS = {"linf": (2 / 255, 8 / 255), "l2": (0.5, 2.0)}  # step size, eps
NAMES = {"linf": "L-inf", "l2": "L2"}
PEERS = ("functional", "in place", "torch.compile")


def cases(small: bool = False) -> list[Case]:
    found = []
    for name, shape in ({"small": (3, 3, 8, 8)} if small else SIZES).items():
        for new_pages in (False, True) if name == LARGE else (False,):
            for norm in LIMITS:
                workload = f"{NAMES[norm]}, {name}{', new pages' if new_pages else ''}"
                for dtype in DTYPES:
                    make = partial(contest, norm, shape, dtype)
                    found.append(Case("perturb", workload, "step", dtype, PEERS, make, "memory", new_pages=new_pages))
    return found


def contest(norm: str, shape: tuple[int, ...], dtype: torch.dtype, device="cpu") -> Contest:
    step_size, eps = LIMITS[norm]
    g = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=g).to(device, dtype)
    grad = torch.randn(shape, generator=g).to(device, dtype)
    start = (torch.randn(shape, generator=g) * 0.5 * step_size).to(device, dtype)
    functional = FUNCTIONAL[norm]
    compiled = torch.compile(functional, dynamic=False)
    scratch = torch.empty_like(x)

    def ours(d):
        return mmfast.perturb_(d, grad, step_size=step_size, eps=eps, norm=norm, origin=x, bounds=(0, 1))

    ways = {
        "functional": lambda d: functional(d, grad, x),
        "in place": lambda d: IN_PLACE[norm](d, grad, x, scratch),
        "torch.compile": lambda d: compiled(d, grad, x),
    }
    # Each has a perturbation of its own: what happens in place goes on from step to step.
    peers = {name: partial(way, start.clone()) for name, way in ways.items()}

    def check():
        exact = functional(*(t.double() for t in (start, grad, x)))
        plain = functional(start, grad, x)
        agree([ours(start.clone())], [exact], [plain], {name: [ways[name](start.clone())] for name in peers})

    return Contest(partial(ours, start.clone()), peers, check, work=4 * x.nbytes)


def functional_linf(d, g, x):
    step_size, eps = LIMITS["linf"]
    adv = (x + d).detach() + step_size * g.sign()
    return torch.clamp(x + torch.clamp(adv - x, min=-eps, max=eps), min=0, max=1).detach() - x


def functional_l2(d, g, x):
    step_size, eps = LIMITS["l2"]
    norms = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    adv = (x + d).detach() + step_size * g / norms
    d = adv - x
    factor = torch.clamp(eps / d.flatten(1).norm(dim=1), max=1).view(-1, 1, 1, 1)
    return torch.clamp(x + d * factor, min=0, max=1).detach() - x


def in_place_linf(d, g, x, scratch):
    step_size, eps = LIMITS["linf"]
    torch.sign(g, out=scratch)
    d.add_(scratch, alpha=step_size).clamp_(-eps, eps)
    return _in_bounds(d, x, scratch)


def in_place_l2(d, g, x, scratch):
    step_size, eps = LIMITS["l2"]
    norms = torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True)
    d.addcdiv_(g, norms, value=step_size)
    norms = torch.linalg.vector_norm(d, dim=(1, 2, 3), keepdim=True)
    d.mul_((eps / norms).clamp_(max=1))
    return _in_bounds(d, x, scratch)


def _in_bounds(d, x, scratch):
    torch.sub(1, x, out=scratch)
    torch.minimum(d, scratch, out=d)
    torch.neg(x, out=scratch)
    return torch.maximum(d, scratch, out=d)


FUNCTIONAL = {"linf": functional_linf, "l2": functional_l2}
IN_PLACE = {"linf": in_place_linf, "l2": in_place_l2}
