"""A program as a table, and its arena as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lance_ref.device.budget import shown_bytes
from lance_ref.io.whole_file import whole_file

if TYPE_CHECKING:
    from lance_ref.device.layout import DeviceLayout

COLOURS = {
    "image": "#4c78a8", "maps": "#72b7b2", "tiles": "#9ecae9", "channels": "#bab0ac", "masks": "#eeca3b",
    "cores": "#e45756", "trained weights": "#54a24b", "gradients": "#b6e3a8", "optimiser": "#88d27a", "head": "#b279a2",
}  # fmt: skip

WIDTH = 58
"""The width of the first column: with the bytes and a mark behind it a line has at most 80 characters."""


def text(layout: DeviceLayout, flash_bytes: int) -> str:
    """The instructions with the bytes that are alive, and the totals."""
    tiled = layout.choice.tiled
    peak = layout.live.index(layout.lower_bound_bytes)
    lines = [f"{'instruction':<{WIDTH}}{'alive':>12}"]
    for time, (title, live) in enumerate(zip(layout.times, layout.live, strict=True)):
        if time == 0 and tiled:
            h, w = layout.choice.tile
            lines.append(f"{len(layout.tiles)} times, for tiles of {h}x{w} places:")
        name = f"{'  ' if time < tiled else ''}{title}"
        name = name if len(name) <= WIDTH - 2 else f"{name[: WIDTH // 2 - 2]}…{name[3 - WIDTH // 2 :]}"
        lines.append(f"{name:<{WIDTH}}{shown_bytes(live):>12}{'  <- peak' if time == peak else ''}")
    lines += ["", f"{'at the peak':<{WIDTH}}{'bytes':>12}"]
    lines += [f"{kind:<{WIDTH}}{nbytes:>12,}" for kind, nbytes in sorted(layout.ram.items(), key=lambda kv: -kv[1])]
    totals = {
        "largest sum of live bytes (lower bound)": layout.lower_bound_bytes,
        "RAM: the whole arena": layout.ram_bytes,
        "flash: frozen weights and factors": flash_bytes,
    }
    lines += [f"{what:<{WIDTH - 12}}{shown_bytes(nbytes):>12}{nbytes:>12,}" for what, nbytes in totals.items()]
    lines.append(f"{'multiply-adds that tiles compute again, per image':<{WIDTH}}{layout.recomputed_macs:>12,}")
    return "\n".join(lines)


def plot(layout: DeviceLayout, path: str | os.PathLike[str]) -> None:
    """Draw addresses against time, a rectangle for each array, into an image file, whole or not at all."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for array in sorted(layout.arrays, key=lambda a: a.nbytes, reverse=True):
        corner = (array.first, array.offset / 1024)
        width, height = array.last - array.first + 1, array.nbytes / 1024
        box = Rectangle(corner, width, height, facecolor=COLOURS[array.kind], edgecolor="white", linewidth=0.4)
        axes.add_patch(box)
        if height > layout.ram_bytes / 1024 * 0.03 and width > len(layout.times) * 0.12:
            middle = (corner[0] + width / 2, corner[1] + height / 2)
            axes.text(*middle, array.name, ha="center", va="center", fontsize=6.5, clip_on=True)
    peak = layout.live.index(layout.lower_bound_bytes)
    axes.axvline(peak + 0.5, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"peak: {shown_bytes(layout.lower_bound_bytes)}", (peak + 0.5, layout.ram_bytes / 1024),
        xytext=(4, 3), textcoords="offset points", fontsize=8, annotation_clip=False,
    )  # fmt: skip
    axes.set_xlim(0, len(layout.times))
    axes.set_ylim(0, layout.ram_bytes / 1024 * 1.06)
    tiled, loss = layout.choice.tiled, layout.times.index("loss")
    phases = {"tiles": tiled / 2, "forward": (tiled + loss) / 2, "backward": (loss + len(layout.times)) / 2}
    for label, at in phases.items():
        if label != "tiles" or tiled:
            axes.text(at, -0.075, label, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
    for at in (tiled, loss):
        axes.axvline(at, color="black", linewidth=0.5, alpha=0.4)
    axes.set_ylabel("address in the arena (KiB)")
    axes.set_xlabel("instruction", labelpad=14)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    kinds = [kind for kind in COLOURS if any(array.kind == kind for array in layout.arrays)]
    axes.legend(handles=[Patch(color=COLOURS[k], label=k) for k in kinds], loc="upper right", fontsize=7)
    with whole_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=150)
