"""The bill of T tasks from shapes alone: equal to what a real run measured, and in agreement with itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.reports.continual_bill import LEARNERS, bills, protected_layers, task_bill
from analysis.steps.nets import TracedStep, build, trace_step
from experiments.continual.cell import prepare, run

CELL: dict[str, Any] = {
    "scenario": "split-digits", "net": "convnet", "tasks": 3, "train_images": 60, "test_images": 20, "epochs": 1,
    "batch": 10, "lr": 0.05, "momentum": 0.0, "clip": None, "thresholds": [0.9], "threshold_step": 0.0,
    "epsilon": 0.9, "basis_samples": 30, "memory": 10, "eval_batch": 20, "seed": 0, "folder": "",
}  # fmt: skip


def traced(name: str, shape: tuple[int, ...], batch: int, tune: str = "all") -> TracedStep:
    return trace_step(build(name, 10, shape, True), name, shape, batch, tune, "float32")


@pytest.mark.parametrize("net", ["mlp", "convnet"])
@pytest.mark.parametrize("learner", ["gpm", "lance"])
def test_the_bill_is_what_a_run_measured(net: str, learner: str) -> None:
    """With the directions and ranks that a run came to, every byte and multiply-add of each later task is foretold."""
    measured = run(**{**CELL, "net": net, "learner": learner})["tasks"]
    module, scenario = prepare("split-digits", net, 0, 3, 60, 20, "")
    step = trace_step(module, net, scenario.input_shape, 10, "all", "float32")
    layers = {path: size for path, size in protected_layers(step).items() if path in measured[0]["notes"]["protected"]}
    for t, task in enumerate(measured):
        during = {path: m for path, (_, m) in task["notes"]["protected"].items()}
        after = {path: m for path, (_, m) in task["after"]["protected"].items()}
        ranks = {path: tuple(ranks) for path, ranks in task["notes"].get("ranks", {}).items()}
        foretold = task_bill(learner, t, step.records, layers, during, after, ranks, basis_batches=3)
        assert foretold.beside_bytes == task["ram_bytes"]
        assert foretold.flash_bytes == task["flash_bytes"]
        assert foretold.between_macs == sum(task["before_macs"].values()) + sum(task["after_macs"].values())
        if t == 0 or net == "mlp":  # elsewhere biases and norms stand still after the first task
            assert foretold.tape_bytes == task["tape_bytes"]
            assert foretold.step_macs == sum(task["step_macs"].values())


@given(
    tasks=st.integers(2, 6),
    protected=st.floats(0, 0.95),
    fraction=st.floats(0.05, 1),
    batches=st.integers(1, 5),
)
@settings(max_examples=12, deadline=None)
def test_what_must_hold_of_any_bill(tasks: int, protected: float, fraction: float, batches: int) -> None:
    """GPM's tape is the exact one and its bases grow; LANCE needs the same flash, and a smaller tape at small ranks."""
    found = bills(STEP, tasks, protected, fraction, batches)
    assert [(bill.learner, bill.task) for bill in found] == [(name, t) for name in LEARNERS for t in range(tasks)]
    finetune, gpm, lance = (found[i * tasks : (i + 1) * tasks] for i in range(3))
    assert {bill.tape_bytes for bill in gpm} == {finetune[0].tape_bytes}
    assert all(a.beside_bytes <= b.beside_bytes for a, b in pairwise(gpm))
    assert all(a.flash_bytes <= b.flash_bytes for a, b in pairwise(gpm))
    assert [bill.flash_bytes for bill in gpm] == [bill.flash_bytes for bill in lance]
    assert all(lance_task.tape_bytes <= finetune[0].tape_bytes for lance_task in lance)
    assert gpm[0].beside_bytes == 0
    assert all(a.ram_bytes + a.flash_bytes == a.total_bytes for a in found)


STEP = traced("mlp", (20,), 8)


def test_by_hand() -> None:
    """Two layers 20 -> 100 -> 100, the head beside: 10 and 50 directions protected in the second of two tasks."""
    assert protected_layers(STEP) == {"features.0": (20, 100), "features.2": (100, 100)}
    gpm = bills(STEP, tasks=2, protected=0.5, basis_batches=3)[2:4]
    exact = bills(STEP, tasks=2, protected=0.5)[0].step_macs
    assert gpm[1].beside_bytes == 4 * (20 * 10 + 100 * 50)
    assert gpm[1].step_macs - exact == 2 * 100 * 20 * 10 + 2 * 100 * 100 * 50
    assert gpm[0].flash_bytes == 8 * (20 * 10 + 100 * 50)
    # 3 batches of 8 forward; their Gram matrices; the eigenvectors of K in a layer without a basis
    forward = 3 * 8 * (20 * 100 + 100 * 100 + 100 * 10)
    assert gpm[0].between_macs == forward + 3 * 8 * (20**2 + 100**2) + 9 * 20**3 // 2 + 9 * 100**3 // 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 1}, "tasks is 1, expected at least 2"),
        ({"tasks": 3, "protected": 1.0}, "protected is 1.0, expected a share in"),
        ({"tasks": 3, "protected": float("nan")}, "protected is nan, expected a share in"),
        ({"tasks": 3, "rank_fraction": 0.0}, "rank_fraction is 0.0, expected a share in"),
        ({"tasks": 3, "basis_batches": 0}, "basis_batches is 0, expected a positive integer"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bills(STEP, **changes)


def test_layers_that_have_no_task_subspace() -> None:
    """Groups are refused by name, and so is a network of which the classifier alone trains."""
    with pytest.raises(ValueError, match=r"is a convolution of \d+ groups; task subspaces take one group"):
        bills(traced("mobilenetv2", (3, 32, 32), 2, "last:4"), 2)
    with pytest.raises(ValueError, match="nothing to protect"):
        bills(traced("mlp", (20,), 2, "head"), 2)
