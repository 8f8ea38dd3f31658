"""Bases of what tasks need: Gram matrices of inputs and patches, the rule of GPM, subspaces outside of a basis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from patch_cases import patches_by_loops

from analysis.rules import protection_costs
from lance_ref import F, Tensor, count_macs, nn
from lance_ref.algebra import geometry
from lance_ref.continual import bases
from lance_ref.continual.bases import (
    Gram,
    feature_gram,
    task_subspace,
    update_protected,
    update_protected_from_samples,
)
from lance_ref.lance.patches import geometry_of

thresholds = st.sampled_from([0.3, 0.7, 0.9, 0.95, 0.999])


class TwoLayers(nn.Module):
    """A strided convolution on (B, 2, 5, 6), a linear layer on its 4 maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=1, rng=0)
        self.fc = nn.Linear(4, 3, rng=1)
        self.to(np.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


@st.composite
def cases(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """(M, R): a random basis, perhaps empty or full, and inputs of falling energies, perhaps fewer than n."""
    n = draw(st.integers(1, 9))
    m, s = draw(st.integers(0, n)), draw(st.integers(1, 15))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    M = np.linalg.qr(rng.standard_normal((n, n)))[0][:, :m]
    return M, rng.standard_normal((n, s)) * np.geomspace(1, 0.1, n)[:, None]


def projector(M: np.ndarray) -> np.ndarray:
    """M Mᵀ: what a basis spans, whatever its signs and rotations."""
    return M @ M.T


# ---- Gram matrices -------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", [1, 500, 2**23])
def test_grams_are_exact_sums(workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """K = R Rᵀ over batches of different sizes: patches of the convolution, rows of the linear layer."""
    monkeypatch.setattr(geometry, "WORKSPACE_BYTES", workspace)
    net, rng = TwoLayers(), np.random.default_rng(0)
    batches = [rng.standard_normal((b, 2, 5, 6)) for b in (3, 1, 4)]
    before = net.conv.weight.data.copy()
    with count_macs() as counter:
        grams = feature_gram(net, batches, ["conv", "fc"])
    x = np.concatenate(batches)
    P = patches_by_loops(x, geometry_of(net.conv, x.shape)).reshape(-1, 12)
    features = F.relu(net.conv(Tensor(x))).mean((2, 3)).data
    for path, rows in (("conv", P), ("fc", features)):
        assert_allclose(grams[path].matrix, rows.T @ rows, rtol=1e-12, atol=1e-12)
        assert grams[path].matrix.dtype == np.float64
        assert grams[path].samples == len(rows)
        assert counter.by_layer(path)["calibration"] == protection_costs.gram_macs(*rows.shape)
    assert (grams["conv"].samples, grams["fc"].samples) == (8 * 3 * 7, 8)
    np.testing.assert_array_equal(net.conv.weight.data, before)
    assert net.training


def test_grams_of_tokens() -> None:
    """(B, L, I): every token is a column of R."""
    net = nn.Sequential(nn.Linear(3, 2, rng=0))
    x = np.random.default_rng(0).standard_normal((4, 5, 3)).astype(np.float32)
    gram = feature_gram(net, [x[:1], x[1:]])["0"]
    assert gram.samples == 20
    assert_allclose(gram.matrix, np.einsum("blk,blj->kj", x, x, dtype=np.float64), rtol=1e-6)


def test_a_wrong_count_lets_the_first_batch_dominate() -> None:
    """One batch along e_1, nine along e_2: exactly summed, e_2 leads; with the first weighing n times as much, e_1."""
    n = 16
    net = nn.Sequential(nn.Linear(n, 2, rng=0))
    batches = [np.eye(n, dtype=np.float32)[[0]]] + [np.eye(n, dtype=np.float32)[[1]]] * 9
    exact = feature_gram(net, batches)["0"]
    heavy = feature_gram(net, batches, weighting="first-batch-heavy")["0"]
    assert exact.samples == heavy.samples == 10
    assert_allclose(np.diag(exact.matrix)[:3] / np.trace(exact.matrix), [0.1, 0.9, 0])
    assert_allclose(np.diag(heavy.matrix)[:3] / np.trace(heavy.matrix), [16 / 25, 9 / 25, 0])
    U, U_heavy = (task_subspace(K, None, 0.5)[0] for K in (exact, heavy))
    assert_allclose(np.abs(U[:2, 0]), [0, 1], atol=1e-12)
    assert_allclose(np.abs(U_heavy[:2, 0]), [1, 0], atol=1e-12)
    # what is then protected at 0.9 of the energy misses nothing, or keeps the minority only
    assert update_protected(None, exact, 0.9).added == 1
    assert update_protected(None, heavy, 0.64).kept == 16 / 25


def test_random_batches_hide_the_wrong_count_but_for_the_share() -> None:
    """On batches from one distribution, too, the first one's directions gain: its overlap with the subspace grows."""
    n, rng = 32, np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(n, 2, rng=0))
    batches = [rng.standard_normal((4, n)).astype(np.float32) for _ in range(20)]
    first = np.linalg.qr(batches[0].T.astype(np.float64))[0]  # (n, 4)
    overlap = {}
    for weighting in bases.WEIGHTINGS:
        _, vectors = np.linalg.eigh(feature_gram(net, batches, weighting=weighting)["0"].matrix)
        leading = vectors[:, -4:]
        overlap[weighting] = np.linalg.norm(first.T @ leading) ** 2 / 4
    assert overlap["first-batch-heavy"] > 0.95
    assert overlap["exact"] < 0.5


def test_wrong_grams_are_refused() -> None:
    """What cannot be summed is refused by name, before it spoils a basis."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2, rng=0), nn.Flatten(), nn.Linear(8, 2, rng=0))
    x = np.zeros((1, 2, 2, 2), np.float32)
    with pytest.raises(ValueError, match="layer '0': the convolution has groups = 2"):
        feature_gram(net, [x])
    with pytest.raises(ValueError, match="batches is empty"):
        feature_gram(net, [], "2")
    with pytest.raises(ValueError, match="weighting is 'mean'"):
        feature_gram(net, [x], "2", weighting="mean")
    with pytest.raises(ValueError, match=r"layer '2': .* contains NaN or infinity"):
        feature_gram(net, [x * np.nan], "2")
    with pytest.raises(TypeError, match="expected a lance_ref"):
        feature_gram(None, [x])


# ---- the rule of GPM -----------------------------------------------------------------------


@given(cases(), thresholds)
def test_the_rule_of_gpm(case: tuple[np.ndarray, np.ndarray], threshold: float) -> None:
    """Enough of the residual's leading directions, not one too many, and exactly what the residual's formula gives."""
    M, R = case
    n, m = M.shape
    K, total = R @ R.T, float(np.sum(R * R))
    new = update_protected(M, K, threshold)
    assert_allclose(new.basis.T @ new.basis, np.eye(m + new.added), atol=1e-12)
    np.testing.assert_array_equal(new.basis[:, :m], M)
    kept = np.linalg.norm(new.basis.T @ R) ** 2 / total
    assert_allclose(new.kept, kept, atol=1e-12)
    assert kept >= threshold - 1e-11
    if new.added:
        assert np.linalg.norm(new.basis[:, :-1].T @ R) ** 2 / total < threshold
    outside = np.eye(n) - M @ M.T
    _, vectors = np.linalg.eigh(outside @ K @ outside)
    leading = vectors[:, ::-1][:, : new.added]
    assert_allclose(projector(new.basis), projector(M) + projector(leading), atol=1e-5)  # near-equal energies
    assert new.saturated == (m + new.added == n)


@given(cases(), thresholds)
def test_grams_and_samples_give_the_same_basis(case: tuple[np.ndarray, np.ndarray], threshold: float) -> None:
    """Up to rotation: by eigenvectors of K or by singular vectors of R."""
    M, R = case
    by_gram, by_samples = update_protected(M, R @ R.T, threshold), update_protected_from_samples(M, R, threshold)
    assert (by_gram.added, by_gram.saturated) == (by_samples.added, by_samples.saturated)
    assert_allclose(by_gram.kept, by_samples.kept, atol=1e-12)
    assert_allclose(projector(by_gram.basis), projector(by_samples.basis), atol=1e-6)


def test_by_hand() -> None:
    """Energies 8, 4, 2, 1, 1 of 16, the second one protected before."""
    K, M = np.diag([8.0, 4.0, 2.0, 1.0, 1.0]), np.eye(5)[:, [1]]
    for threshold, added, kept in [(0.25, 0, 4), (0.26, 1, 12), (0.75, 1, 12), (0.76, 2, 14), (0.9, 3, 15), (1, 4, 16)]:
        new = update_protected(M, K, threshold)
        assert (new.added, new.kept) == (added, kept / 16)
    assert update_protected(M, K, 1.0).saturated
    assert not update_protected(M, K, 0.9).saturated


def test_forgetting_what_is_covered_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold is of all energy, M's part included; counted of the residual alone the basis comes out smaller."""
    K, M = np.diag([8.0, 4.0, 2.0, 1.0, 1.0]), np.eye(5)[:, [0]]
    assert update_protected(M, K, 0.8).added == 2
    original = bases._needed
    monkeypatch.setattr(bases, "_needed", lambda total, energies, t: original(float(energies.sum()), energies, t))
    assert update_protected(M, K, 0.8).added == 3


def test_saturation_and_silence_are_states() -> None:
    """A full basis stays as it is, and a layer that sees zeros needs nothing: neither is an error."""
    full = update_protected(np.eye(3), np.eye(3), 0.9)
    assert (full.basis.shape, full.added, full.kept, full.saturated) == ((3, 3), 0, 1.0, True)
    silent = update_protected(None, np.zeros((3, 3)), 0.9)
    assert (silent.basis.shape, silent.added, silent.kept, silent.saturated) == ((3, 0), 0, 1.0, False)
    assert update_protected_from_samples(None, np.zeros((3, 7)), 1.0).added == 0


@given(st.integers(1, 6), st.integers(0, 99))
def test_a_threshold_of_one_protects_the_range(rank: int, seed: int) -> None:
    """All energy, but no direction that no input has: those stay free for later tasks."""
    R = np.random.default_rng(seed).standard_normal((8, rank))
    for new in (update_protected(None, R @ R.T, 1.0), update_protected_from_samples(None, R, 1.0)):
        assert new.added == rank
        assert_allclose(new.basis @ (new.basis.T @ R), R, atol=1e-9)


@given(st.integers(0, 99), st.lists(thresholds, min_size=2, max_size=5))
def test_task_after_task_a_basis_only_grows(seed: int, levels: list[float]) -> None:
    """What was protected stays so, to the bit, and all of it stays orthonormal."""
    rng = np.random.default_rng(seed)
    M = np.zeros((10, 0))
    for threshold in levels:
        R = rng.standard_normal((10, 3)) @ rng.standard_normal((3, 30))
        new = update_protected(M, Gram(R @ R.T, 30), threshold).basis
        np.testing.assert_array_equal(new[:, : M.shape[1]], M)
        assert_allclose(new.T @ new, np.eye(new.shape[1]), atol=1e-13)
        M = new


@given(cases(), thresholds)
def test_an_update_costs_what_is_predicted(case: tuple[np.ndarray, np.ndarray], threshold: float) -> None:
    """Multiply-adds of one update, from n, m and the number of directions added."""
    M, R = case
    with count_macs() as counter:
        new = update_protected(M, R @ R.T, threshold)
    assert counter.by_kind()["calibration"] == protection_costs.update_macs(*M.shape, new.added)
    assert sum(counter.by_kind().values()) == counter.by_kind()["calibration"]


# ---- the null space ------------------------------------------------------------------------


@given(cases(), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_a_task_subspace_is_outside_of_the_basis(case: tuple[np.ndarray, np.ndarray], epsilon: float) -> None:
    """UᵀM = 0 and UᵀU = I to 1e-12, and as few directions as hold the share of the energy outside M."""
    M, R = case
    n, m = M.shape
    U, spectrum = task_subspace(R @ R.T, M, epsilon)
    assert np.abs(U.T @ M).max(initial=0) <= 1e-12
    assert_allclose(U.T @ U, np.eye(U.shape[1]), atol=1e-12)
    outside = np.sum((R - M @ (M.T @ R)) ** 2)
    assert_allclose(spectrum.sum(), outside, rtol=1e-9, atol=1e-12)
    assert len(spectrum) == n - m
    if m == n:
        assert U.shape == (n, 0)
    elif epsilon == 1.0:
        assert U.shape == (n, n - m)
    else:
        assert np.sum((U.T @ R) ** 2) >= (epsilon - 1e-9) * outside
        assert np.sum((U[:, :-1].T @ R) ** 2) < epsilon * outside


def test_nothing_left_is_no_subspace() -> None:
    """All directions protected, or inputs within them: no columns, so that nobody trains on rounding noise."""
    M = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 3)))[0]
    R = M @ np.random.default_rng(1).standard_normal((3, 20))
    U, spectrum = task_subspace(R @ R.T, M, 0.9)
    assert U.shape == (6, 0)
    assert spectrum.sum() <= 1e-12 * np.sum(R * R)
    assert task_subspace(np.eye(6), np.eye(6), 1.0)[0].shape == (6, 0)
    assert task_subspace(R @ R.T, M[:, :2], 0.9)[0].shape == (6, 1)


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, np.nan, np.inf])
def test_thresholds_out_of_range_are_errors(value: float) -> None:
    """0 would protect nothing, above 1 nothing would ever be enough."""
    K = np.eye(2)
    for function in (
        lambda: update_protected(None, K, value),
        lambda: update_protected_from_samples(None, K, value),
        lambda: task_subspace(K, None, value),
    ):
        with pytest.raises(ValueError, match=r"expected a number in \(0, 1\]"):
            function()


@pytest.mark.parametrize(
    ("M", "K", "match"),
    [
        (np.ones((3, 1)), np.eye(3), "not orthonormal"),
        (np.full((3, 1), np.nan), np.eye(3), "not orthonormal"),
        (np.eye(2), np.eye(3), r"M has shape \(2, 2\), expected \(3, m\)"),
        (np.eye(3, dtype=int), np.eye(3), "M is of shape .* and dtype int64"),
        (None, np.array([[1.0, 2.0], [0.0, 1.0]]), "no Gram matrix"),
        (None, np.diag([1.0, -1.0]), "no Gram matrix"),
        (None, np.ones((2, 3)), r"K is of shape \(2, 3\)"),
        (None, np.array([[np.nan]]), "NaN"),
    ],
)
def test_wrong_matrices_are_errors(M: np.ndarray | None, K: np.ndarray, match: str) -> None:
    """A basis that is not orthonormal would not project, a K that is not symmetric is no Gram matrix."""
    for function in (update_protected, task_subspace):
        with pytest.raises((ValueError, TypeError), match=match):
            function(*((M, K) if function is update_protected else (K, M)), 0.5)
    with pytest.raises(TypeError, match="threshold is True"):
        update_protected(None, np.eye(2), True)
    with pytest.raises(ValueError, match="R is "):
        update_protected_from_samples(None, np.ones(3), 0.5)
