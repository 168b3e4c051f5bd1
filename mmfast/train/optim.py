"""The optimiser's parts: parameter groups, the learning rate of a step, moving average of the weights, precision."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmfast.train.config import TrainConfig

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
)


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict]:
    """Two groups: matrices, convolutions and tables with weight decay; norms, biases and single numbers without.

    Args:
        modules: whose parameters are trained; a parameter that several share counts once.
        weight_decay: of the first group.
    """
    decayed, plain, seen = [], [], set()
    for root in modules:
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter in seen or not parameter.requires_grad:
                    continue
                seen.add(parameter)
                bare = parameter.dim() < 2 or name.endswith("bias") or isinstance(module, _NORMS)
                (plain if bare else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step 0 to `steps - 1`: a function of the step alone, so that resuming needs no state."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)


class WeightAverage:
    """Exponential moving average of parameters and floating-point buffers.

    Early averages use the decay `(1 + n) / (10 + n)` after n updates, so that the first random weights are forgotten.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.values = {name: value.detach().clone() for name, value in _floats(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = _floats(module)
        torch._foreach_lerp_(list(self.values.values()), [current[n].detach() for n in self.values], 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self, module: nn.Module):
        """Within the context the module has the averaged weights."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        for name, value in _floats(module).items():
            kept = value.clone()
            value.copy_(self.values[name])
            self.values[name].copy_(kept)


def _floats(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if value.is_floating_point()}


def bf16_in_hardware(device: torch.device) -> bool:
    """Whether bfloat16 products are computed by the machine itself, and so pay."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def autocast(amp: str, device: torch.device):
    """The context of the forward pass for `TrainConfig.amp`."""
    if amp == "bf16" or (amp == "auto" and bf16_in_hardware(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
