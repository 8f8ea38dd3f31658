"""What a task of continual learning costs, predicted: bytes beside the tape, and multiply-adds of and between steps.

Shares no formula with the library. Notation of a layer's input: B images, L places (1 for vectors), n numbers each (of
a patch, for a convolution), so A = B·L·n numbers a batch; M (n, m) the protected directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.rules.account import WEIGHTED, account
from analysis.rules.op_cost import MAC_KINDS, weight_of
from analysis.rules.protection_costs import calibration_macs, gram_macs, update_macs
from analysis.rules.subspace import extra_macs, merging_macs, update_of
from lance_ref.continual.learners import Recipe
from lance_ref.continual.scenario import Scenario
from lance_ref.engine.recording import OpRecord

LABEL_BYTES = 2
LANCE_MODES = {"lance": (True, True), "lance-no-batch": (False, True)}
"""Whether batch and token are compressed; the feature mode always is."""


def bill(passes: Sequence[Sequence[OpRecord]]) -> dict[str, Any]:
    """The bill of one step, from the op records of its passes.

    Returns
    -------
    dict
        ``tape_bytes`` of the largest pass, ``step_macs`` by kind, ``factor_bytes`` of the fixed factors, and of the
        first pass ``forward_macs``, of whole weights, and the inputs of its ``layers`` by path. Where layers train in
        the subspace also ``merging_macs``, of writing their weights down after the task.
    """
    bills = [account(records, None) for records in passes]
    macs = {kind: sum(getattr(b.cost, f"{kind}_macs") for each in bills for b in each) for kind in MAC_KINDS}
    layers = {record.path: _input(record) for each in passes[:1] for record in each if record.op in WEIGHTED}
    updated = [record for each in passes[:1] for record in each if update_of(record) is not None]
    merging = {"merging_macs": sum(map(merging_macs, updated))} if updated else {}
    return {
        "tape_bytes": max((sum(b.tape_bytes for b in each) for each in bills), default=0),
        "step_macs": macs,
        "factor_bytes": sum(b.subspace_bytes for each in bills[:1] for b in each),
        "forward_macs": sum(b.cost.forward_macs for each in bills[:1] for b in each) - sum(map(extra_macs, updated)),
        "layers": layers,
        **merging,
    }


def _input(record: OpRecord) -> dict[str, Any]:
    """The sizes of a layer's input: ``n``, ``tokens`` L (None for vectors), and whether it is seen as ``patches``."""
    n = math.prod(weight_of(record).shape[1:])
    if record.op == "conv2d":
        return {"n": n, "tokens": math.prod(record.output.shape[2:]), "patches": True}
    between = record.inputs[0].shape[1:-1]
    return {"n": n, "tokens": math.prod(between) if between else None, "patches": False}


def predict(
    learner: str,
    t: int,
    history: Sequence[Mapping[str, Any]],
    scenario: Scenario,
    recipe: Recipe,
    outputs: Mapping[str, int],
) -> dict[str, Any]:
    """What task t takes beside the tape, from shapes alone.

    ``history`` is what the run noted of each task: shapes of the bases during and after it, layers that stood still,
    the bill. ``outputs`` has C_out of each layer. M is 4·n·m bytes in memory, as float32, and 8·n·m between tasks.
    GPM's projection G − (G M) Mᵀ of a gradient (C_out, n) takes 2·C_out·n·m multiply-adds at every step.
    """
    done = history[t]
    macs = dict(done["predicted"]["step_macs"])
    ram = flash = 0
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    step = dict(history[0]["predicted"])  # in the first task every layer runs
    step["forward_macs"] = done["predicted"]["forward_macs"] or step["forward_macs"]  # heads may differ in size
    batches = max(1, min(recipe.basis_samples, len(scenario.tasks[t].train)) // recipe.batch_size)
    if learner == "gpm":  # a gradient with no free direction is set to zero, without a product
        bases = {path: (n, m) for path, (n, m) in done["notes"]["protected"].items() if m < n}
        ram = sum(4 * n * m for n, m in bases.values())
        macs["projection"] += sum(2 * outputs[path] * n * m for path, (n, m) in bases.items())
    if learner in LANCE_MODES:
        ram = done["predicted"]["factor_bytes"]
        before = before_macs(learner, done, batches, recipe.batch_size, step)
    if learner == "gpm" or learner in LANCE_MODES:
        flash = sum(8 * n * m for n, m in done["after"]["protected"].values())
        after = after_macs(done, batches, recipe.batch_size, step)
        after["forward"] += done["predicted"].get("merging_macs", 0)
    first = scenario.tasks[0].train
    image = math.prod(first.shape) * first.images.itemsize
    sizes = [len(task.train) for task in scenario.tasks]
    if learner == "joint":
        flash = sum(sizes[: t + 1]) * (image + LABEL_BYTES)
    if learner == "er":  # a label and a task number of 2 bytes each
        ram, flash = (_kept(sizes[:count], recipe.memory) * (image + 2 * LABEL_BYTES) for count in (t, t + 1))
    return {"ram_bytes": ram, "flash_bytes": flash, "step_macs": macs, "before_macs": before, "after_macs": after}


def _kept(sizes: Sequence[int], memory: int) -> int:
    """Images in a memory that is divided equally among these tasks."""
    return sum(min(size, max(1, memory // len(sizes))) for size in sizes)


# ---- between tasks -----------------------------------------------------------------------


def after_macs(done: Mapping[str, Any], batches: int, B: int, step: Mapping[str, Any]) -> dict[str, int]:
    """New protected directions: forward passes, the Gram matrix of each batch, and the directions outside M."""
    total = 0
    for path, (n, m) in done["notes"]["protected"].items():
        samples = batches * B * (step["layers"][path]["tokens"] or 1)
        added = done["after"]["protected"][path][1] - m
        total += gram_macs(samples, n) + update_macs(n, m, added)
    return {"forward": batches * step["forward_macs"], "calibration": total}


def before_macs(learner: str, done: Mapping[str, Any], batches: int, B: int, step: Mapping[str, Any]) -> dict[str, int]:
    """LANCE's calibration: a Gram matrix for every mode and batch, and all directions, the feature's outside M."""
    total, reached = 0, False
    for path, (n, m) in done["notes"]["protected"].items():
        if m == n:
            continue
        reached = True
        layer = step["layers"][path]
        shape = [size for size in (B, layer["tokens"], n) if size is not None]
        batch_too, token_too = LANCE_MODES[learner]
        selected = [batch_too, token_too, True] if len(shape) == 3 else [batch_too, True]
        total += batches * calibration_macs(shape, selected, m, layer["patches"])
        if path in done["notes"]["ranks"]:
            outer = [size for size, chosen in zip(shape[:-1], selected[:-1], strict=True) if chosen]
            total += sum(update_macs(size, 0, size) for size in outer) + update_macs(n, m, n - m)
    return {"forward": batches * step["forward_macs"] if reached else 0, "calibration": total}
