"""Small networks without biases, two tasks, and a training loop: shared by the tests of GPM and of protection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lance_ref import F, Tensor, nn
from lance_ref.continual import feature_gram, update_protected
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.nn.utils import clip_grad_norm_
from lance_ref.optim import SGD, Optimizer

LEAK = {np.float64: 1e-6, np.float32: 1e-4}
"""Largest share of a weight's change that may lie along protected directions."""

BODY = {"linear": ("0", "2"), "conv": ("0", "2", "5")}
INPUT = {"linear": (14,), "conv": (2, 5, 6)}
HEAD = {"linear": "4", "conv": "7"}


def make_net(kind: str, dtype: Any, bias: bool = False) -> nn.Sequential:
    """An MLP 14-12-9, or two convolutions and a linear layer; then a head of 3 with a bias of its own."""
    if kind == "linear":
        net = nn.Sequential(
            nn.Linear(14, 12, bias=bias, rng=0), nn.ReLU(), nn.Linear(12, 9, bias=bias, rng=1), nn.ReLU(),
            nn.Linear(9, 3, rng=2),
        )  # fmt: skip
    else:
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=bias, rng=0), nn.ReLU(),
            nn.Conv2d(4, 5, (2, 3), stride=(2, 1), bias=bias, rng=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(40, 8, bias=bias, rng=2), nn.ReLU(), nn.Linear(8, 3, rng=3),
        )  # fmt: skip
    return net.to(dtype)


def task(kind: str, dtype: Any, seed: int, count: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Random inputs of falling energies, and labels."""
    rng = np.random.default_rng(seed)
    shape = INPUT[kind]
    scale = np.geomspace(2, 0.2, int(np.prod(shape)))[rng.permutation(int(np.prod(shape)))]
    x = rng.standard_normal((count, *shape)) * scale.reshape(shape)
    return x.astype(dtype), rng.integers(0, 3, count)


def bases_of(net: Module, kind: str, x: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """What a task on ``x`` needs of every layer but the head."""
    grams = feature_gram(net, [x], BODY[kind])
    return {path: update_protected(None, K, threshold).basis for path, K in grams.items()}


def train(
    net: Module,
    optimizer: Optimizer,
    x: np.ndarray,
    labels: np.ndarray,
    steps: int,
    clip: float | None = None,
    after_backward: Callable[[], None] = lambda: None,
) -> list[float]:
    """A few steps on all of ``x``; the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), Tensor(labels))
        loss.backward()
        after_backward()
        if clip is not None:
            clip_grad_norm_(optimizer.params, clip)
        optimizer.step()
        losses.append(float(loss.data))
    return losses


def sgd(net: Module, lr: float = 0.2, **settings: Any) -> SGD:
    """SGD of all parameters."""
    return SGD(list(net.parameters()), lr=lr, **settings)


def weights(net: Module, paths: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Copies of the layers' weights."""
    modules = weighted_layers(net)
    return {path: modules[path].weight.data.copy() for path in paths}
