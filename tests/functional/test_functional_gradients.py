"""What holds for every operation: its gradient is right, its dtype stays, and the public list is complete."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import check_vjp
from op_cases import ALIASES, CASES, Case

from lance_ref import F, Tensor, no_grad


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_equals_differences(case: Case) -> None:
    """A wrong backward, for any argument, alone or together, would show in some entry."""
    check_vjp(case.function, *case.arrays())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_stays_float32(case: Case) -> None:
    """A stray Python float or float64 table would double the memory without anyone noticing."""
    arrays = case.arrays(np.float32)
    tensors = [Tensor(array, requires_grad=True) for array in arrays]
    out = case.function(*tensors)
    assert out.dtype == np.float32
    assert out.data.dtype == np.float32
    assert isinstance(out.data, np.ndarray)
    out.backward(np.ones(out.shape, np.float32))
    exact = [Tensor(array.astype(np.float64), requires_grad=True) for array in arrays]
    reference = case.function(*exact)
    reference.backward(np.ones(out.shape))
    np.testing.assert_allclose(out.data, reference.data, rtol=1e-4, atol=1e-5)
    for tensor, other in zip(tensors, exact, strict=True):
        assert tensor.grad is not None
        assert other.grad is not None
        assert tensor.grad.dtype == np.float32
        np.testing.assert_allclose(tensor.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_are_left_alone(case: Case) -> None:
    """An operation, or its backward, that writes into its inputs would spoil other users of them."""
    arrays = case.arrays()
    tensors = [Tensor(array.copy(), requires_grad=True) for array in arrays]
    out = case.function(*tensors)
    gradient = np.ones(out.shape)
    out.backward(gradient)
    for tensor, array in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(tensor.data, array)
    np.testing.assert_array_equal(gradient, np.ones(out.shape))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_grad_gives_the_same_values(case: Case) -> None:
    """The way without a tape may take shortcuts, but not to another result."""
    arrays = case.arrays()
    taped = case.function(*(Tensor(array, requires_grad=True) for array in arrays))
    with no_grad():
        plain = case.function(*(Tensor(array, requires_grad=True) for array in arrays))
    np.testing.assert_array_equal(taped.data, plain.data)
    assert not plain.requires_grad


def test_every_operation_is_in_the_list() -> None:
    """A new operation must come with a case, or nothing above would test it."""
    assert {ALIASES.get(name, name) for name in F.__all__} == {case.op for case in CASES}
