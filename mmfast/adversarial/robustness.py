"""Accuracy under attack, with the signs that a defence only hides its gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mmfast.adversarial._problem import Inputs, LossFunction, Problem, evaluating
from mmfast.adversarial.attacks import PGD
from mmfast.layout import Layout


@dataclasses.dataclass(frozen=True)
class Robustness:
    """What `evaluate` found.

    Attributes:
        clean: accuracy without attack.
        accuracy: accuracy under each attack.
        worst: share of samples that are right under every attack.
        loss: mean loss under each attack, and of "clean" and "noise" (strongest of the random points).
        flags: signs of hidden gradients; empty: none was found, which proves nothing.
    """

    clean: float
    accuracy: dict[str, float]
    worst: float
    loss: dict[str, float]
    flags: tuple[str, ...]


def evaluate(
    loss_fn: LossFunction,
    correct_fn: Callable[[Inputs], Tensor],
    inputs: Inputs,
    attacks: Mapping[str, PGD],
    *,
    bounds=(0.0, 1.0),
    layout: Layout | Mapping[str, Layout | None] | None = None,
    seed: int = 0,
    noise_samples: int = 8,
    model: nn.Module | None = None,
) -> Robustness:
    """Runs attacks on one batch and looks for gradient masking.

    Flags (Athalye et al. 2018; Carlini et al. 2019, section 5):
        - random points of the ball raise the loss as much as a white-box attack (black box beats white box);
        - twice the steps give a weaker attack;
        - an attack without limit leaves samples right;
        - the gradient of the loss is exactly zero, or not finite, for some samples.

    Args:
        loss_fn: takes inputs, returns losses `[B]`.
        correct_fn: takes inputs, returns bool `[B]`: the prediction is right.
        inputs, bounds, layout, seed, model: as for `PGD.__call__`.
        attacks: name to untargeted attack.
        noise_samples: random points of the first attack's ball.

    Raises:
        ValueError: no attacks, or a targeted one.
    """
    if not attacks or any(attack.targeted for attack in attacks.values()):
        raise ValueError("evaluate: expected at least one attack, and none of them targeted")
    where = {"bounds": bounds, "layout": layout}
    flags = []
    with evaluating(model):

        @torch.no_grad()
        def correct(x):
            return correct_fn(x).bool()

        def mean_loss(x):
            with torch.no_grad():
                return float(loss_fn(x).mean())

        clean = correct(inputs)
        alive, accuracy, loss = clean.clone(), {}, {"clean": mean_loss(inputs)}
        for name, attack in attacks.items():
            perturbed = attack(loss_fn, inputs, seed=seed, **where)
            right = correct(perturbed)
            alive &= right
            accuracy[name], loss[name] = float(right.float().mean()), mean_loss(perturbed)

        first = next(iter(attacks.values()))
        options = {"eps": first.eps, "norm": first.norm, "granularity": first.granularity}
        problem = Problem("evaluate", loss_fn, inputs, **options, **where)
        noise = torch.stack([problem.value(problem.start(seed + 1 + i)) for i in range(noise_samples)]).amax(0)
        loss["noise"] = float(noise.mean())
        if loss["noise"] >= max(loss[name] for name in attacks) and loss["noise"] > loss["clean"]:
            flags.append("random noise raises the loss as much as the gradients do")

        flags += _gradient_flags(problem)
        step = first.step_size
        if type(first) is PGD:
            more = dataclasses.replace(first, steps=2 * first.steps, step_size=step)
            after, before = (mean_loss(a(loss_fn, inputs, seed=seed, **where)) for a in (more, first))
            if after < before - 1e-3 * abs(before):
                flags.append(f"{more.steps} steps give a weaker attack ({after:.4g}) than {first.steps} ({before:.4g})")
        # Without bounds no radius is "everything"; a large multiple of the given one stands for it.
        eps = {k: 1e3 * v for k, v in first.eps.items()} if isinstance(first.eps, Mapping) else 1e3 * first.eps
        limitless = PGD(eps, steps=max(20, first.steps), norm=first.norm, granularity=first.granularity)
        left = float(correct(limitless(loss_fn, inputs, seed=seed, **where)).float().mean())
        if left > 0.05:
            flags.append(f"an attack without limit leaves {left:.0%} of the samples right")
    return Robustness(float(clean.float().mean()), accuracy, float(alive.float().mean()), loss, tuple(flags))


def _gradient_flags(problem: Problem) -> list[str]:
    _, grads = problem.value_and_grad(problem.zeros())
    flags = []
    if not all(g.isfinite().all() for g in grads):
        flags.append("the gradient of the loss is not finite")
    zero = []
    for g, layout in zip(grads, problem.layout):
        rows = g.flatten(1).abs().amax(1) if g.dim() > 1 else g.abs()
        if layout is not None:
            peak = rows.new_zeros(layout.batch + 1)
            rows = peak.scatter_reduce(0, layout.samples(g.shape[0]), rows, "amax")[:-1][layout.lengths() > 0]
        zero.append(rows == 0)
    share = max(float(z.float().mean()) for z in zero if z.numel())
    if share > 0:
        flags.append(f"the gradient of the loss is exactly zero for {share:.0%} of the samples")
    return flags
