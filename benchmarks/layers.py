"""One training step of single layers, timed side by side: ``python -m benchmarks.layers``.

For each layer the forward pass and both gradients: our backpropagation, LANCE, HOSVD at every step, ASI, and PyTorch's
plain convolution or linear layer where it is installed. Then, apart, what LANCE does in place of the weight gradient,
its projection and the weight gradient from the core, over our own exact weight gradient ("parts"). Ranks are those of
an energy threshold of 0.7; ``--ranks larger`` shows what a subspace that keeps more would take. The second table has
GFLOP/s, and the share of the roofline: the least time that the machine needs over the time taken
(:mod:`benchmarks.roofline`).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.commands.cli import count
from analysis.commands.command_line import run_main
from benchmarks import roofline
from benchmarks.roofline import Product, Roofline
from benchmarks.side_by_side import Side, Table, Target, Timing, number, parser, peer, run, span, timed
from lance_ref import F, Subspace, Tensor, count_macs
from lance_ref.algebra.geometry import ConvGeometry, Geometry, LinearGeometry
from lance_ref.stores import EXACT, ActivationStore, Asi, Hosvd, Lance

Row = dict[str, Any]
BATCH = 128
SIDES = ("bp", "lance", "hosvd", "asi", "pytorch")
LIMIT, LIMIT_OF_MEAN = 1.2, 0.75
"""The most that a LANCE step may take of PyTorch's time: of any layer, and in the geometric mean of all."""
SMALL_MAP = 7
"""Up to this size the projection and LANCE's weight gradient are to be small beside the exact weight gradient."""


@dataclass(frozen=True)
class Layer:
    """One layer and the ranks of its input.

    Attributes
    ----------
    input_shape : tuple of int
        Without the batch: (C_in, H, W), or (tokens, features).
    weight_shape : tuple of int
    ranks, larger : tuple of int
        At batch :data:`BATCH`; that of the batch mode shrinks and grows with the batch. ``larger`` is a second choice.
    stride, padding, groups : int
        Of a convolution.
    """

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    ranks: tuple[int, ...]
    larger: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @property
    def small_map(self) -> bool:
        """Whether it is a convolution on a map of at most :data:`SMALL_MAP`."""
        return len(self.input_shape) == 3 and self.input_shape[1] <= SMALL_MAP

    def geometry(self, batch: int) -> Geometry:
        shape = (batch, *self.input_shape)
        if len(self.weight_shape) == 2:
            return LinearGeometry(shape, self.weight_shape)
        around = (self.padding, self.padding)
        return ConvGeometry(shape, self.weight_shape, (self.stride,) * 2, (around, around), groups=self.groups)

    def subspace(self, batch: int, choice: str = "measured") -> Subspace:
        """Random directions, of which the time does not depend; ``choice`` is one of :data:`RANKS`."""
        first, *others = self.ranks if choice == "measured" else self.larger
        ranks = (-(-first * batch // BATCH), *others)
        return Subspace.random((batch, *self.input_shape), ranks, np.random.default_rng(0))


LAYERS = {
    "1x1 160-960 at 7": Layer((160, 7, 7), (960, 160, 1, 1), (70, 44, 3, 3), (64, 80, 2, 2)),
    "1x1 960-320 at 7": Layer((960, 7, 7), (320, 960, 1, 1), (5, 9, 1, 1), (64, 160, 2, 2)),
    "1x1 320-1280 at 7": Layer((320, 7, 7), (1280, 320, 1, 1), (57, 41, 1, 1), (64, 128, 2, 2)),
    "depthwise 3x3 960 at 7": Layer((960, 7, 7), (960, 1, 3, 3), (6, 3, 1, 1), (64, 160, 2, 2), padding=1, groups=960),
    "3x3 512-512 at 7": Layer((512, 7, 7), (512, 512, 3, 3), (64, 128, 2, 2), (96, 256, 4, 4), padding=1),
    "3x3/2 256-512 at 14": Layer((256, 14, 14), (512, 256, 3, 3), (64, 64, 4, 4), (96, 128, 7, 7), 2, 1),
    "4x4 64-128 at 14": Layer((64, 14, 14), (128, 64, 4, 4), (64, 16, 4, 4), (96, 32, 7, 7)),
    "depthwise 7x7 576 at 4": Layer((576, 4, 4), (576, 1, 7, 7), (2, 2, 1, 1), (64, 96, 2, 2), padding=3, groups=576),
    "linear 768-192, 197 tokens": Layer((197, 768), (192, 768), (64, 49, 128), (96, 99, 256)),
}
"""Those of MobileNetV2 and MCUNet have the largest ranks of such layers in the spectra that come with the package, at
an energy threshold of 0.7 (:data:`MEASURED`); the others, with no spectra, half of the images, an eighth to a quarter
of the channels, 2 rows of 7 and 4 of 14."""

MEASURED = {
    "1x1 160-960 at 7": ("mobilenetv2_224", [f"features.{i}.conv.0.0" for i in (15, 16, 17)]),
    "1x1 960-320 at 7": ("mobilenetv2_224", [f"features.{i}.conv.2" for i in (15, 16, 17)]),
    "1x1 320-1280 at 7": ("mobilenetv2_224", ["features.18.0"]),
    "depthwise 3x3 960 at 7": ("mobilenetv2_224", [f"features.{i}.conv.1.0" for i in (15, 16, 17)]),
    "depthwise 7x7 576 at 4": ("mcunet_128", ["blocks.13.depthwise"]),
}
"""By layer: the file of spectra, and the layers in it, of whose ranks the largest, mode by mode, are taken."""

RANKS = ("measured", "larger")


# ---- the sides ---------------------------------------------------------------------------


def our_step(geometry: Geometry, store: ActivationStore) -> Side:
    """Forward and backward of one layer through the tape; gives the gradients of input and weight."""
    x, weight, grad_output = (Tensor(array, requires_grad=True) for array in arrays(geometry))

    def step() -> tuple[Any, Any]:
        x.grad = weight.grad = None
        if isinstance(geometry, LinearGeometry):
            out = F.linear(x, weight, store=store)
        else:
            assert isinstance(geometry, ConvGeometry)
            stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
            out = F.conv2d(x, weight, None, stride, padding, dilation, geometry.groups, store=store)
        out.backward(grad_output.data)
        return x.grad, weight.grad

    return step


def pytorch_step(geometry: Geometry, torch: Any) -> Side:
    """The same in PyTorch."""
    x, weight, grad_output = (torch.from_numpy(array) for array in arrays(geometry))
    x.requires_grad_()
    weight.requires_grad_()
    functional = torch.nn.functional

    def step() -> tuple[Any, Any]:
        x.grad = weight.grad = None
        if isinstance(geometry, LinearGeometry):
            out = functional.linear(x, weight)
        else:
            assert isinstance(geometry, ConvGeometry)
            (pad, _), _ = geometry.padding
            out = functional.conv2d(x, weight, None, geometry.stride, pad, geometry.dilation, geometry.groups)
        out.backward(grad_output)
        return x.grad, weight.grad

    return step


def arrays(geometry: Geometry) -> list[np.ndarray]:
    """Random input, weight and gradient of the output."""
    rng = np.random.default_rng(0)
    shapes = (geometry.input_shape, geometry.weight_shape, geometry.output_shape)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def steps(geometry: Geometry, subspace: Subspace, wanted: Sequence[str]) -> dict[str, Side]:
    """The sides that are wanted, PyTorch's only where it is installed."""
    stores = {"bp": EXACT, "lance": Lance(subspace), "hosvd": Hosvd(ranks=subspace.ranks), "asi": Asi(subspace.ranks)}
    sides = {name: our_step(geometry, store) for name, store in stores.items() if name in wanted}
    if "pytorch" in wanted and peer("torch") is not None:
        sides["pytorch"] = pytorch_step(geometry, peer("torch"))
    return sides


def parts(geometry: Geometry, subspace: Subspace) -> dict[str, Side]:
    """LANCE's projection, its weight gradient, and the exact one, each alone."""
    store = Lance(subspace)
    x, _, grad_output = arrays(geometry)
    saved = store.save_for(x, geometry)
    return {
        "projection": lambda: store.save_for(x, geometry),
        "grad_weight from the core": lambda: store.weight_gradient(saved, grad_output, geometry),
        "exact grad_weight": lambda: geometry.weight_gradient(x, grad_output),
    }


# ---- the figures -------------------------------------------------------------------------


def products(geometry: Geometry, subspace: Subspace, side: str) -> list[Product]:
    """The products that a step of that side cannot do without.

    A compressed activation is small beside all else, and counts nothing. PyTorch's step counts as the direct products.
    """
    x, weight, out = (math.prod(s) for s in (geometry.input_shape, geometry.weight_shape, geometry.output_shape))
    if side == "pytorch":
        macs = dict.fromkeys(("forward", "grad_input", "grad_weight"), out * weight // geometry.weight_shape[0])
    else:
        with count_macs() as counter:
            steps(geometry, subspace, [side])[side]()
        macs = counter.by_kind()
    elements = dict.fromkeys(("forward", "grad_input"), x + weight + out)
    elements["grad_weight"] = weight + out + (x if side in ("bp", "pytorch") else 0)
    elements |= dict.fromkeys(("projection", "decomposition"), x)
    return [(2 * macs[kind], 4 * of) for kind, of in elements.items() if macs.get(kind)]


def measure_layer(name: str, batch: int, subspace: Subspace, options: argparse.Namespace, machine: Roofline) -> Row:
    """One row, as it is written."""
    geometry, wanted, repeats = LAYERS[name].geometry(batch), options.sides, options.repeats
    timings = timed(steps(geometry, subspace, wanted), repeats)
    of_parts = timed(parts(geometry, subspace), repeats)
    row: Row = {
        "layer": name,
        "batch": batch,
        "ranks": list(subspace.ranks),
        "seconds": {side: timing.as_json() for side, timing in timings.items()},
        "parts": {part: timing.as_json() for part, timing in of_parts.items()},
        "ratios": _ratios(timings, of_parts),
        "roofline": {},
    }
    for side, timing in timings.items():
        needed = products(geometry, subspace, side)
        row["roofline"][side] = {
            "bound": machine.bound(needed),
            "gflops": sum(flops for flops, _ in needed) / timing.median / 1e9,
            "share": machine.seconds(needed) / timing.median,
        }
    return row


def _ratios(timings: dict[str, Timing], of_parts: dict[str, Timing]) -> dict[str, float]:
    medians = {side: timing.median for side, timing in timings.items()}
    pairs = (("lance", "pytorch"), ("lance", "bp"), ("bp", "pytorch"), ("hosvd", "bp"), ("asi", "bp"))
    found = {f"{a}/{b}": medians[a] / medians[b] for a, b in pairs if a in medians and b in medians}
    ours = of_parts["projection"].median + of_parts["grad_weight from the core"].median
    return found | {"parts": ours / of_parts["exact grad_weight"].median}


def targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """What was aimed at, for the rows that there are."""
    against = {row["layer"]: row["ratios"]["lance/pytorch"] for row in rows if "lance/pytorch" in row["ratios"]}
    own = [row["ratios"]["lance/bp"] for row in rows if "lance/bp" in row["ratios"]]
    found = [Target(f"LANCE / PyTorch, {name}", ratio, LIMIT) for name, ratio in against.items()]
    if against:
        found.append(
            Target("LANCE / PyTorch, geometric mean", statistics.geometric_mean(against.values()), LIMIT_OF_MEAN)
        )
    if own:
        found.append(Target("LANCE / own backpropagation, geometric mean", statistics.geometric_mean(own), 0.75))
    return found + [
        Target(f"projection and grad_weight / exact grad_weight, {row['layer']}", row["ratios"]["parts"], 0.1)
        for row in rows
        if LAYERS[row["layer"]].small_map
    ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    machine = roofline.measure(options.repeats, options.quick)
    batch = 2 if options.quick else options.batch
    columns = ("hosvd/bp", "asi/bp", "lance/bp", "lance/pytorch", "parts")
    print("milliseconds of a step (median), ratios of medians")
    spans = ("lance min-max", "pytorch min-max")
    table = Table("layer", *options.sides, *columns, *spans, first=26, width=7)
    rows = []
    for name in options.layers:
        row = measure_layer(name, batch, LAYERS[name].subspace(batch, options.ranks), options, machine)
        rows.append(row)
        seconds = row["seconds"]
        table.row(
            name,
            *(number(1e3 * seconds[side]["median"]) if side in seconds else "-" for side in options.sides),
            *(number(row["ratios"].get(ratio)) for ratio in columns),
            *(span(seconds.get(side)) for side in ("lance", "pytorch")),
        )
    print("GFLOP/s, share of the roofline, and what a step is bound by (m: memory, a: arithmetic)")
    table = Table("layer", *options.sides, first=26, width=16)
    for row in rows:
        found = [row["roofline"].get(side) for side in options.sides]
        cells = [f"{number(of['gflops'])} {of['share']:4.0%} {of['bound'][0]}" if of else "-" for of in found]
        table.row(row["layer"], *cells)
    return {"roofline": machine.as_json(), "rows": rows, "targets": targets(rows)}


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("benchmarks.layers", __doc__, repeats=5)
    p.add_argument("--batch", type=count, default=BATCH, help="images (default: %(default)s)")
    p.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS), help="all by default")
    p.add_argument("--ranks", choices=RANKS, default=RANKS[0], help="default: %(default)s")
    p.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="all by default")
    return run(p, arguments, measure, peers=("torch",))


if __name__ == "__main__":
    sys.exit(run_main(main))
