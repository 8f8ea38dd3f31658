"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from lance_ref.engine.blocks import stretches
from lance_ref.engine.tensor import Tensor
from lance_ref.optim.optimizer import Optimizer


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, as PyTorch computes it.

    Parameters
    ----------
    params : iterable of Tensor
    lr : float
        Learning rate, at least 0.
    momentum, dampening, weight_decay : float
        At least 0.
    nesterov : bool
        Needs momentum > 0 and dampening = 0.

    Raises
    ------
    ValueError
        If there are no parameters or a setting is out of range.

    Notes
    -----
    With gradient g and parameter p, per step::

        g ← g + weight_decay · p
        v ← g                                   at the parameter's first step
        v ← momentum · v + (1 − dampening) · g  afterwards
        p ← p − lr · (g + momentum · v  if nesterov else  v)

    The momentum buffer costs as many bytes as the parameters that train; it is not on the tape.

    Examples
    --------
    >>> w = Tensor([1.0, 2.0], requires_grad=True)
    >>> (w * w).sum().backward()
    >>> SGD([w], lr=0.25).step()
    >>> w.data
    array([0.5, 1. ], dtype=float32)
    """

    settings: ClassVar[tuple[str, ...]] = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    buffer_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(params, lr)
        if not isinstance(nesterov, (bool, np.bool_)):
            raise TypeError(f"nesterov is {nesterov!r}, expected True or False")
        self.check_settings(momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=float(nesterov))
        self.momentum = float(momentum)
        self.dampening = float(dampening)
        self.weight_decay = float(weight_decay)
        self.nesterov = bool(nesterov)

    @classmethod
    def check_settings(cls, **settings: float) -> None:
        super().check_settings(**settings)
        if settings["nesterov"] and (settings["momentum"] <= 0 or settings["dampening"] != 0):
            raise ValueError(
                f"nesterov needs momentum > 0 and dampening = 0, got momentum {settings['momentum']} "
                f"and dampening {settings['dampening']}"
            )

    def update(self, position: int, data: np.ndarray, grad: np.ndarray, new: np.ndarray) -> None:
        first = self.buffers["momentum_buffer"][position] is None
        velocity = self.remembered("momentum_buffer", position) if self.momentum else grad
        for p, g, v, out in stretches(data, grad, velocity, new):
            if self.weight_decay:
                g = g + self.weight_decay * p
            if self.momentum and first:
                v[...] = g
            elif self.momentum:
                v *= self.momentum
                v += (1 - self.dampening) * g
            step = g if not self.momentum else g + self.momentum * v if self.nesterov else v
            np.subtract(p, np.multiply(step, self.lr), out=out)
