"""Every prediction beside a measurement: ``python -m analysis.validate``.

A grid of nets, methods, batch sizes and dtypes, at small images. In each cell a real step runs; bytes and
multiply-adds must be those predicted, layer by layer, the peak of memory within 5 %, and, where PyTorch is installed,
what its autograd saves and its counter counts must be what the model says of it. The exit code is 1 if anything
differs. All of it, for a free machine::

    python -m analysis.validate --jobs 2 --folder runs/validate --output experiments/results/validate.json

writes ``validate.md`` beside the JSON file. Run again, it goes on where it was, as long as no source file has changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.check.cells import cells, code_fingerprint, validate_cell, with_fields
from analysis.check.table import judged, markdown, summary
from analysis.commands.cli import built_in_net, check_writable, count, few, folder_to_write, json_file, share
from analysis.commands.command_line import OneLineParser, nets_and_data, run_command, run_main
from analysis.steps.methods import chosen_methods
from analysis.steps.register import listed
from lance_ref import models

FORMAT, VERSION = "lance_ref validation", 1
BATCHES = (1, 2, 4, 8, 64)
DTYPES = ("float32", "float64")
QUICK: dict[str, Any] = {"nets": ["convnet", "mlp", "resnet8"], "batch": [1, 2], "dtype": ["float32"]}


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m analysis.validate",
        description="Predict one training step of every net with every method, run it, and compare each number. "
        "Exit code 1 if anything differs.\n\nExample: lance-ref validate --quick",
        epilog=f"{listed()}\n\n{nets_and_data(False)}",
        allow_abbrev=False,
    )
    p.add_argument("--nets", type=built_in_net, nargs="+", help="nets of the list below (all)")
    p.add_argument("--methods", nargs="+", default=["all"], help="methods of the list below (all)")
    p.add_argument("--batch", type=count, nargs="+", help=f"images of one step ({' '.join(map(str, BATCHES))})")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="types of activations and weights (both)")
    p.add_argument("--ranks", type=share, default=0.25, help="for methods with ranks: a fraction of each size")
    p.add_argument("--quick", action="store_true", help="three small nets, batches of 1 and 2, float32: a minute")
    p.add_argument(
        "--folder", type=folder_to_write,
        help="where finished comparisons are kept, so that a run that was stopped goes on (none)",
    )  # fmt: skip
    p.add_argument("--jobs", type=few, default=1, help="processes at a time; more than one takes --folder")
    p.add_argument("--output", type=json_file, help="file to write, .json; a table with .md is written beside it")
    return p


def grid(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells that were asked for.

    Raises ValueError, in one line, for whatever is unknown or out of range.
    """
    quick = QUICK if options.quick else {}
    nets = options.nets or quick.get("nets") or models.names()
    batches = options.batch or quick.get("batch") or BATCHES
    methods = chosen_methods(options.methods)
    dtypes = options.dtype or quick.get("dtype") or DTYPES
    return cells(nets, methods, batches, dtypes, options.ranks)


def run(work: Sequence[Mapping[str, Any]], folder: str | None, jobs: int) -> list[dict[str, Any]]:
    """The outcomes of all cells, in order; without a folder they run in this process."""
    if folder is not None:
        from analysis.commands.sweep import run_cells

        found = run_cells([dict(cell) for cell in work], "analysis.check.cells:validate_cell", folder, jobs=jobs)
        return [with_fields(dict(cell), outcome) for cell, outcome in zip(work, found, strict=True)]
    from lance_ref.io.progress import progress_bar

    print(
        f"{len(work)} comparisons, one at a time; small nets take about 6 s each (estimate, as measured before on "
        "two cores), of large nets longer; without --folder nothing is kept before the end",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    outcomes = []
    with progress_bar("cells", len(work), None) as advance:
        for cell in work:
            outcomes.append(with_fields(dict(cell), validate_cell(**cell)))
            advance(1, f"{cell['net']}, batch {cell['batch']}, {cell['dtype']}")
    return outcomes


def document(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is written as JSON."""
    from analysis.check import torch_replay
    from analysis.commands.provenance import provenance

    return {
        "format": FORMAT,
        "version": VERSION,
        **provenance("analysis.validate", 0),
        "pytorch": torch_replay.version() if torch_replay.available() else None,
        "code": code_fingerprint(),
        "summary": summary(outcomes),
        "cells": list(outcomes),
    }


def work(options: argparse.Namespace) -> int:
    """Check, run, show and write; 1 if anything differs."""
    table = None if options.output is None else Path(options.output).with_suffix(".md")
    if table is not None:
        check_writable(str(table))
    if options.jobs != 1 and options.folder is None:
        raise ValueError(f"--jobs is {options.jobs}, which takes --folder for the cells that are finished")
    result = document(run(grid(options), options.folder, options.jobs))
    text = markdown(result)
    print(text)
    if table is not None:
        from lance_ref.io.whole_file import write_json, write_text

        write_json(options.output, result)
        write_text(table, text + "\n")
    return 0 if judged(result["summary"]) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 0 all agree, 1 something differs, 2 cannot run."""
    return run_command(parser, arguments, work)


if __name__ == "__main__":
    sys.exit(run_main(main))
