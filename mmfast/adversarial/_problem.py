"""What every attack works on: named inputs with balls and layouts, a loss, and perturbations of the inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmfast.layout import Layout
from mmfast.ops.perturbation import perturb_, random_start_

Inputs = Tensor | Mapping[str, Tensor]
LossFunction = Callable[[Inputs], Tensor]
Number = float | Tensor
PerModality = Number | Mapping[str, Number]

_SINGLE = "input"


class Problem:
    """Inputs under attack.

    Args:
        op: name for messages.
        loss_fn: inputs to losses `[B]`, or one number.
        inputs: a tensor, or modality name to tensor.
        eps: radius of the balls; with a mapping only the named modalities are attacked.
        norm, granularity, bounds, layout: as for `mmfast.perturb_`; bounds and layout also as mappings.
    """

    def __init__(self, op, loss_fn, inputs, *, eps, norm, granularity, bounds, layout):
        self.op, self.loss_fn = op, loss_fn
        self.norm, self.granularity = norm, granularity
        self.single = isinstance(inputs, Tensor)
        self.inputs = {_SINGLE: inputs} if self.single else dict(inputs)
        self.inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in self.inputs.items()}
        self.names = (
            list(eps)
            if isinstance(eps, Mapping)
            else [name for name, x in self.inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
        )
        for name in self.names:
            if name not in self.inputs:
                raise ValueError(f"{op}: eps names {name!r}; the inputs are {', '.join(self.inputs)}")
            if not self.inputs[name].is_floating_point():
                raise ValueError(f"{op}: input {name!r} is {self.inputs[name].dtype}; perturb its embedding instead")
        if not self.names:
            raise ValueError(f"{op}: no floating-point input to perturb among {', '.join(self.inputs)}")
        self.origin = [self.inputs[name] for name in self.names]
        self.eps = self.list("eps", eps)
        self.bounds = (
            [bounds.get(name) for name in self.names] if isinstance(bounds, Mapping) else [bounds] * len(self.names)
        )
        shared = layout is None or isinstance(layout, Layout)
        self.layout = [layout if shared else layout.get(name) for name in self.names]
        self.batches = [x.shape[0] if lay is None else lay.batch for x, lay in zip(self.origin, self.layout)]

    def list(self, what: str, value: PerModality) -> list[Number]:
        """One number per attacked modality."""
        if not isinstance(value, Mapping):
            return [value] * len(self.names)
        missing = [name for name in self.names if name not in value]
        if missing:
            raise ValueError(f"{self.op}: {what} is missing for {', '.join(missing)}; it has {', '.join(value)}")
        return [value[name] for name in self.names]

    def zeros(self) -> list[Tensor]:
        return [torch.zeros_like(x) for x in self.origin]

    def start(self, seed: int, norm: str | None = None) -> list[Tensor]:
        """A random point of the balls."""
        ball = {"eps": self.eps, "norm": norm or self.norm, "granularity": self.granularity, "layout": self.layout}
        return random_start_(self.zeros(), seed=seed, origin=self.origin, bounds=self.bounds, **ball)

    def step(self, delta: list[Tensor], grad: list[Tensor], step_size: list[Number], **more) -> None:
        perturb_(
            delta,
            grad,
            step_size=step_size,
            eps=self.eps,
            norm=self.norm,
            granularity=self.granularity,
            origin=self.origin,
            bounds=self.bounds,
            layout=self.layout,
            **more,
        )

    def perturbed(self, delta: list[Tensor]) -> Inputs:
        """The inputs with the perturbation added, in the form they were given."""
        new = dict(self.inputs)
        for name, x, d in zip(self.names, self.origin, delta):
            new[name] = x + d
        return new[_SINGLE] if self.single else new

    def result(self, delta: list[Tensor]) -> Inputs:
        """As `perturbed`, without the last rounding over a bound."""
        new = self.perturbed([d.detach() for d in delta])
        for name, bounds, layout in zip(self.names, self.bounds, self.layout):
            if bounds is None or layout is not None:
                continue
            if self.single:
                return new.clamp(*bounds)
            new[name] = new[name].clamp(*bounds)
        return new

    def loss(self, delta: list[Tensor]) -> Tensor:
        """Losses `[B]` or one number, as the caller's function returns them."""
        loss = self.loss_fn(self.perturbed(delta))
        if not isinstance(loss, Tensor) or loss.dim() > 1 or (loss.dim() and loss.shape[0] not in self.batches):
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"{self.op}: loss_fn returned {got}; expected one number, or losses [{self.batches[0]}] "
                "(reduction='none')"
            )
        return loss

    @torch.no_grad()
    def value(self, delta: list[Tensor]) -> Tensor:
        return self.loss(delta)

    @torch.enable_grad()
    def value_and_grad(self, delta: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Losses, and gradients with respect to the perturbations only: parameters receive none."""
        leaves = [d.detach().requires_grad_() for d in delta]
        loss = self.loss(leaves)
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        return loss.detach(), [torch.zeros_like(d) if g is None else g for g, d in zip(grads, leaves)]

    def choose(self, better: Tensor, new: list[Tensor], old: list[Tensor]) -> None:
        """Writes the samples where `better` (bool `[B]`, or one) from `new` into `old`."""
        for a, b, layout in zip(new, old, self.layout):
            rows = better
            if better.dim() and layout is not None:
                rows = torch.nn.functional.pad(better, (0, 1))[layout.samples(a.shape[0])]
            if rows.dim():
                rows = rows.reshape(-1, *[1] * (a.dim() - 1))
            b.copy_(torch.where(rows, a, b))


@contextlib.contextmanager
def evaluating(model: torch.nn.Module | None):
    """The model in eval mode, every module's own mode restored afterwards; None: all is left as found."""
    modules = [] if model is None else [m for m in model.modules() if m.training]
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        for m in modules:
            m.training = True
