"""White-box attacks: FGSM, PGD, MI-FGSM and APGD. Small immutable objects, called with a loss and inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfast.adversarial._problem import Inputs, LossFunction, PerModality, Problem, evaluating
from mmfast.layout import Layout

Bounds = tuple[float, float] | Mapping[str, tuple[float, float] | None] | None


@dataclasses.dataclass(frozen=True)
class PGD:
    """Projected gradient ascent on a loss inside a ball around the inputs.

    Args:
        eps: radius, in the unit of the inputs; a number, `[B]`, or modality name to one of these: then only the named
            modalities are attacked, each in a ball of its own (FreeLB `adv_max_norm`).
        step_size: as eps; None: 2.5 * eps / steps (torchattacks `alpha`, FreeLB `adv_lr`).
        steps: number of gradients (torchattacks `steps`).
        norm: "linf" or "l2".
        random_start: begin at a random point of the ball, otherwise at the inputs.
        targeted: decrease the loss instead, which then speaks of the target.
        restarts: the strongest of this many runs is kept, per sample where the loss is per sample.
        granularity: "sample", or "token": a ball per token, the last dimension.

    Source: Madry et al. 2018, section 2.1; default step size from its published code.
    """

    eps: PerModality
    step_size: PerModality | None = None
    steps: int = 10
    norm: str = "linf"
    random_start: bool = True
    targeted: bool = False
    restarts: int = 1
    granularity: str = "sample"

    def __post_init__(self):
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"{type(self).__name__}: steps and restarts must be at least 1, got {self}")

    def __call__(
        self,
        loss_fn: LossFunction,
        inputs: Inputs,
        *,
        bounds: Bounds = (0.0, 1.0),
        layout: Layout | Mapping[str, Layout | None] | None = None,
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> Inputs:
        """Perturbed inputs, detached, in the form of `inputs`.

        Args:
            loss_fn: takes inputs, returns losses `[B]` (better: restarts are then chosen per sample) or one number. It
                must not mix samples in a way that makes one sample's loss depend on another's input.
            inputs: a tensor, or modality name to tensor; `[B, ...]`, or packed `[T, ...]` with a layout.
            bounds: `(low, high)` of the perturbed inputs; None: no bounds (embeddings); or a mapping to either.
            layout: whose samples packed rows are; or a mapping, None for dense modalities.
            seed: of the random start.
            model: put into eval mode during the attack; None: its mode is left as found.

        Parameters receive no gradient.

        Raises:
            ValueError: names, shapes or losses that do not fit.
        """
        problem = Problem(
            type(self).__name__,
            loss_fn,
            inputs,
            eps=self.eps,
            norm=self.norm,
            granularity=self.granularity,
            bounds=bounds,
            layout=layout,
        )
        with evaluating(model):
            best, best_loss = None, None
            for restart in range(self.restarts):
                delta = problem.start(seed + restart) if self.random_start else problem.zeros()
                delta, loss = self._run(problem, delta)
                if self.restarts == 1:
                    return problem.result(delta)
                loss = self._sign() * (problem.value(delta) if loss is None else loss)
                if best is None:
                    best, best_loss = delta, loss
                else:
                    better = loss > best_loss
                    problem.choose(better, delta, best)
                    best_loss = torch.where(better, loss, best_loss)
            return problem.result(best)

    def _sign(self) -> int:
        return -1 if self.targeted else 1

    def _steps(self, problem: Problem, default: float) -> list:
        """Signed step sizes: `default` times eps where none is given."""
        if self.step_size is None:
            return [self._sign() * default * eps for eps in problem.eps]
        return [self._sign() * step for step in problem.list("step_size", self.step_size)]

    def _run(self, problem: Problem, delta: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """The last perturbation, and its loss where it is known."""
        steps = self._steps(problem, 2.5 / self.steps)
        for _ in range(self.steps):
            _, grad = problem.value_and_grad(delta)
            problem.step(delta, grad, steps)
        return delta, None


@dataclasses.dataclass(frozen=True)
class FGSM(PGD):
    """One step of the length of the radius: x + eps * sign(grad). Arguments as `PGD`.

    With `random_start=True` and a step of 1.25 eps it is the start of fast adversarial training (Wong et al. 2020).

    Source: Goodfellow et al. 2015, section 4.
    """

    steps: int = 1
    random_start: bool = False

    def _run(self, problem, delta):
        steps = self._steps(problem, 1.0)
        for _ in range(self.steps):
            _, grad = problem.value_and_grad(delta)
            problem.step(delta, grad, steps)
        return delta, None


@dataclasses.dataclass(frozen=True)
class MIFGSM(PGD):
    """Iterative FGSM with momentum over the normalised gradients. Arguments as `PGD`, default step eps / steps.

    Args:
        decay: factor of the momentum (torchattacks `decay`, the paper's mu).

    Source: Dong et al. 2018, algorithm 1.
    """

    random_start: bool = False
    decay: float = 1.0

    def _run(self, problem, delta):
        steps = self._steps(problem, 1.0 / self.steps)
        momentum = problem.zeros()
        for _ in range(self.steps):
            _, grad = problem.value_and_grad(delta)
            problem.step(delta, grad, steps, momentum=momentum, decay=self.decay)
        return delta, None


@dataclasses.dataclass(frozen=True)
class APGD(PGD):
    """PGD with momentum and a step size that halves, per sample, where progress stalls; no step size to choose.

    Arguments as `PGD`; `step_size` is the first one, default 2 eps. The loss must be per sample. Returns the point of
    the highest loss.

    Args:
        rho: a window of steps in which the loss rose less often than this share halves the step.
        blend: weight of the new step against the last movement, the paper's alpha.

    Source: Croce and Hein 2020, algorithm 1, with its published code where the page is silent.
    """

    steps: int = 50
    rho: float = 0.75
    blend: float = 0.75

    def _run(self, problem, delta):
        sign, first = self._sign(), self._steps(problem, 2.0)
        loss, grad = problem.value_and_grad(delta)
        if loss.dim() != 1:
            raise ValueError(f"{problem.op}: loss_fn must return losses [B], got {list(loss.shape)}")
        loss = sign * loss
        best, best_loss, best_grad = [d.clone() for d in delta], loss.clone(), [g.clone() for g in grad]
        previous = [d.clone() for d in delta]
        factor = torch.ones_like(loss, dtype=torch.float32)
        rises = torch.zeros_like(factor)
        checkpoints, last = _checkpoints(self.steps), 0
        halved, best_before = torch.zeros_like(loss, dtype=torch.bool), best_loss.clone()
        for k in range(self.steps):
            blend = 1.0 if k == 0 else self.blend
            problem.step(delta, grad, [factor * step for step in first], previous=previous, blend=blend)
            if k + 1 == self.steps:
                new, grad = problem.value(delta), None
            else:
                new, grad = problem.value_and_grad(delta)
            new = sign * new
            rises += new > loss
            loss, better = new, new > best_loss
            problem.choose(better, delta, best)
            best_loss = torch.where(better, loss, best_loss)
            if grad is None:
                break
            problem.choose(better, grad, best_grad)
            if k + 1 in checkpoints:
                stalled = rises < self.rho * (k + 1 - last)
                stuck = ~halved & (best_before == best_loss)
                halved = stalled | stuck
                factor = torch.where(halved, factor / 2, factor)
                problem.choose(halved, best, delta)
                problem.choose(halved, best_grad, grad)
                loss = torch.where(halved, best_loss, loss)
                best_before, last = best_loss.clone(), k + 1
                rises.zero_()
        return best, sign * best_loss


def _checkpoints(steps: int) -> set[int]:
    """Steps after which APGD looks back: windows of 22 % of the steps, each 3 % shorter, at least 6 %."""
    p, result = [0.0, 0.22], set()
    while p[-1] <= 1:
        result.add(math.ceil(p[-1] * steps - 1e-9))  # the sums of p are not exact
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    return result
