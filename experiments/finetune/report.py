"""The fine-tuning experiment's table, figure and result file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from analysis.commands.chance import SHORTEST_TIMED_STEP, sentence, too_short
from analysis.commands.console import blocks, paragraph
from analysis.reports.figures import save_figure
from experiments import frame

KINDS = ("forward", "grad_input", "grad_weight", "projection", "decomposition", "recompute")
KEPT = (*(("cosines", when) for when in ("start", "middle", "end")), ("energy_kept", "start"), ("energy_kept", "end"))
"""What the last columns are of, and at which moment of the training."""


@dataclass(frozen=True)
class Row:
    """One method under one recipe; ``seeds`` is what :func:`experiments.finetune.cell.run` returned for each seed."""

    recipe: str
    method: str
    lr: float
    seeds: tuple[Mapping[str, Any], ...]

    @property
    def accuracies(self) -> list[float]:
        return [float(seed["accuracy"]) for seed in self.seeds]

    def mean(self, name: str) -> float:
        """The mean of a number over the seeds (ranks by energy differ a little with the calibration batches)."""
        return fmean(float(seed[name]) for seed in self.seeds)

    @property
    def agrees(self) -> bool:
        """Whether every predicted number equals the measured one, for every seed."""
        return all(
            seed["tape_bytes"] == seed["predicted_tape_bytes"]
            and all(seed["macs"].get(kind, 0) == seed["predicted_macs"][kind] for kind in KINDS)
            for seed in self.seeds
        )

    def kept(self, what: str, when: str) -> float | None:
        """Mean of ``cosines`` or ``energy_kept`` over layers and seeds; None for methods that have none."""
        values = [value for seed in self.seeds for value in seed[what].get(when, {}).values()]
        return fmean(values) if values else None


COLUMNS = (
    "method", "accuracy %", "lr", "tape KiB", "predicted", "of stores", "paper KiB", "factors KiB", "fwd",
    "d input", "d weight", "proj", "decomp", "again", "time / bp", "cos start", "mid", "end", "energy start", "end",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """One row of the table, in the order of :data:`COLUMNS`."""
    macs = {kind: fmean(seed["macs"].get(kind, 0) for seed in row.seeds) for kind in KINDS}
    core_bytes = fmean(sum(seed["layer_bytes"].values()) for seed in row.seeds)
    return [
        row.method,
        frame.spread([100 * accuracy for accuracy in row.accuracies], 1),
        f"{row.lr:g}",
        f"{row.mean('tape_bytes') / 1024:,.1f}",
        "equal" if row.agrees else "DIFFERS",
        *(f"{n / 1024:,.1f}" for n in (core_bytes, row.mean("paper_bytes"), row.mean("factor_bytes"))),
        *(f"{macs[kind] / 1e6:,.1f}" if macs[kind] else "-" for kind in KINDS),
        "too short" if too_short(row.mean("step_seconds")) else f"{row.mean('time_ratio'):.2f}",
        *("-" if value is None else f"{value:.2f}" for value in (row.kept(*each) for each in KEPT)),
    ]


NOTES = (
    "accuracy: mean ± standard deviation over seeds. tape: all that is kept between forward and backward, "
    "measured; predicted: whether the cost model's bytes and multiply-adds are equal to it. of stores: what the tuned "
    "layers keep of their inputs. paper: what published tables count. Multiply-adds in millions per step, as "
    "executed; again: segments run a second time. time / bp: median step over one of plain backpropagation of the "
    f"same layers, in turns; too short where a step takes less than {SHORTEST_TIMED_STEP:g} s. "
    "cos: of dW and its approximation, mean over layers. energy: share of the activation kept."
)


def show(rows: Sequence[Row], origin: Mapping[str, Any] | None = None) -> None:
    """Print one table for each recipe, what chance decides, and where weights and images came from."""
    for heading, table in tables(rows).items():
        print(f"{heading.removeprefix('### ')}\n")
        print(blocks(COLUMNS, table), end="\n\n")
    print(paragraph(NOTES), paragraph(chance(rows)), sep="\n")
    if origin is not None:
        print(paragraph(frame.origin_sentence(origin)))


def tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """The cells of all rows, by the heading of their recipe."""
    recipes = dict.fromkeys(row.recipe for row in rows)
    return {f"### Recipe: {recipe}": [cells(row) for row in rows if row.recipe == recipe] for recipe in recipes}


def chance(rows: Sequence[Row]) -> str:
    """How many images and seeds there were, and what differences mean nothing."""
    return sentence([row.accuracies for row in rows], min(seed["images"] for row in rows for seed in row.seeds))


def markdown(rows: Sequence[Row], arguments: Sequence[str], origin: Mapping[str, Any] | None = None) -> str:
    """The same tables in Markdown, with the command that made them, and where weights and images came from."""
    notes = [NOTES, chance(rows), *([frame.origin_sentence(origin)] if origin else [])]
    return frame.markdown("experiments.finetune", arguments, COLUMNS, tables(rows), *notes)


def results(
    rows: Sequence[Row], settings: Mapping[str, Any], arguments: Sequence[str], origin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything, as it goes into the result file."""
    shown = [
        {
            "recipe": row.recipe,
            "method": row.method,
            "lr": row.lr,
            **frame.statistics("accuracy", row.accuracies),
            "predicted_equals_measured": row.agrees,
            "seeds": list(row.seeds),
        }
        for row in rows
    ]
    return frame.document("experiments.finetune", settings, arguments, shown, **(origin or {}))


def draw(rows: Sequence[Row], path: str, title: str) -> None:
    """Accuracy against the bytes of the tape, one panel for each recipe, the Pareto front as a line."""
    from matplotlib.figure import Figure

    recipes = list(dict.fromkeys(row.recipe for row in rows))
    figure = Figure(figsize=(7.6 * len(recipes), 5.4), layout="constrained")
    panels = figure.subplots(1, len(recipes), squeeze=False, sharey=True)[0]
    for panel, recipe in zip(panels, recipes, strict=True):
        of = [row for row in rows if row.recipe == recipe]
        points = [(row.mean("tape_bytes") / 1024, 100 * fmean(row.accuracies), row) for row in of]
        for x, y, row in points:
            error = 100 * stdev(row.accuracies) if len(row.accuracies) > 1 else 0
            shape = "s" if row.method.startswith("lance") else "o"
            panel.errorbar(x, y, yerr=error, fmt=shape, color="0.1", ms=4, elinewidth=0.8, capsize=2)
        panel.set(xlabel="tape, KiB (log)", title=f"{title}\nrecipe: {recipe}")
        draw_front(panel, [(x, y) for x, y, _ in points])
        _label(panel, points)
    panels[0].set_ylabel("accuracy on the test set, %")
    save_figure(figure, path)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both fewer bytes and higher accuracy, by bytes.

    >>> pareto([(2, 5), (1, 3), (3, 4), (3, 6)])
    [(1, 3), (2, 5), (3, 6)]
    """
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def draw_front(panel: Any, points: Sequence[tuple[float, float]]) -> None:
    """The Pareto front of (KiB, accuracy) as a line, over a :func:`kibibyte_axis`."""
    panel.plot(*zip(*pareto(points), strict=True), color="0.6", lw=1, zorder=0, drawstyle="steps-post")
    kibibyte_axis(panel, [x for x, _ in points])


def kibibyte_axis(panel: Any, sizes: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 times the powers of ten, and some room on both sides."""
    low, high = min(sizes) / 1.3, max(sizes) * 1.3
    panel.set_xscale("log")
    panel.set_xlim(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [n * 10.0**decade for decade in decades for n in (1, 2, 5) if low <= n * 10.0**decade <= high]
    panel.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    panel.minorticks_off()


def _label(panel: Any, points: Sequence[tuple[float, float, Row]]) -> None:
    """Names in a column to the right, in the order of accuracy, each with a thin line to its point."""
    low, high = panel.get_ylim()
    gap = (high - low) / max(len(points), 28)
    points = sorted(points, key=lambda point: point[1])
    heights: list[float] = []
    for _, y, _ in points:  # upwards, none nearer than the gap to the one below
        heights.append(max(y, heights[-1] + gap) if heights else y)
    ceiling = high
    for i in reversed(range(len(heights))):  # and back down, where that went over the top
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    for (x, y, row), height in zip(points, heights, strict=True):
        panel.annotate(
            row.method,
            (x, y),
            (1.02, (height - low) / (high - low)),
            textcoords="axes fraction",
            fontsize=7.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.85", "lw": 0.6, "shrinkA": 1, "shrinkB": 3},
        )
