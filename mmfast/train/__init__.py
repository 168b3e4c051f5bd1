"""The bundled trainer: a loop to read, checkpoints without pickle, a log in JSON lines."""

from mmfast.train.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, load_weights
from mmfast.train.config import TrainConfig
from mmfast.train.logs import RunLog, read_log
from mmfast.train.progress import Progress
from mmfast.train.trainer import Interrupted, NonFiniteLoss, Trainer

__all__ = [
    "CheckpointError",
    "Interrupted",
    "NonFiniteLoss",
    "Progress",
    "RunLog",
    "TrainConfig",
    "Trainer",
    "find_checkpoint",
    "load_checkpoint",
    "load_weights",
    "read_log",
]
