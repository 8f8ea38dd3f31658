"""LANCE's options: the core as codes, a random sketch of the batch, and what is true of the gradient then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries, ranks_for

import lance_ref as lr
from analysis.check.store_case import StoreTestCase
from analysis.steps.settings import TunedLayer
from lance_ref import F, Subspace, nn, tape
from lance_ref.algebra import projection
from lance_ref.algebra.frame import Frame, along, feature_mode
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.stores import Lance
from lance_ref.stores import lance as lance_module
from lance_ref.stores.quantized import dequantise, quantise
from lance_ref.stores.sketch import sketch_variance

layers = st.one_of(conv_geometries(), linear_geometries())
Ranks = tuple[int | None, ...]


SUBSPACE = Subspace.random((8, 6), (4, 3), np.random.default_rng(0))


class OptionsCase(StoreTestCase):
    """Random subspaces with some options; where they lose something at full rank too, :meth:`exactly` is left out."""

    options: ClassVar[dict[str, Any]]
    centred = False

    def of_ranks(self, layer: TunedLayer, ranks: Ranks, **options: Any) -> Lance:
        space = Subspace.random(layer.shape, ranks, layer.rng)
        if self.centred:
            mean = layer.rng.standard_normal(layer.shape[feature_mode(layer.shape)])
            space = replace(space, frame=Frame(None, mean))
        return Lance(space, dtype=layer.dtype, **options)

    def make(self, layer: TunedLayer) -> Lance:
        return self.of_ranks(layer, layer.ranks, **self.options)


class TestCoresOfEightBits(OptionsCase):
    """Codes of the core in place of floats."""

    options: ClassVar = {"core_bits": 8}
    wrong: ClassVar = {"core_bits is 7": lambda: Lance(SUBSPACE, core_bits=7)}


class TestCoresOfFourBits(OptionsCase):
    """Two codes to a byte."""

    options: ClassVar = {"core_bits": 4}


class TestSketchedBatch(OptionsCase):
    """Directions of the batch that are drawn at every step; all of them lose nothing."""

    options: ClassVar = {"batch_mode": "sketch", "batch_ratio": 0.4}
    wrong: ClassVar = {
        "batch_mode is 'random'": lambda: Lance(SUBSPACE, batch_mode="random"),
        "batch_ratio is 0.5, but batch_mode is 'calibrated'": lambda: Lance(SUBSPACE, batch_ratio=0.5),
        "batch_ratio is 2, expected a number in (0, 1]": lambda: Lance(SUBSPACE, batch_mode="sketch", batch_ratio=2),
        "seed is -1": lambda: Lance(SUBSPACE, batch_mode="sketch", seed=-1),
    }

    def exactly(self, layer: TunedLayer) -> Lance:
        return self.of_ranks(layer, layer.shape, batch_mode="sketch", batch_ratio=1.0)


class TestCentred(OptionsCase):
    """A = μ + R: the gradient from R's full core and the exact one of μ add up to dW, with padding and groups too."""

    method = "lance-center"
    options: ClassVar = {}
    centred = True

    def exactly(self, layer: TunedLayer) -> Lance:
        return self.of_ranks(layer, layer.shape)


class TestAllOptions(OptionsCase):
    """Each adds to the others."""

    options: ClassVar = {"core_bits": 8, "batch_mode": "sketch", "batch_ratio": 0.25, "order": "papers"}
    centred = True


def store_of(shape: tuple[int, ...], ranks: Ranks, seed: int = 0, **options: Any) -> Lance:
    return Lance(Subspace.random(shape, ranks, np.random.default_rng(seed)), dtype=np.float64, **options)


def gradient(store: Lance, g: Any, x: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
    return store.weight_gradient(store.save(x), grad_output, g)


def projected(x: np.ndarray, store: Lance) -> np.ndarray:
    """A with its compressed modes projected, the batch left alone."""
    for mode, U in enumerate(store.factors):
        if U is not None and mode > 0:
            x = np.moveaxis(np.tensordot(U @ U.T, x, (1, mode)), 0, mode)
    return x


# ---- the core as codes -----------------------------------------------------------------------


@given(data=st.data(), g=layers, seed=st.integers(0, 99), bits=st.sampled_from([8, 4]))
def test_a_core_of_codes_gives_the_gradient_of_the_restored_core(data: Any, g: Any, seed: int, bits: int) -> None:
    """Any layer and ranks: the codes stand for the core, in both orders of contraction."""
    ranks = data.draw(ranks_for(g.input_shape))
    order = data.draw(st.sampled_from(["papers", "separable"]))
    x, _, grad_output = arrays(g, seed)
    plain, coded = (store_of(g.input_shape, ranks, seed, order=order, core_bits=b) for b in (None, bits))
    core = plain.save(x)["core"]
    mode = 1 if core.ndim == 4 else core.ndim - 1
    mode_of_ranges = mode if core.size // core.shape[mode] >= 32 else None
    restored = dequantise(quantise(core, mode_of_ranges, bits), core.shape, mode_of_ranges, bits)
    expected = plain.weight_gradient({"core": restored}, grad_output, g)
    np.testing.assert_allclose(gradient(coded, g, x, grad_output), expected, rtol=1e-10, atol=1e-10)
    assert coded.energy_kept == plain.energy_kept


@pytest.mark.parametrize(
    ("ranks", "bits", "expected"),
    [
        ((8, 3, 2, 2), 8, 8 * 3 * 4 + 2 * 3 * 4),  # slices of 32 entries: a range each
        ((7, 3, 2, 2), 8, 7 * 3 * 4 + 2 * 4),  # of 28: one for all
        ((8, 3, 2, 2), 4, 8 * 3 * 4 // 2 + 2 * 3 * 4),
        ((1, 1, 1, 1), 4, 1 + 2 * 4),
    ],
)
def test_bytes_of_a_core_of_codes(ranks: Ranks, bits: int, expected: int) -> None:
    """One or half a byte an entry, and two floats a range; nothing else of the core."""
    saved = Lance(Subspace.random((8, 4, 3, 3), ranks, np.random.default_rng(0)), core_bits=bits).save(
        np.random.default_rng(1).standard_normal((8, 4, 3, 3)).astype(np.float32)
    )
    assert sum(array.nbytes for array in saved.values()) == expected
    assert all(array.base is None for array in saved.values())


def test_ranges_of_their_own_pay_where_energies_fall() -> None:
    """Why slices have ranges of their own: amplitudes falling threefold from one to the next, not half the error."""
    rng = np.random.default_rng(0)
    core = rng.standard_normal((32, 8, 1, 1)) * 10.0 ** -(np.arange(8) / 2)[:, None, None]
    errors = [np.linalg.norm(dequantise(quantise(core, mode, 8), core.shape, mode, 8) - core) for mode in (None, 1)]
    assert errors[1] < errors[0] / 2


# ---- the batch as a sketch ---------------------------------------------------------------------


@given(data=st.data(), g=layers, seed=st.integers(0, 99))
def test_a_full_sketch_is_the_batch_left_alone(data: Any, g: Any, seed: int) -> None:
    """r_1 = n: whatever directions were drawn, the gradient is the one without compression of the batch."""
    _, *rest = data.draw(ranks_for(g.input_shape))
    x, _, grad_output = arrays(g, seed)
    sketched = store_of(g.input_shape, (None, *rest), seed, batch_mode="sketch", batch_ratio=1.0)
    alone = store_of(g.input_shape, (None, *rest), seed)
    np.testing.assert_allclose(
        gradient(sketched, g, x, grad_output), gradient(alone, g, x, grad_output), rtol=1e-9, atol=1e-9
    )
    assert sketched.energy_kept == pytest.approx(alone.energy_kept, rel=1e-9)


@given(data=st.data(), g=layers, seed=st.integers(0, 99), order=st.sampled_from(["papers", "separable"]))
def test_one_step_is_the_gradient_of_the_sketched_projection(data: Any, g: Any, seed: int, order: str) -> None:
    """dŴ is the exact weight gradient of Ã ×₁ SSᵀ, S drawn from the seed on the tape."""
    _, *rest = data.draw(ranks_for(g.input_shape))
    x, _, grad_output = arrays(g, seed)
    store = store_of(g.input_shape, (None, *rest), seed, order=order, batch_mode="sketch", batch_ratio=0.4)
    saved = store.save(x)
    assert store.sketch is not None
    S = store.sketch.directions(saved["seed"], len(x), x.dtype)
    expected = g.weight_gradient(np.tensordot(S @ S.T, projected(x, store), 1), grad_output)
    np.testing.assert_allclose(store.weight_gradient(saved, grad_output, g), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("g", "ranks"),
    [
        (ConvGeometry((6, 4, 4, 3), (2, 2, 2, 2), groups=2), (3, 3, 2, 2)),
        (LinearGeometry((6, 5), (3, 5)), (2, 3)),
    ],
)
def test_the_expectation_is_lance_without_compression_of_the_batch(g: Any, ranks: Ranks) -> None:
    """Over 1500 steps: mean gradient, its variance by the formula for the projected A, and mean energy, unbiased."""
    count = 1500
    x, _, grad_output = arrays(g, 1)
    alone = store_of(g.input_shape, (None, *ranks[1:]))
    target = gradient(alone, g, x, grad_output)
    store = store_of(g.input_shape, ranks, batch_mode="sketch", batch_ratio=1 / 3)
    store.factors = (None, *alone.factors[1:])
    errors, energies = np.empty((count, target.size)), np.empty(count)
    for step in range(count):
        errors[step] = (gradient(store, g, x, grad_output) - target).reshape(-1)
        energies[step] = store.energy_kept
    predicted = sketch_variance(projected(x, store), grad_output, g, 2)
    squares = np.sum(errors**2, axis=1)
    assert abs(squares.mean() - predicted) <= 4 * squares.std() / np.sqrt(count)
    assert np.sum(errors.mean(axis=0) ** 2) <= 3 * predicted / count
    assert abs(energies.mean() - alone.energy_kept) <= 4 * energies.std() / np.sqrt(count)  # type: ignore[operator]


def test_any_batch_size_and_no_batch_factor() -> None:
    """A calibrated batch factor is ignored: not needed, not kept, and the batch size is free."""
    subspace = Subspace.random((8, 6), (4, 3), np.random.default_rng(0))
    store = Lance(subspace, batch_mode="sketch", batch_ratio=0.25)
    assert store.factor_bytes == 4 * 6 * 3
    assert store.ranks == (2, 3)
    for n, r in ((3, 1), (8, 2), (20, 5)):
        store.check((n, 6))
        assert store.save(np.ones((n, 6), np.float32))["core"].shape == (r, 3)
        assert store.ranks == (r, 3)
    with pytest.raises(ValueError, match="feature mode was calibrated with 6"):
        store.check((8, 7))
    assert Lance(subspace, batch_mode="sketch").ranks == (1, 3)  # an eighth


# ---- both, on a network ------------------------------------------------------------------------


def test_describe_says_more_only_where_options_are_used() -> None:
    """Plain LANCE's description is what it was before there were options."""
    subspace = Subspace.random((8, 6), (4, 3), np.random.default_rng(0))
    plain = {"name": "lance", "ranks": (4, 3), "shape": (8, 6), "order": "auto"}
    assert Lance(subspace).describe() == plain
    assert Lance(subspace, core_bits=8).describe() == {**plain, "core_bits": 8}
    both = Lance(subspace, core_bits=4, batch_mode="sketch", batch_ratio=0.25)
    sketched = {**plain, "ranks": (2, 3), "batch_mode": "sketch", "batch_ratio": 0.25}
    assert both.describe() == {**sketched, "core_bits": 4}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_compress_passes_the_options_on(dtype: Any) -> None:
    """Every layer gets codes and a sketch of its own; the tape holds codes, ranges and seeds, and training runs."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, rng=0),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1, rng=1),
        nn.Flatten(),
        nn.Linear(64, 3, rng=2),
    ).to(dtype)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((16, 2, 4, 4)).astype(dtype), rng.integers(0, 3, 16)
    calibration = lr.calibrate(net, [x], epsilon=0.9)
    lr.compress(net, calibration, core_bits=8, batch_mode="sketch", batch_ratio=0.25, seed=7)
    stores = [net.get_submodule(path).store for path in calibration]
    assert {store.core_bits for store in stores} == {8}
    assert {store.ranks[0] for store in stores} == {4}
    assert len({store.sketch.seed for store in stores}) == len(stores)
    loss = F.cross_entropy(net(x[:12]), y[:12])
    _, r2, r3, r4 = stores[0].ranks
    ranges = r2 if 3 * r3 * r4 >= 32 else 1
    assert tape(loss).by_layer()["0"] == 3 * r2 * r3 * r4 + 2 * ranges * np.dtype(dtype).itemsize + 8
    loss.backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == dtype
        assert np.isfinite(parameter.grad).all()


# ---- what is true of the gradient, one test a statement of Lance's notes ---------------------------


@given(g=conv_geometries(depthwise=False), seed=st.integers(0, 99), data=st.data())
def test_channels_of_one_group_are_projected_orthogonally(g: ConvGeometry, seed: int, data: Any) -> None:
    """Statement 2: ⟨dW, dŴ⟩ = ‖dŴ‖² for a convolution of one group with only its channels compressed."""
    C_in = g.weight_shape[1]
    g = ConvGeometry((g.input_shape[0], C_in, *g.input_shape[2:]), g.weight_shape, g.stride, g.padding, g.dilation)
    x, _, grad_output = arrays(g, seed)
    store = store_of(g.input_shape, (None, data.draw(st.integers(1, C_in)), None, None), seed)
    exact, result = g.weight_gradient(x, grad_output), gradient(store, g, x, grad_output)
    assert np.vdot(exact, result) == pytest.approx(np.sum(result**2), rel=1e-9, abs=1e-9)


def points_against(g: Any, factors: tuple[np.ndarray | None, ...], x: np.ndarray, grad_output: np.ndarray) -> bool:
    """Whether ⟨dW, dŴ⟩ < 0 with these factors."""
    store = store_of(g.input_shape, tuple(None if U is None else U.shape[1] for U in factors))
    store.factors = factors
    return float(np.vdot(g.weight_gradient(x, grad_output), gradient(store, g, x, grad_output))) < 0


def test_groups_and_height_have_counterexamples_too() -> None:
    """Statements 2 and 3: across groups, and over the height, the projected gradient may point against dW.

    Two places, each with a number and a gradient of (1, 1) and (2, −1): dW = 1 − 2, and by e_1 alone 1.
    """
    first = np.array([[1.0], [0.0]])
    tall = ConvGeometry((1, 1, 2, 1), (1, 1, 1, 1))
    x, grad_output = np.array([1.0, 2.0]).reshape(1, 1, 2, 1), np.array([1.0, -1.0]).reshape(1, 1, 2, 1)
    assert points_against(tall, (None, None, first, None), x, grad_output)
    grouped = ConvGeometry((2, 2, 1, 1), (2, 1, 1, 1), groups=2)
    # u = (1, 2)/√5: the second group sees the first one's channel in the first image, where its gradient is −1
    u = np.array([[1.0], [2.0]]) / np.sqrt(5)
    x, grad_output = np.array([[3.0, 0.0], [0.0, 1.0]]), np.array([[0.0, -1.0], [0.0, 1.0]])
    assert points_against(grouped, (None, u, None, None), x.reshape(2, 2, 1, 1), grad_output.reshape(2, 2, 1, 1))


@given(seed=st.integers(0, 999), B=st.integers(1, 6), I=st.integers(1, 6), r=st.integers(1, 6))
def test_directions_of_the_very_batch_never_point_against(seed: int, B: int, I: int, r: int) -> None:  # noqa: E741
    """Statement 3: with U_1 the leading left singular vectors of this A, dŴ = dW V Vᵀ."""
    g = LinearGeometry((B, I), (4, I))
    x, _, grad_output = arrays(g, seed)
    U, _, _ = np.linalg.svd(x, full_matrices=False)
    store = store_of(g.input_shape, (min(r, B, I), None))
    store.factors = (np.ascontiguousarray(U[:, :r]), None)
    exact, result = g.weight_gradient(x, grad_output), gradient(store, g, x, grad_output)
    assert np.vdot(exact, result) == pytest.approx(np.sum(result**2), rel=1e-9, abs=1e-9)


def test_a_single_sketched_step_may_point_against() -> None:
    """Statement 4 is about the mean: of 200 steps some have ⟨dW, dŴ⟩ < 0, and their mean is ‖dW‖²."""
    g = LinearGeometry((8, 4), (3, 4))
    x, _, grad_output = arrays(g, 0)
    exact = g.weight_gradient(x, grad_output)
    store = store_of(g.input_shape, (None, None), batch_mode="sketch")
    inner = np.array([np.vdot(exact, gradient(store, g, x, grad_output)) for _ in range(200)])
    assert inner.min() < 0
    assert abs(inner.mean() - np.sum(exact**2)) <= 4 * inner.std() / np.sqrt(200)


@pytest.mark.parametrize("fault", ["scale forgotten", "other directions in backward", "codes without their ranges"])
def test_planted_faults_are_caught(fault: str) -> None:
    """The comparison with the gradient of the sketched projection notices each."""
    g = ConvGeometry((6, 4, 4, 4), (2, 4, 2, 2))
    x, _, grad_output = arrays(g, 0)
    store = store_of(g.input_shape, (None, 3, 2, 2), core_bits=8, batch_mode="sketch", batch_ratio=0.5)
    saved = store.save(x)
    assert store.sketch is not None
    S = store.sketch.directions(saved["seed"], 6, x.dtype)
    expected = g.weight_gradient(np.tensordot(S @ S.T, projected(x, store), 1), grad_output)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(store.weight_gradient(saved, grad_output, g), expected, atol=0.05 * largest)
    if fault == "scale forgotten":
        saved = {**saved, "minimum": saved["minimum"] / 2, "maximum": saved["maximum"] / 2}
    elif fault == "other directions in backward":
        saved = {**saved, "seed": saved["seed"] + np.uint64(1)}
    else:
        saved = {**saved, "minimum": 0 * saved["minimum"]}
    wrong = store.weight_gradient(saved, grad_output, g)
    assert not np.allclose(wrong, expected, atol=0.05 * largest)


# ---- centred activations ------------------------------------------------------------------


@given(g=layers, seed=st.integers(0, 99))
def test_the_gradient_of_the_mean_by_filling_an_activation(g: Any, seed: int) -> None:
    """mean_weight_gradient is the weight gradient of an input that is μ at every place."""
    x, _, grad_output = arrays(g, seed, np.float64)
    mean = np.random.default_rng(seed).standard_normal(x.shape[feature_mode(x.shape)])
    filled = np.broadcast_to(along(mean, x.shape), x.shape).copy()
    actual = projection.mean_weight_gradient(mean, grad_output, g)
    np.testing.assert_allclose(actual, g.weight_gradient(filled, grad_output), rtol=1e-9, atol=1e-9)


@given(g=layers, data=st.data(), seed=st.integers(0, 99))
def test_the_core_is_that_of_the_activation_without_its_mean(g: Any, data: Any, seed: int) -> None:
    """A − μ is not laid out, one image at a time here for its energy; core and share kept are as if it were."""
    x, _, _ = arrays(g, seed, np.float64)
    ranks = data.draw(ranks_for(x.shape))
    mean = np.random.default_rng(seed + 1).standard_normal(x.shape[feature_mode(x.shape)])
    space = replace(Subspace.random(x.shape, ranks, np.random.default_rng(seed)), frame=Frame(None, mean))
    store = Lance(space, dtype=np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lance_module, "WORKSPACE_BYTES", 1)
        core = store.save(x)["core"]
    rest = x - along(mean, x.shape)
    np.testing.assert_allclose(core, projection.project(rest, store.factors), rtol=1e-9, atol=1e-9)
    expected = np.vdot(core, core) / np.vdot(rest, rest)
    np.testing.assert_allclose(store.energy_kept, expected, rtol=1e-9)
