"""Which networks are predicted, and how exactly: ``python -m experiments.corpus --quick``.

Networks of torchvision, timm, transformers and peft with random weights: the bytes that PyTorch keeps and the FLOPs of
forward and backward pass are predicted from shapes, and compared with a real step. All of them must be equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from analysis.commands import cli, command_line
from experiments import frame
from experiments.corpus.compare import TIMED_BATCH, Outcome, compare
from experiments.corpus.networks import networks

COLUMNS = (
    "package", "network", "parameters", "batch", "kept bytes", "forward FLOPs", "backward FLOPs", "exact",
)  # fmt: skip
NUMBERS = (*COLUMNS[2:7], f"processor seconds at batch {TIMED_BATCH}")


def parser() -> argparse.ArgumentParser:
    p = frame.parser("experiments.corpus", __doc__)
    p.add_argument("--quick", action="store_true", help="a dozen small ones")
    p.add_argument("--only", nargs="+", metavar="NAME", help="packages, or names of networks")
    p.add_argument("--exports", action="store_true", help="export each as ONNX in two ways, too")
    p.add_argument(
        "--tapes", action="store_true", help="also run each by this library's operations, and measure their tape"
    )
    p.add_argument("--output", type=cli.json_file, help="write the results as JSON")
    p.add_argument("--table", type=cli.markdown_file, help="write the table as Markdown")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 1 if a network is not exact."""
    return command_line.run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    from lance_ref.io.whole_file import write_json, write_text

    chosen = [each for each in networks() if each.quick or not options.quick]
    if options.only:
        chosen = [each for each in chosen if {each.package, each.name} & set(options.only)]
    if not chosen:
        raise ValueError(f"--only is {' '.join(options.only)}, which names no network of the corpus")
    missing = sorted({each.package for each in chosen if not each.is_installed()})
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}; --only chooses others")
    frame.begin(None, f"{len(chosen)} networks, a line for each when it is finished, and nothing else is kept")
    outcomes = []
    for network in chosen:
        outcomes.append(compare(network, options.exports, options.tapes))
        print(_line(outcomes[-1]), flush=True)
    exact = sum(each.is_exact for each in outcomes)
    print(f"{exact} of {len(outcomes)} networks are exact")
    if options.output:
        rows = [each.to_json() for each in outcomes]
        settings = {"exports": options.exports, "tapes": options.tapes, "timed_batch": TIMED_BATCH}
        write_json(
            options.output,
            frame.document("experiments.corpus", settings, sys.argv[1:], rows, packages=versions(outcomes)),
        )
    if options.table:
        write_text(options.table, table(outcomes))
    return 0 if exact == len(outcomes) else 1


def versions(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Of PyTorch and of every package that a network comes from."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", *dict.fromkeys(each.package for each in outcomes))}


def table(outcomes: Sequence[Outcome]) -> str:
    """Every network, as Markdown."""
    found = ", ".join(f"{name} {number}" for name, number in versions(outcomes).items())
    exact = sum(each.is_exact for each in outcomes)
    columns = [*COLUMNS, f"processor seconds at batch {TIMED_BATCH}"]
    exported, taped = any(each.exports for each in outcomes), any(each.tape for each in outcomes)
    columns += ["documented export", "plain export"] * exported + ["tape of this library"] * taped
    lines = [
        f"{exact} of {len(outcomes)} networks are exact: kept bytes, forward FLOPs and backward FLOPs all equal those "
        f"of a real step ({found}).",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('---:' if column in NUMBERS else '---' for column in columns)}|",
    ]
    for each in outcomes:
        totals: tuple[Any, ...] = each.predicted or ("", "", "")
        numbers = [each.parameters, each.batch, *totals]
        cells = [f"{n:,}" if isinstance(n, int) else n for n in numbers]
        verdict = each.failed or ("yes" if each.is_exact else f"no: {', '.join(f'{n:,}' for n in each.real or ())}")
        exports = each.exports or {}
        told = [str(exports.get(kind, "not tried")) for kind in ("documented", "plain")] * exported
        told += [str(each.tape or "not tried")] * taped
        told = [cell.replace("|", "/") for cell in told]
        lines.append("| " + " | ".join([each.package, each.name, *cells, verdict, f"{each.seconds:.1f}", *told]) + " |")
    return "\n".join([*lines, ""])


def _line(each: Outcome) -> str:
    verdict = each.failed or ("exact" if each.is_exact else f"predicted {each.predicted}, real {each.real}")
    exports = "".join(f"; {kind} export: {found}" for kind, found in (each.exports or {}).items())
    exports += "" if each.tape is None else f"; tape: {each.tape}"
    return f"{each.package:12}  {each.name:40}  {verdict}{exports}"
