"""mmfast: multimodal models without padding, on hand-written kernels."""

from mmfast.layout import Layout
from mmfast.mask import ModalityMask, Rule
from mmfast.ops.attention import attention

__version__ = "0.1.0"

__all__ = ["Layout", "ModalityMask", "Rule", "__version__", "attention"]
