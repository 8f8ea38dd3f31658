"""ASI: one warm-started subspace iteration per mode and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lance_ref.algebra.tucker import check_ranks
from lance_ref.engine.counting import matmul
from lance_ref.engine.tensor import Shape
from lance_ref.stores.core_and_factors import (
    CoreAndFactors,
    factor_name,
    orthonormal_basis,
    unfolded_blocks,
)
from lance_ref.stores.hosvd import checked_ranks


class Asi(CoreAndFactors):
    """Keep core and factors of fixed ranks, the factors by subspace iteration (Nguyen et al., arXiv 2505.05086).

    Forward takes, for each mode n, one step of subspace iteration on the untruncated activation from the
    factor of the step before:

    V = A_(n)ᵀ U_prev;  U_n = orth(A_(n) V), by QR;  S = A ×₁U_1ᵀ ×₂U_2ᵀ …

    and keeps S and the U_n. On activations that change slowly the U_n approach those of the HOSVD, at the
    price of two thin products per mode in place of a Gram matrix and its eigenvectors.

    Parameters
    ----------
    ranks : sequence of int or None
        One per mode; None, or the mode's size, leaves a mode alone. See :mod:`lance_ref.lance.asi_ranks`.
    seed : int
        Of the random factors that the iteration starts from.

    Attributes
    ----------
    energy_kept : float or None
        ‖S‖² / ‖A‖² of the last activation saved.

    Notes
    -----
    *Restarts.* A mode whose size is not that of the step before (the batch mode, when the last batch of
    an epoch is smaller) starts again from random directions, the same ones for the same size. A layer that
    runs several times in a step goes on from call to call.

    *Memory.* The factors kept for the next step are the very arrays on the tape. While the tape lives they
    take no memory of their own, so ``factor_bytes`` is 0; between backward and the next forward pass they
    stay, Σ n·r elements, when the tape is gone.

    *Degenerate activations.* QR by Householder reflections completes dependent columns to a basis. Where
    A_(n) V is zero altogether, as for a dead layer, there is nothing to learn, and U_prev stays.
    """

    name = "asi"

    def __init__(self, ranks: Sequence[int | None], seed: int = 0) -> None:
        super().__init__()
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"seed is {seed!r}, expected a non-negative integer")
        self.ranks = checked_ranks(ranks)
        self.seed = int(seed)
        self._factors: dict[int, np.ndarray] = {}

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "ranks": self.ranks}

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def check(self, input_shape: Shape) -> None:
        check_ranks("Asi", input_shape, self.ranks)

    def factors_of(self, activation: np.ndarray) -> list[np.ndarray | None]:
        factors: list[np.ndarray | None] = [None] * activation.ndim
        for mode, (n, rank) in enumerate(zip(activation.shape, self.ranks, strict=True)):
            if rank is not None and rank < n:
                factors[mode] = self._iterate(activation, mode, rank)
        # The warm start: the next activation is nearly this one, so these directions are nearly right.
        self._factors = {mode: U for mode, U in enumerate(factors) if U is not None}
        return factors

    def _iterate(self, activation: np.ndarray, mode: int, rank: int) -> np.ndarray:
        """U = orth(A_(n) A_(n)ᵀ U_prev), block by block of the columns of A_(n)."""
        U_prev = self._start(mode, activation.shape[mode], rank).astype(activation.dtype, copy=False)
        # A_(n) A_(n)ᵀ is K_n of equation (1). Each product with it turns U towards its leading eigenvectors (2).
        image = _image(activation, mode, U_prev)
        return orthonormal_basis(image if image.any() else U_prev)

    def _start(self, mode: int, n: int, rank: int) -> np.ndarray:
        """The factor of the step before if it fits, else random directions."""
        U = self._factors.get(mode)
        if U is not None and U.shape == (n, rank):
            return U
        return np.random.default_rng((self.seed, mode, n)).standard_normal((n, rank))

    def state(self) -> dict[str, np.ndarray]:
        """The factors to go on from: ``factor_n`` of mode n, (n, r)."""
        return {factor_name(mode): U for mode, U in self._factors.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what :meth:`state` returned; an empty one means from the start.

        Raises
        ------
        ValueError
            If a name or the rank of a factor is not one of ours. Nothing has been changed then.
        """
        ranks = {factor_name(mode): rank for mode, rank in enumerate(self.ranks) if rank is not None}
        for name, U in state.items():
            if name not in ranks:
                raise ValueError(f"Asi: the state holds {name!r}, expected some of {sorted(ranks)}")
            if U.ndim != 2 or U.shape[1] != ranks[name]:
                raise ValueError(f"Asi: {name} of the state has shape {U.shape}, expected (n, {ranks[name]})")
        modes = {factor_name(mode): mode for mode in range(len(self.ranks))}
        self._factors = {modes[name]: np.array(U, order="C") for name, U in state.items()}


def _image(activation: np.ndarray, mode: int, U: np.ndarray) -> np.ndarray:
    """A_(n) A_(n)ᵀ U, (n, rank), block by block of the columns of A_(n)."""
    image = np.zeros_like(U, order="C")
    for block in unfolded_blocks(activation, mode):  # (n, columns)
        # From right to left, so that no (n, n) Gram matrix is formed.
        V = matmul(U.T, block)  # (rank, columns)
        image += matmul(block, V.T)
    return image
