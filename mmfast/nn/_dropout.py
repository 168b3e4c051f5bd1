"""Dropout of attention weights, as `mmfast.attention` takes it."""

from __future__ import annotations

import torch


def attention_dropout(p: float, training: bool, device: torch.device) -> dict:
    """Arguments of `mmfast.attention`: none unless training, else a fresh seed of torch's generator on the device."""
    if not training or p == 0:
        return {}
    return {"dropout_p": p, "dropout_seed": torch.randint(2**62, (1,), device=device)}
