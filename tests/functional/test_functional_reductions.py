"""Reductions against NumPy over any shape and dimensions, ties and NaN of max, bad dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import F, Tensor, tape


@st.composite
def shapes_and_dims(draw: Any) -> tuple[tuple[int, ...], Any]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    dims = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    dims = [d - len(shape) if draw(st.booleans()) else d for d in dims]
    return shape, draw(st.sampled_from([None, dims[0], tuple(dims)]))


@given(case=shapes_and_dims(), keepdim=st.booleans())
def test_values_equal_numpys(case: Any, keepdim: bool) -> None:
    """Any dimensions, counted from either end, with or without keepdim."""
    shape, dim = case
    x = np.random.default_rng(1).standard_normal(shape)
    for ours, theirs in ((F.sum, np.sum), (F.mean, np.mean)):
        out = ours(x, dim, keepdim)
        np.testing.assert_allclose(out.data, theirs(x, axis=dim, keepdims=keepdim), rtol=1e-12, atol=1e-12)
        assert F.sum(Tensor.meta(shape), dim, keepdim).shape == out.shape
    np.testing.assert_allclose(F.var(x, dim, 0, keepdim).data, np.var(x, axis=dim, keepdims=keepdim), atol=1e-12)
    if not isinstance(dim, tuple):
        np.testing.assert_array_equal(F.max(x, dim, keepdim).data, np.max(x, axis=dim, keepdims=keepdim))


def test_the_first_of_equal_maxima_gets_the_gradient() -> None:
    """All of it, once: sharing it, or giving it to each, would be another function's gradient."""
    x = Tensor(np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), requires_grad=True)
    x.max(dim=1).backward(np.array([5.0, 7.0]))
    np.testing.assert_array_equal(x.grad, [[0, 5, 0], [7, 0, 0]])
    x.grad = None
    x.max().backward()
    np.testing.assert_array_equal(x.grad, [[0, 1, 0], [0, 0, 0]])


def test_nan_is_the_maximum() -> None:
    """As NumPy and PyTorch have it: NaN is passed on."""
    np.testing.assert_array_equal(F.max(np.array([[1.0, np.nan, 2.0]]), 1).data, [np.nan])


@pytest.mark.parametrize(
    ("n", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_positions_take_the_smallest_type_that_fits(n: int, dtype: str) -> None:
    """One byte for up to 256 candidates; a type too small would send gradients astray."""
    x = Tensor(np.arange(n, dtype=np.float64).reshape(1, n), requires_grad=True)
    out = x.max(dim=1)
    (entry,) = tape(out).entries
    assert (entry.what, entry.dtype) == ("argmax", dtype)
    out.backward(np.ones(1))
    assert x.grad is not None
    assert x.grad[0, n - 1] == 1
    assert x.grad.sum() == 1


X = np.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: F.sum(X, 3), ValueError, r"sum: dim is 3, expected an integer in \[-3, 3\) for shape \(2, 3, 4\)"),
        (lambda: F.mean(X, (0, -4)), ValueError, "mean: dim is -4"),
        (lambda: F.mean(X, (0, 0)), ValueError, r"dim is \(0, 0\).*none of them twice"),
        (lambda: F.sum(X, (1, -2)), ValueError, "none of them twice"),
        (lambda: F.sum(X, ()), ValueError, "at least one dimension"),
        (lambda: F.sum(X, 1.0), ValueError, "dim is 1.0"),
        (lambda: F.sum(X, True), ValueError, "dim is True"),
        (lambda: F.max(X, (0, 1)), ValueError, r"max: dim is \(0, 1\), expected an integer"),
        (lambda: F.max(np.ones((2, 0)), 1), ValueError, r"max: x has shape \(2, 0\).*at least one element"),
        (lambda: F.var(np.ones((3, 1)), 1), ValueError, "var: correction is 1, but x of shape .* has 1 element"),
        (lambda: F.var(X, correction=-1), ValueError, "correction is -1"),
        (lambda: F.sum(np.arange(3)), TypeError, "sum.*int64.*expected float32"),
        (lambda: F.max(np.arange(3)), TypeError, "max.*int64.*expected float32"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], says: str) -> None:
    """The message must say which argument, what came and what was expected."""
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(("unbiased", "correction"), [(True, 1), (False, 0)])
def test_unbiased_is_a_correction(unbiased: bool, correction: int) -> None:
    """PyTorch's older name, in the function and in the method."""
    x = np.random.default_rng(0).standard_normal((3, 4))
    wanted = x.var(axis=1, ddof=correction)
    np.testing.assert_allclose(F.var(x, 1, unbiased=unbiased).data, wanted)
    np.testing.assert_allclose(Tensor(x).var(dim=1, unbiased=unbiased).data, wanted)
