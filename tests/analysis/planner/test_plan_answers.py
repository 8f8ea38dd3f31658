"""What the planner's answer rests on, and whether it can be run: evidence from experiments, and code to paste."""

from __future__ import annotations

import json
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lance_ref
from analysis.commands.shipped import shipped
from analysis.plan import main, parser
from analysis.planner.evidence import FILE, measured
from analysis.planner.make import library_plan
from analysis.planner.options import Option
from analysis.planner.plots import _parts, _shown
from analysis.steps.settings import Settings
from experiments.measured import gathered


def test_the_accuracies_are_those_of_the_committed_results() -> None:
    """``python -m experiments.measured`` has nothing to change."""
    assert json.loads(shipped(FILE).read_text()) == gathered()


def test_evidence_is_of_the_same_method_setting_engine_and_family() -> None:
    """The rows of the README: bp 76.3 %, LANCE with 8 directions 77.6 % in ten layers, 74.6 % in four."""
    lance = Option("lance", directions=8, update="image")
    found = [measured("mobilenetv2@0.35", lance, layers) for layers in (3, 4, 9, 10, 40)]
    assert [of and round(of.accuracy, 3) for of in found] == [None, 0.746, 0.746, 0.776, 0.776]
    assert measured("resnet8", lance, 10) is None
    assert measured("mcunet", Option("lance", directions=16, update="image"), 10) is None
    assert measured("mcunet", Option("lance", epsilon=0.9), 10) is None
    assert measured("mcunet", Option("lance", fraction=Fraction(1, 4)), 10) is None
    assert measured("mcunet", Option("sketch", Settings(ratio=0.5)), 10) is None
    assert measured("mcunet", Option("lance", Settings(update="subspace"), epsilon=0.7), 10) is None
    exact = [measured("mcunet", Option(method), 4) for method in ("bp", "checkpoint", "micro-batch")]
    assert {of and round(of.accuracy, 3) for of in exact} == {0.763}
    head = measured("mcunet", Option("head-only"), 0)
    assert head is not None
    assert head.shown == "69.9 ± 0.1 % on CIFAR-10 (10,000 training images of 128 pixels), mcunet with its head alone"


def code_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, Any]]:
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    code: str = document["code"]
    return code, document["rows"][0]["best"]


SMALL = ("--net", "convnet", "--num-classes", "10", "--input-shape", "1,16,16", "--batch", "4")


@pytest.mark.parametrize(
    "method",
    ["bp", "head-only", "bias-only", "lance", "lance-mean-free", "lance-center", "int8", "int4", "sketch",
     "gradient-filter", "micro-batch"],
)  # fmt: skip
def test_the_code_takes_what_was_promised(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Pasted and run: the most that is alive in a step, weights and factors included, is within the budget."""
    elsewhere = ("--calibration", "elsewhere") if method.startswith("lance") else ()
    code, best = code_of(capsys, *SMALL, "--method", method, "--budget", "1MiB", "--engine", "library", *elsewhere)
    head, loop = code.split("for step in range(2):")
    space: dict[str, Any] = {}
    exec(compile(head + "for step in range(2):" + loop, "first steps", "exec"), space)  # what is made once is there
    again = compile("for step in range(1):" + loop, "step", "exec")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        exec(again, space)
        most = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    images = space["images"].nbytes
    assert most + images <= 1.05 * best["step_bytes"] + 48 * 1024  # and some kilobytes of Python's own objects
    assert best["total_bytes"] <= 2**20


@pytest.mark.parametrize("method", ["lance", "bp", "bias-only", "head-only"])
def test_the_code_of_a_device_program_has_its_size(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, best = code_of(capsys, *SMALL[:-2], "--method", method, "--budget", "100KiB", "--engine", "device")
    space: dict[str, Any] = {}
    exec(compile(code, "device", "exec"), space)
    assert f"{best['total_bytes']:,} bytes of RAM" in capsys.readouterr().out or (
        space["program"].ram_bytes <= 100 * 1024
    )


def test_no_code_for_what_it_is_not_written_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert not code_of(capsys, *SMALL, "--method", "lora", "--budget", "1MiB", "--engine", "library")[0]


def test_time_is_an_estimate_from_multiply_adds(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is said of time without a rate; with one, the step's multiply-adds over it."""
    arguments = (*SMALL, "--method", "bp", "--budget", "1MiB", "--engine", "library")
    assert main(arguments) == 0
    assert "estimated" not in capsys.readouterr().out.partition("fidelity: an estimate")[0]
    _, best = code_of(capsys, *arguments)
    assert main([*arguments, "--gmacs-per-second", "0.5"]) == 0
    out = capsys.readouterr().out
    assert f"{best['macs'] / 0.5e9 * 1e3:,.1f}" in out
    assert "neither time nor energy was measured" in " ".join(out.split())


def test_the_plan_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bars by kind that end at the total, the line of the budget; a figure even where nothing fits."""
    for budget in ("1MiB", "1KiB"):
        file = tmp_path / f"{budget}.png"
        assert main([*SMALL, "--method", "bp", "int8", "--budget", budget, "--plot", str(file)]) == 0
        assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main([*SMALL, "--budget", "1MiB", "--plot", str(tmp_path / "plan.txt")])
    assert "--plot" in capsys.readouterr().err


def test_the_parts_of_a_bar_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    options = parser().parse_args([*SMALL, "--method", "lance", "bp", "--budget", "1MiB", "--engine", "library"])
    plan = library_plan(options)
    assert {sum(_parts(c).values()) - c.memory.total for c in _shown(plan)} == {0}
    assert [c.option.method for c in _shown(plan)] == ["bp", "lance"]


def test_parts_give_the_gradient_of_the_whole_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """The code of micro-batches adds up what the code of backpropagation finds at once."""
    gradients = []
    for method in ("bp", "micro-batch"):
        code, _ = code_of(capsys, *SMALL, "--method", method, "--budget", "1MiB", "--engine", "library")
        space: dict[str, Any] = {}
        lance_ref.manual_seed(0)
        exec(code.replace("range(2)", "range(1)"), space)
        gradients.append([parameter.grad for parameter in space["trained"]])
    for whole, parts in zip(*gradients, strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
