"""Which layers, one by one: the set that fits and keeps most of the gradient, by the knapsack of ``plan_ranks``.

What a step keeps is a sum over the layers that train, once it is known which of them is the first: from there on every
operation keeps what its backward pass needs, and every layer that trains adds its input as its store keeps it, its
factors, its gradient, the optimiser's state, and its weights. So for every layer as the first one, the best set of
those behind it is a knapsack, which :func:`lance_ref.lance.knapsack.choose` solves exactly.

A peak is no such sum. What the first layer's peak has beyond what it keeps alone is taken off the budget, the set that
is found is simulated, and where it is too large, what is missing is taken off as well, until it fits. So the sets are
the best for what is kept, and they fit by the simulated peak; a better one is not excluded where the peak decides.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

from analysis.planner.search import Candidate, Finder, Row
from analysis.steps.methods import METHODS
from lance_ref.lance.knapsack import choose

TRIES = 40
"""Sets that are simulated for one option, at most."""


def with_sets(finder: Finder, rows: list[Row]) -> list[Row]:
    """The rows with the best set of layers in place of the last ones, where it keeps more of the gradient."""
    return [_improved(finder, row) if METHODS[row.option.method].layers else row for row in rows]


def _improved(finder: Finder, row: Row) -> Row:
    last = row.best or row.next
    if last is None:
        return row
    try:
        found = best_set(finder, last)
    except ValueError:  # a method that does not fit some of the layers
        return row
    if found is None or (row.best is not None and _value(finder, found) <= _value(finder, row.best)):
        return row
    return replace(row, best=found, next=None)


def _value(finder: Finder, candidate: Candidate) -> float:
    """The predicted fidelity, or the share of the layers where that is not predicted."""
    paths = candidate.paths or finder.costs.trains(candidate.layers)[0]
    return candidate.fidelity.estimate if candidate.fidelity else sum(finder.shares[path] for path in paths)


def best_set(finder: Finder, like: Candidate) -> Candidate | None:
    """The candidate of the same option and images at a time whose layers keep most; None if not one layer fits.

    Raises ValueError if the method does not fit one of the layers.
    """
    costs, option, images = finder.costs, like.option, like.at_a_time
    layers = costs.layers
    predicted = like.fidelity is not None
    values = {path: finder.worth(option, path, images, predicted) for path in layers}
    everything = costs.kept(option, layers, images)
    adds = {path: everything - costs.kept(option, _without(layers, path), images) for path in layers}
    room = {}
    for first in range(len(layers)):
        alone = costs.kept(option, (layers[first],), images)
        peak = costs.memory(option, (layers[first],), images).total
        room[first] = finder.budget - max(alone, peak)

    def best_from(first: int) -> tuple[str, ...]:
        """The best set whose first layer is this one."""
        behind = layers[first + 1 :]
        offered = [[(0, 0.0), (max(0, adds[path]), -values[path])] for path in behind]
        chosen = choose(offered, room[first]) if behind else ()
        return (layers[first], *(path for path, taken in zip(behind, chosen, strict=True) if taken))

    def entry(first: int) -> tuple[float, int, tuple[str, ...]]:
        paths = best_from(first)
        return -sum(values[path] for path in paths), -first, paths

    heap = [entry(first) for first in room if room[first] >= 0]
    heapq.heapify(heap)
    for _ in range(TRIES):
        if not heap:
            return None
        _, first, paths = heapq.heappop(heap)
        candidate = finder.candidate(option, paths, images, predict=predicted)
        if candidate.fits:
            return candidate
        if not candidate.over_bytes:  # too much work, which fewer layers need not make less
            continue
        room[-first] -= candidate.over_bytes
        if room[-first] >= 0:
            heapq.heappush(heap, entry(-first))
    return None


def _without(layers: tuple[str, ...], path: str) -> tuple[str, ...]:
    return tuple(each for each in layers if each != path)
