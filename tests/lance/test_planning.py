"""One budget over layers and modes: never over it, never worse than one threshold for all, monotone."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from lance_ref import Calibration, F, Tensor, calibrate, nn, tape
from lance_ref.lance import planning
from lance_ref.lance.gradient_samples import LayerSample, sample_gradients
from lance_ref.lance.planning import gradient_errors, plan_ranks, uniform_ranks

MODES = [("batch", "channel", "height", "width"), ("channel",), ("channel", "height", "width")]


def make_net() -> nn.Sequential:
    """Three layers whose inputs have very different spectra: a grouped convolution among them, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, rng=0), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2, rng=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(36, 5, rng=2), nn.ReLU(), nn.Linear(5, 4, rng=3),
    )  # fmt: skip


def make_batches() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((6, 3, 5, 5)).astype(np.float32), rng.integers(0, 4, 6)) for _ in range(3)]


@cache
def measured(modes: tuple[str, ...], frame: str | None = None) -> tuple[Calibration, dict[str, list[LayerSample]]]:
    net, layers = make_net(), ["0", "2", "5"]
    options = {} if frame is None else {frame: True}
    calibration = calibrate(net, make_batches(), layers=layers, modes=modes, **options)
    return calibration, sample_gradients(net, make_batches()[:2], layers=layers)


def core_bytes(calibration: Calibration, ranks: dict) -> int:
    """Bytes of all cores, float32, counted here once more."""
    total = 0
    for path, of in ranks.items():
        if of is not None:
            total += 4 * math.prod(n if r is None else r for n, r in zip(calibration[path].shape, of, strict=True))
    return total


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MODES), st.booleans(), st.integers(0, 14_000), st.integers(0, 14_000))
def test_within_the_budget_and_monotone(modes: tuple[str, ...], with_gradients: bool, low: int, more: int) -> None:
    """Never a byte over, the bytes are those of the ranks, and a larger budget never gives a larger loss."""
    calibration, samples = measured(modes)
    gradients = samples if with_gradients else None
    plans = [plan_ranks(calibration, 500 + budget, gradients) for budget in (low, low + more)]
    for plan in plans:
        assert plan.total_bytes <= plan.budget_bytes
        assert plan.total_bytes == core_bytes(calibration, plan.ranks)
    assert plans[1].loss <= plans[0].loss * (1 + 1e-12)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MODES), st.booleans(), st.floats(0.05, 1.0))
def test_never_worse_than_one_threshold(modes: tuple[str, ...], with_gradients: bool, epsilon: float) -> None:
    """At the bytes of any uniform threshold, the plan's own loss is at most that threshold's."""
    calibration, samples = measured(modes)
    uniform = uniform_ranks(calibration, epsilon)
    plan = plan_ranks(calibration, core_bytes(calibration, uniform), samples if with_gradients else None)
    if with_gradients:
        loss = sum(
            gradient_errors(calibration[path], bases(calibration, path), [ranks], samples[path])[0]
            for path, ranks in uniform.items()
        )
    else:
        loss = sum(bound(calibration, path, ranks) for path, ranks in uniform.items())
    assert plan.loss <= loss * (1 + 1e-9) + 1e-12


def bases(calibration: Calibration, path: str) -> list[np.ndarray | None]:
    grams = calibration.grams_of(path)
    return [None if K is None else grams.basis(mode)[1] for mode, K in enumerate(grams.grams)]


def bound(calibration: Calibration, path: str, ranks: tuple) -> float:
    """Σ of the discarded tails of the Grams per batch, at most the whole energy, by another way."""
    tails, whole = 0.0, 0.0
    for K, r in zip(calibration.grams_of(path).grams, ranks, strict=True):
        if K is not None:
            energies = np.linalg.eigvalsh(K)[::-1]
            tails += energies[r:].sum() / 3
            whole = energies.sum() / 3
    return min(tails, whole)


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("frame", [None, "mean_free", "center"])
def test_the_error_of_the_gradient_by_compressing(modes: tuple[str, ...], frame: str | None) -> None:
    """gradient_errors is what a compressed network's gradients really miss, at a few ranks of each layer."""
    calibration, samples = measured(modes, frame)
    net = make_net()
    for path, sample in samples.items():
        layer = net.get_submodule(path)
        full = [None if U is None else U.shape[1] for U in bases(calibration, path)]
        for share in (0.01, 0.4, 1.0):
            ranks = tuple(None if r is None else max(1, int(share * r)) for r in full)
            space = calibration.with_ranks({path: ranks})[path]
            from lance_ref.stores import Lance

            layer.store = Lance(space)
            expected = 0.0
            for one in sample:
                exact = one.geometry.weight_gradient(one.activation, one.grad_output)
                approximate = layer.store.weight_gradient(
                    layer.store.save(one.activation), one.grad_output, one.geometry
                )
                expected += float(np.square(exact - approximate).sum()) / len(sample)
            error = gradient_errors(space, bases(calibration, path), [ranks], sample)[0]
            scale = float(np.square(exact).sum())
            assert_allclose(error, expected, rtol=1e-3, atol=1e-6 * scale)


def test_a_small_case_against_all_combinations() -> None:
    """With the channel mode alone every rank is a candidate, so the plan is the best of all combinations."""
    calibration, samples = measured(("channel",))
    paths = list(calibration)
    choices = {path: [None, *range(1, bases(calibration, path)[1].shape[1] + 1)] for path in paths[:2]}
    only = {path: samples[path] for path in paths[:2]}
    net = make_net()
    two = calibrate(net, make_batches(), layers=paths[:2], modes=("channel",))
    for budget in (700, 2000, 3100, 5000):
        plan = plan_ranks(two, budget, only)
        best = math.inf
        for ranks in itertools.product(*choices.values()):
            chosen = {p: None if r is None else (None, r, None, None) for p, r in zip(choices, ranks, strict=True)}
            if core_bytes(two, chosen) <= budget:
                losses = [gradient_errors(two[p], bases(two, p), [r], only[p])[0] for p, r in chosen.items()]
                best = min(best, sum(losses))
        assert_allclose(plan.loss, best, rtol=1e-9)


def test_bytes_go_where_energy_is_won_back() -> None:
    """Of two layers alike but for their scale, the one with 100 times the energy gets the ranks."""
    net = nn.Sequential(nn.Linear(8, 8, bias=False, rng=0), nn.Linear(8, 3, rng=1))
    net.get_submodule("0").weight.data[:] = 0.1 * np.linalg.qr(np.random.default_rng(1).standard_normal((8, 8)))[0]
    x = np.random.default_rng(2).standard_normal((16, 8)).astype(np.float32)
    calibration = calibrate(net, [x], layers=["0", "1"], modes=["feature"])
    plan = plan_ranks(calibration, 16 * 4 * 5)  # five ranks
    assert plan.ranks == {"0": (None, 5), "1": None}


def test_applied_to_a_network() -> None:
    """Planned cores are on the tape to the byte; layers of rank 0 keep nothing and do not train."""
    calibration, _ = measured(MODES[0])
    net = make_net()
    for budget in (2000, 6000):
        plan = plan_ranks(calibration, budget)
        net = make_net()
        plan.apply(net, calibration)
        x, y = make_batches()[0]
        loss = F.cross_entropy(net(Tensor(x)), y)
        cores = {entry.path: entry.nbytes for entry in tape(loss).entries if entry.what == "core"}
        assert cores == {path: plan.layer_bytes[path] for path in plan.trained}
        loss.backward()
        for path, ranks in plan.ranks.items():
            assert (net.get_submodule(path).weight.grad is None) == (ranks is None)


def test_the_same_plan_twice() -> None:
    """Nothing random decides."""
    calibration, samples = measured(MODES[0])
    assert plan_ranks(calibration, 3000, samples) == plan_ranks(calibration, 3000, samples)


def test_factors_may_count() -> None:
    """With include_factors the bytes are cores and factors, still within the budget."""
    calibration, _ = measured(MODES[0])
    plan = plan_ranks(calibration, 4000, include_factors=True)
    given = calibration.with_ranks({path: r for path, r in plan.ranks.items() if r is not None})
    expected = sum(4 * math.prod(given[p].core_shape) + given[p].factor_bytes() for p in plan.trained)
    assert plan.total_bytes == expected <= 4000


def test_bad_arguments() -> None:
    """A budget below rank 1 everywhere, and samples that are missing or of another size."""
    calibration, samples = measured(("channel",))
    with pytest.raises(ValueError, match=r"budget_bytes is 23, but rank 1.*'5', takes 24"):
        plan_ranks(calibration, 23)
    with pytest.raises(TypeError, match=r"budget_bytes is 1.5, expected an integer"):
        plan_ranks(calibration, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no samples of layer '2'"):
        plan_ranks(calibration, 3000, {**samples, "2": []})
    with pytest.raises(ValueError, match=r"layer '2': a sample has an activation of shape \(6, 3, 5, 5\)"):
        plan_ranks(calibration, 3000, {**samples, "2": samples["0"]})
    fewer = sample_gradients(make_net(), [(x[:2], y[:2]) for x, y in make_batches()[:2]], layers=["0", "2", "5"])
    plan_ranks(calibration, 3000, fewer)  # without the batch mode of any number
    with pytest.raises(ValueError, match="a sample has an activation of shape"):
        plan_ranks(measured(("batch",))[0], 3000, fewer)


def layer_of(calibration: Calibration, path: str, include_factors: bool = False) -> planning._Layer:
    return planning._Layer(path, calibration, np.float32, include_factors)


@pytest.mark.parametrize("path", ["0", "2"])
@pytest.mark.parametrize("include_factors", [False, True])
def test_the_greedy_path_step_by_step(path: str, include_factors: bool) -> None:
    """From rank 1 to full rank, one rank at a time, each where most energy is won per byte: worked out anew."""
    calibration, _ = measured(MODES[0])
    grams = calibration.grams_of(path)
    energies = [np.linalg.eigvalsh(K)[::-1] for K in grams.grams]
    found = list(layer_of(calibration, path, include_factors)._greedy())
    full = tuple(U.shape[1] for U in bases(calibration, path))
    assert (found[0], found[-1]) == ((1, 1, 1, 1), full)

    def elements(ranks: tuple) -> int:
        factors = sum(n * r for n, r in zip(grams.shape, ranks, strict=True)) if include_factors else 0
        return math.prod(ranks) + factors

    for before, after in itertools.pairwise(found):
        ratios = {}
        for mode, r in enumerate(before):
            if r < full[mode]:
                raised = tuple(r + (mode == other) for other, r in enumerate(before))
                ratios[raised] = energies[mode][r] / (elements(raised) - elements(before))
        assert ratios[after] >= max(ratios.values()) * (1 - 1e-6)


@pytest.mark.parametrize("modes", MODES)
def test_full_rank_is_a_candidate(modes: tuple[str, ...]) -> None:
    """Threshold 1 is one of the thresholds: every direction there is, and nothing lost."""
    calibration, _ = measured(modes)
    for path in calibration:
        full = tuple(None if U is None else U.shape[1] for U in bases(calibration, path))
        layer = layer_of(calibration, path)
        assert list(layer._by_threshold())[-1] == full
        assert full in layer.candidates(layer.bytes_of(full))
        assert layer.bounds([full]) == [0]


def test_every_rank_of_a_wide_feature_mode_is_a_candidate() -> None:
    """Where only the feature mode is compressed nothing is skipped, also beyond rank 48."""
    x = np.random.default_rng(0).standard_normal((90, 60)).astype(np.float32)
    calibration = calibrate(nn.Sequential(nn.Linear(60, 4, rng=0)), [x], layers=["0"], modes=["feature"])
    assert list(layer_of(calibration, "0")._greedy()) == [(None, r) for r in range(1, 61)]
    candidates = layer_of(calibration, "0").candidates(10**9)
    assert set(candidates) == {None, *((None, r) for r in range(1, 61))}


def test_the_whole_budget_may_be_spent() -> None:
    """A budget that a choice meets to the byte pays for it: rank 1 of one layer, and full rank of all."""
    calibration, _ = measured(("channel",))
    least = 4 * min(math.prod(calibration[p].shape) // calibration[p].shape[1] for p in ("0", "2"))
    only = calibrate(make_net(), make_batches(), layers=["2"], modes=("channel",))
    assert plan_ranks(only, least).ranks == {"2": (None, 1, None, None)}
    calibration, _ = measured(MODES[0])
    full = {path: tuple(U.shape[1] for U in bases(calibration, path)) for path in calibration}
    plan = plan_ranks(calibration, core_bytes(calibration, full))
    assert plan.loss == 0


@pytest.mark.parametrize("modes", MODES)
def test_the_loss_of_an_untrained_centred_layer(modes: tuple[str, ...]) -> None:
    """Centred or not, a layer that does not train loses its whole gradient, that of the mean included."""
    calibration, samples = measured(modes, "center")
    for path, of_layer in samples.items():
        found = gradient_errors(calibration[path], bases(calibration, path), [None], of_layer)
        whole = [np.square(s.geometry.weight_gradient(s.activation, s.grad_output)).sum() for s in of_layer]
        mean = calibration[path].frame.mean
        assert mean is not None
        assert np.abs(mean).max() > 0.01
        assert_allclose(found, [np.mean(whole)], rtol=1e-5)


def test_thresholds_and_greedy_steps_are_candidates() -> None:
    """The ranks of any one threshold, so that a plan is never worse than it, and what is best per byte."""
    calibration, _ = measured(MODES[0])
    for path in calibration:
        layer = layer_of(calibration, path)
        candidates = layer.candidates(10**9)
        for epsilon in np.linspace(0.02, 1.0, 50):
            ranks = uniform_ranks(calibration, float(epsilon))[path]
            full = [U.shape[1] for U in bases(calibration, path)]
            assert tuple(n if r is None else r for r, n in zip(ranks, full, strict=True)) in candidates
        assert set(layer._greedy()) <= set(candidates)
        assert candidates[0] is None
