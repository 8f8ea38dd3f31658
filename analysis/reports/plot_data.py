"""The numbers behind two panels of the figure: other batch sizes, and other ranks, of a prediction at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from analysis.ranks.batch_law import batch_spectrum
from analysis.ranks.choose import RankChoice, fraction_of, shipped_spectra
from analysis.ranks.spectra_file import Spectra, load_spectra
from analysis.reports.prediction import Prediction, Ranks, Shapes, predict_step, ranks_of, tuned_inputs
from analysis.reports.report import reductions
from analysis.rules.account import CostCache, account
from analysis.steps.chunks import at_batch
from analysis.steps.methods import METHODS, method_step

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.995, 0.999, 1.0)
FRACTIONS = tuple(Fraction(n, 16) for n in range(1, 17))


def reduction_by_batch(
    prediction: Prediction, method: str, batches: Sequence[int] = BATCHES
) -> dict[int, dict[str, float | None]]:
    """bp's bytes over the method's, by batch size and accounting, as ``reductions`` of a report gives them.

    Ranks come from where the prediction has them from; those that were stated are kept, as far as the batch
    allows. Batch sizes that the net or the method does not take are left out.
    """
    found = {}
    for batch in batches:
        try:
            step = at_batch(prediction.step, batch)
            asked = prediction.asked
            if asked.ranks is not None and "=" in asked.ranks and prediction.choice is not None:
                asked = replace(asked, ranks=_stated(prediction.choice, tuned_inputs(step)))
            totals = predict_step(step, ("bp", method), asked).report.totals
        except ValueError:
            if batch == prediction.step.batch:
                raise
            continue
        found[batch] = reductions(totals["bp"], totals[method])
    return found


def _stated(choice: RankChoice, shapes: Shapes) -> str:
    """The same ranks as on the command line, none larger than its mode."""
    entries = []
    for path, shape in shapes.items():
        ranks = choice.ranks.get(path)
        listed = "exact" if ranks is None else ",".join(
            "-" if r is None else str(min(r, n)) for r, n in zip(ranks, shape, strict=True)
        )  # fmt: skip
        entries.append(f"{path}={listed}")
    return ";".join(entries)


@dataclass(frozen=True)
class Point:
    """One setting of the ranks of all tuned layers."""

    setting: float  #: The energy threshold, or the fraction of each mode.
    bytes: int  #: Tape and factors of the whole step.
    #: Shares in [0, 1] of the energy of the activations, the mean over the layers: what these ranks certainly keep, 1 −
    #: Σₘ(1 − eₘ), and what they cannot exceed, minₘ eₘ, where mode m alone keeps eₘ. Without spectra both are the share
    #: of each mode's directions.
    at_least: float
    at_most: float


@dataclass(frozen=True)
class Frontier:
    """What can be kept in how many bytes."""

    method: str
    points: tuple[Point, ...]  #: By bytes; none of them takes more bytes than another and keeps no more.
    source: str | None  #: Where the spectra are from; None: there are none, and points are fractions of each mode.
    bp_bytes: int  #: Tape of plain backpropagation.
    chosen: Point | None  #: The prediction's own ranks, where it has any; it has no setting (NaN).


def energy_frontier(prediction: Prediction, method: str = "lance") -> Frontier:
    """Energy kept against bytes, one threshold, or one fraction, for all layers.

    Parameters
    ----------
    method : str
        One that has ranks; of others, "lance".

    Raises
    ------
    ValueError
        If the method does not fit the net.
    """
    method = method if METHODS[method].ranks is not None else "lance"
    step, settings, cache = prediction.step, prediction.asked.settings, CostCache()
    shapes = tuned_inputs(step)
    if not shapes:
        raise ValueError("no layer but the classifier is tuned")
    spectra = _spectra(prediction, shapes)

    def point(setting: float, given: Ranks) -> Point:
        changed = method_step(method, step, settings, given, shapes)
        bills = account(changed.records, step.head, cache=cache)
        kept = [_kept(path, given.get(path), shape, spectra) for path, shape in shapes.items()]
        low, high = (sum(shares) / len(kept) for shares in zip(*kept, strict=True))
        return Point(setting, sum(bill.tape_bytes + bill.subspace_bytes for bill in bills), low, high)

    points = []
    for setting in FRACTIONS if spectra is None else THRESHOLDS:
        ranks = RankChoice(_ranks(setting, shapes, spectra), "")
        points.append(point(float(setting), ranks_of(method, ranks, shapes)))
    chosen = prediction.ranks.get(method)
    plain = account(method_step("bp", step, settings, {}, {}).records, step.head, cache=cache)
    return Frontier(
        method,
        undominated(points),
        None if spectra is None else spectra.source,
        sum(bill.tape_bytes for bill in plain),
        point(math.nan, chosen) if chosen else None,
    )


def undominated(points: Sequence[Point]) -> tuple[Point, ...]:
    """Those that keep more than every other of as few bytes, by bytes.

    >>> undominated([Point(0.5, 30, 0.1, 0.5), Point(0.9, 20, 0.6, 0.9), Point(1.0, 40, 1.0, 1.0)])
    (Point(setting=0.9, bytes=20, at_least=0.6, at_most=0.9), Point(setting=1.0, bytes=40, at_least=1.0, at_most=1.0))
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bytes, -point.at_most)):
        if not front or point.at_most > front[-1].at_most:
            front.append(point)
    return tuple(front)


def _spectra(prediction: Prediction, shapes: Shapes) -> Spectra | None:
    """The spectra that were given or that are shipped, if they have all of these layers, in these shapes."""
    step, given = prediction.step, prediction.asked.spectra
    file = shipped_spectra(step.name, step.input_shape) if given is None else given
    if file is None:
        return None
    spectra = load_spectra(file)
    fits = all(path in spectra.layers and spectra.layers[path].shape[1:] == n[1:] for path, n in shapes.items())
    return spectra if fits else None


def _ranks(setting: float | Fraction, shapes: Shapes, spectra: Spectra | None) -> Ranks:
    if spectra is None:
        return {path: fraction_of(Fraction(setting), shape) for path, shape in shapes.items()}
    return {path: spectra.layers[path].ranks(float(setting), shape[0]) for path, shape in shapes.items()}


def _kept(
    path: str, ranks: Sequence[int | None] | None, shape: Sequence[int], spectra: Spectra | None
) -> tuple[float, float]:
    """(at least, at most): see :class:`Point`; no ranks: everything."""
    if ranks is None:
        return 1.0, 1.0
    if spectra is None:
        shares = [1.0 if r is None else r / n for r, n in zip(ranks, shape, strict=True)]
        return min(shares), min(shares)
    first, *others = spectra.layers[path].energies
    shares = []
    for r, energies in zip(ranks, (batch_spectrum(first, shape[0]), *others), strict=True):
        shares.append(1.0 if r is None else float(energies[:r].sum() / energies.sum()))
    return max(0.0, 1.0 - sum(1.0 - share for share in shares)), min(shares)
