"""What the Tucker stores that find their directions anew at every step share: a core and its factors on the tape."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping

import numpy as np

from lance_ref.algebra import projection_fast
from lance_ref.algebra.geometry import Geometry
from lance_ref.algebra.magnitude import near_one, scaled
from lance_ref.engine.counting import add, qr_macs, spending_on
from lance_ref.engine.tensor import FLOATS
from lance_ref.stores.base import ActivationStore, check_kept
from lance_ref.stores.lance import energy_ratio

UNFOLDED_BYTES = 4 * 2**20
"""Largest block of columns of an unfolding."""


class CoreAndFactors(ActivationStore):
    """Keep S and U_n of A ≈ S ×₁U_1 ×₂U_2 …, both on the tape, in the dtype of A.

    A mode of full rank is left alone: its factor would be a change of basis that loses nothing, costs
    n² elements and two products. If that holds for every mode, the activation itself is kept.

    Attributes
    ----------
    energy_kept : float or None
        ‖S‖² / ‖A‖² of the last activation saved, in [0, 1] up to rounding; None before the first, and
        for an activation of zeros.
    """

    def __init__(self) -> None:
        self.energy_kept: float | None = None

    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        """``core``, and ``factor_n`` of mode n.

        Raises
        ------
        TypeError, ValueError
            If the activation is not float32 or float64, is empty, does not fit, or contains NaN or infinity.
        """
        name = type(self).__name__
        check_activation(name, activation)
        self.check(activation.shape)
        unit, k = near_one(activation, f"{name}: an activation")  # directions come from squares
        with spending_on("decomposition"):
            factors = self.factors_of(unit)
        untouched = all(U is None for U in factors)
        core = unit if untouched else projection_fast.project(unit, factors)
        self.energy_kept = energy_ratio(core, unit)
        core = activation if untouched else scaled(core, k)
        check_kept(name, core, activation.shape)
        return {"core": core, **{factor_name(mode): U for mode, U in enumerate(factors) if U is not None}}

    @abstractmethod
    def factors_of(self, activation: np.ndarray) -> list[np.ndarray | None]:
        """The factor of each mode, None for one left alone; what is squared of ``activation`` stays in range."""

    def weight_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        core = saved["core"]
        factors = tuple(saved.get(factor_name(mode)) for mode in range(core.ndim))
        return projection_fast.weight_gradient(core, factors, grad_output, geometry)


def factor_name(mode: int) -> str:
    """The name of a mode's factor on the tape and in a checkpoint."""
    return f"factor_{mode}"


def unfolded_blocks(tensor: np.ndarray, mode: int) -> Iterator[np.ndarray]:
    """The columns of the mode-n unfolding, a block of them at a time, in the tensor's own dtype.

    Two products with a block in the cache beat two passes over the tensor, and no unfolding of the
    whole tensor is ever laid out. The first and the last mode of a contiguous tensor are not copied.

    Parameters
    ----------
    tensor : array of shape (n_0, n_1, …)
    mode : int

    Yields
    ------
    (n_mode, columns) arrays of at most :data:`UNFOLDED_BYTES` (or one column),
    each column of the unfolding in exactly one of them.
    """
    n = tensor.shape[mode]
    pre, post = math.prod(tensor.shape[:mode]), math.prod(tensor.shape[mode + 1 :])
    columns = max(1, UNFOLDED_BYTES // (tensor.itemsize * n))
    if post == 1:
        rows = tensor.reshape(pre, n)
        for start in range(0, pre, columns):
            yield rows[start : start + columns].T  # (n, columns)
        return
    slabs = tensor.reshape(pre, n, post)
    width, depth = min(post, columns), max(1, columns // post)
    for first in range(0, pre, depth):
        for start in range(0, post, width):
            block = slabs[first : first + depth, :, start : start + width]  # (depth, n, width)
            yield block[0] if len(block) == 1 else block.transpose(1, 0, 2).reshape(n, -1)  # (n, depth·width)


def orthonormal_basis(matrix: np.ndarray) -> np.ndarray:
    """Q of the thin QR decomposition of an (n, r) matrix, n ≥ r: orthonormal columns whatever the matrix.

    Householder reflections: columns that depend on others, or are zero, are completed to a basis.
    """
    from scipy.linalg import qr

    Q, _ = qr(matrix, mode="economic", check_finite=False)
    add(qr_macs(*matrix.shape))
    return np.array(Q, matrix.dtype, order="C")  # a buffer of its own


def check_activation(name: str, activation: np.ndarray) -> None:
    """Raise TypeError or ValueError unless there is something to decompose, in float32 or float64."""
    if activation.dtype not in FLOATS:
        raise TypeError(f"{name}: activation has dtype {activation.dtype}, expected float32 or float64")
    if not activation.size:
        raise ValueError(f"{name}: activation has shape {activation.shape}, which is empty")
