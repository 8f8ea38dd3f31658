"""Predicted gradient fidelity: how much of the whole weight gradient a method keeps, from spectra and shapes.

The whole gradient is that of all N layers that could be tuned, the classifier left out (every method trains it
exactly). With g_l plain backpropagation's gradient of layer l and ĝ_l the method's, 0 where the layer does not train,

    fidelity = Σ_l w_l·c_l,    w_l = ‖g_l‖² / Σ‖g‖²,    c_l = cos²(g_l, ĝ_l).

By Cauchy-Schwarz cos²(g, ĝ) ≤ Σ_l w_l·c_l, whatever ĝ is, and the two are equal where ‖ĝ_l‖ = ‖g_l‖·√c_l with no
gradient uphill, as for orthogonal projections. So training n of N layers exactly has fidelity Σ w_l of those n. The
shares w_l are not known from shapes: equal for every layer, or in proportion to its weights, or measured.

c_l is predicted as the share of the activation's energy that the store keeps, ‖Â‖²/‖A‖², which is c_l where the output
gradient knows nothing of the directions that the activation prefers (for white output gradients dW = GᵀA and
E‖GᵀÂ‖² ∝ ‖Â‖²). Real output gradients agree in part from image to image, which favours the mean activation, the largest
direction: there the cosine comes out higher than predicted, as the tests show on MCUNet. For each method:

exact methods
    1
lance, hosvd, asi
    Π_n s_n, s_n = Σ_{i≤r} λ_i / Σ λ_i of mode n; certainly between 1 − Σ(1 − s_n) and min s_n, for the activations that
    were measured. For lance, whose subspaces are fixed, the share of the batch mode is that of a new batch,
    (n·m + r·v) / (n·(m + v)), see :mod:`analysis.ranks.batch_law`.
int8, int4
    1 − η, η = 3/(4L²) with L = 2ᵇ − 1: half a step of error everywhere, values that fill their range evenly. Certainly
    η ≤ (k − 2)/(2L²) for k values a channel, as a channel whose least and greatest value lie R apart has energy R²/2
    at least, and these two come back as they were.
sketch
    r/n for r directions of a batch of n, whatever the spectrum.
anything else
    not predicted: the gradient filter changes input gradients too, LoRA and biases are other parameters, and without
    their mean activations have other spectra than those measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.planner.options import Option
from analysis.ranks.batch_law import batch_spectrum, fit_batch_law
from analysis.steps.methods import METHODS
from analysis.steps.register import ENERGY
from lance_ref.io.whole_file import read_bytes

if TYPE_CHECKING:
    from analysis.ranks.spectra_file import LayerSpectra

Ranks = tuple[int | None, ...]
MAX_FILE_BYTES = 2**24


@dataclass(frozen=True)
class Fidelity:
    """A prediction in [0, 1], and what is certain of the energy kept: at least ``least``, at most ``most``."""

    estimate: float
    least: float
    most: float


def why_not(option: Option, spectra: bool) -> str | None:
    """Why an option's fidelity is not predicted; None if it is."""
    fidelity = METHODS[option.method].fidelity
    if fidelity == ENERGY:
        return None if spectra else "there are no spectra"
    return fidelity if isinstance(fidelity, str) else None


def whole_fidelity(shares: Mapping[str, float], kept: Mapping[str, Fidelity]) -> Fidelity:
    """Σ w_l·c_l; a layer without an entry in ``kept`` does not train.

    >>> whole_fidelity({"a": 0.25, "b": 0.75}, {"b": Fidelity(0.5, 0.25, 1.0)})
    Fidelity(estimate=0.375, least=0.1875, most=0.75)
    """
    return Fidelity(
        math.fsum(shares[path] * of.estimate for path, of in kept.items()),
        math.fsum(shares[path] * of.least for path, of in kept.items()),
        math.fsum(shares[path] * of.most for path, of in kept.items()),
    )


def layer_fidelity(
    option: Option, shape: tuple[int, ...], ranks: Ranks | None, spectra: LayerSpectra | None
) -> Fidelity | None:
    """c_l of one layer that trains, with an input of this shape, batch first, at these ranks; None if not predicted."""
    method = METHODS[option.method]
    if not isinstance(method.fidelity, str):
        return Fidelity(*method.fidelity(shape, option.settings))
    if method.fidelity != ENERGY or ranks is None or spectra is None:
        return None
    return tucker_fidelity(mode_shares(spectra, shape[0], ranks, fixed=method.calibration is not None))


def mode_shares(spectra: LayerSpectra, batch: int, ranks: Ranks, fixed: bool) -> list[float]:
    """Share of the energy that each mode alone keeps at these ranks; 1 for a mode that is left alone.

    ``fixed``: the subspace of the batch mode was found on other batches than the one that it is used on.
    """
    shares = []
    for mode, (energies, rank) in enumerate(zip(spectra.energies, ranks, strict=True)):
        if mode == 0:
            energies = _new_batch(energies, batch) if fixed else batch_spectrum(energies, batch)
        total = float(energies.sum())
        kept = 1.0 if rank is None or rank >= energies.size else float(energies[:rank].sum()) / total
        shares.append(min(kept, 1.0))
    return shares


def _new_batch(energies: np.ndarray, batch: int) -> np.ndarray:
    """Expected energies of a new batch along the directions of the old ones: v + n·m once, v for all others."""
    if energies.size == 1 and batch > 1:
        raise ValueError(f"spectra measured with one image a batch say nothing about a batch of {batch}")
    v, m = fit_batch_law(energies)
    return np.array([v + batch * m] + [v] * (batch - 1))


def tucker_fidelity(shares: list[float]) -> Fidelity:
    """The energy kept by all modes together, from what each keeps alone.

    >>> tucker_fidelity([0.5, 0.75])
    Fidelity(estimate=0.375, least=0.25, most=0.5)
    """
    return Fidelity(math.prod(shares), max(0.0, 1 - math.fsum(1 - s for s in shares)), min(shares))


def in_codes(kept: Fidelity, shape: tuple[int, ...], ranks: Ranks) -> Fidelity:
    """What is left of the energy that a core keeps, where the core is kept as 8-bit codes.

    >>> in_codes(Fidelity(0.5, 0.25, 1.0), (4, 3), (2, 2)).most
    1.0
    """
    core = tuple(n if r is None else min(r, n) for n, r in zip(shape, ranks, strict=True))
    codes = layer_fidelity(Option("int8"), core, None, None)
    assert codes is not None
    return Fidelity(kept.estimate * codes.estimate, kept.least * codes.least, kept.most)


# ---- the shares of the layers ----------------------------------------------------------------


def layer_shares(kind: str, weights: Mapping[str, int]) -> dict[str, float]:
    """w_l of every layer that could be tuned, whose numbers of weights are given.

    ``kind`` is "layers": the same for every layer; "parameters": in proportion to the weights; or a file, a JSON object
    that has ‖g_l‖² (in any unit) of every layer. ValueError or OSError names the file and what is wrong with it.

    >>> layer_shares("parameters", {"a": 30, "b": 10})
    {'a': 0.75, 'b': 0.25}
    """
    if kind == "layers":
        return dict.fromkeys(weights, 1 / len(weights))
    measured = {path: float(n) for path, n in weights.items()} if kind == "parameters" else _read(kind, weights)
    total = math.fsum(measured.values())
    return {path: value / total for path, value in measured.items()}


def _read(name: str, weights: Mapping[str, int]) -> dict[str, float]:
    path = Path(name)
    try:
        content = read_bytes(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise ValueError(f"--shares {name}: {error}") from None
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--shares {name} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"--shares {name}: expected an object of squared gradient norms by layer")
    missing = [layer for layer in weights if layer not in document]
    if missing:
        raise ValueError(f"--shares {name} has no layer {missing[0]!r}")
    values = {layer: document[layer] for layer in weights}
    for layer, value in values.items():
        if type(value) not in (int, float) or not 0 <= value < 1e300:
            raise ValueError(f"--shares {name}: layer {layer!r} has {str(value)[:40]}, expected a number from 0 on")
    if not any(values.values()):
        raise ValueError(f"--shares {name}: all gradients are 0")
    return {layer: float(value) for layer, value in values.items()}
