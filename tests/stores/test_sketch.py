"""The random sketch of the batch: unbiased, with exactly the variance that the formula says."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries

from analysis.check.store_case import StoreTestCase
from analysis.steps.settings import TunedLayer
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.stores import Sketch
from lance_ref.stores.sketch import BatchSketch, haar_columns, sketch_variance

layers = st.one_of(conv_geometries(), linear_geometries())

GEOMETRIES = {
    "linear": LinearGeometry((6, 5), (4, 5)),
    "tokens": LinearGeometry((5, 3, 4), (2, 4)),
    "convolution": ConvGeometry((5, 4, 3, 4), (6, 2, 2, 3), (1, 2), ((1, 0), (0, 1)), groups=2),
    "depthwise": ConvGeometry((4, 3, 4, 3), (3, 1, 3, 2), groups=3),
}


class TestSketch(StoreTestCase):
    """An eighth of the directions, as by default, and all of them."""

    method, ratio = "sketch", 1 / 8
    wrong: ClassVar = {
        f"ratio is {ratio!r}, expected a number in (0, 1]": lambda ratio=ratio: Sketch(ratio)
        for ratio in (0, 1.5, -0.1, "half", True, float("nan"))
    } | {
        "seed is -1": lambda: Sketch(0.5, -1),
        "seed is 1.0": lambda: Sketch(0.5, 1.0),
        "(3,), expected a batch": lambda: Sketch(0.5).save(np.ones(3)),
        "r is 7, expected an integer from 1 to 6": lambda: sketch_variance(
            np.ones((6, 1)), np.ones((6, 1)), LinearGeometry((6, 1), (1, 1)), 7
        ),
    }

    def make(self, layer: TunedLayer) -> Sketch:
        return Sketch(self.ratio, seed=int(layer.rng.integers(2**31)))

    def exactly(self, layer: TunedLayer) -> Sketch:
        return Sketch(1.0, seed=int(layer.rng.integers(2**31)))


class TestWideSketch(TestSketch):
    """More than half of the directions, a number that is rounded."""

    method, ratio = None, 0.7


def gradient(store: Sketch, g: Any, x: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
    return store.weight_gradient(store.save(x), grad_output, g)


@pytest.mark.parametrize(("n", "r"), [(6, 2), (5, 1), (4, 3)])
def test_fourth_moments_of_a_random_projector(n: int, r: int) -> None:
    """E[P_ij P_kl] = a δ_ij δ_kl + b (δ_ik δ_jl + δ_il δ_jk), entry by entry, within 5 standard errors."""
    rng, count = np.random.default_rng(0), 4000
    samples = np.empty((count, n * n, n * n), np.float32)
    for sample in samples:
        U = haar_columns(n, r, rng)
        P = (U @ U.T).reshape(-1)
        sample[:] = np.outer(P, P)
    d = np.eye(n)
    a = r * ((n + 1) * r - 2) / (n * (n - 1) * (n + 2))
    b = r * (n - r) / (n * (n - 1) * (n + 2))
    pairs = np.einsum("ik,jl->ijkl", d, d) + np.einsum("il,jk->ijkl", d, d)
    expected = (a * np.einsum("ij,kl->ijkl", d, d) + b * pairs).reshape(n * n, n * n)
    error = np.abs(samples.mean(axis=0, dtype=np.float64) - expected)
    assert (error <= 5 * samples.std(axis=0, dtype=np.float64) / np.sqrt(count) + 1e-7).all()


@pytest.mark.parametrize(
    ("name", "ratio"), [("linear", 0.2), ("linear", 0.5), ("tokens", 0.5), ("convolution", 0.4), ("depthwise", 0.5)]
)
def test_unbiased_with_the_predicted_variance(name: str, ratio: float) -> None:
    """2000 steps: the mean square error within 4 standard errors of the formula, the mean gradient within reach of dW.

    ‖mean − dW‖² has the expectation variance/2000, and exceeds three times that about never.
    """
    g, count = GEOMETRIES[name], 2000
    x, _, grad_output = arrays(g, 1)
    x += 0.5  # images have something in common
    exact = g.weight_gradient(x, grad_output)
    store = Sketch(ratio, seed=3)
    samples = np.array([gradient(store, g, x, grad_output) - exact for _ in range(count)])
    predicted = sketch_variance(x, grad_output, g, store.sketch.rank(len(x)))
    errors = np.sum(samples.reshape(count, -1) ** 2, axis=1)
    assert abs(errors.mean() - predicted) <= 4 * errors.std() / np.sqrt(count)
    assert errors.std() / np.sqrt(count) < 0.05 * predicted  # so the line above says something
    assert np.sum(samples.mean(axis=0) ** 2) <= 3 * predicted / count


def test_variance_of_a_linear_layer_in_closed_form() -> None:
    """Σ_ij ‖M_ij‖² = ‖A‖²‖G‖² and Σ_ij ⟨M_ij, M_ji⟩ = ⟨AAᵀ, GGᵀ⟩, for (B, I)."""
    g = LinearGeometry((6, 5), (4, 5))
    x, _, grad_output = arrays(g, 0)
    n, r = 6, 2
    a, b = r * ((n + 1) * r - 2) / (n * (n - 1) * (n + 2)), r * (n - r) / (n * (n - 1) * (n + 2))
    pairs = np.sum(x**2) * np.sum(grad_output**2) + np.sum((x @ x.T) * (grad_output @ grad_output.T))
    exact = np.sum((grad_output.T @ x) ** 2)
    expected = (9 * a - 1) * exact + 9 * b * pairs
    assert sketch_variance(x, grad_output, g, r) == pytest.approx(expected, rel=1e-12)
    assert sketch_variance(x, grad_output, g, n) == 0


@given(g=layers, seed=st.integers(0, 99), ratio=st.sampled_from([0.1, 0.4, 0.75]))
def test_the_gradient_is_the_exact_one_of_the_projected_activation(g: Any, seed: int, ratio: float) -> None:
    """dŴ is the weight gradient of (n/r) U Uᵀ A, for any layer, with U of the seed that was kept."""
    x, _, grad_output = arrays(g, seed)
    store = Sketch(ratio, seed)
    saved = store.save(x)
    S = store.sketch.directions(saved["seed"], len(x), x.dtype)
    r = max(1, round(ratio * len(x)))
    np.testing.assert_allclose(S.T @ S, len(x) / r * np.eye(r), atol=1e-12)
    projected = np.tensordot(S @ S.T, x, 1)
    np.testing.assert_allclose(
        store.weight_gradient(saved, grad_output, g), g.weight_gradient(projected, grad_output), rtol=1e-9, atol=1e-9
    )
    assert saved["sketch"].shape == (r, *x.shape[1:])


def test_steps_differ_and_repeat() -> None:
    """Every activation saved is a new step; seed and counter determine it; a counter is a number."""
    x = np.random.default_rng(0).standard_normal((8, 3))
    store, twin, other = Sketch(0.25, 5), Sketch(0.25, 5), Sketch(0.25, 6)
    steps = [store.save(x) for _ in range(3)]
    assert len({int(step["seed"][0]) for step in steps}) == 3
    for step in steps:
        np.testing.assert_array_equal(step["sketch"], twin.save(x)["sketch"])
        assert not np.array_equal(step["sketch"], other.save(x)["sketch"])
    assert int(store.state()["step"]) == 3
    for bad in ({}, {"step": np.array(-1)}, {"counter": np.array(1)}):
        with pytest.raises(ValueError, match=r"store 'sketch': the state is .* expected 'step'"):
            store.load_state(bad)


@pytest.mark.parametrize("fault", ["no scale", "fixed directions", "unbiased but wider"])
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias shows in the mean, and another distribution of the same mean in the variance."""
    g, count = GEOMETRIES["linear"], 1000
    x, _, grad_output = arrays(g, 1)
    store = Sketch(0.5)
    original = BatchSketch.directions
    if fault == "no scale":
        monkeypatch.setattr(BatchSketch, "directions", lambda *a: original(*a) * np.sqrt(0.5))
    elif fault == "fixed directions":
        monkeypatch.setattr(BatchSketch, "directions", lambda self, seed, *a: original(self, 0 * seed, *a))
    else:  # Gaussian entries: E[S Sᵀ] = I too

        def gaussian(self: BatchSketch, seed: np.ndarray, n: int, dtype: Any) -> np.ndarray:
            return np.random.default_rng(seed).standard_normal((n, self.rank(n))) / np.sqrt(self.rank(n))

        monkeypatch.setattr(BatchSketch, "directions", gaussian)
    exact = g.weight_gradient(x, grad_output)
    samples = np.array([gradient(store, g, x, grad_output) - exact for _ in range(count)])
    errors = np.sum(samples.reshape(count, -1) ** 2, axis=1)
    predicted = sketch_variance(x, grad_output, g, 3)
    biased = np.sum(samples.mean(axis=0) ** 2) > 3 * predicted / count
    assert biased == (fault != "unbiased but wider")
    assert biased or abs(errors.mean() - predicted) > 4 * errors.std() / np.sqrt(count)
