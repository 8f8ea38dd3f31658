"""How time and bytes grow with batch, channels, map and rank: ``python -m benchmarks.scaling``.

One 3×3 convolution, by backpropagation and by LANCE. Along each axis the measured exponent, the slope of a straight
line through the logarithms, stands beside the predicted one: the same line through the multiply-adds, or the bytes,
that the cost model gives for the same points. Ranks stay as they are while another size varies.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from analysis.commands.cli import figure_file
from analysis.commands.command_line import run_main
from analysis.reports.figures import save_figure
from analysis.reports.plots import check_path
from analysis.rules.account import account
from benchmarks.layers import parts, steps
from benchmarks.side_by_side import Table, number, parser, run, timed
from lance_ref import F, Subspace, Tensor, record, tape
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.nn.module import Parameter
from lance_ref.stores import EXACT, ActivationStore, Lance

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Sizes:
    """One point: a 3×3 convolution of as many channels out as in, on a square map.

    Attributes
    ----------
    rank : int
        Of images and channels; rows and columns have rank 2.
    """

    batch: int = 64
    channels: int = 64
    map: int = 14
    rank: int = 16

    @property
    def geometry(self) -> ConvGeometry:
        shape = (self.batch, self.channels, self.map, self.map)
        return ConvGeometry(shape, (self.channels, self.channels, 3, 3), padding=((1, 1), (1, 1)))

    @property
    def subspace(self) -> Subspace:
        ranks = (self.rank, self.rank, 2, 2)
        return Subspace.random(self.geometry.input_shape, ranks, np.random.default_rng(0))


BASE, QUICK_BASE = Sizes(), Sizes(4, 4, 4, 2)
AXES = {
    "batch": (16, 32, 64, 128, 256),
    "channels": (32, 64, 128, 256),
    "map": (7, 10, 14, 20, 28),
    "rank": (4, 8, 16, 32, 64),
}
QUICK_AXES = {"batch": (2, 4, 8), "channels": (4, 6, 8), "map": (4, 6, 8), "rank": (1, 2, 4)}
SERIES = {
    "time of a step": ("bp", "lance"),
    "time of the weight gradient": ("exact", "projection + core"),
    "bytes": ("bp tape", "lance tape", "lance tape + factors"),
}
UNITS = {"time of a step": (1e3, "ms"), "time of the weight gradient": (1e3, "ms"), "bytes": (1 / 1024, "KiB")}


# ---- one point ---------------------------------------------------------------------------


def cost(sizes: Sizes, store: ActivationStore) -> tuple[dict[str, int], int, int]:
    """What the cost model says of a step: multiply-adds by kind, bytes of tape, and of factors. Nothing runs."""
    g = sizes.geometry
    x, weight = Tensor.meta(g.input_shape, np.float32, True), Parameter.meta_parameter(g.weight_shape)
    with record() as records:
        F.conv2d(x, weight, padding=1, store=store).sum()
    layer = account(records, head=None)[0]
    kinds = ("forward", "grad_input", "grad_weight", "projection")
    return {kind: getattr(layer.cost, f"{kind}_macs") for kind in kinds}, layer.tape_bytes, layer.subspace_bytes


def predicted(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Multiply-adds in place of seconds, and bytes, of every series."""
    (exact, tape_bytes, _), (lance, core_bytes, factor_bytes) = cost(sizes, EXACT), cost(sizes, Lance(sizes.subspace))
    return {
        "time of a step": {"bp": sum(exact.values()), "lance": sum(lance.values())},
        "time of the weight gradient": {
            "exact": exact["grad_weight"],
            "projection + core": lance["projection"] + lance["grad_weight"],
        },
        "bytes": {"bp tape": tape_bytes, "lance tape": core_bytes, "lance tape + factors": core_bytes + factor_bytes},
    }


def measured(sizes: Sizes, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of seconds, and bytes that a real step keeps, of every series."""
    g, subspace = sizes.geometry, sizes.subspace
    times = {name: timing.median for name, timing in timed(steps(g, subspace, ("bp", "lance")), repeats).items()}
    of = {name: timing.median for name, timing in timed(parts(g, subspace), repeats).items()}
    store = Lance(subspace)
    kept, core = (tape_bytes(g, each) for each in (EXACT, store))
    return {
        "time of a step": times,
        "time of the weight gradient": {
            "exact": of["exact grad_weight"],
            "projection + core": of["projection"] + of["grad_weight from the core"],
        },
        "bytes": {"bp tape": kept, "lance tape": core, "lance tape + factors": core + store.factor_bytes},
    }


def tape_bytes(geometry: ConvGeometry, store: ActivationStore) -> int:
    """Bytes on the tape after a real forward pass of the layer."""
    x = Tensor(np.ones(geometry.input_shape, np.float32), requires_grad=True)
    weight = Parameter(np.ones(geometry.weight_shape, np.float32))
    return tape(F.conv2d(x, weight, padding=1, store=store)).total_bytes


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of log y over log x, by least squares.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def shown(slope: float) -> str:
    """Two digits, and no minus before zero."""
    return f"{round(slope, 2) + 0.0:.2f}"


# ---- all points --------------------------------------------------------------------------


def measure_axis(axis: str, values: Sequence[int], base: Sizes, repeats: int) -> dict[str, Any]:
    """Every series along one axis, as it is written."""
    points = [replace(base, **{axis: value}) for value in values]
    found, expected = [measured(point, repeats) for point in points], [predicted(point) for point in points]
    series = {}
    for what, names in SERIES.items():
        for name in names:
            ys, zs = ([each[what][name] for each in both] for both in (found, expected))
            series[f"{what}, {name}"] = {
                "measured": ys,
                "predicted": zs,
                "measured_exponent": exponent(values, ys),
                "predicted_exponent": exponent(values, zs),
            }
    return {"axis": axis, "values": list(values), "base": asdict(base), "series": series}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    base, axes = (QUICK_BASE, QUICK_AXES) if options.quick else (BASE, AXES)
    check_path(options.figure)
    print(f"exponents; elsewhere {', '.join(f'{name} {size}' for name, size in asdict(base).items())}")
    table = Table("series", "over", "measured", "predicted", "from", "to", first=46)
    rows = []
    for axis, values in axes.items():
        row = measure_axis(axis, values, base, options.repeats)
        rows.append(row)
        for name, of in row["series"].items():
            scale, unit = UNITS[name.partition(", ")[0]]
            ends = (f"{number(scale * of['measured'][i])} {unit}" for i in (0, -1))
            table.row(name, axis, shown(of["measured_exponent"]), shown(of["predicted_exponent"]), *ends)
    if options.figure:
        save_figure(draw(rows), options.figure)
    return {"rows": rows}


# ---- the figure --------------------------------------------------------------------------

STYLES: tuple[dict[str, Any], ...] = (
    {"color": "0.55", "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    {"color": "#123c69", "marker": "o"},
    {"color": "0.25", "marker": "v", "linestyle": ":", "markerfacecolor": "white"},
)
"""In the order of the names of :data:`SERIES`."""


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A column for each axis, a row for each quantity; exponents in the legends, the predicted ones in brackets."""
    figure = Figure(figsize=(3.2 * len(rows), 2.9 * len(SERIES)), layout="constrained")
    panels = figure.subplots(len(SERIES), len(rows), squeeze=False)
    for column, row in enumerate(rows):
        for line, what in enumerate(SERIES):
            _draw_panel(panels[line][column], row, what)
        panels[-1][column].set_xlabel(row["axis"])
    for line, what in enumerate(SERIES):
        panels[line][0].set_ylabel(f"{what}, {UNITS[what][1]}")
    elsewhere = ", ".join(f"{name} {size}" for name, size in rows[0]["base"].items())
    figure.suptitle(f"A 3x3 convolution; {elsewhere} where not varied; exponents measured (and predicted)", fontsize=11)
    return figure


def _draw_panel(panel: Axes, row: Mapping[str, Any], what: str) -> None:
    values, lowest, highest = row["values"], math.inf, 0.0
    for name, style in zip(SERIES[what], STYLES, strict=False):
        of = row["series"][f"{what}, {name}"]
        ys = [UNITS[what][0] * y for y in of["measured"]]
        label = f"{name} {shown(of['measured_exponent'])} ({shown(of['predicted_exponent'])})"
        panel.plot(values, ys, label=label, linewidth=1.3, markersize=5, **style)
        lowest, highest = min(lowest, *ys), max(highest, *ys)
    panel.set(xscale="log", yscale="log", ylim=(lowest / 1.5, highest * (highest / lowest) ** 0.45 * 1.5))
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8, loc="upper left")


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("benchmarks.scaling", __doc__, repeats=3)
    p.add_argument("--figure", type=figure_file, help="also draw them into this .png or .svg")
    return run(p, arguments, measure)


if __name__ == "__main__":
    sys.exit(run_main(main))
