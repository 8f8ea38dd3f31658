"""Calibration without the mean, and orthogonal to protected directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from lance_ref import Calibration, Tensor, calibrate, count_macs, nn
from lance_ref.algebra.frame import Frame, feature_mode, with_direction
from lance_ref.algebra.modes import unfold

SHAPES = st.sampled_from([(4, 6), (3, 5, 6), (3, 6, 4, 2)])


def layer_for(shape: tuple[int, ...]) -> nn.Module:
    """A net with one layer that takes inputs of that shape."""
    n = shape[feature_mode(shape)]
    return nn.Sequential(nn.Conv2d(n, 2, 1, rng=0) if len(shape) == 4 else nn.Linear(n, 2, rng=0)).to(np.float64)


def inputs(shape: tuple[int, ...], seed: int, count: int = 3) -> list[np.ndarray]:
    """Batches with a mean far from zero, as after a ReLU."""
    rng = np.random.default_rng(seed)
    return [np.abs(rng.standard_normal(shape)) + 0.5 for _ in range(count)]


def feature_rows(batches: list[np.ndarray]) -> np.ndarray:
    """(features, everything else of all batches)"""
    return np.hstack([unfold(x, feature_mode(x.shape)) for x in batches])


def basis(n: int, m: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, m)))[0]


@given(SHAPES, st.integers(0, 4), st.booleans(), st.integers(0, 99))
def test_directions_are_orthogonal_to_what_is_protected(
    shape: tuple[int, ...], m: int, mean_free: bool, seed: int
) -> None:
    """UᵀM = 0 to 1e-12, for a protected basis, for the mean, and for both together, at full rank too."""
    batches, M = inputs(shape, seed), basis(6, m, seed)
    space = calibrate(layer_for(shape), batches, epsilon=1, protected={"0": M}, mean_free=mean_free)["0"]
    U = space.factors[feature_mode(shape)]
    assert U is not None
    assert U.shape[1] == 6 - m - mean_free
    assert_allclose(U.T @ U, np.eye(U.shape[1]), atol=1e-12)
    assert_allclose(U.T @ M, 0, atol=1e-12)
    if mean_free:
        mean = feature_rows(batches).mean(axis=1)
        assert_allclose(U.T @ mean / np.linalg.norm(mean), 0, atol=1e-12)


@given(SHAPES, st.integers(0, 99))
def test_mean_free_directions_by_another_way(shape: tuple[int, ...], seed: int) -> None:
    """The factors of every mode are those of A ×_f (I − mmᵀ), formed here batch by batch."""
    batches = inputs(shape, seed)
    f = feature_mode(shape)
    m = feature_rows(batches).mean(axis=1)
    m /= np.linalg.norm(m)
    projected = [x - np.moveaxis(np.multiply.outer(np.tensordot(x, m, (f, 0)), m), -1, f) for x in batches]
    space = calibrate(layer_for(shape), batches, epsilon=0.8, mean_free=True)["0"]
    for mode, U in enumerate(space.factors):
        assert U is not None
        K = sum(unfold(x, mode) @ unfold(x, mode).T for x in projected)
        energies, vectors = np.linalg.eigh(K)
        leading = vectors[:, ::-1][:, : U.shape[1]]
        assert_allclose(space.spectra[mode], np.maximum(energies[::-1], 0), atol=1e-9 * energies[-1])
        r = U.shape[1]
        if r == len(U) or energies[-r] - energies[-r - 1] > 1e-6 * energies[-1]:  # a gap, or it is arbitrary
            assert_allclose(U @ U.T, leading @ leading.T, atol=1e-7)


@given(SHAPES, st.integers(0, 99))
def test_centred_spectra_are_those_of_the_covariance(shape: tuple[int, ...], seed: int) -> None:
    """center=True: the Gram of the feature mode is N times the covariance over everything else."""
    batches = inputs(shape, seed)
    rows = feature_rows(batches)
    space = calibrate(layer_for(shape), batches, center=True)["0"]
    assert_allclose(space.frame.mean, rows.mean(axis=1), rtol=1e-12)
    expected = np.linalg.eigvalsh(np.cov(rows, bias=True) * rows.shape[1])[::-1]
    assert_allclose(space.spectra[feature_mode(shape)], expected, rtol=1e-9, atol=1e-9)


def test_the_mean_takes_the_energy_of_a_positive_activation() -> None:
    """The reason for mean_free: with ε = 0.7 a ReLU's output keeps one direction, the mean; without it more."""
    batches = inputs((16, 6, 4, 4), 0)
    plain = calibrate(layer_for((16, 6, 4, 4)), batches, epsilon=0.7, modes=["channel"])["0"]
    free = calibrate(layer_for((16, 6, 4, 4)), batches, epsilon=0.7, modes=["channel"], mean_free=True)["0"]
    assert plain.ranks[1] == 1
    assert free.ranks[1] is not None
    assert free.ranks[1] >= 3


def test_an_empty_basis_protects_nothing() -> None:
    """(n, 0) is what the first task has; the result is that without protection, bit by bit."""
    batches = inputs((4, 6), 1)
    plain = calibrate(layer_for((4, 6)), batches)["0"]
    empty = calibrate(layer_for((4, 6)), batches, protected={"0": np.zeros((6, 0))})["0"]
    for ours, theirs in zip(empty.factors, plain.factors, strict=True):
        assert_array_equal(ours, theirs)


def test_a_mean_in_the_protected_span_adds_nothing() -> None:
    """mean_free on top of a basis that holds the mean keeps as many free directions."""
    batches = inputs((4, 6), 2)
    mean = np.concatenate(batches).mean(axis=0)
    M = np.linalg.qr(np.column_stack([mean, np.eye(6)[0]]))[0]
    space = calibrate(layer_for((4, 6)), batches, epsilon=1, protected={"0": M}, mean_free=True)["0"]
    assert space.ranks[1] == 4


@given(st.integers(1, 6), st.integers(0, 99))
def test_with_direction_spans_both(m: int, seed: int) -> None:
    """The columns stay orthonormal and hold the vector, up to the full space."""
    M, vector = basis(6, m, seed), np.random.default_rng(seed + 1).standard_normal(6)
    wider = with_direction(M, vector)
    assert wider is not None
    assert wider.shape == (6, min(m + 1, 6))
    assert_allclose(wider.T @ wider, np.eye(wider.shape[1]), atol=1e-12)
    assert_allclose(wider @ (wider.T @ vector), vector, atol=1e-12)


def test_saved_and_loaded(tmp_path: Path) -> None:
    """Means and protected directions survive a file, and further thresholds still respect them."""
    batches, M = inputs((3, 6, 4, 2), 3), basis(6, 2, 3)
    for options in ({"mean_free": True}, {"center": True}):
        saved = calibrate(layer_for((3, 6, 4, 2)), batches, protected={"0": M}, **options)
        saved.save(tmp_path / "c.npz")
        loaded = Calibration.load(tmp_path / "c.npz").with_epsilon(1)["0"]
        assert loaded.frame.same(saved["0"].frame)
        U = loaded.factors[1]
        assert U is not None
        assert_allclose(U.T @ M, 0, atol=1e-12)


def test_merging_needs_the_same_frame() -> None:
    """Grams without different means cannot be added up to what one run would have given."""
    net = layer_for((4, 6))
    one = calibrate(net, inputs((4, 6), 4), mean_free=True)
    other = calibrate(net, inputs((4, 6), 5), mean_free=True)
    with pytest.raises(ValueError, match=r"layer '0'.*another mean"):
        one.merge(other)
    assert one.merge(one)["0"].samples == 24


def test_bad_arguments() -> None:
    """Each names what came and what was expected."""
    net, batches = layer_for((4, 6)), inputs((4, 6), 6)
    cases: list[tuple[dict, type[Exception], str]] = [
        ({"protected": {"1": np.eye(6)}}, ValueError, "protected names layer '1', expected one of '0'"),
        ({"protected": {"0": np.eye(5)}}, ValueError, r"has shape \(5, 5\), expected \(6, m\)"),
        ({"protected": {"0": np.ones((6, 2))}}, ValueError, "not orthonormal"),
        ({"protected": {"0": np.full((6, 1), np.nan)}}, ValueError, "not orthonormal"),
        ({"protected": {"0": [[1.0]]}}, TypeError, "is list, expected a floating-point array"),
        ({"protected": {"0": np.eye(6)}}, ValueError, "all 6 directions of its feature mode are protected"),
        ({"mean_free": True, "center": True}, ValueError, "mean_free and center"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            calibrate(net, batches, **options)
    with pytest.raises(TypeError, match=r"iterator.*two passes"):
        calibrate(net, iter(batches), mean_free=True)
    with pytest.raises(ValueError, match="nothing beside their mean"):
        calibrate(net, [np.ones((4, 6))], center=True)
    calibration = calibrate(net, batches, protected={"0": basis(6, 4, 0)})
    with pytest.raises(ValueError, match="only 2 directions of its feature mode are not protected"):
        calibration.with_ranks({"0": (1, 3)})
    assert calibration.with_ranks({"0": (1, 2)})["0"].ranks == (1, 2)


def test_nan_in_the_first_pass() -> None:
    """A mean of NaN is reported by name, not carried along."""
    bad = np.ones((4, 6))
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"layer '0'.*NaN"):
        calibrate(layer_for((4, 6)), [np.ones((4, 6)), bad], mean_free=True)


def test_protecting_costs_multiply_adds_that_are_counted() -> None:
    """Two products with M and the Gram of each mode; per batch 2·(4·6)·2, and 4·6·(4 + 6)."""
    with count_macs() as counter:
        calibrate(layer_for((4, 6)), inputs((4, 6), 7, count=1), protected={"0": basis(6, 2, 7)})
    assert counter.by_kind()["calibration"] == 2 * 24 * 2 + 24 * 10


def test_frame_leaves_the_activation_as_it_was() -> None:
    """The layer computes with the very array that the frame was applied to."""
    x = inputs((4, 6), 8, 1)[0]
    before = x.copy()
    Frame(basis(6, 2, 8), np.ones(6)).apply(x)
    assert_array_equal(x, before)
    assert Frame().apply(x) is x


def test_the_gradient_has_no_part_along_the_mean() -> None:
    """Compressed with mean_free, a layer's weight gradient is orthogonal to the mean activation."""
    from lance_ref import compress

    net, batches = layer_for((8, 6)), inputs((8, 6), 9)
    compress(net, calibrate(net, batches, epsilon=1, modes=["feature"], mean_free=True))
    net(Tensor(batches[0])).sum().backward()
    layer = net.get_submodule("0")
    mean = np.concatenate(batches).mean(axis=0)
    gradient = layer.weight.grad
    assert np.abs(gradient).max() > 0.1
    assert_allclose(gradient @ mean / np.linalg.norm(mean), 0, atol=1e-12)
