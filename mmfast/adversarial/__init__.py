"""Attacks on dense and packed multimodal inputs, training with them, and robustness."""

from mmfast.adversarial.attacks import APGD, FGSM, MIFGSM, PGD
from mmfast.adversarial.robustness import Robustness, evaluate
from mmfast.adversarial.training import VILLA, FreeLB, adversarial_training_loss

__all__ = ["APGD", "FGSM", "MIFGSM", "PGD", "VILLA", "FreeLB", "Robustness", "adversarial_training_loss", "evaluate"]
