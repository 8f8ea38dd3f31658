"""Reshape, permute, concatenate, pad and indexing: NumPy's results, views, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import F, Tensor, tape
from lance_ref.nn.tracing import record

X = np.arange(24, dtype=np.float64).reshape(2, 3, 4)


@st.composite
def indices(draw: Any) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """A shape and any valid index: integers, slices, None, Ellipsis, integer arrays, masks."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    parts: list[Any] = []
    arrays = draw(st.sampled_from([(), (1,), (3,), (2, 3), (2, 1)]))
    for n in shape[: draw(st.integers(0, len(shape)))]:
        kind = draw(st.sampled_from(["integer", "slice", "array", "mask", "broadcast array"]))
        if draw(st.integers(0, 4)) == 0:
            parts.append(None)
        if kind == "integer":
            parts.append(draw(st.integers(-n, n - 1)))
        elif kind == "slice":
            start, stop = (draw(st.one_of(st.none(), st.integers(-5, 5))) for _ in range(2))
            parts.append(slice(start, stop, draw(st.sampled_from([None, 1, 2, -1]))))
        elif kind == "mask" and not any(isinstance(part, np.ndarray) for part in parts):
            parts.append(np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))))
        else:
            size = arrays if kind == "array" else arrays[-1:]
            parts.append(np.random.default_rng(n).integers(-n, n, size))
    if draw(st.booleans()) and len(parts) - parts.count(None) <= len(shape):
        parts.insert(draw(st.integers(0, len(parts))), Ellipsis)
    return shape, tuple(parts)


@given(case=indices())
def test_indexing_is_numpys(case: tuple[tuple[int, ...], tuple[Any, ...]]) -> None:
    """Values, shape (also from the shape alone) and gradient for any mixture of parts."""
    shape, index = case
    values = np.random.default_rng(0).standard_normal(shape)
    try:
        expected = values[index]
    except IndexError:  # a mask and an array that do not broadcast
        with pytest.raises(IndexError, match="index"):
            F.index(values, index)
        return
    x = Tensor(values, requires_grad=True)
    out = x[index]
    np.testing.assert_array_equal(out.data, expected)
    assert F.index(Tensor.meta(shape), index).shape == expected.shape
    g = np.random.default_rng(1).standard_normal(expected.shape)
    out.backward(g)
    positions = np.arange(values.size).reshape(shape)[index]
    gradient = np.bincount(positions.reshape(-1), g.reshape(-1), values.size).reshape(shape)
    np.testing.assert_allclose(x.grad, gradient, atol=1e-12)


def test_basic_indexing_is_a_view_and_keeps_nothing() -> None:
    """Slices and integers, down to a single number, cost no memory; arrays make a copy."""
    x = Tensor(X.copy(), requires_grad=True)
    for index in (1, (0, 1, 2), slice(1, None), (None, ..., -1)):
        out = x[index]
        assert np.shares_memory(out.data, x.data)
        assert tape(out).total_bytes == 0
    assert not np.shares_memory(x[[0, 1]].data, x.data)


@pytest.mark.parametrize(
    ("n", "dtype", "nbytes"), [(200, "uint8", 3), (256, "uint8", 3), (257, "uint16", 6), (70_000, "uint32", 12)]
)
def test_positions_are_kept_in_the_smallest_type(n: int, dtype: str, nbytes: int) -> None:
    """Three positions, the last one counted from the end: an int64 each would be 24 bytes."""
    x = Tensor(np.arange(n, dtype=np.float32), requires_grad=True)
    out = x[np.array([0, n - 1, -2])]
    np.testing.assert_array_equal(out.data, [0, n - 1, n - 2])
    (entry,) = tape(out).entries
    assert (entry.what, entry.dtype, entry.nbytes) == ("index", dtype, nbytes)
    out.backward(np.float32([1, 2, 3]))
    assert x.grad is not None
    assert (x.grad[0], x.grad[n - 1], x.grad[n - 2]) == (1, 2, 3)


def test_changing_the_index_afterwards_changes_nothing() -> None:
    """The tape has its own copy of the positions."""
    x = Tensor(np.zeros(4), requires_grad=True)
    positions = np.array([0, 1])
    out = x[positions]
    positions[:] = 3
    out.backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, [1, 1, 0, 0])


def test_a_record_shows_arrays_by_their_shape() -> None:
    """A record must compare equal between runs and keep no array alive."""
    with record() as records:
        F.index(X, (slice(1, None), np.array([[0, 2]])))
        F.index(X, (..., None, 1))
        F.index(X, np.eye(2, 3, dtype=bool))
    everything = slice(None)
    assert [r.attributes["index"] for r in records] == [
        (slice(1, None), ("array", (1, 2)), everything),
        (everything, everything, None, 1),
        (("array", (2,)), ("array", (2,)), everything),
    ]


def test_iterating_over_a_tensor_ends() -> None:
    """Python calls ``x[0], x[1], ...`` until IndexError."""
    assert [row.data.tolist() for row in Tensor(X[0])] == X[0].tolist()
    assert len(Tensor(X)) == 2
    with pytest.raises(TypeError, match="without dimensions"):
        len(Tensor(1.0))


def test_reshape_and_permute_share_the_buffer() -> None:
    """No copy where NumPy needs none; a transposed array is copied to be reshaped."""
    x = Tensor(X)
    for view in (x.reshape(6, 4), x.reshape((-1,)), x.flatten(1), x.permute(2, 0, 1), x.transpose(0, 2)):
        assert np.shares_memory(view.data, x.data)
    assert not np.shares_memory(x.transpose(0, 1).reshape(24).data, x.data)
    np.testing.assert_array_equal(x.transpose(0, 1).reshape(24).data, X.transpose(1, 0, 2).reshape(24))


@pytest.mark.parametrize(
    ("arguments", "shape"), [((), (24,)), ((1,), (2, 12)), ((0, 1), (6, 4)), ((-2,), (2, 12)), ((1, 1), (2, 3, 4))]
)
def test_flatten_merges_dimensions(arguments: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """From start to end, both included; a number becomes one element."""
    assert F.flatten(X, *arguments).shape == shape
    assert F.flatten(np.array(1.0)).shape == (1,)


@given(widths=st.lists(st.integers(0, 3), max_size=6).filter(lambda w: len(w) % 2 == 0), value=st.floats(-2, 2))
def test_pad_equals_pytorch(widths: list[int], value: float) -> None:
    """The order of the pairs, last dimension first, is easily got wrong."""
    torch = pytest.importorskip("torch")
    expected = torch.nn.functional.pad(torch.tensor(X), widths, value=value).numpy()
    np.testing.assert_array_equal(F.pad(X, widths, value=value).data, expected)


def test_pad_is_recorded_dimension_by_dimension() -> None:
    """The record is normalised: one pair for every dimension, first dimension first."""
    with record() as records:
        F.pad(X, (1, 2))
    assert dict(records[0].attributes) == {"padding": ((0, 0), (0, 0), (1, 2)), "value": 0.0}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: F.reshape(X, (5, -1)), ValueError, r"reshape: x has shape \(2, 3, 4\) with 24 elements.*\(5, -1\)"),
        (lambda: F.reshape(X, (23,)), ValueError, "24 elements"),
        (lambda: F.reshape(X, (-1, -1)), ValueError, "at most one -1"),
        (lambda: F.reshape(X, (-2, 12)), ValueError, "non-negative"),
        (lambda: F.reshape(X, (2.0, 12)), ValueError, "integers"),
        (lambda: F.reshape(np.ones((0, 3)), (0, -1)), ValueError, "do not fit"),
        (lambda: F.flatten(X, 2, 1), ValueError, "start_dim is 2 and end_dim is 1"),
        (lambda: F.flatten(X, 3), ValueError, "start_dim is 3"),
        (lambda: F.permute(X, (0, 1)), ValueError, r"permute: dims is \(0, 1\), expected every dimension"),
        (lambda: F.permute(X, (0, 1, 1)), ValueError, "once"),
        (lambda: F.permute(X, (0, 1, 3)), ValueError, "an entry of dims is 3"),
        (lambda: F.transpose(X, 0, 5), ValueError, "transpose: dim1 is 5"),
        (lambda: F.concatenate([]), ValueError, "tensors is empty"),
        (lambda: F.concatenate(X), ValueError, "single array"),
        (lambda: F.concatenate([X, X[:, :2]], 0), ValueError, r"tensors\[1\] has shape \(2, 2, 4\).*except in dim 0"),
        (lambda: F.concatenate([X, X[0]], 0), ValueError, r"tensors\[1\] has shape \(3, 4\)"),
        (lambda: F.concatenate([X, X], 3), ValueError, "dim is 3"),
        (lambda: F.concatenate([X, X.astype(np.float32)]), TypeError, "float64.*float32"),
        (lambda: F.concatenate([X, X.astype(int)]), TypeError, r"tensors\[1\] has dtype int64"),
        (lambda: F.pad(X, (1,)), ValueError, r"pad: pad is \(1,\)"),
        (lambda: F.pad(X, (1, -1)), ValueError, "non-negative"),
        (lambda: F.pad(X, (0,) * 8), ValueError, r"x of shape \(2, 3, 4\)"),
        (lambda: F.pad(X, (1, 1), mode="reflect"), ValueError, "mode is 'reflect'"),
        (lambda: F.pad(X, (1, 1), value="0"), TypeError, "value is a str"),
        (lambda: F.index(X, 2), IndexError, r"2 is out of bounds for dim 0 of x of shape \(2, 3, 4\)"),
        (lambda: F.index(X, (0, -4)), IndexError, "-4 is out of bounds for dim 1"),
        (lambda: F.index(X, (slice(None), [0, 3])), IndexError, "3 is out of bounds for dim 1"),
        (lambda: F.index(X, (0, 0, 0, 0)), IndexError, "4 indices for x of shape"),
        (lambda: F.index(X, (..., 0, ...)), IndexError, "one Ellipsis"),
        (lambda: F.index(X, np.ones(3, bool)), IndexError, r"mask has shape \(3,\), expected \(2,\)"),
        (lambda: F.index(X, ([0, 1], [0, 1, 2])), IndexError, "do not broadcast"),
        (lambda: F.index(X, 1.0), TypeError, "1.0, expected integers"),
        (lambda: F.index(X, "a"), TypeError, "'a'"),
        (lambda: F.index(X, True), TypeError, "True"),
        (lambda: F.index(X, slice(0.0, None)), TypeError, "bounds"),
        (lambda: F.index(Tensor.meta((3,)), Tensor.meta((3,), bool)), RuntimeError, "cannot be traced"),
        (lambda: F.reshape(np.arange(4), (2, 2)), TypeError, "reshape.*int64.*expected float32"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], says: str) -> None:
    """The message must say which argument, what came and what was expected."""
    with pytest.raises(error, match=says):
        call()
