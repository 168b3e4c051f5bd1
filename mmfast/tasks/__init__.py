"""Training objectives: small objects with `loss(model, batch) -> (loss, figures)` and `evaluate(model, batches)`."""

from mmfast.tasks.adversarial import Adversarial
from mmfast.tasks.batch import Batch
from mmfast.tasks.classification import Classification
from mmfast.tasks.contrastive import Contrastive
from mmfast.tasks.multitask import MultiTask
from mmfast.tasks.retrieval import chance, embed, ranks, recall, retrieval

__all__ = [
    "Adversarial",
    "Batch",
    "Classification",
    "Contrastive",
    "MultiTask",
    "chance",
    "embed",
    "ranks",
    "recall",
    "retrieval",
]
