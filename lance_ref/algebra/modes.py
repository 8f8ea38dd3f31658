"""Modes of a tensor: unfoldings, products of matrices along modes, and the order in which several cost least.

Formulas count modes from 1, arguments from 0: A ×_n M is ``mode_product(A, M, n - 1)``. An unfolding
keeps the remaining modes in C order (the last varies fastest), as in TensorLy. Kolda and Bader (2009)
let the *first* remaining mode vary fastest: their columns are the same, in another order. Gram
matrices, factors and cores do not depend on it.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lance_ref.engine.counting import matmul

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
    check_mode("unfold", tensor.shape, mode)
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
    check_mode("fold", shape, mode)
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
    check_mode("mode_product", tensor.shape, mode)
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


# ---- checks ----------------------------------------------------------------------------


def check_mode(name: str, shape: tuple[int, ...], mode: int) -> None:
    """Raise ValueError unless ``mode`` is one of a tensor of that shape; ``name`` is the function that was called."""
    if not isinstance(mode, (int, np.integer)) or isinstance(mode, bool) or not 0 <= mode < len(shape):
        raise ValueError(f"{name}: mode is {mode}, expected 0 to {len(shape) - 1} for a tensor of shape {tuple(shape)}")


def check_entries(name: str, tensor: np.ndarray) -> None:
    """Raise ValueError for an empty tensor."""
    if not tensor.size:
        raise ValueError(f"{name}: tensor has shape {tensor.shape}, which is empty")
