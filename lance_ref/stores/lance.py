"""LANCE: keep the core of the activation in fixed, calibrated subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lance_ref.algebra import projection, projection_fast
from lance_ref.algebra.basis import Basis, orthonormal
from lance_ref.algebra.convolution import Convolution
from lance_ref.algebra.frame import along, feature_mode
from lance_ref.algebra.geometry import WORKSPACE_BYTES, Geometry
from lance_ref.algebra.magnitude import exponent, scaled
from lance_ref.engine.blocks import FEW_ELEMENTS
from lance_ref.engine.tensor import FLOATS, Shape
from lance_ref.engine.workers import blas_alone
from lance_ref.stores.base import ActivationStore, check_kept
from lance_ref.stores.core_wrappers import CalibratedBatch, Codes, Numbers, SketchedBatch
from lance_ref.stores.sketch import BatchSketch

if TYPE_CHECKING:
    from lance_ref.algebra.subspace import Subspace

ORDERS = ("auto", "papers", "separable")
BATCH_MODES = ("calibrated", "sketch")
DEFAULT_BATCH_RATIO = 1 / 8
BATCH_HINT = "; a compressed batch mode fixes the batch size: calibrate with this one, or leave 'batch' out of modes"


class _Narrow(NamedTuple):
    """What a layer that trains in Q needs: Q, and the feature mode's factor and the mean in its coordinates.

    A ``factor`` of None is the identity, Q = U.
    """

    basis: Basis
    factor: np.ndarray | None
    mean: np.ndarray | None

    @property
    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """Those that the store does not have without it."""
        return () if self.factor is None else (self.basis.directions, self.factor, self.mean)


class Lance(ActivationStore):
    """Keep the projection of the activation on fixed, calibrated subspaces (LANCE, arXiv 2509.21617).

    Forward keeps S = A ×₁U_1ᵀ ×₂U_2ᵀ … alone; backward computes the weight gradient of
    Ã = S ×₁U_1 ×₂U_2 … without forming Ã (:mod:`lance_ref.algebra.projection`).

    Parameters
    ----------
    subspace : Subspace
        One factor (n, r) per mode of the activation, None for a mode left alone.
    order : {"auto", "papers", "separable"}
        Order of contraction of a convolution's weight gradient; ``"auto"`` takes that of fewest multiply-adds
        (:func:`~lance_ref.algebra.projection_fast.cheapest_order`), and height and width of a small map in one product,
        here and in the projection: more multiply-adds, less time
        (:func:`~lance_ref.algebra.projection_fast.product_of_modes`). A linear layer has one order only.
    dtype : numpy dtype
        float32 or float64: the dtype of the activations, to which the factors are converted.
    core_bits : {None, 8, 4}
        Keep the core as affine codes of so many bits (:func:`~lance_ref.stores.quantized.quantise`): one range
        for each slice of the feature mode, or for the whole core where such a slice is small
        (:data:`~lance_ref.stores.core_wrappers.SLICE_ENTRIES`). The slices belong to directions of falling energy, and
        a common range would spend most of its steps on the first: in MobileNetV2's last layers ranges of their own made
        the error 3 to 8 times smaller, as 1.4 to 3 bits more would. Two float32 a slice cost 64/m bits an entry, m
        entries a slice.
    batch_mode : {"calibrated", "sketch"}
        ``"sketch"``: the batch mode is projected on directions drawn anew at every step
        (:class:`~lance_ref.stores.sketch.BatchSketch`). A calibrated batch factor is then ignored and not kept,
        and any batch size will do.
    batch_ratio : float, optional
        Of a sketch: r_1 = max(1, round(batch_ratio·n)) for a batch of n; 1/8 by default.
    seed : int
        Of a sketch, together with the number of activations saved so far.

    A subspace that was calibrated with ``center=True`` has a mean μ: then S is the core of A − μ, and the exact weight
    gradient of μ, which needs Σ_b G alone, is added (:func:`~lance_ref.algebra.projection.mean_weight_gradient`).

    Attributes
    ----------
    shape : tuple of int
        Of the activations that it was calibrated with.
    energy_kept : float or None
        ‖S‖² / ‖A‖² of the last activation saved (of A − μ with a mean), in [0, 1] up to rounding; None before the
        first. Taken before the core becomes codes. With a sketch it is an unbiased estimate of the share that the
        other modes keep (the sketch itself keeps ‖A‖² in the mean), and may exceed 1.

    Notes
    -----
    What is true of dŴ, the gradient from the core, beside dW, backpropagation's:

    1. At full rank, without options, dŴ = dW to rounding.
    2. With the feature mode alone compressed, in a linear layer or a convolution of one group, dŴ = dW ×₂ U Uᵀ is an
       orthogonal projection of the weight gradient (×₁ of a transposed one, whose weight has the input channels
       first), so ⟨dW, dŴ⟩ = ‖dŴ‖² ≥ 0: a descent direction unless it is zero.
       With groups it need not be: Ã mixes channels of different groups. A depthwise 1×1 convolution of channels
       (2, −4) and U = (1, 1)/√2 has dW = (2, 0) and dŴ = (−1, 0).
    3. With the batch mode compressed by a fixed U_1 it is *not* one: dŴ = Gᵀ U_1 U_1ᵀ A may point against dW, with a
       cosine of −1 for two images of one number. In general ⟨dW, dŴ⟩ = tr(Gᵀ Q K G) with Q the projection of all
       modes but the feature mode and K = A P Aᵀ; it is ≥ 0 for every G exactly if Q and K commute. The same holds for
       height and width, over which the weight gradient sums as it does over the batch.
    4. Directions U_1 of the very batch (HOSVD at every step) are harmless for an A of two modes, where
       U_1 U_1ᵀ A U_2 U_2ᵀ = A V Vᵀ if the singular values differ at the cut: case 2. With tokens or pixels they
       are not.
    5. With the sketched batch mode E[dŴ] is the gradient with the batch mode left alone: where case 2 holds for the
       rest, E⟨dW, dŴ⟩ = ‖E dŴ‖² ≥ 0, a descent direction in the mean and not at every step.

    How often it happens, in random cases and in training: ``python -m experiments.descent``, and its results in
    ``experiments/results/descent.json``. Codes (``core_bits``) disturb all of these by rounding to half a step of the
    core.
    """

    name = "lance"

    def __init__(
        self,
        subspace: Subspace,
        order: str = "auto",
        dtype: Any = np.float32,
        core_bits: int | None = None,
        batch_mode: str = "calibrated",
        batch_ratio: float | None = None,
        seed: int = 0,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}, expected one of {ORDERS}")
        if np.dtype(dtype) not in FLOATS:
            raise TypeError(f"dtype is {np.dtype(dtype)}, expected float32 or float64")
        if batch_mode not in BATCH_MODES:
            raise ValueError(f"batch_mode is {batch_mode!r}, expected one of {BATCH_MODES}")
        if batch_ratio is not None and batch_mode != "sketch":
            raise ValueError(f"batch_ratio is {batch_ratio}, but batch_mode is {batch_mode!r}, expected 'sketch'")
        self.shape, self.mode_names = subspace.shape, subspace.mode_names  # its float64 factors need not stay alive
        self.order = order
        self.dtype = np.dtype(dtype)
        self.factors = tuple(None if U is None else np.ascontiguousarray(U, dtype=dtype) for U in subspace.factors)
        mean = subspace.frame.mean
        self.mean = None if mean is None else mean.astype(dtype)
        self.coding = Numbers() if core_bits is None else Codes(core_bits)
        self.batch = CalibratedBatch()
        self._batch_size = subspace.shape[0]  # of the last activation
        self._narrow: _Narrow | None = None  # of a layer that trains in the subspace
        if batch_mode == "sketch":
            self.batch = SketchedBatch(DEFAULT_BATCH_RATIO if batch_ratio is None else batch_ratio, seed)
            self.factors = (None, *self.factors[1:])
        self.energy_kept: float | None = None

    @property
    def by_image(self) -> bool:  # type: ignore[override]
        """Whether neither the batch mode is compressed nor codes share a range with other images."""
        return self.factors[0] is None and self.sketch is None and self.core_bits is None

    @property
    def core_bits(self) -> int | None:
        """Bits of the core's codes, None for a core that is kept as it is."""
        return self.coding.bits

    @property
    def sketch(self) -> BatchSketch | None:
        """Where the directions of a sketched batch mode come from."""
        return self.batch.sketch

    @property
    def batch_mode(self) -> str:
        """Where the directions of the batch mode come from, one of :data:`BATCH_MODES`."""
        return "calibrated" if self.sketch is None else "sketch"

    @property
    def ranks(self) -> tuple[int | None, ...]:
        """Rank of each mode, None for a mode left alone; that of a sketch belongs to the last batch."""
        return self._ranks_for(self._batch_size)

    def _ranks_for(self, batch: int) -> tuple[int | None, ...]:
        ranks = [None if U is None else U.shape[1] for U in self.factors]
        if self.sketch is not None:
            ranks[0] = self.sketch.rank(batch)
        return tuple(ranks)

    @property
    def factor_bytes(self) -> int:
        """Bytes of the fixed factors and the mean: not on the tape, but in memory all through training.

        With those of a basis that is not the feature mode's factor itself (:meth:`basis`).
        """
        own = () if self._narrow is None else self._narrow.arrays
        return sum(array.nbytes for array in (*self.factors, self.mean, *own) if array is not None)

    def describe(self) -> dict[str, Any]:
        description: dict[str, Any] = {"name": self.name, "ranks": self.ranks, "shape": self.shape, "order": self.order}
        if self.mean is not None:
            description["centred"] = True
        if self.core_bits is not None:
            description["core_bits"] = self.core_bits
        if self.sketch is not None:
            description |= {"batch_mode": "sketch", "batch_ratio": self.sketch.ratio}
        return description

    def settings(self) -> dict[str, Any]:
        return {} if self.sketch is None else {"seed": self.sketch.seed}

    def fixed(self) -> dict[str, np.ndarray]:
        arrays = {f"factor_{mode}": U for mode, U in enumerate(self.factors)} | {"mean": self.mean}
        return {name: array for name, array in arrays.items() if array is not None}

    def state(self) -> dict[str, np.ndarray]:
        return {} if self.sketch is None else self.sketch.state()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        if self.sketch is None:
            super().load_state(state)
        else:
            self.sketch.load_state(self.name, state)

    def check(self, input_shape: Shape) -> None:
        names, calibrated = self.mode_names, self.shape
        if len(input_shape) != len(calibrated):
            raise ValueError(f"activation has shape {input_shape}, but was calibrated with shape {calibrated}")
        for name, n, U in zip(names, input_shape, self.factors, strict=True):
            if U is not None and n != U.shape[0]:
                hint = BATCH_HINT if name == "batch" else ""
                raise ValueError(
                    f"activation has shape {input_shape}, but the {name} mode was calibrated with {U.shape[0]} "
                    f"(shape {calibrated}){hint}"
                )

    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        """``core``, or its ``codes``, ``minimum`` and ``maximum``; with a sketch its ``seed`` too."""
        self._check(activation)
        step = self.batch.next_step()  # a seed, where the directions of the batch are drawn anew
        core = self._core(activation, self._factors(step, len(activation)))
        self.energy_kept = energy_ratio(core, activation, self.mean)
        return {**self.coding.pack(core), **step}

    def basis(self, groups: int, forward: str = "auto") -> Basis | None:
        """Q of the feature mode: its factor U, of one group without a mean; None if that mode is left alone.

        With groups, or with a mean, which is one more direction, Q_j is an orthonormal basis of each group's rows.
        """
        mode = feature_mode(self.shape)
        U = self.factors[mode]
        if U is None:
            return None
        directions, own = orthonormal(U, self.mean, groups)
        found = Basis(directions, forward=forward)
        mean = None if self.mean is None else found.coordinates(self.mean.reshape(groups, -1)).reshape(-1)
        self._narrow = _Narrow(found, own, mean)
        return found

    def update_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry, basis: Basis
    ) -> np.ndarray:
        """The weight gradient before its channels come back, (C_out, r, k_h, k_w).

        It is LANCE's weight gradient of the layer D on Qᵀ A, whose channels have the coordinates of U for their factor.
        """
        narrow = self._narrow
        if narrow is None or narrow.basis is not basis:
            return super().update_gradient(saved, grad_output, geometry, basis)
        factors = list(self._factors(saved, len(grad_output)))
        factors[feature_mode(self.shape)] = narrow.factor
        return self._gradient(saved, grad_output, basis.up(geometry), factors, narrow.mean)

    def weight_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        return self._gradient(saved, grad_output, geometry, self._factors(saved, len(grad_output)), self.mean)

    def _gradient(
        self,
        saved: Mapping[str, np.ndarray],
        grad_output: np.ndarray,
        geometry: Geometry,
        factors: projection.Factors,
        mean: np.ndarray | None,
    ) -> np.ndarray:
        shape = tuple(n if U is None else U.shape[1] for n, U in zip(geometry.input_shape, factors, strict=True))
        core = self.coding.unpack(saved, shape)
        # Equations (5) to (8), in the order of fewest multiply-adds.
        gradient = projection_fast.weight_gradient(core, factors, grad_output, geometry, self.order)
        if mean is not None:
            # The weight gradient is linear in A, so that of μ, which is exact, and that of A − μ add up.
            gradient += projection.mean_weight_gradient(mean, grad_output, geometry)
        return gradient

    def order_for(self, geometry: Convolution) -> str:
        """The order in which a weight gradient of that geometry is contracted, in words: what ``"auto"`` comes to.

        >>> from lance_ref.algebra.geometry import ConvGeometry
        >>> from lance_ref.algebra.subspace import Subspace
        >>> store = Lance(Subspace.random((8, 6, 5, 4), (2, 3, 1, 2), np.random.default_rng(0)))
        >>> store.order_for(ConvGeometry((8, 6, 5, 4), (10, 6, 3, 2)))
        'separable, channel put back first'
        """
        if self.order != "auto":
            return self.order
        order, expanded = projection_fast.cheapest_order(self._ranks_for(geometry.input_shape[0]), geometry)
        back = " and ".join(self.mode_names[mode] for mode in expanded)
        return f"{order}, {back} put back first" if back else order

    def _check(self, activation: np.ndarray) -> None:
        """Raise ValueError or TypeError unless the factors fit; note the size of the batch."""
        self.check(activation.shape)
        if activation.dtype != self.dtype:
            raise TypeError(f"activation has dtype {activation.dtype}, but the factors were made for {self.dtype}")
        self._batch_size = len(activation)

    def _factors(self, step: Mapping[str, np.ndarray], batch: int) -> projection.Factors:
        return self.batch.factors(self.factors, step, batch, self.dtype)

    def _core(self, activation: np.ndarray, factors: projection.Factors) -> np.ndarray:
        """S of A, or of A − μ, equation (4); it is finite."""
        with np.errstate(invalid="ignore", over="ignore"):  # reported below, by name
            core = projection_fast.project(activation, factors, self.order)
            if self.mean is not None:
                # A − μ is never laid out whole, because its core is that of A less that of μ.
                core -= projection.project_mean(self.mean, factors, activation.shape)
        check_kept("Lance", core, activation.shape)
        return core


def energy_ratio(core: np.ndarray, activation: np.ndarray, mean: np.ndarray | None = None) -> float | None:
    """‖S‖² / ‖A‖², or with a mean ‖S‖² / ‖A − μ‖²; None for an activation of zeros."""
    total = _energy_around(mean, activation)
    range_of = np.finfo(activation.dtype)
    least = range_of.smallest_normal / range_of.eps**2  # below, squares that are lost begin to matter
    if not least <= total <= range_of.max:
        k = -max(exponent(array, "an activation") for array in (activation, mean) if array is not None)
        core, activation, mean = scaled(core, k), scaled(activation, k), None if mean is None else scaled(mean, k)
        total = _energy_around(mean, activation)
    return _energy(core) / total if total > 0 else None


def _energy_around(mean: np.ndarray | None, activation: np.ndarray) -> float:
    """‖A − μ‖², a few images at a time where there is a μ."""
    if mean is None:
        return _energy(activation)
    images = max(1, WORKSPACE_BYTES // max(activation[:1].nbytes, 1))
    blocks = (activation[start : start + images] for start in range(0, len(activation), images))
    return sum(_energy(block - along(mean, activation.shape)) for block in blocks)


def _energy(array: np.ndarray) -> float:
    if array.size <= FEW_ELEMENTS:  # BLAS takes one thread for these anyway
        return float(np.vdot(array, array))
    with blas_alone:  # a thread of BLAS's own would spin on afterwards
        return float(np.vdot(array, array))
