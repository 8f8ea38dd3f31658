"""The knapsack against all choices there are, and at the size of a real network."""

from __future__ import annotations

import time
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_ref.lance import knapsack
from lance_ref.lance.knapsack import choose

Options = list[list[tuple[int, float]]]
small = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(-3, 9).map(float)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def totals(options: Options, choice: tuple[int, ...]) -> tuple[float, int]:
    """(loss, cost) of a choice, the losses added in the order of the layers."""
    cost, loss = 0, 0.0
    for layer, i in zip(options, choice, strict=True):
        cost += layer[i][0]
        loss += layer[i][1]
    return loss, cost


def brute_force(options: Options, budget: int) -> tuple[int, ...]:
    """The best of all choices: least loss, then least cost, then lowest indices."""
    affordable = [c for c in product(*(range(len(layer)) for layer in options)) if totals(options, c)[1] <= budget]
    return min(affordable, key=lambda choice: (*totals(options, choice), choice))


def least(options: Options) -> int:
    return sum(min(cost for cost, _ in layer) for layer in options)


def real_size(seed: int, layers: int = 52, count: int = 64) -> Options:
    """Costs up to 1e9 and losses that fall with them, from layer to layer on other scales."""
    rng = np.random.default_rng(seed)
    options: Options = []
    for _ in range(layers):
        costs = np.sort(rng.integers(1, 10**9, count))
        losses = np.sort(rng.random(count) ** 3)[::-1] * 10.0 ** rng.uniform(-3, 1)
        options.append(list(zip(costs.tolist(), losses.tolist(), strict=True)))
    return options


@given(options=small, above=st.integers(0, 40))
@settings(max_examples=250)
def test_the_choice_is_the_best_of_all(options: Options, above: int) -> None:
    """Exactly the brute force's choice, ties and all (losses are integers, so that they do tie)."""
    budget = least(options) + above
    assert choose(options, budget) == brute_force(options, budget)


@given(seed=st.integers(0, 10**6), layers=st.integers(1, 5), count=st.integers(1, 5), share=st.floats(0, 1.1))
@settings(max_examples=200)
def test_real_losses_and_large_costs(seed: int, layers: int, count: int, share: float) -> None:
    """The same with losses that are no integers, over twelve orders of magnitude, and costs up to 1e9."""
    rng = np.random.default_rng(seed)
    options = [
        [(int(rng.integers(0, 10**9)), float(rng.random() * 10 ** rng.uniform(-6, 6))) for _ in range(count)]
        for _ in range(layers)
    ]
    budget = least(options) + int(share * layers * 10**9)
    assert choose(options, budget) == brute_force(options, budget)


@given(seed=st.integers(0, 99), line=st.booleans())
@settings(max_examples=20)
def test_a_front_that_the_bounds_must_thin_out(seed: int, line: bool) -> None:
    """Ten layers of four, costs and losses almost on a line: against the front without any bound."""
    rng = np.random.default_rng(seed)
    options: Options = []
    for _ in range(10):
        costs = rng.integers(0, 1000, 4)
        losses = 1000.0 - costs + (0 if line else rng.random(4) * 30)
        options.append(list(zip(costs.tolist(), losses.tolist(), strict=True)))
    budget = least(options) + 1500
    front = {0: 0.0}  # least loss for each cost
    for layer in options:
        grown: dict[int, float] = {}
        for cost, loss in front.items():
            for more, added in layer:
                grown[cost + more] = min(grown.get(cost + more, np.inf), loss + added)
        front = {cost: loss for cost, loss in grown.items() if cost <= budget}
    loss, cost = totals(options, choose(options, budget))
    assert cost <= budget
    assert loss == pytest.approx(min(front.values()), rel=1e-14)


def test_more_budget_is_never_worse() -> None:
    """The summed loss falls from budget to budget, and every choice stays within."""
    options = real_size(3, layers=12, count=16)
    low, high = least(options), sum(max(cost for cost, _ in layer) for layer in options)
    losses = []
    for budget in np.linspace(low, high, 60).astype(int).tolist():
        loss, cost = totals(options, choose(options, budget))
        assert cost <= budget
        losses.append(loss)
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] == pytest.approx(sum(min(loss for _, loss in layer) for layer in options), rel=1e-12)
    assert losses[0] > 10 * losses[-1]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_fifty_two_layers_of_sixty_four_options(share: float) -> None:
    """MobileNetV2's size in a few seconds at most, and no worse than the linear relaxation allows."""
    options = real_size(0)
    low = least(options)
    budget = low + int(share * (sum(max(cost for cost, _ in layer) for layer in options) - low))
    start = time.process_time()
    loss, cost = totals(options, choose(options, budget))
    assert time.process_time() - start < 5
    assert cost <= budget
    # any choice costs at least min Σ (loss + price·cost) − price·budget, whatever the price of a unit
    bounds = [
        sum(min(loss + price * cost for cost, loss in layer) for layer in options) - price * budget
        for price in 10.0 ** np.linspace(-13, -6, 200)
    ]
    assert max(bounds) <= loss <= max(bounds) + 0.02 * abs(max(bounds))


def test_ties_go_to_the_cheaper_then_to_the_first() -> None:
    """Documented order, worked by hand."""
    assert choose([[(5, 1.0), (3, 1.0), (3, 1.0)]], 9) == (1,)
    assert choose([[(1, 2.0), (2, 1.0)], [(1, 2.0), (2, 1.0)]], 3) == (0, 1)
    assert choose([], 0) == ()
    assert choose([[(0, 0.0)], [(0, 0.0)]], 10**30) == (0, 0)


def test_greedy_by_slope_would_be_wrong() -> None:
    """Planted fault: the best ratio first leaves budget that the best choice uses."""
    options: Options = [[(0, 10.0), (6, 3.0)], [(0, 10.0), (5, 5.0)], [(0, 10.0), (5, 5.0)]]
    assert choose(options, 10) == (0, 1, 1)  # 20, where the steepest step first gives 23


def test_bounds_that_cut_too_much_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: a bound above the truth throws the best choice away, and the brute force says so."""
    rng = np.random.default_rng(0)
    cases = [
        [[(int(c), float(v)) for c, v in zip(rng.integers(0, 50, 4), rng.random(4), strict=True)] for _ in range(5)]
        for _ in range(40)
    ]
    assert all(choose(case, least(case) + 40) == brute_force(case, least(case) + 40) for case in cases)
    monkeypatch.setattr(
        knapsack._Completion,
        "bounds",
        lambda rest, budget: (np.full(len(budget), rest.loss[0]), np.full(len(budget), rest.loss[-1])),
    )
    wrong = 0
    for case in cases:
        try:
            wrong += choose(case, least(case) + 40) != brute_force(case, least(case) + 40)
        except (ValueError, IndexError):
            wrong += 1
    assert wrong > 0


def test_wrong_arguments_are_named() -> None:
    """Both numbers of a budget that is too small, and the layer of an option that is no option."""
    with pytest.raises(ValueError, match="budget is 2, but the cheapest choice costs 3"):
        choose([[(1, 0.0), (9, 0.0)], [(2, 0.0)]], 2)
    with pytest.raises(ValueError, match="options of layer 1 are empty"):
        choose([[(1, 0.0)], []], 2)
    with pytest.raises(ValueError, match="a cost of layer 0 is -1"):
        choose([[(-1, 0.0)]], 2)
    with pytest.raises(ValueError, match="a loss of layer 0 is nan"):
        choose([[(1, np.nan)]], 2)
    with pytest.raises(TypeError, match=r"a cost of layer 0 is 1\.5"):
        choose([[(1.5, 0.0)]], 2)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="a cost of layer 0 is True"):
        choose([[(True, 0.0)]], 2)
    with pytest.raises(TypeError, match=r"budget is 2\.0"):
        choose([[(1, 0.0)]], 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"less than 2\*\*53"):
        choose([[(2**60, 0.0)]], 2**61)


def test_a_hopeless_front_is_an_error_not_a_frozen_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost and loss on one line tell no choices apart; it must stop in time and say why."""
    monkeypatch.setattr(knapsack, "MOST_CANDIDATES", 5000)
    rng = np.random.default_rng(0)
    options = [[(int(c), 1e6 - float(c)) for c in rng.integers(0, 10**6, 8)] for _ in range(12)]
    with pytest.raises(RuntimeError, match=r"partial choices up to layer .*coarser unit"):
        choose(options, least(options) + 5 * 10**6)


def test_limits_that_are_just_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many partial choices as are allowed; costs whose largest, not least, are too much for float64."""
    monkeypatch.setattr(knapsack, "MOST_CANDIDATES", 2)
    assert choose([[(1, 9.0), (5, 1.0)]], budget=5) == (1,)
    monkeypatch.setattr(knapsack, "MOST_CANDIDATES", 1)
    with pytest.raises(RuntimeError, match="2 partial choices"):
        choose([[(1, 9.0), (5, 1.0)]], budget=5)
    with pytest.raises(ValueError, match=r"expected less than 2\*\*53"):
        choose([[(1, 1.0), (2**53, 0.0)]], budget=5)
