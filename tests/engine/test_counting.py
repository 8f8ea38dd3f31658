"""Counted products warn of an invalid value or an overflow when the result has one, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lance_ref import nn
from lance_ref.engine.counting import count_macs, eigh_macs, matmul, qr_macs, spending_on, tensordot


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


def test_a_count_within_a_count() -> None:
    """The inner one counts its own block, the outer one goes on after it."""
    with count_macs() as outer:
        matmul(A, B)
        with count_macs() as inner:
            matmul(A[:1], B)
        matmul(A, B)
    assert inner.by_kind()["forward"] == 12
    assert outer.by_kind()["forward"] == 48


def test_a_kind_within_a_kind() -> None:
    """After an inner kind the outer one goes on, and after that the forward pass."""
    with count_macs() as counter:
        with spending_on("calibration"):
            with spending_on("projection"):
                matmul(A, B)
            matmul(A[:1], B)
        matmul(A, B[:, :1])
    assert {kind: macs for kind, macs in counter.by_kind().items() if macs} == {
        "projection": 24,
        "calibration": 12,
        "forward": 6,
    }


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'backward', expected one of"):
        spending_on("backward")


def test_multiply_adds_of_a_tensordot_by_hand() -> None:
    """(2, 3, 4) with (4, 3, 5): over one axis, over two, and by name."""
    a, b = np.ones((2, 3, 4)), np.ones((4, 3, 5))
    for axes, second, macs in (
        (1, b, 2 * 3 * 4 * 3 * 5),
        (2, b.transpose(1, 0, 2), 2 * 3 * 4 * 5),
        ((2, 0), b, 2 * 3 * 4 * 3 * 5),
        (([1, 2], [1, 0]), b, 2 * 3 * 4 * 5),
    ):
        with count_macs() as counter:
            result = tensordot(a, second, axes)
        np.testing.assert_array_equal(result, np.tensordot(a, second, axes))
        assert counter.by_kind()["forward"] == macs


def test_nominal_work_by_hand() -> None:
    """9 n³ FLOPs of an eigendecomposition; 4 n r² − 4/3 r³ of a QR with its Q, halved."""
    assert eigh_macs(4) == 9 * 64 // 2 == 288
    assert qr_macs(5, 3) == (6 * 5 * 9 - 2 * 27) // 3 == 72


def test_layers_are_summed_by_kind() -> None:
    """Two layers of one kind: 24 and 16, each under its own path, 40 together."""
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    with count_macs() as counter:
        net(A)
    assert [counter.by_layer(path)["forward"] for path in ("0", "1")] == [2 * 3 * 4, 2 * 4 * 2]
    assert counter.by_kind()["forward"] == 40
