"""HOSVD: a fresh truncated higher-order SVD of every activation, at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lance_ref.algebra.grams import check_modes, select_modes
from lance_ref.algebra.magnitude import exponent, near_one, scaled
from lance_ref.algebra.modes import unfold
from lance_ref.algebra.tucker import check_epsilon, check_ranks, energy_rank
from lance_ref.engine.counting import add, eigh_macs, matmul
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Shape
from lance_ref.stores.core_and_factors import (
    CoreAndFactors,
    orthonormal_basis,
    unfolded_blocks,
)

Ranks = tuple[int | None, ...]


class Hosvd(CoreAndFactors):
    """Keep core and factors of a truncated HOSVD of each activation (Nguyen et al., arXiv 2411.06346).

    Forward finds U_n, the leading left singular vectors of the unfolding A_(n) of the whole activation,
    for each mode n, and keeps S = A ×₁U_1ᵀ ×₂U_2ᵀ … and the U_n; backward computes the weight gradient of
    Ã = S ×₁U_1 ×₂U_2 … without forming Ã (:mod:`lance_ref.algebra.projection`, the cheaper order).

    Parameters
    ----------
    epsilon : float
        Energy threshold in (0, 1]: each mode keeps the fewest directions that hold this share of
        ‖A‖². 1 keeps the activation itself, and decomposes nothing.
    ranks : sequence of int or None, optional
        One rank per mode in place of ``epsilon``; None, or the mode's size, leaves a mode alone.
    modes : sequence of str, optional
        Which modes ``epsilon`` compresses, as in :func:`lance_ref.calibrate`; all of them by default.

    Attributes
    ----------
    ranks : tuple of int or None
        Of the last activation saved, None for modes left alone; before the first, the ranks given, or None.
    shape : tuple of int or None
        Of the last activation saved.
    energy_kept : float or None
        ‖S‖² / ‖A‖² of the last activation saved.

    Notes
    -----
    The singular vectors are eigenvectors of the Gram matrix of the smaller side of A_(n) (see
    :func:`all_directions`), not of an SVD of the wide unfolding, which would be slower by far. The work
    is done in the activation's own dtype. In float32 that loses directions whose singular value is below
    about 3e-4 of the largest, which hold 1e-7 of the energy; it halves the time; and what is kept is
    float32 anyway. (Calibration, which runs once, affords float64.)

    An activation of zeros has no directions: rank 1 in every mode, a core of zeros, and dW = 0.
    """

    name = "hosvd"

    def __init__(
        self, epsilon: float = 0.7, ranks: Sequence[int | None] | None = None, modes: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        if ranks is not None and modes is not None:
            raise ValueError(f"ranks are {tuple(ranks)} and modes {tuple(modes)}, expected one of them or neither")
        self.epsilon = check_epsilon(epsilon) if ranks is None else None
        self.given = checked_ranks(ranks) if ranks is not None else None
        self.modes = check_modes(modes) if modes is not None else None
        self.ranks = self.given
        self.shape: Shape | None = None

    def describe(self) -> dict[str, Any]:
        selected = None if self.modes is None or self.shape is None else self._selected(self.shape)
        return {
            "name": self.name,
            "epsilon": self.epsilon,
            "ranks": self.ranks,
            "shape": self.shape,
            "selected": selected,
        }

    def settings(self) -> dict[str, Any]:
        return {"given": self.given, "modes": self.modes}

    def check(self, input_shape: Shape) -> None:
        if self.given is not None:
            check_ranks("Hosvd", input_shape, self.given)
        self._selected(input_shape)

    def factors_of(self, activation: np.ndarray) -> list[np.ndarray | None]:
        factors: list[np.ndarray | None] = [None] * activation.ndim
        # Every mode is decomposed from the whole activation, equations (1) to (3) on this batch alone.
        for mode, directions in all_directions(activation, self._wanted(activation.shape)).items():
            rank = directions.rank(self.epsilon) if self.given is None else self.given[mode]
            # A factor of full rank would lose nothing and keep n² numbers more.
            if rank is not None and rank < activation.shape[mode]:
                factors[mode] = directions.leading(rank)
        self.shape = activation.shape
        self.ranks = tuple(None if U is None else U.shape[1] for U in factors)
        return factors

    def _selected(self, shape: Shape) -> tuple[bool, ...]:
        return (True,) * len(shape) if self.modes is None else select_modes(state.path, shape, self.modes)

    def _wanted(self, shape: Shape) -> dict[int, int | None]:
        """The modes that have to be decomposed, each with its rank, or None where ``epsilon`` decides."""
        if self.given is not None:
            return {mode: r for mode, (n, r) in enumerate(zip(shape, self.given, strict=True)) if r and r < n}
        if self.epsilon == 1:
            return {}
        return {
            mode: None for mode, (n, yes) in enumerate(zip(shape, self._selected(shape), strict=True)) if yes and n > 1
        }


class Directions:
    """The singular values and vectors of one unfolding, the largest first.

    Parameters
    ----------
    energies : (m,) array
        Squared singular values in descending order, all divided by one power of two; all others are 0.
    vectors : (m, m) array
        Eigenvectors of the Gram matrix, as columns.
    tall : (n, m) array, optional
        The unfolding, where the Gram is that of its columns: its left singular vectors are then in the
        span of ``tall @ vectors``.
    """

    def __init__(self, energies: np.ndarray, vectors: np.ndarray, tall: np.ndarray | None = None) -> None:
        self.energies, self.vectors, self.tall = energies, vectors, tall

    def rank(self, epsilon: float | None) -> int:
        """The energy rank (:func:`~lance_ref.algebra.tucker.energy_rank`), and 1 for an unfolding of zeros."""
        assert epsilon is not None
        return energy_rank(self.energies, epsilon) if self.energies.any() else 1

    def leading(self, rank: int) -> np.ndarray:
        """The ``rank`` leading left singular vectors: (n, rank), orthonormal, signs arbitrary."""
        if self.tall is None:
            return np.array(self.vectors[:, :rank], order="C")  # a buffer of its own
        # A v_i = σ_i u_i: orthogonal already, but for those whose σ_i drowns in rounding
        return orthonormal_basis(matmul(self.tall, np.ascontiguousarray(self.vectors[:, :rank])))


def all_directions(activation: np.ndarray, wanted: Mapping[int, int | None]) -> dict[int, Directions]:
    """The directions of some modes of an activation, each from the untruncated activation.

    Parameters
    ----------
    activation : float32 or float64 array
    wanted : mapping of mode to int or None
        The modes, and the largest rank that will be asked for; None: what an energy threshold below 1 needs.

    Returns
    -------
    dict of mode to Directions

    Raises
    ------
    ValueError
        If the activation contains NaN or infinity.

    Notes
    -----
    A mode larger than the product m of the others has an unfolding of rank m at most, and gets its
    directions from the (m, m) Gram A_(n)ᵀ A_(n) (unless a rank above m is wanted, which only the larger
    Gram can give). The two unfoldings of a matrix are transposes of each other and share one Gram.
    """
    activation, _ = near_one(activation, "an activation")
    found: dict[int, Directions] = {}
    for mode in sorted(wanted, key=lambda mode: activation.shape[mode]):  # of a matrix, the smaller side first
        n, rank = activation.shape[mode], wanted[mode]
        rest = activation.size // n
        if n > rest and (rank is None or rank <= rest):
            tall = unfold(activation, mode)  # (n, rest)
            # The unfoldings of a matrix are transposes of each other: what was found for one serves the other.
            if activation.ndim == 2 and 1 - mode in found:
                found[mode] = Directions(found[1 - mode].energies, found[1 - mode].vectors, tall)
            else:
                found[mode] = Directions(*_eigenbasis([tall.T]), tall)
        else:
            found[mode] = Directions(*_eigenbasis(unfolded_blocks(activation, mode)))
    return dict(sorted(found.items()))


def _eigenbasis(blocks: Any) -> tuple[np.ndarray, np.ndarray]:
    """Energies, descending and up to a power of two, and eigenvectors of Σ X Xᵀ over blocks X, in their dtype."""
    from scipy.linalg import eigh

    # Equations (1) and (2), in the activation's own dtype.
    gram = _gram(blocks)
    gram = scaled(gram, -exponent(gram))  # LAPACK divides large and small matrices itself, by no power of two
    values, vectors = eigh(gram, driver="evd", check_finite=False, overwrite_a=True)
    add(eigh_macs(len(values)))
    return np.maximum(values[::-1], 0), vectors[:, ::-1]


def _gram(blocks: Any) -> np.ndarray:
    """Σ X Xᵀ over blocks X."""
    gram: np.ndarray | None = None
    for block in blocks:
        product = matmul(block, block.T)
        gram = product if gram is None else np.add(gram, product, out=gram)
        del product  # before that of the next block is there
    assert gram is not None
    return gram


def checked_ranks(ranks: Sequence[int | None]) -> Ranks:
    """``ranks`` as a tuple of positive integers or None, else a ValueError; the shape is checked when it is known."""
    result: list[int | None] = []
    for rank in ranks:
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1):
            raise ValueError(f"ranks are {tuple(ranks)}, expected a positive integer or None for each mode")
        result.append(None if rank is None else int(rank))
    return tuple(result)
