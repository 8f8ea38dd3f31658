"""Random networks of operations that run fused and of some that do not, for the tests of fused passes."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module

KINDS = (
    "pointwise",
    "depthwise",
    "conv",
    "strided",
    "norm",
    "relu",
    "relu6",
    "hardswish",
    "hardsigmoid",
    "add",
    "twice",
)
KINDS += ("mul", "scale", "pool", "exp", "training norm")


class Graph(Module):
    """Operations, each on an earlier value; some values stay named, so that they have to be there at the end.

    Parameters
    ----------
    steps : list of (kind, value, other value)
        Values are counted from the latest one backwards.
    kept : list of int
        Values that are added up at the end, counted likewise; those of another shape are left out.
    """

    def __init__(
        self, channels: int, steps: list[tuple[str, int, int]], kept: list[int], rng: np.random.Generator
    ) -> None:
        super().__init__()
        self.steps, self.kept = steps, kept
        for i, (kind, _, _) in enumerate(steps):
            layer = make(kind, channels, rng)
            if layer is not None:
                self.add_module(f"layer{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for i, (kind, position, other) in enumerate(self.steps):
            a, b = values[-1 - position % len(values)], values[-1 - other % len(values)]
            layer = self._modules.get(f"layer{i}")
            values.append(layer(a) if layer is not None else between(kind, a, b))
            del a, b
            alive = [k % len(values) for k in self.kept]
            if i % 3 == 2:  # what nobody names any more is gone
                values = [v for j, v in enumerate(values) if j in alive or j >= len(values) - 2]
        result = values[-1]
        for k in self.kept:
            more = values[-1 - k % len(values)]
            if more.shape == result.shape:
                result = result + more * 0.5
        return result


def make(kind: str, channels: int, rng: np.random.Generator) -> Module | None:
    C, biased = channels, bool(rng.integers(2))
    layers: dict[str, Any] = {
        "pointwise": lambda: nn.Conv2d(C, C, 1, bias=biased, rng=rng),
        "depthwise": lambda: nn.Conv2d(C, C, 3, padding=1, groups=C, bias=biased, rng=rng),
        "conv": lambda: nn.Conv2d(C, C, (3, 2), padding=((2, 0), (0, 1)), dilation=(1, 1), bias=biased, rng=rng),
        "strided": lambda: nn.Conv2d(C, C, 3, stride=(2, 1), padding=1, bias=biased, rng=rng),
        "pool": lambda: nn.MaxPool2d(3, 1, 1),
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "hardswish": nn.Hardswish,
        "hardsigmoid": nn.Hardsigmoid,
    }
    if kind in ("norm", "training norm"):
        norm = nn.BatchNorm2d(C)
        norm.frozen = kind == "norm"
        norm.running_mean[:] = rng.standard_normal(C)
        norm.running_var[:] = rng.uniform(0.5, 2, C)
        norm.weight.data[:], norm.bias.data[:] = rng.standard_normal((2, C))
        return norm
    found: Module | None = layers[kind]() if kind in layers else None
    return found


def between(kind: str, a: Tensor, b: Tensor) -> Tensor:
    if kind == "exp":
        return F.exp(a * 0.1)
    if kind == "twice":
        return a + a
    if kind == "scale":
        return a * F.adaptive_avg_pool2d(b, 1)
    if a.shape != b.shape:
        return a + 1.0
    return a + b if kind == "add" else a * b


@st.composite
def graphs(draw: Any) -> tuple[int, list[tuple[str, int, int]], list[int], int]:
    """(channels, steps, kept, seed)."""
    steps = st.tuples(st.sampled_from(KINDS), st.integers(0, 2), st.integers(0, 3))
    lists = st.lists(steps, min_size=2, max_size=14)
    kept = st.lists(st.integers(0, 5), max_size=2)
    return draw(st.integers(2, 5)), draw(lists), draw(kept), draw(st.integers(0, 99))
