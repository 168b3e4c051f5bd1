"""mmfast: multimodal models without padding, on hand-written kernels."""

from mmfast.layout import Layout
from mmfast.mask import ModalityMask, Rule
from mmfast.ops.attention import attention

__version__ = "0.1.0"

__all__ = ["Layout", "ModalityMask", "Rule", "__version__", "attention"]
from mmfast.ops.packing import LayerNorm, Order, Part, RMSNorm, from_padded, pack, to_padded, unpack

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
    "from_padded",
    "pack",
    "to_padded",
    "unpack",
]
