"""Batch norm in compiled loops: equal to the NumPy twin, and right where sums of squares would not be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref.algebra.kernels import threads
from lance_ref.algebra.kernels.batch_norm import (
    in_loops,
    normalise,
    normalise_backward,
    normalise_backward_numpy,
    normalise_numpy,
)

needs_numba = pytest.mark.skipif(not threads.numba_enabled(), reason="Numba is switched off or not installed")
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 5), st.integers(4, 7))


def draw(shape: tuple[int, ...], seed: int, dtype: Any = np.float64) -> tuple[np.ndarray, ...]:
    """x, gradient, weight and bias."""
    rng = np.random.default_rng(seed)
    sizes = (shape, shape, shape[1:2], shape[1:2])
    return tuple((rng.standard_normal(size) * 3 + 1).astype(dtype) for size in sizes)


@needs_numba
@given(shape=SHAPES, seed=st.integers(0, 99), affine=st.booleans(), parts=st.integers(1, 3))
def test_loops_equal_their_twin(shape: tuple[int, ...], seed: int, affine: bool, parts: int) -> None:
    """Output, statistics and all gradients, with weight and bias and without, in several threads."""
    x, g, weight, bias = draw(shape, seed)
    w, b = (weight, bias) if affine else (None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "_threads", lambda: parts)
        patch.setattr(threads, "SERIAL_ELEMENTS", 0)
        found = normalise(x, w, b, 1e-5)
        backward = normalise_backward(g, x, found[1], found[3], w, True)
        sums = normalise_backward(g, x, found[1], found[3], w, False)
    expected = normalise_numpy(x, w, b, 1e-5)
    twin = normalise_backward_numpy(g, x, expected[1], expected[3], w, True)
    for ours, theirs in zip((*found, *backward), (*expected, *twin), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)
        assert ours is not None
        assert ours.base is None  # a leaf need not copy it, and the tape keeps no other
    assert sums[0] is None
    for ours, theirs in zip(sums[1:], twin[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


@needs_numba
def test_a_mean_that_is_large_beside_the_deviation() -> None:
    """Numbers around 10 000 with a deviation of 1, in float32: the mean of squares minus that of the mean would give 0
    or worse, the sums of deviations give the variance to three digits, and that is all there is in such numbers."""
    rng = np.random.default_rng(0)
    x = (10_000 + rng.standard_normal((4, 2, 40, 50))).astype(np.float32)
    exact = x.astype(np.float64)
    _, mean, var, inv_std = normalise(x, None, None, 1e-5)
    np.testing.assert_allclose(mean, exact.mean(axis=(0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(var, exact.var(axis=(0, 2, 3)), rtol=1e-3)
    np.testing.assert_allclose(inv_std, 1 / np.sqrt(var + 1e-5), rtol=1e-6)
    with np.errstate(all="ignore"):
        naive = (x * x).mean(axis=(0, 2, 3)) - x.mean(axis=(0, 2, 3)) ** 2
    assert (np.abs(naive - 1) > 0.1).any()  # what the loops must not do


@needs_numba
def test_infinity_and_nan_stay_in_their_channel() -> None:
    """A channel with one of them is NaN as in NumPy, the others are what they were."""
    x, *_ = draw((3, 4, 3, 4), 0)
    whole = normalise(x, None, None, 1e-5)[0]
    x[1, 0, 1, 1], x[0, 2, 0, 0] = np.inf, np.nan
    out = normalise(x, None, None, 1e-5)[0]
    assert np.isnan(out[:, 2]).all()
    assert not np.isfinite(out[:, 0]).any()
    np.testing.assert_array_equal(out[:, [1, 3]], whole[:, [1, 3]])


def test_what_the_loops_take() -> None:
    """Packed arrays whose planes have eight numbers or more."""
    x = np.ones((3, 4, 2, 4))
    assert in_loops(x) is threads.numba_enabled()
    assert not in_loops(x[:, :, :, :3])
    assert not in_loops(np.ones((3, 4, 7)))
    assert not in_loops(np.ones((3, 4)))
    assert not in_loops(x.transpose(0, 2, 3, 1))
    assert not in_loops(x[:0])
