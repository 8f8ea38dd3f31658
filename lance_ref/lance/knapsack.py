"""The multiple-choice knapsack: one option per layer, the least summed loss within a budget, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Options = Sequence[tuple[int, float]]
"""What can be chosen for one layer: (cost, loss) pairs."""

SLACK = 1e-9
"""How much worse than the best known choice, relative to all losses, a bound must be before it counts."""

MOST_CANDIDATES = 20_000_000
"""Partial choices looked at for one layer; at 40 bytes each, more would be no way to choose."""


def choose(options: Sequence[Options], budget: int) -> tuple[int, ...]:
    """Choose one option per layer so that the summed loss is least and the summed cost within the budget.

    ``options[layer][i]`` is (cost, loss): a non-negative integer and a finite number. Gives the index of the option of
    each layer. Among choices of equal loss it is the cheapest, among those the one of the lowest indices, from the
    first layer on; losses are summed in float64 in the order of the layers.

    Raises
    ------
    ValueError, TypeError
        If a layer has no options, a cost is negative or no integer, a loss not finite, or the budget is below the
        least possible cost; names both numbers.
    RuntimeError
        If there are more partial choices to compare than :data:`MOST_CANDIDATES`.

    Notes
    -----
    The layers are taken one by one. Of all partial choices only the Pareto front is carried on: those that
    no other beats in both cost and loss. Two bounds thin it out: what the cheapest options of the remaining
    layers cost, and what their losses come to at the least, by linear relaxation (fractions of options
    allowed, Sinha & Zoltners 1979), against the best whole choice known so far.

    Each layer takes O(f·m·log(f·m)) operations for a front of f and m options. In the worst case (cost and
    loss of all options on one line) the front grows by a factor with every layer, as it must, the problem
    being NP-hard. Where losses fall off with the costs as those of ranks do, the bounds leave f at some
    hundred or thousand for 52 layers of 64 options: a fraction of a second.

    Examples
    --------
    >>> choose([[(1, 9.0), (5, 1.0)], [(2, 4.0), (3, 3.0)]], budget=7)
    (1, 0)
    """
    costs, losses = _checked(options)
    budget = _integer("budget", budget)
    least = sum(int(layer.min()) for layer in costs)
    if budget < least:
        raise ValueError(f"budget is {budget}, but the cheapest choice costs {least}")
    budget = min(budget, sum(int(layer.max()) for layer in costs))
    completions = _completions(costs, losses)
    slack = SLACK * sum(float(np.abs(layer).max()) for layer in losses)
    front_cost, front_loss = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each layer: (number in the front before, option)
    rank = np.zeros(1, np.int64)  # place of each partial choice in the order of indices
    best = np.inf
    for layer_cost, layer_loss, rest in zip(costs, losses, completions, strict=True):
        useful = _useful(layer_cost, layer_loss)
        _check_front(len(front_cost) * len(useful), len(steps))
        cost = (front_cost[:, None] + layer_cost[useful]).ravel()
        loss = (front_loss[:, None] + layer_loss[useful]).ravel()
        order = (rank[:, None] * len(layer_cost) + useful).ravel()
        affordable = np.flatnonzero(cost + rest.cost[0] <= budget)
        at_least, reachable = rest.bounds(budget - cost[affordable])
        best = min(best, float((loss[affordable] + reachable).min()))
        kept = affordable[loss[affordable] + at_least <= best + slack]
        kept = kept[_pareto(cost[kept], loss[kept], order[kept])]
        front_cost, front_loss = cost[kept], loss[kept]
        rank = np.argsort(np.argsort(order[kept]))
        steps.append((kept // len(useful), useful[kept % len(useful)]))
    place, choice = len(front_cost) - 1, []  # the last of the front has the least loss
    for before, option in reversed(steps):
        choice.append(int(option[place]))
        place = int(before[place])
    return tuple(reversed(choice))


class _Completion(NamedTuple):
    """The choices for the remaining layers on the lower hull of cost and loss, the cheapest first."""

    cost: np.ndarray  # (k,) ascending integers
    loss: np.ndarray  # (k,) descending

    def bounds(self, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A bound on the least loss, and a loss that a choice attains, for each budget (at least ``cost[0]``)."""
        here = np.searchsorted(self.cost, budget, side="right") - 1
        after = np.minimum(here + 1, len(self.cost) - 1)
        step = np.maximum(self.cost[after] - self.cost[here], 1)
        fraction = np.minimum((budget - self.cost[here]) / step, 1.0)
        attained = self.loss[here]
        return attained + fraction * (self.loss[after] - attained), attained


def _completions(costs: Sequence[np.ndarray], losses: Sequence[np.ndarray]) -> list[_Completion]:
    """The completion of each layer by all layers after it.

    The hull of a sum of layers takes the steps of all their hulls, the steepest first; between two of its
    points lies one step of one layer, so every point is a whole choice.
    """
    cost, loss = 0, 0.0  # the cheapest option of every layer
    steps = np.zeros((0, 2))  # (more cost, less loss) of every step of every hull
    result = []
    for layer_cost, layer_loss in zip(reversed(costs), reversed(losses), strict=True):
        steepest = np.argsort(-steps[:, 1] / steps[:, 0], kind="stable")
        more, less = np.cumsum(steps[steepest], axis=0).T
        total_cost = np.concatenate([[cost], cost + more.astype(np.int64)])
        result.append(_Completion(total_cost, np.concatenate([[loss], loss - less])))
        hull = _lower_hull(layer_cost, layer_loss)
        steps = np.concatenate([steps, np.stack([np.diff(layer_cost[hull]), -np.diff(layer_loss[hull])], axis=1)])
        cost, loss = cost + int(layer_cost[hull[0]]), loss + float(layer_loss[hull[0]])
    return result[::-1]


def _lower_hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """Options on the lower left hull: cost ascending, loss descending, each step less steep than the last."""
    hull: list[int] = []
    for i in _useful(cost, loss)[np.argsort(cost[_useful(cost, loss)])]:
        while len(hull) > 1 and _slope(cost, loss, hull[-2], hull[-1]) >= _slope(cost, loss, hull[-1], i):
            hull.pop()
        hull.append(int(i))
    return hull


def _slope(cost: np.ndarray, loss: np.ndarray, i: int, j: int) -> float:
    return float(loss[j] - loss[i]) / int(cost[j] - cost[i])


def _useful(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """The options of one layer that no other beats, in ascending order of their indices."""
    return np.sort(_pareto(cost, loss, np.arange(len(cost))))


def _pareto(cost: np.ndarray, loss: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Indices of the points that no other beats, by ascending cost; of equal ones that of the lowest ``order``."""
    by_cost = np.lexsort((order, loss, cost))
    sorted_loss = loss[by_cost]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_loss)[:-1]])
    return by_cost[sorted_loss < best_before]


def _checked(options: Sequence[Options]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Costs and losses of each layer as arrays."""
    costs, losses = [], []
    for layer, pairs in enumerate(options):
        if not len(pairs):
            raise ValueError(f"options of layer {layer} are empty, expected at least one (cost, loss)")
        cost = [_integer(f"a cost of layer {layer}", cost) for cost, _ in pairs]
        loss = np.array([loss for _, loss in pairs], np.float64)
        if min(cost) < 0:
            raise ValueError(f"a cost of layer {layer} is {min(cost)}, expected 0 or more")
        if not np.isfinite(loss).all():
            raise ValueError(f"a loss of layer {layer} is {loss[~np.isfinite(loss)][0]}, expected a finite number")
        costs.append(cost)
        losses.append(loss)
    if sum(max(cost) for cost in costs) >= 2**53:
        raise ValueError(f"costs sum up to {sum(max(cost) for cost in costs)}, expected less than 2**53")
    return [np.array(cost, np.int64) for cost in costs], losses


def _check_front(candidates: int, layer: int) -> None:
    """Raise an error early where cost and loss are so similar that the bounds exclude no choice."""
    if candidates > MOST_CANDIDATES:
        raise RuntimeError(
            f"{candidates:,} partial choices up to layer {layer} beat each other in cost or loss, expected at most "
            f"{MOST_CANDIDATES:,}; costs rounded up to a coarser unit make many of them equal"
        )


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    return int(value)
