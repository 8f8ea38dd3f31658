"""A plan as a figure: RAM by kind against the budget, and what is known of accuracy against RAM.

Kinds and engines differ in lightness, hatching or marker, never in hue alone: the figure is to be read in grayscale.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from analysis.planner.answer import images
from analysis.planner.options import UNITS
from analysis.planner.search import Candidate, Plan
from analysis.reports.figures import save_figure
from analysis.reports.plots import STYLE, CostFigure, check_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 12
"""The first rows of the plan, one for each method and engine."""
PARTS: dict[str, dict[str, Any]] = {
    "maps, tape and workspaces": {"color": "#d9d9d9"},
    "gradients": {"color": "#8fb8d8"},
    "optimiser": {"color": "#123c69"},
    "factors": {"color": "#f6b26b", "hatch": "xxxx", "edgecolor": "0.4"},
    "weights that train": {"color": "#8a8a8a", "hatch": "////", "edgecolor": "0.9"},
    "calibration, beyond the step": {"color": "#ffffff", "hatch": "....", "edgecolor": "0.5"},
}
MARKERS = {"library": "o", "device": "s"}


def draw(plan: Plan, path: str | os.PathLike[str]) -> Figure:
    """Draw the best candidate of each method into a .png or .svg file, whole or not at all.

    Raises
    ------
    ValueError
        If the name has another ending, or there is no candidate to draw.
    OSError
        If the file cannot be written.
    """
    check_path(path)
    shown = _shown(plan)
    if not shown:
        raise ValueError("there is no candidate to draw")
    with rc_context(STYLE):
        figure = CostFigure(figsize=(9.0, 2.2 + 0.42 * len(shown) + 2.9), layout="constrained")
        figure.suptitle(plan.facts.get("net", ""), fontsize=9.5, x=0.01, ha="left")
        # Each panel has the whole width, however long the names of the other's bars are.
        panels: Any = figure.subfigures(2, 1, height_ratios=[1.4 + 0.42 * len(shown), 3.0])
        _bars(panels[0].add_subplot(), plan, shown)
        _points(panels[1].add_subplot(), plan, shown)
        save_figure(figure, path)
    return figure


def _shown(plan: Plan) -> list[Candidate]:
    """The first candidate of each row that the tables show, whether it fits or not, in the order of the plan."""
    candidates = (row.best or row.next for row in plan.shown)
    return [candidate for candidate in candidates if candidate is not None][:MOST_BARS]


def _name(candidate: Candidate) -> str:
    """Method and engine, and below them the setting, layers and images."""
    option, n = candidate.option, candidate.layers
    layers = f"{n} layer{'' if n == 1 else 's'}" if n else ""
    elsewhere = "calibrated elsewhere" if option.elsewhere else ""
    below = ", ".join(filter(None, (option.setting, layers, f"batch {images(candidate)}", elsewhere)))
    return f"{option.method} ({option.engine})\n{below}"


def _bars(axes: Axes, plan: Plan, shown: list[Candidate]) -> None:
    scale = UNITS[plan.unit]
    places = range(len(shown))
    left = [0.0] * len(shown)
    for name, style in PARTS.items():
        values = [_parts(candidate)[name] / scale for candidate in shown]
        if any(values):
            axes.barh(places, values, left=left, label=name, height=0.62, linewidth=0, **style)
            left = [start + value for start, value in zip(left, values, strict=True)]
    axes.axvline(plan.budget / scale, color="0.1", linestyle="--", linewidth=1.2)
    axes.text(
        plan.budget / scale,
        -0.75,
        f" budget: {plan.budget / scale:g} {plan.unit}",
        fontsize=8.5,
        va="center",
        ha="left",
    )
    axes.set_yticks(places, [_name(candidate) for candidate in shown], fontsize=7.5)
    axes.set_ylim(len(shown) - 0.5, -1.1)
    axes.set_xlim(0, 1.28 * max(*left, plan.budget / scale) if max(left) < 4 * plan.budget / scale else None)
    axes.set_xlabel(f"RAM, {plan.unit}")
    axes.set_title("RAM by kind")
    axes.legend(loc="lower center", bbox_to_anchor=(0.35, 1.05), ncols=3)


def _parts(candidate: Candidate) -> dict[str, int]:
    m = candidate.memory
    rest = m.step - m.gradients - m.optimizer_state
    values = (rest, m.gradients, m.optimizer_state, m.factors, m.weights, max(0, m.calibration - m.training))
    return dict(zip(PARTS, values, strict=True))


def _points(axes: Axes, plan: Plan, shown: list[Candidate]) -> None:
    """Measured accuracy where there is any, else predicted fidelity, of the bars that fit."""
    fitting = [candidate for candidate in shown if candidate.fits]
    measured = [c for c in fitting if c.measured is not None]
    chosen = measured or [c for c in fitting if c.fidelity is not None]
    scale = UNITS[plan.unit]
    for engine, marker in MARKERS.items():
        own = [c for c in chosen if c.option.engine == engine]
        values = [100 * c.measured.accuracy if c.measured else c.fidelity.estimate if c.fidelity else 0.0 for c in own]
        if own:
            face = "#123c69" if engine == "library" else "white"
            axes.scatter(
                [c.memory.total / scale for c in own], values, marker=marker, s=34, color=face, edgecolor="#123c69",
                label=engine, zorder=3,
            )  # fmt: skip
        for candidate, value in zip(own, values, strict=True):
            at = candidate.memory.total / scale
            above = sum(abs(other - value) < 0.004 * value for other in values[: own.index(candidate)])
            right = at > plan.budget / scale / 2  # room for the name is on the other side
            axes.annotate(
                candidate.option.name, (at, value), (-6 if right else 6, 8 * above - 2), textcoords="offset points",
                fontsize=7, color="0.25", ha="right" if right else "left",
            )  # fmt: skip
    axes.axvline(plan.budget / scale, color="0.1", linestyle="--", linewidth=1.2)
    axes.set_xlim(0, 1.05 * plan.budget / scale)
    axes.set_xlabel(f"RAM, {plan.unit}")
    if measured:
        axes.set_ylabel("accuracy, %")
        axes.set_title("Accuracy on CIFAR-10 where it was measured")
    elif chosen:
        axes.set_ylabel("predicted fidelity")
        axes.set_title("Predicted gradient fidelity against RAM")
    else:
        axes.set_title("Nothing that fits has a measured accuracy or a predicted fidelity")
    if chosen:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="engine")
