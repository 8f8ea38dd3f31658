"""ASI: the iteration approaches the HOSVD, survives degenerate activations, and keeps nothing twice."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers import check_live_bytes
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries, ranks_for
from tucker_cases import low_rank, rebuild, singular

import lance_ref as lr
from analysis.check.store_case import StoreTestCase
from analysis.steps.settings import TunedLayer
from lance_ref import F, Tensor, nn
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.stores import Asi, Hosvd

layers = st.one_of(conv_geometries(), linear_geometries())


def with_spectrum(n: int, energies: np.ndarray, seed: int) -> np.ndarray:
    """An (n, m) activation with these squared singular values."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.standard_normal((n, len(energies))))
    V, _ = np.linalg.qr(rng.standard_normal((len(energies) + 5, len(energies))))
    return (U * np.sqrt(energies)) @ V.T


def distance(U: np.ndarray, V: np.ndarray) -> float:
    """The sine of the largest angle between two subspaces of one dimension."""
    return float(np.linalg.norm(U - V @ (V.T @ U), 2))


class TestAsi(StoreTestCase):
    """Cold in its first step, warm in the others."""

    method = "asi"
    wrong: ClassVar = {
        "ranks are (True, 2)": lambda: Asi((True, 2)),
        "seed is -1": lambda: Asi((1, 2), seed=-1),
        "float16": lambda: Asi((1, 2)).save(np.ones((2, 3), np.float16)),
    }

    def make(self, layer: TunedLayer) -> Asi:
        return Asi(layer.ranks)

    def exactly(self, layer: TunedLayer) -> Asi:
        return Asi(layer.shape)


@given(data=st.data(), g=layers, seed=st.integers(0, 99), dtype=st.sampled_from([np.float32, np.float64]))
def test_an_activation_of_low_rank_loses_nothing(data: Any, g: Any, seed: int, dtype: Any) -> None:
    """Two steps find all directions of an activation that has no more of them than the ranks."""
    ranks = tuple(data.draw(st.integers(1, n)) for n in g.input_shape)
    x = low_rank(g.input_shape, ranks, seed, dtype)
    _, _, grad_output = arrays(g, seed, dtype)
    store = Asi(ranks)
    store.save(x)
    dW, exact = store.weight_gradient(store.save(x), grad_output, g), g.weight_gradient(x, grad_output)
    assert dW.dtype == dtype
    scale = np.linalg.norm(x) * np.linalg.norm(grad_output)
    assert np.abs(dW - exact).max() <= (1e-3 if dtype == np.float32 else 1e-8) * scale


@given(data=st.data(), g=layers, seed=st.integers(0, 99))
def test_the_gradient_is_that_of_the_projected_activation(data: Any, g: Any, seed: int) -> None:
    """S = A ×ₙ U_nᵀ with the new factors, and dW is the exact weight gradient of S ×ₙ U_n."""
    ranks = data.draw(ranks_for(g.input_shape))
    x, _, grad_output = arrays(g, seed)
    store = Asi(ranks, seed=seed)
    store.save(x[::-1] + 1)
    saved = store.save(x)
    expected = x
    for mode in range(x.ndim):
        if f"factor_{mode}" in saved:
            U = saved[f"factor_{mode}"]
            expected = np.moveaxis(np.tensordot(U @ U.T, expected, (1, mode)), 0, mode)
    np.testing.assert_allclose(rebuild(saved), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        store.weight_gradient(saved, grad_output, g), g.weight_gradient(expected, grad_output), rtol=1e-9, atol=1e-9
    )
    assert store.energy_kept is not None
    assert store.energy_kept <= 1 + 1e-12


@given(data=st.data(), g=layers, seed=st.integers(0, 99))
def test_one_step_is_the_papers_iteration(data: Any, g: Any, seed: int) -> None:
    """span U = span A_(n) A_(n)ᵀ U_prev, mode by mode of the untruncated activation."""
    ranks = data.draw(ranks_for(g.input_shape))
    x = arrays(g, seed)[0]
    store = Asi(ranks)
    before = store.save(x + np.arange(x.shape[-1]))
    after = store.save(x)
    for mode, r in enumerate(ranks):
        if r is None or r == x.shape[mode]:
            continue
        unfolding = np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1)
        image = unfolding @ (unfolding.T @ before[f"factor_{mode}"])
        U = after[f"factor_{mode}"]
        np.testing.assert_allclose(U.T @ U, np.eye(r), atol=1e-12)
        np.testing.assert_allclose(U @ (U.T @ image), image, rtol=1e-9, atol=1e-9 * np.abs(image).max())


@pytest.mark.parametrize("gap", [0.5, 0.1])
def test_the_subspace_approaches_that_of_the_hosvd(gap: float) -> None:
    """Each step on a fixed activation shrinks the distance by λ_{r+1}/λ_r, the gap of the energies."""
    energies = np.array([4.0, 3.0, 2.0, 2.0 * gap, 1.5 * gap, gap])
    x = with_spectrum(9, energies, seed=1)
    exact = Hosvd(ranks=(3, None)).save(x)["factor_0"]
    store = Asi((3, None), seed=2)
    distances = [distance(store.save(x)["factor_0"], exact) for _ in range(12)]
    for before, after in pairwise(distances[3:10]):
        assert after <= 1.05 * gap * before + 1e-14
    assert distances[-1] <= 20 * gap**12
    assert distances[0] > 1e-3


def test_all_modes_of_a_convolution_approach_the_hosvd() -> None:
    """After some warm-started steps every factor and the energy kept are those of the HOSVD."""
    x = low_rank((6, 8, 5, 7), (2, 3, 2, 2), seed=0) + 0.01 * np.random.default_rng(1).standard_normal((6, 8, 5, 7))
    ranks = (2, 3, 2, 2)
    store, reference = Asi(ranks), Hosvd(ranks=ranks)
    exact = reference.save(x)
    for _ in range(15):
        saved = store.save(x)
    for mode in range(4):
        assert distance(saved[f"factor_{mode}"], exact[f"factor_{mode}"]) < 1e-8
    assert store.energy_kept == pytest.approx(reference.energy_kept, rel=1e-12)


def test_without_the_warm_start_it_stays_away() -> None:
    """The mechanism switched off: a cold iteration at every step does not converge."""
    x = with_spectrum(9, np.array([4.0, 3.0, 2.0, 1.6, 1.5, 1.4]), seed=1)
    exact = Hosvd(ranks=(3, None)).save(x)["factor_0"]
    warm, cold = Asi((3, None)), Asi((3, None))
    for _ in range(60):
        near = distance(warm.save(x)["factor_0"], exact)
        cold.load_state({})
        far = distance(cold.save(x)["factor_0"], exact)
    assert near < 1e-4 < 0.1 < far


# ---- degenerate activations ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-42])
def test_zeros_and_tiny_values_make_no_nan(dtype: Any, scale: float) -> None:
    """A dead layer: finite orthonormal factors, and the iteration goes on from them when it wakes up."""
    x = np.random.default_rng(0).standard_normal((4, 6, 3, 5)).astype(dtype)
    store = Asi((2, 3, 1, 2))
    for activation in ((x * dtype(scale)).astype(dtype), x, np.zeros_like(x), x):
        saved = store.save(activation)
        for name, array in saved.items():
            assert np.isfinite(array).all()
            if name != "core":
                np.testing.assert_allclose(array.T @ array, np.eye(array.shape[1]), atol=1e-5)
    assert store.energy_kept is not None


def test_a_zero_activation_does_not_lose_the_warm_start() -> None:
    """What was learnt before a dead batch is still there after it."""
    x = np.random.default_rng(0).standard_normal((4, 6))
    store = Asi((2, 3))
    before = store.save(x)
    after = store.save(np.zeros_like(x))
    for mode in (0, 1):
        assert distance(after[f"factor_{mode}"], before[f"factor_{mode}"]) < 1e-12
    assert not after["core"].any()
    assert store.energy_kept is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 8), (5, 6, 4), (5, 6, 4, 3)])
def test_a_rank_deficient_activation(shape: tuple[int, ...], dtype: Any) -> None:
    """Fewer directions than the ranks: the factors are completed, and nothing of the activation is lost."""
    x = low_rank(shape, (1,) * len(shape), 0, dtype)
    store = Asi(tuple(n - 1 for n in shape))
    for _ in range(5):
        saved = store.save(x)
        for mode, n in enumerate(shape):
            U = saved[f"factor_{mode}"]
            np.testing.assert_allclose(U.T @ U, np.eye(n - 1), atol=1e-5)
        np.testing.assert_allclose(rebuild(saved), x, atol=1e-4 * np.abs(x).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_not_finite_leaves_the_warm_start_alone(bad: float) -> None:
    """One broken batch is an error, and must not poison the factors of all later steps."""
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    store = Asi((2, 3))
    store.save(x)
    before = store.state()
    broken = x.copy()
    broken[0, 0] = bad
    with pytest.raises(ValueError, match=r"\(4, 6\) contains NaN or infinity"):
        store.save(broken)
    assert all(store.state()[name] is U for name, U in before.items())


# ---- state, restarts, memory -----------------------------------------------------------------


def test_another_batch_size_restarts_the_batch_mode_alone() -> None:
    """The last, smaller batch of an epoch starts from the seed in mode 0; the other modes stay warm."""
    rng = np.random.default_rng(0)
    x, smaller = rng.standard_normal((8, 6)), rng.standard_normal((5, 6))
    store, fresh = Asi((2, 3), seed=4), Asi((2, 3), seed=4)
    for _ in range(3):
        store.save(x)
    warm = store.state()["factor_1"]
    saved, from_seed = store.save(smaller), fresh.save(smaller)
    np.testing.assert_array_equal(saved["factor_0"], from_seed["factor_0"])
    image = smaller.T @ (smaller @ warm)
    U = saved["factor_1"]
    np.testing.assert_allclose(U @ (U.T @ image), image, atol=1e-10)
    assert distance(U, from_seed["factor_1"]) > 1e-3


def test_the_seed_fixes_everything() -> None:
    """Same seed, same factors, bit by bit; another seed, others."""
    x = np.random.default_rng(0).standard_normal((4, 6, 3, 5))
    a, b, c = (Asi((2, 3, 1, 2), seed).save(x) for seed in (1, 1, 2))
    assert all((a[name] == b[name]).all() for name in a)
    assert not np.allclose(a["factor_1"] @ a["factor_1"].T, c["factor_1"] @ c["factor_1"].T)


def test_a_state_that_does_not_fit_is_refused() -> None:
    """The factors of another layer would give wrong directions without a word."""
    store = Asi((2, None))
    with pytest.raises(ValueError, match=r"holds 'factor_1', expected some of \['factor_0'\]"):
        store.load_state({"factor_1": np.ones((4, 2))})
    with pytest.raises(ValueError, match=r"factor_0 of the state has shape \(4, 3\), expected \(n, 2\)"):
        store.load_state({"factor_0": np.ones((4, 3))})


def step_of_a_wide_layer(store: Asi) -> Any:
    """A function that runs one forward pass through a layer whose factor is large beside the checker's slack."""
    net = nn.Sequential(nn.Linear(4096, 8, rng=0))
    net[0].store = store
    x, target = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32), np.zeros((64, 8), np.float32)
    return lambda: F.mse_loss(net(Tensor(x)), target)


def test_the_factors_are_in_memory_once() -> None:
    """The tape reports core and factors, memory holds no more, and factor_bytes adds nothing."""
    store = Asi((None, 32))
    step = step_of_a_wide_layer(store)
    report = check_live_bytes(step, 2)
    assert report.by_layer()["0"] == 4 * (64 * 32 + 4096 * 32)
    assert store.factor_bytes == 0
    loss = step()
    on_tape = {id(saved.array) for saved in lr.engine.tape_report._nodes(loss)[0].saved.values()}
    assert {id(U) for U in store.state().values()} <= on_tape


def test_planted_second_copy_of_the_factors_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that kept a copy for the next step would hold half a megabyte that no report shows."""
    right = Asi.save

    def copying(store: Asi, activation: np.ndarray) -> dict[str, np.ndarray]:
        saved = right(store, activation)
        store._factors = {mode: U.copy() for mode, U in store._factors.items()}
        return saved

    monkeypatch.setattr(Asi, "save", copying)
    with pytest.raises(AssertionError, match="alive"):
        check_live_bytes(step_of_a_wide_layer(Asi((None, 32))), 2)


def test_between_steps_only_the_factors_stay() -> None:
    """When backward has consumed the tape, Σ n·r elements are left for the next step."""
    store = Asi((16, None))
    x = np.random.default_rng(0).standard_normal((4096, 64))
    store.save(x)
    store.load_state({})
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        saved = store.save(x)
        both = tracemalloc.get_traced_memory()[0] - before
        del saved
        gc.collect()
        left = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert both == pytest.approx(8 * (16 * 64 + 4096 * 16), abs=20_000)
    assert left == pytest.approx(8 * 4096 * 16, abs=20_000)


def test_a_layer_that_runs_twice_goes_on_from_call_to_call() -> None:
    """Both calls' factors are on the tape, the second call's are those kept; backward uses each call's own."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 4))
    net = nn.Sequential(nn.Linear(4, 4, bias=False, rng=0)).to(np.float64)
    net[0].store = Asi((2, 2))
    middle = net(x)
    loss = F.mse_loss(net(F.tanh(middle)), np.zeros((5, 4)))
    by_layer = lr.tape(loss).entries
    assert sum(entry.what.startswith("factor") for entry in by_layer) == 4
    loss.backward()
    replay = Asi((2, 2))
    first, second = replay.save(x), replay.save(np.tanh(middle.data))
    weight = Tensor(net[0].weight.data, requires_grad=True)
    low = [rebuild(saved) for saved in (first, second)]
    np.testing.assert_array_equal(net[0].store.state()["factor_0"], second["factor_0"])
    grad_out = 2 / 20 * (np.tanh(middle.data) @ weight.data.T)
    inner = (grad_out @ weight.data) * (1 - np.tanh(middle.data) ** 2)
    np.testing.assert_allclose(net[0].weight.grad, grad_out.T @ low[1] + inner.T @ low[0], rtol=1e-10)


def test_wrong_shapes_are_named() -> None:
    """Ranks are never clipped in silence: larger than the mode is an error with the layer's name."""
    net = nn.Sequential(nn.Linear(3, 2, rng=0))
    net[0].store = Asi((6, 2))
    with pytest.raises(ValueError, match=r"layer 0: .*rank of mode 0 is 6.*from 1 to 5"):
        net(np.ones((5, 3), np.float32))
    with pytest.raises(ValueError, match=r"layer 0: .*one per mode"):
        lr.trace(net, (5, 2, 3))
    assert Asi((np.int64(2), None)).describe() == {"name": "asi", "ranks": (2, None)}


def test_planted_fault_of_the_wrong_unfolding_is_caught() -> None:
    """The comparison with the SVD tells modes apart: factors of a transposed activation are far away."""
    g = ConvGeometry((6, 5, 4, 4), (2, 5, 3, 3))
    x = arrays(g, 0)[0]
    U, _ = singular(x, 2)
    store, transposed = Asi((None, None, 2, None)), Asi((None, None, 2, None))
    for _ in range(200):
        right = store.save(x)["factor_2"]
        wrong = transposed.save(np.ascontiguousarray(x.transpose(0, 1, 3, 2)))["factor_2"]
    assert distance(right, U[:, :2]) < 1e-3 < 0.1 < distance(wrong, U[:, :2])
