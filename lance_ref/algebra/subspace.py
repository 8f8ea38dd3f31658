"""A subspace: for one layer, the fixed directions of each mode that an activation is projected on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lance_ref.algebra.frame import Frame
from lance_ref.algebra.tucker import check_epsilon, check_ranks
from lance_ref.engine.tensor import Shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODE_NAMES = {
    2: ("batch", "feature"),
    3: ("batch", "token", "feature"),
    4: ("batch", "channel", "height", "width"),
    5: ("batch", "channel", "depth", "height", "width"),
}
"""Names of the modes of an activation by its number of dimensions: linear (2, 3), convolution (4), of volumes (5)."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """One factor per mode of a layer's input, and where it came from.

    Parameters
    ----------
    shape : tuple of int
        Shape of the activation, batch included: (B, C, H, W), (B, C, D, H, W), (B, I) or (B, L, I).
    mode_names : tuple of str
        One name per mode, see :data:`MODE_NAMES`.
    factors : tuple of (n, r) float64 arrays or None
        Orthonormal columns, the direction of largest energy first; None for a mode left alone.
    spectra : tuple of (n,) float64 arrays or None
        All energies (squared singular values) of each mode, descending; None where not measured. Of float64
        activations beyond 2^±256 they are divided by a power of four, as the squares themselves are out of range.
    epsilon : float or None
        The energy threshold that chose the ranks; None if they were given.
    samples : int
        Entries of the batch mode (images) seen in calibration; 0 if the factors were not calibrated.
    batches : int
        Batches seen in calibration. A layer that runs several times on a batch counts it, and its images, once.
    frame : Frame
        What was taken out of the activations first: the mean, or protected directions.

    Attributes
    ----------
    ranks : tuple of int or None
        Columns of each factor.

    Raises
    ------
    ValueError
        If names, factors or spectra do not fit the shape; names the mode and both shapes.
    """

    shape: Shape
    mode_names: tuple[str, ...]
    factors: tuple[np.ndarray | None, ...]
    spectra: tuple[np.ndarray | None, ...]
    epsilon: float | None = None
    samples: int = 0
    batches: int = 0
    frame: Frame = field(default_factory=Frame)

    def __post_init__(self) -> None:
        for name in ("mode_names", "factors", "spectra"):
            if len(getattr(self, name)) != len(self.shape):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, expected one per mode of {self.shape}"
                )
        for name, n, U, spectrum in zip(self.mode_names, self.shape, self.factors, self.spectra, strict=True):
            if U is not None and not (U.ndim == 2 and U.shape[0] == n and 1 <= U.shape[1] <= n):
                raise ValueError(
                    f"the factor of mode {name!r} has shape {U.shape}, expected ({n}, 1 to {n}) "
                    f"for an activation of shape {self.shape}"
                )
            if U is not None and not (U.dtype.kind == "f" and np.isfinite(U).all()):
                raise ValueError(f"the factor of mode {name!r} is {U.dtype} or not finite, expected finite floats")
            if spectrum is not None and spectrum.shape != (n,):
                raise ValueError(
                    f"the spectrum of mode {name!r} has shape {spectrum.shape}, expected ({n},) "
                    f"for an activation of shape {self.shape}"
                )
        if self.epsilon is not None:
            check_epsilon(self.epsilon)

    @staticmethod
    def random(shape: Sequence[int], ranks: Sequence[int | None], rng: np.random.Generator) -> Subspace:
        """Random orthonormal factors of given ranks: for measuring costs, where values do not matter.

        Parameters
        ----------
        shape : sequence of int
            (B, C, H, W), (B, C, D, H, W), (B, I) or (B, L, I).
        ranks : sequence of int or None
            One per mode; None leaves a mode alone.
        rng : numpy.random.Generator
        """
        shape = tuple(int(n) for n in shape)
        check_ranks("Subspace.random", shape, ranks)
        # The Q of a random matrix has orthonormal columns, which is all that a factor has to have.
        factors = tuple(
            None if r is None else np.linalg.qr(rng.standard_normal((n, r)))[0]
            for n, r in zip(shape, ranks, strict=True)
        )
        return Subspace(shape, mode_names(shape), factors, (None,) * len(shape))

    @property
    def ranks(self) -> tuple[int | None, ...]:
        return tuple(None if U is None else U.shape[1] for U in self.factors)

    @property
    def core_shape(self) -> Shape:
        """Shape of the projected activation: the rank of each mode, its full size where it is left alone."""
        return tuple(n if r is None else r for n, r in zip(self.shape, self.ranks, strict=True))

    @property
    def compression(self) -> float:
        """Elements of the activation per element of the core."""
        return math.prod(self.shape) / math.prod(self.core_shape)

    @property
    def energy_kept(self) -> tuple[float | None, ...]:
        """Share of the calibration energy that each mode keeps; None where it is not known."""
        return tuple(
            None if r is None or spectrum is None else float(spectrum[:r].sum() / spectrum.sum())
            for r, spectrum in zip(self.ranks, self.spectra, strict=True)
        )

    def factor_bytes(self, dtype: Any = np.float32) -> int:
        """Bytes of all factors in ``dtype``."""
        return sum(U.size for U in self.factors if U is not None) * np.dtype(dtype).itemsize

    def __str__(self) -> str:
        lines = [
            f"Subspace of {shape_text(self.shape)}, core {shape_text(self.core_shape)}, {self.compression:.1f}x smaller"
        ]
        for name, n, r, kept in zip(self.mode_names, self.shape, self.ranks, self.energy_kept, strict=True):
            rank = "left alone" if r is None else f"rank {r} of {n}"
            lines.append(f"  {name:<8} {rank}" + ("" if kept is None else f", keeps {kept:.4f} of the energy"))
        if self.frame.protected is not None:
            lines.append(f"  orthogonal to {self.frame.protected.shape[1]} protected direction(s)")
        if self.frame.mean is not None:
            lines.append("  of the activation without its mean")
        seen = seen_text(self.samples, self.batches) if self.batches else "no calibration"
        lines.append(f"  from {seen}" + ("" if self.epsilon is None else f", epsilon {self.epsilon:g}"))
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the share of the energy that r directions keep, one line per mode, a dot at the rank chosen.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.
        """
        if ax is None:
            from matplotlib import pyplot as plt

            _, ax = plt.subplots(figsize=(5, 3.5), layout="constrained")
        for name, n, r, spectrum in zip(self.mode_names, self.shape, self.ranks, self.spectra, strict=True):
            if spectrum is None:
                continue
            # The share that equation (3) compares with epsilon, for every rank.
            kept = np.cumsum(spectrum) / spectrum.sum()
            (line,) = ax.plot(np.arange(1, n + 1) / n, kept, label=f"{name} ({'all' if r is None else r} of {n})")
            if r is not None:
                ax.plot([r / n], [kept[r - 1]], "o", color=line.get_color())
        if self.epsilon is not None:
            ax.axhline(self.epsilon, color="0.6", linewidth=0.8, linestyle="--")
        ax.set(xlabel="rank / size of the mode", ylabel="share of energy kept", ylim=(0, 1.03))
        ax.legend(frameon=False)
        return ax


def mode_names(shape: Sequence[int]) -> tuple[str, ...]:
    """Names of the modes of an activation of this shape."""
    if len(shape) not in MODE_NAMES:
        raise ValueError(
            f"shape {tuple(shape)} has {len(shape)} modes, expected (B, I), (B, L, I), (B, C, H, W) or (B, C, D, H, W)"
        )
    return MODE_NAMES[len(shape)]


def shape_text(shape: Sequence[int | None]) -> str:
    """``8x16x7x7``; a dash for None."""
    return "x".join("-" if n is None else str(n) for n in shape)


def seen_text(samples: int, batches: int) -> str:
    """``64 samples in 2 batches``"""
    return f"{samples:,} sample{'s' * (samples != 1)} in {batches:,} batch{'es' * (batches != 1)}"
