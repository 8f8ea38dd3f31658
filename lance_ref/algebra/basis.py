"""The directions in which a layer's weight moves, where its gradients lie in a fixed subspace.

Notation. W (C_out, C_in/g, k_h, k_w) is the weight, with g groups, Q_j (C_in/g, r) an orthonormal basis for the
channels of group j, and D (C_out, r, k_h, k_w) what trains:

    W = s·W_0 + D ×₂ Q,      (D ×₂ Q)[o,c,p,q] = Σ_i D[o,i,p,q] · Q_j[c,i] for o in group j.

W_0 stays as it is; the scalar s is what weight decay leaves of it. ∂L/∂D is ∂L/∂W ×₂ Qᵀ, and as the columns of Q_j are
orthonormal, a gradient dW = dD ×₂ Q has the norm of dD. With Y = X ⋆ W there are two ways to the output:

    merged      W is written down, then Y = X ⋆ W;
    factored    Y = s·(X ⋆ W_0) + (Qᵀ X) ⋆ D.

The second is LoRA with a fixed A = Qᵀ. It never has W, and takes fewer multiply-adds where an input has fewer places
than the weight has channels.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lance_ref.algebra.geometry import ConvGeometry, Geometry, LinearGeometry
from lance_ref.algebra.projection import put_channels_back
from lance_ref.engine.tensor import Shape

FORWARDS = ("auto", "merged", "factored")


@dataclass(frozen=True, eq=False)
class Basis:
    """Q of one layer.

    Attributes
    ----------
    directions : (g, n, r) array
        Orthonormal columns for each group: directions of channels, of features, or of patches.
    patches : bool
        Whether they are directions of a convolution's patches, n = C_in·k_h·k_w, so that D is a 1x1 kernel.
    forward : {"auto", "merged", "factored"}
        How the output is computed; ``"auto"`` takes the way of fewer multiply-adds.
    """

    directions: np.ndarray
    patches: bool = False
    forward: str = "auto"

    def __post_init__(self) -> None:
        if self.forward not in FORWARDS:
            raise ValueError(f"forward is {self.forward!r}, expected one of {', '.join(FORWARDS)}")
        if self.directions.ndim != 3:
            raise ValueError(f"directions have shape {self.directions.shape}, expected (groups, n, r)")
        if self.patches and len(self.directions) != 1:
            raise ValueError(f"directions of patches have {len(self.directions)} groups, expected 1")

    @property
    def rank(self) -> int:
        """r"""
        return self.directions.shape[2]

    def describe(self) -> dict[str, Any]:
        """What a trace says about it."""
        return {"rank": self.rank, "patches": self.patches, "forward": self.forward}

    # ---- shapes ----------------------------------------------------------------------------

    def update_shape(self, weight_shape: Shape) -> Shape:
        """The shape of D for a weight of that shape.

        Raises
        ------
        ValueError
            If the directions have another number of channels or features.
        """
        width = math.prod(weight_shape[1:]) if self.patches else weight_shape[1]
        groups, n, r = self.directions.shape
        if n != width or weight_shape[0] % groups:
            raise ValueError(
                f"directions have shape {self.directions.shape}, which does not fit a weight of shape {weight_shape}: "
                f"expected ({groups}, {width}, r)"
            )
        kernel = (1,) * len(weight_shape[2:]) if self.patches else weight_shape[2:]
        return (weight_shape[0], r, *kernel)

    def pays(self, weight_shape: Shape) -> bool:
        """Whether D has fewer numbers than the weight."""
        return math.prod(self.update_shape(weight_shape)) < math.prod(weight_shape)

    def down(self, geometry: Geometry) -> Geometry:
        """The layer Qᵀ, from X to the coordinates of its channels, features or patches."""
        g, n, r = self.directions.shape
        if isinstance(geometry, LinearGeometry):
            return LinearGeometry(geometry.input_shape, (r, n))
        if self.patches:
            return dataclasses.replace(geometry, weight_shape=(r, *geometry.weight_shape[1:]))
        return ConvGeometry(geometry.input_shape, (g * r, n, 1, 1), groups=g)

    def up(self, geometry: Geometry) -> Geometry:
        """The layer D, from these coordinates to the output: what LANCE has the weight gradient of."""
        weight_shape = self.update_shape(geometry.weight_shape)
        g, _, r = self.directions.shape
        if isinstance(geometry, LinearGeometry):
            return LinearGeometry((*geometry.input_shape[:-1], r), weight_shape)
        if self.patches:
            return ConvGeometry(self.down(geometry).output_shape, weight_shape)
        B, _, H, W = geometry.input_shape
        return dataclasses.replace(geometry, input_shape=(B, g * r, H, W), weight_shape=weight_shape)

    # ---- between the weight and its coordinates ----------------------------------------------

    def expand(self, update: np.ndarray, weight_shape: Shape) -> np.ndarray:
        """D ×₂ Q, the change of the weight."""
        C_out, r = update.shape[:2]
        places = update.reshape(C_out, r, -1, 1).transpose(0, 2, 3, 1)  # (C_out, k, 1, r)
        return put_channels_back(places, self._rows).reshape(weight_shape)

    def coordinates(self, gradient: np.ndarray) -> np.ndarray:
        """dW ×₂ Qᵀ, the gradient of D that belongs to a gradient of the weight."""
        shape = self.update_shape(gradient.shape)
        n = self.directions.shape[1]
        places = gradient.reshape(len(gradient), n, -1, 1).transpose(0, 2, 3, 1)  # (C_out, k, 1, n)
        return put_channels_back(places, self.directions).reshape(shape)

    def merged(self, weight: np.ndarray, decay: np.ndarray, update: np.ndarray) -> np.ndarray:
        """W = s·W_0 + D ×₂ Q, a new array."""
        whole = self.expand(update, weight.shape)
        whole += weight if decay == 1 else weight * decay
        return whole

    # ---- the layer ---------------------------------------------------------------------------

    def way(self, geometry: Geometry) -> str:
        """``"merged"`` or ``"factored"``: how the output of such a call is computed.

        Writing W down takes C_out·C_in/g·k_h·k_w·r multiply-adds, the two narrow layers as many as they have.

        >>> basis = Basis(np.eye(64, 4)[None])
        >>> basis.way(LinearGeometry((128, 64), (32, 64))), basis.way(LinearGeometry((1, 64), (32, 64)))
        ('merged', 'factored')
        """
        if self.forward != "auto":
            return self.forward
        merging = math.prod(geometry.weight_shape) * self.rank
        narrow = sum(macs(layer) for layer in (self.down(geometry), self.up(geometry)))
        return "merged" if merging <= narrow else "factored"

    def output(
        self, x: np.ndarray, weight: np.ndarray, decay: np.ndarray, update: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        """Y = X ⋆ (s·W_0 + D ×₂ Q)."""
        if self.way(geometry) == "merged":
            return geometry.forward(x, self.merged(weight, decay, update))
        out = geometry.forward(x, weight)
        if decay != 1:
            out *= decay
        out += self.up(geometry).forward(self.down(geometry).forward(x, self._down_weight(geometry)), update)
        return out

    def input_gradient(
        self, weight: np.ndarray, decay: np.ndarray, update: np.ndarray, grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        """dX, in the same way as the output: Wᵀ G, or s·W_0ᵀ G + Q (Dᵀ G)."""
        if self.way(geometry) == "merged":
            return geometry.input_gradient(self.merged(weight, decay, update), grad_output)
        grad = geometry.input_gradient(weight, grad_output)
        if decay != 1:
            grad *= decay
        narrow = self.up(geometry).input_gradient(update, grad_output)
        grad += self.down(geometry).input_gradient(self._down_weight(geometry), narrow)
        return grad

    def _down_weight(self, geometry: Geometry) -> np.ndarray:
        """Qᵀ as the weight of :meth:`down`."""
        return self._rows.reshape(self.down(geometry).weight_shape)

    @cached_property
    def _rows(self) -> np.ndarray:
        """(g, r, n), a look at the directions."""
        return self.directions.transpose(0, 2, 1)


def macs(geometry: Geometry) -> int:
    """Multiply-adds of the output of a layer: one for each number of a weight's row, at every place."""
    return math.prod(geometry.output_shape) * math.prod(geometry.weight_shape[1:])


def orthonormal(factor: np.ndarray, mean: np.ndarray | None, groups: int) -> tuple[np.ndarray, np.ndarray | None]:
    """An orthonormal basis of what each group's rows of a factor, and of a mean, span.

    A factor of one group has orthonormal columns itself. The rows that belong to one of several groups do not, and a
    mean lies where it will: their basis is that of a QR decomposition in float64.

    Parameters
    ----------
    factor : (C, r) array
    mean : (C,) array or None
        One more direction.
    groups : int
        Divides C.

    Returns
    -------
    directions : (g, C/g, r') array
        r' = r, or r + 1 with a mean, and at most C/g.
    coordinates : (g·r', r) array or None
        Q_jᵀ times the rows of group j, one below the other; None for the identity.
    """
    if groups == 1 and mean is None:
        return factor[None], None
    wide = factor if mean is None else np.column_stack([factor, mean])
    blocks = wide.reshape(groups, -1, wide.shape[1]).astype(np.float64)  # (g, C/g, r or r + 1)
    directions, _ = np.linalg.qr(blocks)  # (g, C/g, r')
    of_groups = factor.reshape(groups, -1, factor.shape[1])
    coordinates = (directions.transpose(0, 2, 1) @ of_groups).reshape(-1, factor.shape[1])
    return np.ascontiguousarray(directions, factor.dtype), np.ascontiguousarray(coordinates, factor.dtype)
