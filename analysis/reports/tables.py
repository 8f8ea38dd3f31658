"""The printed report: what it means, totals, reductions, and tables of all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from analysis.commands import console
from analysis.commands.console import Sheet, in_unit, readable, say, scale_of, unit_of
from analysis.reports.footnotes import footnotes, orders
from analysis.reports.report import ACCOUNTINGS, FLOP_KINDS, Continual, MethodCost, Report, Row, reductions

if TYPE_CHECKING:
    from rich.console import Console


def render(
    report: Report, accountings: Sequence[str] = ACCOUNTINGS, across: int | None = None, wide: bool = False
) -> str:
    """The whole report as plain text, lines at most ``across`` characters long (100).

    ``accountings`` are the columns of activation memory. Wide: all columns, in blocks below each other, and the
    products of every layer; otherwise the columns that fit.
    """
    return console.as_text(drawn(report, accountings, wide), across)


def html(report: Report) -> str:
    """The totals with what stands above and below them, as HTML without scripts."""
    from html import escape

    draw = drawn(report, ACCOUNTINGS, layers=False)
    return f'<pre style="overflow-x: auto; white-space: pre">{escape(console.as_text(draw))}</pre>'


Report._repr_html_ = html  # type: ignore[attr-defined]  # what a notebook shows; a report is data and knows no table


def drawn(
    report: Report, accountings: Sequence[str], wide: bool = False, layers: bool = True
) -> Callable[[Console], None]:
    """Prints all of it to a rich console."""

    shown = [name for name in accountings if name in report.accountings]
    if not shown:
        why = f"; no tape: {report.no_tape}" if report.no_tape else ""
        expected = ", ".join(report.accountings)
        raise ValueError(f"accountings are {', '.join(accountings)}, expected some of {expected}{why}")

    def draw(on: Console) -> None:
        meaning, *details = explain(report)
        say(on, _heading(report))
        say(on, meaning)
        on.print(totals_table(report, shown, wide))
        if layers:
            on.print(_memory_table(report, shown, wide))
        if layers and wide:
            on.print(_flops_table(report))
        for sentence in (*footnotes(report), *(orders(report) if wide else ()), *details):
            say(on, sentence)
        _print_continual(report, on)

    return draw


def _heading(report: Report) -> str:
    size = "" if report.image_size is None else f", {report.image_size} pixels"
    count = len(report.tuned_layers)
    given = report.num_classes
    classes = "" if given is None else f", {given} classes" if given else ", no classes"
    return (
        f"{report.net}, batch {report.batch}{size}{classes}, {report.dtype}; "
        f"tuned: {count} layer{'' if count == 1 else 's'} and the classifier head"
    )


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


def _memory_table(report: Report, accountings: Sequence[str], wide: bool) -> Sheet:
    """Every layer: the tapes of two methods, and what fits beside them; all columns, in bytes, where it is wide."""
    methods = report.methods
    with_factors = [m for m in methods if report.totals[m].subspace_bytes]
    of_ranks = _rank_columns(report)
    kept_by = {name: [f"{method} {name}" for method in methods] for name in accountings}
    factors_of = ["factors"] if len(with_factors) == 1 else [f"{method} factors" for method in with_factors]
    columns = ["layer", "op", "activation", "output", *of_ranks]
    columns += [f"{method} {name}" for method in methods for name in accountings] + factors_of
    first = kept_by.pop(report.main if report.main in kept_by else accountings[0])
    one_by_one = [*first[2:], *of_ranks, "activation", *factors_of, "op"]
    optional = [*([name] for name in one_by_one), *reversed(kept_by.values()), ["output"]]
    unit = unit_of(_most_kept(report) // 10)  # a row is a part of the total
    title = f"Kept for the backward pass ({'bytes' if wide else unit}; each buffer billed once)"
    table = Sheet(title, columns, 4 + len(of_ranks), () if wide else optional)

    def numbers(costs: dict[str, MethodCost]) -> list[str]:
        kept = [
            costs[method].activation_bytes[name] if method in costs else None
            for method in methods
            for name in accountings
        ]
        factors = [costs[method].subspace_bytes if method in costs else None for method in with_factors]
        return [_count(n) if wide else _memory(n, unit) for n in kept + factors]

    skipped = 0
    for row in report.rows:
        if not any(any(cost.activation_bytes.values()) or cost.subspace_bytes for cost in row.methods.values()):
            skipped += 1
            continue
        ranks = [next((_ranks(row.methods[m].ranks) for m in of if m in row.methods), "") for of in of_ranks.values()]
        table.add(row.name, row.op, _shape(row.input_shape), _shape(row.output_shape), *ranks, *numbers(row.methods))
    if skipped:
        table.add(f"({skipped} keep nothing)", style="dim")
    table.rule()
    table.add("total", *[""] * (3 + len(of_ranks)), *numbers(report.totals))
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
    """FLOPs by kind; a kind that all methods agree on in every row has one column, one that is always 0 none."""
    totals, methods = report.totals, report.methods
    shared = [kind for kind in FLOP_KINDS if _agreed(report, kind)]
    own = [(method, kind) for method in methods for kind in FLOP_KINDS if kind not in shared]
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
        table.add(f"({len(folded)} forward only)", "", "", *numbers(sums), style="dim")
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


def totals_table(report: Report, accountings: Sequence[str] = ACCOUNTINGS, wide: bool = False) -> Sheet:
    """Memory, work and, where bp is among the methods, how many times less each of the others takes."""
    work = "multiply-adds" if report.convention == "paper" else "FLOPs"
    rare = ("decomposition", "recompute")
    totals, peaks = report.totals, {method: peak.peak_bytes for method, peak in report.peaks.items()}
    kinds = [k for k in FLOP_KINDS if k not in rare or any(c.flops[k] for c in totals.values())]
    first = [report.main] if report.main in accountings else []
    others = [name for name in accountings if name not in first]
    both = f"{report.main} + factors"
    counted = ["elementwise"] * all(cost.elementwise is not None for cost in totals.values())
    columns = ["method", *first, "factors", both, *["peak"] * bool(peaks), work]
    columns += [*others, *counted, *kinds]
    optional = [[both], *([name] for name in (*reversed(others), *counted)), kinds]
    most = max(max(cost.flops["total"], cost.elementwise or 0) for cost in totals.values())
    unit, (scale, many) = unit_of(max(_most_kept(report), *peaks.values(), 0)), scale_of(most)
    title = f"Totals (memory in {unit}, {work}{' and element-wise operations' if counted else ''} in {many})"
    if report.file_only:
        columns, optional = [_marked(c) for c in columns], [[_marked(c) for c in group] for group in optional]
    table = Sheet(title, columns, 1, () if wide else optional)

    def add(name: str, cells: dict[str, str], style: str = "") -> None:
        cells = {_marked(column): cell for column, cell in cells.items()} if report.file_only else cells
        table.add(name, *(cells.get(column, "") for column in columns[1:]), style=style)

    for method, cost in totals.items():
        memory = {**cost.activation_bytes, "factors": cost.subspace_bytes, both: cost.tape_and_factors}
        memory |= {"peak": peaks[method]} if method in peaks else {}
        ran = {**cost.flops, work: cost.flops["total"], "elementwise": cost.elementwise or 0}
        cells = {column: _memory(n, unit) for column, n in memory.items()}
        add(method, cells | {column: f"{n / scale:,.3f}" for column, n in ran.items()})
    for method in totals:
        ratios = _reductions(report, method)
        if ratios:
            times = {**ratios, work: ratios["flops"]}
            add(f"bp / {method}", {k: "-" if n is None else f"{n:,.2f}x" for k, n in times.items()}, "green")
    return table


def _marked(column: str) -> str:
    """The name of a column of totals that is the file's alone."""
    return "pytorch (file)" if column == "pytorch" else column


def _reductions(report: Report, method: str) -> dict[str, float | None]:
    """How many times less the method takes than bp, the peak included; nothing for bp, or where there is no bp."""
    totals, peaks = report.totals, report.peaks
    if method == "bp" or "bp" not in totals:
        return {}
    peak = {"peak": peaks["bp"].peak_bytes / peaks[method].peak_bytes} if peaks else {}
    return {**reductions(totals["bp"], totals[method]), **peak}


def continual_table(continual: Continual) -> Sheet:
    """Every learner's bill of the last task, and of all that lies between the tasks."""
    mib, giga = 2**20, 1e9
    title = f"Learning {continual.tasks} tasks one after the other (memory in MiB, multiply-adds in billions)"
    columns = ["learner", "tape", "beside", "RAM", "flash afterwards", "total", "a step", "between"]
    table = Sheet(title, [*columns, "between, all tasks"], 1)
    for learner in dict.fromkeys(bill.learner for bill in continual.bills):
        of = [bill for bill in continual.bills if bill.learner == learner]
        last = of[-1]
        memory = (last.tape_bytes, last.beside_bytes, last.ram_bytes, last.flash_bytes, last.total_bytes)
        work = (last.step_macs, last.between_macs, sum(bill.between_macs for bill in of))
        table.add(learner, *(f"{n / mib:,.3f}" for n in memory), *(f"{n / giga:,.3f}" for n in work))
    return table


def explain(report: Report) -> list[str]:
    """What the totals mean, in one paragraph; then the other accountings, and which layers keep next to nothing."""
    totals, told, details = report.totals, [], []
    with_tape, both = report.main == "tape", f"{report.main} + factors"
    keeper = "this library" if with_tape else "PyTorch"
    ratios = {method: found for method in totals if (found := _reductions(report, method))}
    for method, found in ratios.items():
        whole = found[both]
        if whole is not None and whole < 1 / SAME:
            told.append(f"{method} takes more memory than bp here: what {keeper} keeps {change(whole)}.")
    lances = [method for method in ratios if method in report.calibration]
    of_tape = ", what this library keeps for the backward pass," if with_tape else " for the backward pass"
    beside = ", which stay in memory beside it,"
    for method in lances or list(ratios or totals):
        kept = {report.main: totals[method].activation_bytes[report.main], both: totals[method].tape_and_factors}
        kept |= {"peak": report.peaks[method].peak_bytes} if report.peaks else {}
        of = ratios.get(method)
        becomes = {name: change(of[name]) if of else f"takes {readable(n)}" for name, n in kept.items()}
        beside_it = f"; with the fixed factors{beside} it {becomes[both]}"
        with_factors = beside_it if totals[method].subspace_bytes else ""
        what = f"the tape{of_tape}" if with_tape else f"what PyTorch keeps{of_tape}"
        told.append(f"{'With' if told else 'with'} {method} {what} {becomes[report.main]}{with_factors}.")
        told += [f"The peak of the step {becomes['peak']}."] if report.peaks else []
        of_tape = beside = ""
    for method in lances:
        r = ratios[method]
        papers = f"What the papers count with {method}, the inputs of the tuned layers alone, {change(r['paper'])}."
        details.append(
            f"{papers} What PyTorch would keep, which includes what batch norm and activation functions save, "
            f"{change(r['pytorch'])}. From PyTorch's memory of bp to this tape, memory "
            f"{change(r['bp pytorch / tape'])}; with the factors, it {change(r['bp pytorch / tape + factors'])}."
            if with_tape
            else papers
        )
        rows = [row for row in report.rows if method in row.methods]
        single = [row.name for row in rows if set(row.methods[method].ranks or (0,)) == {1}]
        if single:
            details.append(
                f"Mind the ranks: {', '.join(single)} would keep one number, rank 1 in every mode: little more than "
                "the mean activation, which holds most of the energy. A larger --epsilon, or --ranks, keeps more."
            )
    return [f"What it means: {' '.join(told)}", *dict.fromkeys(details)]


SAME = 1.05
"""Memory whose ratio is nearer to 1 than this hardly changes."""


def change(times_less: float | None) -> str:
    """The predicate of a sentence on memory that is divided by this number; None stands for memory that is gone.

    >>> change(1060.954), change(0.5556), change(1.004), change(None)
    ('shrinks 1,060.95 times', 'grows 1.80 times', 'hardly changes (to 99.6 %)', 'shrinks to nothing')
    """
    if times_less is None:
        return "shrinks to nothing"
    if times_less > SAME:
        return f"shrinks {times_less:,.2f} times"
    if times_less < 1 / SAME:
        return f"grows {1 / times_less:,.2f} times" if times_less else "grows from nothing"
    return f"hardly changes (to {100 / times_less:.1f} %)"


def _count(n: int | None) -> str:
    """``-``: the method does not run the operation."""
    return "-" if n is None else f"{n:,}"


def _most_kept(report: Report) -> int:
    return max(max(*cost.activation_bytes.values(), cost.tape_and_factors) for cost in report.totals.values())


def _memory(n: int | None, unit: str) -> str:
    return "-" if n is None else in_unit(n, unit)


def _millions(n: int | None) -> str:
    return "-" if n is None else f"{n / 1e6:,.3f}" if n else "0"


def _shape(shape: Sequence[int] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape))


def _ranks(ranks: Sequence[int | None] | None) -> str:
    return "" if ranks is None else ",".join("-" if r is None else str(r) for r in ranks)
