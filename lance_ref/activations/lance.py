"""LANCE: keep the core of the activation in fixed, calibrated subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lance_ref import projection
from lance_ref.activations.base import ActivationStore
from lance_ref.geometry import Geometry, LinearGeometry
from lance_ref.tensor import FLOATS, Shape

if TYPE_CHECKING:
    from lance_ref.subspace import Subspace

ORDERS = ("auto", "papers", "separable")


class Lance(ActivationStore):
    """Keep the projection of the activation on fixed, calibrated subspaces (LANCE, arXiv 2509.21617).

    Forward keeps S = A ×₁U_1ᵀ ×₂U_2ᵀ … alone; backward computes the weight gradient of
    Ã = S ×₁U_1 ×₂U_2 … without forming Ã (:mod:`lance_ref.projection`).

    Parameters
    ----------
    subspace : Subspace
        One factor (n, r) per mode of the activation, None for a mode left alone.
    order : {"auto", "papers", "separable"}
        Order of contraction of a convolution's weight gradient; ``"auto"`` takes the one with fewer
        multiply-adds. A linear layer has one order only.
    dtype : numpy dtype
        float32 or float64: the dtype of the activations, to which the factors are converted.

    Attributes
    ----------
    energy_kept : float or None
        ‖S‖² / ‖A‖² of the last activation saved, in [0, 1] up to rounding; None before the first.

    Notes
    -----
    What is true. At full rank dW is backpropagation's to rounding. With only the feature mode of a
    linear layer compressed, dŴ = dW·U Uᵀ is an orthogonal projection of the weight gradient, so
    ⟨dW, dŴ⟩ = ‖dŴ‖² ≥ 0. With the batch mode compressed by a fixed U_1 this is *not* so:
    dŴ = Gᵀ U_1 U_1ᵀ A may even point against dW.
    """

    name = "lance"

    def __init__(self, subspace: Subspace, order: str = "auto", dtype: Any = np.float32) -> None:
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}, expected one of {ORDERS}")
        if np.dtype(dtype) not in FLOATS:
            raise TypeError(f"dtype is {np.dtype(dtype)}, expected float32 or float64")
        self.subspace = subspace
        self.order = order
        self.dtype = np.dtype(dtype)
        self.factors = tuple(None if U is None else np.ascontiguousarray(U, dtype=dtype) for U in subspace.factors)
        self.energy_kept: float | None = None

    @property
    def ranks(self) -> tuple[int | None, ...]:
        """Rank of each mode, None for a mode left alone."""
        return tuple(None if U is None else U.shape[1] for U in self.factors)

    @property
    def factor_bytes(self) -> int:
        """Bytes of the fixed factors: not on the tape, but in memory all through training."""
        return sum(U.nbytes for U in self.factors if U is not None)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "ranks": self.ranks, "shape": self.subspace.shape, "order": self.order}

    def check(self, input_shape: Shape) -> None:
        names, calibrated = self.subspace.mode_names, self.subspace.shape
        if len(input_shape) != len(calibrated):
            raise ValueError(f"activation has shape {input_shape}, but was calibrated with shape {calibrated}")
        for name, n, U in zip(names, input_shape, self.factors, strict=True):
            if U is not None and n != U.shape[0]:
                hint = (
                    "; a compressed batch mode fixes the batch size: calibrate with this one, or leave 'batch' out of "
                    "modes"
                    if name == "batch"
                    else ""
                )
                raise ValueError(
                    f"activation has shape {input_shape}, but the {name} mode was calibrated with {U.shape[0]} "
                    f"(shape {calibrated}){hint}"
                )

    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        self.check(activation.shape)
        if activation.dtype != self.dtype:
            raise TypeError(f"activation has dtype {activation.dtype}, but the factors were made for {self.dtype}")
        core = projection.project(activation, self.factors)
        self.energy_kept = energy_ratio(core, activation)
        return {"core": core}

    def weight_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        core = saved["core"]
        if isinstance(geometry, LinearGeometry):
            return projection.linear_weight_gradient(core, self.factors, grad_output, geometry)
        order = projection.cheaper_order(core.shape, self.factors, geometry) if self.order == "auto" else self.order
        contract = projection.papers_order if order == "papers" else projection.separable_order
        return contract(core, self.factors, grad_output, geometry)


def energy_ratio(core: np.ndarray, activation: np.ndarray) -> float | None:
    """‖S‖² / ‖A‖², or None for an activation of zeros."""
    total = float(np.vdot(activation, activation))
    return float(np.vdot(core, core)) / total if total > 0 else None
