"""Optimisers write into the parameters' own arrays, a block at a time: the bits of whole arrays, nobody's values."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import Tensor, nn, optim
from lance_ref.engine import blocks
from lance_ref.engine.blocks import BLOCK_ELEMENTS, stretches
from lance_ref.nn import utils

SHAPES: list[tuple[int, ...]] = [(), (3,), (5, 4), (2, 3, 4), (0, 3)]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"betas": (0.5, 0.7), "weight_decay": 0.1}),
]


def sgd_by_hand(p: Any, grads: list[Any], lr: float, momentum: float = 0.0, dampening: float = 0.0,
                weight_decay: float = 0.0, nesterov: bool = False) -> Any:  # fmt: skip
    """The formulas on whole arrays, as the docstring has them."""
    v = None
    for g in grads:
        g = g + weight_decay * p if weight_decay else g
        if momentum:
            v = g.copy() if v is None else momentum * v + (1 - dampening) * g
            g = g + momentum * v if nesterov else v
        p = p - g * lr
    return p


def adam_by_hand(p: Any, grads: list[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999),
                 weight_decay: float = 0.0) -> Any:  # fmt: skip
    (b1, b2), m, v = betas, 0, 0
    for t, g in enumerate(grads, 1):
        g = g + weight_decay * p if weight_decay else g
        m = (1 - b1) * g + b1 * m
        v = (1 - b2) * g * g + b2 * v
        p = p - lr / (1 - b1**t) * m / (np.sqrt(v) / math.sqrt(1 - b2**t) + 1e-8)
    return p


BY_HAND: dict[str, Callable[..., Any]] = {"SGD": sgd_by_hand, "Adam": adam_by_hand}


@given(st.sampled_from(SHAPES), st.sampled_from(OPTIONS), st.sampled_from("fd"), st.booleans(), st.integers(1, 9))
def test_the_bits_of_the_formulas_on_whole_arrays(
    shape: tuple[int, ...], asked: tuple[str, dict[str, Any]], dtype: str, turned: bool, block: int
) -> None:
    """Over several steps, in blocks of any size, with arrays that lie in memory in different orders."""
    rng, (name, options) = np.random.default_rng(len(shape)), asked
    start = rng.standard_normal(shape).astype(dtype)
    grads = [np.asarray(rng.standard_normal(shape), dtype) for _ in range(3)]
    parameter = Tensor(start.copy(order="F") if turned else start.copy(), requires_grad=True)
    optimizer = getattr(optim, name)([parameter], lr=0.05, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", block)
        for grad in grads:
            parameter.grad = grad
            before = grad.copy()
            optimizer.step()
            np.testing.assert_array_equal(grad, before)
    expected = np.asarray(BY_HAND[name](start, grads, 0.05, **options))
    assert parameter.data.dtype == expected.dtype
    np.testing.assert_array_equal(parameter.data, expected)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_values_that_somebody_holds_stay(name: str, options: dict[str, Any]) -> None:
    """The old values, a look at them, a detached tensor, or another parameter on the same array."""
    holders: list[Callable[[Tensor], Any]] = [
        lambda p: p.data, lambda p: p.data[1:], lambda p: memoryview(p.data), lambda p: p.detach(),
        lambda p: Tensor(p.data, requires_grad=True),
    ]  # fmt: skip
    for hold in holders:
        parameter = Tensor(np.arange(6.0), requires_grad=True)
        held = hold(parameter)
        parameter.grad = np.ones(6)
        getattr(optim, name)([parameter], lr=0.1, **options).step()
        seen = held.data if isinstance(held, Tensor) else held
        np.testing.assert_array_equal(np.asarray(seen), np.arange(6.0)[-len(seen) :])
        assert not np.array_equal(parameter.data, np.arange(6.0))


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_step_takes_blocks_and_no_arrays(name: str, options: dict[str, Any]) -> None:
    """Values that nobody holds are changed where they lie, and what is allocated does not grow with them."""
    parameter = nn.Parameter(np.ones((64, 1 << 14), np.float32))  # 4 MiB
    optimizer = getattr(optim, name)([parameter], lr=0.1, **options)
    parameter.grad = np.ones(parameter.shape, np.float32)
    optimizer.step()
    address = parameter.data.ctypes.data
    tracemalloc.start()
    try:
        utils.clip_grad_norm_([parameter], 1e9)
        optimizer.step()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert parameter.data.ctypes.data == address
    assert most < 5 * 4 * BLOCK_ELEMENTS


def test_the_tape_notices_a_step_in_place() -> None:
    """A gradient of values that are gone would be wrong."""
    parameter, x = Tensor(np.ones(3), requires_grad=True), Tensor(np.ones(3), requires_grad=True)
    result = (parameter * x).sum()
    parameter.grad = np.ones(3)
    optim.SGD([parameter], lr=0.1).step()
    with pytest.raises(RuntimeError, match="was changed after the forward pass"):
        result.backward()


@given(st.integers(0, 3000), st.sampled_from("fd"), st.integers(0, 2))
def test_the_norm_has_the_bits_of_one_sum(size: int, dtype: str, seed: int) -> None:
    """Squares of a block at a time are summed as NumPy sums the squares of all."""
    array = np.random.default_rng(seed).standard_normal(size).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "BLOCK_ELEMENTS", 130)
        assert utils._sum_of_squares(array) == float(np.square(array, dtype=np.float64).sum())


@given(st.sampled_from(SHAPES), st.booleans(), st.integers(1, 9))
def test_stretches_cover_everything_once(shape: tuple[int, ...], turned: bool, block: int) -> None:
    """Writing to the looks writes to the arrays, each element once, at most a block at a time where it can be cut."""
    ones, counts = np.ones(shape, order="F" if turned else "C"), np.zeros(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", block)
        for one, count in stretches(ones, counts):
            assert one.shape == count.shape
            assert one.size <= max(block, ones.size // max(*shape, 1) if shape else 1)
            count += one
    np.testing.assert_array_equal(counts, 1)
