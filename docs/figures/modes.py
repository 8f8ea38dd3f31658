"""Draw the modes of an activation, its core and its factors: ``python docs/figures/modes.py``

Writes ``docs/figures/modes.svg``, which the page "What LANCE is" shows.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

FULL, SMALL, FACTOR = "#c9d8ea", "#f3b562", "#dfe8d5"
"""Colours of the activation, of the core and of the factors."""
SLANT = 0.42
"""How far one channel moves a box to the right and upwards."""


def box(ax: Axes, x: float, y: float, width: float, height: float, depth: float, colour: str) -> None:
    """A block of channels (to the back), rows and columns, its front corner at (x, y)."""
    d = depth * SLANT
    front = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    top = [(x, y + height), (x + width, y + height), (x + width + d, y + height + d), (x + d, y + height + d)]
    side = [(x + width, y), (x + width + d, y + d), (x + width + d, y + height + d), (x + width, y + height)]
    for corners, shade in ((front, 1.0), (top, 0.8), (side, 0.6)):
        ax.add_patch(Polygon(corners, facecolor=colour, edgecolor="black", lw=0.8, alpha=1, zorder=2))
        ax.add_patch(Polygon(corners, facecolor="black", alpha=(1 - shade) * 0.35, zorder=2))


def stack(ax: Axes, x: float, y: float, size: tuple[float, float, float], images: int, colour: str) -> float:
    """Blocks side by side, one for each image of the batch (the first mode); the place where the last one ends."""
    width, height, depth = size
    step = width + depth * SLANT + 0.18
    for i in range(images):
        box(ax, x + i * step, y, width, height, depth, colour)
    return x + images * step - 0.18


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], text: str, at: tuple[float, float]) -> None:
    """A mode: a double arrow along an edge, and its name."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "<->", "lw": 0.9, "shrinkA": 0, "shrinkB": 0})
    ax.text(*at, text, ha="center", va="center", fontsize=10)


def factor(ax: Axes, x: float, y: float, rows: float, columns: float, name: str, sizes: str) -> None:
    """A tall matrix with few columns, named below."""
    ax.add_patch(Rectangle((x, y), columns, rows, facecolor=FACTOR, edgecolor="black", lw=0.8))
    for i in range(1, round(columns / 0.16)):
        ax.plot([x + i * 0.16] * 2, [y, y + rows], color="black", lw=0.4)
    ax.text(x + columns / 2, y - 0.28, name, ha="center", va="center", fontsize=12)
    ax.text(x + columns / 2, y - 0.62, sizes, ha="center", va="center", fontsize=10)


def main() -> None:
    """Draw the figure and write it beside this file."""
    plt.rcParams.update({"svg.hashsalt": "modes", "svg.fonttype": "path", "font.size": 10, "mathtext.fontset": "cm"})
    figure, ax = plt.subplots(figsize=(7.6, 4.5), layout="constrained")
    ax.set(xlim=(-0.95, 9.95), ylim=(-3.35, 2.95), aspect="equal")
    ax.axis("off")

    end = stack(ax, 0, 0, (1.1, 1.3, 1.6), 3, FULL)
    ax.text(end / 2, 2.5, r"activation  $A \in \mathbb{R}^{B \times C \times H \times W}$", ha="center", fontsize=12)
    arrow(ax, (-0.18, 0), (-0.18, 1.3), "height\nmode 3", (-0.72, 0.65))
    arrow(ax, (0, -0.16), (1.1, -0.16), "width, mode 4", (0.8, -0.4))
    arrow(ax, (-0.02, 1.42), (0.65, 2.09), "channel\nmode 2", (-0.2, 2.1))
    arrow(ax, (0, -0.78), (end, -0.78), "batch, mode 1: one block for each image", (end / 2, -1.04))

    ax.annotate("", (7.15, 0.9), (5.95, 0.9), arrowprops={"arrowstyle": "-|>", "lw": 1.4, "color": "black"})
    ax.text(6.5, 1.05, "project on\nthe factors", ha="center", va="bottom")

    small_end = stack(ax, 7.55, 0.7, (0.42, 0.5, 0.6), 2, SMALL)
    middle = (7.55 + small_end) / 2 + 0.1
    ax.text(middle, 1.85, r"core  $S \in \mathbb{R}^{r_1 \times r_2 \times r_3 \times r_4}$", ha="center", fontsize=12)
    ax.text(middle, 0.45, "kept for the\nbackward pass", ha="center", va="top")
    ax.text(middle, -0.6, r"$S = A \times_1 U_1^\top \times_2 U_2^\top$", ha="center", fontsize=12)
    ax.text(middle, -1.06, r"$\times_3\, U_3^\top \times_4 U_4^\top$", ha="center", fontsize=12)

    ax.text(-0.9, -2.05, "factors, found once\nbefore training;\nthe same in every step", va="center")
    sizes = (("U_1", "B", 1.2, 2), ("U_2", "C", 1.0, 3), ("U_3", "H", 0.8, 2), ("U_4", "W", 0.7, 2))
    names = ("batch", "channel", "height", "width")
    for i, ((symbol, n, rows, columns), name) in enumerate(zip(sizes, names, strict=True)):
        place = 2.9 + 1.95 * i
        factor(ax, place, -2.6, rows, columns * 0.16, f"${symbol}$", f"{name}: ${n} \\times r_{i + 1}$")
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
