"""The least RAM for a target, and the largest numbers with which something still fits."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from typing import Any

import pytest

from analysis.plan import main
from analysis.planner.costs import Costs, Device
from analysis.planner.device_costs import DeviceCosts
from analysis.planner.inverse import largest, least
from analysis.planner.options import Option, Target, in_parts, options_for, parse_target
from analysis.planner.search import search
from analysis.steps.nets import build

SMALL = ["--net", "convnet", "--num-classes", "10", "--input-shape", "1,16,16", "--batch", "1", "4"]
PROGRAM = ["--net", "resnet8", "--num-classes", "10", "--engine", "device", "--directions", "8"]


def answer_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize("target", [Target("layers", 1), Target("layers", 2), Target("fidelity", 0.5)])
def test_the_least_is_the_least(target: Target) -> None:
    """With that much RAM the search finds something that reaches the target, with a byte less nothing."""
    costs = Costs(build("convnet", 10, (1, 16, 16), without_weights=True), "convnet", (1, 16, 16), Device())
    options = in_parts(options_for(["bp", "int8", "head-only", "bias-only"], [], [Fraction(1, 4)]), 4)
    plan = least(costs, options, (1, 4), target)
    assert plan.fitting
    assert plan.budget == min(row.best.memory.total for row in plan.fitting if row.best is not None)

    def reached(budget: int) -> bool:
        found = [row.best for row in search(costs, options, (1, 4), budget).rows if row.best is not None]
        if target.kind == "layers":
            return any(best.layers >= target.value for best in found)
        return any(best.fidelity is not None and best.fidelity.estimate >= target.value for best in found)

    assert reached(plan.budget)
    assert not reached(plan.budget - 1)


def test_a_program_is_the_smallest() -> None:
    """Without a budget: no budget below its size has a program, and its own has it."""
    net = build("resnet8", 10, (3, 32, 32), without_weights=False)
    option = Option("head-only", update="image")
    found = DeviceCosts(net, "resnet8", (3, 32, 32), "float32", None, None).program(option, 0)
    total = found[0].total
    assert found[1] is not None
    assert found[1].ram_bytes == total
    with_less = DeviceCosts(net, "resnet8", (3, 32, 32), "float32", None, total - 1).program(option, 0)
    assert with_less[1] is None
    assert with_less[0].total == total


def test_targets_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """The first line has the amount; the code is for that amount; accuracies are those that were measured."""
    document = answer_of(capsys, *PROGRAM, "--method", "lance", "--target", "layers=2")
    best = document["rows"][0]["best"]
    assert document["answer"].startswith("The least RAM for 2 layers: ")
    assert (best["layers"], best["total_bytes"]) == (2, document["device"].get("budget_bytes"))
    assert f"budget={best['total_bytes']}" in document["code"]
    measured = ["--net", "mcunet", "--num-classes", "10", "--image-size", "32", "--engine", "library"]
    document = answer_of(capsys, *measured, "--method", "bias-only", "bp", "--target", "accuracy=71", "--batch", "1")
    first = document["rows"][0]["best"]
    assert (first["method"], first["layers"]) == ("bias-only", 4)
    assert first["accuracy"] >= 0.71
    document = answer_of(capsys, *measured, "--method", "bias-only", "--target", "accuracy=99", "--batch", "1")
    assert document["answer"].startswith("Nothing that was tried reaches an accuracy of 99 %.")
    assert not any(row["fits"] for row in document["rows"])


def test_both_engines_reach_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    """In one table, the least RAM first."""
    asked = ["--net", "resnet8", "--num-classes", "10", "--method", "bp", "bias-only", "--target", "layers=1"]
    document = answer_of(capsys, *asked, "--batch", "1")
    totals = [row["best"]["total_bytes"] for row in document["rows"] if row["fits"]]
    assert totals == sorted(totals)
    assert {row["engine"] for row in document["rows"]} == {"library", "device"}
    assert document["device"]["budget_bytes"] == totals[0]


def test_the_largest_of_ascending_values() -> None:
    """As trying all of them."""
    for values in ([], [3], [1, 2, 3, 4, 5]):
        for limit in range(7):
            wanted = max((value for value in values if value <= limit), default=None)
            assert largest(lambda value, most=limit: value <= most, values) == wanted


@pytest.mark.parametrize("what", ["image-size", "batch"])
def test_the_largest_that_fits(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is named fits, and the next does not."""
    asked = ["--net", "convnet", "--num-classes", "10", "--engine", "library", "--method", "bp", "--batch", "2"]
    sized = [*asked, "--image-size", "16"]
    (row,) = answer_of(capsys, *sized, "--layers", "1", "--budget", "9MiB")["rows"]
    budget = f"{row['best']['total_bytes'] * 3}B"
    said = answer_of(capsys, *sized, "--layers", "1", "--budget", budget, "--largest", what)["answer"]
    found = re.search(r"images of (\d+) pixels" if what == "image-size" else r"a batch of (\d+)", said)
    assert found is not None
    number = int(found[1])
    step = 8 if what == "image-size" else number
    fits = []
    for value in (number, number + step):
        changed = [*asked, "--image-size", str(value)] if what == "image-size" else [*sized, "--batch", str(value)]
        (row,) = answer_of(capsys, *changed, "--layers", "1", "--budget", budget)["rows"]
        fits.append(row["fits"])
    assert fits == [True, False]


def test_the_most_directions(capsys: pytest.CaptureFixture[str]) -> None:
    """Of LANCE as a device program; other methods have none, and are said to have none."""
    asked = [*PROGRAM, "--method", "lance", "--layers", "1", "--update-after", "image"]
    said = answer_of(capsys, *asked, "--budget", "160KiB", "--largest", "directions", "batch")["answer"]
    assert "a batch of any size, 1 image at a time" in said
    found = re.search(r"(\d+) directions", said.partition("the largest that fit: ")[2])
    assert found is not None
    assert 8 <= int(found[1]) <= 32
    said = answer_of(capsys, *SMALL, "--budget", "9MiB", "--method", "bp", "--largest", "directions")["answer"]
    assert "directions are those of LANCE as a device program, and none of these fits" in said


@pytest.mark.parametrize(
    "text", ["", "74", "accuracy", "accuracy=", "accuracy=101", "accuracy=0", "fidelity=1.5", "layers=2.5", "layers=-1"]
)
def test_nonsense_targets(text: str) -> None:
    with pytest.raises(ValueError, match="--target is "):
        parse_target(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "neither of --budget and --target is given, expected one"),
        (["--budget", "1MiB", "--target", "layers=1"], "both of --budget and --target are given"),
        (["--target", "layers=1", "--largest", "batch"], "--largest has no effect here: it needs --budget"),
        (["--budget", "1MiB", "--weights", "int8", "--engine", "library"], "the library has float32 weights"),
        (["--budget", "1MiB", "--tune", "nothing-of-this-name"], "nothing-of-this-name"),
        (["--budget", "1MiB", "--tune", "head"], "no layer to tune besides its head"),
        (["--budget", "1MiB", "--tune", "all", "--method", "head-only"], "--tune has no effect here"),
        (["--budget", "1MiB", "--micro-batch", "1"], "--micro-batch has no effect here"),
        (["--target", "layers=1", "--tune", "best"], "--tune best has no effect here"),
        (["--budget", "1MiB", "--tune", "best", "--layers", "2"], "--layers has no effect here"),
    ],
)
def test_senseless_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2."""
    with pytest.raises(SystemExit) as left:
        main([*SMALL, *arguments])
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
