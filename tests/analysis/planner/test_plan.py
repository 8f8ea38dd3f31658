"""The planner against all candidates, worked out one by one, and planted faults."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import lance_ref
from analysis.peak.lifetimes import lifetimes, lifetimes_from_scopes
from analysis.peak.memory import peak
from analysis.planner import search as plan_search
from analysis.planner.answer import answer
from analysis.planner.costs import Costs, Device, Memory
from analysis.planner.evidence import Measured
from analysis.planner.fidelity import Fidelity, layer_shares, mode_shares
from analysis.planner.options import Option, options_for, parse_bytes
from analysis.planner.search import Candidate, Plan, Row, merged, search
from analysis.planner.tables import render, to_json
from analysis.ranks.batch_law import batch_spectrum
from analysis.ranks.choose import mean_free
from analysis.ranks.spectra_file import LayerSpectra, Spectra
from analysis.rules.account import account
from analysis.rules.recompute import flatten
from analysis.steps.methods import METHODS, method_step
from analysis.steps.nets import build, trace_step
from analysis.steps.runs import running
from lance_ref import Tensor, nn
from lance_ref.nn.module import Module

BATCHES = (2, 3)
SHAPE = (3, 8, 8)
OPTIONS = options_for(list(METHODS), [0.6], [Fraction(1, 2)], {"patch": [2], "ratio": [0.5]})


class Branches(nn.Module):
    """Six layers: two convolutions, a branch that goes around two more, a pointwise one, the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, rng=0)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1, rng=0)
        self.inner = nn.Conv2d(8, 8, 3, padding=1, groups=8, rng=0)
        self.around = nn.Conv2d(6, 8, 1, stride=2, rng=0)
        self.point = nn.Conv2d(8, 24, 1, rng=0)
        self.head = nn.Linear(24, 5, rng=0)

    def forward(self, x: Tensor) -> Tensor:
        x = lance_ref.F.relu(self.first(x))
        x = self.inner(lance_ref.F.relu(self.second(x))) + self.around(x)
        return self.head(lance_ref.F.relu6(self.point(x)).mean((2, 3)))


def net_for(name: str) -> tuple[Module, tuple[int, ...]]:
    if name == "branches":
        return Branches(), SHAPE
    shape = {"mlp": (200,), "convnet": (3, 12, 12)}[name]
    return build(name, 5, shape, without_weights=True), shape


def random_spectra(net: Module, shape: tuple[int, ...], batch: int = 4) -> Spectra:
    """Made-up energies of every layer but the head."""
    rng = np.random.default_rng(0)
    step = trace_step(net, "net", shape, batch, "all", "float32")
    inputs = {r.path: r.inputs[0].shape for r in step.records if r.path in step.tuned_layers}
    layers = {
        path: LayerSpectra(of, tuple(np.sort(rng.uniform(0.01, 1, n) ** 3)[::-1] for n in of))
        for path, of in inputs.items()
    }
    return Spectra("net", batch, shape, dict.fromkeys(("weights", "images", "image_count", "batches"), "?"), layers)


# ---- against all candidates, one by one ------------------------------------------------------


class Known(NamedTuple):
    """One candidate, worked out from a trace of its own."""

    total: int
    macs: int
    fidelity: float | None


def worked_out(name: str, option: Option, n: int, batch: int, device: Device, spectra: Spectra) -> Known | None:
    """Everything anew: net, trace, lifetimes, bills; None if the method does not fit."""
    net, shape = net_for(name)
    count = len(lance_ref.tune(net, "all").layers)
    selection = f"last:{n}" if n else "head"
    step = trace_step(net, "net", shape, batch, selection, "float32")
    shapes = {r.path: r.inputs[0].shape for r in step.records if r.path in step.tuned_layers and r.op != "relu"}
    shapes = {path: shapes[path] for path in step.tuned_layers}
    ranks: dict[str, Any] = {}
    if METHODS[option.method].ranks is not None:
        for path, of in shapes.items():
            first, *rest = spectra.layers[path].energies
            ranks[path] = tuple(
                math.ceil(option.fraction * k)
                if option.fraction is not None
                else 1 + int(np.sum(np.cumsum(e) < option.epsilon * e.sum() - 1e-12))
                for e, k in zip((batch_spectrum(first, batch), *rest), of, strict=True)
            )
    try:
        given = mean_free(ranks, shapes) if METHODS[option.method].ranks == "mean-free" else ranks
        changed = method_step(option.method, step, option.settings, given, shapes)
    except ValueError:
        return None
    bills = account(changed.records, step.head, changed.repeats)
    images = batch // changed.repeats
    if option.method == "lora":
        ends = lifetimes_from_scopes(changed.records)
    else:
        with running(step, option.method, changed):
            ends = dict(lifetimes(net, (images, *shape)))
    found = peak(changed.records, optimizer=device.optimizer, lifetimes=ends)
    during = found.peak_bytes
    if changed.repeats > 1:
        during = max(found.forward_bytes, found.backward_bytes) + found.gradients_bytes
        during = max(during, found.optimizer_bytes)
    state = found.optimizer_state_bytes
    if device.count == "kept":
        during = sum(bill.tape_bytes for bill in bills) + found.gradients_bytes + state
    weights = found.gradients_bytes
    if device.weights == "ram":
        read = {v.id: v.nbytes for r in flatten(changed.records) for v in r.inputs if v.parameter}
        weights = sum(read.values())
    total = during + weights + sum(bill.subspace_bytes for bill in bills)
    if METHODS[option.method].calibration and device.calibration == "device":
        at_once = sum(8 * k * k for path in ranks for k in shapes[path])
        if device.count == "peak":
            lance_ref.tune(net, "head")
            with lance_ref.record(net) as records, lance_ref.no_grad():
                logits = net(Tensor.meta((batch, *shape)))
                lance_ref.F.cross_entropy(logits, Tensor.meta((batch,), np.int64))
            at_once += peak(list(records), lifetimes=lifetimes(net, (batch, *shape))).forward_bytes
        if device.weights == "ram":
            at_once += sum(4 * p.size for p in net.parameters())
        total = max(total, at_once)
    macs = sum(
        getattr(bill.cost, f"{kind}_macs")
        for bill in bills
        for kind in ("forward", "grad_input", "grad_weight", "projection", "decomposition", "recompute")
    )
    return Known(total, macs, expected_fidelity(option, shapes, ranks, spectra, batch, count))


def expected_fidelity(
    option: Option, shapes: dict[str, Any], ranks: dict[str, Any], spectra: Spectra, batch: int, count: int
) -> float | None:
    """The formulas of the docstring, once more."""
    kept = 0.0
    for path, shape in shapes.items():
        if option.method in ("bp", "checkpoint", "micro-batch"):
            kept += 1
        elif option.method in ("int8", "int4"):
            levels = {"int8": 255, "int4": 15}[option.method]
            values = math.prod(shape) / (shape[1] if len(shape) == 4 else shape[-1])
            kept += 1 - min(0.75 / levels**2, (values - 2) / 2 / levels**2)
        elif option.method == "sketch":
            kept += max(1, round(batch * option.settings.ratio)) / batch
        elif option.method in ("lance", "hosvd", "asi"):
            first, *rest = spectra.layers[path].energies
            v = (first.sum() - first[0]) / (first.size - 1)
            m = (first[0] - v) / first.size
            batch_mode = np.array([v + batch * m] + [v] * (batch - 1))
            modes = [batch_mode if option.method == "lance" else batch_spectrum(first, batch), *rest]
            kept += math.prod(e[:r].sum() / e.sum() for e, r in zip(modes, ranks[path], strict=True))
        else:
            return None
    return kept / count


@cache
def every_candidate(name: str, device: Device) -> dict[tuple[str, int, int], Known]:
    spectra = random_spectra(*net_for(name))
    count = len(lance_ref.tune(net_for(name)[0], "all").layers)
    known = {}
    for option in OPTIONS:
        for n in [0] if option.method == "head-only" else range(1, count + 1):
            for batch in BATCHES:
                found = worked_out(name, option, n, batch, device, spectra)
                if found is not None:
                    known[option.name, n, batch] = found
    return known


def expect(row: Row, known: dict[tuple[str, int, int], Known], budget: int, limit: Fraction | None) -> None:
    """The row says what all candidates of its option say."""
    name = row.option.name
    own = {key[1:]: of for key, of in known.items() if key[0] == name}

    def times(at: tuple[int, int]) -> Fraction:
        bp = known["bp", max(at[0], 0), at[1]] if at[0] else known["head-only", 0, at[1]]
        return Fraction(own[at].macs, bp.macs)

    fits = [at for at, of in own.items() if of.total <= budget and (limit is None or times(at) <= limit)]
    for batch in BATCHES:
        assert row.layers[batch] == max((n for n, b in fits if b == batch), default=None), (name, batch)
    if not fits:
        assert row.best is None
        if own:
            assert row.next is not None
            least = min(own, key=lambda at: (max(0, own[at].total - budget), times(at)))
            wanted = max(0, own[least].total - budget)
            assert row.next.over_bytes == wanted, name
            if not wanted:
                assert row.next.times_bp == times(least)
        return
    assert row.best is not None
    at = row.best.layers, row.best.batch
    assert (row.best.memory.total, row.best.times_bp) == (own[at].total, times(at)), name

    def order(key: tuple[int, int]) -> tuple[float, int]:
        of = own[key].fidelity
        return (key[0] if of is None else round(of, 4)), key[1]

    assert at in fits
    assert order(at) == max(map(order, fits)), name
    if own[at].fidelity is None:
        assert row.best.fidelity is None
    else:
        assert row.best.fidelity is not None
        assert row.best.fidelity.estimate == pytest.approx(own[at].fidelity, abs=1e-12), name
    if (at[0] + 1, at[1]) in own:
        assert row.next is not None
        assert row.next.over_bytes == max(0, own[at[0] + 1, at[1]].total - budget), name


def check_plans(name: str, device: Device, limits: list[Fraction | None], quantiles: list[float]) -> list[Plan]:
    net, shape = net_for(name)
    spectra = random_spectra(net, shape)
    known = every_candidate(name, device)
    costs = Costs(net, "net", shape, device, spectra=spectra)
    totals = sorted({of.total for of in known.values()})
    plans = []
    for quantile in quantiles:
        exactly = totals[round(quantile * (len(totals) - 1))]
        for budget in (exactly, exactly - 1):  # what takes every byte fits, and no longer with one byte less
            for limit in limits:
                plan = search(costs, OPTIONS, BATCHES, budget, limit)
                assert len(plan.rows) == len(OPTIONS)
                for row in plan.rows:
                    expect(row, known, budget, limit)
                plans.append(plan)
    return plans


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("branches", Device()),
        ("branches", Device("kept", "ram", "elsewhere", "adam")),
        ("convnet", Device("peak", "ram", "device", "sgd-momentum")),
        ("mlp", Device("kept", "flash", "device", "sgd")),
    ],
)
def test_as_all_candidates_one_by_one(name: str, device: Device) -> None:
    """Bisection, records of changed flags, lifetimes of another batch: any of them wrong would choose otherwise."""
    plans = check_plans(name, device, [None, Fraction(1), Fraction(3, 2)], [0.0, 0.3, 0.6, 1.0])
    assert not plans[3].fitting  # one byte less than the least of all
    assert any(plan.fitting for plan in plans)


@pytest.mark.parametrize("fault", ["one layer too many", "no calibration", "no factors", "flops of another batch"])
def test_planted_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a planner that is wrong."""
    if fault == "one layer too many":
        right = plan_search.Finder._bisect
        monkeypatch.setattr(plan_search.Finder, "_bisect", lambda *a: min(right(*a) + 1, a[3]))
    elif fault == "no calibration":
        monkeypatch.setattr(Costs, "_calibration", lambda *a: 0)
    elif fault == "no factors":
        monkeypatch.setattr(Costs, "_factors", lambda *a: 0)
    else:
        work = Costs.times_bp
        monkeypatch.setattr(Costs, "times_bp", lambda self, o, n, b: work(self, o, n, b) * Fraction(b, 2))
    with pytest.raises(AssertionError):
        check_plans("mlp", Device(), [Fraction(3, 2)], [0.2, 0.5, 0.8])


def kind(row: Row) -> str:
    """Where a row belongs, so that the order of the words is that of the rows."""
    if row.best is None:
        return "4 too large" if row.next else "5 not to be had"
    of = row.best.fidelity
    return "2 not known" if of is None else "3 known to be 0" if f"{of.estimate:.3f}" == "0.000" else "1 faithful"


def test_rows_are_ranked_and_alike_every_time() -> None:
    """More than 0.000, then what is not predicted, then 0.000, then what does not fit; batches in any order."""
    net, shape = net_for("branches")
    spectra = random_spectra(net, shape)
    known = every_candidate("branches", Device())
    budget = sorted(of.total for of in known.values())[len(known) // 12]
    plans = [search(Costs(net, "net", shape, Device(), spectra=spectra), OPTIONS, b, budget) for b in ((2, 3), (3, 2))]
    assert plans[0].rows == plans[1].rows
    kinds = [kind(row) for row in plans[0].rows]
    assert kinds == sorted(kinds)
    assert set(kinds) == {"1 faithful", "2 not known", "3 known to be 0", "4 too large", "5 not to be had"}
    values = [r.best.fidelity.estimate for r in plans[0].rows if r.best and r.best.fidelity]
    assert values == sorted(values, reverse=True)
    excess = [r.next.over_bytes for r in plans[0].rows if r.next and not r.best]
    assert excess == sorted(excess)


def test_few_candidates_are_simulated() -> None:
    """MCUNet at 128 pixels, 4 MiB: thousands of candidates, of which a few hundred are worked out."""
    net = build("mcunet", 10, (3, 128, 128), without_weights=True)
    costs = Costs(net, "mcunet", (3, 128, 128), Device())
    options = options_for(["bp", "lance", "int8"], [], [Fraction(1, 4)])
    plan = search(costs, options, (1, 2, 4), parse_bytes("4MiB"))
    assert len(costs.layers) * 3 * len(options) == 378
    assert 0 < plan.tried < 60


def normed() -> Module:
    """Two convolutions with a batch norm between them."""
    middle = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, rng=0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, rng=0), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5, rng=0)
    )


def test_what_a_device_has_in_ram() -> None:
    """Weights and buffers where they are not in flash, in training and calibration; nothing calibrated elsewhere."""
    net = normed()
    everything = 4 * sum(p.size for p in net.parameters()) + sum(array.nbytes for _, array in net.named_buffers())

    def costs(**device: str) -> Costs:
        return Costs(net, "net", SHAPE, Device(**device))

    def memory(**device: str) -> Any:
        return costs(**device).memory(Option("lance", fraction=Fraction(1, 2)), 1, 2)

    flash, ram, kept = memory(), memory(weights="ram"), memory(count="kept")
    assert ram.weights == everything > flash.weights == flash.gradients
    assert ram.calibration == flash.calibration + everything
    assert flash.calibration == kept.calibration + costs().in_flight(2) > kept.calibration > 0
    assert memory(calibration="elsewhere").calibration == 0
    assert memory(optimizer="adam").optimizer_state == 2 * flash.gradients


def test_micro_batches_need_frozen_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch norm that takes those it has learnt does not see the parts; one that takes the batch's does."""
    costs = Costs(normed(), "net", SHAPE, Device())
    assert costs.exact_statistics(2)
    whole = costs.whole(2)
    records = [
        replace(r, attributes={**r.attributes, "training": True}) if r.op == "batch_norm" else r for r in whole.records
    ]
    training = replace(whole, records=records)
    monkeypatch.setattr(costs, "whole", lambda batch: training)
    assert not costs.exact_statistics(2)


def test_limits_that_are_just_met() -> None:
    """All layers, exactly the memory and exactly the work that are allowed."""
    costs, option = Costs(Branches(), "net", SHAPE, Device()), Option("lance", fraction=Fraction(1, 2))
    count = len(costs.layers)
    total, times = costs.memory(option, count, 2).total, costs.times_bp(option, count, 2)
    best = search(costs, [option], [2], total, times, most_layers=count).rows[0].best
    assert best is not None
    assert best.fits
    assert (best.layers, best.memory.total, best.times_bp) == (count, total, times)
    assert search(costs, [option], [2], total, times * Fraction(99, 100), most_layers=count).rows[0].best != best


def test_the_closest_lacks_least() -> None:
    """Of several that do not fit."""
    plan = search(Costs(Branches(), "net", SHAPE, Device()), OPTIONS, BATCHES, 1)
    missing = [row.next.over_bytes for row in plan.rows if row.next is not None]
    assert plan.closest is not None
    assert plan.closest.over_bytes == min(missing) < max(missing)


# ---- what is said of a plan, by hand -----------------------------------------------------------


def candidate(option: Option, memory: Memory, fidelity: Fidelity | None = None, **more: Any) -> Candidate:
    given: dict[str, Any] = {
        "over_bytes": 0, "too_much_work": False, "times_bp": Fraction(5, 4), "macs": 10, "measured": None,
        **more
    }  # fmt: skip
    return Candidate(option, 2, 3, fidelity, memory=memory, **given)


def plan_of(*rows: Row, budget: int = 10 * 1024) -> Plan:
    return Plan(rows, budget, None, ("a", "b", "c"), facts={"net": "net"})


HALF, MOST = (Option("lance", fraction=Fraction(f)) for f in ("0.5", "0.9"))
ROOM = Memory(step=1025, factors=2048, weights=3072, gradients=1, optimizer_state=0, calibration=4096, at="here")


def test_a_row_of_the_table_by_hand() -> None:
    """Bytes in KiB, rounded up, each in its column; what one layer more would take."""
    fidelity = Fidelity(0.5, 0.25, 0.75)
    best = candidate(HALF, ROOM, fidelity)
    plan = plan_of(Row(HALF, best, {3: 2}, candidate(HALF, ROOM, None, over_bytes=1)))
    (line,) = [line for line in render(plan, Device(), 200).splitlines() if line.lstrip().startswith("lance")]
    assert line.split() == ["lance", "ranks", "0.5", "6.1", "-", "0.500", "2", "3", "6.1", "4.0", "1.250", "0.1", "KiB"]
    shown = to_json(plan, Device())["rows"][0]["best"]
    assert [shown[f"fidelity{name}"] for name in ("", "_at_least", "_at_most")] == [0.5, 0.25, 0.75]


def test_alternatives_are_other_methods() -> None:
    """The first setting of each, and not the method that comes first; the rest is counted."""
    options = [HALF, MOST, Option("int8"), Option("sketch"), replace(Option("sketch"), epsilon=0.5), Option("bp")]
    options.append(Option("hosvd", fraction=Fraction(1, 2)))
    first, *others = answer(plan_of(*(Row(o, candidate(o, ROOM, Fidelity(1, 1, 1)), {3: 2}, None) for o in options)))
    assert first.startswith(
        "Train the last 2 of 3 layers with lance ranks 0.5, batch 3, as a step of the library: 6.1 of"
    )
    assert [other.partition(" with ")[2].partition(",")[0] for other in others[:3]] == [
        "int8",
        "sketch ratio 0.125",
        "bp",
    ]
    assert others[3:] == ["1 more method fits; see the table."]


def measured_as(accuracy: float) -> Measured:
    return Measured("mcunet", "CIFAR-10", 2, accuracy, 0.002, 3)


def test_what_an_alternative_gives_up() -> None:
    """Accuracy in points, layers, multiply-adds; nothing is said of an accuracy that was not measured."""
    best = candidate(HALF, ROOM, measured=measured_as(0.751))
    worse = replace(candidate(Option("int8"), ROOM, measured=measured_as(0.732), macs=20), layers=1)
    unknown = candidate(Option("bp"), ROOM)
    said = answer(plan_of(*(Row(c.option, c, {3: 2}, None) for c in (best, worse, unknown))))
    assert "Accuracy: 75.1 ± 0.2 % on CIFAR-10, mcunet with its last 2 layers" in said[0]
    assert "1.9 points less accuracy where both were measured, 1 layer fewer, 2.0 times the multiply-adds" in said[1]
    assert said[2].endswith("6.1 KiB, its accuracy was not measured.")


@pytest.mark.parametrize(
    ("ours", "theirs", "first"),
    [(0.75, 0.77, "library"), (0.71, 0.77, "device"), (None, 0.77, "library"), ("nothing", 0.77, "device")],
)
def test_which_engine_comes_first(ours: float | str | None, theirs: float, first: str) -> None:
    """The library, unless a device program is clearly better; of the same layers where nothing is measured."""
    program = Option("bp", update="image")
    device = candidate(program, ROOM, measured=measured_as(theirs))
    library = candidate(HALF, ROOM, measured=measured_as(ours) if isinstance(ours, float) else None)
    rows = [Row(HALF, None if ours == "nothing" else library, {3: 2}, library), Row(program, device, {1: 2}, None)]
    plans = [plan_of(row) for row in rows]
    assert merged(*plans).rows[0].option.engine == first


def test_what_is_too_much() -> None:
    """Work, memory of a step, or memory of the calibration; which alone might be done elsewhere."""
    while_calibrated = replace(ROOM, calibration=20 * 1024)
    cases = (
        (ROOM, {"too_much_work": True}, "1.250x backpropagation's FLOPs, too much work", False),
        (replace(ROOM, step=20 * 1024), {"over_bytes": 15 * 1024}, "15.0 KiB too much (here).", False),
        (while_calibrated, {"over_bytes": 10 * 1024}, "10.0 KiB too much while it is calibrated.", True),
    )
    for memory, more, end, elsewhere in cases:
        plan = plan_of(Row(HALF, None, {3: None}, candidate(HALF, memory, **more)))
        assert end in answer(plan)[0]
        assert ("would fit if calibrated elsewhere: lance ranks 0.5" in render(plan, Device())) is elsewhere


def test_settings_and_their_limits() -> None:
    """A given rank of LoRA is the option's."""
    assert options_for(["lora"], [], [], {"lora_rank": [7]})[0].settings.lora_rank == 7


def test_shares_and_spectra_at_their_limits(tmp_path: Path) -> None:
    """A layer may be without gradient, not all of them; one image a batch tells about one image."""
    file = tmp_path / "shares.json"
    file.write_text('{"a": 0, "b": 2.5}')
    assert layer_shares(str(file), {"a": 1, "b": 1}) == {"a": 0.0, "b": 1.0}
    file.write_text('{"a": 0, "b": 0}')
    with pytest.raises(ValueError, match="all gradients are 0"):
        layer_shares(str(file), {"a": 1, "b": 1})
    single = LayerSpectra((1, 2), (np.array([5.0]), np.array([4.0, 1.0])))
    assert mode_shares(single, 1, (1, 1), fixed=True) == [1.0, pytest.approx(0.8)]
    with pytest.raises(ValueError, match="say nothing about a batch of 2"):
        mode_shares(single, 2, (1, 1), fixed=True)
