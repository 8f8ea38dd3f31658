"""Draw the arc of the lessons: ``python docs/figures/course.py``

Writes ``docs/figures/course.svg``, which the page of the lessons shows.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt

LESSONS = {  # column, row, two lines of text, and the number of its colour
    1: (0, 1, "Autograd\nwhat to keep", 0),
    2: (1, 1, "Bytes\nwhich must be", 0),
    3: (2, 1, "Tensors\nhow little", 1),
    4: (3, 1, "LANCE\nits gradient", 1),
    5: (4, 2, "Descent\ndownhill?", 1),
    6: (4, 1, "Budget\nwhich method?", 2),
    7: (4, 0, "Forgetting\ntask after task", 2),
    8: (5, 1, "Bytes,\npredicted", 3),
    9: (5, 0, "Work,\npredicted", 3),
    10: (6, 1, "A step\non a device", 3),
    11: (7, 1, "Project\n256 KiB", 4),
}
ARROWS = ((1, 2), (2, 3), (3, 4), (4, 5), (4, 6), (4, 7), (6, 8), (8, 9), (8, 10), (10, 11))
COLOURS = ("#c9d8ea", "#f3b562", "#dfe8d5", "#e7d4e8", "#f4c7b8")
RUNNING = {
    1: "221,760 bytes\non the tape",
    2: "of which inputs\n180,224",
    4: "two convolutions\ntrain: 180,800\nbecomes 84,616",
    10: "all memory of\na step: 48,856",
}
"""The running example: bytes of one step of the network that reads digits, in float32."""


ABOUT = "the running example: bytes of one step of 64 images\n(on the device: of any number of images)"


def main() -> None:
    """Draw the figure and write it beside this file."""
    plt.rcParams.update({"svg.hashsalt": "course", "svg.fonttype": "path"})
    figure, axis = plt.subplots(figsize=(9.6, 4))
    wide, high = 0.86, 0.56
    for start, end in ARROWS:
        (x0, y0), (x1, y1) = ((LESSONS[n][0], LESSONS[n][1]) for n in (start, end))
        same = x0 == x1
        tail = (x0, y0 - high / 2) if same else (x0 + wide / 2, y0)
        head = (x1, y1 + high / 2) if same else (x1 - wide / 2, y1)
        axis.annotate("", head, tail, arrowprops={"arrowstyle": "->", "color": "0.35", "shrinkA": 2, "shrinkB": 2})
    for number, (x, y, text, colour) in LESSONS.items():
        box = {"facecolor": COLOURS[colour], "edgecolor": "0.3", "linewidth": 0.8}
        axis.add_patch(plt.Rectangle((x - wide / 2, y - high / 2), wide, high, **box))
        axis.text(x, y + 0.16, f"{number}", ha="center", va="center", fontsize=11, weight="bold")
        axis.text(x, y - 0.09, text, ha="center", va="center", fontsize=7.6)
    for number, text in RUNNING.items():
        axis.text(LESSONS[number][0], -0.55, text, ha="center", va="top", fontsize=8, color="#a33b12")
    axis.plot([-0.4, 6.4], [-0.47, -0.47], color="#a33b12", lw=0.8)
    axis.text(-0.4, -0.42, ABOUT, fontsize=8, color="#a33b12", va="bottom")
    axis.set(xlim=(-0.5, 7.5), ylim=(-1.05, 2.4), aspect="auto")
    axis.axis("off")
    figure.savefig(Path(__file__).with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
