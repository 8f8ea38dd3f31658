"""The benchmarks run, write what they print, and time the same work on both sides."""

from __future__ import annotations

import cProfile
import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.ranks.spectra_file import load_spectra
from benchmarks import (
    autograd_overhead,
    calibration,
    cost_model,
    first_call,
    fused,
    layers,
    resident,
    roofline,
    scaling,
    steps,
)
from benchmarks import side_by_side as frame
from benchmarks.steps import Case
from lance_ref import F, Tensor, count_macs, trace
from lance_ref.algebra.kernels import threads as kernels
from lance_ref.stores import EXACT

COMMANDS = ("layers", "steps", "calibration", "cost_model", "autograd_overhead", "scaling")
QUICK = ["--quick", "--repeats", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a turn, without pauses, is enough to see that it runs."""
    monkeypatch.setattr(frame, "TURN_SECONDS", 0)
    monkeypatch.setattr(frame, "PAUSE_SECONDS", 0)


def run_quick(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[dict[str, Any], str]:
    """What a quick run writes and prints; where it comes from is in the file."""
    output = tmp_path / "figures.json"
    assert module.main([*QUICK, "--output", str(output), *arguments]) == 0
    document = json.loads(output.read_text(encoding="utf-8"))
    assert {"command", "versions", "machine", "peers", "pinned", "targets"} <= set(document)
    assert document["pinned"]["asked"] == document["pinned"]["lance_ref"] == 1
    return document, capsys.readouterr().out


def check_seconds(sides: dict[str, dict[str, float]]) -> None:
    assert sides
    assert all(0 < side["min"] <= side["median"] <= side["max"] for side in sides.values())


# ---- the frame -------------------------------------------------------------------------------


def test_sides_take_turns_and_the_first_does_not_count() -> None:
    """One side after the other in every repeat: what slows the machine slows both."""
    called: list[str] = []
    found = frame.timed({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, repeats=3)
    assert called == ["a", "b"] * 4
    assert all(len(timing.wall) == len(timing.cpu) == 3 for timing in found.values())


def test_a_short_side_is_called_often_and_its_seconds_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a clock that goes on by a millisecond with every call."""
    clock = [0.0]

    def side() -> None:
        clock[0] += 1e-3

    monkeypatch.setattr(frame.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(frame, "TURN_SECONDS", 0.02)
    timing = frame.timed({"side": side}, repeats=2)["side"]
    assert timing.calls == 20
    assert timing.wall == pytest.approx((1e-3, 1e-3))


def test_median_span_and_numbers_by_hand() -> None:
    """What is printed is what was measured."""
    timing = frame.Timing((0.004, 0.001, 0.002), (0.1, 0.2, 0.3), 1)
    assert timing.as_json() == {
        "median": 0.002,
        "min": 0.001,
        "max": 0.004,
        "cpu_median": 0.2,
        "cpu_min": 0.1,
        "calls": 1,
    }
    assert frame.span(timing.as_json()) == "1.00-4.00"
    assert [frame.number(x) for x in (None, 0.125, 12.34, 1234.5)] == ["-", "0.12", "12.3", "1,234"]


def test_a_target_says_whether_it_is_met() -> None:
    """At most and at least, and what was found."""
    assert str(frame.Target("ratio", 0.5, 1)) == "met     ratio: 0.5, at most 1"
    assert str(frame.Target("times faster", 5, 10, at_least=True)) == "missed  times faster: 5, at least 10"
    assert frame.Target("ratio", 2, 1).as_json() == {"what": "ratio", "found": 2, "at_most": 1, "met": False}


def test_every_library_is_pinned_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads on both sides, also where kernels ran before; afterwards as it was."""
    monkeypatch.setenv("LANCE_REF_THREADS", "3")
    kernels._threads.cache_clear()
    try:
        with frame.pinned(2, ["torch"]) as found:
            assert kernels._threads() == found["asked"] == found["lance_ref"] == found.get("torch", 2) == 2
            blas = [library for library in found.get("libraries", []) if "blas" in library["prefix"]]
            assert all(library["num_threads"] == 2 for library in blas)
        assert kernels._threads() == 3
        assert os.environ["LANCE_REF_THREADS"] == "3"
    finally:
        monkeypatch.undo()
        kernels._threads.cache_clear()


def test_a_missing_peer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """However often it is asked for."""
    assert frame.peer("no_such_library") is None
    assert frame.peer("no_such_library") is None
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("wrong", [["--repeats", "0"], ["--threads", "-1"], ["--output", "no/such/folder/x.json"]])
def test_bad_input_is_one_line(name: str, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 before anything is measured."""
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(wrong)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert wrong[0] in printed.err
    assert not printed.out


# ---- the machine -----------------------------------------------------------------------------


def test_the_roofline_by_hand() -> None:
    """Two products: one bound by arithmetic, one by memory; the fastest library counts."""
    machine = roofline.Roofline({"a": 1.0, "b": 2.0}, {"a": 4.0})
    arithmetic, memory = (2 * 10**9, 10**9), (10**9, 8 * 10**9)
    assert machine.seconds([arithmetic, memory]) == pytest.approx(1 + 2)
    assert [machine.bound(products) for products in ([arithmetic], [memory])] == ["arithmetic", "memory"]


def test_the_machines_figures_are_positive() -> None:
    """Every library that is there has its own."""
    machine = roofline.measure(1, quick=True)
    assert "numpy" in machine.gflops
    assert "numpy copy" in machine.gbytes_per_second
    assert all(value > 0 for value in (*machine.gflops.values(), *machine.gbytes_per_second.values()))


@pytest.mark.skipif(not resident.measurable(), reason="this system does not say what a process holds")
def test_what_a_step_holds_is_seen() -> None:
    """64 MiB that live for a moment are in the peak, what was held before is not."""
    held = np.ones(4 * 2**20)

    def hold() -> None:
        np.ones(8 * 2**20).sum()

    found = resident.peak_of(hold)
    assert found.before > held.nbytes
    assert 60 * 2**20 < found.peak - found.before < 70 * 2**20


# ---- layers ----------------------------------------------------------------------------------


def test_layers_write_their_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One small layer: every side has its seconds, ratios are those of the medians."""
    name = "1x1 160-960 at 7"
    document, printed = run_quick(layers, tmp_path, capsys, "--layers", name)
    (row,) = document["rows"]
    assert row["layer"] == name
    assert {"bp", "lance", "hosvd", "asi"} <= set(row["seconds"])
    check_seconds(row["seconds"] | row["parts"])
    medians = {side: of["median"] for side, of in (row["seconds"] | row["parts"]).items()}
    assert row["ratios"]["lance/bp"] == medians["lance"] / medians["bp"]
    parts = medians["projection"] + medians["grad_weight from the core"]
    assert row["ratios"]["parts"] == parts / medians["exact grad_weight"]
    assert document["roofline"]["gflops"]["numpy"] > 0
    assert name in printed


@pytest.mark.parametrize("name", layers.LAYERS)
def test_a_step_is_a_whole_step(name: str) -> None:
    """Forward and both gradients run: three times the multiply-adds of the layer."""
    layer = layers.LAYERS[name]
    geometry = layer.geometry(1)
    with count_macs() as counter:
        layers.our_step(geometry, EXACT)()
    macs = math.prod(geometry.output_shape) * math.prod(geometry.weight_shape[1:])
    if len(geometry.weight_shape) == 4 and not geometry.is_depthwise:
        assert layer.groups == 1
    kinds = counter.by_kind()
    assert (kinds["forward"], kinds["grad_input"], kinds["grad_weight"]) == (macs, macs, macs)
    assert [flops for flops, _ in layers.products(geometry, layer.subspace(1), "pytorch")] == [2 * macs] * 3


@pytest.mark.parametrize("name", layers.LAYERS)
def test_both_sides_do_the_same(name: str) -> None:
    """PyTorch's gradients of the very step that is timed are ours."""
    torch = pytest.importorskip("torch")
    geometry = layers.LAYERS[name].geometry(1)
    with frame.pinned(1, ["torch"]):
        ours, theirs = layers.our_step(geometry, EXACT)(), layers.pytorch_step(geometry, torch)()
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other.numpy(), rtol=0, atol=1e-4 * np.abs(mine).max())


def test_bytes_and_operations_by_hand() -> None:
    """x (1, 3, 2, 2), w (5, 3, 1, 1), y (1, 5, 2, 2): 12, 15 and 20 numbers, 60 multiply-adds a product."""
    layer = layers.Layer((3, 2, 2), (5, 3, 1, 1), (128, 3, 2, 2), (128, 3, 2, 2))
    flops, nbytes = zip(*layers.products(layer.geometry(1), layer.subspace(1), "bp"), strict=True)
    assert flops == (120, 120, 120)
    assert nbytes == (4 * 47, 4 * 47, 4 * 47)


@pytest.mark.parametrize("name", layers.MEASURED)
def test_ranks_are_those_of_the_spectra(name: str) -> None:
    """The largest of each mode at an energy threshold of 0.7; layers of the very sizes that are timed."""
    file, paths = layers.MEASURED[name]
    spectra = load_spectra(Path(__file__).parents[2] / "analysis" / "data" / f"{file}.json")
    found = [spectra.layers[path] for path in paths]
    assert {layer.shape[1:] for layer in found} == {layers.LAYERS[name].input_shape}
    assert tuple(map(max, zip(*(layer.ranks(0.7, layers.BATCH) for layer in found), strict=True))) == (
        layers.LAYERS[name].ranks
    )


def test_targets_of_layers() -> None:
    """Each layer against one limit, means over all, and the parts of small maps alone."""
    rows = [
        {"layer": "1x1 160-960 at 7", "ratios": {"lance/pytorch": 0.5, "lance/bp": 0.9, "parts": 0.05}},
        {"layer": "4x4 64-128 at 14", "ratios": {"lance/pytorch": 2.0, "lance/bp": 0.4, "parts": 0.5}},
    ]
    assert [(target.limit, target.met) for target in layers.targets(rows)] == [
        (1.2, True),
        (1.2, False),
        (0.75, False),
        (0.75, True),
        (0.1, True),
    ]


# ---- whole steps -----------------------------------------------------------------------------


def test_steps_write_their_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times of each side, and what their processes hold."""
    document, printed = run_quick(steps, tmp_path, capsys, "--nets", "mlp", "--sides", "bp", "lance")
    (row,) = document["rows"]
    check_seconds(row["seconds"])
    assert row["ratios"]["lance/bp"] == row["seconds"]["lance"]["median"] / row["seconds"]["bp"]["median"]
    if resident.measurable():
        assert all(of["peak"] >= of["before"] > 2**20 for of in row["resident"].values())
    assert row["resident_on_features"] is None  # nothing is frozen
    assert row["predicted"]["lance"]["tape_bytes"] < row["predicted"]["bp"]["tape_bytes"]
    assert row["ranks_from"] in printed


def test_fused_passes_write_their_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The time of an evaluation, and the memory of a step fused and one by one, each in a process that was told so."""
    document, printed = run_quick(fused, tmp_path, capsys)
    check_seconds(document["evaluation_seconds"])
    if resident.measurable():
        assert {"fused", "one by one"} <= set(document["step_resident"])
        for of in document["step_resident"].values():
            assert of["over_start"] == of["peak"] - of["before"] >= 0
    assert "evaluation of mobilenetv2, 2 images" in printed
    assert "LANCE_REF_FUSE" not in os.environ


def test_targets_of_steps() -> None:
    """The peak must be lower by what the tape is lower."""
    row = {
        "net": "mlp",
        "ratios": {"lance/bp": 1.1, "lance/pytorch": 1.4},
        "resident": {"bp": {"peak": 9 * steps.MIB}, "lance": {"peak": 6 * steps.MIB}},
        "resident_on_features": {"bp": {"peak": 2 * steps.MIB}, "lance": {"peak": steps.MIB}},
        "predicted": {"bp": {"tape_bytes": 3 * steps.MIB}, "lance": {"tape_bytes": steps.MIB}},
    }
    found = steps.targets([row])
    assert [(target.found, target.limit, target.met) for target in found] == [
        (1.1, 1, False),
        (1.4, 1.0, False),
        (3, 2, True),
        (1, 2, False),
    ]


def test_a_step_on_features_is_the_same_step() -> None:
    """The frozen stages run beforehand, two images at a time: the same gradients of what trains."""
    case, found = Case("mcunet", 3, "last:4", 64), {}
    assert steps.has_frozen_part(case)
    assert not steps.has_frozen_part(Case("mlp", 2))
    step = case.predict("bp").step
    images = np.random.default_rng(0).standard_normal((3, *step.input_shape), dtype=np.float32)
    features, rest = steps.features_of(step.net, images)
    assert len(features) == 3
    for inputs, net in ((images, step.net), (features, rest)):
        net.zero_grad()
        F.cross_entropy(net(inputs), np.arange(3)).backward()
        found[net is rest] = [p.grad.copy() for p in step.net.parameters() if p.grad is not None]
    assert len(found[True]) == len(found[False]) > 5
    for ours, expected in zip(found[True], found[False], strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", [Case("mobilenetv2", 2, "last:4", 32), Case("mcunet", 2, "last:4", 32),
                                  Case("alexnet-cl", 3), Case("mlp", 2)], ids=lambda case: case.net)  # fmt: skip
def test_the_torch_nets_are_ours(case: Case) -> None:
    """Same logits, same gradients of what trains, and nothing else trains: both sides time the same step."""
    torch = pytest.importorskip("torch")
    from benchmarks.torch_nets import twin

    step = case.predict("bp").step
    net, theirs = step.net, twin(case.net, step.net, steps.CLASSES)
    for module in (*net.modules(), *theirs.modules()):
        if type(module).__name__ == "Dropout":
            module.p = 0.0
    x = np.random.default_rng(0).standard_normal((case.batch, *step.input_shape), dtype=np.float32)
    y = np.arange(case.batch)
    logits = net(x)
    F.cross_entropy(logits, y).backward()
    with frame.pinned(1, ["torch"]):
        expected = theirs(torch.from_numpy(x))
        torch.nn.functional.cross_entropy(expected, torch.from_numpy(y)).backward()
    np.testing.assert_allclose(logits.data, expected.detach().numpy(), rtol=1e-3, atol=1e-4)
    trained = 0
    for own, other in zip(net.parameters(), theirs.parameters(), strict=True):
        assert own.requires_grad == other.requires_grad
        if own.requires_grad:
            trained += 1
            largest = np.abs(own.grad).max()
            np.testing.assert_allclose(own.grad, other.grad.numpy(), rtol=0, atol=2e-3 * largest + 1e-6)
    assert trained >= 5


@pytest.mark.parametrize("case", [Case("mobilenetv2", 2, "last:4", 32), Case("mlp", 2)], ids=lambda case: case.net)
def test_a_folded_net_is_the_same_net(case: Case) -> None:
    """The same logits without the frozen norms, and the same convolutions train."""
    torch = pytest.importorskip("torch")
    from benchmarks.torch_nets import folded, twin

    step = case.predict("bp").step
    plain, without = twin(case.net, step.net, steps.CLASSES), folded(twin(case.net, step.net, steps.CLASSES))
    assert not [module for module in without.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for net in (plain, without):
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *step.input_shape), dtype=np.float32))
    expected = plain(x).detach().numpy()
    np.testing.assert_allclose(without(x).detach().numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    layers_of = [
        {name for name, module in net.named_modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
         and module.weight.requires_grad}
        for net in (plain, without)
    ]  # fmt: skip
    assert layers_of[0] == layers_of[1]


def test_a_compiler_that_fails_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """And its side is left out."""

    def fails() -> None:
        raise RuntimeError("no compiler\nand much more")

    assert not steps.works(fails)
    assert capsys.readouterr().out == "torch.compile does not work here: skipped (RuntimeError: no compiler)\n"
    assert steps.works(lambda: None)


# ---- calibration -----------------------------------------------------------------------------


def test_calibration_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All three comparisons, and the share of a whole calibration."""
    document, printed = run_quick(calibration, tmp_path, capsys)
    for name in ("activation", "accumulation", "calibration"):
        check_seconds(document[name])
    assert document["share_of_forward_passes"] > 0
    assert "four SVDs" in printed


def test_the_share_of_a_recipe_by_hand() -> None:
    """Two batches took 3 seconds, 2 of them forward, and eigenvectors 10: a hundred take 150 + 10, over 100."""
    seconds = {"forward passes": 2.0, "forward passes and Grams": 3.0, "eigenvectors": 10.0}
    timings = {name: frame.Timing((of,), (of,), 1) for name, of in seconds.items()}
    assert calibration.share_of_recipe(timings, 2) == pytest.approx(1.6)


def test_blas_sums_the_same_grams() -> None:
    """One triangle of each of our Gram matrices, in either precision."""
    x = calibration.activation((3, 4, 2, 5))
    sides = calibration.accumulations(x)
    for name, tolerance in (("ssyrk", 1e-5), ("dsyrk", 1e-6)):
        for mode, triangle in enumerate(sides[name]()):
            unfolding = np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1).astype(np.float64)
            np.testing.assert_allclose(np.triu(triangle), np.triu(unfolding @ unfolding.T), rtol=tolerance)


# ---- small steps -----------------------------------------------------------------------------


def test_overhead_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every operation, the small net, and a process without Numba."""
    document, printed = run_quick(autograd_overhead, tmp_path, capsys)
    for sides in document["operations"]["seconds_of_a_chain"].values():
        check_seconds(sides)
    check_seconds(document["step"])
    assert not document["first_call"]["without Numba"]["numba"]
    assert {"the tape alone", *autograd_overhead.OPERATIONS} <= set(document["operations"]["overhead_microseconds"])
    assert "microseconds" in printed


@pytest.mark.parametrize("name", autograd_overhead.OPERATIONS)
def test_the_bare_calls_are_those_of_the_operation(name: str) -> None:
    """The arithmetic that is taken off is that of the result and its gradients."""
    operation = autograd_overhead.OPERATIONS[name]
    arrays = np.random.default_rng(0).standard_normal((3, 2, 2), dtype=np.float32)
    x, w = (Tensor(array, requires_grad=True) for array in arrays[:2])
    out = operation.apply(F, x, w)
    out.backward(arrays[2])
    bare = operation.bare(*arrays)
    results, gradients = (bare[0], bare[1:]) if isinstance(bare, tuple) else (bare, ())
    np.testing.assert_allclose(out.data, results, rtol=1e-6)
    for gradient, tensor in zip(gradients, (x, w), strict=False):
        np.testing.assert_allclose(tensor.grad, gradient, rtol=1e-6)


@pytest.mark.skipif(not kernels.numba_enabled(), reason="Numba is switched off or not installed")
def test_the_first_call_reaches_every_kernel() -> None:
    """A kernel that is left out would be compiled in somebody's first step, uncounted."""
    found = autograd_overhead.first_call()
    assert found["kernels"] == len(first_call.kernels()) > 5
    assert not found["not_reached"]


def test_a_failing_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit code and the end of what it said, not a table of zeros."""
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises((RuntimeError, OSError)):
        autograd_overhead.first_call()


# ---- scaling ---------------------------------------------------------------------------------


def test_scaling_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exponents along every axis, those of bytes as predicted, and the drawing."""
    figure = tmp_path / "scaling.png"
    document, printed = run_quick(scaling, tmp_path, capsys, "--figure", str(figure))
    assert [row["axis"] for row in document["rows"]] == list(scaling.AXES)
    for row in document["rows"]:
        for name, of in row["series"].items():
            assert math.isfinite(of["measured_exponent"])
            if name.startswith("bytes"):
                assert of["measured"] == of["predicted"]
    assert figure.stat().st_size > 10_000
    assert "predicted" in printed


def test_exponents_by_hand() -> None:
    """Bytes of the tape: B·C·n² exactly, r² of the core at two free ranks; multiply-adds of backpropagation: C²."""
    rows = {}
    for axis, values in scaling.AXES.items():
        points = [scaling.predicted(scaling.Sizes(**{axis: value})) for value in values]
        rows[axis] = {
            (what, name): scaling.exponent(values, [point[what][name] for point in points])
            for what, names in scaling.SERIES.items()
            for name in names
        }
    expected = {"batch": 1, "channels": 1, "map": 2, "rank": 0}
    for axis, slope in expected.items():
        assert rows[axis]["bytes", "bp tape"] == pytest.approx(slope, abs=1e-9)
    assert rows["rank"]["bytes", "lance tape"] == pytest.approx(2)
    assert rows["channels"]["time of a step", "bp"] == pytest.approx(2)


def test_a_wrong_figure_is_refused_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that matplotlib cannot write."""
    with pytest.raises(SystemExit) as ended:
        scaling.main([*QUICK, "--figure", "scaling.txt"])
    assert ended.value.code == 2
    assert "scaling.txt" in capsys.readouterr().err


# ---- the cost model beside other counters ----------------------------------------------------


def test_the_counters_count_the_same_net() -> None:
    """What is timed on PyTorch's side has our net's parameters, and forward and backward the FLOPs of ours."""
    torch = pytest.importorskip("torch")
    from benchmarks.torch_nets import make_mobilenetv2

    with torch.device("meta"):
        theirs = [tuple(p.shape) for p in make_mobilenetv2(cost_model.CLASSES).parameters()]
    assert theirs == [p.shape for p in cost_model.our_net().parameters()]
    sides = cost_model.peers(2)
    # PyTorch's counter forgets groups in the weight gradient, which is a factor in the depthwise layers
    records = trace(cost_model.our_net().train(), (2, 3, cost_model.SIZE, cost_model.SIZE))
    depthwise = [r for r in records if r.op == "conv2d" and r.attributes["groups"] > 1]
    forgotten = sum(
        2 * r.output.size * math.prod(r.inputs[1].shape[1:]) * (r.attributes["groups"] - 1) for r in depthwise
    )
    assert len(depthwise) == 17
    assert sides["flop counter"]() == cost_model.ours(2, "bp")() + forgotten


def test_the_cost_model_writes_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every side has its seconds and its count, and the ratio is that of the medians of the processor's time."""
    monkeypatch.setattr(cost_model, "command", lambda *more: sum(range(10**5)))
    monkeypatch.setattr(cost_model, "peers", lambda batch: {"another": lambda: sum(range(10**6))})
    document, _ = run_quick(cost_model, tmp_path, capsys)
    medians = {name: of["cpu_median"] for name, of in document["seconds"].items()}
    assert document["times_ours"] == {"another": medians["another"] / medians["ours, bp"]}
    assert document["flops"]["ours, bp"] == document["flops"]["ours, all"] > 0
    assert {"chain of 10 operations", "batch 64, 224 pixels"} <= set(document["growth"])
    check_seconds(document["command_line"] | document["reports"])
    assert cost_model.AGAIN in document["reports"]


def test_the_cost_grows_as_the_operations_do() -> None:
    """Function calls, which no load of the machine changes: linear in the operations, the same at any size."""

    def calls(run: Callable[[], object]) -> int:
        run()
        profile = cProfile.Profile()
        profile.runcall(run)
        return sum(entry.callcount for entry in profile.getstats())

    one, five = calls(cost_model.chain(200)), calls(cost_model.chain(1000))
    assert five < 5.1 * one
    small, large = calls(cost_model.ours(1, "bp", 64)), calls(cost_model.ours(4096, "bp"))
    assert abs(large - small) < 0.02 * small


def test_a_report_of_every_method_takes_few_calls() -> None:
    """The time of a report is that of its function calls; a check on them that no load of the machine disturbs."""
    run = cost_model.ours(128, "all", tune="last:4")
    run()
    profile = cProfile.Profile()
    profile.runcall(run)
    assert sum(entry.callcount for entry in profile.getstats()) < 300_000
