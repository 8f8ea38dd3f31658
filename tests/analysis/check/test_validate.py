"""The validation: a reduced grid agrees, a wrong rule is reported, and what was not compared is not agreement."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis import validate
from analysis.check import cells as validate_cells
from analysis.check import torch_replay
from analysis.check.cells import validate_cell
from analysis.check.measure import PEAK, compare
from analysis.check.table import judged, summary, verdict
from analysis.commands import sweep
from analysis.reports import peaks as method_peaks
from analysis.rules import stores as store_rules
from analysis.rules import tucker_costs
from analysis.rules.norms import batch_norm
from analysis.rules.op_cost import Call, OpCost
from analysis.rules.operations import OPERATIONS
from analysis.steps.methods import METHODS
from lance_ref.models import NETS

MIB = 2**20


@pytest.fixture(name="without_pytorch")
def _without_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replay takes most of the time of a small cell."""
    monkeypatch.setattr(torch_replay, "available", lambda: False)


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the outcomes by method of the only cell."""
    options = validate.parser().parse_args(arguments)
    outcomes = validate.run(validate.grid(options), None, 1)
    return 0 if judged(summary(outcomes)) else 1, outcomes[0]["methods"]


@pytest.mark.usefixtures("without_pytorch")
def test_a_reduced_grid_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method, a batch of one included: each number as predicted, and the files say so."""
    output = tmp_path / "validate.json"
    arguments = ["--nets", "convnet", "mlp", "--batch", "1", "4", "--dtype", "float32", "--output", str(output)]
    code = validate.main(arguments)
    printed = capsys.readouterr().out
    assert code == 0, printed
    document = json.loads(output.read_text(encoding="utf-8"))
    assert {(c["net"], c["batch"], c["dtype"]) for c in document["cells"]} == {
        (net, batch, "float32") for net in ("convnet", "mlp") for batch in (1, 4)
    }
    assert all(list(cell["methods"]) == list(METHODS) for cell in document["cells"])
    counts = document["summary"]
    assert counts["steps"] == 4 * len(METHODS) == counts["agree"] + counts["left_out"]
    assert counts["numbers"] > 1000
    assert output.with_suffix(".md").read_text(encoding="utf-8").strip() == printed.strip()
    reason = "none of the tuned layers is a linear layer or a 1x1 convolution of one group"
    assert f"| convnet | lora | 1, 4 | {reason} |" in printed


def test_pytorch_is_asked_too() -> None:
    """A net with a residual and batch norm: what PyTorch keeps and counts, as the model says."""
    pytest.importorskip("torch")
    found = validate_cell("resnet8", 2, "float32", ["bp", "lance", "checkpoint"])["methods"]
    assert [verdict(found[method]) for method in found] == ["agrees"] * 3
    assert "pytorch bytes" in found["lance"]["quantities"]
    assert found["bp"]["quantities"]["FLOPs backward, FlopCounterMode"]["predicted"] > 0


# ---- planted faults ------------------------------------------------------------------------


def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tucker_costs.projection_macs
    monkeypatch.setattr(tucker_costs, "projection_macs", lambda shape, ranks, *order: right(shape, (*ranks[:3], None)))


def _a_byte_for_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store_rules.STORES, "quantized", store_rules.STORES["exact"])


def _batch_norm_keeps_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_in_pytorch(call: Call) -> OpCost:
        cost = batch_norm(call)
        return replace(cost, tape=cost.tape + cost.pytorch)

    monkeypatch.setitem(OPERATIONS, "batch_norm", replace(OPERATIONS["batch_norm"], cost=as_in_pytorch))


def _half_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    right = method_peaks.peak_of
    monkeypatch.setattr(
        method_peaks,
        "peak_of",
        lambda *a, **k: replace(right(*a, **k), peak_bytes=right(*a, **k).peak_bytes // 2),
    )


@pytest.mark.usefixtures("without_pytorch")
@pytest.mark.parametrize(
    ("plant", "method", "what"),
    [
        (_no_width, "lance", "projection multiply-adds"),
        (_a_byte_for_a_code, "int8", "tape bytes"),
        (_batch_norm_keeps_its_input, "bp", "tape bytes"),
        (_half_the_peak, "bp", PEAK),
    ],
)
def test_a_wrong_rule_is_reported(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    plant: Callable[[pytest.MonkeyPatch], None],
    method: str,
    what: str,
) -> None:
    """Exit code 1, and the quantity is named; the same run without the fault agrees."""
    arguments = ["--nets", "resnet8", "--methods", method, "--batch", "16", "--dtype", "float32"]
    assert run(*arguments)[0] == 0
    plant(monkeypatch)
    assert validate.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "**0 agree, 1 differ" in printed
    section = printed.partition("## What differs")[2].partition("## Steps")[0]
    assert f"| resnet8 | {method} | 16 | float32 | {what} |" in section


@pytest.mark.usefixtures("without_pytorch")
def test_a_step_that_fails_is_no_agreement(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The other methods are still compared, and the message is kept."""

    def broken(prediction: Any, **_: Any) -> Any:
        if "int4" in prediction.bills:
            raise RuntimeError("no such store today")
        return compare(prediction)

    monkeypatch.setattr(validate_cells, "compare", broken)
    assert validate.main(["--nets", "mlp", "--methods", "bp", "int4", "--batch", "2", "--dtype", "float32"]) == 1
    printed = capsys.readouterr().out
    assert "**1 agree, 0 differ, 1 failed**" in printed
    assert "RuntimeError: no such store today" in printed


def test_what_was_left_out_alone_is_no_agreement() -> None:
    """A grid in which nothing was compared has shown nothing."""
    code, methods = run("--nets", "convnet", "--methods", "lora", "--batch", "2", "--dtype", "float32")
    assert code == 1
    assert verdict(methods["lora"]) == "left out"


def test_large_peaks_are_held_to_five_per_cent_in_the_summary() -> None:
    """The slack for Python's objects must not hide how near the large peaks are."""

    def step(predicted: int, measured: int) -> dict[str, Any]:
        entry = {"predicted": predicted, "measured": measured, "numbers": 1, "differing": 0, "differences": []}
        return {"net": "mlp", "batch": 1, "dtype": "float32", "methods": {"bp": {"quantities": {PEAK: entry}}}}

    counts = summary([step(104 * MIB, 100 * MIB), step(5 * MIB // 4, MIB), step(MIB // 2, MIB // 4)])
    assert (counts["large_peaks"], counts["large_peaks_near"]) == (2, 1)


# ---- resuming, and bad input ---------------------------------------------------------------


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished cells are read, not run; cells of other sources run again."""
    arguments = ["--nets", "mlp", "--methods", "bp", "--batch", "2", "--dtype", "float32"]
    work = validate.grid(validate.parser().parse_args(arguments))
    folder = str(tmp_path / "cells")
    first = validate.run(work, folder, 1)
    ran: list[Any] = []

    def nothing_runs(tasks: Any, jobs: int) -> Any:
        ran.extend(tasks)
        return iter(())

    monkeypatch.setattr(sweep, "_in_processes", nothing_runs)
    assert validate.run(work, folder, 1) == first
    assert not ran
    monkeypatch.setattr(validate_cells, "code_fingerprint", lambda: "other sources")
    with pytest.raises(KeyError):  # it was to run, and nothing does here
        validate.run(validate.grid(validate.parser().parse_args(arguments)), folder, 1)
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nets", "vgg"], "--nets is 'vgg', expected one of alexnet-cl"),
        (["--methods", "adam"], "methods are ['adam']"),
        (["--batch", "4", "0"], "--batch is 0, expected a positive integer"),
        (["--ranks", "nan"], "--ranks is nan, expected a number in (0, 1]"),
        (["--jobs", "2", "--nets", "mlp"], "--jobs is 2, which takes --folder"),
        (["--jobs", "0"], "--jobs is 0, expected a positive integer"),
        (["--output", "table.txt"], "--output is 'table.txt', expected a name that ends in .json"),
        (["--output", "no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, before anything has run."""
    with pytest.raises(SystemExit) as ended:
        validate.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_left_out_for_its_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One vector has no statistics for batch norm; a net that runs at no batch is not left out in silence."""
    found = validate_cell("alexnet-cl", 1, "float32", ["bp"])
    assert "more than one value per channel" in found["methods"]["bp"]["left_out"]
    monkeypatch.setitem(NETS, "alexnet-cl", replace(NETS["alexnet-cl"], small_shape=(3, 2, 2)))
    with pytest.raises(ValueError, match="cannot run on an input of shape"):
        validate_cell("alexnet-cl", 1, "float32", ["bp"])
