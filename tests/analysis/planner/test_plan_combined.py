"""Combinations: cores by image, in a subspace, in codes; batches in parts; sets of layers; and their code."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lance_ref
from analysis.plan import main, parser
from analysis.planner.code import code_for
from analysis.planner.costs import Costs, Device
from analysis.planner.device_costs import DeviceCosts
from analysis.planner.make import library_plan
from analysis.planner.options import COMBINATIONS, Option, calibrated, in_parts, options_for
from analysis.planner.search import Candidate, Plan, search
from analysis.steps.nets import build

SHAPE, CLASSES, BATCH = (1, 16, 16), 10, 8
ROOM = 48 * 1024
"""Bytes of Python's own objects in a step."""
QUARTER = [Fraction(1, 4)]


def costs_of(name: str = "convnet", shape: tuple[int, ...] = SHAPE, **more: Any) -> Costs:
    return Costs(build(name, CLASSES, shape, without_weights=True), name, shape, Device(), **more)


def run(code: str) -> tuple[dict[str, Any], int]:
    """The script is run as it is, then one more step of it, whose peak is measured."""
    loop = code.partition("for step in range(2):")[2]
    space: dict[str, Any] = {}
    exec(compile(code, "pasted", "exec"), space)
    again = compile("for step in range(1):" + loop, "step", "exec")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        exec(again, space)
        return space, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


COMBINED = in_parts(options_for(list(COMBINATIONS), [], QUARTER, combined=True), BATCH)


@pytest.mark.parametrize("option", COMBINED, ids=lambda option: f"{option.name} {option.batch}")
def test_the_code_of_every_combination_takes_what_was_promised(option: Option) -> None:
    """Pasted and run, a step takes no more than the candidate says; a part of the batch is in memory, not all of it."""
    plan = search(costs_of(), [option], (2, BATCH), 2**30, most_layers=2)
    if option.batch is not None and not (option.by_image and option.core_bits is None):
        assert not plan.rows, "a store that mixes the images of a batch took it in parts"
        return
    (row,) = plan.rows
    best = row.best
    assert best is not None
    assert (best.batch, best.layers) == (BATCH, 2)
    space, most = run(code_for(best, plan, "convnet", SHAPE, CLASSES, "float32", "sgd"))
    stores = [layer.store.describe() for layer in lance_ref.nn.selection.weighted_layers(space["net"]).values()]
    ours = [store for store in stores if store["name"] == "lance"]
    assert len(ours) == 2
    assert {store["ranks"][0] is None for store in ours} == {option.by_image}
    assert {store.get("core_bits") for store in ours} == {option.core_bits}
    images = space["images"].nbytes * best.at_a_time // best.batch
    assert most + images <= 1.05 * best.memory.step + ROOM


@pytest.mark.parametrize("method", ["bp", "bias-only", "head-only"])
def test_the_code_of_a_batch_in_parts(method: str) -> None:
    """Where the whole batch does not fit: the peak of a part, with the gradients of all parts."""
    options = in_parts([Option(method)], BATCH)
    costs = costs_of()
    n = 0 if method == "head-only" else 2
    in_two = costs.memory(options[1], n, 2).total
    assert in_two < costs.memory(options[0], n, BATCH).total
    plan = search(costs, options, (2, BATCH), in_two, most_layers=2)
    best = next(row.best for row in plan.rows if row.option.batch)
    assert best is not None
    assert (best.batch, best.at_a_time, best.layers) == (BATCH, 2, n)
    space, most = run(code_for(best, plan, "convnet", SHAPE, CLASSES, "float32", "sgd"))
    part = space["images"][:2].nbytes
    assert most + part <= 1.05 * best.memory.step + ROOM


def test_parts_as_all_candidates_one_by_one() -> None:
    """The most layers with the fewest images, then the most images; for every budget at which something changes."""
    costs, sizes = costs_of(), (1, 2, 4, BATCH)
    options = [
        option for option in in_parts(options_for(["bp", "lance"], [], QUARTER, combined=True), BATCH) if option.batch
    ]
    options = [option for option in options if not costs.mixing(replace(option, batch=None), 1)]
    assert {option.method for option in options} == {"bp", "lance"}
    count = len(costs.layers)
    for option in options:
        totals = {(n, k): costs.memory(option, n, k).total for n in range(1, count + 1) for k in sizes[:-1]}
        for budget in sorted({total - less for total in totals.values() for less in (0, 1)}):
            rows = search(costs, [option], sizes, budget).rows
            fits = [key for key, total in totals.items() if total <= budget]
            found = [(row.best.layers, row.best.at_a_time) for row in rows if row.best is not None]
            assert found == ([max(fits)] if fits else []), (option.name, budget)


def test_gradients_of_earlier_parts_are_counted() -> None:
    """While a part runs, the gradients of the parts before it are there; of one part for all of them there are none."""
    costs = costs_of()
    once, parts = (costs.memory(Option("bp", batch=batch), 2, 2) for batch in (None, BATCH))
    assert parts.step == once.step + parts.carried
    assert 0 < parts.carried <= once.gradients
    assert costs.memory(Option("bp", batch=2), 2, 2) == replace(once, calibration=0)
    with pytest.raises(ValueError, match="3 images at a time do not divide 8"):
        costs.memory(Option("bp", batch=BATCH), 2, 3)


def test_stores_that_mix_images_take_whole_batches() -> None:
    """Codes have a range for all images of a batch, and a compressed batch mode has directions of all."""
    costs = costs_of()
    mixing = {
        option.name: costs.mixing(option, 2) is not None
        for option in options_for(["bp", "int8", "hosvd", "lance"], [], QUARTER, combined=True)
    }
    assert mixing == {
        "bp": False,
        "int8": True,
        "hosvd ranks 0.25": True,
        "lance ranks 0.25": True,
        "lance ranks 0.25, by image": False,
        "lance ranks 0.25, subspace update, by image": False,
        "lance ranks 0.25, subspace update, 8-bit core": True,
    }


def test_calibrated_here_and_elsewhere() -> None:
    """Both are rows where they differ, with one step; where both fit alike there is one row."""
    costs, (here, there) = costs_of("mcunet", (3, 32, 32)), calibrated([Option("lance", fraction=Fraction(1, 4))])
    memories = [costs.memory(option, 1, 1) for option in (here, there)]
    assert memories[0] == replace(memories[1], calibration=memories[0].calibration)
    assert memories[1].total == memories[1].training < memories[0].calibration
    plan = search(costs, [here, there], (1,), memories[1].total, most_layers=1)
    assert [(row.option.elsewhere, row.best is not None) for row in plan.rows] == [(True, True), (False, False)]
    assert len(search(costs, [here, there], (1,), 2**30, most_layers=1).rows) == 1
    assert len(search(costs, [here, there], (1,), 1, most_layers=1).rows) == 2
    assert len(search(costs_of(), [here, there], (2,), 1, most_layers=1).rows) == 1  # the step takes more anyway


def test_a_core_in_codes_keeps_a_little_less() -> None:
    """By the error of eight bits, in the estimate and in what is certain."""
    from analysis.planner.fidelity import Fidelity, in_codes

    assert in_codes(Fidelity(0.5, 0.4, 0.9), (4, 3, 8, 8), (None, 2, 4, 4)) == Fidelity(
        0.5 * (1 - 3 / (4 * 255**2)), 0.4 * (1 - (4 * 4 * 4 - 2) / (2 * 255**2)), 0.9
    )


# ---- layers of one's own choice --------------------------------------------------------------


def test_layers_of_a_pattern() -> None:
    """The last n of those that match; shares, evidence and code are about the whole net."""
    costs = costs_of("mcunet", (3, 32, 32), tune="*expand*")
    assert 1 < len(costs.layers) < len(costs.every) == 42
    assert all("expand" in path for path in costs.layers)
    assert costs.trains(2)[0] == costs.layers[-2:]
    assert [costs.depth(n) for n in (0, len(costs.layers))] == [0, 0]
    whole = costs_of("mcunet", (3, 32, 32))
    assert [whole.depth(n) for n in (0, 3, 42)] == [0, 3, 42]
    best = search(costs, [Option("bp")], (1,), 2**30).rows[0].best
    assert best is not None
    assert best.fidelity is not None
    assert best.fidelity.estimate == pytest.approx(len(costs.layers) / 42)
    assert best.measured is None
    assert costs.memory(Option("bp"), 2, 1).total < whole.memory(Option("bp"), 42, 1).total


def test_the_code_of_chosen_layers(capsys: pytest.CaptureFixture[str]) -> None:
    """It names them, and they train."""
    asked = ["--net", "convnet", "--num-classes", "10", "--input-shape", "1,16,16", "--batch", "2", "--budget", "9MiB"]
    options = parser().parse_args([*asked, "--tune", "*2*", "--method", "bp", "--engine", "library"])
    plan = library_plan(options)
    best = plan.rows[0].best
    assert best is not None
    code = code_for(best, plan, "convnet", SHAPE, CLASSES, "float32", "sgd")
    space, _ = run(code)
    assert tuple(space["net"].tuning.layers) == plan.paths
    assert len(plan.paths) < len(plan.every)
    assert main([*asked, "--tune", "*2*", "--method", "bp", "--engine", "both"]) == 0
    assert "chosen layer" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("engine", ["library", "device"])
def test_the_code_of_other_nets(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A factory of one's own is built as the planner built it."""
    (tmp_path / "plans_own_net.py").write_text(
        "from lance_ref import nn\ndef net():\n    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 7))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    asked = ["--net", "plans_own_net:net", "--input-shape", "8", "--budget", "1MiB", "--method", "bp", "--batch", "2"]
    if engine == "device":
        asked = [*asked[:-2], "--engine", "device"]
    assert main([*asked, "--engine", engine]) == 0
    _, _, code = capsys.readouterr().out.partition("To run the first of them:\n")
    space: dict[str, Any] = {}
    exec(compile(code, "pasted", "exec"), space)
    assert space["net"].tuning.layers == ("0",)


def test_frozen_weights_in_int8(tmp_path: Path) -> None:
    """The flash of a program is that of its export, in float32 and in int8, and the RAM is the same."""
    net = build("resnet8", 10, (3, 32, 32), without_weights=False)
    option, found = Option("head-only", update="image"), {}
    for stored in ("flash", "int8"):
        costs = DeviceCosts(net, "resnet8", (3, 32, 32), "float32", None, 2**20, weights=stored)
        memory, program = costs.program(option, 0)
        assert program is not None
        kind = "int8" if stored == "int8" else "float32"
        written = program.export_c(tmp_path / stored, weights=kind)
        found[stored] = memory.total, memory.flash, written.flash_bytes - memory.flash
    assert found["flash"][0] == found["int8"][0]
    assert found["int8"][1] < found["flash"][1] / 3
    assert found["flash"][2] == found["int8"][2]  # what the weights that train start with


def test_a_plan_shows_the_best_row_of_each_method() -> None:
    """All settings are rows; of each method and engine the first is shown."""
    costs = costs_of()
    options = calibrated(in_parts(options_for(["bp", "lance"], [], QUARTER, combined=True), 4))
    total = costs.memory(Option("lance", fraction=Fraction(1, 4), elsewhere=True), 1, 1).total
    plan = search(costs, options, (1, 4), total)
    shown = [(row.option.method, row.option.elsewhere) for row in plan.shown]
    assert len(shown) == len(set(shown)) < len(plan.rows)
    assert plan.shown[0] is plan.rows[0]
    assert isinstance(plan, Plan)
    assert all(isinstance(row.best or row.next, Candidate) for row in plan.rows if row.best or row.next)


def test_images_of_an_update_stay_alike() -> None:
    """A batch that does not fit goes in parts, so that rows are about updates of the same number of images."""
    costs = costs_of()
    budget = costs.memory(Option("bp", batch=BATCH), len(costs.layers), 1).total
    plan = search(costs, in_parts([Option("bp"), Option("bias-only")], BATCH), (1, 2, 4, BATCH), budget)
    assert {row.best.batch for row in plan.shown if row.best is not None} == {BATCH}
    assert np.isclose(float(plan.shown[0].best.times_bp), 1.0)  # type: ignore[union-attr]


def test_of_equals_the_one_with_less_work_is_first() -> None:
    """Checkpoints and backpropagation have one gradient and one batch; how many images go at a time is no merit."""
    costs = costs_of("mcunet", (3, 32, 32))
    options = in_parts([Option("checkpoint"), Option("bp")], BATCH)
    budget = costs.memory(Option("bp", batch=BATCH), 1, 1).total
    plan = search(costs, options, (1, 2, 4, BATCH), budget, most_layers=1)
    checkpoint, bp = (next(row for row in plan.shown if row.option.method == name) for name in ("checkpoint", "bp"))
    assert checkpoint.best is not None
    assert bp.best is not None
    assert bp.best.batch == checkpoint.best.batch == BATCH
    assert bp.best.times_bp < checkpoint.best.times_bp
    assert plan.rows[0] is bp
