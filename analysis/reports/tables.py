"""The printed report: per-layer tables, totals, reductions, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from analysis.commands import console
from analysis.commands.console import Sheet, say
from analysis.reports.footnotes import footnotes
from analysis.reports.report import ACCOUNTINGS, FLOP_KINDS, Continual, MethodCost, Report, Row, reductions

if TYPE_CHECKING:
    from rich.console import Console

FEW = 4
"""Methods of which every layer is shown under every accounting; of more, one column each."""


def render(report: Report, accountings: Sequence[str] = ACCOUNTINGS, across: int | None = None) -> str:
    """The whole report as plain text.

    Parameters
    ----------
    report : Report
    accountings : sequence of str
        Which columns of activation memory to show.
    across : int, optional
        Characters of a line, 200 by default; columns that do not fit stand in further blocks.
    """
    return console.as_text(_drawn(report, accountings), across)


def show(report: Report, accountings: Sequence[str] = ACCOUNTINGS) -> None:
    """Print the report: in colour to a terminal, unless NO_COLOR is set; as plain text to a pipe."""
    console.show(_drawn(report, accountings))


def html(report: Report) -> str:
    """The totals with what stands above and below them, as HTML without scripts."""
    from html import escape

    def draw(on: Console) -> None:
        _print_heading(report, on)
        on.print(totals_table(report))
        _print_footer(report, on)
        _print_continual(report, on)

    return f'<pre style="overflow-x: auto; white-space: pre">{escape(console.as_text(draw))}</pre>'


Report._repr_html_ = html  # type: ignore[attr-defined]  # what a notebook shows; a report is data and knows no table


def _drawn(report: Report, accountings: Sequence[str]) -> Callable[[Console], None]:
    """Prints all of it to a rich console."""

    def draw(on: Console) -> None:
        _print_heading(report, on)
        on.print(_memory_table(report, accountings))
        on.print(_flops_table(report))
        on.print(totals_table(report, accountings))
        _print_footer(report, on)
        _print_continual(report, on)

    return draw


def _print_heading(report: Report, on: Console) -> None:
    size = "" if report.image_size is None else f", {report.image_size} pixels"
    say(on, f"{report.net}, batch {report.batch}{size}, {report.num_classes} classes, {report.dtype}")
    count = len(report.tuned_layers)
    say(on, f"tuned: {count} layer{'' if count == 1 else 's'} and the classifier head")
    if any(cost.ranks for row in report.rows for cost in row.methods.values()):
        say(on, f"ranks from: {report.ranks_from}")


def _print_footer(report: Report, on: Console) -> None:
    """Calibrations, settings, what was left out, the peaks, and what it all means."""
    for sentence in (*footnotes(report), *explain(report)):
        say(on, sentence)


def _print_continual(report: Report, on: Console) -> None:
    """A second table, where it was asked for."""
    continual = report.continual
    if continual is None:
        return
    on.print(continual_table(continual))
    say(
        on,
        f"Of the last task, with {continual.protected:g} of each layer's directions protected, found from "
        f"{continual.basis_batches} batches after each task; beside: GPM's bases, LANCE's factors; flash: the bases "
        "kept for the next task",
    )


# ---- per layer ---------------------------------------------------------------------------


def _memory_table(report: Report, accountings: Sequence[str]) -> Sheet:
    methods = report.methods
    accountings = accountings if len(methods) <= FEW else accountings[-1:]
    with_factors = [m for m in methods if report.totals[m].subspace_bytes]
    of_ranks = _rank_columns(report)
    columns = ["layer", "op", "output", *of_ranks]
    columns += [f"{method} {name}" for method in methods for name in accountings]
    columns += [f"{method} factors" for method in with_factors]
    table = Sheet("Kept for the backward pass (bytes; each buffer billed once)", columns, 3 + len(of_ranks))

    def numbers(costs: dict[str, MethodCost]) -> list[str]:
        kept = [
            costs[method].activation_bytes[name] if method in costs else None
            for method in methods
            for name in accountings
        ]
        factors = [costs[method].subspace_bytes if method in costs else None for method in with_factors]
        return [_count(n) for n in kept + factors]

    skipped = 0
    for row in report.rows:
        if not any(any(cost.activation_bytes.values()) or cost.subspace_bytes for cost in row.methods.values()):
            skipped += 1
            continue
        ranks = [next((_ranks(row.methods[m].ranks) for m in of if m in row.methods), "") for of in of_ranks.values()]
        table.add(row.name, row.op, _shape(row.output_shape), *ranks, *numbers(row.methods))
    if skipped:
        table.add(f"({skipped} more, which keep nothing)", style="dim")
    table.rule()
    table.add("total", "", "", *[""] * len(of_ranks), *numbers(report.totals))
    return table


def _rank_columns(report: Report) -> dict[str, list[str]]:
    """The methods with ranks, by the name of their column: one column where all of them have the same ranks."""
    of = {
        method: [row.methods[method].ranks if method in row.methods else None for row in report.rows]
        for method in report.methods
    }
    ranked = [method for method, ranks in of.items() if any(ranks)]
    if all(of[method] == of[ranked[0]] for method in ranked):
        return {"ranks": ranked}
    return {f"{method} ranks": [method] for method in ranked}


def _flops_table(report: Report) -> Sheet:
    """FLOPs by kind; a kind that all methods agree on in every row has one column, one that is always 0 none.

    Of many methods the sums alone, with one column of the forward pass.
    """
    totals, methods = report.totals, report.methods
    shared = [kind for kind in FLOP_KINDS if _agreed(report, kind)]
    own = [(method, kind) for method in methods for kind in FLOP_KINDS if kind not in shared]
    if len(methods) > FEW:
        shared, own = [kind for kind in shared if kind == "forward"], []
    shared = [kind for kind in shared if totals[methods[0]].flops[kind]]
    own = [(method, kind) for method, kind in own if totals[method].flops[kind]]
    unit = "millions of multiply-adds of the tuned layers" if report.convention == "paper" else "MFLOPs"
    columns = ["layer", "op", "weight", *shared, *(f"{method} {kind}" for method, kind in own)]
    columns += [f"{method} total" for method in methods]
    table = Sheet(f"Products of one step ({unit})", columns, 3)

    def numbers(costs: dict[str, MethodCost]) -> list[str]:
        one = next(iter(costs.values()))
        values: list[int | None] = [one.flops[kind] for kind in shared]
        values += [costs[method].flops[kind] if method in costs else None for method, kind in own]
        values += [costs[method].flops["total"] if method in costs else None for method in methods]
        return [_millions(n) for n in values]

    folded: list[Row] = []
    for row in report.rows:
        if not any(cost.flops["total"] for cost in row.methods.values()):
            continue
        everywhere = len(row.methods) == len(methods)
        if everywhere and all(cost.flops["total"] == cost.flops["forward"] for cost in row.methods.values()):
            folded.append(row)
            continue
        table.add(row.name, row.op, _shape(row.weight_shape), *numbers(row.methods))
    if folded:
        sums = {method: MethodCost.sum([row.methods[method] for row in folded]) for method in methods}
        table.add(f"({len(folded)} more, forward only)", "", "", *numbers(sums), style="dim")
    table.rule()
    table.add("total", "", "", *numbers(totals))
    return table


def _agreed(report: Report, kind: str) -> bool:
    """Whether every method runs every operation, and all of them spend the same on this kind."""
    return all(
        len(row.methods) == len(report.methods) and len({cost.flops[kind] for cost in row.methods.values()}) == 1
        for row in report.rows
    )


# ---- totals ------------------------------------------------------------------------------


def totals_table(report: Report, accountings: Sequence[str] = ACCOUNTINGS) -> Sheet:
    """Memory, work and, where bp is among the methods, how many times less each of the others takes."""
    work = "multiply-adds" if report.convention == "paper" else "FLOPs"
    rare = ("decomposition", "recompute")
    kinds = [k for k in FLOP_KINDS if k not in rare or any(c.flops[k] for c in report.totals.values())]
    columns = ["", *accountings, "factors", "tape + factors", *kinds, f"{work}, all", "elementwise"]
    table = Sheet(f"Totals (memory in MiB, {work} in billions, element-wise operations in billions)", columns, 1)
    totals = report.totals
    for method, cost in totals.items():
        memory = [cost.activation_bytes[name] for name in accountings] + [cost.subspace_bytes, cost.tape_and_factors]
        giga = [cost.flops[kind] / 1e9 for kind in (*kinds, "total")] + [cost.elementwise / 1e9]
        table.add(method, *(f"{n / 2**20:,.3f}" for n in memory), *(f"{n:,.3f}" for n in giga))
    for method in [name for name in totals if name != "bp"]:
        ratios = reductions(totals["bp"], totals[method]) if "bp" in totals else {}
        if ratios:
            shown = [_ratio(ratios[name]) for name in accountings] + ["", _ratio(ratios["tape + factors"])]
            shown += [""] * len(kinds) + [_ratio(ratios["flops"])]
            table.add(f"bp / {method}", *shown, style="green")
    return table


def continual_table(continual: Continual) -> Sheet:
    """Every learner's bill of the last task, and of all that lies between the tasks."""
    mib, giga = 2**20, 1e9
    title = f"Learning {continual.tasks} tasks one after the other (memory in MiB, multiply-adds in billions)"
    columns = [
        "learner",
        "tape",
        "beside",
        "RAM",
        "flash afterwards",
        "total",
        "a step",
        "between",
        "between, all tasks",
    ]
    table = Sheet(title, columns, 1)
    for learner in dict.fromkeys(bill.learner for bill in continual.bills):
        of = [bill for bill in continual.bills if bill.learner == learner]
        last = of[-1]
        memory = (last.tape_bytes, last.beside_bytes, last.ram_bytes, last.flash_bytes, last.total_bytes)
        work = (last.step_macs, last.between_macs, sum(bill.between_macs for bill in of))
        table.add(learner, *(f"{n / mib:,.3f}" for n in memory), *(f"{n / giga:,.3f}" for n in work))
    return table


def explain(report: Report) -> list[str]:
    """What the reductions mean, one sentence per method beside bp; and which layers keep next to nothing."""
    totals = report.totals
    if "bp" not in totals:
        return []
    sentences: list[str] = []
    for method in [name for name in totals if name != "bp"]:
        whole = reductions(totals["bp"], totals[method])["tape + factors"]
        if whole is not None and whole < 1 / SAME:
            sentences.append(f"{method} takes more memory than bp here: what this library keeps {change(whole)}.")
    for method in [name for name in totals if name.startswith("lance")]:
        r = reductions(totals["bp"], totals[method])
        sentences.append(
            f"What it means: with {method} the tape of this library {change(r['tape'])}; with the fixed factors, which "
            f"stay in memory beside it, it {change(r['tape + factors'])}. What the papers count, the inputs of the "
            f"tuned layers alone, {change(r['paper'])}. What PyTorch would keep, which includes what batch norm and "
            f"activation functions save, {change(r['pytorch'])}. From PyTorch's memory of bp to this tape, memory "
            f"{change(r['bp pytorch / tape'])} ({change(r['bp pytorch / tape + factors'])} with the factors)."
        )
        rows = [row for row in report.rows if method in row.methods]
        single = [row.name for row in rows if set(row.methods[method].ranks or (0,)) == {1}]
        if single:
            sentences.append(
                f"Mind the ranks: {', '.join(single)} would keep one number, rank 1 in every mode: little more than "
                "the mean activation, which holds most of the energy. A larger --epsilon, or --ranks, keeps more."
            )
    return list(dict.fromkeys(sentences))


SAME = 1.05
"""Memory whose ratio is nearer to 1 than this hardly changes."""


def change(times_less: float | None) -> str:
    """What becomes of memory that is divided by this number, as the predicate of a sentence; None: nothing is left.

    >>> change(1060.954), change(0.5556), change(1.004), change(None)
    ('shrinks 1060.95 times', 'grows 1.80 times', 'hardly changes (to 99.6 %)', 'shrinks to nothing')
    """
    if times_less is None:
        return "shrinks to nothing"
    if times_less > SAME:
        return f"shrinks {times_less:.2f} times"
    if times_less < 1 / SAME:
        return f"grows {1 / times_less:.2f} times" if times_less else "grows from nothing"
    return f"hardly changes (to {100 / times_less:.1f} %)"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _count(n: int | None) -> str:
    """``-``: the method does not run the operation."""
    return "-" if n is None else f"{n:,}"


def _millions(n: int | None) -> str:
    return "-" if n is None else f"{n / 1e6:,.3f}" if n else "0"


def _shape(shape: Sequence[int] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape))


def _ranks(ranks: Sequence[int | None] | None) -> str:
    return "" if ranks is None else ",".join("-" if r is None else str(r) for r in ranks)
