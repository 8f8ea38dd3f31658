"""ASI's ranks: the paper's perplexity and bytes for each threshold, and the best thresholds within a budget."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from tucker_cases import rebuild

import lance_ref as lr
from lance_ref import F, nn, tucker
from lance_ref.algebra.geometry import LinearGeometry
from lance_ref.lance import asi_ranks
from lance_ref.lance.asi_ranks import GRID, AsiPlan, choose_ranks, rank_options
from lance_ref.lance.gradient_samples import LayerSample, sample_gradients
from lance_ref.stores import Asi, Hosvd


def small_net(dtype: Any = np.float32) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, rng=0),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, rng=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1, rng=2),
        nn.Flatten(),
        nn.Linear(6 * 5 * 4, 4, rng=3),
    ).to(dtype)


def batches(count: int = 3, dtype: Any = np.float32) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((6, 3, 10, 8)).astype(dtype), rng.integers(0, 4, 6)) for _ in range(count)]


@pytest.fixture(name="samples", scope="module")
def _samples() -> dict[str, list[LayerSample]]:
    net = small_net(np.float64)
    lr.tune(net, "all")
    return sample_gradients(net, batches(dtype=np.float64))


def test_ranks_are_those_of_the_hosvd(samples: dict[str, list[LayerSample]]) -> None:
    """Each mode's largest energy rank over the samples, by the library's float64 HOSVD."""
    for path, found in samples.items():
        for option in rank_options(path, found):
            cores = [tucker.hosvd(sample.activation, epsilon=option.epsilon).core.shape for sample in found]
            expected = tuple(max(sizes) for sizes in zip(*cores, strict=True))
            shape = found[0].activation.shape
            assert option.ranks == tuple(None if r == n else r for r, n in zip(expected, shape, strict=True))


def test_perplexity_is_the_error_of_the_weight_gradient(samples: dict[str, list[LayerSample]]) -> None:
    """‖dW − dŴ‖_F, the mean over the samples, dŴ from the truncated activation formed in full."""
    for path, found in samples.items():
        for option in rank_options(path, found, (0.5, 0.9)):
            errors = []
            for sample in found:
                truncated = rebuild(Hosvd(ranks=option.ranks).save(sample.activation))
                error = sample.geometry.weight_gradient(sample.activation - truncated, sample.grad_output)
                errors.append(np.linalg.norm(error))
            assert option.perplexity == pytest.approx(np.mean(errors), rel=1e-8, abs=1e-14)


def test_bytes_are_what_asi_then_keeps() -> None:
    """The plan's bytes equal the tape of a net whose layers have the plan's stores."""
    net = small_net()
    lr.tune(net, "all")
    samples = sample_gradients(net, batches())
    plan = choose_ranks(samples, 2500)
    assert plan.total_bytes <= 2500
    for path in plan.ranks:
        net.get_submodule(path).store = plan.make(path, net.get_submodule(path))
    x, y = batches(1)[0]
    report = lr.tape(F.cross_entropy(net(x), y))
    assert {path: report.by_layer()[path] for path in plan.ranks} == plan.kept_bytes
    assert plan.total_bytes == sum(plan.kept_bytes.values())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 1.0, 3.0])
def test_the_choice_is_the_best_of_all(samples: dict[str, list[LayerSample]], share: float) -> None:
    """Against every combination of thresholds within the budget."""
    options = {path: rank_options(path, found) for path, found in samples.items()}
    low = sum(min(o.kept_bytes for o in layer) for layer in options.values())
    high = sum(max(o.kept_bytes for o in layer) for layer in options.values())
    budget = low + int(share * (high - low))
    affordable = [c for c in product(*options.values()) if sum(option.kept_bytes for option in c) <= budget]
    best = min(affordable, key=lambda choice: sum(option.perplexity for option in choice))
    plan = choose_ranks(samples, budget)
    assert plan.total_bytes <= budget
    assert plan.total_perplexity == pytest.approx(sum(option.perplexity for option in best), rel=1e-12)
    assert plan.ranks == {path: option.ranks for path, option in zip(options, best, strict=True)}
    assert plan.epsilon == {path: option.epsilon for path, option in zip(options, best, strict=True)}


def test_one_epsilon_for_all_layers_is_worse(samples: dict[str, list[LayerSample]]) -> None:
    """The mechanism switched off: a uniform threshold of no more bytes has a larger error somewhere."""
    better = 0
    for epsilon in GRID:
        uniform = [next(o for o in rank_options(p, s) if o.epsilon == epsilon) for p, s in samples.items()]
        plan = choose_ranks(samples, sum(option.kept_bytes for option in uniform))
        loss = sum(option.perplexity for option in uniform)
        assert plan.total_perplexity <= loss * (1 + 1e-12)
        better += plan.total_perplexity < 0.99 * loss
    assert better > 0


def test_epsilon_one_loses_nothing(samples: dict[str, list[LayerSample]]) -> None:
    """All modes left alone: the activation's own bytes, and no error."""
    for path, found in samples.items():
        option = rank_options(path, found, (1.0,))[0]
        assert option.ranks == (None,) * 4
        assert option.kept_bytes == found[0].activation.nbytes
        scale = np.linalg.norm(found[0].geometry.weight_gradient(found[0].activation, found[0].grad_output))
        assert option.perplexity <= 1e-12 * scale


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_threshold_one_decomposes_nothing(scale: float) -> None:
    """Nine features of four rows have four directions at most, zeros none: threshold 1 leaves them alone."""
    x = scale * np.random.default_rng(0).standard_normal((2, 2, 9))
    sample = LayerSample(x, np.ones((2, 2, 3)), LinearGeometry((2, 2, 9), (3, 9)))
    assert rank_options("wide", [sample], (1.0,))[0].ranks == (None,) * 3


def test_bytes_by_hand() -> None:
    """A 4×3 activation of one direction: core 1, factors 4 + 3, in float64; twice for a layer called twice."""
    g = LinearGeometry((4, 3), (2, 3))
    x = np.outer([1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 2.0])
    calls = [LayerSample(x, np.ones((4, 2)), g, call) for call in (0, 1)]
    assert rank_options("fc", calls[:1])[0].kept_bytes == 8 * (1 + 4 + 3)
    assert rank_options("fc", calls)[0].kept_bytes == 2 * 8 * (1 + 4 + 3)
    assert rank_options("fc", calls)[0].perplexity == pytest.approx(0, abs=1e-12)


def test_an_activation_of_zeros_takes_rank_one() -> None:
    """A dead layer neither stops the choice nor makes a NaN."""
    g = LinearGeometry((4, 3), (2, 3))
    option = rank_options("fc", [LayerSample(np.zeros((4, 3)), np.ones((4, 2)), g)])[0]
    assert (option.ranks, option.perplexity) == ((1, 1), 0.0)


def test_a_plan_makes_stores_and_prints(samples: dict[str, list[LayerSample]]) -> None:
    """One ASI store for each layer, none for others; the table adds up."""
    plan = choose_ranks(samples, 20_000)
    store = plan.make("2", None)
    assert isinstance(store, Asi)
    assert store.ranks == plan.ranks["2"]
    with pytest.raises(ValueError, match="no ranks were chosen for layer '6', only for '0', '2', '4'"):
        plan.make("6", None)
    lines = str(plan).splitlines()
    assert lines[0].split() == ["layer", "epsilon", "ranks", "perplexity", "bytes"]
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines[1:4]) == plan.total_bytes
    assert lines[4].split()[-1] == f"{plan.total_bytes:,}"
    assert lines[5] == "budget 20,000 bytes"


def test_a_budget_that_is_too_small_names_both_numbers(samples: dict[str, list[LayerSample]]) -> None:
    """The least possible bytes are the cheapest threshold of every layer."""
    least = sum(min(option.kept_bytes for option in rank_options(p, s)) for p, s in samples.items())
    with pytest.raises(ValueError, match=rf"budget_bytes is {least - 1}, but the 3 layer\(s\) keep at least {least}"):
        choose_ranks(samples, least - 1)
    assert choose_ranks(samples, least).total_bytes == least


def test_wrong_arguments_are_named(samples: dict[str, list[LayerSample]]) -> None:
    """Empty samples, an empty grid, a threshold out of range, two shapes."""
    with pytest.raises(ValueError, match="samples is empty"):
        choose_ranks({}, 1)
    with pytest.raises(ValueError, match="layer 'fc' has no samples"):
        choose_ranks({"fc": []}, 1)
    with pytest.raises(ValueError, match="grid is empty"):
        choose_ranks(samples, 10**6, ())
    with pytest.raises(ValueError, match=r"epsilon is 0\.0"):
        choose_ranks(samples, 10**6, (0.0,))
    g = LinearGeometry((4, 3), (2, 3))
    odd = [LayerSample(np.ones((B, 3)), np.ones((B, 2)), g) for B in (4, 2)]
    with pytest.raises(ValueError, match=r"layer 'fc': samples have shapes \(4, 3\) and \(2, 3\)"):
        choose_ranks({"fc": odd}, 10**6)


def test_planted_fault_of_forgotten_factors(
    samples: dict[str, list[LayerSample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that count the core alone promise less than the tape will hold."""
    right = choose_ranks(samples, 10**6)
    monkeypatch.setattr(
        asi_ranks,
        "kept_elements",
        lambda shape, ranks: (math.prod(n if r is None else r for n, r in zip(shape, ranks, strict=True)),),
    )
    wrong: AsiPlan = choose_ranks(samples, 10**6)
    assert wrong.ranks == right.ranks
    assert all(wrong.kept_bytes[path] < right.kept_bytes[path] for path in right.ranks)
