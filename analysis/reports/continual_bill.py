"""What learning T tasks one after the other costs, from shapes alone: fine-tuning, GPM and LANCE side by side.

:func:`bills` answers before anything has been trained: how many directions each task will protect is an assumption
then, a share of each layer's directions that grows evenly from task to task. What a run of the experiment really
protected, and its bill, is in :mod:`analysis.reports.continual_costs`; with the same numbers both give the same
bytes and multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis.reports.continual_costs import after_macs, before_macs, bill
from analysis.rules.account import WEIGHTED
from analysis.rules.tucker_costs import Ranks
from analysis.steps.nets import TracedStep
from lance_ref.engine.recording import OpRecord

LEARNERS = ("finetune", "gpm", "lance")
MOST_TASKS = 10_000
"""There is a bill for each task and learner."""


@dataclass(frozen=True)
class TaskBill:
    """One learner's cost of one task."""

    learner: str  #: One of :data:`LEARNERS`.
    task: int  #: From 0.
    tape_bytes: int  #: Kept between forward and backward pass.
    #: What every step needs in memory beside network and tape: GPM's bases (float32), LANCE's factors.
    beside_bytes: int
    flash_bytes: int  #: Kept after the task for the next one: the bases (float64).
    step_macs: int  #: Multiply-adds of one step.
    #: Before and after the task: calibration and protected directions, with the forward passes that they need.
    between_macs: int

    @property
    def ram_bytes(self) -> int:
        return self.tape_bytes + self.beside_bytes

    @property
    def total_bytes(self) -> int:
        """RAM and flash together."""
        return self.ram_bytes + self.flash_bytes

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "ram_bytes": self.ram_bytes, "total_bytes": self.total_bytes}


def bills(
    step: TracedStep, tasks: int, protected: float = 0.5, rank_fraction: float = 0.25, basis_batches: int = 10
) -> list[TaskBill]:
    """The cost of every task for every learner of :data:`LEARNERS`, by learner and task.

    Parameters
    ----------
    step : TracedStep
        Of the network as it trains; the classifier is each task's own, and is not protected.
    tasks : int
        T, at least 2.
    protected : float
        Share in [0, 1) of each layer's directions that is protected while the last task is learned; t / (T − 1) of it
        in task t, rounded down.
    rank_fraction : float
        In (0, 1]. Share of the batch's and the tokens' directions that LANCE keeps, and of the feature directions that
        are still free; rounded up.
    basis_batches : int
        Batches from which directions are found, before and after each task.
    """
    if not 2 <= tasks <= MOST_TASKS:
        raise ValueError(f"tasks is {tasks}, expected at least 2 and at most {MOST_TASKS}")
    if not 0 <= protected < 1:
        raise ValueError(f"protected is {protected}, expected a share in [0, 1)")
    if not 0 < rank_fraction <= 1:
        raise ValueError(f"rank_fraction is {rank_fraction}, expected a share in (0, 1]")
    if basis_batches < 1:
        raise ValueError(f"basis_batches is {basis_batches}, expected a positive integer")
    layers = protected_layers(step)
    shares = [protected * t / (tasks - 1) for t in range(tasks + 1)]
    counts = [{path: min(n - 1, int(share * n)) for path, (n, _) in layers.items()} for share in shares]
    found = []
    for learner in LEARNERS:
        for t in range(tasks):
            ranks = {path: _ranks(step, path, n - counts[t][path], rank_fraction) for path, (n, _) in layers.items()}
            found.append(task_bill(learner, t, step.records, layers, counts[t], counts[t + 1], ranks, basis_batches))
    return found


def task_bill(
    learner: str,
    t: int,
    records: Sequence[OpRecord],
    layers: Mapping[str, tuple[int, int]],
    during: Mapping[str, int],
    after: Mapping[str, int],
    ranks: Mapping[str, Ranks],
    basis_batches: int,
) -> TaskBill:
    """The cost of one task, from the records of one step with all layers exact.

    ``layers`` are those of :func:`protected_layers`; ``during`` and ``after`` count the directions that are protected
    while the task is learned and afterwards; ``ranks`` are LANCE's for a layer's input, or its patches.
    """
    batch = records[0].inputs[0].shape[0]
    exact = bill([records])
    done = bill([_compressed(records, ranks)]) if learner == "lance" else exact
    macs = sum(done["step_macs"].values())
    beside = done["factor_bytes"]
    between: dict[str, int] = {}
    if learner == "gpm":
        beside = sum(4 * n * during[path] for path, (n, _) in layers.items())
        macs += sum(2 * C_out * n * during[path] for path, (n, C_out) in layers.items())
    if learner != "finetune":
        noted = {
            "notes": {"protected": {path: (n, during[path]) for path, (n, _) in layers.items()}, "ranks": ranks},
            "after": {"protected": {path: (n, after[path]) for path, (n, _) in layers.items()}},
        }
        between = after_macs(noted, basis_batches, batch, exact)
        if learner == "lance":
            before = before_macs("lance", noted, basis_batches, batch, exact)
            between = {kind: between[kind] + before[kind] for kind in between}
    flash = 0 if learner == "finetune" else sum(8 * n * after[path] for path, (n, _) in layers.items())
    return TaskBill(learner, t, done["tape_bytes"], beside, flash, macs, sum(between.values()))


def protected_layers(step: TracedStep) -> dict[str, tuple[int, int]]:
    """(n, C_out) of every tuned layer but the classifier; n numbers a patch, or features."""
    found: dict[str, tuple[int, int]] = {}
    for record in step.records:
        if record.op in WEIGHTED and record.path in step.tuned_layers and record.path != step.head:
            if record.op not in ("conv2d", "linear"):
                raise ValueError(
                    f"layer {record.path!r} is a {record.op}, whose directions no learner protects: tune other layers"
                )
            if record.attributes.get("groups", 1) != 1:
                raise ValueError(
                    f"layer {record.path!r} is a convolution of {record.attributes['groups']} groups; task subspaces "
                    "take one group: tune other layers"
                )
            weight = record.inputs[1].shape
            found[record.path] = (math.prod(weight[1:]), weight[0])
    if not found:
        raise ValueError("no layer but the classifier is tuned: there is nothing to protect")
    return found


def _ranks(step: TracedStep, path: str, free: int, fraction: float) -> tuple[int, ...]:
    """A share of every mode, at least 1; of the feature mode, of its free directions."""
    record = next(each for each in step.records if each.path == path and each.op in WEIGHTED)
    batch = record.inputs[0].shape[0]
    tokens = (math.prod(record.output.shape[2:]),) if record.op == "conv2d" else record.inputs[0].shape[1:-1]
    outer = (batch, *tokens)
    return (*(math.ceil(fraction * size) for size in outer), math.ceil(fraction * free))


def _compressed(records: Sequence[OpRecord], ranks: Mapping[str, Ranks]) -> list[OpRecord]:
    """The same step with LANCE on these layers: on the unfolded patches of convolutions, on the rows of linear ones."""
    changed = []
    for record in records:
        if record.op in WEIGHTED and record.path in ranks:
            name = "patch-lance" if record.op == "conv2d" else "lance"
            store = {"name": name, "ranks": ranks[record.path]}
            record = replace(record, attributes={**record.attributes, "store": store})
        changed.append(record)
    return changed
