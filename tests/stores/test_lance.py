"""LANCE's weight gradient: backpropagation's at full rank, and the projected one at any rank."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries, ranks_for

import lance_ref as lr
from analysis.check.store_case import StoreTestCase
from analysis.rules import tucker_costs
from analysis.steps.settings import TunedLayer
from lance_ref import F, Subspace, count_macs, nn, tape
from lance_ref.algebra import projection as plain
from lance_ref.algebra import projection_fast as projection
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.algebra.projection import contract_features
from lance_ref.stores import EXACT, Lance

layers = st.one_of(conv_geometries(), linear_geometries())


SUBSPACE = Subspace.random((2, 3), (1, 2), np.random.default_rng(0))


class TestLance(StoreTestCase):
    """Random subspaces. The founding property: with nothing discarded, dW is plain backpropagation's."""

    method, order = "lance", "auto"
    wrong: ClassVar = {
        "order is 'fast'": lambda: Lance(SUBSPACE, order="fast"),
        "dtype is int64": lambda: Lance(SUBSPACE, dtype=np.int64),
        "dtype float64, but the factors were made for float32": lambda: Lance(SUBSPACE).save(np.ones((2, 3))),
        "(2, 4), but the feature mode was calibrated with 3": lambda: Lance(SUBSPACE).save(np.ones((2, 4), np.float32)),
    }

    def make(self, layer: TunedLayer) -> Lance:
        return Lance(Subspace.random(layer.shape, layer.ranks, layer.rng), self.order, layer.dtype)

    def exactly(self, layer: TunedLayer) -> Lance:
        return Lance(Subspace.random(layer.shape, layer.shape, layer.rng), self.order, layer.dtype)


class TestThePapersOrder(TestLance):
    """The activation is put back a slice at a time."""

    method, order = None, "papers"


class TestTheSeparableOrder(TestLance):
    """Height after width, of small maps too."""

    method, order = None, "separable"


def random_store(shape: tuple[int, ...], ranks: tuple[int | None, ...], order: str = "auto", seed: int = 0) -> Lance:
    return Lance(Subspace.random(shape, ranks, np.random.default_rng(seed)), order=order, dtype=np.float64)


def reconstruct(activation: np.ndarray, store: Lance) -> np.ndarray:
    """Ã = A ×₁ U_1U_1ᵀ ×₂ U_2U_2ᵀ …, formed in full (what LANCE never does)."""
    for mode, U in enumerate(store.factors):
        if U is not None:
            activation = np.moveaxis(np.tensordot(U @ U.T, activation, (1, mode)), 0, mode)
    return activation


def gradient(g: Any, store: Lance, x: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
    return store.weight_gradient(store.save(x), grad_output, g)


@given(data=st.data(), g=layers, seed=st.integers(0, 99), order=st.sampled_from(["auto", "papers", "separable"]))
def test_any_rank_equals_the_gradient_of_the_reconstruction(data: Any, g: Any, seed: int, order: str) -> None:
    """All orders, any ranks, any modes left alone: dW is the exact weight gradient of Ã."""
    ranks = data.draw(ranks_for(g.input_shape))
    x, _, grad_output = arrays(g, seed)
    store = random_store(g.input_shape, ranks, order, seed)
    expected = g.weight_gradient(reconstruct(x, store), grad_output)
    np.testing.assert_allclose(gradient(g, store, x, grad_output), expected, rtol=1e-10, atol=1e-10)


@given(
    data=st.data(), g=conv_geometries(), seed=st.integers(0, 99), channels=st.integers(1, 3), one_product=st.booleans()
)
def test_the_separable_order_a_few_output_channels_at_a_time(
    data: Any, g: Any, seed: int, channels: int, one_product: bool
) -> None:
    """Any geometry and groups: the same gradient, by as many multiply-adds."""
    ranks = data.draw(ranks_for(g.input_shape))
    x, _, grad_output = arrays(g, seed)
    store = random_store(g.input_shape, ranks, "separable", seed)
    core = store.save(x)["core"]
    gradients, macs = [], []
    for at_a_time in (g.weight_shape[0], channels * g.weight_shape[0] // g.groups if g.groups > 1 else channels):
        with pytest.MonkeyPatch.context() as patch:
            limited = min(at_a_time, g.weight_shape[0])
            patch.setattr(projection, "channels_at_a_time", lambda *arguments, limited=limited: limited)
            with count_macs() as counter:
                gradients.append(projection.separable_order(core, store.factors, grad_output, g, (), one_product))
        macs.append(sum(counter.macs.values()))
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    assert macs[0] == macs[1]


def test_output_channels_at_a_time_are_whole_groups() -> None:
    """Within the workspace, and at least one group; all of them where they fit."""
    g = ConvGeometry((16, 24, 20, 20), (48, 4, 3, 3), groups=6)
    ranks = (8, None, 15, 15)
    whole = projection.channels_at_a_time(g, g.output_shape, ranks, 4)
    assert whole == 48
    with pytest.MonkeyPatch.context() as patch:
        for limit, expected in ((1, 8), (10**6, 32)):  # a slice of G and the product after it: 5,184 + 2,592 numbers
            patch.setattr(projection, "CONTRACTION_BYTES", limit)
            assert projection.channels_at_a_time(g, g.output_shape, ranks, 4) == expected
        # 16 numbers of G, then 24, then Z of 36, which is laid out once more: 72 at a time
        patch.setattr(projection, "CONTRACTION_BYTES", 4 * 72 * 5)
        wide = ConvGeometry((1, 3, 6, 6), (8, 3, 3, 3))
        assert projection.channels_at_a_time(wide, (1, 8, 4, 4), (None, None, 6, 6), 4) == 5


@given(data=st.data(), g=layers, seed=st.integers(0, 99))
def test_a_mode_left_alone_equals_a_full_rank_mode(data: Any, g: Any, seed: int) -> None:
    """None and the full rank differ in cost, never in the gradient."""
    ranks = data.draw(ranks_for(g.input_shape))
    x, _, grad_output = arrays(g, seed)
    sparse = random_store(g.input_shape, ranks, seed=seed)
    eye = [np.eye(n) if U is None else U for n, U in zip(g.input_shape, sparse.factors, strict=True)]
    full = random_store(g.input_shape, g.input_shape, seed=seed)
    full.factors = tuple(eye)
    np.testing.assert_allclose(
        gradient(g, sparse, x, grad_output), gradient(g, full, x, grad_output), rtol=1e-10, atol=1e-10
    )


@given(data=st.data(), g=layers, seed=st.integers(0, 9))
def test_the_core_is_all_that_is_kept_and_all_it_costs(data: Any, g: Any, seed: int) -> None:
    """The core has the ranks' shape and a buffer of its own, no larger, and ‖S‖²/‖A‖² is the energy kept."""
    ranks = data.draw(ranks_for(g.input_shape))
    x, _, _ = arrays(g, seed)
    store = random_store(g.input_shape, ranks, seed=seed)
    core = store.save(x)["core"]
    assert core.shape == tuple(n if r is None else r for n, r in zip(g.input_shape, ranks, strict=True))
    assert core.base is None or core.base.nbytes == core.nbytes
    assert not np.shares_memory(core, x)
    assert store.energy_kept == pytest.approx(np.sum(core**2) / np.sum(x**2), rel=1e-12)
    assert store.energy_kept <= 1 + 1e-12
    assert store.factor_bytes == sum(8 * n * r for n, r in zip(g.input_shape, ranks, strict=True) if r is not None)


@given(data=st.data(), g=conv_geometries(), seed=st.integers(0, 99))
def test_height_and_width_in_one_product_give_the_same(data: Any, g: ConvGeometry, seed: int) -> None:
    """Core and weight gradient of any geometry, by as many multiply-adds as the closed forms say."""
    ranks = data.draw(ranks_for(g.input_shape))
    x, _, grad_output = arrays(g, seed)
    store = random_store(g.input_shape, ranks, seed=seed)
    cores, gradients = [], []
    for one_product in (False, True):
        with count_macs() as counter:
            cores.append(projection.project(x, store.factors, "auto" if one_product else "separable"))
        expected = tucker_costs.projection_macs(g.input_shape, ranks, "auto" if one_product else "separable")
        assert sum(counter.macs.values()) == expected
        with count_macs() as counter:
            gradients.append(projection.separable_order(cores[0], store.factors, grad_output, g, (), one_product))
        expected = tucker_costs.conv_separable_macs(sizes_of(g), ranks, one_product=one_product)
        assert sum(counter.macs.values()) == expected
    np.testing.assert_allclose(cores[1], cores[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "ranks", "one"),
    [
        ((8, 16), (8, 8), True),
        ((8, 16), (13, 5), False),  # 65 numbers
        ((3, 43), (1, 2), False),  # 129 places
        ((112, 112), (1, 1), True),
        ((7, 7), (None, 2), False),
        ((7, 7), (2, None), False),
    ],
)
def test_which_maps_are_taken_in_one_product(size: tuple[int, int], ranks: tuple[Any, Any], one: bool) -> None:
    """Up to 128 places and 64 numbers, and rank one, where it takes fewer multiply-adds; the closed form agrees."""
    assert projection.in_one_product(size, ranks) is one
    assert (len(tucker_costs.map_as_one((2, 3, *size), (1, None, *ranks))[0]) == 3) is one


def test_multiply_adds_of_a_lance_layer_by_hand() -> None:
    """(B, C, H, W) = (8, 6, 5, 4), 3×2 kernel, C_out = 10, ranks (2, 3, 1, 2): each product worked out.

    By default with height and width as one mode, 20 to 2 in A and 9 to 3·4 in G.
    """
    g = ConvGeometry((8, 6, 5, 4), (10, 6, 3, 2))
    assert g.output_shape == (8, 10, 3, 3)
    x, _, grad_output = arrays(g, 0)
    store = random_store(g.input_shape, (2, 3, 1, 2))
    with count_macs() as counter:
        saved = store.save(x)
    # the map 20 -> 2 (1/2 − 1/20), batch 8 -> 2 (1/2 − 1/8), channel 6 -> 3 (1/3 − 1/6)
    by_map = 8 * 6 * 20 * 2 + 8 * 6 * 2 * 2 + 2 * 6 * 2 * 3
    assert sum(counter.macs.values()) == by_map == 1920 + 192 + 72
    with count_macs() as counter:
        projection.project(x, store.factors, "separable")
    # height 5 -> 1, batch 8 -> 2, width 4 -> 2, channel 6 -> 3
    by_height = 8 * 6 * 5 * 4 * 1 + 8 * 6 * 1 * 4 * 2 + 2 * 6 * 1 * 4 * 2 + 2 * 6 * 1 * 2 * 3
    assert sum(counter.macs.values()) == by_height == 960 + 384 + 96 + 72
    counts = {}
    for order in ("papers", "separable", "auto"):
        store.order = order
        with count_macs() as counter:
            store.weight_gradient(saved, grad_output, g)
        counts[order] = sum(counter.macs.values())
    # Z1 = G ×₁ U_1ᵀ; Z2: height 1 -> 5 after width 2 -> 4; Z3; ×₂ U_2
    widened = min(2 * 3 * 1 * 2 * 4 + 2 * 3 * 1 * 4 * 5, 2 * 3 * 1 * 2 * 5 + 2 * 3 * 5 * 2 * 4)
    papers = 8 * 10 * 9 * 2 + widened + 2 * 10 * 3 * 6 * 9 + 10 * 6 * 3 * 6
    # G: batch 8 -> 2 first, then height 3 -> 3·1, then width 3 -> 2·2; core; ×₂ U_2
    separable = 8 * 10 * 9 * 2 + 2 * 10 * 9 * 3 + 2 * 10 * 3 * 3 * 4 + 10 * 6 * 3 * (2 * 1 * 2) + 10 * 6 * 3 * 6
    # channels 3 -> 6 in the core first: one product more there, and no ×₂ U_2; G: batch 8 -> 2, map 9 -> 12
    put_back = 2 * 3 * 1 * 2 * 6 + 8 * 10 * 9 * 2 + 2 * 10 * 9 * 12 + 10 * 6 * 6 * (2 * 1 * 2)
    assert counts == {"papers": papers, "separable": separable, "auto": put_back}


@given(data=st.data(), g=conv_geometries(), seed=st.integers(0, 99), expanded=st.sampled_from(projection.EXPANSIONS))
def test_modes_put_back_first_change_the_work_alone(
    data: Any, g: ConvGeometry, seed: int, expanded: tuple[int, ...]
) -> None:
    """Any geometry, groups and ranks: the same gradient, by as many multiply-adds as the closed form says."""
    ranks = [r or n for r, n in zip(data.draw(ranks_for(g.input_shape)), g.input_shape, strict=True)]
    x, _, grad_output = arrays(g, seed)
    store = random_store(g.input_shape, tuple(ranks), "separable", seed)
    core = store.save(x)["core"]
    expected = projection.separable_order(core, store.factors, grad_output, g)
    with count_macs() as counter:
        found = projection.separable_order(core, store.factors, grad_output, g, expanded)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert sum(counter.macs.values()) == tucker_costs.conv_separable_macs(sizes_of(g), ranks, expanded)


@given(data=st.data(), g=conv_geometries(), seed=st.integers(0, 9))
def test_auto_runs_the_cheapest_order(data: Any, g: ConvGeometry, seed: int) -> None:
    """Of all orders whose core put back is small enough, with small maps as one, ``auto`` has the fewest."""
    ranks = data.draw(ranks_for(g.input_shape))
    x, _, grad_output = arrays(g, seed)
    saved = random_store(g.input_shape, ranks).save(x)
    counts = {}
    for order in ("papers", "auto"):
        with count_macs() as counter:
            random_store(g.input_shape, ranks, order).weight_gradient(saved, grad_output, g)
        counts[order] = sum(counter.macs.values())
    for expanded in projection.EXPANSIONS:
        left = [None if mode in expanded else r for mode, r in enumerate(ranks)]
        small = not expanded or tucker_costs.core_elements(g.input_shape, left) <= np.prod(g.input_shape) // 4
        if small and all(ranks[mode] is not None for mode in expanded):
            counts[str(expanded)] = tucker_costs.conv_separable_macs(sizes_of(g), ranks, expanded, one_product=True)
    assert counts["auto"] == min(counts.values())


@pytest.mark.parametrize(("x", "weight", "groups", "ranks", "order", "expanded"), [
    ((1, 8, 12, 3), (24, 2, 3, 2), 4, (None, 2, 1, 1), "separable", (1,)),  # no batch to put back, but channels
    ((1, 6, 12, 9), (5, 6, 3, 1), 1, (1, None, 6, 7), "separable", ()),  # (0,) would be cheaper, and too large
    ((1, 4, 3, 4), (3, 4, 1, 3), 1, (1, 4, 2, 2), "papers", ()),
    ((3, 24, 6, 3), (16, 6, 1, 1), 4, (2, 22, 4, 2), "separable", ()),
    ((8, 20, 9, 12), (12, 5, 1, 2), 4, (4, 10, 1, 5), "separable", ()),
    ((7, 16, 9, 10), (8, 8, 2, 3), 2, (1, 7, 3, 1), "separable", (1,)),
    ((5, 7, 11, 12), (1, 7, 1, 1), 1, (4, 1, 10, 12), "separable", ()),
])  # fmt: skip
def test_the_cheapest_order_of_awkward_sizes(
    x: Any, weight: Any, groups: int, ranks: Any, order: str, expanded: tuple[int, ...]
) -> None:
    """Sizes at which a product that is forgotten in one of the sums, or a bound, would change the choice."""
    g = ConvGeometry(x, weight, groups=groups)
    assert projection.cheapest_order(ranks, g) == (order, expanded)
    assert tucker_costs.conv_cheapest(sizes_of(g), ranks)[1:] == (order, expanded)


def test_a_depthwise_layer_at_quarter_ranks_puts_batch_and_channels_back() -> None:
    """Its outputs see one channel each: contracting all r_2 with every output took four times as much."""
    g = ConvGeometry((128, 960, 7, 7), (960, 1, 3, 3), padding=((1, 1), (1, 1)), groups=960)
    ranks, full = (32, 240, 2, 2), (32, 240, 7, 7)
    assert projection.cheapest_order(ranks, g) == ("separable", (0, 1))
    assert projection.cheapest_order(full, g)[1] != (0, 1), "that would be the activation"
    assert tucker_costs.conv_cheapest(sizes_of(g), ranks)[1:] == ("separable", (0, 1))
    put_back = tucker_costs.conv_separable_macs(sizes_of(g), ranks, (0, 1))
    assert 4 * put_back < tucker_costs.conv_separable_macs(sizes_of(g), ranks)


def sizes_of(g: ConvGeometry) -> tucker_costs.ConvSizes:
    B, C_in, *size = g.input_shape
    return tucker_costs.ConvSizes(B, C_in, tuple(size), g.out_channels, g.output_size, g.kernel, g.groups)


def test_papers_order_never_holds_the_whole_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into blocks of one slice, the papers' order gives the same gradient and re-expands one slice at a time."""
    g = ConvGeometry((6, 4, 5, 5), (3, 4, 3, 3))
    x, _, grad_output = arrays(g, 0)
    store = random_store(g.input_shape, (None, None, 2, 2), "papers")
    whole = gradient(g, store, x, grad_output)
    largest = 0
    original = plain.multi_mode_product

    def watched(tensor: np.ndarray, matrices: Any) -> np.ndarray:
        nonlocal largest
        result = original(tensor, matrices)
        if result.shape[1:] == (4, 5, 5):
            largest = max(largest, result.shape[0])
        return result

    monkeypatch.setattr(projection, "WORKSPACE_BYTES", 1)
    saved = store.save(x)
    monkeypatch.setattr(plain, "multi_mode_product", watched)
    np.testing.assert_allclose(store.weight_gradient(saved, grad_output, g), whole, rtol=1e-12, atol=1e-12)
    assert largest == 1


def test_the_separable_order_keeps_within_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small workspace no product sees more output channels than fit, and all of them are seen once."""
    g = ConvGeometry((4, 6, 9, 9), (12, 2, 3, 3), groups=3)
    x, _, grad_output = arrays(g, 0)
    store = random_store(g.input_shape, (2, None, 2, 2), "separable")
    core, seen, original = store.save(x)["core"], [], projection.multi_mode_product
    expected = projection.separable_order(core, store.factors, grad_output, g)

    def watched(tensor: np.ndarray, matrices: Any) -> np.ndarray:
        seen.append(tensor.shape[1])
        return original(tensor, matrices)

    monkeypatch.setattr(projection, "multi_mode_product", watched)
    monkeypatch.setattr(projection, "CONTRACTION_BYTES", 1)
    found = projection.separable_order(core, store.factors, grad_output, g)
    assert seen == [4, 4, 4]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@given(data=st.data(), g=conv_geometries(), bound=st.sampled_from([1, 20, 2**22]))
def test_nothing_is_put_back_beyond_a_quarter_of_the_activation(data: Any, g: ConvGeometry, bound: int) -> None:
    """However many multiply-adds it would save: what LANCE is for is memory."""
    ranks = [r or n for r, n in zip(data.draw(ranks_for(g.input_shape)), g.input_shape, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "EXPANDED_ELEMENTS", bound)
        _, expanded = projection.cheapest_order.__wrapped__(tuple(ranks), g)
    put_back = np.prod([n if mode in expanded else r for mode, (n, r) in enumerate(zip(g.input_shape, ranks))])  # noqa: B905
    assert not expanded or put_back <= min(bound, np.prod(g.input_shape) / 4)


@pytest.mark.parametrize(("m", "macs"), [(2, 2 * 3 * 7 + 2 * 5 * 7), (20, 20 * 5 * 3 + 5 * 3 * 7)])
def test_the_order_of_a_linear_layer_by_hand(m: int, macs: int) -> None:
    """(O, I, r) = (5, 7, 3): two rows are put back to all features first, twenty are multiplied with G first."""
    rng = np.random.default_rng(0)
    Z, S, U = rng.standard_normal((m, 5)), rng.standard_normal((m, 3)), rng.standard_normal((7, 3))
    with count_macs() as counter:
        found = contract_features(Z, S, U)
    np.testing.assert_allclose(found, np.einsum("mo,mr,ir->oi", Z, S, U), rtol=1e-12, atol=1e-12)
    assert sum(counter.macs.values()) == macs


@pytest.mark.parametrize("fault", ["drop a factor", "transpose a factor", "forget the padding", "flip a sign"])
def test_planted_faults_are_caught(fault: str) -> None:
    """The comparison with backpropagation at full rank fails as soon as the arithmetic is wrong."""
    g = ConvGeometry((3, 4, 5, 5), (2, 4, 3, 3), padding=((1, 1), (1, 1)))
    x, _, grad_output = arrays(g, 0)
    store = random_store(g.input_shape, g.input_shape, "separable")
    core = store.save(x)
    exact = g.weight_gradient(x, grad_output)
    np.testing.assert_allclose(store.weight_gradient(core, grad_output, g), exact, rtol=1e-10, atol=1e-10)
    factors = list(store.factors)
    wrong_geometry = g
    if fault == "drop a factor":
        factors[1] = np.eye(4)
    elif fault == "transpose a factor":
        factors[2] = factors[2].T
    elif fault == "flip a sign":
        factors[0] = factors[0] * np.array([1.0, 1.0, -1.0])
    else:
        wrong_geometry = ConvGeometry((3, 4, 7, 7), g.weight_shape)
        factors[2], factors[3] = (np.vstack([U, U[:2]]) for U in factors[2:])
    store.factors = tuple(factors)
    wrong = store.weight_gradient(core, grad_output, wrong_geometry)
    assert not np.allclose(wrong, exact, rtol=1e-3)


def test_feature_mode_alone_is_an_orthogonal_projection_of_the_gradient() -> None:
    """⟨dW, dŴ⟩ = ‖dŴ‖² for a linear layer with only its feature mode compressed."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        B, I, O, r = rng.integers(1, 7, 4)  # noqa: E741
        g = LinearGeometry((int(B), int(I)), (int(O), int(I)))
        x, _, grad_output = arrays(g, int(rng.integers(1000)))
        store = random_store(g.input_shape, (None, min(int(r), int(I))), seed=int(rng.integers(1000)))
        exact, projected = g.weight_gradient(x, grad_output), gradient(g, store, x, grad_output)
        assert np.vdot(exact, projected) == pytest.approx(np.sum(projected**2), rel=1e-9, abs=1e-9)


def test_a_fixed_batch_mode_can_point_against_the_gradient() -> None:
    """A counterexample to "LANCE's gradient is a descent direction": two images, one number each, U_1 = e_1."""
    g = LinearGeometry((2, 1), (1, 1))
    x, grad_output = np.array([[1.0], [2.0]]), np.array([[1.0], [-1.0]])
    subspace = Subspace.random((2, 1), (1, None), np.random.default_rng(0))
    store = Lance(subspace, dtype=np.float64)
    store.factors = (np.array([[1.0], [0.0]]), None)
    exact, projected = g.weight_gradient(x, grad_output), gradient(g, store, x, grad_output)
    assert exact.item() == 1 * 1 - 2 * 1 == -1
    assert projected.item() == 1


# ---- on a network ----------------------------------------------------------------------------


def small_net(dtype: Any = np.float64) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, rng=0),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=((0, 1), (1, 0)), groups=6, rng=1),
        nn.Conv2d(6, 4, 1, rng=2),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 3, rng=3),
    ).to(dtype)


def gradients(net: nn.Module, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_calibrated_at_epsilon_one_a_network_trains_as_before() -> None:
    """calibrate(epsilon=1) → compress: every gradient equals plain backpropagation's; restore brings Exact back."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 3, 9, 9)), rng.integers(0, 3, 5)
    net = small_net()
    exact = gradients(net, x, y)
    calibration = lr.calibrate(net, [x, x + 1], epsilon=1.0)
    lr.compress(net, calibration)
    assert isinstance(net[0].store, Lance)
    assert net[5].store.ranks == (5, 64)
    for name, grad in gradients(net, x, y).items():
        np.testing.assert_allclose(grad, exact[name], rtol=1e-10, atol=1e-10, err_msg=name)
    lr.restore(net)
    assert all(module.store is EXACT for module in net.modules() if hasattr(module, "store"))


def test_the_tape_really_shrinks_to_the_cores() -> None:
    """What was billed for the inputs of the tuned layers is billed for cores afterwards, and nothing else changes."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 3, 9, 9)).astype(np.float32), rng.integers(0, 3, 8)
    net = small_net(np.float32)
    tuning = lr.tune(net, "last:2")
    assert tuning.layers == ("2", "3")
    before = tape(F.cross_entropy(net(x), y))
    lr.compress(net, lr.calibrate(net, [x], epsilon=0.5))
    after = tape(F.cross_entropy(net(x), y))
    for path in tuning.layers:
        store = net.get_submodule(path).store
        assert after.by_layer()[path] == 4 * int(np.prod(store.ranks))
        assert before.by_layer()[path] == 4 * int(np.prod(store.shape))
    assert {k: v for k, v in before.by_layer().items() if k not in tuning.layers} == {
        k: v for k, v in after.by_layer().items() if k not in tuning.layers
    }


def test_another_batch_size() -> None:
    """An error that says so when the batch mode is compressed; fine when it is not."""
    rng = np.random.default_rng(0)
    net = small_net(np.float32)
    x = rng.standard_normal((4, 3, 9, 9)).astype(np.float32)
    lr.tune(net, "last:1")
    lr.compress(net, lr.calibrate(net, [x]))
    with pytest.raises(ValueError, match=r"layer 3: .*batch mode was calibrated with 4.*calibrate with this one"):
        net(x[:3])
    with pytest.raises(ValueError, match="batch mode was calibrated with 4"):
        lr.trace(net, (3, 3, 9, 9))
    with lr.no_grad():
        assert net(x[:3]).shape == (3, 3)  # nothing is saved, so any batch will do
    lr.compress(net, lr.calibrate(net, [x], modes=("channel", "height", "width")))
    F.cross_entropy(net(x[:3]), np.array([0, 1, 2])).backward()


def test_changing_the_store_after_forward_does_not_change_the_gradient() -> None:
    """The tape keeps the store that saved the core; restore() in between is harmless."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 3, 9, 9)), rng.integers(0, 3, 5)
    net = small_net()
    lr.compress(net, lr.calibrate(net, [x], epsilon=0.6))
    expected = gradients(net, x, y)
    net.zero_grad()
    loss = F.cross_entropy(net(x), y)
    lr.restore(net)
    loss.backward()
    for name, parameter in net.named_parameters():
        np.testing.assert_array_equal(parameter.grad, expected[name])
