"""Tucker decomposition: unfoldings, mode products, and the (one-shot) higher-order SVD.

Formulas count modes from 1, arguments from 0: A ×_n M is ``mode_product(A, M, n - 1)``. An unfolding
keeps the remaining modes in C order (the last varies fastest), as in TensorLy. Kolda and Bader (2009)
let the *first* remaining mode vary fastest: their columns are the same, in another order. Gram
matrices, factors and cores do not depend on it.

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
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lance_ref.algebra.magnitude import exponent, near_one, scaled
from lance_ref.engine.counting import add, matmul

GRAM_WORKSPACE_BYTES = 2 * 2**20
"""Largest float64 copy of a part of a tensor that :func:`gram` makes at a time, unless fibres are very long."""

GRAM_FIBRES = 1024
"""So many of them are multiplied at a time at the least: fewer would make slow products."""

FACTOR_BYTES = 8 * 2**30
"""Largest float64 factor that a decomposition makes."""


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


# ---- unfoldings ------------------------------------------------------------------------


def unfold(tensor: np.ndarray, mode: int) -> np.ndarray:
    """The mode-n unfolding A_(n): mode ``mode`` becomes the rows, all others the columns.

    Parameters
    ----------
    tensor : array of shape (n_1, n_2, …)
    mode : int
        From 0 to ``tensor.ndim - 1``.

    Returns
    -------
    (n_mode, product of the other sizes) array, the columns in C order of the remaining modes
    (not Kolda's order). A view where NumPy can make one.

    Examples
    --------
    >>> import numpy as np
    >>> tensor = np.arange(8).reshape(2, 2, 2)
    >>> unfold(tensor, 1)
    array([[0, 1, 4, 5],
           [2, 3, 6, 7]])
    """
    _check_mode("unfold", tensor.shape, mode)
    rest = math.prod(tensor.shape[:mode]) * math.prod(tensor.shape[mode + 1 :])
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], rest)  # (n, rest)


def fold(matrix: np.ndarray, mode: int, shape: Sequence[int]) -> np.ndarray:
    """The tensor of the given shape whose mode-n unfolding is ``matrix``: the inverse of :func:`unfold`.

    Raises
    ------
    ValueError
        If ``matrix`` is not (shape[mode], product of the other sizes).
    """
    shape = tuple(shape)
    _check_mode("fold", shape, mode)
    rest = shape[:mode] + shape[mode + 1 :]
    if matrix.shape != (shape[mode], math.prod(rest)):
        raise ValueError(
            f"fold: matrix has shape {matrix.shape}, expected {(shape[mode], math.prod(rest))} "
            f"for mode {mode} of a tensor of shape {shape}"
        )
    return np.moveaxis(matrix.reshape(shape[mode], *rest), 0, mode)


# ---- products --------------------------------------------------------------------------


def mode_product(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    """The mode product A ×_n M: every mode-n fibre of ``tensor`` is multiplied by ``matrix``.

    Takes ``tensor.size · J`` multiply-adds, and no copy of a contiguous ``tensor``.

    Parameters
    ----------
    tensor : array of shape (.., n, ..)
    matrix : (J, n) array of the same dtype
    mode : int
        The position of ``n``.

    Returns
    -------
    New contiguous array of shape (.., J, ..).

    Raises
    ------
    ValueError
        If the sizes do not match; names the mode and both shapes.
    TypeError
        If the dtypes differ.
    """
    _check_mode("mode_product", tensor.shape, mode)
    _check_matrix(tensor, matrix, mode)
    return _along(tensor, matrix, mode)


def _check_matrix(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> None:
    n = tensor.shape[mode]
    if matrix.ndim != 2 or matrix.shape[1] != n:
        raise ValueError(
            f"mode_product: matrix has shape {matrix.shape}, expected (J, {n}) for mode {mode} "
            f"of a tensor of shape {tensor.shape}"
        )
    if matrix.dtype != tensor.dtype:
        raise TypeError(f"mode_product: matrix is {matrix.dtype}, expected the tensor's {tensor.dtype}")


def _along(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    """:func:`mode_product` of what fits."""
    if tensor.ndim == 2:
        return matmul(matrix, tensor) if mode == 0 else matmul(tensor, matrix.T)
    n, J = tensor.shape[mode], matrix.shape[0]
    pre, post = math.prod(tensor.shape[:mode]), math.prod(tensor.shape[mode + 1 :])
    out = np.empty((*tensor.shape[:mode], J, *tensor.shape[mode + 1 :]), tensor.dtype)
    # Around mode n a contiguous tensor is (pre, n, post), so no unfolding has to be laid out: the mode is the
    # last, the first, or the rows of a matrix for each index of the modes before it.
    if post == 1:
        matmul(tensor.reshape(pre, n), matrix.T, out=out.reshape(pre, J))
    elif pre == 1:
        matmul(matrix, tensor.reshape(n, post), out=out.reshape(J, post))
    else:
        matmul(matrix, tensor.reshape(pre, n, post), out=out.reshape(pre, J, post))
    return out


def multi_mode_product(tensor: np.ndarray, matrices: Sequence[np.ndarray | None]) -> np.ndarray:
    """A ×_1 M_1 ×_2 M_2 …, in the order of fewest multiply-adds (:func:`contraction_order`).

    Parameters
    ----------
    tensor : array of shape (n_1, n_2, …)
    matrices : sequence
        One (J, n) array per mode, or None to leave that mode alone, at no cost.

    Returns
    -------
    Array of shape (J_1, J_2, …); ``tensor`` itself if every matrix is None.

    Raises
    ------
    ValueError, TypeError
        As :func:`mode_product`; also if there is not one entry per mode.
    """
    if len(matrices) != tensor.ndim:
        raise ValueError(
            f"multi_mode_product: got {len(matrices)} matrices, expected one per mode (or None) "
            f"of a tensor of shape {tensor.shape}"
        )
    for mode, matrix in enumerate(matrices):
        if matrix is not None and (matrix.ndim != 2 or matrix.shape[1] != tensor.shape[mode]):
            raise ValueError(
                f"multi_mode_product: matrix {mode} has shape {matrix.shape}, expected (J, {tensor.shape[mode]}) "
                f"for mode {mode} of a tensor of shape {tensor.shape}"
            )
        if matrix is not None and matrix.dtype != tensor.dtype:
            raise TypeError(
                f"multi_mode_product: matrix {mode} is {matrix.dtype}, expected the tensor's {tensor.dtype}"
            )
    # Products along different modes commute, so the cheapest order gives the same tensor.
    for mode in contraction_order(tensor.shape, [None if M is None else M.shape[0] for M in matrices]):
        matrix = matrices[mode]
        assert matrix is not None
        tensor = _along(tensor, matrix, mode)
    return tensor


def contraction_order(shape: Sequence[int], ranks: Sequence[int | None]) -> tuple[int, ...]:
    """The order of mode products from ``shape`` to ``ranks`` that takes the fewest multiply-adds.

    Parameters
    ----------
    shape : sequence of int
        Sizes n before the products.
    ranks : sequence of int or None
        Sizes r after the products (larger than n is fine); None for a mode without a product.

    Returns
    -------
    The modes that have a product, in order; ties go to the lower mode.

    Notes
    -----
    A product that takes mode i from n_i to r_i costs P·r_i multiply-adds on a tensor of P elements
    and leaves P·r_i/n_i of them. For two products that follow each other, i before j is the cheaper
    order exactly if

        P·r_i + P·(r_i/n_i)·r_j ≤ P·r_j + P·(r_j/n_j)·r_i   ⟺   1/r_i − 1/n_i ≥ 1/r_j − 1/n_j

    (divide by P·r_i·r_j). What comes before and after the two is not affected. Any order can
    therefore be improved by exchanging neighbours until 1/r − 1/n descends: that order is the best.

    Examples
    --------
    >>> contraction_order((128, 960, 7, 7), (64, 160, 2, 2))
    (2, 3, 0, 1)
    """
    if len(ranks) != len(shape):
        raise ValueError(f"contraction_order: got {len(ranks)} ranks for a tensor of shape {tuple(shape)}")
    return _contraction_order(tuple(shape), tuple(ranks))


@lru_cache(maxsize=4096)  # the same few shapes at every training step
def _contraction_order(shape: tuple[int, ...], ranks: tuple[int | None, ...]) -> tuple[int, ...]:
    keys: dict[int, float] = {}
    for mode, (n, r) in enumerate(zip(shape, ranks, strict=True)):
        if r is not None:
            if n < 1 or r < 1:
                raise ValueError(f"contraction_order: mode {mode} goes from {n} to {r}, expected sizes of at least 1")
            keys[mode] = (n - r) / (n * r)  # one rounding of exact integers: equal keys stay equal
    return tuple(sorted(keys, key=lambda mode: (-keys[mode], mode)))


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
    _check_mode("gram", tensor.shape, mode)
    _check_entries("gram", tensor)
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
    _check_entries(name, tensor)
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


def _check_mode(name: str, shape: tuple[int, ...], mode: int) -> None:
    if not isinstance(mode, (int, np.integer)) or isinstance(mode, bool) or not 0 <= mode < len(shape):
        raise ValueError(f"{name}: mode is {mode}, expected 0 to {len(shape) - 1} for a tensor of shape {tuple(shape)}")


def _check_entries(name: str, tensor: np.ndarray) -> None:
    if not tensor.size:
        raise ValueError(f"{name}: tensor has shape {tensor.shape}, which is empty")
