"""What the planner's answer rests on, and whether it can be run: evidence from experiments, and code to paste."""

from __future__ import annotations

import json
import tracemalloc
from fractions import Fraction
from typing import Any

import pytest

from analysis.plan import main
from analysis.planner.evidence import FILE, measured
from analysis.planner.options import Option
from analysis.steps.settings import Settings
from experiments.measured import gathered


def test_the_accuracies_are_those_of_the_committed_results() -> None:
    """``python -m experiments.measured`` has nothing to change."""
    assert json.loads(FILE.read_text()) == gathered()


def test_evidence_is_of_the_same_method_setting_engine_and_family() -> None:
    """The rows of the README: bp 76.3 %, LANCE with 8 directions 77.6 % in ten layers, 74.6 % in four."""
    lance = Option("lance", directions=8, update="image")
    found = [measured("mobilenetv2@0.35", lance, layers) for layers in (3, 4, 9, 10, 40)]
    assert [of and of.accuracy for of in found] == [None, 0.7459, 0.7459, 0.7761, 0.7761]
    assert measured("resnet8", lance, 10) is None
    assert measured("mcunet", Option("lance", directions=16, update="image"), 10) is None
    assert measured("mcunet", Option("lance", epsilon=0.9), 10) is None
    assert measured("mcunet", Option("lance", fraction=Fraction(1, 4)), 10) is None
    assert measured("mcunet", Option("sketch", Settings(ratio=0.5)), 10) is None
    assert measured("mcunet", Option("lance", Settings(update="subspace"), epsilon=0.7), 10) is None
    exact = [measured("mcunet", Option(method), 4) for method in ("bp", "checkpoint", "micro-batch")]
    assert {of and of.accuracy for of in exact} == {0.7631}
    head = measured("mcunet", Option("head-only"), 0)
    assert head is not None
    assert head.shown == "69.9 ± 0.1 % on CIFAR-10 (10,000 training images), mcunet with its head alone"


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
