"""The table, figure and result file of the experiment of continual learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from analysis.commands.chance import sentence
from analysis.commands.console import blocks, paragraph
from analysis.reports.continual_costs import MAC_KINDS
from analysis.reports.figures import save_figure
from experiments import frame
from lance_ref.continual.metrics import DEFINITIONS

SHORTEST_TIMED_RUN = 10.0
"""Seconds. Shorter runs differ by what else the machine does, more than learners do."""
METRICS = ("acc", "bwt", "fwt", "forgetting", "learning_accuracy")


@dataclass(frozen=True)
class Row:
    """One learner; ``seeds`` is what :func:`experiments.continual.cell.run` returned for each seed."""

    learner: str
    seeds: tuple[Mapping[str, Any], ...]

    def metric(self, name: str) -> list[float]:
        """The metric for each seed, as a share."""
        return [float(seed["metrics"][name]) for seed in self.seeds]

    def largest(self, name: str) -> float:
        """Bytes of the task that takes most, mean over the seeds."""
        return fmean(max(task[name] for task in seed["tasks"]) for seed in self.seeds)

    @property
    def agrees(self) -> bool:
        """Whether every predicted number equals the measured one, for every task and seed."""
        return all(agrees(task) for seed in self.seeds for task in seed["tasks"])

    def macs(self, part: str) -> float:
        """Multiply-adds: of a ``step`` of the last task, ``between`` tasks, or of the ``whole`` run."""
        if part == "step":
            return fmean(sum(seed["tasks"][-1]["step_macs"].values()) for seed in self.seeds)
        between = ("before_macs", "after_macs")
        return fmean(
            sum(
                task["macs"] if part == "whole" else sum(sum(task[name].values()) for name in between)
                for task in seed["tasks"]
            )
            for seed in self.seeds
        )

    @property
    def R(self) -> np.ndarray:  # noqa: N802  (as in the formulas)
        """(T, T), mean over the seeds."""
        return np.mean([seed["accuracy"] for seed in self.seeds], axis=0)


def agrees(task: Mapping[str, Any]) -> bool:
    """Whether bytes (tape, RAM, flash) and multiply-adds, of a step and between tasks, are as predicted."""
    foretold = task["predicted"]
    return all(task[name] == foretold[name] for name in ("tape_bytes", "ram_bytes", "flash_bytes")) and all(
        task[part].get(kind, 0) == foretold[part].get(kind, 0)
        for part in ("step_macs", "before_macs", "after_macs")
        for kind in (*MAC_KINDS, "calibration")
    )


COLUMNS = (
    "learner", "ACC %", "BWT %", "FWT %", "forgetting %", "learning acc. %", "tape KiB", "beside KiB", "RAM KiB",
    "flash KiB", "predicted", "M mult-adds a step", "between tasks", "whole run", "seconds",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """One row of the table, in the order of :data:`COLUMNS`."""
    ram = fmean(max(task["ram_bytes"] + task["tape_bytes"] for task in seed["tasks"]) for seed in row.seeds)
    flash = fmean(seed["tasks"][-1]["flash_bytes"] for seed in row.seeds)
    return [
        row.learner,
        *(frame.spread([100 * value for value in row.metric(name)]) for name in METRICS),
        *(f"{value / 1024:,.1f}" for value in (row.largest("tape_bytes"), row.largest("ram_bytes"), ram, flash)),
        "equal" if row.agrees else "DIFFERS",
        *(f"{row.macs(part) / 1e6:,.{digits}f}" for part, digits in (("step", 3), ("between", 0), ("whole", 0))),
        _seconds(row),
    ]


def _seconds(row: Row) -> str:
    """Seconds of training; those of a short run depend mostly on the load of the machine."""
    seconds = fmean(sum(task["seconds"] for task in seed["tasks"]) for seed in row.seeds)
    return "too short" if seconds < SHORTEST_TIMED_RUN else f"{seconds:,.1f}"


NOTES = (
    "R[t, i]: accuracy on task i after task t, of T tasks. " + ". ".join(DEFINITIONS.values()) + ". "
    "All in percent, mean ± standard deviation over seeds. "
    "tape: kept between forward and backward pass, largest of a step's passes. beside: what training needs in memory "
    "beside network and tape (LANCE's factors, GPM's bases, replayed images). RAM: both. Each of the task that takes "
    "most. flash: kept from task to task beside the network (bases, images), after the last. predicted: whether bytes "
    "and multiply-adds of every task equal the cost model's. Multiply-adds in millions as executed: of a step "
    "of the last task; between tasks: calibration and protected directions, all tasks; whole run: all steps and "
    f"these. seconds: of training; too short where less than {SHORTEST_TIMED_RUN:g}. "
    "head-only: the first task trains all, the others their heads. joint: images of all "
    "tasks so far. er: a small memory of earlier images."
)


def show(rows: Sequence[Row], title: str, images: int) -> None:
    """Print the table, and what chance decides."""
    print(paragraph(title), end="\n\n")
    print(blocks(COLUMNS, [cells(row) for row in rows]), end="\n\n")
    print(paragraph(NOTES), paragraph(chance(rows, images)), sep="\n")


def chance(rows: Sequence[Row], images: int) -> str:
    """How many test images, of all tasks, and seeds there were, and what differences of ACC mean nothing."""
    return sentence([row.metric("acc") for row in rows], images)


def markdown(rows: Sequence[Row], title: str, arguments: Sequence[str], images: int) -> str:
    """The same table in Markdown, with the command that made it."""
    table = {title: map(cells, rows)}
    return frame.markdown("experiments.continual", arguments, COLUMNS, table, NOTES, chance(rows, images))


def results(
    rows: Sequence[Row], settings: Mapping[str, Any], arguments: Sequence[str], origin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything, as it goes into the result file."""
    shown = []
    for row in rows:
        numbers: dict[str, Any] = {"learner": row.learner}
        for name in METRICS:
            numbers |= frame.statistics(name, row.metric(name))
        shown.append({**numbers, "predicted_equals_measured": row.agrees, "seeds": list(row.seeds)})
    more = {"definitions": DEFINITIONS, **(origin or {})}
    return frame.document("experiments.continual", settings, arguments, shown, **more)


def draw(rows: Sequence[Row], path: str, title: str) -> None:
    """The matrix of accuracies of each learner as a map of heat, and the accuracy of the first task over time."""
    from matplotlib.figure import Figure

    across = min(4, len(rows) + 1)
    down = -(-(len(rows) + 1) // across)
    figure = Figure(figsize=(3.4 * across, 3.2 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, row in zip(panels, rows, strict=False):
        _matrix(panel, row)
    line = panels[len(rows)]
    for i, row in enumerate(rows):
        line.plot(np.arange(1, len(row.R) + 1), 100 * row.R[:, 0], marker="os^vDPX"[i % 7], ms=4, label=row.learner)
    line.set(title="first task", xlabel="after task", ylabel="accuracy, %")
    line.set_xticks(np.arange(1, len(rows[0].R) + 1))
    line.legend(fontsize=6)
    for panel in panels[len(rows) + 1 :]:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def _matrix(panel: Any, row: Row) -> None:
    """R[t, i] with tasks across and time downwards; numbers where there is room."""
    R, T = 100 * row.R, len(row.R)
    panel.imshow(R, vmin=0, vmax=100, cmap="cividis")
    panel.set(title=f"{row.learner}, ACC {100 * fmean(row.metric('acc')):.1f} %", xlabel="on task", ylabel="after task")
    panel.set_xticks(range(T), [str(t + 1) for t in range(T)])
    panel.set_yticks(range(T), [str(t + 1) for t in range(T)])
    if T <= 10:
        for t, i in np.ndindex(T, T):
            panel.text(i, t, f"{R[t, i]:.0f}", ha="center", va="center", fontsize=6, color="w" if R[t, i] < 60 else "k")
