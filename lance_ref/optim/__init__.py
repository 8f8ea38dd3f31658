"""Optimisers, learning-rate schedules and gradient clipping, with PyTorch's names and arithmetic."""

from lance_ref.nn.utils import clip_grad_norm_
from lance_ref.optim import lr_scheduler
from lance_ref.optim.adam import Adam
from lance_ref.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR
from lance_ref.optim.optimizer import Optimizer
from lance_ref.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "CosineAnnealingLR",
    "LRScheduler",
    "Optimizer",
    "StepLR",
    "clip_grad_norm_",
    "lr_scheduler",
]
