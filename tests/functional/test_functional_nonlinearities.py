"""Activation functions, softmax and dropout: against PyTorch, at extremes, and bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import F, Tensor, manual_seed, tape
from lance_ref.nn.tracing import record

VALUES = np.concatenate([np.linspace(-12, 12, 97), [-3.0, -0.0, 0.0, 3.0, 6.0, -100.0, 100.0, -1e4, 1e4, 1e-8, -1e-8]])


@pytest.mark.parametrize(
    "name", ["tanh", "sigmoid", "gelu", "hardswish", "relu", "relu6", "softmax", "log_softmax", "exp", "sqrt", "log"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_pytorch(name: str, dtype: Any) -> None:
    """Values and gradients, at kinks and far out too, where only one convention is PyTorch's."""
    torch = pytest.importorskip("torch")
    values = VALUES.astype(dtype)
    if name in ("sqrt", "log"):
        values = np.abs(values) + dtype(1e-3)
    if name == "exp":
        values = np.clip(values, -80, 80)
    arguments = {"dim": 0} if "softmax" in name else {}
    g = np.random.default_rng(0).standard_normal(values.shape).astype(dtype)
    ours, theirs = Tensor(values, requires_grad=True), torch.tensor(values, requires_grad=True)
    out = getattr(F, name)(ours, **arguments)
    out.backward(g)
    function = getattr(torch.nn.functional, name, None) or getattr(torch, name)
    expected = function(theirs, **arguments)
    expected.backward(torch.tensor(g))
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(out.data, expected.detach().numpy(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ours.grad, theirs.grad.numpy(), rtol=tolerance, atol=tolerance)


def test_sigmoid_and_softmax_do_not_overflow() -> None:
    """Warnings are errors here: e^1000 anywhere would raise."""
    x = Tensor(np.array([-1000.0, -30.0, 0.0, 1000.0]), requires_grad=True)
    out = F.sigmoid(x)
    np.testing.assert_allclose(out.data, [0.0, 9.357622968839299e-14, 0.5, 1.0], rtol=1e-14)
    out.backward(np.ones(4))
    assert np.isfinite(x.grad).all()
    np.testing.assert_array_equal(F.softmax(np.array([[1e4, 0.0], [-1e4, -1e4]]), 1).data, [[1, 0], [0.5, 0.5]])
    np.testing.assert_allclose(F.log_softmax(np.array([1e4, 0.0])).data, [0.0, -1e4])
    masked = F.softmax(np.array([0.0, -np.inf, 0.0], np.float32))
    np.testing.assert_array_equal(masked.data, np.float32([0.5, 0, 0.5]))


@pytest.mark.parametrize("dim", [0, 1])
def test_every_row_is_shifted_by_its_own_maximum(dim: int) -> None:
    """Rows 1e4 apart: one maximum for all makes log 0 of every row but the largest."""
    x = np.array([[0.0, 1.0, 2.0], [1e4, 1e4 + 1, 1e4 + 2], [-1e4, 1 - 1e4, 2 - 1e4]])
    x = x if dim == 1 else x.T
    of_one = np.array([0.0, 1.0, 2.0]) - np.log(np.exp([0.0, 1.0, 2.0]).sum())
    expected = np.tile(of_one, (3, 1))
    np.testing.assert_allclose(F.log_softmax(x, dim).data, expected if dim == 1 else expected.T, rtol=1e-11)
    np.testing.assert_allclose(F.softmax(x, dim).data, np.exp(expected if dim == 1 else expected.T), rtol=1e-11)
    if dim == 1:
        losses = [float(F.cross_entropy(row[None], [1]).data) for row in x]
        np.testing.assert_allclose(losses, -of_one[1], rtol=1e-11)
        np.testing.assert_allclose(float(F.cross_entropy(x, [1, 1, 1]).data), -of_one[1], rtol=1e-11)


def test_nan_goes_through_relu() -> None:
    """A diverged network must not look healthy because ReLU turned NaN into 0."""
    for function in (F.relu, F.relu6):
        for requires_grad in (False, True):
            x = Tensor(np.array([np.nan, -1.0, 2.0], np.float32), requires_grad=requires_grad)
            np.testing.assert_array_equal(function(x).data, [np.nan, 0.0, 2.0])


def test_slopes_at_the_kinks_are_zero() -> None:
    """relu at 0, relu6 at 0 and 6: the gradient passes strictly between only."""
    x = Tensor(np.array([-1.0, 0.0, 0.5, 6.0, 7.0]), requires_grad=True)
    F.relu6(x).backward(np.ones(5))
    np.testing.assert_array_equal(x.grad, [0, 0, 1, 0, 0])
    x.grad = None
    F.relu(x).backward(np.ones(5))
    np.testing.assert_array_equal(x.grad, [0, 0, 1, 1, 1])


def test_a_blocked_gradient_is_zero_even_if_it_was_infinite() -> None:
    """A product with the mask would give inf·0 = NaN."""
    x = Tensor(np.array([-1.0, 1.0]), requires_grad=True)
    F.relu(x).backward(np.array([np.inf, 2.0]))
    np.testing.assert_array_equal(x.grad, [0, 2])


@given(shape=st.lists(st.integers(1, 7), max_size=3), ceiling=st.sampled_from(["relu", "relu6"]), flip=st.booleans())
def test_one_bit_per_element(shape: list[int], ceiling: str, flip: bool) -> None:
    """Any number of elements, also not a multiple of 8, also of a transposed tensor, each with its own bit."""
    rng = np.random.default_rng(len(shape))
    values = rng.uniform(-4, 10, shape)
    x = Tensor(values.T if flip else values, requires_grad=True)
    out = getattr(F, ceiling)(x)
    (entry,) = tape(out).entries
    assert (entry.what, entry.dtype, entry.nbytes) == ("mask", "uint8", -(-values.size // 8))
    g = rng.standard_normal(out.shape)
    out.backward(g)
    inside = (x.data > 0) & (x.data < (6 if ceiling == "relu6" else np.inf))
    np.testing.assert_array_equal(x.grad, np.where(inside, g, 0))


def test_dropout_keeps_what_it_should() -> None:
    """About 1 − p of the elements, scaled by 1 / (1 − p); the gradient through the same elements."""
    x = Tensor(np.full((200, 100), 3.0, np.float32), requires_grad=True)
    out = F.dropout(x, 0.2, rng=0)
    kept = out.data != 0
    assert abs(kept.mean() - 0.8) < 4 * np.sqrt(0.2 * 0.8 / kept.size)
    np.testing.assert_allclose(out.data[kept], 3 / 0.8, rtol=1e-6)
    assert tape(out).total_bytes == 20_000 // 8
    out.backward(np.ones(out.shape, np.float32))
    np.testing.assert_allclose(x.grad, np.where(kept, 1.25, 0), rtol=1e-6)


def test_dropout_draws_from_the_generator_that_it_is_given() -> None:
    """The same seed gives the same mask, a generator goes on, and manual_seed restarts the default one."""
    x = np.ones(64)
    np.testing.assert_array_equal(F.dropout(x, rng=5).data, F.dropout(x, rng=5).data)
    rng = np.random.default_rng(5)
    first, second = F.dropout(x, rng=rng).data, F.dropout(x, rng=rng).data
    np.testing.assert_array_equal(first, F.dropout(x, rng=5).data)
    assert (first != second).any()
    manual_seed(1)
    default = F.dropout(x).data
    assert (F.dropout(x).data != default).any()
    manual_seed(1)
    np.testing.assert_array_equal(F.dropout(x).data, default)


def test_dropout_that_drops_nothing_is_not_an_operation() -> None:
    """In evaluation, or with p = 0, x itself comes back: nothing computed, recorded, kept or drawn."""
    x = Tensor(np.ones(8), requires_grad=True)
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    with record() as records:
        assert F.dropout(x, 0.5, training=False, rng=rng) is x
        assert F.dropout(x, 0, rng=rng) is x
    assert records == []
    assert rng.bit_generator.state == before


def test_dropout_of_everything() -> None:
    """p = 1 gives zeros, not 0 · inf."""
    x = Tensor(np.ones(8), requires_grad=True)
    out = F.dropout(x, 1.0)
    np.testing.assert_array_equal(out.data, np.zeros(8))
    out.backward(np.ones(8))
    np.testing.assert_array_equal(x.grad, np.zeros(8))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: F.relu(np.arange(3)), TypeError, r"relu: inputs have dtypes \[.int64.\], expected float32 or float64"),
        (lambda: F.gelu(np.arange(3)), TypeError, "gelu.*int64"),
        (lambda: F.softmax(np.ones((2, 3)), 2), ValueError, r"softmax: dim is 2, expected an integer in \[-2, 2\)"),
        (lambda: F.log_softmax(np.ones((2, 3)), "1"), ValueError, "log_softmax: dim is '1'"),
        (lambda: F.dropout(np.ones(3), -0.1), ValueError, r"dropout: p is -0.1, expected a number in \[0, 1\]"),
        (lambda: F.dropout(np.ones(3), 1.5), ValueError, "p is 1.5"),
        (lambda: F.dropout(np.ones(3), float("nan")), ValueError, "p is nan"),
        (lambda: F.dropout(np.ones(3), "half"), ValueError, "p is 'half'"),
        (lambda: F.dropout(np.ones(3), rng=-1), ValueError, "seed is -1"),
        (lambda: F.dropout(np.arange(3)), TypeError, "dropout.*int64"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], says: str) -> None:
    """The message must say which argument, what came and what was expected."""
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(
    ("function", "slopes"), [(F.hardsigmoid, [0, 1 / 6, 1 / 6, 0]), (F.hardswish, [0, -0.5, 1.5, 1])]
)
def test_slopes_at_the_corners(function: Any, slopes: list[float]) -> None:
    """At −3 and 3 themselves they are those outside, next to them those inside."""
    just_inside = np.nextafter(3.0, 0)
    x = Tensor(np.array([-3.0, -just_inside, just_inside, 3.0]), requires_grad=True)
    function(x).sum().backward()
    np.testing.assert_allclose(x.grad, slopes, atol=1e-12)


def test_the_gradient_of_log_softmax_row_by_row() -> None:
    """g − softmax · Σg, the sum along the dimension alone."""
    x = Tensor(np.array([[1.0, 2.0], [3.0, 5.0]]), requires_grad=True)
    g = np.array([[1.0, 2.0], [4.0, 8.0]])
    (F.log_softmax(x, 1) * g).sum().backward()
    shares = np.exp(x.data) / np.exp(x.data).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(x.grad, g - shares * [[3.0], [12.0]])
