"""Training on perturbed inputs: adversarial training, and free adversarial training in feature space."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mmfast.adversarial._problem import Inputs, LossFunction, PerModality, Problem
from mmfast.layout import Layout


def adversarial_training_loss(
    loss_fn: LossFunction, inputs: Inputs, attack: Callable, *, weight: float = 0.5, **options
) -> Tensor:
    """(1 - weight) * mean loss of the inputs + weight * mean loss of the attacked inputs.

    Args:
        loss_fn, inputs: as for an attack; the loss is differentiated into the parameters by the caller.
        attack: such as `PGD(eps=8 / 255)`.
        weight: share of the attacked inputs; 1: those only (Madry et al. 2018), 0: no attack is run.
        options: of the attack's call: bounds, layout, seed, model.

    Returns:
        scalar, differentiable in the parameters and in `inputs`' clean share.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"adversarial_training_loss: weight is {weight}; expected 0 to 1")
    loss = 0.0
    if weight > 0:
        loss = weight * loss_fn(attack(loss_fn, inputs, **options)).mean()
    if weight < 1:
        loss = loss + (1 - weight) * loss_fn(inputs).mean()
    return loss


@dataclasses.dataclass(frozen=True)
class FreeLB:
    """Free adversarial training on embeddings: the gradients of all ascent steps train the parameters.

    Each of `steps` passes adds 1 / steps of its loss' gradient to the parameters, and the same backward pass moves the
    perturbation; so K passes cost K forward and backward passes, nothing more.

    Args:
        eps: radius of the ball; a number, `[B]`, or modality name to one of these (the paper's epsilon,
            `adv_max_norm`); 0 trains without perturbation.
        step_size: length of an ascent step (alpha, `adv_lr`).
        steps: K (`adv_steps`).
        norm: "l2" or "linf".
        granularity: "sample" or "token".
        random_start: begin at a random point of the ball.

    Source: Zhu et al. 2020, algorithm 1.
    """

    eps: PerModality
    step_size: PerModality
    steps: int = 3
    norm: str = "l2"
    granularity: str = "sample"
    random_start: bool = True

    def backward(
        self,
        loss_fn: LossFunction,
        inputs: Inputs,
        *,
        layout: Layout | Mapping[str, Layout | None] | None = None,
        bounds=None,
        seed: int = 0,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> Tensor:
        """Adds the gradients of the parameters, and returns the mean loss, detached.

        Args:
            loss_fn: takes perturbed embeddings, returns losses `[B]` or their mean. It is called `steps` times and
                must build its graph anew. Embeddings that depend on parameters are detached: gradients for the
                embedding table itself come from perturbing inside `loss_fn` (return the table's output plus the
                difference to the inputs), or from a clean pass beside this one.
            inputs: embeddings, a tensor or modality name to tensor, dense or packed with `layout`.
            backward: differentiates a loss, such as `lambda loss: scaler.scale(loss).backward()`. The direction of a
                step does not depend on the scale.
        """
        options = {"eps": self.eps, "norm": self.norm, "granularity": self.granularity}
        problem = Problem("FreeLB", loss_fn, inputs, bounds=bounds, layout=layout, **options)
        delta = problem.start(seed) if self.random_start else problem.zeros()
        steps = problem.list("step_size", self.step_size)
        total = 0.0
        for k in range(self.steps):
            loss, grad = _train_pass(problem, delta, lambda d: problem.loss(d).mean() / self.steps, backward)
            total = total + loss
            if k + 1 < self.steps:
                problem.step(delta, grad, steps)
        return total


@dataclasses.dataclass(frozen=True)
class VILLA:
    """Adversarial training of vision-and-language models: each modality is perturbed alone, with a consistency term.

        loss(clean) + 1 / M sum over modalities m of 1 / K sum over steps of
            loss(m perturbed) + kl_weight * (KL(p_clean | p_m) + KL(p_m | p_clean))

    Args:
        eps, step_size, steps, norm, granularity, random_start: as `FreeLB`; `eps` maps the modalities to perturb.
        kl_weight: weight of the symmetric divergence (the paper's alpha).

    Source: Gan et al. 2020, eq. 2 to 6.
    """

    eps: Mapping[str, float | Tensor]
    step_size: PerModality
    steps: int = 3
    norm: str = "l2"
    granularity: str = "sample"
    random_start: bool = True
    kl_weight: float = 1.0

    def backward(
        self,
        forward: Callable[[Mapping[str, Tensor]], Tensor],
        loss_fn: Callable[[Tensor], Tensor],
        inputs: Mapping[str, Tensor],
        *,
        layout: Layout | Mapping[str, Layout | None] | None = None,
        bounds=None,
        seed: int = 0,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> dict[str, Tensor]:
        """Adds the gradients of the parameters, and returns the detached parts: "clean", and each modality's loss.

        Args:
            forward: takes embeddings, returns logits `[B, C]`.
            loss_fn: takes logits, returns the task's loss, `[B]` or its mean.
            inputs, layout, bounds, seed, backward: as for `FreeLB.backward`.
        """
        clean = forward(inputs)
        loss = loss_fn(clean).mean()
        backward(loss)
        clean, parts = clean.detach(), {"clean": loss.detach()}
        share = 1 / (len(self.eps) * self.steps)
        for number, (name, eps) in enumerate(self.eps.items()):

            def objective(perturbed):
                logits = forward(perturbed)
                return loss_fn(logits).mean() + self.kl_weight * _symmetric_kl(logits, clean)

            options = {"eps": {name: eps}, "norm": self.norm, "granularity": self.granularity}
            problem = Problem("VILLA", objective, inputs, bounds=bounds, layout=layout, **options)
            delta = problem.start(seed + number) if self.random_start else problem.zeros()
            step_size = self.step_size[name] if isinstance(self.step_size, Mapping) else self.step_size
            total = 0.0
            for k in range(self.steps):
                loss, grad = _train_pass(problem, delta, lambda d, p=problem: share * p.loss(d), backward)
                total = total + loss / share / self.steps
                if k + 1 < self.steps:
                    problem.step(delta, grad, [step_size])
            parts[name] = total
        return parts


def _train_pass(problem: Problem, delta: list[Tensor], loss_of, backward) -> tuple[Tensor, list[Tensor]]:
    """One forward and backward pass that trains the parameters and gives the perturbations' gradients."""
    leaves = [d.detach().requires_grad_() for d in delta]
    loss = loss_of(leaves)
    backward(loss)
    return loss.detach(), [torch.zeros_like(d) if d.grad is None else d.grad for d in leaves]


def _symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(p_a | p_b) + KL(p_b | p_a) of logits, the mean over samples."""
    a, b = a.float().log_softmax(-1), b.float().log_softmax(-1)
    kl = nn.functional.kl_div
    return kl(a, b, reduction="batchmean", log_target=True) + kl(b, a, reduction="batchmean", log_target=True)
