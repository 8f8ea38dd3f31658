"""Learning-rate schedules: each sets ``optimizer.lr`` from the number of epochs gone by."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lance_ref.optim.optimizer import Optimizer, at_least


class LRScheduler:
    """Base class: a subclass says which rate belongs to which epoch.

    Call :meth:`step` once after each epoch (or each step: the unit is the caller's).

    Parameters
    ----------
    optimizer : Optimizer
        Its ``lr`` when the schedule is made is the base rate.

    Attributes
    ----------
    base_lr : float
        The rate at epoch 0.
    last_epoch : int
        How often :meth:`step` was called.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected an optimiser of lance_ref.optim")
        self.optimizer = optimizer
        self.base_lr = optimizer.lr
        self.last_epoch = 0

    def rate(self, epoch: int) -> float:
        """The learning rate at an epoch, from 0."""
        raise NotImplementedError

    def step(self) -> None:
        """Go to the next epoch and set the optimiser's rate."""
        self.last_epoch += 1
        self.optimizer.lr = self.rate(self.last_epoch)

    def get_last_lr(self) -> list[float]:
        """The current rate; a list of one, as in PyTorch."""
        return [self.optimizer.lr]

    def state_dict(self) -> dict[str, np.ndarray]:
        """``base_lr`` and ``last_epoch`` as arrays of shape ()."""
        return {"base_lr": np.asarray(self.base_lr), "last_epoch": np.asarray(self.last_epoch)}

    def load_state_dict(self, state_dict: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`state_dict` gave, and set the optimiser's rate accordingly.

        Raises
        ------
        KeyError, ValueError
            If a name is missing or a value is out of range.
        """
        base_lr = at_least("base_lr", float(state_dict["base_lr"]), 0)
        last_epoch = _positive("last_epoch", int(state_dict["last_epoch"]), smallest=0)
        self.base_lr, self.last_epoch = base_lr, last_epoch
        self.optimizer.lr = self.rate(last_epoch)


class CosineAnnealingLR(LRScheduler):
    """lr(t) = eta_min + (lr(0) − eta_min) · (1 + cos(π t / T_max)) / 2.

    Parameters
    ----------
    optimizer : Optimizer
    T_max : int
        Epochs from the base rate to ``eta_min``; the cosine goes on (rises again) after that.
    eta_min : float
        The smallest rate, at least 0.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0) -> None:
        super().__init__(optimizer)
        self.T_max = _positive("T_max", T_max)
        self.eta_min = at_least("eta_min", eta_min, 0)

    def rate(self, epoch: int) -> float:
        return self.eta_min + (self.base_lr - self.eta_min) * (1 + math.cos(math.pi * epoch / self.T_max)) / 2


class StepLR(LRScheduler):
    """lr(t) = lr(0) · gamma^⌊t / step_size⌋.

    Parameters
    ----------
    optimizer : Optimizer
    step_size : int
        Epochs between two changes.
    gamma : float
        The factor of each change, at least 0.
    """

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        super().__init__(optimizer)
        self.step_size = _positive("step_size", step_size)
        self.gamma = at_least("gamma", gamma, 0)

    def rate(self, epoch: int) -> float:
        return self.base_lr * self.gamma ** (epoch // self.step_size)


def _positive(name: str, value: int, smallest: int = 1) -> int:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= smallest:
        return int(value)
    raise ValueError(f"{name} is {value!r}, expected an integer of at least {smallest}")
