"""Arithmetic: broadcasting and its adjoint, numbers and dtypes, the edges of domains, bad input."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import F, Tensor
from lance_ref.engine.arguments import unbroadcast

RNG = np.random.default_rng(0)


@st.composite
def broadcastable(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast: parts of one shape, some sizes 1, leading sizes left out."""
    full = draw(st.lists(st.integers(1, 4), max_size=4))

    def part() -> tuple[int, ...]:
        sizes = [draw(st.sampled_from([n, 1])) for n in full]
        return tuple(sizes[draw(st.integers(0, len(sizes))) :])

    return part(), part()


def gradient_by_loops(shape: tuple[int, ...], out_shape: tuple[int, ...], slope: np.ndarray) -> np.ndarray:
    """Add up, output by output, what each contributes to the input element that it was made from."""
    grad = np.zeros(shape)
    for position in itertools.product(*map(range, out_shape)):
        own = position[len(position) - len(shape) :]
        grad[tuple(0 if n == 1 else i for i, n in zip(own, shape, strict=True))] += slope[position]
    return grad


@given(shapes=broadcastable())
def test_gradients_of_broadcast_operands_are_summed(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """A dimension summed too much, too little, or a lost size of 1 would show, for any pair of shapes."""
    a, b = (Tensor(RNG.uniform(0.5, 2, shape), requires_grad=True) for shape in shapes)
    g = RNG.standard_normal(np.broadcast_shapes(*shapes))
    slopes = {
        operator.add: (g, g),
        operator.sub: (g, -g),
        operator.mul: (g * b.data, g * a.data),
        operator.truediv: (g / b.data, -g * a.data / b.data**2),
    }
    for operation, (slope_a, slope_b) in slopes.items():
        a.grad = b.grad = None
        out = operation(a, b)
        np.testing.assert_array_equal(out.data, operation(a.data, b.data))
        out.backward(g)
        for tensor, slope in ((a, slope_a), (b, slope_b)):
            expected = gradient_by_loops(tensor.shape, out.shape, slope)
            np.testing.assert_allclose(tensor.grad, expected, rtol=1e-12, atol=1e-12)


@given(shapes=broadcastable())
def test_unbroadcast_is_the_adjoint_of_broadcasting(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """⟨broadcast(x), g⟩ = ⟨x, unbroadcast(g)⟩."""
    x, g = RNG.standard_normal(shapes[0]), RNG.standard_normal(np.broadcast_shapes(*shapes))
    folded = unbroadcast(g, x.shape)
    assert unbroadcast(g.astype(np.float32), x.shape).dtype == np.float32
    assert folded.shape == x.shape
    np.testing.assert_allclose(np.sum(np.broadcast_to(x, g.shape) * g), np.sum(x * folded), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", [2, 2.5, True, np.float64(2.5), np.float32(2.5), np.int64(2)], ids=repr)
def test_a_number_takes_the_other_operands_dtype(dtype: Any, number: Any) -> None:
    """Otherwise ``x * 0.5`` would raise or turn float32 into float64."""
    x = Tensor(np.array([1, 2], dtype), requires_grad=True)
    for out in (x + number, number + x, x - number, number - x, x * number, number * x, x / number, number / x):
        assert isinstance(out, Tensor)
        assert out.dtype == dtype
    np.testing.assert_allclose((number - x).data, float(number) - x.data)
    np.testing.assert_allclose((number / x).data, float(number) / x.data)


def test_an_array_on_the_left_becomes_a_tensor() -> None:
    """NumPy must not take the operation over and make an array of objects out of it."""
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    array = np.full(3, 2, np.float32)
    for out in (array + x, array - x, array * x, array / x, np.ones((4, 2), np.float32) @ x):
        assert isinstance(out, Tensor)
        assert out.requires_grad


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x: x + np.ones((2, 4), np.float32), ValueError, r"add: a has shape \(2, 3\) and b has shape \(2, 4\)"),
        (lambda x: F.mul(x, np.ones((4, 3), np.float32)), ValueError, r"mul: .*\(2, 3\).*\(4, 3\).*broadcast"),
        (lambda x: x + np.ones(3), TypeError, "add.*float32.*float64.*one floating dtype"),
        (lambda x: x / np.ones(3), TypeError, "div.*float32.*float64"),
        (lambda x: x - np.ones(3, np.int64), TypeError, "sub: b has dtype int64"),
        (lambda x: F.mul(np.ones(3, bool), x), TypeError, "mul: a has dtype bool"),
        (lambda x: F.add(np.ones(3, np.int32), 1), TypeError, "int32"),
        (lambda x: F.exp(np.arange(3)), TypeError, "int64"),
        (lambda x: F.log(np.arange(3)), TypeError, "int64"),
        (lambda x: x**x, TypeError, "pow: exponent is a Tensor, expected a number"),
        (lambda x: F.pow(x, np.ones(3)), TypeError, "exponent is a ndarray"),
        (lambda x: F.pow(x, "2"), TypeError, "exponent is a str"),
        (lambda x: x + "1", TypeError, "str is not numbers"),
        (lambda x: x + None, TypeError, "NoneType is not numbers"),
        (lambda x: F.add(x, [1.0, None, 2.0]), TypeError, "list is not numbers"),
        (lambda x: x * 1j, TypeError, "complex"),
        (lambda x: x + np.ones(3, np.float16), TypeError, "float16"),
    ],
)
def test_bad_operands_are_named(call: Any, error: type[Exception], says: str) -> None:
    """The message must say which argument, what came and what was expected."""
    with pytest.raises(error, match=says):
        call(Tensor(np.ones((2, 3), np.float32)))


def test_the_slope_of_sqrt_at_zero_is_infinite_and_silent() -> None:
    """As in PyTorch; a warning, an error in tests, would be worse than the infinity."""
    x = Tensor(np.array([0.0, 4.0]), requires_grad=True)
    F.sqrt(x).backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, [np.inf, 0.25])


def test_powers_at_the_edge_of_their_domain() -> None:
    """0⁰ is a constant with slope 0; 0^½ has slope inf; (−8)³ and (−2)² are exact; no warning in backward."""
    for base, exponent, slope in ((0.0, 0, 0.0), (0.0, 0.5, np.inf), (-8.0, 3, 192.0), (-2.0, 2, -4.0), (0.0, 1, 1.0)):
        x = Tensor(np.array([base]), requires_grad=True)
        out = x**exponent
        assert out.data[0] == base**exponent
        out.backward(np.ones(1))
        assert x.grad is not None
        assert x.grad[0] == slope


def test_a_negative_base_with_a_fractional_exponent() -> None:
    """NumPy warns where the NaN is born; the gradient is NaN without another warning."""
    x = Tensor(np.array([-1.0, 4.0]), requires_grad=True)
    with pytest.warns(RuntimeWarning, match="invalid"):
        out = x**0.5
    out.backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, [np.nan, 0.25])


def test_dividing_by_zero_warns_once() -> None:
    """NumPy's warning in forward, none in backward."""
    a, b = Tensor(np.array([1.0]), requires_grad=True), Tensor(np.array([0.0]), requires_grad=True)
    with pytest.warns(RuntimeWarning, match="divide by zero"):
        out = a / b
    out.backward(np.ones(1))
    np.testing.assert_array_equal(a.grad, [np.inf])
    np.testing.assert_array_equal(b.grad, [-np.inf])
