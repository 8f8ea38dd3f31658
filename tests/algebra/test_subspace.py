"""Subspaces: sizes by hand, parts that do not fit refused, and what they look like."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from small_nets import ThreeLayers, batches

from lance_ref import Subspace, calibrate
from lance_ref.algebra.subspace import MODE_NAMES


def test_random_subspaces_are_orthonormal_and_of_these_ranks() -> None:
    """For measurements: the ranks asked for, None left alone, and sizes by hand."""
    space = Subspace.random((4, 6, 5, 5), (2, 3, None, 1), np.random.default_rng(0))
    assert space.mode_names == MODE_NAMES[4]
    assert space.ranks == (2, 3, None, 1)
    assert space.core_shape == (2, 3, 5, 1)
    assert space.compression == 600 / 30
    assert space.energy_kept == (None,) * 4
    assert space.factor_bytes() == 4 * (4 * 2 + 6 * 3 + 5 * 1)
    assert space.factor_bytes(np.float64) == 8 * 31
    assert str(space).endswith("from no calibration")
    for U in space.factors:
        if U is not None:
            assert_allclose(U.T @ U, np.eye(U.shape[1]), atol=1e-13)
    with pytest.raises(ValueError, match="rank of mode 1 is 7, expected an integer from 1 to 6"):
        Subspace.random((4, 6), (1, 7), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"\(4,\) has 1 modes"):
        Subspace.random((4,), (1,), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": (np.eye(3), None)}, r"mode 'batch' has shape \(3, 3\), expected \(4, 1 to 4\).*\(4, 6\)"),
        ({"factors": (None, np.ones((6, 7)))}, r"mode 'feature' has shape \(6, 7\)"),
        ({"factors": (None, np.ones((7, 2)))}, r"mode 'feature' has shape \(7, 2\), expected \(6, 1 to 6\)"),
        ({"factors": (None, np.ones((2, 6)))}, r"mode 'feature' has shape \(2, 6\)"),  # transposed
        ({"factors": (np.ones((4, 0)), None)}, r"mode 'batch' has shape \(4, 0\), expected \(4, 1 to 4\)"),
        ({"factors": (np.array([[1.0], [np.nan], [0], [0]]), None)}, "mode 'batch' is float64 or not finite"),
        ({"factors": (np.eye(4, 2, dtype=complex), None)}, "mode 'batch' is complex128 or not finite"),
        ({"factors": (None,)}, "factors has 1 entries, expected one per mode"),  # dropped
        ({"mode_names": ("batch",)}, "mode_names has 1"),
        ({"spectra": (np.ones(3), None)}, r"spectrum of mode 'batch' has shape \(3,\), expected \(4,\)"),
        ({"epsilon": 1.5}, "epsilon is 1.5"),
    ],
)
def test_a_subspace_checks_its_parts(changes: dict[str, Any], message: str) -> None:
    """Planted faults: transposed, dropped and foreign factors do not get into a subspace."""
    parts: dict[str, Any] = {
        "shape": (4, 6), "mode_names": ("batch", "feature"), "factors": (None, None), "spectra": (None, None)
    }  # fmt: skip
    Subspace(**parts)
    with pytest.raises(ValueError, match=message):
        Subspace(**{**parts, **changes})


def test_a_subspace_prints_and_plots() -> None:
    """The text names ranks and energies; the plot has a curve and a dot for each calibrated mode."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    space = calibrate(ThreeLayers(), batches(), modes=("channel", "width"))["conv2"]
    text = str(space)
    assert "Subspace of 5x4x4x3" in text
    assert f"rank {space.ranks[1]} of 4, keeps {space.energy_kept[1]:.4f}" in text
    assert "batch    left alone" in text
    assert "15 samples in 3 batches, epsilon 0.7" in text
    assert "5 samples in 1 batch," in str(calibrate(ThreeLayers(), batches(1))["conv2"])
    ax = space.plot()
    assert len(ax.lines) == 2 * 2 + 1
    assert_allclose(ax.lines[0].get_ydata()[-1], 1)
    assert_allclose(ax.lines[0].get_xdata(), [1 / 4, 2 / 4, 3 / 4, 1])
    assert_allclose(ax.lines[1].get_xydata(), [[space.ranks[1] / 4, space.energy_kept[1]]])
    assert space.plot(ax) is ax
    plt.close("all")
