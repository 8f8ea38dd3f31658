"""How far two accuracies, or two shares, may lie apart by chance alone; and which timings are too short to be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

NORMAL_95 = 1.96
"""95 % of a normal distribution lie within this number of standard deviations."""
SHORTEST_TIMED_STEP = 0.1
"""Seconds. The median of a few steps that are shorter changes from run to run by more than methods differ."""


def share_variance(share: float, n: int) -> float:
    """The variance of a share observed in n independent cases; never 0 (Agresti and Coull: two more of each kind).

    >>> share_variance(0.5, 96)
    0.0025
    """
    p = (share * n + 2) / (n + 4)
    return p * (1 - p) / (n + 4)


def margin(groups: Sequence[Sequence[float]], images: int) -> float:
    """The largest difference of two mean accuracies that is chance in 95 % of cases: 1.96·√(2(v + s²/k)).

    v is the variance of a mean accuracy over ``images`` drawn at random, s² the variance between seeds, pooled over
    methods, and k the least number of seeds. With one seed s² is not known, and left out. The methods see the same
    images, so that their errors go together and the true margin is rather smaller: this is a rule for what not to
    believe, no test.

    Parameters
    ----------
    groups : sequence of sequence of float
        For each method its accuracies in [0, 1], one for each seed.
    images : int
        Test images that each accuracy is of.
    """
    v = share_variance(fmean(fmean(group) for group in groups), images)
    spreads = [variance(group) for group in groups if len(group) > 1]
    seeds = min(len(group) for group in groups)
    return NORMAL_95 * math.sqrt(2 * (v + (fmean(spreads) / seeds if spreads else 0.0)))


def sentence(groups: Sequence[Sequence[float]], images: int) -> str:
    """How many images and seeds there were, and what differences mean nothing."""
    seeds = min(len(group) for group in groups)
    text = (
        f"Chance: {images} test images, {seeds} seed{'s' if seeds > 1 else ''}. Accuracies that differ by less than "
        f"{100 * margin(groups, images):.1f} points do not tell which is better"
    )
    return f"{text}." if seeds > 1 else f"{text}, and what another seed changes comes on top: it takes more seeds."


def too_short(seconds: float) -> bool:
    """Whether a step is too short for its timing to be stated."""
    return seconds < SHORTEST_TIMED_STEP
