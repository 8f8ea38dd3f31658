"""What runs without gradients, fused: ``python -m benchmarks.fused``.

Two figures of MobileNetV2 at 224 pixels. The time of an evaluation, forward alone, beside PyTorch's eager one of the
same net. And the memory of the process in a LANCE step of its last four layers at batch 128, beside the same step with
every operation for itself (``LANCE_REF_FUSE=0``) and beside PyTorch's backpropagation: what is held at the peak over
what was held when all was ready, the batch included.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from analysis.commands.command_line import run_main
from benchmarks.resident import Resident, in_own_process, measurable
from benchmarks.side_by_side import Side, Table, Target, number, parser, peer, run, span, timed
from benchmarks.steps import CASES, CLASSES, MIB, Case, peak
from lance_ref import models, no_grad

EVALUATION = Case("mobilenetv2", 32, image_size=224)
STEP = replace(CASES["mobilenetv2"], batch=128)
MEMORY = {"fused": ("lance", "1"), "one by one": ("lance", "0"), "pytorch": ("pytorch", "1")}
"""Each side in a process of its own: what of :mod:`benchmarks.steps` it runs, and ``LANCE_REF_FUSE``."""


def evaluations(case: Case) -> dict[str, Side]:
    """An evaluation of each side; PyTorch's where it is installed."""
    net = models.create(case.net, num_classes=CLASSES, rng=0).eval()
    size = case.image_size or 32
    images = np.random.default_rng(0).standard_normal((case.batch, 3, size, size), dtype=np.float32)

    def ours() -> None:
        with no_grad():
            net(images)

    sides: dict[str, Side] = {"ours": ours}
    if peer("torch") is not None:
        import torch

        from benchmarks.torch_nets import twin

        theirs, x = twin(case.net, net, CLASSES).eval(), torch.from_numpy(images)

        def pytorch() -> None:
            with torch.no_grad():
                theirs(x)

        sides["pytorch"] = pytorch
    return sides


def held(name: str, case: Case, threads: int) -> Resident:
    """The memory of a process in a step of that side of :data:`MEMORY`."""
    step, setting = MEMORY[name]
    before = os.environ.get("LANCE_REF_FUSE")
    os.environ["LANCE_REF_FUSE"] = setting  # the new process reads it
    try:
        found: Resident = in_own_process(peak, step, case, threads)
    finally:
        if before is None:
            del os.environ["LANCE_REF_FUSE"]
        else:
            os.environ["LANCE_REF_FUSE"] = before
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    evaluation, step = EVALUATION, STEP
    if options.quick:
        evaluation, step = (replace(case, batch=2, image_size=32) for case in (evaluation, step))
    targets = []
    timings = timed(evaluations(evaluation), options.repeats)
    print(f"evaluation of {evaluation.net}, {evaluation.batch} images: milliseconds (median) and ratio")
    table = Table("side", "ms", "/ pytorch", "min-max", first=12)
    seconds = {name: timing.as_json() for name, timing in timings.items()}
    for name, of in seconds.items():
        ratio = of["median"] / seconds["pytorch"]["median"] if "pytorch" in seconds else None
        table.row(name, number(1e3 * of["median"]), number(ratio), span(of))
        if name == "ours" and ratio is not None:
            targets.append(Target(f"time of an evaluation, ours/pytorch, {evaluation.net}", ratio, 0.75))
    memory: dict[str, dict[str, int]] = {}
    if measurable():
        print(f"a step of {step.net}, {step.tune}, {step.batch} images: MiB at the peak, and over the start")
        table = Table("side", "peak MiB", "over start", first=12)
        for name in MEMORY:
            if name != "pytorch" or peer("torch") is not None:
                found = held(name, step, options.threads)
                memory[name] = {**found._asdict(), "over_start": found.peak - found.before}
                table.row(name, number(found.peak / MIB), number((found.peak - found.before) / MIB))
        for name, limit in (("one by one", 0.15), ("pytorch", 0.10)):
            if name in memory:
                ratio = memory["fused"]["over_start"] / max(memory[name]["over_start"], 1)
                targets.append(Target(f"memory of a step over the start, fused/{name}, {step.net}", ratio, limit))
    return {"evaluation_seconds": seconds, "step_resident": memory, "targets": targets}


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("benchmarks.fused", __doc__, repeats=5)
    return run(p, arguments, measure, peers=("torch",))


if __name__ == "__main__":
    sys.exit(run_main(main))
