"""``python -m analysis.plan --engine device``: what fits as a device program."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from analysis.plan import main
from analysis.planner.device_costs import DeviceCosts
from analysis.planner.options import Option
from analysis.steps.nets import build
from lance_ref import device, tune

SMALL = ("--net", "resnet8", "--num-classes", "10", "--engine", "device")


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--format", "json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_lance_fits_mcunet_into_256_kib(capsys: pytest.CaptureFixture[str]) -> None:
    """At least four layers, where the library's engine takes megabytes."""
    arguments = ("--net", "mcunet", "--budget", "256KiB", "--image-size", "128", "--num-classes", "10")
    assert main([*arguments, "--engine", "device", "--method", "lance", "--directions", "8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    first = "Train the last 10 of 42 layers with lance 8 directions, one image at a time with an update after each"
    assert first in out
    assert "The library's engine takes" in out
    library = plan(capsys, *arguments, "--method", "lance", "--engine", "library")
    assert all(row["best"] is None for row in library["rows"])


def test_all_methods_with_every_update(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, *SMALL, "--budget", "200KiB", "--directions", "4", "8")
    names = {(row["method"], row["setting"]) for row in found["rows"]}
    assert ("lance", "4 directions, update batch") in names
    assert {method for method, _ in names} == {"lance", "bp", "bias-only", "head-only"}
    assert len(names) == 10


@pytest.fixture(scope="module")
def costs() -> DeviceCosts:
    return DeviceCosts(build("resnet8", 10, (3, 32, 32), False), "resnet8", (3, 32, 32), "float32", None, 120 * 1024)


@pytest.mark.parametrize("method", ["lance", "bp", "bias-only", "head-only"])
def test_memory_is_that_of_the_compiled_program(costs: DeviceCosts, method: str) -> None:
    layers = 0 if method == "head-only" else 1
    option = Option(method, directions=8 if method == "lance" else None, update="image")
    memory, program = costs.program(option, layers)
    if program is None:
        with pytest.raises(device.BudgetError) as error:
            device.compile(
                build("resnet8", 10, (3, 32, 32), False),
                None,
                (3, 32, 32),
                "last:1",
                "image",
                costs.budget,
                method="bp",
            )
        assert error.value.needed_bytes == memory.total > costs.budget
    else:
        assert program.ram_bytes == memory.total <= costs.budget
    assert memory.total == memory.step + memory.weights
    assert costs.macs(option, layers, 1) > 0
    assert costs.times_bp(option, layers, 1) > 0


def test_multiply_adds_are_those_that_run(costs: DeviceCosts) -> None:
    """Of one image; what tiles compute again is counted."""
    option = Option("head-only", update="image")
    _, program = costs.program(option, 0)
    assert program is not None
    program.step(np.zeros((1, 32, 32, 3), np.uint8), np.array([0]), 0.0)
    assert costs.macs(option, 0, 1) == sum(program.macs.values())


def test_more_layers_take_more(costs: DeviceCosts) -> None:
    totals = [costs.memory(Option("lance", directions=4, update="image"), n, 1).total for n in (1, 2, 3)]
    assert totals == sorted(totals)


def test_momentum_has_a_velocity(costs: DeviceCosts) -> None:
    net = build("resnet8", 10, (3, 32, 32), False)
    with_momentum = DeviceCosts(net, "resnet8", (3, 32, 32), "float32", None, costs.budget, "sgd-momentum")
    memory = with_momentum.memory(Option("head-only", update="image"), 0, 1)
    assert memory.optimizer_state == memory.weights == costs.memory(Option("head-only", update="image"), 0, 1).weights
    assert memory.gradients == 0


@pytest.mark.parametrize("budget", [1024, 120 * 1024])
def test_the_net_is_left_as_the_search_expects_it(budget: int) -> None:
    """After a program that was compiled, and after one whose weights alone are far beyond the budget."""
    net = build("resnet8", 10, (3, 32, 32), False)
    costs = DeviceCosts(net, "resnet8", (3, 32, 32), "float32", None, budget)
    costs.program(Option("bias-only", update="image"), 2)
    assert costs.net.tuning.selection == "head"
    assert costs.tuned(2) == tuple(tune(costs.net, "last:2").layers)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "4"), "--batch has no effect here: --engine device"),
        (("--epsilon", "0.9"), "--epsilon has no effect here"),
        (("--weights", "ram"), "--weights ram has no effect here"),
        (("--method", "hosvd"), "--method hosvd has no plan with --engine device: it decomposes each batch"),
        (("--method", "lance-mean-free"), "it has the sizes of lance"),
        (("--method", "bp", "--directions", "4"), "--directions has no effect here"),
        (("--directions", "4", "4"), "expected each once"),
        (("--optimizer", "adam"), "a device program has sgd and sgd-momentum"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(SystemExit) as left:
        main([*SMALL, "--budget", "200KiB", *arguments])
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", [("--directions", "4"), ("--update-after", "image")])
def test_the_library_has_no_such_options(capsys: pytest.CaptureFixture[str], option: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        main(["--net", "resnet8", "--budget", "1MiB", "--engine", "library", *option])
    assert "it needs --engine device or both" in capsys.readouterr().err


def test_a_net_that_no_device_runs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--net", "deit-tiny", "--budget", "1MiB", "--engine", "device"])
    assert "none that a device runs" in capsys.readouterr().err
