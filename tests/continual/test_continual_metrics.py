"""Metrics of continual learning: exact numbers worked by hand, and what must hold for any matrix."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lance_ref.continual.metrics import DEFINITIONS, metrics

R = np.array(
    [
        # on task 0, 1, 2
        [0.75, 0.50, 0.25],  # after task 0
        [0.875, 1.00, 0.50],  # after task 1
        [0.50, 0.75, 1.00],  # after task 2
    ]
)
B = np.array([0.125, 0.25, 0.125])


def test_by_hand() -> None:
    """Each of the five numbers, every entry of R playing its own part; a wrong index anywhere changes one of them."""
    found = metrics(R, B)
    assert found.acc == 0.75  # (1/2 + 3/4 + 1) / 3
    assert found.bwt == -0.25  # ((1/2 - 3/4) + (3/4 - 1)) / 2
    assert found.fwt == 0.3125  # ((1/2 - 1/4) + (1/2 - 1/8)) / 2
    assert found.forgetting == 0.3125  # ((7/8 - 1/2) + (1 - 3/4)) / 2: the best of task 0 was after task 1
    assert found.learning_accuracy == float(Fraction(11, 12))  # (3/4 + 1 + 1) / 3


def test_what_is_not_used_does_not_count() -> None:
    """b[0] and the corner above R[i-1, i] enter nothing; the last column of earlier rows is no forgetting."""
    changed, b = R.copy(), B.copy()
    changed[0, 2], b[0] = 0.9, 0.9
    assert metrics(changed, b) == metrics(R, B)


@given(st.integers(2, 5).flatmap(lambda T: arrays(float, (T + 1, T), elements=st.floats(0, 1, width=32))))
def test_relations(values: np.ndarray) -> None:
    """Forgetting is at least -BWT, equal for two tasks; ACC is the learning accuracy and BWT together."""
    found, T = metrics(values[:-1], values[-1]), values.shape[1]
    assert found.forgetting >= -found.bwt - 1e-12
    if T == 2:
        assert found.forgetting == pytest.approx(-found.bwt, abs=1e-12)
    assert found.acc == pytest.approx(found.learning_accuracy + found.bwt * (T - 1) / T, abs=1e-12)
    assert set(found.as_dict()) == set(DEFINITIONS)


@pytest.mark.parametrize(
    ("matrix", "b", "message"),
    [
        (np.ones((2, 3)), np.ones(2), "R has shape"),
        (np.ones((2, 2)), np.ones(3), r"b \(3,\)"),
        (np.ones((1, 1)), np.ones(1), "1 task"),
        (np.array([[1.0, np.nan], [1.0, 1.0]]), np.ones(2), "R has entries outside"),
        (np.ones((2, 2)), np.array([0.5, 1.5]), "b has entries outside"),
    ],
)
def test_refused(matrix: np.ndarray, b: np.ndarray, message: str) -> None:
    """Rows that were not measured, percentages and other shapes are errors, not numbers."""
    with pytest.raises(ValueError, match=message):
        metrics(matrix, b)
