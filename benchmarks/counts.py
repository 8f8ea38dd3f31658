"""What one training step executes and allocates: ``python -m benchmarks.counts``.

Counts, which no load of the machine disturbs. Of small nets with every kind of store: multiply-adds by kind, buffers
that NumPy allocated, and copies among them (:mod:`benchmarks.buffers`). The tests compare them with what was written to
``tests/data/step_counts.json``; after a change that is meant,
``python -m benchmarks.counts --output tests/data/step_counts.json`` writes it anew.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.commands.cli import json_file
from analysis.commands.command_line import OneLineParser, run_command, run_main
from analysis.commands.provenance import provenance
from benchmarks.buffers import count_buffers
from benchmarks.side_by_side import Table, pinned
from benchmarks.steps import Case, side
from lance_ref import count_macs, manual_seed
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.engine.workers import threads
from lance_ref.io.whole_file import write_json

CASES = (
    Case("mlp", 10),
    Case("convnet", 8, image_size=16),
    Case("alexnet-cl", 4, "conv*"),
    Case("mcunet", 4, "last:4", 32),
    Case("mobilenetv2@0.35", 4, "last:4", 32),
)
METHODS = ("bp", "lance", "hosvd", "asi", "gradient-filter", "int8", "sketch")
ALLOCATED = ("buffers", "buffer_bytes", "copies", "copied_bytes")

Counts = dict[str, int]
"""Multiply-adds by kind, and :data:`ALLOCATED`."""


def count_step(case: Case, method: str) -> Counts:
    """A whole step, with its update; one before it compiles, and starts what goes on from step to step.

    In one thread: of several, each lays out patches of its own.
    """
    manual_seed(0)  # HOSVD copies a Gram matrix whose exponent is not 0: with other weights these may be other matrices
    with pinned(1), side(method, case) as step:
        step()
        with count_macs() as macs, count_buffers() as buffers:
            step()
    counts = {f"{kind} multiply-adds": number for kind, number in macs.by_kind().items() if number}
    allocated = (buffers.count, buffers.nbytes, buffers.copies, buffers.copied_bytes)
    return counts | dict(zip(ALLOCATED, allocated, strict=True))


def count_all(cases: Sequence[Case] = CASES, methods: Sequence[str] = METHODS) -> dict[str, Counts]:
    """The counts of every net with every method, printed as they come."""
    table = Table("net, method", "macs", *ALLOCATED, first=34, width=12)
    found = {}
    for case in cases:
        for method in methods:
            counts = found[f"{case.net}, {method}"] = count_step(case, method)
            macs = sum(number for what, number in counts.items() if what not in ALLOCATED)
            table.row(f"{case.net}, {method}", f"{macs:,}", *(f"{counts[what]:,}" for what in ALLOCATED))
    return found


def libraries() -> dict[str, str]:
    """What buffers depend on beside our own code: releases, the system, whether kernels are compiled, and threads."""
    versions = provenance("benchmarks.counts", 0)["versions"]
    found = {name: ".".join(versions[name].split(".")[:2]) for name in ("numpy", "scipy")}
    return {
        **found,
        "system": platform.system(),
        "numba": "on" if numba_enabled() else "off",
        "threads": str(threads()),
    }


def differences(found: Mapping[str, Counts], recorded: Mapping[str, Any]) -> list[str]:
    """One line for each count that is not the recorded one.

    Multiply-adds must be equal wherever they run. Allocations must be equal with the recorded libraries, and not more
    than recorded with others; they are not compared on another system, with another number of threads,
    or if kernels are compiled in one case alone.
    """
    here, there = libraries(), recorded["libraries"]
    comparable = all(here[name] == there[name] for name in ("system", "numba", "threads"))
    lines = []
    for case in sorted({*found, *recorded["counts"]}):
        now, then = found.get(case, {}), recorded["counts"].get(case, {})
        for what in dict.fromkeys([*then, *now]):
            a, b = then.get(what, 0), now.get(what, 0)
            allowed = what in ALLOCATED and (not comparable or (here != there and b <= a))
            if a != b and not allowed:
                lines.append(f"{case}: {what} {a:,} -> {b:,} ({b - a:+,})")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    p = OneLineParser(prog="python -m benchmarks.counts", description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--output", type=json_file, help="also write them as JSON")

    def work(options: argparse.Namespace) -> None:
        found = count_all()
        if options.output:
            document = {"libraries": libraries(), "counts": found}
            write_json(options.output, document)

    return run_command(p, arguments, work)


if __name__ == "__main__":
    sys.exit(run_main(main))
