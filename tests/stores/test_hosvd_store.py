"""HOSVD at every step: backpropagation's gradient where nothing is lost, the right subspaces where something is."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from helpers import check_live_bytes
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries, ranks_for
from tucker_cases import low_rank, rebuild, singular

import lance_ref as lr
from analysis.check.store_case import StoreTestCase
from analysis.steps.settings import TunedLayer
from lance_ref import F, Tensor, nn, tape
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.stores import Hosvd
from lance_ref.stores.hosvd import all_directions

layers = st.one_of(conv_geometries(), linear_geometries())


class TestHosvd(StoreTestCase):
    """Of given ranks, some of them above what the other modes allow."""

    method = "hosvd"
    wrong: ClassVar = {
        "epsilon is 1.5": lambda: Hosvd(1.5),
        "ranks are (0, 2)": lambda: Hosvd(ranks=(0, 2)),
        "ranks are (1, 2) and modes ('batch',), expected one of them": lambda: Hosvd(ranks=(1, 2), modes=("batch",)),
        "modes are": lambda: Hosvd(modes=("time",)),
        "int64": lambda: Hosvd().save(np.ones((2, 3), np.int64)),
        "(0, 3), which is empty": lambda: Hosvd().save(np.ones((0, 3))),
    }

    def make(self, layer: TunedLayer) -> Hosvd:
        return Hosvd(ranks=layer.ranks)

    def exactly(self, layer: TunedLayer) -> Hosvd:
        return Hosvd(ranks=layer.shape)


class TestHosvdByEnergy(TestHosvd):
    """Ranks that each step chooses; its memory is predicted once they are known."""

    method = None

    def make(self, layer: TunedLayer) -> Hosvd:
        return Hosvd(0.8)

    def exactly(self, layer: TunedLayer) -> Hosvd:
        return Hosvd(1.0)


@given(data=st.data(), g=layers, seed=st.integers(0, 99), dtype=st.sampled_from([np.float32, np.float64]))
def test_an_activation_of_low_rank_loses_nothing(data: Any, g: Any, seed: int, dtype: Any) -> None:
    """Ranks that the activation does not exceed: core and factors give backpropagation's dW."""
    ranks = tuple(data.draw(st.integers(1, n)) for n in g.input_shape)
    x = low_rank(g.input_shape, ranks, seed, dtype)
    _, _, grad_output = arrays(g, seed, dtype)
    store = Hosvd(ranks=ranks)
    dW, exact = store.weight_gradient(store.save(x), grad_output, g), g.weight_gradient(x, grad_output)
    assert dW.dtype == dtype
    scale = np.linalg.norm(x) * np.linalg.norm(grad_output)
    assert np.abs(dW - exact).max() <= (1e-4 if dtype == np.float32 else 1e-10) * scale


@given(data=st.data(), g=layers, seed=st.integers(0, 99))
def test_the_gradient_is_that_of_the_truncated_activation(data: Any, g: Any, seed: int) -> None:
    """A second implementation: SVDs of the unfoldings, Ã formed in full, its exact weight gradient."""
    ranks = data.draw(ranks_for(g.input_shape))
    x, _, grad_output = arrays(g, seed)
    expected = x
    for mode, r in enumerate(ranks):
        if r is not None and r < x.shape[mode]:
            U, energies = singular(x, mode)
            assume(energies[r - 1] - energies[r] > 1e-3 * energies[0] or r >= x.size // x.shape[mode])
            projector = U[:, :r] @ U[:, :r].T
            expected = np.moveaxis(np.tensordot(projector, expected, (1, mode)), 0, mode)
    store = Hosvd(ranks=ranks)
    saved = store.save(x)
    np.testing.assert_allclose(rebuild(saved), expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(
        store.weight_gradient(saved, grad_output, g), g.weight_gradient(expected, grad_output), rtol=1e-7, atol=1e-7
    )


@given(g=layers, seed=st.integers(0, 99), epsilon=st.floats(0.05, 0.999), relu=st.booleans())
def test_ranks_follow_the_energy_rule(g: Any, seed: int, epsilon: float, relu: bool) -> None:
    """Each mode keeps at least the share epsilon of the energy, and with one direction less would not."""
    x = arrays(g, seed)[0]
    x = np.maximum(x, 0) if relu else x
    assume(x.any())
    store = Hosvd(epsilon)
    store.save(x)
    assert store.ranks is not None
    for mode, r in enumerate(store.ranks):
        _, energies = singular(x, mode)
        kept = np.cumsum(energies) / energies.sum()
        rank = x.shape[mode] if r is None else r
        assert kept[rank - 1] >= epsilon - 1e-12
        assert rank == 1 or kept[rank - 2] < epsilon + 1e-12


@given(data=st.data(), g=layers, seed=st.integers(0, 99), dtype=st.sampled_from([np.float32, np.float64]))
def test_what_is_kept(data: Any, g: Any, seed: int, dtype: Any) -> None:
    """Core of the ranks' shape, orthonormal factors, each in a buffer of its own and the activation's dtype."""
    ranks = data.draw(ranks_for(g.input_shape))
    x = arrays(g, seed, dtype)[0]
    store = Hosvd(ranks=ranks)
    saved = store.save(x)
    effective = tuple(None if r == n else r for n, r in zip(x.shape, ranks, strict=True))
    assert store.describe() == {
        "name": "hosvd", "epsilon": None, "ranks": effective, "shape": x.shape, "selected": None
    }  # fmt: skip
    assert saved["core"].shape == tuple(n if r is None else r for n, r in zip(x.shape, effective, strict=True))
    assert set(saved) == {"core", *(f"factor_{mode}" for mode, r in enumerate(effective) if r is not None)}
    for name, array in saved.items():
        assert array.dtype == dtype
        assert array is x or array.base is None or array.base.nbytes == array.nbytes
        if name != "core":
            tolerance = 1e-5 if dtype == np.float32 else 1e-12
            np.testing.assert_allclose(array.T @ array, np.eye(array.shape[1]), atol=tolerance)
    assert store.energy_kept == pytest.approx(np.sum(saved["core"] ** 2) / np.sum(x**2), rel=1e-4)
    assert store.factor_bytes == 0


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (2, 30, 3), (2, 50, 3, 3), (20, 2, 3, 1)])
def test_a_mode_larger_than_all_others_together(shape: tuple[int, ...]) -> None:
    """The Gram of the smaller side gives the same subspace as an SVD, also above the rank that there can be."""
    x = np.random.default_rng(0).standard_normal(shape)
    mode = int(np.argmax(shape))
    rest = x.size // shape[mode]
    U, _ = singular(x, mode)
    for r in (1, rest - 1, rest, rest + 1):
        ranks: list[int | None] = [None] * len(shape)
        ranks[mode] = r
        factor = Hosvd(ranks=ranks).save(x)[f"factor_{mode}"]
        assert factor.shape == (shape[mode], r)
        np.testing.assert_allclose(factor.T @ factor, np.eye(r), atol=1e-12)
        leading = U[:, : min(r, rest)]
        np.testing.assert_allclose(factor @ (factor.T @ leading), leading, atol=1e-10)


def test_in_float32_the_projection_is_as_good_as_in_float64() -> None:
    """Grams in float32 keep the energy that float64 ones keep, at the same ranks."""
    x = np.maximum(np.random.default_rng(0).standard_normal((16, 60, 7, 7)) + 0.3, 0)
    single, double = Hosvd(0.8), Hosvd(0.8)
    single.save(x.astype(np.float32))
    double.save(x)
    assert single.ranks == double.ranks
    assert single.energy_kept == pytest.approx(double.energy_kept, rel=1e-5)


@given(data=st.data(), seed=st.integers(0, 99), epsilon=st.floats(0.1, 0.99))
def test_for_a_matrix_it_is_an_orthogonal_projection_of_the_gradient(data: Any, seed: int, epsilon: float) -> None:
    """⟨dW, dŴ⟩ = ‖dŴ‖²: with directions of the very batch a linear layer's step never points uphill."""
    B, I, O = (data.draw(st.integers(1, 7)) for _ in range(3))  # noqa: E741
    g = LinearGeometry((B, I), (O, I))
    x, _, grad_output = arrays(g, seed)
    store = Hosvd(epsilon)
    projected, exact = store.weight_gradient(store.save(x), grad_output, g), g.weight_gradient(x, grad_output)
    assert np.vdot(exact, projected) == pytest.approx(np.sum(projected**2), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (4, 9), (4, 3, 9), (1, 1)])
def test_an_activation_of_zeros(shape: tuple[int, ...]) -> None:
    """A dead layer must not stop a training run, nor make a NaN: rank 1, and dW = 0."""
    store = Hosvd()
    saved = store.save(np.zeros(shape, np.float32))
    assert store.ranks == tuple(None if n == 1 else 1 for n in shape)
    assert store.energy_kept is None
    assert not saved["core"].any()
    assert all(np.isfinite(array).all() for array in saved.values())


def test_only_the_selected_modes_are_compressed() -> None:
    """modes= as in calibrate: the others stay whole, without a factor."""
    x = np.random.default_rng(0).standard_normal((6, 5, 4, 3))
    store = Hosvd(0.6, modes=("channel", "height"))
    assert store.describe()["selected"] is None
    saved = store.save(x)
    assert set(saved) == {"core", "factor_1", "factor_2"}
    assert store.describe()["selected"] == (False, True, True, False)
    tokens = Hosvd(0.6, modes=("height", "width"))
    assert set(tokens.save(x.reshape(6, 20, 3))) == {"core", "factor_1"}


def test_wrong_shapes_are_named() -> None:
    """With the layer's name, when a shape is there."""
    net = nn.Sequential(nn.Linear(3, 2, rng=0))
    net[0].store = Hosvd(ranks=(1, 4))
    with pytest.raises(ValueError, match=r"layer 0: .*rank of mode 1 is 4"):
        lr.trace(net, (5, 3))
    net[0].store = Hosvd(modes=("height",))
    with pytest.raises(ValueError, match=r"layer 0: .*modes are \('height',\)"):
        lr.trace(net, (5, 3))


# ---- on a network ----------------------------------------------------------------------------


def net_with(store: Any, B: int = 8) -> tuple[nn.Module, np.ndarray]:
    """Two convolutions, of which the second trains with the store; a batch whose tape is large enough to measure."""
    net = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1, rng=0), nn.ReLU(), nn.Conv2d(24, 16, 3, stride=2, rng=1))
    lr.tune(net, ["2"])
    net[2].store = store
    return net, np.random.default_rng(0).standard_normal((B, 3, 24, 24)).astype(np.float32)


def test_the_tape_holds_core_and_factors_and_so_does_memory() -> None:
    """What the report says is what is alive, and it is smaller than the activation."""
    store = Hosvd(0.9)
    net, x = net_with(store, 32)
    report = check_live_bytes(lambda: F.mse_loss(net(Tensor(x)), np.zeros((32, 16, 11, 11), np.float32)), 8)
    ranks = [n if r is None else r for n, r in zip(store.shape or (), store.ranks or (), strict=True)]
    core, factors = int(np.prod(ranks)), sum(n * r for n, r in zip(store.shape or (), ranks, strict=True) if r < n)
    assert report.by_layer()["2"] == 4 * (core + factors) < 4 * 32 * 24 * 24 * 24


def test_epsilon_one_on_a_network_is_plain_backpropagation() -> None:
    """Bit by bit, tape and gradient: nothing is decomposed, nothing is copied."""
    results = []
    for store in (None, Hosvd(1.0)):
        net, x = net_with(lr.activations.EXACT if store is None else store)
        loss = F.mse_loss(net(x), np.zeros((8, 16, 11, 11), np.float32))
        results.append((tape(loss).by_layer(), net[2].weight))
        loss.backward()
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1].grad, results[1][1].grad)


@pytest.mark.parametrize("fault", ["drop a factor", "transpose a factor", "flip a sign", "forget the padding"])
def test_planted_faults_are_caught(fault: str) -> None:
    """The comparison with the truncated activation fails when core, factors and geometry do not belong together."""
    g = ConvGeometry((3, 4, 5, 5), (2, 4, 3, 3), padding=((1, 1), (1, 1)))
    x, _, grad_output = arrays(g, 0)
    store = Hosvd(ranks=(2, 3, 4, 4))
    saved = store.save(x)
    expected = g.weight_gradient(rebuild(saved), grad_output)
    np.testing.assert_allclose(store.weight_gradient(saved, grad_output, g), expected, rtol=1e-10, atol=1e-10)
    wrong, wrong_geometry = dict(saved), g
    if fault == "drop a factor":
        wrong["factor_1"] = np.eye(4)[:, :3]
    elif fault == "transpose a factor":
        wrong["factor_2"], wrong["factor_3"] = saved["factor_3"], saved["factor_2"]
    elif fault == "flip a sign":
        wrong["factor_0"] = saved["factor_0"] * np.array([1.0, -1.0])
    else:
        wrong_geometry = ConvGeometry((3, 4, 5, 5), (2, 4, 3, 3), padding=((2, 0), (2, 0)))
    assert not np.allclose(store.weight_gradient(wrong, grad_output, wrong_geometry), expected, rtol=1e-3)


def test_a_mode_whose_directions_are_all_needed_has_no_factor() -> None:
    """Energies that are alike: a threshold just below 1 takes every direction, and the mode is left alone."""
    for activation in (np.eye(4), np.eye(3, 5)):
        store = Hosvd(epsilon=0.999)
        assert store.factors_of(activation)[0] is None
        assert store.ranks is not None
        assert store.ranks[0] is None


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_directions_of_tiny_and_huge_numbers(factor: float) -> None:
    """Their squares are out of the range of float32."""
    x = np.random.default_rng(0).standard_normal((4, 6, 3)).astype(np.float32)
    expected, found = (all_directions(a, {0: None, 1: 2}) for a in (x, x * np.float32(factor)))
    for mode in expected:
        assert found[mode].rank(0.8) == expected[mode].rank(0.8) > 1
        np.testing.assert_array_equal(found[mode].leading(2), expected[mode].leading(2))
