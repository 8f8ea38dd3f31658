"""Bases of what earlier tasks need, and subspaces for the next task outside of them.

Notation. R (n, s) holds the inputs of one layer as columns: rows of a linear layer's input, patches of a
convolution's, s of them over all batches. K = R Rᵀ is its Gram matrix, tr K its energy. M (n, m), orthonormal, spans
the protected directions, and N (n, n − m) the rest: [M N] is orthogonal. A weight (C_out, n) that changes by ΔW with
ΔW M = 0 answers as before to every input in the span of M.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lance_ref.algebra.frame import checked_basis
from lance_ref.algebra.magnitude import common_unit, exponent, near_one, scaled
from lance_ref.algebra.tucker import check_epsilon, eigenbasis, energy_rank, gram
from lance_ref.engine import counting
from lance_ref.engine.counting import matmul, spending_on
from lance_ref.engine.tensor import FLOATS
from lance_ref.lance.compression import chosen_layers
from lance_ref.lance.listening import run_over
from lance_ref.lance.patches import check_one_group, geometry_of, patch_tokens
from lance_ref.nn import Conv2d
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers

WEIGHTINGS = ("exact", "first-batch-heavy")

GRAM_TOLERANCE = 1e-6
"""Negative eigenvalues of a Gram matrix up to this share of its trace are taken for rounding."""

NOTHING = 1e-12
"""Share of the energy that is taken for rounding: of float32 inputs that lie in the span of M about 1e-14 is left."""


@dataclass(frozen=True, eq=False)
class Gram:
    """K = R Rᵀ of one layer's inputs.

    Attributes
    ----------
    matrix : (n, n) float64 array
        Of R·2^−unit.
    samples : int
        s, the columns of R: tokens of a linear layer, patches of a convolution.
    unit : int
        0 but for float64 inputs whose squares would leave the range. Shares of the energy do not depend on it.
    """

    matrix: np.ndarray
    samples: int
    unit: int = 0


@dataclass(frozen=True, eq=False)
class Protected:
    """The protected directions of one layer after a task.

    Attributes
    ----------
    basis : (n, m) float64 array
        Orthonormal columns; the first ones are those of before.
    added : int
        Directions that this task added.
    kept : float
        ‖MᵀR‖² / ‖R‖², the share of this task's energy that lies in the basis; 1 for inputs that were all zero.
    """

    basis: np.ndarray
    added: int
    kept: float

    @property
    def saturated(self) -> bool:
        """Whether every direction is protected: nothing is left to learn in."""
        n, m = self.basis.shape
        return m == n


def feature_gram(
    net: Module, batches: Iterable[Any], layers: str | Sequence[str] | None = None, weighting: str = "exact"
) -> dict[str, Gram]:
    """Gram matrices of the feature mode of several layers' inputs, summed over all batches in float64, by layer path.

    The network runs in evaluation mode, without gradients and without compression, and is left as it was found.

    Parameters
    ----------
    batches : iterable of arrays, Tensors, or (inputs, labels) tuples
        Of any sizes.
    layers : glob or sequence of globs, optional
        Paths of convolutions and linear layers, by default as in :func:`lance_ref.calibrate`. Convolutions are seen as
        linear layers over their patches: n = C_in·k_h·k_w.
    weighting : {"exact", "first-batch-heavy"}
        ``"first-batch-heavy"`` reproduces what released code of LANCE does, and nothing else speaks for it: its running
        mean starts with the mode's dimension n for the number of matrices seen, so that the first batch
        weighs n times as much as each later one, K = n·K_1 + K_2 + K_3 + …, and the others hardly count.

    Raises
    ------
    ValueError, TypeError
        For an unknown ``weighting``, a convolution with groups, and for unfit layers and batches as in
        :func:`lance_ref.calibrate`; names the layer.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r}, expected one of {WEIGHTINGS}")
    if not isinstance(net, Module):
        raise TypeError(f"net is a {type(net).__name__}, expected a lance_ref.nn.Module")
    paths, modules = chosen_layers(net, layers), weighted_layers(net)
    for path in paths:
        _check_layer(path, modules[path])
    grams: dict[str, Gram] = {}
    units: dict[str, int | None] = dict.fromkeys(paths)

    def add(path: str, activation: np.ndarray, again: bool) -> None:
        if activation.dtype not in FLOATS:
            raise TypeError(f"layer {path!r}: activation is {activation.dtype}, expected float32 or float64")
        units[path] = common_unit(units[path], activation, f"layer {path!r}: an activation")
        unit = units[path] or 0
        term = _gram_of(modules[path], scaled(activation, -unit), unit)
        if path not in grams:
            weight = len(term.matrix) if weighting == "first-batch-heavy" else 1
            grams[path] = Gram(weight * term.matrix, term.samples, unit)
        else:
            before = grams[path]
            matrix = scaled(before.matrix, 2 * (before.unit - unit)) + term.matrix
            grams[path] = Gram(matrix, before.samples + term.samples, unit)

    run_over(net, batches, paths, add)
    return {path: grams[path] for path in paths}


def _gram_of(layer: Module, activation: np.ndarray, unit: int) -> Gram:
    """Gram matrix of one activation, given in that unit."""
    if not isinstance(layer, Conv2d):
        return Gram(gram(activation, activation.ndim - 1), activation.size // activation.shape[-1], unit)
    geometry = geometry_of(layer, activation.shape)
    n, samples = math.prod(layer.weight.shape[1:]), activation.shape[0] * math.prod(geometry.output_size)
    matrix = np.zeros((n, n))
    for tokens in patch_tokens(geometry, activation):
        matrix += gram(tokens.transpose(0, 2, 1), 1)  # (b, K, l), as it lies in memory
    return Gram(matrix, samples, unit)


# ---- after a task: what it needs -------------------------------------------------------------


def update_protected(M: np.ndarray | None, K: np.ndarray | Gram, threshold: float) -> Protected:
    """The protected directions, and as many more as a task's inputs need: the rule of GPM.

    Parameters
    ----------
    M : (n, m) array or None
        Orthonormal directions protected so far.
    K : (n, n) array or Gram
        Gram matrix of the layer's inputs in this task.
    threshold : float
        Share of the energy to protect, in (0, 1].

    Returns
    -------
    Protected
        ``[M, V]`` with the k leading directions V of what M leaves, for the smallest k ≥ 0 that reaches the threshold.
        All n directions are a state like any other (``saturated``), and zero inputs need none.

    Notes
    -----
    The criterion of Saha et al. (GPM, ICLR 2021) for every task after the first. With K' = (I − MMᵀ) K (I − MMᵀ) and
    its eigenvalues λ'_1 ≥ λ'_2 …:

        tr(MᵀKM) + Σ_{i≤k} λ'_i ≥ threshold · tr K.

    The eigenvectors are sought in the null space of M, V = N·eig(NᵀKN), which is the same and keeps [M, V] orthonormal
    to rounding however small the λ'. A share of 1e-12 of the energy counts as rounding, so that a threshold of 1 asks
    for the range of K and not for directions that no input has.

    Examples
    --------
    >>> K = np.diag([6.0, 3.0, 1.0])
    >>> update_protected(None, K, 0.6).added, update_protected(None, K, 0.61).added
    (1, 2)
    >>> update_protected(np.array([[0.0], [1.0], [0.0]]), K, 0.95).kept  # 3 are covered, then 6, then 1
    1.0
    """
    (K, _), threshold = _checked_gram(K), _checked_threshold(threshold)
    M = _checked_basis(M, len(K))
    with spending_on("calibration"):
        N = null_space(M)
        energies, vectors = _spectrum(K, N, M.shape[1] > 0)
        k, kept = _needed(float(np.trace(K)), energies, threshold)
        return Protected(np.hstack([M, _lifted(N, vectors[:, :k], M.shape[1] > 0)]), k, kept)


def update_protected_from_samples(M: np.ndarray | None, R: np.ndarray, threshold: float) -> Protected:
    """:func:`update_protected` from the inputs R (n, s) themselves, by a singular value decomposition of what M leaves.

    It spans the same as that of K = R Rᵀ; single columns may differ in sign, or where energies are equal.
    """
    threshold = _checked_threshold(threshold)
    if not isinstance(R, np.ndarray) or R.ndim != 2 or R.dtype.kind != "f" or not len(R):
        raise ValueError(f"R is {_what(R)}, expected a floating-point array (n, samples)")
    if not np.isfinite(R).all():
        raise ValueError(f"R of shape {R.shape} contains NaN or infinity")
    M, (R, _) = _checked_basis(M, len(R)), near_one(R.astype(np.float64))
    N = null_space(M)
    vectors, singular, _ = np.linalg.svd(N.T @ R, full_matrices=False)  # (n - m, min(n - m, s))
    k, kept = _needed(float(np.vdot(R, R)), singular**2, threshold)
    return Protected(np.hstack([M, N @ vectors[:, :k]]), k, kept)


def _needed(total: float, energies: np.ndarray, threshold: float) -> tuple[int, float]:
    """How many of the directions outside M are needed, and the share of ``total`` that is then kept."""
    if total <= 0:
        return 0, 1.0
    covered = max(total - float(energies.sum()), 0.0)
    kept = np.minimum((covered + np.concatenate([[0.0], np.cumsum(energies)])) / total, 1.0)  # of 0, 1, .. directions
    k = int(np.searchsorted(kept >= threshold - NOTHING, True))
    k = min(k, len(energies))
    return k, float(kept[k])


# ---- before a task: where to learn -------------------------------------------------------------


def task_subspace(K: np.ndarray | Gram, M: np.ndarray | None, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """The leading directions of a new task's inputs among those that are not protected.

    Parameters
    ----------
    K : (n, n) array or Gram
        Gram matrix of the layer's inputs in the new task.
    M : (n, m) array or None
        Orthonormal directions to leave alone.
    epsilon : float
        Share, in (0, 1], of the energy *outside M* that the subspace holds; 1 gives all n − m directions.

    Returns
    -------
    U : (n, r) float64 array
        Orthonormal columns with UᵀM = 0; no columns if nothing is left (all directions are protected, or the inputs
        lie in the span of M up to :data:`NOTHING` of their energy).
    spectrum : (n − m,) float64 array
        All energies outside M, descending.
    """
    (K, unit), epsilon = _checked_gram(K), check_epsilon(epsilon)
    M = _checked_basis(M, len(K))
    with spending_on("calibration"):
        N = null_space(M)
        energies, vectors = _spectrum(K, N, M.shape[1] > 0)
        if energies.sum() <= NOTHING * np.trace(K):
            return np.zeros((len(K), 0)), scaled(energies, unit)
        rank = energy_rank(energies, epsilon)
        return _lifted(N, vectors[:, :rank], M.shape[1] > 0), scaled(energies, unit)


def null_space(M: np.ndarray) -> np.ndarray:
    """N (n, n − m), so that [M N] is orthogonal; the identity where nothing is protected.

    Nominal multiply-adds, half of the FLOPs in Golub & Van Loan, section 5.2: n m² − m³/3 for the Householder vectors
    of M and 2 (n² m − n m² + m³/3) for all of Q; none where m = 0 or m = n.
    """
    n, m = M.shape
    if m in (0, n):
        return np.eye(n)[:, m:]
    counting.add((6 * n**2 * m - 3 * n * m**2 + m**3) // 3)
    complete, _ = np.linalg.qr(M, mode="complete")  # (n, n)
    return complete[:, m:]


def _spectrum(K: np.ndarray, N: np.ndarray, reduced: bool) -> tuple[np.ndarray, np.ndarray]:
    """Energies and eigenvectors of NᵀKN, of K itself where N is the identity."""
    if not N.shape[1]:
        return np.zeros(0), np.zeros((0, 0))
    inside = matmul(N.T, matmul(K, N)) if reduced else K  # (n - m, n - m)
    counting.add(counting.eigh_macs(len(inside)))
    return eigenbasis(inside)


def _lifted(N: np.ndarray, vectors: np.ndarray, reduced: bool) -> np.ndarray:
    """Directions given in the coordinates of N, as directions of the layer's input."""
    return matmul(N, vectors) if reduced else vectors


# ---- checks --------------------------------------------------------------------------------


def checked_bases(net: Module, protected: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    """The bases (n, m) as float64, None as one without columns, for layers that the network has.

    Raises ValueError or TypeError, with the layer, if it is missing or a convolution with groups, or its basis is not
    orthonormal or of another n than the numbers that each output meets, I or C_in·k_h·k_w.
    """
    modules = weighted_layers(net)
    bases = {}
    for path, M in protected.items():
        if path not in modules:
            raise ValueError(f"protected names layer {path!r}, expected one of {', '.join(map(repr, modules))}")
        _check_layer(path, modules[path])
        bases[path] = _checked_basis(M, math.prod(modules[path].weight.shape[1:]), f"protected[{path!r}]")
    return bases


def _check_layer(path: str, layer: Module) -> None:
    """Raise ValueError for a layer whose inputs are not seen as tokens: what one output place meets."""
    if layer.op not in ("conv2d", "linear"):
        kind = type(layer).__name__
        raise ValueError(f"layer {path!r} is a {kind}, whose directions are not protected; expected a Conv2d or Linear")
    check_one_group(f"layer {path!r}", getattr(layer, "groups", 1))


def _checked_basis(M: np.ndarray | None, n: int, name: str = "M") -> np.ndarray:
    checked = None if M is None else checked_basis(name, M, n)
    return np.zeros((n, 0)) if checked is None else checked


def _checked_gram(K: np.ndarray | Gram) -> tuple[np.ndarray, int]:
    """K·2^−unit as float64, with a largest entry of about 1, and the unit."""
    K = K.matrix if isinstance(K, Gram) else K
    if not isinstance(K, np.ndarray) or K.dtype.kind != "f" or K.ndim != 2 or K.shape[0] != K.shape[1] or not K.size:
        raise ValueError(f"K is {_what(K)}, expected a Gram matrix, a floating-point array (n, n)")
    K = K.astype(np.float64)
    unit = exponent(K, "K")
    K = scaled(K, -unit)
    if np.abs(K - K.T).max() > 1e-6 or np.diag(K).min() < 0 or not _semidefinite(K):
        raise ValueError(
            f"K of shape {K.shape} is no Gram matrix: not symmetric, or with negative eigenvalues, {GRAM_TOLERANCE:g} "
            "of its trace or more"
        )
    return K, unit


def _semidefinite(K: np.ndarray) -> bool:
    """Whether no eigenvalue of a symmetric matrix is negative, up to rounding."""
    try:
        np.linalg.cholesky(K + GRAM_TOLERANCE * np.trace(K) * np.eye(len(K)))
    except np.linalg.LinAlgError:
        return not K.any()
    return True


def _checked_threshold(threshold: float) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.integer, np.floating)):
        raise TypeError(f"threshold is {threshold!r}, expected a number in (0, 1]")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a number in (0, 1]")
    return float(threshold)


def _what(value: Any) -> str:
    return f"of shape {value.shape} and dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
