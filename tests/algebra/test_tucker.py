"""Tucker arithmetic: by hand on small integers, by properties, against brute force and against TensorLy."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import count_macs, tucker
from lance_ref.algebra.modes import contraction_order, fold, mode_product, multi_mode_product, unfold
from lance_ref.algebra.tucker import eigenbasis, energy_rank, gram, hosvd, st_hosvd, tucker_to_tensor

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 999)


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def low_rank(shape: tuple[int, ...], ranks: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A tensor of exactly these multilinear ranks (each at most the product of the others)."""
    factors = [normal(size, seed + 1 + i) for i, size in enumerate(zip(shape, ranks, strict=True))]
    return tucker_to_tensor(normal(ranks, seed), factors)


def discarded(tensor: np.ndarray, ranks: tuple[int, ...]) -> float:
    """Sum over the modes of the squared singular values beyond the rank, from NumPy's SVD."""
    return sum(
        float((np.linalg.svd(unfold(tensor, mode), compute_uv=False)[r:] ** 2).sum()) for mode, r in enumerate(ranks)
    )


# ---- unfoldings and products -----------------------------------------------------------


def test_unfold_by_hand() -> None:
    """A (2, 3, 2) tensor, every mode: catches Kolda's order and 1-based modes."""
    tensor = np.arange(12).reshape(2, 3, 2)
    np.testing.assert_array_equal(unfold(tensor, 0), [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])
    np.testing.assert_array_equal(unfold(tensor, 1), [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]])
    np.testing.assert_array_equal(unfold(tensor, 2), [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]])


@given(data=st.data(), shape=shapes, seed=seeds)
def test_fold_undoes_unfold(data: Any, shape: tuple[int, ...], seed: int) -> None:
    """fold∘unfold = id, entry by entry, for every mode."""
    tensor = normal(shape, seed)
    mode = data.draw(st.integers(0, len(shape) - 1))
    np.testing.assert_array_equal(fold(unfold(tensor, mode), mode, shape), tensor)


@given(data=st.data(), shape=shapes, J=st.integers(1, 6), seed=seeds, contiguous=st.booleans())
def test_mode_product_is_a_product_of_the_unfolding(
    data: Any, shape: tuple[int, ...], J: int, seed: int, contiguous: bool
) -> None:
    """(A ×_n M)_(n) = M A_(n) by its definition, on contiguous and transposed tensors; size·J multiply-adds."""
    tensor = normal(shape, seed) if contiguous else normal(shape[::-1], seed).T
    mode = data.draw(st.integers(0, len(shape) - 1))
    matrix = normal((J, shape[mode]), seed + 1)
    with count_macs() as counter:
        result = mode_product(tensor, matrix, mode)
    np.testing.assert_allclose(unfold(result, mode), matrix @ unfold(tensor, mode), rtol=1e-12, atol=1e-12)
    assert counter.by_kind()["forward"] == math.prod(shape) * J
    assert result.base is None
    assert result.flags.c_contiguous


def test_mode_product_copies_no_contiguous_tensor() -> None:
    """Beside its result it allocates nothing worth mentioning: a hidden transpose would show here."""
    tensor = normal((64, 32, 64))  # 1 MiB
    matrices = [normal((2, n)) for n in tensor.shape]
    for mode, matrix in enumerate(matrices):
        tracemalloc.start()
        result = mode_product(tensor, matrix, mode)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < result.nbytes + 2**13, mode


@given(data=st.data(), shape=shapes, seed=seeds)
def test_multi_mode_product_equals_einsum_and_its_count_the_formula(
    data: Any, shape: tuple[int, ...], seed: int
) -> None:
    """Values against einsum; multiply-adds against Σ P·r along the chosen order; None costs nothing."""
    sizes = [data.draw(st.none() | st.integers(1, 6)) for _ in shape]
    tensor = normal(shape, seed)
    matrices = [None if J is None else normal((J, n), seed + 1) for J, n in zip(sizes, shape, strict=True)]
    with count_macs() as counter:
        result = multi_mode_product(tensor, matrices)
    operands: list[Any] = [tensor, list(range(len(shape)))]
    for mode, matrix in enumerate(matrices):
        if matrix is not None:
            operands += [matrix, [10 + mode, mode]]
    output = [mode if J is None else 10 + mode for mode, J in enumerate(sizes)]
    np.testing.assert_allclose(result, np.einsum(*operands, output), rtol=1e-10, atol=1e-10)
    assert counter.by_kind()["forward"] == chain_macs(shape, sizes, contraction_order(shape, sizes))
    assert sum(counter.macs.values()) == counter.by_kind()["forward"]


def chain_macs(shape: tuple[int, ...], ranks: Any, order: tuple[int, ...]) -> int:
    """Multiply-adds of the mode products in this order."""
    current, macs = list(shape), 0
    for mode in order:
        macs += math.prod(current) * ranks[mode]
        current[mode] = ranks[mode]
    return macs


@given(data=st.data(), shape=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple))
def test_contraction_order_is_the_cheapest_of_all(data: Any, shape: tuple[int, ...]) -> None:
    """No permutation takes fewer multiply-adds, shrinking and growing modes alike."""
    ranks = tuple(data.draw(st.none() | st.integers(1, 14)) for _ in shape)
    order = contraction_order(shape, ranks)
    modes = [mode for mode, rank in enumerate(ranks) if rank is not None]
    assert sorted(order) == modes
    costs = [chain_macs(shape, ranks, permutation) for permutation in itertools.permutations(modes)]
    assert chain_macs(shape, ranks, order) == min(costs)


def test_contraction_order_matters() -> None:
    """The check above can fail: the natural order of a real projection costs 7 times the best one."""
    shape, ranks = (128, 960, 7, 7), (64, 160, 2, 2)
    best = chain_macs(shape, ranks, contraction_order(shape, ranks))
    assert best == 128 * 960 * (49 * 2 + 7 * 2 * 2) + 128 * 960 * 4 * 64 + 64 * 960 * 4 * 160
    assert chain_macs(shape, ranks, (0, 1, 2, 3)) > 7 * best


def test_contraction_order_breaks_ties_by_mode() -> None:
    """1/r − 1/n is equal for 6 → 3 and 3 → 2: rounding must not decide, or predictions would drift from runs."""
    assert contraction_order((3, 6, 3, 6), (2, 3, 2, 3)) == (0, 1, 2, 3)


# ---- energies --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("workspace", [8, 200, 2 * 2**20])
@given(data=st.data(), shape=shapes, seed=seeds)
def test_gram_in_blocks_of_any_size(workspace: int, dtype: Any, data: Any, shape: tuple[int, ...], seed: int) -> None:
    """Blocks of one fibre, a few, or all: always A_(n) A_(n)ᵀ in float64, size·n multiply-adds."""
    tensor = normal(shape, seed).astype(dtype)
    mode = data.draw(st.integers(0, len(shape) - 1))
    with pytest.MonkeyPatch.context() as patch, count_macs() as counter:
        patch.setattr(tucker, "GRAM_WORKSPACE_BYTES", workspace)
        patch.setattr(tucker, "GRAM_FIBRES", 1)
        result = gram(tensor, mode)
    unfolded = unfold(tensor.astype(np.float64), mode)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, unfolded @ unfolded.T, rtol=1e-12, atol=1e-12)
    assert counter.by_kind()["forward"] == tensor.size * shape[mode]


@pytest.mark.parametrize("mode", range(4))
def test_gram_never_converts_the_whole_tensor(mode: int) -> None:
    """A 16 MiB float32 activation: beside the Gram, at most the workspace and one product are alive."""
    tensor = np.ones((32, 64, 64, 32), np.float32)
    tracemalloc.start()
    gram(tensor, mode)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= tucker.GRAM_WORKSPACE_BYTES + 2 * 64 * 64 * 8 + 2**14


def test_eigenbasis_is_sorted_orthonormal_and_signed() -> None:
    """Descending energies, KU = UΛ, and the same signs for the same matrix whichever routine found them."""
    a = normal((6, 4))
    energies, U = eigenbasis(a @ a.T)
    assert (np.diff(energies) <= 0).all()
    assert (energies >= 0).all()
    np.testing.assert_allclose(energies[:4], np.linalg.svd(a, compute_uv=False) ** 2, rtol=1e-12)
    np.testing.assert_allclose(U.T @ U, np.eye(6), atol=1e-13)
    np.testing.assert_allclose(a @ a.T @ U, U * energies, atol=1e-12)
    assert (U[np.abs(U).argmax(axis=0), np.arange(6)] > 0).all()


@pytest.mark.parametrize(
    ("energies", "epsilon", "rank"),
    [
        ([6, 3, 1], 0.6, 1),
        ([6, 3, 1], 0.600001, 2),
        ([1, 3, 6], 0.6, 1),  # any order
        ([6, 3, 1], 1e-300, 1),
        ([6, 3, 1], 1.0, 3),
        ([6, 0, 0], 1.0, 3),  # full rank means all of them
        ([6, 0, 0], 1 - 1e-16, 1),  # the float below 1
        ([6, 3, -1e-12], 1.0, 3),
        ([6, -1e-12, 0], 0.999, 1),
        ([5], 0.5, 1),
        ([1] * 10, 0.25, 3),
    ],
)
def test_energy_rank_by_hand(energies: list[float], epsilon: float, rank: int) -> None:
    """The smallest rank that reaches the threshold; off-by-one and strict comparisons fail here."""
    assert energy_rank(np.array(energies, dtype=float), epsilon) == rank


@given(
    energies=st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda e: sum(e) > 1e-3),
    epsilon=st.floats(1e-6, 1),
)
def test_energy_rank_reaches_epsilon_and_one_less_misses_it(energies: list[float], epsilon: float) -> None:
    """Σ_{i≤r} λ_i ≥ ε Σ λ_i, and r − 1 is not enough."""
    r = energy_rank(np.array(energies), epsilon)
    ordered = sorted(energies, reverse=True)
    total, slack = math.fsum(ordered), 1e-12 * math.fsum(ordered)
    assert math.fsum(ordered[:r]) >= epsilon * total - slack
    if epsilon < 1:
        assert math.fsum(ordered[: r - 1]) < epsilon * total + slack
    else:
        assert r == len(energies)


@pytest.mark.parametrize(
    ("energies", "epsilon", "error", "message"),
    [
        ([0.0, 0.0], 0.5, ValueError, "zero activation"),
        ([1.0, np.nan], 0.5, ValueError, "NaN"),
        ([1.0, np.inf], 0.5, ValueError, "infinity"),
        ([1.0, -0.5], 0.5, ValueError, "not negative"),
        ([], 0.5, ValueError, r"\(n,\)"),
        ([[1.0]], 0.5, ValueError, r"\(1, 1\)"),
        ([1.0], 0.0, ValueError, r"epsilon is 0.0.*\(0, 1\]"),
        ([1.0], 1.5, ValueError, "epsilon is 1.5"),
        ([1.0], -0.1, ValueError, "epsilon is -0.1"),
        ([1.0], float("nan"), ValueError, "epsilon is nan"),
        ([1.0], "0.7", TypeError, "epsilon is '0.7'"),
        ([1.0], True, TypeError, "epsilon is True"),
    ],
)
def test_energy_rank_refuses(energies: Any, epsilon: Any, error: type[Exception], message: str) -> None:
    """Bad spectra and thresholds are named, never silently ranked."""
    with pytest.raises(error, match=message):
        energy_rank(np.array(energies), epsilon)


# ---- decompositions --------------------------------------------------------------------


@pytest.mark.parametrize("decompose", [hosvd, st_hosvd])
@given(shape=st.lists(st.integers(2, 6), min_size=2, max_size=4).map(tuple), seed=seeds, epsilon=st.floats(0.3, 1))
def test_factors_are_orthonormal_and_the_error_is_bounded(
    decompose: Any, shape: tuple[int, ...], seed: int, epsilon: float
) -> None:
    """Error² ≤ Σ discarded energies (each at most (1 − ε) of all), and ‖A‖² = ‖S‖² + error²."""
    tensor = normal(shape, seed)
    core, factors = decompose(tensor, epsilon=epsilon)
    for U in factors:
        np.testing.assert_allclose(U.T @ U, np.eye(U.shape[1]), atol=1e-12)
    energy = float((tensor**2).sum())
    error = float(((tensor - tucker_to_tensor(core, factors)) ** 2).sum())
    assert error <= discarded(tensor, core.shape) + 1e-10 * energy
    assert error <= len(shape) * (1 - epsilon) * energy + 1e-10 * energy
    np.testing.assert_allclose(float((core**2).sum()) + error, energy, rtol=1e-10)


@given(data=st.data(), shape=st.lists(st.integers(2, 6), min_size=2, max_size=4).map(tuple), seed=seeds)
def test_st_hosvd_error_equals_its_discarded_energies(data: Any, shape: tuple[int, ...], seed: int) -> None:
    """Two-sided: the energies that the truncations discard, one after the other, are the whole error."""
    ranks = tuple(data.draw(st.integers(1, n)) for n in shape)
    tensor = normal(shape, seed)
    current, tails = tensor, 0.0
    for mode, r in enumerate(ranks):
        U, singular, _ = np.linalg.svd(unfold(current, mode), full_matrices=False)
        tails += float((singular[r:] ** 2).sum())
        current = np.moveaxis(np.tensordot(U[:, :r].T, current, (1, mode)), 0, mode)
    error = float(((tensor - tucker_to_tensor(*st_hosvd(tensor, ranks=ranks))) ** 2).sum())
    np.testing.assert_allclose(error, tails, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decompose", [hosvd, st_hosvd])
def test_a_tensor_of_known_rank_is_recovered(decompose: Any) -> None:
    """Multilinear rank (2, 3, 2, 1): exact at these ranks, and clearly not with one rank less in any mode."""
    tensor = low_rank((5, 6, 4, 3), (2, 3, 2, 1))
    result = tucker_to_tensor(*decompose(tensor, ranks=(2, 3, 2, 1)))
    np.testing.assert_allclose(result, tensor, rtol=1e-10, atol=1e-10)
    assert decompose(tensor, epsilon=1 - 1e-9).core.shape == (2, 3, 2, 1)
    for fewer in [(1, 3, 2, 1), (2, 2, 2, 1), (2, 3, 1, 1)]:
        assert np.abs(tucker_to_tensor(*decompose(tensor, ranks=fewer)) - tensor).max() > 0.1


@pytest.mark.parametrize("decompose", [hosvd, st_hosvd])
def test_epsilon_one_is_full_rank_even_for_a_low_rank_tensor(decompose: Any) -> None:
    """ε = 1 keeps every direction, also those without energy."""
    tensor = low_rank((5, 6, 4, 3), (2, 3, 2, 1))
    core, factors = decompose(tensor, epsilon=1)
    assert core.shape == tensor.shape
    np.testing.assert_allclose(tucker_to_tensor(core, factors), tensor, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decompose", [hosvd, st_hosvd])
def test_a_rank_of_none_leaves_the_mode_alone(decompose: Any) -> None:
    """No factor, full size in the core, and the dtype of the tensor kept."""
    tensor = normal((4, 5, 3)).astype(np.float32)
    core, factors = decompose(tensor, ranks=(2, None, 3))
    assert core.shape == (2, 5, 3)
    assert factors[1] is None
    assert {core.dtype, factors[0].dtype, factors[2].dtype} == {np.dtype(np.float32)}


def test_agrees_with_tensorly() -> None:
    """An outside implementation: unfold, mode_dot, multi_mode_dot, the HOSVD's subspaces and core, to 1e-10."""
    tl = pytest.importorskip("tensorly")
    from tensorly.decomposition import tucker as tensorly_tucker

    tensor, ranks = normal((5, 6, 4, 3), 3), (3, 4, 2, 2)
    close = {"rtol": 1e-10, "atol": 1e-10}
    for mode, n in enumerate(tensor.shape):
        matrix = normal((2, n), mode)
        np.testing.assert_array_equal(unfold(tensor, mode), tl.unfold(tensor, mode))
        np.testing.assert_array_equal(fold(tl.unfold(tensor, mode), mode, tensor.shape), tensor)
        theirs = tl.tenalg.mode_dot(tensor, matrix, mode)
        np.testing.assert_allclose(mode_product(tensor, matrix, mode), theirs, **close)
    core, factors = hosvd(tensor, ranks=ranks)
    for mode, (U, r) in enumerate(zip(factors, ranks, strict=True)):
        assert U is not None
        theirs = tl.tenalg.svd_interface(tl.unfold(tensor, mode), method="truncated_svd", n_eigenvecs=r)[0]
        np.testing.assert_allclose(U @ U.T, theirs @ theirs.T, **close)
    np.testing.assert_allclose(core, tl.tenalg.multi_mode_dot(tensor, factors, transpose=True), **close)
    np.testing.assert_allclose(tucker_to_tensor(core, factors), tl.tucker_to_tensor((core, factors)), **close)

    exact = low_rank((5, 6, 4, 3), ranks)
    recovered = tl.tucker_to_tensor(tensorly_tucker(exact, rank=list(ranks), init="svd"))
    np.testing.assert_allclose(tucker_to_tensor(*hosvd(exact, ranks=ranks)), recovered, rtol=1e-9, atol=1e-9)


# ---- planted faults --------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["transposed factor", "dropped factor", "wrong mode", "Kolda's order"])
def test_planted_faults_are_caught(fault: str) -> None:
    """Tests of the tests: each plausible slip breaks the reconstruction, loudly or by far more than the tolerance."""
    tensor = low_rank((4, 4, 4), (2, 2, 2))
    core, factors = hosvd(tensor, ranks=(4, 4, 4))  # square factors: the shapes cannot give the fault away
    broken: list[np.ndarray | None] = list(factors)
    if fault == "transposed factor":
        assert broken[0] is not None
        broken[0] = broken[0].T
    elif fault == "dropped factor":
        broken[1] = None
    elif fault == "wrong mode":
        broken[0], broken[2] = broken[2], broken[0]
    else:
        core = fold(np.moveaxis(core, 1, 0).reshape(4, 16, order="F"), 1, (4, 4, 4))
    assert np.abs(tucker_to_tensor(*hosvd(tensor, ranks=(4, 4, 4))) - tensor).max() < 1e-10
    assert np.abs(tucker_to_tensor(core, broken) - tensor).max() > 0.1


# ---- bad input -------------------------------------------------------------------------

A = np.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: unfold(A, 3), ValueError, r"mode is 3, expected 0 to 2.*\(2, 3, 4\)"),
        (lambda: unfold(A, -1), ValueError, "mode is -1"),
        (lambda: fold(np.ones((3, 4)), 1, (2, 3, 4)), ValueError, r"\(3, 4\), expected \(3, 8\) for mode 1"),
        (lambda: mode_product(A, np.ones((2, 2)), 1), ValueError, r"\(2, 2\), expected \(J, 3\) for mode 1.*\(2, 3"),
        (lambda: mode_product(A, np.ones((2, 3), np.float32), 1), TypeError, "float32, expected the tensor's float64"),
        (lambda: multi_mode_product(A, [None, None]), ValueError, "2 matrices, expected one per mode"),
        (
            lambda: multi_mode_product(A, [np.ones((1, 2)), np.ones((3, 2)), None]),
            ValueError,
            r"matrix 1 has shape \(3, 2\), expected \(J, 3\)",
        ),
        (lambda: contraction_order((2, 3), (1,)), ValueError, r"1 ranks for a tensor of shape \(2, 3\)"),
        (lambda: contraction_order((2, 3), (1, 0)), ValueError, "mode 1 goes from 3 to 0"),
        (lambda: gram(A, 5), ValueError, "gram: mode is 5"),
        (lambda: eigenbasis(np.ones((2, 3))), ValueError, r"\(2, 3\), expected \(n, n\)"),
        (lambda: eigenbasis(np.full((2, 2), np.nan)), ValueError, "NaN"),
        (lambda: hosvd(A), ValueError, "either epsilon or ranks"),
        (lambda: hosvd(A, epsilon=0.5, ranks=(1, 1, 1)), ValueError, "either epsilon or ranks"),
        (lambda: hosvd(A, ranks=(1, 1)), ValueError, r"\(1, 1\), expected one per mode of shape \(2, 3, 4\)"),
        (lambda: hosvd(A, ranks=(1, 4, 1)), ValueError, "rank of mode 1 is 4, expected an integer from 1 to 3"),
        (lambda: st_hosvd(A, ranks=(0, 1, 1)), ValueError, "rank of mode 0 is 0"),
        (lambda: st_hosvd(A, ranks=(1, 1, 1.5)), ValueError, "rank of mode 2 is 1.5"),
        (lambda: st_hosvd(A, epsilon=2), ValueError, "epsilon is 2"),
        (lambda: hosvd(np.zeros((2, 3)), epsilon=0.5), ValueError, "zero activation"),
        (lambda: hosvd(np.ones((2, 3), int), epsilon=0.5), TypeError, "int64, expected float32 or float64"),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    """Every error says which argument, what came, and what was expected."""
    with pytest.raises(error, match=message):
        call()
