"""What calibration remembers of one layer: the sum of the Gram matrices of its inputs, mode by mode."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lance_ref.algebra.frame import Frame, feature_mode
from lance_ref.algebra.magnitude import common_unit, scaled
from lance_ref.algebra.subspace import Subspace, mode_names
from lance_ref.algebra.tucker import check_ranks, eigenbasis, energy_rank, gram
from lance_ref.engine.tensor import FLOATS, Shape

MODES = ("batch", "channel", "feature", "depth", "height", "width", "token")
"""What may be selected. Channel and feature are the same; height and width together are the tokens."""


class LayerGrams:
    """K_n = Σ_j A^(j)_(n) A^(j)_(n)ᵀ for the selected modes of one layer, in float64.

    Parameters
    ----------
    layer : str
        Path of the layer, for error messages.
    shape : tuple of int
        Shape of its activations; the batch size is that of the first one.
    selected : sequence of bool
        Which modes have a Gram.
    frame : Frame, optional
        What is taken out of every activation first.

    Attributes
    ----------
    unit : int
        The Grams are those of A·2^−unit: 0 but for float64 activations whose squares would leave the range.
    samples, batches : int
        Images and batches seen, each once, however often the layer ran on them.

    Raises
    ------
    ValueError
        If the feature mode is selected and no direction of it is left unprotected.
    """

    def __init__(self, layer: str, shape: Shape, selected: Sequence[bool], frame: Frame | None = None) -> None:
        self.layer = layer
        self.shape = shape
        self.mode_names = mode_names(shape)
        self.frame = Frame() if frame is None else frame
        if selected[feature_mode(shape)] and not self.free_directions:
            raise ValueError(
                f"layer {layer!r}: all {shape[feature_mode(shape)]} directions of its feature mode are protected, "
                "none is left to learn in; leave the layer out with layers=..."
            )
        self.grams = tuple(np.zeros((n, n)) if chosen else None for n, chosen in zip(shape, selected, strict=True))
        self.samples = 0
        self.batches = 0
        self._unit: int | None = None
        self._bases: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def free_directions(self) -> int:
        """Directions of the feature mode that are not protected."""
        protected = self.frame.protected
        return self.shape[feature_mode(self.shape)] - (0 if protected is None else protected.shape[1])

    @property
    def unit(self) -> int:
        return self._unit or 0

    def add(self, activation: np.ndarray, again: bool = False) -> None:
        """Add one activation's Grams; no reference to it stays behind.

        Parameters
        ----------
        activation : array of the layer's shape
        again : bool
            Whether the layer runs once more on the batch that the last activation was of: the activation then counts
            as no other samples and no other batch.

        Raises
        ------
        ValueError
            If its shape does not fit or it contains NaN or infinity; names the layer and both shapes.
        TypeError
            If it is not float32 or float64.
        """
        if activation.dtype not in FLOATS:
            raise TypeError(f"layer {self.layer!r}: activation is {activation.dtype}, expected float32 or float64")
        self._check_shape(activation.shape, "activation has", "that of the first batch")
        if not activation.size:
            raise ValueError(f"layer {self.layer!r}: activation has shape {activation.shape}, which is empty")
        # Mean or protected directions are taken out before anything is squared.
        activation = self._in_unit(self.frame.apply(activation))
        # Equation (1): the sums are all that stays, so no activation has to be kept.
        for mode, total in enumerate(self.grams):
            if total is not None:
                total += gram(activation, mode)
        self._count(activation.shape[0], again)

    def set_unit(self, unit: int) -> None:
        """Say in which unit Grams that were measured elsewhere are."""
        if abs(unit) > 2**12:
            raise ValueError(f"layer {self.layer!r}: its unit is 2**{unit}, which is no float64 number")
        self._unit = unit

    def _in_unit(self, activation: np.ndarray) -> np.ndarray:
        """The activation in the unit of the Grams, which are brought to a larger one first if it needs that."""
        before = self.unit
        self._unit = common_unit(self._unit, activation, f"layer {self.layer!r}: an activation")
        # A Gram is quadratic in A, so a unit of 2^u for A is one of 2^2u for K.
        for K in self.grams:
            if K is not None and self.unit > before:
                K[:] = scaled(K, 2 * (before - self.unit))
        return scaled(activation, -self.unit)

    def _count(self, samples: int, again: bool) -> None:
        if not again:
            self.samples += samples
            self.batches += 1
        self._bases.clear()

    def merged(self, other: LayerGrams) -> LayerGrams:
        """The Grams of both, as one run over all batches would have given; ValueError if they do not fit."""
        mine, theirs = self.selected_names, other.selected_names
        if mine != theirs:
            raise ValueError(f"layer {self.layer!r}: calibrated modes are {theirs}, expected {mine}")
        self._check_shape(other.shape, "the other calibration has", "that of this one")
        if not self.frame.same(other.frame):
            raise ValueError(
                f"layer {self.layer!r}: the other calibration has another mean or other protected directions; "
                "calibrate once over all batches"
            )
        result = LayerGrams(self.layer, self.shape, [K is not None for K in self.grams], self.frame)
        units = [grams._unit for grams in (self, other) if grams._unit is not None]
        result._unit = max(units, default=None)
        down, theirs_down = 2 * (self.unit - result.unit), 2 * (other.unit - result.unit)
        # Equation (1) is a sum over batches, so two calibrations add up like two batches.
        result.grams = tuple(
            None if a is None or b is None else scaled(a, down) + scaled(b, theirs_down)
            for a, b in zip(self.grams, other.grams, strict=True)
        )
        result.samples, result.batches = self.samples + other.samples, self.batches + other.batches
        return result

    @property
    def selected_names(self) -> tuple[str, ...]:
        """Names of the modes that have a Gram."""
        return tuple(name for name, K in zip(self.mode_names, self.grams, strict=True) if K is not None)

    def check_energy(self) -> None:
        """Raise ValueError if every activation seen was zero."""
        if not any(np.trace(K) > 0 for K in self.grams if K is not None):
            plain = self.frame.same(Frame())
            left = "were zero" if plain else "have nothing beside their mean or their protected directions"
            raise ValueError(
                f"layer {self.layer!r}: all activations of shape {self.shape} {left}, and a zero activation "
                "has no subspace; leave the layer out with layers=..."
            )

    def basis(self, mode: int) -> tuple[np.ndarray, np.ndarray]:
        """Energies (n,) and directions of one calibrated mode, computed once.

        There are n directions; of the feature mode as many fewer as are protected: with N a basis of
        their null space, U = N V for the eigenvectors V of Nᵀ K N, so that UᵀM = 0 whatever the energies.
        """
        if mode not in self._bases:
            K = self.grams[mode]
            assert K is not None
            if mode == feature_mode(self.shape) and self.frame.protected is not None:
                # Eigenvectors are sought among the combinations of N's columns, which are all orthogonal to M.
                N = self.frame.free_directions(len(K))  # (n, n - m)
                energies, vectors = eigenbasis(N.T @ K @ N)
                self._bases[mode] = np.pad(energies, (0, len(K) - len(energies))), N @ vectors
            else:
                self._bases[mode] = eigenbasis(K)
        return self._bases[mode]

    def subspace(self, epsilon: float, ranks: Sequence[int | None] | None = None) -> Subspace:
        """The leading directions of every calibrated mode, as many as ``epsilon`` (or ``ranks``) asks for."""
        factors: list[np.ndarray | None] = []
        spectra: list[np.ndarray | None] = []
        for mode, K in enumerate(self.grams):
            if K is None:
                factors.append(None)
                spectra.append(None)
                continue
            # Equations (2) and (3): directions by falling energy, and the first few that hold the share.
            energies, vectors = self.basis(mode)
            rank = energy_rank(energies[: vectors.shape[1]], epsilon) if ranks is None else ranks[mode]
            factors.append(None if rank is None else np.ascontiguousarray(vectors[:, :rank]))
            spectra.append(energies)
        return Subspace(
            self.shape,
            self.mode_names,
            tuple(factors),
            tuple(spectra),
            epsilon if ranks is None else None,
            self.samples,
            self.batches,
            self.frame,
        )

    def check_ranks(self, ranks: Sequence[int | None]) -> None:
        """Raise ValueError unless ``ranks`` fit the shape, None at least for the modes without a Gram."""
        check_ranks(f"layer {self.layer!r}", self.shape, ranks)
        for name, rank, K in zip(self.mode_names, ranks, self.grams, strict=True):
            if rank is not None and K is None:
                raise ValueError(
                    f"layer {self.layer!r}: ranks are {tuple(ranks)}, but its mode {name!r} was not calibrated; "
                    "expected None there"
                )
        rank = ranks[feature_mode(self.shape)]
        if rank is not None and rank > self.free_directions:
            raise ValueError(
                f"layer {self.layer!r}: ranks are {tuple(ranks)}, but only {self.free_directions} directions of its "
                "feature mode are not protected"
            )

    def _check_shape(self, shape: Shape, subject: str, whose: str) -> None:
        """The shape must be ours; the batch size only if the batch mode has a Gram."""
        if shape == self.shape or (self.grams[0] is None and shape[1:] == self.shape[1:]):
            return
        hint = ""
        if shape[1:] == self.shape[1:]:
            hint = "; the batch mode fixes the batch size: drop the odd batch, or leave 'batch' out of modes"
        raise ValueError(f"layer {self.layer!r}: {subject} shape {shape}, expected {self.shape}, {whose}{hint}")


def select_modes(layer: str, shape: Shape, modes: Sequence[str]) -> tuple[bool, ...]:
    """Which modes of an activation of this shape ``modes`` names; ValueError if it names none of them."""
    wanted = set(modes)
    if wanted & {"channel", "feature"}:
        wanted |= {"channel", "feature"}
    if wanted >= {"height", "width"}:
        wanted.add("token")
    names = mode_names(shape)
    selected = tuple(name in wanted for name in names)
    if not any(selected):
        raise ValueError(
            f"layer {layer!r}: modes are {tuple(modes)}, none of them one of {names}, the modes of its activation "
            f"of shape {shape}; add one, or leave the layer out with layers=..."
        )
    return selected


def check_modes(modes: Sequence[str]) -> tuple[str, ...]:
    """``modes`` as a tuple of known names, else a ValueError or TypeError that says what came."""
    if isinstance(modes, str):
        raise TypeError(f"modes is the text {modes!r}, expected a sequence of names such as ({modes!r},)")
    modes = tuple(modes)
    unknown = [name for name in modes if name not in MODES]
    if unknown or not modes:
        raise ValueError(f"modes are {modes}, expected one or more of {MODES}")
    return modes
