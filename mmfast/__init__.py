"""mmfast: multimodal models without padding, on hand-written kernels."""

from mmfast.layout import Layout
from mmfast.mask import ModalityMask, Rule
from mmfast.ops.attention import attention
from mmfast.ops.contrastive import contrastive_loss
from mmfast.ops.packing import LayerNorm, Order, Part, RMSNorm, from_padded, pack, to_padded, unpack
from mmfast.ops.perturbation import perturb_, random_start_
from mmfast.ops.rotary import rotary

__version__ = "0.1.0"

__all__ = [
    "LayerNorm",
    "Layout",
    "ModalityMask",
    "Order",
    "Part",
    "RMSNorm",
    "Rule",
    "__version__",
    "attention",
    "contrastive_loss",
    "from_padded",
    "pack",
    "perturb_",
    "random_start_",
    "rotary",
    "to_padded",
    "unpack",
]
