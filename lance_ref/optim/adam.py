"""Adam (Kingma & Ba, ICLR 2015, arXiv 1412.6980)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from lance_ref.engine.blocks import stretches
from lance_ref.engine.tensor import Tensor
from lance_ref.optim.optimizer import Optimizer, at_least


class Adam(Optimizer):
    """Adam, as PyTorch computes it (weight decay is added to the gradient, not decoupled).

    Parameters
    ----------
    params : iterable of Tensor
    lr : float
        Learning rate, at least 0.
    betas : pair of float
        Decay of the running means of g and g², each in [0, 1).
    eps : float
        Added to the denominator, at least 0.
    weight_decay : float
        At least 0.

    Raises
    ------
    ValueError
        If there are no parameters or a setting is out of range.

    Notes
    -----
    At the parameter's t-th step (Algorithm 1 of the paper)::

        g ← g + weight_decay · p
        m ← β1 · m + (1 − β1) · g
        v ← β2 · v + (1 − β2) · g²
        p ← p − lr · (m / (1 − β1ᵗ)) / (√(v / (1 − β2ᵗ)) + eps)

    The two buffers cost twice the bytes of the parameters that train; they are not on the tape.
    """

    settings: ClassVar[tuple[str, ...]] = ("lr", "beta1", "beta2", "eps", "weight_decay")
    buffer_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas is {betas!r}, expected a pair of numbers")
        self.check_settings(beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        self.beta1, self.beta2 = float(betas[0]), float(betas[1])
        self.eps = float(eps)
        self.weight_decay = float(weight_decay)

    @property
    def betas(self) -> tuple[float, float]:
        """(β1, β2)"""
        return self.beta1, self.beta2

    @classmethod
    def check_settings(cls, **settings: float) -> None:
        super().check_settings(**settings)
        for name in ("beta1", "beta2"):
            if at_least(name, settings[name], 0) >= 1:
                raise ValueError(f"{name} is {settings[name]!r}, expected a number in [0, 1)")

    def update(self, position: int, data: np.ndarray, grad: np.ndarray, new: np.ndarray) -> None:
        t = self.steps[position]
        step_size, correction = self.lr / (1 - self.beta1**t), math.sqrt(1 - self.beta2**t)
        mean, square = self.remembered("exp_avg", position), self.remembered("exp_avg_sq", position)
        for p, g, m, v, out in stretches(data, grad, mean, square, new):
            if self.weight_decay:
                g = g + self.weight_decay * p
            m *= self.beta1
            m += (1 - self.beta1) * g
            v *= self.beta2
            v += (1 - self.beta2) * g * g
            denominator = np.sqrt(v) / correction
            denominator += self.eps
            step = step_size * m
            step /= denominator
            np.subtract(p, step, out=out)
            del denominator, step  # before those of the next block are there
