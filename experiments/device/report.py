"""The device experiment's tables, figure and result file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from analysis.commands.chance import sentence
from analysis.commands.console import blocks, paragraph
from analysis.reports.figures import save_figure
from experiments import frame

NAMES = {"head": "head only", "bias": "biases", "bp": "backpropagation", "lance": "LANCE"}


@dataclass(frozen=True)
class Row:
    """One method with one kind of update, all seeds.

    Attributes
    ----------
    method : str
    directions : int or None
        Of LANCE.
    update : {"image", "batch"}
    lr : float
    tried : mapping of float to float
        Accuracy on held-out training images by learning rate.
    plan : mapping
        What :func:`experiments.device.cell.plan` returned for the smallest arena.
    untiled : mapping
        What it returned without a limit, where nothing is computed again.
    seeds : tuple of mappings
        What :func:`experiments.device.cell.train` returned, one for each seed.
    """

    method: str
    directions: int | None
    update: str
    lr: float
    tried: Mapping[float, float]
    plan: Mapping[str, Any]
    untiled: Mapping[str, Any]
    seeds: tuple[Mapping[str, Any], ...]

    @property
    def key(self) -> tuple[str, int | None, str]:
        return self.method, self.directions, self.update

    @property
    def name(self) -> str:
        """The name of the row in tables, without the update."""
        return NAMES[self.method] + (f", {self.directions} directions" if self.directions else "")

    @property
    def accuracies(self) -> list[float]:
        return [float(seed["accuracy"]) for seed in self.seeds]

    @property
    def accuracy(self) -> str:
        """Mean and standard deviation over the seeds, in per cent."""
        return frame.spread([100 * accuracy for accuracy in self.accuracies], 1)


Fits = Mapping[float, Mapping[tuple[str, int | None, str], Mapping[str, Any]]]
"""The outcome of compiling each row for each budget in KiB."""

COLUMNS = (
    "update after", "method", "accuracy %", "lr", "RAM KiB", "lower bound", "again, M", "without tiles", "flash KiB",
)  # fmt: skip
BUDGET_COLUMNS = ("budget KiB", "most accurate that fits", "update after", "RAM KiB", "tiles", "again, M", "accuracy %")
NOTES = (
    "accuracy: mean ± standard deviation over seeds, on the test set. lr: the learning rate to start from, each "
    "method's best on held-out training images. RAM: the whole arena of a step, with the image in bytes and float32 "
    "for all else; it is the smallest arena that was found. lower bound: the largest sum of bytes alive at one time. "
    "again: multiply-adds in millions that the tiles of this arena compute again, for an image. without tiles: the "
    "smallest arena that computes nothing again. flash: frozen weights and LANCE's directions."
)
PUBLISHED = (
    "Published, and not on these data: Lin et al. (NeurIPS 2022, arXiv 2206.15472) report 86.9 % on CIFAR-10 for the "
    "last two blocks of this network with 8-bit weights and their quantisation-aware scaling, and 86.0 % in float32 "
    "(their Table 1: momentum, 50 epochs on the original images, 128 pixels). They say that updating the last two "
    "blocks takes more than 256 KB beside the forward pass. For their sparse update on Visual Wake Words they measure "
    "206 KB of SRAM at an accuracy of 89.1 %."
)


def cells(row: Row) -> list[str]:
    """One row of the first table."""
    plan = row.plan
    return [
        row.update,
        row.name,
        row.accuracy,
        f"{row.lr:g}",
        _kib(plan["ram_bytes"]),
        _kib(plan["lower_bound_bytes"]),
        f"{plan['recomputed_macs'] / 1e6:,.1f}",
        _kib(row.untiled["ram_bytes"]),
        _kib(plan["flash_bytes"]),
    ]


def _kib(nbytes: int) -> str:
    return f"{nbytes / 1024:,.1f}"


def best_in(rows: Sequence[Row], fits: Mapping[tuple[str, int | None, str], Mapping[str, Any]]) -> Row | None:
    """The row with the highest mean accuracy among those that fit."""
    fitting = [row for row in rows if "ram_bytes" in fits.get(row.key, {})]
    return max(fitting, key=lambda row: fmean(row.accuracies)) if fitting else None


def budget_cells(rows: Sequence[Row], budget: float, fits: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """One row of the table of budgets."""
    best = best_in(rows, fits)
    if best is None:
        return [f"{budget:g}", "none", *("-",) * 5]
    plan = fits[best.key]
    tile = f"{plan['tiles']} of {'x'.join(map(str, plan['tile']))}" if plan["tiles"] else "none"
    again = f"{plan['recomputed_macs'] / 1e6:,.1f}"
    return [f"{budget:g}", best.name, best.update, _kib(plan["ram_bytes"]), tile, again, best.accuracy]


def rate_cells(row: Row) -> list[str]:
    """One row of the table of learning rates."""
    tried = ", ".join(f"{lr:g}: {100 * row.tried[lr]:.1f}" for lr in sorted(row.tried))
    return [row.update, row.name, tried]


RATE_COLUMNS = ("update after", "method", "learning rate: accuracy on held-out training images, %")


Table = tuple[str, tuple[str, ...], list[list[str]]]
"""Title, columns, rows."""


def _tables(rows: Sequence[Row], fits: Fits) -> list[Table]:
    found: list[Table] = [("Accuracy and RAM", COLUMNS, [cells(row) for row in rows])]
    if fits:
        budgets = [budget_cells(rows, budget, of) for budget, of in fits.items()]
        found.append(("LANCE within a budget", BUDGET_COLUMNS, budgets))
    found.append(("Learning rates", RATE_COLUMNS, [rate_cells(row) for row in rows]))
    return found


def show(rows: Sequence[Row], fits: Fits) -> None:
    """Print the tables, and what chance decides."""
    for title, columns, of in _tables(rows, fits):
        print(f"{title}\n")
        print(blocks(columns, of), end="\n\n")
    print(paragraph(NOTES), paragraph(chance(rows)), sep="\n")


def chance(rows: Sequence[Row]) -> str:
    """How many images and seeds there were, and what differences mean nothing."""
    return sentence([row.accuracies for row in rows], min(seed["images"] for row in rows for seed in row.seeds))


def markdown(rows: Sequence[Row], fits: Fits, arguments: Sequence[str]) -> str:
    """The same tables in Markdown, with the command that made them."""
    lines = [f"`python -m experiments.device {' '.join(arguments)}`", ""]
    for title, columns, of in _tables(rows, fits):
        lines += [f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(one) + " |" for one in of]
        lines.append("")
    return "\n".join([*lines, NOTES, "", chance(rows), "", PUBLISHED, ""])


def results(
    rows: Sequence[Row],
    fits: Fits,
    settings: Mapping[str, Any],
    arguments: Sequence[str],
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything, as it goes into the result file."""
    rows_of_file = [
        {
            "method": row.method,
            "directions": row.directions,
            "update": row.update,
            "lr": row.lr,
            **frame.statistics("accuracy", row.accuracies),
            "held_out_accuracy_by_lr": {f"{lr:g}": row.tried[lr] for lr in sorted(row.tried)},
            "plan": dict(row.plan),
            "plan_without_tiles": dict(row.untiled),
            "seeds": [dict(seed) for seed in row.seeds],
        }
        for row in rows
    ]
    budgets = [
        {
            "budget_kib": budget,
            "plans": [
                {"method": method, "directions": directions, "update": update, **plan}
                for (method, directions, update), plan in of.items()
            ],
        }
        for budget, of in fits.items()
    ]
    more = {"budgets": budgets, "published": PUBLISHED, **(origin or {})}
    return frame.document("experiments.device", settings, arguments, rows_of_file, **more)


# ---- the figure ---------------------------------------------------------------------------------

COLOURS = {"head": "0.55", "bias": "#b279a2", "bp": "#4c78a8"}
LANCE_COLOURS = ("#ef8f62", "#c0312e", "#7b1c1c")
"""Colours from few directions to many; the fourth number of directions has the first colour again."""
MARKERS = {"image": "o", "batch": "s"}
LINE_KIB = 256


def draw(rows: Sequence[Row], path: str, title: str, batch: int) -> None:
    """Accuracy against RAM: each method twice, with updates after every image and after a batch.

    A pale line goes from the smallest arena to the smallest one that computes nothing again.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from experiments.finetune.report import kibibyte_axis

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    sizes = {row.key: row.plan["ram_bytes"] / 1024 for row in rows}
    largest = max(row.untiled["ram_bytes"] / 1024 for row in rows)
    numbers = sorted({row.directions for row in rows if row.directions is not None})
    colours: dict[int | None, str] = dict(zip(numbers, itertools.cycle(LANCE_COLOURS), strict=False))
    for row in rows:
        size, y = sizes[row.key], 100 * fmean(row.accuracies)
        error = 100 * stdev(row.accuracies) if len(row.accuracies) > 1 else 0
        colour = COLOURS.get(row.method) or colours[row.directions]
        axes.errorbar(size, y, yerr=error, fmt=MARKERS[row.update], color=colour, ms=6, elinewidth=1, capsize=3)
        axes.plot([size, row.untiled["ram_bytes"] / 1024], [y, y], color=colour, lw=3, alpha=0.22, zorder=0)
    for name in dict.fromkeys(row.name for row in rows):  # to the right of the longer line, where there is room
        last = max((row for row in rows if row.name == name), key=lambda row: sizes[row.key])
        first = min((row for row in rows if row.name == name), key=lambda row: sizes[row.key])
        end = last.untiled["ram_bytes"] / 1024
        on_right = end < largest / 2
        row, x, side = (last, end, 1) if on_right else (first, sizes[first.key], -1)
        axes.annotate(
            name, (x, 100 * fmean(row.accuracies)), (8 * side, 0), textcoords="offset points",
            ha="left" if on_right else "right", va="center", fontsize=9,
            color=COLOURS.get(row.method) or colours[row.directions],
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    kibibyte_axis(axes, [*sizes.values(), largest])
    if min(sizes.values()) < LINE_KIB < largest:
        axes.axvline(LINE_KIB, color="0.3", lw=0.9, ls="--", zorder=0)
        axes.annotate(
            f"{LINE_KIB} KiB", (LINE_KIB, 1), (4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
            va="top", fontsize=8, color="0.3",
        )  # fmt: skip
    axes.set(xlabel="RAM of a whole training step, KiB (log)", ylabel="accuracy on the test set, %", title=title)
    labels = {"image": "update after every image", "batch": f"update after {batch} images"}
    marks = [
        Line2D([], [], ls="", marker=MARKERS[update], color="0.3", label=labels[update])
        for update in dict.fromkeys(row.update for row in rows)
    ]
    marks.append(Line2D([], [], color="0.3", lw=3, alpha=0.22, label="fewer tiles, down to none"))
    axes.legend(handles=marks, frameon=False, fontsize=8.5, loc="lower right")
    save_figure(figure, path)
