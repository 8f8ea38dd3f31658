"""What is taken out of a layer's input before its directions are sought: its mean, or directions to leave alone.

Two ways of dealing with an activation's feature mode (channels of a convolution, features of a linear layer):

* **protected directions** M (n, m), orthonormal: A is replaced by A ×_f (I − M Mᵀ), and the factor U_f is
  sought in the null space of M, so that U_fᵀ M = 0. Directions that earlier tasks need are protected so, and
  ``mean_free`` protects the direction of the mean activation;
* **centring**: A is replaced by A − μ, the same μ (n,) at every place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lance_ref.algebra.magnitude import near_one
from lance_ref.algebra.modes import mode_product

ORTHONORMAL_TOLERANCE = 1e-8
"""Largest entry of MᵀM − I that is taken for rounding."""


@dataclass(frozen=True, eq=False)
class Frame:
    """The protected directions and the mean of one layer's feature mode.

    Attributes
    ----------
    protected : (n, m) float64 array or None
        Orthonormal columns.
    mean : (n,) float64 array or None
        What is subtracted.
    """

    protected: np.ndarray | None = None
    mean: np.ndarray | None = None

    def apply(self, activation: np.ndarray) -> np.ndarray:
        """(A − μ) ×_f (I − M Mᵀ), in the activation's dtype; the activation itself where nothing is to be done."""
        mode = feature_mode(activation.shape)
        if self.mean is not None:
            activation = activation - along(self.mean, activation.shape).astype(activation.dtype)
        if self.protected is not None:
            M = self.protected.astype(activation.dtype)
            activation = activation - mode_product(mode_product(activation, M.T, mode), M, mode)
        return activation

    def free_directions(self, n: int) -> np.ndarray:
        """An orthonormal basis (n, n − m) of the null space of M."""
        if self.protected is None:
            return np.eye(n)
        complete, _ = np.linalg.qr(self.protected, mode="complete")  # (n, n)
        return complete[:, self.protected.shape[1] :]

    def same(self, other: Frame) -> bool:
        """Whether both take out exactly the same."""
        return _equal(self.protected, other.protected) and _equal(self.mean, other.mean)


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


class FeatureMean:
    """The mean of a layer's input over everything but its feature mode, summed batch by batch in float64."""

    def __init__(self, layer: str, shape: Sequence[int]) -> None:
        self.layer = layer
        self.total = np.zeros(shape[feature_mode(shape)])
        self.count = 0

    def add(self, activation: np.ndarray) -> None:
        """Add one activation; ValueError if it contains NaN or infinity, or has another number of features."""
        mode = feature_mode(activation.shape)
        n = activation.shape[mode]
        if n != len(self.total):
            raise ValueError(
                f"layer {self.layer!r}: an activation of shape {activation.shape} has {n} features, "
                f"the first had {len(self.total)}"
            )
        total = activation.sum(axis=tuple(i for i in range(activation.ndim) if i != mode), dtype=np.float64)
        if not np.isfinite(total).all():
            raise ValueError(
                f"layer {self.layer!r}: an activation of shape {activation.shape} contains NaN or infinity, "
                "expected finite numbers"
            )
        self.total += total
        self.count += activation.size // n

    @property
    def mean(self) -> np.ndarray:
        """(n,)"""
        return self.total / self.count


def feature_mode(shape: Sequence[int]) -> int:
    """1 for the input of a convolution, (B, C, H, W) or (B, C, D, H, W), the last one for that of a linear layer.

    >>> feature_mode((8, 3, 5, 5)), feature_mode((8, 7, 3))
    (1, 2)
    """
    return 1 if len(shape) >= 4 else len(shape) - 1


def along(vector: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A vector of the feature mode with axes of length 1 for the other modes, for broadcasting."""
    mode = feature_mode(shape)
    return vector.reshape([-1 if i == mode else 1 for i in range(len(shape))])


def with_direction(protected: np.ndarray | None, vector: np.ndarray) -> np.ndarray | None:
    """M with one more column, so that its span holds ``vector`` too.

    Parameters
    ----------
    protected : (n, m) array or None
        Orthonormal columns.
    vector : (n,) array

    Returns
    -------
    (n, m + 1) array, or ``protected`` as it was if the vector is zero or already in its span.
    """
    vector, _ = near_one(np.asarray(vector, dtype=np.float64), "vector")
    length = float(np.linalg.norm(vector))
    rest = vector.copy()
    if protected is not None:
        for _ in range(2):  # once more, for what rounding left
            rest -= protected @ (protected.T @ rest)
    if length == 0 or np.linalg.norm(rest) <= 1e-10 * length:
        return protected
    column = (rest / np.linalg.norm(rest))[:, None]  # (n, 1)
    return column if protected is None else np.hstack([protected, column])


def checked_protected(layer: str, protected: np.ndarray, n: int) -> np.ndarray | None:
    """The protected directions of a layer as :func:`checked_basis` gives them."""
    return checked_basis(f"protected[{layer!r}]", protected, n)


def checked_basis(name: str, basis: np.ndarray, n: int) -> np.ndarray | None:
    """Orthonormal directions as float64 (n, m), or None if there are no columns; ``name`` is for errors.

    Raises
    ------
    TypeError, ValueError
        If it is not a real (n, m) array with m ≤ n and orthonormal, finite columns.
    """
    if not isinstance(basis, np.ndarray) or basis.dtype.kind != "f":
        array = isinstance(basis, np.ndarray)
        what = f"of shape {basis.shape} and dtype {basis.dtype}" if array else type(basis).__name__
        raise TypeError(f"{name} is {what}, expected a floating-point array ({n}, m) or None")
    if basis.ndim != 2 or basis.shape[0] != n or basis.shape[1] > n:
        raise ValueError(f"{name} has shape {basis.shape}, expected ({n}, m) with m at most {n}")
    M = basis.astype(np.float64)
    if M.shape[1] == 0:
        return None
    error = np.abs(M.T @ M - np.eye(M.shape[1])).max()
    if not error <= ORTHONORMAL_TOLERANCE:  # NaN too
        raise ValueError(
            f"{name} of shape {M.shape} has columns that are not orthonormal: "
            f"MᵀM differs from the identity by {error:.2g}, expected at most {ORTHONORMAL_TOLERANCE:g}"
        )
    return M
