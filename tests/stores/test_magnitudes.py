"""A power of two in front of an activation changes no rank, no factor and no relative gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lance_ref.algebra import tucker
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.stores import Asi, Hosvd
from lance_ref.stores.lance import energy_ratio

POWERS = {np.float32: (-118, -90, -70, -40, 40, 70, 100), np.float64: (-990, -700, -400, 400, 700, 900)}
CASES = [(dtype, power) for dtype, powers in POWERS.items() for power in powers]
GEOMETRY = ConvGeometry((4, 6, 5, 5), (3, 6, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)


def activation(dtype: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    low = tucker.multi_mode_product(
        rng.standard_normal((2, 3, 2, 2)), [rng.standard_normal(s) for s in ((4, 2), (6, 3), (5, 2), (5, 2))]
    )
    return (low + 1e-3 * rng.standard_normal(low.shape)).astype(dtype)


@pytest.mark.parametrize(("dtype", "power"), CASES)
@pytest.mark.parametrize("make", [lambda: Hosvd(0.95), lambda: Hosvd(ranks=(2, 3, 2, 2)), lambda: Asi((2, 3, 2, 2))])
def test_a_power_of_two_in_front_changes_nothing(make: Any, dtype: Any, power: int) -> None:
    """Squares of 1e-25 vanish in float32, and those of 1e25 overflow: the store takes the power out first."""
    A = activation(dtype)
    G = np.random.default_rng(1).standard_normal(GEOMETRY.output_shape).astype(dtype)
    plain, scaled = make(), make()
    here, there = plain.save(A), scaled.save(np.ldexp(A, power))
    assert scaled.ranks == plain.ranks
    assert set(here) == set(there)
    assert scaled.energy_kept == pytest.approx(plain.energy_kept, rel=1e-4)
    one = plain.weight_gradient(here, G, GEOMETRY)
    other = np.ldexp(scaled.weight_gradient(there, G, GEOMETRY).astype(np.float64), -power)
    assert np.abs(one - other).max() <= 2e-4 * np.abs(one).max()


@pytest.mark.parametrize(("dtype", "power"), CASES)
@pytest.mark.parametrize("function", [tucker.hosvd, tucker.st_hosvd])
def test_decompositions_of_any_magnitude(function: Any, dtype: Any, power: int) -> None:
    """In float64 too, at 1e-200 and 1e200."""
    A = activation(dtype)
    plain, scaled = function(A, epsilon=0.95), function(np.ldexp(A, power), epsilon=0.95)
    assert scaled.core.shape == plain.core.shape
    for U, V in zip(plain.factors, scaled.factors, strict=True):
        np.testing.assert_allclose(U @ U.T, V @ V.T, atol=1e-4)
    assert energy_ratio(scaled.core, np.ldexp(A, power)) == pytest.approx(energy_ratio(plain.core, A), rel=1e-4)
