"""mmfast: multimodal models without padding, on hand-written kernels."""

from mmfast.layout import Layout
from mmfast.mask import ModalityMask, Rule
from mmfast.ops.perturbation import perturb_, random_start_

__version__ = "0.1.0"

__all__ = ["Layout", "ModalityMask", "Rule", "__version__", "perturb_", "random_start_"]
