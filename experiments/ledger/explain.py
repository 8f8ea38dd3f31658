"""Why a published cost differs from ours: ``python -m experiments.ledger.explain --claim mobilenetv2-last2``.

Prints what the cost model computes for the same net under each accounting, and the fewest rules of
:mod:`experiments.ledger.accounting_rules` that give the published number, or the nearest reading where none does.
Without ``--claim``, one line for every figure of ``data/published.yaml``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from analysis.commands import cli, command_line
from experiments import frame
from experiments.ledger.accounting_rules import (
    MIB,
    OF_COMPRESSION,
    RULES,
    Figures,
    Reading,
    Work,
    fits,
    nearest,
    readings,
)
from experiments.ledger.published import STATUSES, Published, choose, published

if TYPE_CHECKING:
    from analysis.reports.report import Report, Row
    from analysis.steps.nets import TracedStep


@dataclass(frozen=True)
class Explanation:
    """What was found for one figure.

    ``reading`` gives the number, or the nearest; ``tried`` is the number of readings, and ``also`` are other readings
    with as few rules that give it too.
    """

    published: Published
    status: str
    reading: Reading
    figures: dict[str, Figures] = field(default_factory=dict)
    tried: int = 0
    also: tuple[tuple[str, ...], ...] = ()
    note: str = ""


# ---- our figures -------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _traced(net: str, batch: int, tune: str, num_classes: int) -> TracedStep:
    from analysis.cost_model import predict

    return predict(net, batch, num_classes=num_classes, tune=tune, methods=["bp"]).step


@lru_cache(maxsize=256)
def reports_of(
    net: str, batch: int, tune: str, num_classes: int = 10, epsilon: float = 0.7, ranks: str | None = None
) -> tuple[Report, Report]:
    """The cost of bp and lance for one net, batch and choice of layers: in FLOPs, and by the papers' convention."""
    from analysis.cost_model import cost

    step = _traced(net, batch, tune, num_classes)
    plain, papers = (
        cost(step, methods=["bp", "lance"], epsilon=epsilon, ranks=ranks, convention=name)
        for name in ("flops", "paper")
    )
    return plain, papers


def figures_of(*case: Any, **more: Any) -> dict[str, Figures]:
    """Bytes and multiply-adds of bp and lance; arguments as of :func:`reports_of`."""
    plain, papers = reports_of(*case, **more)
    bases = [math.prod(row.weight_shape[1:]) for row in plain.rows if row.tuned and row.weight_shape is not None]
    return {
        method: Figures(
            **plain.totals[method].activation_bytes,
            factors=plain.totals[method].subspace_bytes,
            bases=sum(4 * n**2 for n in bases),
            net=_work(method, plain.rows, papers.rows, tuned_only=False),
            tuned=_work(method, plain.rows, papers.rows, tuned_only=True),
        )
        for method in ("bp", "lance")
    }


def _work(method: str, plain: Sequence[Row], papers: Sequence[Row], tuned_only: bool) -> Work:
    """Sums over the rows; the head's weight gradient is exact, in any order."""
    as_papers = {row.name: row.methods[method].flops for row in papers if row.tuned and method in row.methods}
    sums = dict.fromkeys(Work.__dataclass_fields__, 0)
    for row in plain:
        if method not in row.methods or (tuned_only and not row.tuned):
            continue
        flops = row.methods[method].flops
        for kind in ("forward", "grad_input", "grad_weight", "projection"):
            sums[kind] += flops[kind] // 2
        billed = as_papers.get(row.name)
        sums["papers_grad_weight"] += billed["grad_weight"] if billed else flops["grad_weight"] // 2
        sums["full_projection"] += billed["projection"] if billed else flops["projection"] // 2
    return Work(**sums)


# ---- the explanation ---------------------------------------------------------------------------


def explain(row: Published, threshold: bool = False) -> Explanation:
    """Try all rules on our figures.

    With ``threshold``, a figure of LANCE that nothing explains is looked at again, for the ε that would give it.
    """
    case = dict(row.case)
    method = case.pop("method", "bp")
    figures = figures_of(**case)
    listed = readings(row.quantity, row.unit, figures[method], figures["bp"])
    low, high = row.bounds
    middle = (low + high) / 2
    fitting = fits(middle, (high - low) / 2, listed)
    if fitting:
        first = fitting[0]
        also = tuple(other.rules for other in fitting[1:] if len(other.rules) == len(first.rules))
        status = "within range" if ".." in row.value else "explained" if first.rules else "met"
        return Explanation(row, status, first, figures, len(listed), also)
    note = _threshold(row, case) if threshold and method == "lance" else ""
    if row.free == "ranks":
        reading, share = _by_ranks(row, case, middle)
        if reading is not None:
            note = f"the ranks behind it are not published: {share}" + (f"\n    {note}" if note else "")
            return Explanation(row, "by ranks", reading, figures, len(listed), note=note)
    return Explanation(row, "unexplained", nearest(middle, listed), figures, len(listed), note=note)


SHARES = 4096
"""Ranks are tried in steps of this part of each mode."""


def _by_ranks(row: Published, case: dict[str, Any], value: float) -> tuple[Reading | None, str]:
    """The reading with the fewest rules that runs through ``value`` between rank 1 and full rank, and where it does."""

    def at(share: int) -> dict[tuple[str, ...], float]:
        figures = figures_of(**{**case, "ranks": f"{share / SHARES:.12f}"})
        return {each.rules: each.value for each in readings(row.quantity, row.unit, figures["lance"], figures["bp"])}

    least, most = at(1), at(SHARES)
    required = set(explain(published()[1][row.like]).reading.rules) if row.like else set()
    fitting = [
        rules
        for rules in least
        if rules in most
        and required <= set(rules) <= (required | OF_COMPRESSION if row.like else set(RULES))
        and min(least[rules], most[rules]) <= value <= max(least[rules], most[rules])
    ]
    if not fitting:
        return None, ""
    rules = min(fitting, key=len)
    low, high = 1, SHARES
    while high - low > 1:  # bytes and products grow with the ranks
        middle = (low + high) // 2
        low, high = (middle, high) if (at(middle)[rules] < value) == (least[rules] < most[rules]) else (low, middle)
    share = min((low, high), key=lambda each: abs(math.log(at(each)[rules] / value)))
    ours = Reading(at(share)[rules], rules)
    ends = f"from rank 1 to full rank ours runs from {least[rules]:,.3f} to {most[rules]:,.3f} {row.unit}"
    return ours, f"{ends}, and is {_digits(row, ours)} {row.unit} at {100 * share / SHARES:.1f} % of each mode"


def _threshold(row: Published, case: dict[str, Any]) -> str:
    """The energy threshold in percent that comes nearest as the papers count, for nets with ranks from spectra."""
    if row.quantity not in ("memory", "memory-ratio") or not reports_of(**case)[0].ranks_from.startswith("spectra"):
        return ""
    low, high = row.bounds
    ours = figures_of(**case)["bp"]
    target = (low + high) / 2 * MIB if row.quantity == "memory" else 2 * ours.paper / (low + high)
    found = []
    for factors in (False, True):
        least, most = 1, 100
        while most - least > 1:  # the bytes grow with ε
            middle = (least + most) // 2
            least, most = (middle, most) if _kept(middle, factors, **case) < target else (least, middle)
        for percent in (least, most):
            found.append((abs(math.log(_kept(percent, factors, **case) / target)), percent, factors))
    distance, percent, factors = min(found)
    return (
        f"the ranks behind it are not published; with our spectra ε = {percent / 100:.2f} comes nearest, counting "
        f"cores{' and factors' if factors else ' alone'}: within {100 * math.expm1(distance):.1f} %"
    )


@lru_cache(maxsize=256)
def _kept(percent: int, factors: bool, net: str, batch: int, tune: str, num_classes: int = 10) -> int:
    """Bytes of cores, and of factors if they count, at an energy threshold."""
    from analysis.cost_model import cost

    step = _traced(net, batch, tune, num_classes)
    total = cost(step, methods=["lance"], epsilon=percent / 100).totals["lance"]
    return total.activation_bytes["paper"] + factors * total.subspace_bytes


# ---- printing ----------------------------------------------------------------------------------


def text(found: Explanation) -> str:
    """The whole explanation, for a terminal or a file."""
    row = found.published
    source = published()[0][row.source]
    lines = [
        f"{row.id}: {row.value} {row.unit}",
        f"  what      {row.what}",
        f"  source    {source['paper']}, {row.where}",
        f"            {source['url']}",
    ]
    if row.remark:
        lines.append(f"  remark    {row.remark}")
    case = ", ".join(f"{name} {value}" for name, value in row.case.items() if name != "method")
    for method, figures in found.figures.items():
        if method == "bp" or row.case.get("method") == "lance":
            lines += ["", f"  {method}, by our cost model ({case})", *_table(figures)]
    return "\n".join([*lines, "", f"  {found.status}: {_conclusion(found)}"]) + "\n"


def _table(figures: Figures) -> list[str]:
    lines = [f"    {'accounting':<26}{'bytes':>15}{'MiB':>12}{'MB':>12}"]
    for name in ("paper", "pytorch", "tape", "factors", "bases"):
        if nbytes := getattr(figures, name):
            lines.append(f"    {name:<26}{nbytes:>15,}{nbytes / MIB:>12,.3f}{nbytes / 1e6:>12,.3f}")
    lines.append(f"    {'products, in billions':<26}{'':>15}{'MACs':>12}{'FLOPs':>12}")
    for place, work in (("whole net", figures.net), ("tuned layers", figures.tuned)):
        for kind, macs in asdict(work).items():
            if macs and not (kind.startswith(("papers", "full")) and not figures.factors):
                title = f"{place}, {kind.replace('_', ' ')}"
                lines.append(f"    {title:<41}{macs / 1e9:>12,.3f}{2 * macs / 1e9:>12,.3f}")
    return lines


def _conclusion(found: Explanation) -> str:
    row, reading = found.published, found.reading
    ours = f"{_digits(row, reading)} {row.unit}"
    if found.status == "met":
        return f"ours is {ours}, read as it is printed"
    rules = "".join(f"\n    {name}: {RULES[name]}" for name in reading.rules) or " read as it is printed"
    if found.status == "by ranks":
        return f"{found.note}, with{rules}"
    if found.status in ("explained", "within range"):
        also = "".join(f"\n    (or {' + '.join(other)})" for other in found.also)
        return f"ours is {ours} with{rules}{also}"
    note = f"\n    {found.note}" if found.note else ""
    return f"none of {found.tried} readings gives it; the nearest is {ours} with{rules}{note}"


def _digits(row: Published, reading: Reading) -> str:
    """Our value with one digit more than was printed."""
    decimals = len(row.value.split("..")[0].partition(".")[2])
    return f"{reading.value:,.{decimals + 1}f}"


def line(found: Explanation) -> str:
    """One line, for the list of all."""
    row, reading = found.published, found.reading
    printed, rules = f"{row.value} {row.unit}", " + ".join(reading.rules)
    return f"{row.id:<33} {printed:>14} {_digits(row, reading):>11}  {found.status:<12} {rules}".rstrip()


def to_json(found: Explanation) -> dict[str, Any]:
    """Everything, for machines."""
    row = found.published
    return {
        **asdict(row),
        "source": {**published()[0][row.source], "where": row.where},
        "status": found.status,
        "figure": found.reading.value,
        "rules": list(found.reading.rules),
        "readings_tried": found.tried,
        "ours": {method: asdict(figures) for method, figures in found.figures.items()},
        "note": found.note,
    }


def parser() -> argparse.ArgumentParser:
    p = frame.parser("experiments.ledger.explain", __doc__)
    p.add_argument("--claim", nargs="+", default=[], metavar="ID", help="names of published figures (all, a line each)")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    return command_line.run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> None:
    cli.check_once(options, "claim")
    rows = choose("published figure", options.claim, published()[1])
    found = [explain(row, threshold=bool(options.claim)) for row in rows]
    if options.json:
        print(json.dumps([to_json(each) for each in found], indent=1))
    elif options.claim:
        print("\n".join(text(each) for each in found), end="")
    else:
        print(f"{'id':<34}{'published':>14}{'ours':>12}  {'':<13}rules that it takes")
        for each in found:
            print(line(each))
        counts = {status: sum(each.status == status for each in found) for status in STATUSES}
        print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items() if count))


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
