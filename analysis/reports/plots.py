"""The report as a figure: where the bytes sit, what is computed, other batch sizes, other ranks.

Series differ in lightness, hatching or marker, never in hue alone: the figure is to be read in grayscale too.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from analysis.reports.figures import save_figure
from analysis.reports.plot_data import Frontier, energy_frontier, reduction_by_batch
from analysis.reports.prediction import Prediction
from analysis.reports.report import FLOP_KINDS, MethodCost, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.reports.torch_report import TorchPrediction


OF_REPORTS = ("tape", "macs")
"""Panels that need no more than a report."""
SUFFIXES = (".png", ".svg")
MOST_ROWS = 12
"""Operations that the panel of the tape shows one by one: those that keep most."""

WIDTH, WIDTH_OF_ONE = 9.0, 6.4  # inches; a single panel is 900 pixels wide
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6, "svg.hashsalt": "cost model",
}  # fmt: skip
BEFORE, AFTER, PAPER = "#d4d4d4", "#8a8a8a", "#123c69"
PAPERS: dict[str, Any] = {"color": PAPER, "edgecolor": "0.9", "hatch": "///", "linewidth": 0}
KINDS: dict[str, dict[str, Any]] = {
    "forward": {"color": "#e3e3e3"},
    "grad_input": {"color": "#9fc3dd"},
    "grad_weight": {"color": "#123c69"},
    "projection": {"color": "#f6b26b", "hatch": "xxxx"},
    "decomposition": {"color": "#ffffff", "hatch": "...."},
    "recompute": {"color": "#bdbdbd", "hatch": "////"},
}


class CostFigure(Figure):
    """A figure that notebooks show by itself, without pyplot, and whose PNGs are small: of 64 colours."""

    def savefig(self, fname: Any, **options: Any) -> None:
        if not str(options.get("format", fname)).endswith("png"):
            super().savefig(fname, **options)
            return
        from PIL import Image

        data = io.BytesIO()
        super().savefig(data, **{**options, "format": "png"})
        with Image.open(data) as picture:
            picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(fname, format="png", optimize=True)

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png")
        return data.getvalue()


def draw(
    prediction: Prediction | TorchPrediction,
    path: str | os.PathLike[str] | None = None,
    panels: Sequence[str] = ("tape", "macs", "batch", "frontier"),
    method: str | None = None,
) -> Figure:
    """Draw the report of a prediction; two panels ask it what other batches and ranks would cost.

    Parameters
    ----------
    path : str, optional
        A .png or .svg file to write, whole or not at all.
    panels : sequence of str
        ``"tape"``: what each operation keeps, under bp and the method, and the part of it that the papers count;
        ``"macs"``: multiply-adds by kind, of every method; ``"batch"``: bp's bytes over the method's, under each
        accounting, for 1 to 256 images; ``"frontier"``: energy kept against bytes, from spectra, or fractions of
        the ranks where there are none.
    method : str, optional
        Which one stands beside bp: by default lance, or the first that is not bp.

    Raises
    ------
    ValueError
        For another panel or method; of a PyTorch module for "batch" and "frontier", and for "tape" where it has none.
    """
    check_path(path)
    names = [panels] if isinstance(panels, str) else list(panels)
    if not names or len(set(names)) < len(names) or any(name not in PANELS for name in names):
        raise ValueError(f"panels are {names}, expected some of {', '.join(PANELS)}, each once")
    report = prediction.report
    odd = [name for name in names if name not in OF_REPORTS]
    if odd and not isinstance(prediction, Prediction):
        raise ValueError(f"panels are {', '.join(odd)}, expected some of {', '.join(OF_REPORTS)} for a PyTorch module")
    if report.no_tape and "tape" in names:
        raise ValueError(f"panels are {', '.join(names)}, but net {report.net!r} has no tape: {report.no_tape}")
    if method is not None and method not in report.methods:
        raise ValueError(f"method is {method!r}, expected one of the report's: {', '.join(report.methods)}")
    if method is None:
        others = [name for name in report.methods if name != "bp"]
        method = "lance" if "lance" in others or not others else others[0]
    with rc_context(STYLE):
        figure = _laid_out(prediction, [PANELS[name] for name in names], method)
        if path is not None:
            save_figure(figure, path)
    return figure


def check_path(path: str | os.PathLike[str] | None) -> None:
    """Raise ValueError unless a figure can have this name."""
    if path is not None and os.path.splitext(path)[1] not in SUFFIXES:
        raise ValueError(f"the figure's file is {os.fspath(path)!r}, expected a name ending in {' or '.join(SUFFIXES)}")


def _laid_out(prediction: Prediction | TorchPrediction, panels: Sequence[Panel], method: str) -> Figure:
    """The panels below each other, neighbours that are narrow side by side; what they are of at the top."""
    report = prediction.report
    rows: list[list[Panel]] = []
    for panel in panels:
        if rows and not panel.wide and not rows[-1][0].wide and len(rows[-1]) == 1:
            rows[-1].append(panel)
        else:
            rows.append([panel])
    heights = [max(panel.height(report, method) for panel in row) for row in rows]
    width = WIDTH_OF_ONE if len(panels) == 1 else WIDTH
    figure = CostFigure(figsize=(width, sum(heights) + 0.35), layout="constrained")
    figure.suptitle(_heading(report), fontsize=9.5, x=0.01, ha="left")
    grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            axes = figure.add_subplot(grid[i, :] if len(row) == 1 else grid[i, j])
            panel.draw(axes, prediction, method)
    return figure


def _heading(report: Report) -> str:
    size = "" if report.image_size is None else f", {report.image_size} pixels"
    count = len(report.tuned_layers)
    layers = f"{count} tuned layer{'' if count == 1 else 's'} and the head"
    return f"{report.net}, batch {report.batch}{size}, {report.dtype}; {layers}"


# ---- where the bytes sit -------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """What one operation keeps under one method, in bytes, and the part of it that the papers count."""

    tape: int = 0
    paper: int = 0

    def __add__(self, other: Bar) -> Bar:
        return Bar(self.tape + other.tape, self.paper + other.paper)


def _tape(axes: Axes, prediction: Prediction | TorchPrediction, method: str) -> None:
    report = prediction.report
    shown, totals = _beside(report, method), report.totals
    rows = tape_rows(report, shown)
    unit, name = _unit(max((bar.tape for _, bars in rows for bar in bars), default=0))
    height = 0.8 / len(shown)
    for i, (_, bars) in enumerate(rows):
        for k, bar in enumerate(bars):
            y = i + (k - (len(shown) - 1) / 2) * height
            axes.barh(y, bar.tape / unit, height, **_edged(color=(BEFORE, AFTER)[k]))
            axes.barh(y, bar.paper / unit, height, **PAPERS)
            axes.annotate(
                _size(bar.tape), (bar.tape / unit, y), (3, 0), textcoords="offset points", va="center", size=7.5
            )
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axes.set_xlim(0, max(axes.get_xlim()[1] * 1.06, 1e-9))
    axes.set_xlabel(f"bytes on the tape, {name}" + (f" ({shown[0]} above, {shown[1]} below)" if shown[1:] else ""))
    words = " → ".join(f"{m} {_size(totals[m].activation_bytes['tape'])}" for m in shown)
    beside = totals[shown[-1]].subspace_bytes
    axes.set_title(f"Where the tape's bytes sit\n{words}" + (f" (+ {_size(beside)} of factors)" if beside else ""))
    counted = [totals[m].activation_bytes for m in shown]
    papers = " → ".join(_size(kept["paper"]) for kept in counted)
    twice = any(kept["paper"] > kept["tape"] for kept in counted)  # then it is no part of the tape
    label = "what the papers count, a shared input for each of its layers" if twice else "of it, what the papers count"
    handles = [_patch(color) for color in (BEFORE, AFTER)[: len(shown)]] + [_patch(PAPER, PAPERS["hatch"], "0.9")]
    _legend_below(axes, 3, handles, [*shown, f"{label} ({papers})"], across=True)


def _beside(report: Report, method: str) -> list[str]:
    """bp and the method, those of them that the report has; else its first."""
    return [name for name in dict.fromkeys(("bp", method)) if name in report.methods] or [report.methods[0]]


def tape_rows(report: Report, methods: Sequence[str]) -> list[tuple[str, tuple[Bar, ...]]]:
    """(label, a bar for each method): the operations that keep most, in order of execution, and all others as one."""

    def bar(cost: MethodCost | None) -> Bar:
        kept = {"tape": 0, "paper": 0} if cost is None else cost.activation_bytes
        return Bar(kept["tape"], min(kept["tape"], kept["paper"]))

    rows = [(_label(row.name, row.op), tuple(bar(row.methods.get(m)) for m in methods)) for row in report.rows]
    rows = [row for row in rows if any(bar.tape for bar in row[1])]
    if len(rows) <= MOST_ROWS + 1:
        return rows
    ranked = sorted(range(len(rows)), key=lambda i: -max(bar.tape for bar in rows[i][1]))
    rest = [rows[i][1] for i in ranked[MOST_ROWS:]]
    sums = tuple(sum(bars, Bar()) for bars in zip(*rest, strict=True))
    return [*(rows[i] for i in sorted(ranked[:MOST_ROWS])), (f"({len(rest)} other operations)", sums)]


def _label(name: str, op: str) -> str:
    """The name's end, where it is long, and the operation, where the name does not say it."""
    says = "/" in name or name.rpartition(".")[2].partition("#")[0] in (op, "loss")
    name = name if len(name) <= 26 else f"…{name[-25:]}"
    return name if says else f"{name} {op}"


# ---- what is computed ----------------------------------------------------------------------


def _macs(axes: Axes, prediction: Prediction | TorchPrediction, method: str) -> None:
    report = prediction.report
    per_count = 1 if report.convention == "paper" else 2  # FLOPs of a multiply-add
    totals = report.totals
    kinds = [kind for kind in FLOP_KINDS if any(cost.flops[kind] for cost in totals.values())]
    most = max(cost.flops["total"] for cost in totals.values()) / per_count
    scale, name = _unit(most, COUNTS)
    for i, cost in enumerate(totals.values()):
        left = 0.0
        for kind in kinds:
            count = cost.flops[kind] / per_count / scale
            axes.barh(i, count, 0.66, left, **_edged(**KINDS[kind]))
            left += count
        axes.annotate(_short(left), (left, i), (3, 0), textcoords="offset points", va="center", size=8)
    axes.set_yticks(range(len(totals)), list(totals))
    axes.set_ylim(len(totals) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_xlabel(f"{name} of multiply-adds")
    only = ", of the tuned layers alone, as the papers count" if report.convention == "paper" else ""
    axes.set_title(f"Multiply-adds of one step, by kind{only}")
    patches = [_patch(KINDS[kind]["color"], KINDS[kind].get("hatch")) for kind in kinds]
    _legend_below(axes, min(len(kinds), 4), patches, kinds, across=True)


# ---- other batch sizes ---------------------------------------------------------------------

LINES: dict[str, dict[str, Any]] = {
    "paper": {"color": PAPER, "marker": "o"},
    "tape": {"color": "0.25", "marker": "^"},
    "tape + factors": {"color": "0.25", "marker": "v", "linestyle": ":", "markerfacecolor": "white"},
    "pytorch": {"color": "0.55", "marker": "s", "linestyle": "--", "markerfacecolor": "none", "markersize": 7},
}


def _batch(axes: Axes, prediction: Prediction, method: str) -> None:
    report = prediction.report
    found = reduction_by_batch(prediction, method)
    more = any(ratio is not None and ratio < 1 for ratios in found.values() for ratio in ratios.values())
    axes.set_title(f"How many times less {method} keeps, by batch{' (below 1: more)' if more else ''}")
    for name, style in LINES.items():
        points = [(batch, ratios[name]) for batch, ratios in found.items() if ratios[name] is not None]
        if not points or (name == "tape + factors" and all(r[name] == r["tape"] for r in found.values())):
            continue
        here = found.get(report.batch, {}).get(name)
        label = name if here is None else f"{name}: {_times_less(here)}"
        axes.plot(*zip(*points, strict=True), linewidth=1.2, label=label, **{"markersize": 4, **style})
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(found), [str(batch) for batch in found])
    axes.set_yscale("log")
    _plain_log_ticks(axes, "y")
    axes.axhline(1, color="0.7", linewidth=0.7, zorder=0)
    axes.axvline(report.batch, color="0.7", linewidth=0.7, zorder=0)
    axes.set(xlabel="images of a batch", ylabel=f"bytes of bp / bytes of {method}")
    _legend_below(axes, 2, title=f"at batch {report.batch}")


def _times_less(ratio: float) -> str:
    """The words for a ratio in a legend: what shrinks and what grows have different ones.

    >>> _times_less(16.97), _times_less(0.5556)
    ('17.0×', 'grows 1.80×')
    """
    return f"{_short(ratio)}×" if ratio >= 1 or not ratio else f"grows {_short(1 / ratio)}×"


# ---- other ranks ---------------------------------------------------------------------------


def _frontier(axes: Axes, prediction: Prediction, method: str) -> None:
    try:
        found = energy_frontier(prediction, method)
    except ValueError as error:
        axes.set_title("Energy kept against bytes")
        axes.text(0.5, 0.5, f"not for this step:\n{error}", ha="center", va="center", wrap=True, color="0.3")
        axes.set_axis_off()
        return
    unit, name = _unit(max(found.bp_bytes, *(point.bytes for point in found.points)))
    at = [point.bytes / unit for point in found.points]
    high = [100 * point.at_most for point in found.points]
    if found.source is None:
        axes.set_title("No spectra: fractions of the ranks assumed")
        axes.plot(at, high, color="0.25", marker=".", linewidth=1.2, label="the same fraction of every mode")
        axes.set_ylabel("directions kept, % of each mode")
    else:
        axes.set_title(f"Energy that {found.method} keeps, against bytes")
        low = [100 * point.at_least for point in found.points]
        axes.fill_between(at, low, high, color="0.9", zorder=0)
        axes.plot(at, high, color=PAPER, marker=".", linewidth=1.2, label="at most: least of the modes")
        axes.plot(at, low, color="0.45", linestyle="--", linewidth=1.2, label="at least: losses of all modes added")
        axes.set_ylabel("energy kept, %, mean over layers")
    axes.set_xscale("log")
    axes.axvline(found.bp_bytes / unit, color="0.3", linewidth=1, linestyle="-.", label=f"bp: {_size(found.bp_bytes)}")
    if found.chosen is not None:
        axes.plot(found.chosen.bytes / unit, 100 * found.chosen.at_most, "D", color="black", markersize=6,
                  markerfacecolor="white", label=f"here: {_size(found.chosen.bytes)}")  # fmt: skip
    _plain_log_ticks(axes, "x")
    axes.set(xlabel=f"tape and factors, {name}", ylim=(-3, 105))
    _mark_settings(axes, found, unit)
    _legend_below(axes, 2)


def _mark_settings(axes: Axes, found: Frontier, unit: float) -> None:
    """Some thresholds, or fractions, beside their points."""
    ticks = (0.3, 0.5, 0.7, 0.9, 0.99) if found.source else (0.125, 0.25, 0.5, 0.75)
    letter = "ε " if found.source else ""
    for point in found.points:
        if point.setting in ticks:
            where = point.bytes / unit, 100 * point.at_most
            axes.annotate(f"{letter}{point.setting:g}", where, (6, -7), textcoords="offset points", size=8)


# ---- all panels ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One panel: how it is drawn, whether it takes the whole width, and its height in inches."""

    draw: Callable[[Axes, Any, str], None]  #: From a prediction of a net; those of OF_REPORTS from any prediction.
    wide: bool
    height: Callable[[Report, str], float]


PANELS = {
    "tape": Panel(
        _tape, True, lambda report, method: 1.4 + 0.34 * max(len(tape_rows(report, _beside(report, method))), 2)
    ),
    "macs": Panel(_macs, True, lambda report, method: 1.25 + 0.27 * max(len(report.methods), 2)),
    "batch": Panel(_batch, False, lambda report, method: 3.7),
    "frontier": Panel(_frontier, False, lambda report, method: 3.7),
}


def _legend_below(
    axes: Axes,
    columns: int,
    handles: Sequence[Any] = (),
    labels: Sequence[str] = (),
    title: str | None = None,
    across: bool = False,
) -> None:
    """The legend under the axis and its label; of all lines, where no handles are given.

    ``across``: in the middle of the figure, not of the axes.
    """
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory

    figure = axes.get_figure(root=True)
    assert figure is not None
    under = axes.transAxes + ScaledTranslation(0, -33 / 72, figure.dpi_scale_trans)
    place = blended_transform_factory(figure.transFigure, under) if across else under
    of = (handles, labels) if handles else ()
    axes.legend(*of, title=title, loc="upper center", bbox_to_anchor=(0.5 if across else 0.45, 0), bbox_transform=place,
                ncols=columns, borderaxespad=0, title_fontsize=8.5)  # fmt: skip


def _edged(**style: Any) -> dict[str, Any]:
    return {"edgecolor": "0.2", "linewidth": 0.5, **style}


def _patch(color: str, hatch: str | None = None, edge: str = "0.2") -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=color, edgecolor=edge, hatch=hatch, linewidth=0.5)


BYTES = {2.0**30: "GiB", 2.0**20: "MiB", 2.0**10: "KiB", 1.0: "bytes"}
COUNTS = {1e12: "trillions", 1e9: "billions", 1e6: "millions", 1e3: "thousands"}


def _unit(count: float, units: Mapping[float, str] = BYTES) -> tuple[float, str]:
    """The unit in which this many have few digits; the smallest is the last."""
    return next(((unit, name) for unit, name in units.items() if count >= unit), list(units.items())[-1])


def _size(count: float) -> str:
    unit, name = _unit(count)
    return f"{count:,.0f} bytes" if unit == 1 else f"{_short(count / unit)} {name}"


def _short(number: float) -> str:
    """Three digits that matter.

    >>> [_short(n) for n in (1060.9, 61.02, 3.593, 0.0541, 0.0)]
    ['1,061', '61.0', '3.59', '0.054', '0']
    """
    if number == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(number)))) if abs(number) >= 0.1 else 3
    text = f"{number:,.{digits}f}"
    return text if float(text.replace(",", "")) else "<0.001"


def _plain_log_ticks(axes: Axes, which: str) -> None:
    """Plain numbers on a logarithmic axis: the fewest of 1, of 1, 2 and 5, or of more, that make four or more ticks."""
    axis, (low, high) = (axes.xaxis, axes.get_xlim()) if which == "x" else (axes.yaxis, axes.get_ylim())
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), [n / 10 for n in range(10, 100, 2)]):
        ticks = [n * 10.0**decade for decade in decades for n in steps if low <= n * 10.0**decade <= high]
        if len(ticks) >= 4:
            break
    axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.set_ticks([], minor=True)
