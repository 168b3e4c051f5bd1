"""EfficientNet-lite0: a frozen image encoder with public ImageNet weights.

Source: Tan and Le 2019, "EfficientNet", table 1; the lite variant drops squeeze-and-excitation, uses ReLU6 and keeps
stem and head fixed. Convolutions pad as TensorFlow does ("same": the odd pixel right and below).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# repeats, kernel, stride, expansion, channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, without bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
        if any(missing):
            x = pad(x, (missing[1] // 2, -(-missing[1] // 2), missing[0] // 2, -(-missing[0] // 2)))
        return super().forward(x)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Inverted residual: expand, depthwise, project. Names are those of the published weights."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self._expand_conv = _SameConv(inputs, width)
            self._bn0 = _norm(width)
        self._depthwise_conv = _SameConv(width, width, kernel, stride, groups=width)
        self._bn1 = _norm(width)
        self._project_conv = _SameConv(width, outputs)
        self._bn2 = _norm(outputs)
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """4.65 M parameters; `forward` gives the pooled features `[B, 1280]`, `classify` ImageNet's 1000 logits."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, 2), _norm(32)
        blocks, width = [], 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(width, outputs, kernel, stride if i == 0 else 1, expansion))
                width = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _SameConv(width, 1280), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> EfficientNetLite0:
        """The published weights, in evaluation mode. The file is read as plain tensors: no code in it is run."""
        model = cls()
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model.eval()

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        """uint8 `[B, 3, 224, 224]` -> what the weights expect, (x - 127) / 128."""
        return (images.float() - 127.0) / 128.0

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, 3, H, W]` normalised, 224 pixels as trained -> `[B, 1280]`."""
        x = nn.functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return nn.functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def classify(self, x: Tensor) -> Tensor:
        return self._fc(self(x))
