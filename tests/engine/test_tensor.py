"""The tensor itself: dtypes, values in and out, and methods that are functions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from lance_ref import F, Tensor, nn


def leaf(*values: float) -> Tensor:
    return Tensor(np.array(values, np.float64), requires_grad=True)


def test_dtypes_of_new_tensors() -> None:
    """float32 by default; float64, integers and Booleans as given; no copy of an array."""
    assert Tensor([1, 2.5]).dtype == np.float32
    assert Tensor(3).dtype == np.float32
    assert Tensor([]).shape == (0,)
    for dtype in (np.float64, np.int64, np.uint8, bool):
        array = np.zeros(2, dtype)
        assert Tensor(array).dtype == dtype
        assert Tensor(array).data is array


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "NoneType is not numbers"),
        ("1", "str is not numbers"),
        ([1.0, None], "list is not numbers"),
        ([[1.0], [1.0, 2.0]], "list is not numbers"),
        (np.ones(2, np.float16), "float16, expected float32, float64 or integers"),
        (np.ones(2, complex), "complex128"),
        (Tensor(1.0), "is a Tensor already"),
    ],
    ids=str,
)
def test_data_that_is_no_number_is_refused(data: Any, says: str) -> None:
    """NumPy alone would read None as NaN and "1" as 1."""
    with pytest.raises(TypeError, match=says):
        Tensor(data)


def test_replacing_data_keeps_the_shape() -> None:
    """``conv.weight.data = array`` checks the shape and, for a leaf with gradients, the dtype."""
    weight = nn.Conv2d(2, 3, 1, rng=0).weight
    weight.data = np.ones((3, 2, 1, 1))
    assert weight.dtype == np.float64
    weight.data = Tensor(np.zeros((3, 2, 1, 1), np.float32))
    assert weight.dtype == np.float32
    with pytest.raises(ValueError, match=r"data has shape \(3, 2\), expected \(3, 2, 1, 1\)"):
        weight.data = np.ones((3, 2))
    with pytest.raises(TypeError, match="int64, expected float32 or float64"):
        weight.data = np.ones((3, 2, 1, 1), np.int64)


def test_an_array_on_the_left_of_an_operator() -> None:
    """NumPy asks the tensor, and the result is on the tape; in place too, and with NumPy's own numbers."""
    t = Tensor(np.array([1.0, 2.0], np.float32), requires_grad=True)
    a = np.array([4.0, 6.0], np.float32)
    for result, values in ((a + t, [5, 8]), (a - t, [3, 4]), (a * t, [4, 12]), (a / t, [4, 3]), (a @ t, 16)):
        assert isinstance(result, Tensor)
        assert result.requires_grad
        assert np.array_equal(result.data, values)
    scaled = np.float64(3) * t
    assert (scaled.dtype, scaled.data.tolist()) == (np.float32, [3, 6])
    a += t  # type: ignore[misc]
    assert isinstance(a, Tensor)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (np.tanh, "np.tanh takes no Tensor.*use lance_ref.functional.tanh, or tensor.data"),
        (np.arctan, "np.arctan takes no Tensor.*use a function of lance_ref.functional, or tensor.data"),
        (np.add.reduce, "np.add takes no Tensor"),
        (lambda t: np.add(np.ones(2), t, out=np.ones(2)), "np.add takes no Tensor"),
        (lambda t: np.ones(2) < t, "np.less takes no Tensor"),
    ],
)
def test_functions_of_numpy_are_refused(call: Any, says: str) -> None:
    """They would leave the tape without a word; the error names what does not."""
    with pytest.raises(TypeError, match=says):
        call(Tensor([1.0, 2.0], requires_grad=True))


def test_getting_values_out() -> None:
    """numpy, item and detach."""
    x = leaf(1.0, 2.0)
    assert x.numpy() is x.data
    assert x.detach().data is x.data
    assert not x.detach().requires_grad
    assert x[0].item() == 1.0
    assert isinstance(x[0].item(), float)
    with pytest.raises(ValueError, match=r"one element, got shape \(2,\)"):
        x.item()
    assert repr(x) == "Tensor([1., 2.], dtype=float64, requires_grad=True)"
    assert repr(Tensor.meta((2, 3))) == "Tensor(meta, shape=(2, 3), dtype=float32)"


@pytest.mark.parametrize(
    ("method", "function"),
    [
        (lambda x: x.sum(0), lambda x: F.sum(x, 0)),
        (lambda x: x.mean((0, 1), True), lambda x: F.mean(x, (0, 1), True)),
        (lambda x: x.max(1), lambda x: F.max(x, 1)),
        (lambda x: x.var(1, 0, True), lambda x: F.var(x, 1, 0, True)),
        (lambda x: x.reshape(3, 2), lambda x: F.reshape(x, (3, 2))),
        (lambda x: x.flatten(), F.flatten),
        (lambda x: x.permute(1, 0), lambda x: F.permute(x, (1, 0))),
        (lambda x: x.transpose(0, 1), lambda x: F.transpose(x, 0, 1)),
        (lambda x: x.exp(), F.exp),
        (lambda x: x.log(), F.log),
        (lambda x: x.sqrt(), F.sqrt),
        (lambda x: x.tanh(), F.tanh),
        (lambda x: x.sigmoid(), F.sigmoid),
        (lambda x: x.relu(), F.relu),
        (lambda x: -x, F.neg),
        (lambda x: x**2, lambda x: F.pow(x, 2)),
        (lambda x: x @ np.ones((3, 2)), lambda x: F.matmul(x, np.ones((3, 2)))),
        (lambda x: np.ones((4, 2)) @ x, lambda x: F.matmul(np.ones((4, 2)), x)),
        (lambda x: x[1, :2], lambda x: F.index(x, (1, slice(2)))),
    ],
)
def test_methods_are_functions(method: Any, function: Any) -> None:
    """Each method hands its arguments on in the right order."""
    x = Tensor(np.arange(1.0, 7).reshape(2, 3))
    np.testing.assert_array_equal(method(x).data, function(x).data)


def test_the_number_of_a_copy() -> None:
    """A shallow copy is the same tensor at the same place of the tape; deep and pickled copies are others."""
    x = Tensor(np.ones(2), requires_grad=True)
    shallow = copy.copy(x)
    assert (shallow.uid, shallow.data is x.data) == (x.uid, True)
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert other.uid not in (x.uid, shallow.uid)
        assert not np.shares_memory(other.data, x.data)
        assert other.requires_grad


def test_an_array_or_a_number_on_the_left() -> None:
    """Operators whose operands do not commute keep their order."""
    x = Tensor(np.array([4.0, 8.0], np.float32))
    assert (2 / x).data.tolist() == [0.5, 0.25]
    assert (2 - x).data.tolist() == [-2.0, -6.0]
    assert (x / 2).data.tolist() == [2.0, 4.0]
    assert (x - 2).data.tolist() == [2.0, 6.0]
