"""Initial values of weights: PyTorch's defaults, from an explicit source of random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lance_ref.engine.random import as_generator, manual_seed
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Shape
from lance_ref.nn.module import Parameter

__all__ = [
    "as_generator",
    "constant_parameter",
    "default_bound",
    "manual_seed",
    "normal_parameter",
    "shapes_only",
    "uniform_parameter",
]


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside the ``with`` block new layers get parameters without data: any network, no memory.

    Such a network can be traced (:func:`lance_ref.trace`), but not run.
    """
    previous, state.shapes_only = state.shapes_only, True
    try:
        yield
    finally:
        state.shapes_only = previous


def default_bound(weight_shape: Sequence[int]) -> float:
    """1 / √fan_in, with fan_in = the product of all sizes but the first.

    PyTorch's default for convolutions and linear layers, ``kaiming_uniform_`` with a = √5:
    gain·√(3 / fan_in) with gain = √(2 / (1 + a²)) = √(1/3). The bias has the same bound.
    """
    return 1 / math.sqrt(math.prod(weight_shape[1:]))


def uniform_parameter(shape: Shape, bound: float, rng: np.random.Generator | int | None = None) -> Parameter:
    """A float32 parameter drawn from U(−bound, bound)."""
    if state.shapes_only:
        return Parameter.meta_parameter(shape)
    values = as_generator(rng).random(shape, dtype=np.float32)  # in [0, 1)
    values *= 2 * bound
    values -= bound
    return Parameter(values)


def normal_parameter(shape: Shape, std: float, rng: np.random.Generator | int | None = None) -> Parameter:
    """A float32 parameter drawn from N(0, std²)."""
    if state.shapes_only:
        return Parameter.meta_parameter(shape)
    return Parameter(as_generator(rng).standard_normal(shape, dtype=np.float32) * np.float32(std))


def constant_parameter(shape: Shape, value: float, dtype: Any = np.float32) -> Parameter:
    """A parameter that starts with the same value everywhere."""
    if state.shapes_only:
        return Parameter.meta_parameter(shape, dtype)
    return Parameter(np.full(shape, value, dtype))
