"""Counted products warn of an invalid value or an overflow when the result has one, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lance_ref.engine.counting import count_macs, matmul, tensordot


@pytest.fixture
def flag_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's products as a BLAS kernel makes them that multiplies garbage beside its operands."""

    def beside(exact: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def product(*args: Any, **kwargs: Any) -> np.ndarray:
            np.subtract(np.float32(np.inf), np.float32(np.inf))
            return exact(*args, **kwargs)

        return product

    for name in ("matmul", "tensordot"):
        monkeypatch.setattr(np, name, beside(getattr(np, name)))


A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((3, 4), np.float32)


def test_the_fault_would_be_seen(flag_raised: None) -> None:
    with pytest.raises(RuntimeWarning, match="invalid value"):
        np.matmul(A, B)


def test_a_flag_that_no_element_deserves_is_no_warning(flag_raised: None) -> None:
    np.testing.assert_array_equal(matmul(A, B), A.sum(1, keepdims=True) * B[:1])
    np.testing.assert_array_equal(tensordot(A, B, 1), A.sum(1, keepdims=True) * B[:1])


@pytest.mark.parametrize(("value", "message"), [(np.inf, "invalid value"), (3e38, "overflow")])
def test_a_result_that_is_not_finite_is_warned_of(value: float, message: str) -> None:
    signs = np.array([[1, -1, 0]] * 2 if value == np.inf else [[1, 1, 1]] * 2, np.float32)
    with pytest.warns(RuntimeWarning, match=message):
        matmul(signs, np.full((3, 4), value, np.float32))


def test_the_callers_errstate_decides() -> None:
    with np.errstate(invalid="ignore"):
        assert np.isnan(matmul(np.array([[1.0, -1.0]]), np.full((2, 1), np.inf))).all()
    with np.errstate(invalid="raise"), pytest.raises(FloatingPointError, match="invalid value"):
        matmul(np.array([[1.0, -1.0]]), np.full((2, 1), np.inf))


def test_a_product_made_again_is_counted_once() -> None:
    with count_macs() as counter, np.errstate(invalid="ignore"):
        matmul(np.array([[1.0, -1.0]]), np.full((2, 1), np.inf))
    assert counter.by_kind()["forward"] == 2
