"""Calibration: one pass over a few batches, from which every layer's subspace follows.

For each layer and mode the Gram matrix of the unfolded input is summed over the batches, in float64.
Nothing else is kept: the Grams give the subspaces for any energy threshold, they add up over
machines, and they can be saved.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lance_ref.algebra.frame import FeatureMean, Frame, checked_protected, with_direction
from lance_ref.algebra.grams import LayerGrams, check_modes, select_modes
from lance_ref.algebra.subspace import Subspace, seen_text, shape_text
from lance_ref.algebra.tucker import check_epsilon
from lance_ref.engine.tensor import Tensor
from lance_ref.io.progress import aligned
from lance_ref.lance import calibration_file
from lance_ref.lance.calibration_file import Ranks
from lance_ref.lance.compression import check_shapes, chosen_layers, features_of
from lance_ref.lance.listening import run_over
from lance_ref.lance.patches import PatchGrams, geometry_of, patch_shape, patch_tokens
from lance_ref.nn import Conv2d
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers

__all__ = ["Calibration", "Subspace", "calibrate"]


class Calibration(Mapping[str, Subspace]):
    """The subspaces of a network's layers: a mapping from layer path to :class:`Subspace`.

    Made by :func:`calibrate` or :meth:`load`; never changes. ``print(calibration)`` shows a table.
    Eigenvectors are computed when a layer is first asked for, once per mode, and are shared by the
    calibrations that :meth:`with_epsilon` and :meth:`with_ranks` return.
    """

    def __init__(
        self, grams: Mapping[str, LayerGrams], epsilon: Mapping[str, float], ranks: Mapping[str, Ranks] | None = None
    ) -> None:
        self._grams = dict(grams)
        self._epsilon = dict(epsilon)
        self._ranks = dict(ranks or {})
        self._subspaces: dict[str, Subspace] = {}

    # ---- a mapping -------------------------------------------------------------------

    def __getitem__(self, path: str) -> Subspace:
        if path not in self._grams:
            raise KeyError(f"no layer {path!r} was calibrated, only {', '.join(map(repr, self._grams))}")
        if path not in self._subspaces:
            self._subspaces[path] = self._grams[path].subspace(self._epsilon[path], self._ranks.get(path))
        return self._subspaces[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._grams)

    def __len__(self) -> int:
        return len(self._grams)

    # ---- other subspaces from the same Grams -----------------------------------------

    def with_epsilon(self, epsilon: float | Mapping[str, float]) -> Calibration:
        """The same calibration truncated at another energy threshold; needs no data.

        Parameters
        ----------
        epsilon : float, or mapping of layer path to float
            In (0, 1]. Layers that a mapping does not name stay as they are. Replaces ranks
            given by :meth:`with_ranks`.
        """
        named = dict.fromkeys(self, epsilon) if not isinstance(epsilon, Mapping) else dict(epsilon)
        self._check_known("epsilon", named)
        changed = {path: check_epsilon(value) for path, value in named.items()}
        kept = {path: ranks for path, ranks in self._ranks.items() if path not in changed}
        return Calibration(self._grams, {**self._epsilon, **changed}, kept)

    def with_ranks(self, ranks: Mapping[str, Sequence[int | None]]) -> Calibration:
        """The same calibration with given ranks for some layers: one for each mode, None leaves the mode alone."""
        self._check_known("ranks", ranks)
        for path, values in ranks.items():
            self._grams[path].check_ranks(values)
        given = {path: tuple(None if r is None else int(r) for r in values) for path, values in ranks.items()}
        return Calibration(self._grams, self._epsilon, {**self._ranks, **given})

    def merge(self, other: Calibration) -> Calibration:
        """The calibration that one run over the batches of both would give, with thresholds and ranks of ``self``.

        Raises ValueError, with the layer and both shapes, if the layers, shapes or modes differ (with the batch mode
        calibrated, also the batch size).
        """
        if set(self) != set(other):
            mine, theirs = sorted(set(self) - set(other)), sorted(set(other) - set(self))
            raise ValueError(f"the calibrations have different layers: only here {mine}, only in the other {theirs}")
        grams = {path: self._grams[path].merged(other._grams[path]) for path in self}
        return Calibration(grams, self._epsilon, self._ranks)

    def grams_of(self, path: str) -> LayerGrams:
        """The measurements of one layer: its Gram matrices, and all their directions."""
        return self._grams[path]

    def check(self, net: Module) -> None:
        """Raise ValueError if this calibration is of another network; names the layer and both shapes."""
        check_shapes(net, {path: grams.shape for path, grams in self._grams.items()})

    def _check_known(self, what: str, named: Mapping[str, Any]) -> None:
        for path in named:
            if path not in self._grams:
                raise ValueError(f"{what} names layer {path!r}, expected one of {', '.join(map(repr, self._grams))}")

    # ---- files -----------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything, Grams included, to an ``.npz`` file without pickles; all or nothing."""
        calibration_file.save(path, self._grams, self._epsilon, self._ranks)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read what :meth:`save` wrote, the same subspaces bit by bit; ValueError, on one line, for another file."""
        return Calibration(*calibration_file.load(path))

    # ---- printing --------------------------------------------------------------------

    def __repr__(self) -> str:
        grams = next(iter(self._grams.values()))
        return f"Calibration({len(self)} layers, {seen_text(grams.samples, grams.batches)})"

    def __str__(self) -> str:
        rows = [("layer", "activation", "ranks", "energy kept", "smaller by")]
        for path, space in self.items():
            kept = " ".join("  -  " if share is None else f"{share:.3f}" for share in space.energy_kept)
            ranks = shape_text(space.ranks)
            rows.append((path or "(root)", shape_text(space.shape), ranks, kept, f"{space.compression:,.1f}x"))
        whole = sum(math.prod(space.shape) for space in self.values())
        cores = sum(math.prod(space.core_shape) for space in self.values())
        rows.append(("total", f"{whole:,}", f"{cores:,}", "", f"{whole / cores:,.1f}x"))
        lines = aligned(rows, right=(4,))
        rule = "-" * len(lines[0])
        thresholds = sorted({self._epsilon[path] for path in self if path not in self._ranks})
        chosen = ["epsilon " + ", ".join(f"{value:g}" for value in thresholds)] if thresholds else []
        chosen += [f"ranks given for {len(self._ranks)} layer(s)"] if self._ranks else []
        grams = next(iter(self._grams.values()))
        lines.append(f"{seen_text(grams.samples, grams.batches)}; {'; '.join(chosen)}")
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])


def calibrate(
    net: Module,
    batches: Iterable[Any],
    layers: str | Sequence[str] | None = None,
    epsilon: float = 0.7,
    modes: Sequence[str] = ("batch", "channel", "depth", "height", "width"),
    progress: bool | None = None,
    *,
    protected: Mapping[str, np.ndarray] | None = None,
    mean_free: bool = False,
    center: bool = False,
) -> Calibration:
    """Find the subspaces that hold the share ``epsilon`` of the energy of each layer's input (one-shot HOSVD).

    One pass over ``batches`` serves all layers. Each activation is turned into Gram matrices while the
    network runs and is not referred to afterwards. The network runs in evaluation mode and without
    gradients; it is left as it was found, also after an error.

    Parameters
    ----------
    batches : iterable of arrays, Tensors, or (inputs, labels) tuples
        What the network takes. With the batch mode selected all have the same batch size.
    layers : glob or sequence of globs, optional
        Paths of convolutions and linear layers. By default the layers that ``tune`` selected (without the
        head), or, for a network that was not tuned, all whose weight requires gradients.
    epsilon : float
        Energy threshold in (0, 1] of every mode; 1 gives full rank.
    modes : sequence of str
        Which modes to compress: of "batch", "channel", "height", "width" for convolutions, and of "depth" for those of
        volumes; of "batch", "token", "feature" for linear layers, where "channel" stands for "feature", and "height"
        and "width" together for "token". The others stay untouched, at no cost.
    progress : bool, optional
        Whether to show a progress bar on stderr; by default if that is a terminal.
    protected : mapping of layer path to (n, m) array, optional
        Orthonormal directions M of a layer's feature mode (channels, or features of a linear layer) to
        leave alone: its activations are replaced by A ×_f (I − MMᵀ), and UᵀM = 0. The weight gradient then
        has no part along M. Layers that are not named have none.
    mean_free : bool
        Protect the direction of the mean activation too. Needs two passes over ``batches``.
    center : bool
        Split A = μ + R with the mean activation μ (one number per feature): the subspaces are those of R,
        and the compressed layer adds the exact weight gradient of μ back. Needs two passes as well.

    Raises
    ------
    ValueError
        If an argument is out of range, there are no batches or no layers, a layer is not reached or is
        reached with two shapes, or an activation contains NaN or infinity or is always zero.
        Names the layer and the shapes. Also if every direction of a layer's feature mode is protected.
    TypeError
        For an iterator as ``batches`` where two passes are needed, batches that are not arrays, and
        activations that are not float32 or float64.

    Notes
    -----
    K_n = Σ_j A^(j)_(n) A^(j)_(n)ᵀ exactly, every batch with the same weight; U_n are its leading
    eigenvectors, and r_n is the smallest r with Σ_{i≤r} λ_i ≥ ε Σ λ_i (Apolinario & Roy,
    arXiv 2509.21617). A layer that runs several times in one forward pass contributes all its inputs; its samples and
    batches are counted once.

    Examples
    --------
    >>> import numpy as np
    >>> from lance_ref import nn
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> x = np.array([[3.0, 0.0], [3.0, 0.0], [0.0, 1.0]], np.float32)  # energies 18 and 1
    >>> calibrate(net, [x], layers="0", epsilon=0.9)["0"].ranks
    (1, 1)
    """
    if not isinstance(net, Module):
        raise TypeError(f"net is a {type(net).__name__}, expected a lance_ref.nn.Module")
    if isinstance(batches, (np.ndarray, Tensor)):
        raise TypeError(f"batches is a single array of shape {batches.shape}, expected an iterable of them: [array]")
    epsilon, modes = check_epsilon(epsilon), check_modes(modes)
    paths = chosen_layers(net, layers)
    modules, given = weighted_layers(net), dict(protected or {})
    if unknown := [path for path in given if path not in paths]:
        raise ValueError(f"protected names layer {unknown[0]!r}, expected one of {', '.join(map(repr, paths))}")
    bases = {
        path: checked_protected(path, given[path], features_of(modules[path])) if path in given else None
        for path in paths
    }
    # What is taken out of the activations has to be known before their Grams are summed.
    frames = frames_of(net, batches, bases, mean_free, center, progress=progress)
    grams = grams_of(net, batches, frames, modes, progress=progress)
    for layer in grams.values():
        layer.check_energy()
    # Equations (2) and (3) wait until a subspace is asked for; another epsilon then needs no data.
    return Calibration(grams, dict.fromkeys(paths, epsilon))


def frames_of(
    net: Module,
    batches: Iterable[Any],
    bases: Mapping[str, np.ndarray | None],
    mean_free: bool = False,
    center: bool = False,
    patches: bool = False,
    progress: bool | None = False,
) -> dict[str, Frame]:
    """What is taken out of each layer's inputs: the protected directions, and the mean, which needs a pass of its own.

    Parameters
    ----------
    bases : mapping of layer path to (n, m) array or None
        For every layer to calibrate.
    patches : bool
        Whether a convolution is seen as a linear layer over its patches, so that n = C_in·k_h·k_w.
    """
    if mean_free and center:
        raise ValueError("mean_free and center are both set: a centred activation has no mean to be free of")
    if not (mean_free or center):
        return {path: Frame(M) for path, M in bases.items()}
    if iter(batches) is batches:
        raise TypeError(
            f"batches is an iterator ({type(batches).__name__}), but mean_free and center take two passes over it; "
            "expected a list, or another iterable that starts anew each time"
        )
    modules, means = weighted_layers(net), dict[str, FeatureMean]()

    def add_mean(path: str, activation: np.ndarray, again: bool) -> None:
        layer, blocks = modules[path], iter([activation])
        if patches and isinstance(layer, Conv2d):
            blocks = patch_tokens(geometry_of(layer, activation.shape), activation)
        for block in blocks:
            means.setdefault(path, FeatureMean(path, block.shape)).add(block)

    run_over(net, batches, list(bases), add_mean, progress)
    if center:
        return {path: Frame(M, means[path].mean) for path, M in bases.items()}
    return {path: Frame(with_direction(M, means[path].mean)) for path, M in bases.items()}


def grams_of(
    net: Module,
    batches: Iterable[Any],
    frames: Mapping[str, Frame],
    modes: Sequence[str],
    patches: bool = False,
    see: Callable[[LayerGrams, np.ndarray, int], None] | None = None,
    progress: bool | None = False,
) -> dict[str, LayerGrams]:
    """The Gram matrices of each layer's inputs, after its frame has taken its part out, from one pass over the batches.

    ``see`` is called with the Grams, the activation that they have just taken in, and the unit that they had before.
    """
    modules, grams = weighted_layers(net), dict[str, LayerGrams]()

    def add(path: str, activation: np.ndarray, again: bool) -> None:
        layer, shape = modules[path], activation.shape
        if path not in grams:
            if patches and isinstance(layer, Conv2d):
                selected = select_modes(path, patch_shape(geometry_of(layer, shape)), modes)
                grams[path] = PatchGrams(path, layer, shape, selected, frames[path])
            else:
                grams[path] = LayerGrams(path, shape, select_modes(path, shape, modes), frames[path])
        before = grams[path].unit
        # Equation (1), while the network runs: the activation is let go when this returns.
        grams[path].add(activation, again)
        if see is not None:
            see(grams[path], activation, before)

    if frames:
        run_over(net, batches, list(frames), add, progress)
    return {path: grams[path] for path in frames}
