"""Several tasks on one backbone: one forward pass, shared parameters, weighted losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfast.tasks.batch import Batch


class MultiTask(nn.Module):
    """The weighted sum of several tasks' losses on the features of one forward pass.

    weighting "equal": `L = sum_i w_i L_i` with `weights`, 1 by default.
    weighting "uncertainty": `L = sum_i exp(-s_i) L_i + s_i / 2` with learned `s_i = log sigma_i^2`, 0 at first
    (Kendall, Gal, Cipolla 2018, equation 10, for likelihoods of the softmax kind).

    Equal weights are often as good as costlier balancing: report both.

    Args:
        tasks: name -> task with `loss_of(model, features, batch)`; tasks that are modules are trained.
        weighting: see above.
        weights: name -> fixed weight, for "equal".
    """

    def __init__(
        self, tasks: Mapping[str, object], *, weighting: str = "equal", weights: Mapping[str, float] | None = None
    ):
        super().__init__()
        if weighting not in ("equal", "uncertainty"):
            raise ValueError(f"MultiTask: weighting is {weighting!r}, expected 'equal' or 'uncertainty'")
        if not tasks:
            raise ValueError("MultiTask: tasks is empty, expected at least one")
        if unknown := sorted(set(weights or ()) - set(tasks)):
            raise ValueError(f"MultiTask: weights name {', '.join(unknown)}, expected some of {', '.join(tasks)}")
        if weights and weighting == "uncertainty":
            raise ValueError("MultiTask: weights are fixed, weighting='uncertainty' learns them; give one of the two")
        self.tasks = dict(tasks)
        # Tasks that are modules are registered, so that their parameters are trained and saved.
        self.modules_of_tasks = nn.ModuleDict({k: t for k, t in tasks.items() if isinstance(t, nn.Module)})
        self.weighting = weighting
        self.weights = dict.fromkeys(tasks, 1.0) | dict(weights or {})
        self.log_variance = nn.Parameter(torch.zeros(len(tasks))) if weighting == "uncertainty" else None

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
        """The weighted sum, each task's figures as "task/figure", and each task's weight."""
        features = model(batch.inputs)
        total: Tensor | float = 0.0
        figures = {}
        for i, (name, task) in enumerate(self.tasks.items()):
            loss, of_task = task.loss_of(model, features, batch)
            if self.log_variance is None:
                weight = self.weights[name]
                total = total + weight * loss
            else:
                s = self.log_variance[i]
                weight = (-s).exp()
                total = total + weight * loss + s / 2
            figures |= {f"{name}/{k}": v for k, v in of_task.items()}
            figures[f"{name}/weight"] = weight.detach() if isinstance(weight, Tensor) else weight
        return total, figures

    def evaluate(self, model: nn.Module, batches: Mapping[str, object]) -> dict:
        """Each task's own evaluation, as "task/figure".

        Args:
            batches: task name -> argument of that task's `evaluate`; a tuple is spread.
        """
        out = {}
        for name, given in batches.items():
            given = given if isinstance(given, tuple) else (given,)
            out |= {f"{name}/{k}": v for k, v in self.tasks[name].evaluate(model, *given).items()}
        return out
