"""Tucker decomposition: energies and directions of the modes, and the (one-shot) higher-order SVD.

The unfoldings and mode products that it is made of are in :mod:`lance_ref.algebra.modes`, and can be had from here as
well: ``lance_ref.tucker.unfold``.

Singular vectors come from Gram matrices, K_n = A_(n) A_(n)ᵀ, accumulated in float64: their
eigenvalues are the *energies* (squared singular values) of the unfolding, and Grams of several
tensors add up. The price is that singular values below about 1e-8 of the largest are lost in
rounding, which is of no matter where a share of the energy decides.

Squares leave the range of a dtype long before the numbers themselves do. Whatever squares divides by a
power of two first (:mod:`lance_ref.algebra.magnitude`), which is exact: ranks and directions do not depend on one in
front.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lance_ref.algebra.magnitude import exponent, near_one, scaled
from lance_ref.algebra.modes import (
    check_entries,
    check_mode,
    contraction_order,
    fold,
    mode_product,
    multi_mode_product,
    unfold,
)
from lance_ref.engine.counting import add, matmul

GRAM_WORKSPACE_BYTES = 2 * 2**20
"""Largest float64 copy of a part of a tensor that :func:`gram` makes at a time, unless fibres are very long."""

GRAM_FIBRES = 1024
"""So many of them are multiplied at a time at the least: fewer would make slow products."""

FACTOR_BYTES = 8 * 2**30
"""Largest float64 factor that a decomposition makes."""

__all__ = [
    "FACTOR_BYTES",
    "GRAM_FIBRES",
    "GRAM_WORKSPACE_BYTES",
    "Tucker",
    "check_epsilon",
    "check_ranks",
    "contraction_order",
    "eigenbasis",
    "energy_rank",
    "fold",
    "gram",
    "hosvd",
    "mode_product",
    "multi_mode_product",
    "st_hosvd",
    "tucker_to_tensor",
    "unfold",
]


class Tucker(NamedTuple):
    """A tensor as core and factors: A ≈ S ×_1 U_1 ×_2 U_2 …, unpacks as ``core, factors``.

    Attributes
    ----------
    core : (r_1, r_2, …) array
    factors : tuple
        One (n, r) array with orthonormal columns per mode, None for a mode that is left alone.
    """

    core: np.ndarray
    factors: tuple[np.ndarray | None, ...]


def tucker_to_tensor(core: np.ndarray, factors: Sequence[np.ndarray | None]) -> np.ndarray:
    """The full tensor S ×_1 U_1 ×_2 U_2 …; a factor of None stands for the identity."""
    return multi_mode_product(core, factors)


# ---- energies and subspaces --------------------------------------------------------------


def gram(tensor: np.ndarray, mode: int) -> np.ndarray:
    """The Gram matrix A_(n) A_(n)ᵀ of the mode-n unfolding, in float64.

    Takes ``tensor.size · n`` multiply-adds by the plain formula (BLAS computes one triangle); never more than
    :data:`GRAM_WORKSPACE_BYTES` (or :data:`GRAM_FIBRES`) of ``tensor`` is converted or rearranged at a time, and a
    contiguous ``tensor`` is not copied.

    Returns
    -------
    (n, n) float64 array

    Raises
    ------
    ValueError
        If ``mode`` is not one of the tensor's, or the tensor is empty.
    """
    check_mode("gram", tensor.shape, mode)
    check_entries("gram", tensor)
    n = tensor.shape[mode]
    pre, post = math.prod(tensor.shape[:mode]), math.prod(tensor.shape[mode + 1 :])
    fibres = max(GRAM_FIBRES, GRAM_WORKSPACE_BYTES // (8 * n))
    total = np.zeros((n, n), order="F")
    if post == 1:
        rows = tensor.reshape(pre, n)
        for start in range(0, pre, fibres):
            block = rows[start : start + fibres]  # (fibres, n); lets go of the last block's copy
            block = block.astype(np.float64, order="C", copy=False)
            # A Aᵀ is the sum of a aᵀ over the columns a, so blocks of columns add up: equation (1).
            total = _with_product(total, block.T)
    else:
        slabs = tensor.reshape(pre, n, post)
        width, depth = min(post, fibres), max(1, fibres // post)
        for first in range(0, pre, depth):
            for start in range(0, post, width):
                block = slabs[first : first + depth, :, start : start + width].transpose(1, 0, 2)  # (n, depth, width)
                block = block.astype(np.float64, order="C", copy=False).reshape(n, -1)  # (n, depth·width)
                total = _with_product(total, block)
    # BLAS has computed the upper triangle alone, because a Gram matrix is symmetric.
    for i in range(n):
        total[i + 1 :, i] = total[i, i + 1 :]
    return total.T


def _with_product(total: np.ndarray, block: np.ndarray) -> np.ndarray:
    """``total + block @ block.T`` in the upper triangle, in the memory of ``total``, which is in Fortran order."""
    from scipy.linalg import blas

    a, trans = (block.T, 1) if block.flags.c_contiguous else (block, 0)  # without a copy
    add(block.size * len(block))
    result: np.ndarray = blas.dsyrk(1.0, a, beta=1.0, c=total, trans=trans, overwrite_c=1)
    return result


def eigenbasis(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Energies and directions of a Gram matrix, the largest energy first.

    Parameters
    ----------
    matrix : (n, n) float64 array
        Symmetric and positive semidefinite up to rounding.

    Returns
    -------
    energies : (n,) float64 array
        Eigenvalues in descending order, negative ones set to 0.
    vectors : (n, n) float64 array
        Orthonormal eigenvectors as columns, each with its largest entry positive.

    Raises
    ------
    ValueError
        If ``matrix`` is not square or not finite.
    """
    from scipy.linalg import eigh

    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"eigenbasis: matrix has shape {matrix.shape}, expected (n, n)")
    if not np.isfinite(matrix).all():
        raise ValueError(f"eigenbasis: the matrix of shape {matrix.shape} contains NaN or infinity")
    # The eigenvalues of K·2^−k are those of K times 2^−k, and the eigenvectors are the same: equation (2).
    k = exponent(matrix)
    # all vectors are wanted: this driver is faster, and they are closer to orthonormal
    values, vectors = eigh(scaled(matrix, -k), driver="evd")
    return scaled(np.maximum(values[::-1], 0.0), k), _signed(vectors[:, ::-1])


def _signed(vectors: np.ndarray) -> np.ndarray:
    """The columns, each with the sign that makes its largest entry positive."""
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    return np.ascontiguousarray(vectors * signs)


def check_epsilon(epsilon: float) -> float:
    """``epsilon`` as a float in (0, 1], else a ValueError or TypeError that says what came."""
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float, np.integer, np.floating)):
        raise TypeError(f"epsilon is {epsilon!r}, expected a number in (0, 1]")
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}, expected a number in (0, 1]")
    return float(epsilon)


def energy_rank(energies: np.ndarray, epsilon: float) -> int:
    """The smallest r whose r largest energies hold the share ``epsilon`` of their sum.

    r = min { r : Σ_{i≤r} λ_i ≥ ε Σ λ_i }, and the full length, exactly, for ε = 1 (also where the
    last energies are 0).

    Parameters
    ----------
    energies : (n,) array
        Squared singular values, in any order; values that rounding made negative count as 0.
    epsilon : float
        Energy threshold in (0, 1].

    Returns
    -------
    int in [1, n]

    Raises
    ------
    ValueError
        If ``epsilon`` is out of range, an energy is NaN, infinite or clearly negative, or all are 0.

    Examples
    --------
    >>> energy_rank([6, 3, 1], 0.6), energy_rank([6, 3, 1], 0.61), energy_rank([6, 3, 0], 1.0)
    (1, 2, 3)
    """
    epsilon = check_epsilon(epsilon)
    energies = np.asarray(energies, dtype=np.float64)
    if energies.ndim != 1 or not energies.size:
        raise ValueError(f"energies have shape {energies.shape}, expected (n,) with n of at least 1")
    if not np.isfinite(energies).all():
        raise ValueError("energies contain NaN or infinity, expected finite numbers")
    energies = scaled(energies, -exponent(energies))  # their sum may be out of range
    if energies.min() < -1e-6 * abs(energies.max()):
        share = energies.min() / np.abs(energies).max()
        raise ValueError(
            f"energies contain a negative number, {share:.3g} of the largest, expected squared singular values, which "
            "are not negative"
        )
    # Equation (3): the first place where the running sum reaches the share.
    kept = np.cumsum(np.sort(np.maximum(energies, 0.0))[::-1])
    if kept[-1] == 0:
        raise ValueError("energies are all 0: a zero activation has no subspace")
    if epsilon == 1:
        return energies.size
    return int(np.argmax(kept >= epsilon * kept[-1])) + 1


def hosvd(tensor: np.ndarray, *, epsilon: float | None = None, ranks: Sequence[int | None] | None = None) -> Tucker:
    """Truncated higher-order SVD (De Lathauwer et al. 2000): every factor from the whole tensor.

    Parameters
    ----------
    tensor : float32 or float64 array
    epsilon : float, optional
        Energy threshold in (0, 1] of every mode.
    ranks : sequence of int or None, optional
        One rank per mode instead; None leaves a mode alone.

    Returns
    -------
    Tucker
        Core and factors in the dtype of ``tensor``.

    Raises
    ------
    ValueError
        If not exactly one of ``epsilon`` and ``ranks`` is given, or either is out of range; if ``tensor`` is empty
        or contains NaN or infinity, or the core has entries too large for its dtype.

    Notes
    -----
    The squared error is at most the sum, over the modes, of the energies that the mode discards.

    A mode that is larger than the product m of the others has an unfolding of rank m at most. Its directions come from
    the (m, m) Gram matrix of the other side: the memory is that of the factor, (n, r), and not n².
    """
    wanted = _wanted("hosvd", tensor, epsilon, ranks)
    unit, k = near_one(tensor)
    factors = tuple(_leading(unit, mode, rank, epsilon) for mode, rank in enumerate(wanted))
    core = multi_mode_product(unit, [None if U is None else U.T for U in factors])
    return Tucker(_in_range("hosvd", scaled(core, k), tensor), factors)


def st_hosvd(tensor: np.ndarray, *, epsilon: float | None = None, ranks: Sequence[int | None] | None = None) -> Tucker:
    """Sequentially truncated higher-order SVD (Vannieuwenhoven et al. 2012).

    As :func:`hosvd`, but each mode, from 0 on, is truncated before the next one is looked at:
    cheaper, and the squared error *equals* the sum of the discarded energies. With ``epsilon`` every
    mode keeps that share of the energy that earlier modes have left.
    """
    wanted = _wanted("st_hosvd", tensor, epsilon, ranks)
    core, k = near_one(tensor)
    factors = []
    for mode, rank in enumerate(wanted):
        U = _leading(core, mode, rank, epsilon)
        factors.append(U)
        # Later modes see the tensor that is already smaller, which is what makes the sequence cheap.
        core = core if U is None else mode_product(core, U.T, mode)
    return Tucker(_in_range("st_hosvd", scaled(core, k), tensor), tuple(factors))


def _leading(tensor: np.ndarray, mode: int, rank: int | None, epsilon: float | None) -> np.ndarray | None:
    """The (n, r) leading directions of one mode; r from ``epsilon`` where that is given."""
    if rank is None and epsilon is None:
        return None
    n = tensor.shape[mode]
    rest = tensor.size // n
    wide = n <= rest
    # A Aᵀ and Aᵀ A have the same nonzero eigenvalues: the smaller of the two is decomposed.
    energies, vectors = eigenbasis(gram(tensor, mode) if wide else gram(unfold(tensor, mode), 1))
    if epsilon is not None:
        rank = n if epsilon == 1 else energy_rank(energies, epsilon)
    if wide:
        return np.ascontiguousarray(vectors[:, :rank], dtype=tensor.dtype)
    assert rank is not None
    return np.ascontiguousarray(_signed(_left_directions(unfold(tensor, mode), vectors, rank)), dtype=tensor.dtype)


def _left_directions(tall: np.ndarray, vectors: np.ndarray, rank: int) -> np.ndarray:
    """The (n, rank) left directions of an (n, m) matrix from its right ones, (m, m): A v_i = σ_i u_i.

    QR mends those that drown in rounding, and completes the basis where more than m are wanted.
    """
    from scipy.linalg import qr

    if 8 * len(tall) * rank > FACTOR_BYTES:
        raise ValueError(
            f"a factor of shape ({len(tall)}, {rank}) would take {8 * len(tall) * rank:,} bytes, at most "
            f"{FACTOR_BYTES:,} are made; ask for a smaller rank, or None to leave the mode alone"
        )
    images = np.zeros((len(tall), rank))
    known = np.ascontiguousarray(vectors[:, :rank])
    for start in range(0, len(tall), GRAM_FIBRES):
        rows = slice(start, start + GRAM_FIBRES)
        images[rows, : known.shape[1]] = matmul(tall[rows].astype(np.float64), known)
    # The columns σ_i u_i are orthogonal but for rounding, and QR gives them length one.
    Q, _ = qr(images, mode="economic", overwrite_a=True, check_finite=False)
    result: np.ndarray = Q
    return result


def _in_range(name: str, core: np.ndarray, tensor: np.ndarray) -> np.ndarray:
    """``core``, or a ValueError where its entries are too large for its dtype."""
    if not np.isfinite(core).all():
        raise ValueError(
            f"{name}: the core of a tensor of shape {tensor.shape} has entries too large for {tensor.dtype}; "
            "divide the tensor first"
        )
    return core


def _wanted(
    name: str, tensor: np.ndarray, epsilon: float | None, ranks: Sequence[int | None] | None
) -> Sequence[int | None]:
    """Check the arguments of a decomposition; one rank (or None) per mode."""
    if not isinstance(tensor, np.ndarray) or tensor.dtype not in (np.float32, np.float64):
        came = tensor.dtype if isinstance(tensor, np.ndarray) else type(tensor).__name__
        raise TypeError(f"{name}: tensor is {came}, expected float32 or float64")
    if not tensor.ndim:
        raise ValueError(f"{name}: tensor has shape (), expected at least one mode")
    check_entries(name, tensor)
    if (epsilon is None) == (ranks is None):
        raise ValueError(f"{name}: give either epsilon or ranks, got epsilon={epsilon} and ranks={ranks}")
    if ranks is None:
        assert epsilon is not None
        check_epsilon(epsilon)
        return (None,) * tensor.ndim
    check_ranks(name, tensor.shape, ranks)
    return ranks


def check_ranks(name: str, shape: Sequence[int], ranks: Sequence[int | None]) -> None:
    """Raise ValueError unless there is one rank in [1, n], or None, per mode of ``shape``."""
    shape = tuple(shape)
    if len(ranks) != len(shape):
        raise ValueError(f"{name}: ranks are {tuple(ranks)}, expected one per mode of shape {shape}")
    for mode, (n, rank) in enumerate(zip(shape, ranks, strict=True)):
        whole = isinstance(rank, (int, np.integer)) and not isinstance(rank, bool)
        if rank is not None and not (whole and 1 <= rank <= n):
            raise ValueError(
                f"{name}: ranks are {tuple(ranks)}: the rank of mode {mode} is {rank}, "
                f"expected an integer from 1 to {n} (shape {shape})"
            )
