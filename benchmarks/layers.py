"""One training step of single layers, timed side by side: ``python -m benchmarks.layers``.

For each layer: our backpropagation, LANCE (forward, projection, both gradients), and PyTorch's plain forward and
backward where it is installed. The three are timed in turn, repeat after repeat, so that a machine whose speed drifts
slows all of them; what to quote is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from analysis.cli import OneLineParser, check_writable, one_line
from analysis.provenance import provenance
from analysis.spectra_file import write_atomically
from lance_ref import F, Subspace, Tensor
from lance_ref.activations import EXACT, ActivationStore, Lance
from lance_ref.geometry import ConvGeometry

LAYERS = {  # name: (C_in, H = W, C_out, kernel, stride, groups, ranks at batch 128)
    "1x1 160-960 at 7": (160, 7, 960, 1, 1, 1, (64, 80, 2, 2)),
    "1x1 960-320 at 7": (960, 7, 320, 1, 1, 1, (64, 160, 2, 2)),
    "1x1 320-1280 at 7": (320, 7, 1280, 1, 1, 1, (64, 128, 2, 2)),
    "depthwise 3x3 960 at 7": (960, 7, 960, 3, 1, 960, (64, 160, 2, 2)),
    "3x3 512-512 at 7": (512, 7, 512, 3, 1, 1, (64, 128, 2, 2)),
    "3x3/2 256-512 at 14": (256, 14, 512, 3, 2, 1, (64, 64, 4, 4)),
}


def geometry_of(name: str, batch: int) -> ConvGeometry:
    """The convolution of that name, with symmetric padding."""
    C_in, size, C_out, kernel, stride, groups, _ = LAYERS[name]
    pad = (kernel - 1) // 2
    return ConvGeometry(
        (batch, C_in, size, size),
        (C_out, C_in // groups, kernel, kernel),
        (stride, stride),
        ((pad, pad), (pad, pad)),
        groups=groups,
    )


def our_step(geometry: ConvGeometry, store: ActivationStore) -> Callable[[], None]:
    """Forward and backward of one convolution through the tape."""
    rng = np.random.default_rng(0)
    x = Tensor(rng.standard_normal(geometry.input_shape, dtype=np.float32), requires_grad=True)
    weight = Tensor(rng.standard_normal(geometry.weight_shape, dtype=np.float32), requires_grad=True)
    grad_output = rng.standard_normal(geometry.output_shape, dtype=np.float32)

    def step() -> None:
        x.grad = weight.grad = None
        out = F.conv2d(x, weight, stride=geometry.stride, padding=geometry.padding, groups=geometry.groups, store=store)
        out.backward(grad_output)

    return step


def pytorch_step(geometry: ConvGeometry) -> Callable[[], None] | None:
    """The same in PyTorch, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    generator = torch.Generator().manual_seed(0)
    shapes = (geometry.input_shape, geometry.weight_shape, geometry.output_shape)
    x, weight, grad_output = (torch.randn(shape, generator=generator) for shape in shapes)
    x.requires_grad_()
    weight.requires_grad_()
    (pad, _), _ = geometry.padding

    def step() -> None:
        x.grad = weight.grad = None
        out = torch.nn.functional.conv2d(x, weight, stride=geometry.stride, padding=pad, groups=geometry.groups)
        out.backward(grad_output)

    return step


def pytorch_version() -> str | None:
    """Version and number of threads of the peer, None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def timed(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat, the steps taking turns; one repeat before that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(name: str, batch: int, repeats: int) -> dict[str, Any]:
    """Median, fastest and slowest repeat of each side, in seconds."""
    geometry = geometry_of(name, batch)
    ranks = (-(-LAYERS[name][-1][0] * batch // 128), *LAYERS[name][-1][1:])
    subspace = Subspace.random(geometry.input_shape, ranks, np.random.default_rng(0))
    steps = {"bp": our_step(geometry, EXACT), "lance": our_step(geometry, Lance(subspace))}
    peer = pytorch_step(geometry)
    if peer is not None:
        steps["pytorch"] = peer
    sides = {
        side: {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
        for side, seconds in timed(steps, repeats).items()
    }
    return {"layer": name, "batch": batch, "ranks": list(ranks), "seconds": sides}


def parser() -> argparse.ArgumentParser:
    parse = OneLineParser(prog="python -m benchmarks.layers", description=(__doc__ or "").split("\n\n")[0])
    parse.add_argument("--batch", type=int, default=128, help="images (default: %(default)s)")
    parse.add_argument("--repeats", type=int, default=5, help="counted repeats (default: %(default)s)")
    parse.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS), help="all by default")
    parse.add_argument("--output", help="also write the figures as JSON")
    return parse


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        for name in ("batch", "repeats"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} is {getattr(options, name)}, expected a positive integer")
        if options.output:
            check_writable(options.output)
        print(
            f"{'layer':24}  {'bp ms':>8}  {'lance ms':>8}  {'lance/bp':>8}  {'lance/pytorch':>13}  {'lance range':>15}"
        )
        rows = []
        for name in options.layers:
            row = measure(name, options.batch, options.repeats)
            rows.append(row)
            sides = row["seconds"]
            bp, lance = sides["bp"]["median"], sides["lance"]["median"]
            peer = f"{lance / sides['pytorch']['median']:.2f}" if "pytorch" in sides else "skipped"
            spread = f"{1e3 * sides['lance']['min']:.1f}-{1e3 * sides['lance']['max']:.1f}"
            print(
                f"{name:24}  {1e3 * bp:8.1f}  {1e3 * lance:8.1f}  {lance / bp:8.2f}  {peer:>13}  {spread:>15}",
                flush=True,
            )
        if options.output:
            document = {**provenance("benchmarks.layers", 0), "pytorch": pytorch_version(), "rows": rows}
            write_atomically(options.output, json.dumps(document, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks.layers: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
