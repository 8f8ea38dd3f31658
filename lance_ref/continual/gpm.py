"""Gradient projection memory: every weight gradient loses its part along the protected directions, at every step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lance_ref.continual.bases import checked_bases
from lance_ref.engine.counting import matmul, spending_on
from lance_ref.engine.state import state
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers


class GPM:
    """Project the weight gradients of several layers out of their protected directions (Saha et al., ICLR 2021).

    With the weight as a matrix (C_out, n), n = I or C_in·k_h·k_w, and the basis M (n, m) of its layer,

        ∇W ← ∇W − (∇W M) Mᵀ,

    the paper's projection for fully connected layers and, on unfolded patches, for convolutions.

    ``protected`` maps layer paths to orthonormal bases; None, or no columns, is nothing to protect, and layers that
    are not named are left alone. The bases are in memory all through training, in the dtype of the weights; that is
    what LANCE saves. ValueError or TypeError if a layer is missing or a convolution with groups, or a basis does not
    fit it.

    Notes
    -----
    Where m = n the gradient is set to exactly zero, without a product and without keeping the basis: what
    the two products would leave is rounding alone, and a step along it is a step along M.

    More generally the projection leaves rounding of the size of the *whole* gradient, about 1e-7 ‖∇W‖ in float32,
    along M. If most of ∇W lies along M that is no longer small beside what remains; LANCE's gradient (G̃ᵀS) U_fᵀ is
    made of free directions alone and has no such remainder.

    Examples
    --------
    >>> from lance_ref import nn
    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> net[0].weight.grad = np.array([[3.0, 5.0]], np.float32)
    >>> GPM(net, {"0": np.array([[1.0], [0.0]])}).project()
    >>> net[0].weight.grad.tolist()
    [[0.0, 5.0]]
    """

    def __init__(self, net: Module, protected: Mapping[str, np.ndarray | None]) -> None:
        modules = weighted_layers(net)
        self._weights = {path: modules[path].weight for path in protected if path in modules}
        self.bases: dict[str, np.ndarray] = {}
        self.saturated: list[str] = []
        for path, M in checked_bases(net, protected).items():
            n, m = M.shape
            if m == n:
                self.saturated.append(path)
            elif m:
                self.bases[path] = M.astype(self._weights[path].dtype)

    @property
    def ram_bytes(self) -> int:
        """Bytes of the bases in memory."""
        return sum(M.nbytes for M in self.bases.values())

    def project(self) -> None:
        """Change ``weight.grad`` of every protected layer; call it after backward and before clipping and step.

        Takes 2·C_out·n·m multiply-adds a layer, booked as projection under the layer's path. A weight
        without a gradient is passed over.
        """
        for path in self.saturated:
            grad = self._weights[path].grad
            if grad is not None:
                self._weights[path].grad = np.zeros_like(grad)
        outer = state.path
        try:
            with spending_on("projection"):
                for path, M in self.bases.items():
                    grad = self._weights[path].grad
                    if grad is not None:
                        state.path = path
                        rows = grad.reshape(len(grad), -1)  # (C_out, n)
                        self._weights[path].grad = (rows - matmul(matmul(rows, M), M.T)).reshape(grad.shape)
        finally:
            state.path = outer
