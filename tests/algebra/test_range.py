"""Small and large magnitudes: a power of two in front changes no rank, no direction and no share of the energy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import Calibration, Tensor, calibrate, compress, nn
from lance_ref.algebra.frame import with_direction
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.algebra.magnitude import near_one, norm
from lance_ref.algebra.subspace import Subspace
from lance_ref.algebra.tucker import energy_rank, hosvd, st_hosvd, tucker_to_tensor
from lance_ref.continual import bases
from lance_ref.continual.protection import compress_for_task, leak
from lance_ref.engine.tensor import FLOATS
from lance_ref.lance.asi_ranks import choose_ranks
from lance_ref.lance.gradient_samples import LayerSample
from lance_ref.lance.patches import PatchLance
from lance_ref.nn.utils import clip_grad_norm_
from lance_ref.stores import Asi, GradientFilter, Hosvd, Lance, Quantized, Sketch
from lance_ref.stores.sketch import sketch_variance

SHAPE = (6, 5, 4, 3)
EXPONENTS = {
    np.dtype(np.float32): (-124, -100, -83, -60, -33, -1, 1, 33, 61, 100, 118),  # 2^-83 is 1e-25
    np.dtype(np.float64): (-1018, -664, -512, -257, -1, 1, 255, 512, 664, 1014),  # 2^±664 is 1e±200
}
CASES = [(dtype, k) for dtype, exponents in EXPONENTS.items() for k in exponents]


def activation(dtype: Any, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Falling energies in every mode, and entries with few bits: 2^k times them is exact down to subnormals."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-63, 64, shape) / 64
    for mode, n in enumerate(shape):
        x *= (2.0 ** -(np.arange(n) % 2)).reshape([-1 if axis == mode else 1 for axis in range(len(shape))])
    return x.astype(dtype)


def times(x: np.ndarray, k: int) -> np.ndarray:
    result: np.ndarray = np.ldexp(x, k)
    return result


def close(actual: np.ndarray, expected: np.ndarray, k: int) -> None:
    """``actual`` is 2^k times ``expected``: bit by bit, but for what rounds to subnormal numbers."""
    assert actual.dtype == expected.dtype
    numbers = np.finfo(expected.dtype)
    lost = 8 * float(np.ldexp(float(numbers.smallest_subnormal), -k)) if k < 0 else 0.0
    np.testing.assert_allclose(np.ldexp(actual.astype(np.float64), -k), expected, rtol=0, atol=lost)


@pytest.mark.parametrize(("dtype", "k"), CASES)
@pytest.mark.parametrize("decompose", [hosvd, st_hosvd])
@pytest.mark.parametrize("how", [{"epsilon": 0.8}, {"ranks": (3, None, 2, 3)}])
def test_a_decomposition_does_not_depend_on_a_power_of_two(decompose: Any, how: Any, dtype: Any, k: int) -> None:
    """The same factors, bit by bit, and 2^k times the core: squares of 1e-200 are zero, of 1e200 infinite."""
    x = activation(dtype)
    core, factors = decompose(x, **how)
    own_core, own_factors = decompose(times(x, k), **how)
    for U, own in zip(factors, own_factors, strict=True):
        assert (U is None and own is None) or np.array_equal(U, own)
    close(own_core, core, k)


@pytest.mark.parametrize(("dtype", "k"), CASES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: Hosvd(0.8),
        lambda: Hosvd(ranks=(2, None, 2, 1)),
        lambda: Asi((3, 2, None, 2)),
    ],
)
@pytest.mark.parametrize("shape", [SHAPE, (30, 4), (4, 30)])
def test_a_store_does_not_depend_on_a_power_of_two(make: Any, shape: tuple[int, ...], dtype: Any, k: int) -> None:
    """Ranks, factors, reconstruction, share of the energy, and, relative to 2^k, the weight gradient."""
    store, own_store = make(), make()
    if len(shape) == 2 and (isinstance(store, Asi) or store.given):
        store, own_store = (type(store)(ranks=(3, 2)) for _ in range(2))
    for seed in range(2):  # the second step of the iteration starts from the first
        x = activation(dtype, shape, seed)
        saved, own = store.save(x), own_store.save(times(x, k))
        assert list(saved) == list(own)
        for name in saved:
            if name != "core":
                np.testing.assert_array_equal(own[name], saved[name])
        close(own["core"], saved["core"], k)
        assert own_store.energy_kept == pytest.approx(store.energy_kept, rel=1e-6)
        assert own_store.ranks == store.ranks
    if abs(k) <= 100 and len(shape) == 4:
        geometry = ConvGeometry(shape, (2, shape[1], 2, 2))
        g = np.random.default_rng(1).standard_normal(geometry.output_shape).astype(dtype)
        exact = store.weight_gradient(saved, g, geometry)
        gradient = np.ldexp(own_store.weight_gradient(own, g, geometry), -k)
        np.testing.assert_allclose(gradient, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("make", [lambda: Hosvd(0.8), lambda: Asi((2, 3, None, 2))])
def test_a_core_that_overflows_is_refused(make: Any) -> None:
    """Values near the largest float32, whose sums are beyond it, give no infinite core."""
    x = np.full(SHAPE, 3e38, np.float32)
    with pytest.raises(ValueError, match=r"\(6, 5, 4, 3\) contains .* too large for sums of float32"):
        make().save(x)
    with pytest.raises(ValueError, match=r"core of a tensor of shape .* too large for float32"):
        hosvd(x, epsilon=0.8)


@pytest.mark.parametrize(("dtype", "k"), CASES)
@pytest.mark.parametrize("center", [False, True])
def test_calibration_does_not_depend_on_a_power_of_two(center: bool, dtype: Any, k: int) -> None:
    """Ranks, factors and energies kept, summed over two batches; LANCE measures the same share on them."""
    net = nn.Sequential(nn.Conv2d(5, 2, 2, rng=0)).to(dtype)
    net[0].weight.data[:] = 0  # the forward pass stays finite
    data = [activation(dtype, seed=seed) for seed in range(2)]
    here = calibrate(net, data, epsilon=0.8, center=center)
    there = calibrate(net, [times(x, k) for x in data], epsilon=0.8, center=center)
    assert there["0"].ranks == here["0"].ranks
    assert max(r or 0 for r in here["0"].ranks) > 1
    for U, own in zip(here["0"].factors, there["0"].factors, strict=True):
        np.testing.assert_allclose(own, U, atol=1e-6 if k < -120 else 1e-12)
    np.testing.assert_allclose(there["0"].energy_kept, here["0"].energy_kept, rtol=1e-6)
    kept = []
    for calibration, factor in ((here, 0), (there, k)):
        store = Lance(calibration["0"], dtype=dtype)
        store.save(times(data[0], factor))
        kept.append(store.energy_kept)
    assert kept[1] == pytest.approx(kept[0], rel=1e-5)


def test_batches_of_any_magnitudes_add_up(tmp_path: Any) -> None:
    """The largest decides; a file and a merge keep the unit of the squares."""
    net = nn.Sequential(nn.Linear(3, 1, bias=False)).to(np.float64)
    net[0].weight.data[:] = 0
    small, large = np.array([[1e-200, 0, 0], [0, 2e-200, 0]]), np.array([[0, 0, 1e200], [0, 3e200, 0]])
    options: dict[str, Any] = {"epsilon": 0.5, "modes": ["feature"]}
    tiny = calibrate(net, [small], **options)
    np.testing.assert_allclose(tiny["0"].energy_kept[1], 0.8)
    for both in (
        calibrate(net, [small, large], **options),
        calibrate(net, [large, small], **options),
        tiny.merge(calibrate(net, [large], **options)),
        calibrate(net, [large], **options).merge(tiny),
    ):
        np.testing.assert_allclose(both["0"].energy_kept[1], 0.9)
    np.testing.assert_allclose(calibrate(net, [small, small * 3], **options)["0"].energy_kept[1], 0.8)
    np.testing.assert_allclose(calibrate(net, [small * 0, small], **options)["0"].energy_kept[1], 0.8)
    tiny.save(tmp_path / "tiny.npz")
    loaded = Calibration.load(tmp_path / "tiny.npz")
    np.testing.assert_allclose(loaded.merge(calibrate(net, [large], **options))["0"].energy_kept[1], 0.9)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1.0, 1e200, 1e300])
def test_ranks_and_protection_of_any_magnitude(scale: float) -> None:
    """Energy ranks, protected directions, and what is learnt beside them."""
    assert energy_rank(np.array([6.0, 3.0, 1.0]) * scale, 0.61) == 2
    assert energy_rank(np.full(10, 1.7e308), 0.25) == 3
    K = np.diag([6.0, 3.0, 1.0]) * scale
    assert bases.update_protected(None, K, 0.61).added == 2
    U, spectrum = bases.task_subspace(K, np.eye(3)[:, :1], 0.5)
    np.testing.assert_allclose(np.abs(U[:, 0]), [0, 1, 0], atol=1e-15)
    np.testing.assert_allclose(spectrum, np.array([3.0, 1.0]) * scale, rtol=1e-12)
    R = np.diag([2.0, 1.0, 0.5]) * scale
    assert bases.update_protected_from_samples(None, R, 0.9).added == 2
    np.testing.assert_allclose(norm(R), scale * math.sqrt(5.25), rtol=1e-14)
    column = with_direction(None, R[0])
    assert column is not None
    np.testing.assert_allclose(column[:, 0], [1, 0, 0])
    np.testing.assert_allclose(leak(np.zeros((1, 3)), scale * np.array([[3.0, 4.0, 0.0]]), np.eye(3)[:, :1]), 0.6)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("mean_free", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_compressing_for_a_task_of_any_magnitude(conv: bool, mean_free: bool, scale: float) -> None:
    """The layer learns outside of what is protected: squares that vanish would freeze it."""
    net = nn.Sequential(nn.Conv2d(2, 1, (1, 2), rng=0) if conv else nn.Linear(4, 1, rng=0)).to(np.float64)
    net[0].weight.data[:] = 0
    shape = (6, 2, 1, 5) if conv else (6, 4)
    data = [activation(np.float64, shape, seed) * scale for seed in range(2)]
    grams = bases.feature_gram(net, data)["0"]
    M = bases.update_protected(None, grams, 0.4).basis
    assert 1 <= M.shape[1] < 4
    done = compress_for_task(net, data, {"0": M}, epsilon=0.9, mean_free=mean_free, modes=["feature"])
    assert done.frozen == ()
    assert done.ranks["0"][-1] == (2 if mean_free else 3)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_gradients_of_any_magnitude(scale: float) -> None:
    """The clipping norm, the variance of a sketch, and the perplexities behind ASI's ranks, float32 included."""
    w = Tensor(np.zeros(2), requires_grad=True)
    w.grad = np.array([3.0, 4.0]) * scale
    np.testing.assert_allclose(clip_grad_norm_([w], math.inf), 5 * scale, rtol=1e-14)
    small = np.float32(min(max(scale, 1e-25), 1e15))
    ones = np.full((2, 1), small)
    g = np.ones((2, 1), np.float32)
    variance = sketch_variance(ones, g, LinearGeometry((2, 1), (1, 1)), 1)
    np.testing.assert_allclose(variance, 2 * float(small) ** 2, rtol=1e-5)
    x = activation(np.float32, (6, 5)) * small
    sample = LayerSample(x, np.ones((6, 2), np.float32), LinearGeometry((6, 5), (2, 5)))
    plan = choose_ranks({"0": [sample]}, 10**6, grid=(0.5, 0.9))
    assert 0 < plan.perplexity["0"] / float(small) < 10


@given(st.integers(-1073, 1023), st.sampled_from(FLOATS))
def test_near_one_is_exact(k: int, dtype: Any) -> None:
    """The result times 2^k is the array, its largest entry moderate, and nothing is copied where nothing need be."""
    top = np.finfo(dtype).maxexp
    x = np.array([1.0, -0.75, 0.0], dtype)
    x = np.ldexp(x, max(min(k, top - 1), 3 - top))
    unit, shift = near_one(x)
    np.testing.assert_array_equal(np.ldexp(unit, shift), x)
    assert 2.0 ** (-top // 4 - 1) <= np.abs(unit).max() <= 2.0 ** (top // 4)
    assert (unit is x) == (shift == 0)


# ---- long modes ------------------------------------------------------------------------------


@pytest.mark.parametrize("decompose", [hosvd, st_hosvd])
@pytest.mark.parametrize(
    ("how", "r"),
    [({"epsilon": 0.9}, None), ({"ranks": (3, 4, 20)}, 20), ({"epsilon": 1.0}, 40), ({"ranks": (2, 2, 3)}, 3)],
)
def test_a_long_mode_takes_the_smaller_side(decompose: Any, how: Any, r: int | None) -> None:
    """(3, 4, 40): as the SVD has it, orthonormal also beyond the rank of the unfolding, with signs settled."""
    x = np.random.default_rng(0).standard_normal((3, 4, 40))
    core, factors = decompose(x, **how)
    U = factors[2]
    assert U is not None
    if r is not None:
        assert U.shape == (40, r)
    np.testing.assert_allclose(U.T @ U, np.eye(U.shape[1]), atol=1e-12)
    assert (U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])] > 0).all()
    if decompose is hosvd:
        singular = np.linalg.svd(x.reshape(12, 40).T)[0][:, : min(U.shape[1], 12)]
        np.testing.assert_allclose(
            U[:, : singular.shape[1]] @ (U[:, : singular.shape[1]].T @ singular), singular, atol=1e-10
        )
    if "epsilon" in how and how["epsilon"] == 1:
        np.testing.assert_allclose(tucker_to_tensor(core, factors), x, atol=1e-12)


def test_a_very_long_mode_needs_memory_for_its_factor_alone() -> None:
    """A Gram matrix of the long side would take 80 TB; a factor of full rank is refused before it is made."""
    x = np.random.default_rng(0).standard_normal((3, 2, 10**5), np.float32)
    assert hosvd(x, epsilon=0.9).core.shape[2] <= 6
    assert st_hosvd(x, ranks=(2, 2, 3)).core.shape == (2, 2, 3)
    with pytest.raises(ValueError, match=r"factor of shape \(100000, 100000\) would take 80,000,000,000 bytes"):
        hosvd(x, epsilon=1)


# ---- NaN and infinity --------------------------------------------------------------------------

RNG = np.random.default_rng(0)
STORES: dict[str, Callable[[], Any]] = {
    "lance": lambda: Lance(Subspace.random(SHAPE, (2, 3, None, 2), RNG)),
    "lance, nothing compressed": lambda: Lance(Subspace.random(SHAPE, (None,) * 4, RNG)),
    "lance, sketch": lambda: Lance(Subspace.random(SHAPE, (2, 3, None, 2), RNG), batch_mode="sketch"),
    "lance, codes": lambda: Lance(Subspace.random(SHAPE, (2, 3, None, 2), RNG), core_bits=8),
    "patches": lambda: PatchLance(Subspace.random((6, 6, 20), (2, None, 3), RNG)),
    "hosvd": lambda: Hosvd(0.8),
    "hosvd, everything kept": lambda: Hosvd(1.0),
    "asi": lambda: Asi((2, 3, None, 1)),
    "asi, everything kept": lambda: Asi((None,) * 4),
    "sketch": lambda: Sketch(0.5),
    "gradient filter": lambda: GradientFilter(2),
    "quantized": lambda: Quantized(4),
}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", STORES)
def test_every_store_refuses_nan_and_infinity_and_names_the_layer(name: str, bad: float) -> None:
    """One NaN pixel is an error that says where it came, not a NaN weight gradient."""
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(5, 2, 2, rng=0))
    net[1].store = STORES[name]()
    x = np.abs(activation(np.float32))
    net(x)
    x[3, 2, 1, 1] = abs(bad)
    with pytest.raises(ValueError, match=r"layer 1: .*NaN or infinity") as error, np.errstate(invalid="ignore"):
        net(x)
    assert isinstance(error.value, FloatingPointError)  # a run of training has diverged


def test_a_diverging_run_says_so_with_every_store() -> None:
    """Backpropagation and LANCE alike end in a FloatingPointError."""
    net = nn.Sequential(nn.Linear(4, 3, rng=0))
    x = activation(np.float32, (6, 4))
    compress(net, calibrate(net, [x]))
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        net(x * np.float32(np.nan))
