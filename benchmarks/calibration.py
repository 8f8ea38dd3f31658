"""The cost of finding subspaces, beside the usual ways: ``python -m benchmarks.calibration``.

Three comparisons:

* one activation, MobileNetV2's widest at batch 128: Gram matrices and eigenvectors of all its modes, the singular
  value decompositions of its unfoldings (NumPy), and the Tucker decomposition by TensorLy's ``tucker`` (which iterates;
  timed in one run, as it takes long);
* adding one activation to the Grams, and BLAS's symmetric rank-k update on the same unfoldings laid out beforehand, in
  float32 and float64 (``scipy.linalg.blas``; our Grams are summed in float64);
* the calibration of MobileNetV2's last four layers over some batches, beside the bare forward passes. What more it
  costs grows with the batches, but for the eigenvectors, which are found once: the figure for a hundred batches is
  computed from that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.linalg import blas

from analysis.commands.cli import count
from analysis.commands.command_line import run_main
from benchmarks.side_by_side import Side, Table, Target, Timing, number, once, parser, peer, run, span, timed
from lance_ref import Tensor, calibrate, models, no_grad, tune
from lance_ref.algebra.grams import LayerGrams
from lance_ref.algebra.modes import unfold
from lance_ref.engine.tensor import Shape

SHAPE, QUICK_SHAPE = (128, 960, 7, 7), (4, 12, 3, 3)
RANKS, QUICK_RANKS = (60, 100, 2, 2), (2, 3, 2, 2)
IMAGE_SIZE, QUICK_IMAGE_SIZE = 224, 32
RECIPE_BATCHES = 100
"""Of a whole calibration."""


def activation(shape: Shape) -> np.ndarray:
    """Noise behind a ReLU: half of it zero, and a mean, as real activations have."""
    noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return np.maximum(noise, 0, out=noise)


# ---- one activation ----------------------------------------------------------------------


def decompositions(x: np.ndarray) -> dict[str, Side]:
    """Everything that ranks of all modes can be chosen from."""

    def ours() -> None:
        grams = LayerGrams("activation", x.shape, (True,) * x.ndim)
        grams.add(x)
        for mode in range(x.ndim):
            grams.basis(mode)

    def svds() -> None:
        for mode in range(x.ndim):
            np.linalg.svd(unfold(x, mode), full_matrices=False)

    return {"grams and eigenvectors": ours, "four SVDs": svds}


def tensorly_tucker(x: np.ndarray, ranks: Shape) -> tuple[Timing, int] | None:
    """Seconds and iterations of one run; None without TensorLy."""
    if peer("tensorly") is None:
        return None
    from tensorly.decomposition import tucker

    errors: list[Any] = []

    def one_run() -> None:
        errors[:] = tucker(x, rank=list(ranks), return_errors=True)[1]

    return once(one_run), len(errors)


def accumulations(x: np.ndarray) -> dict[str, Side]:
    """Adding one activation to the Grams, and the same sums by BLAS."""
    grams = LayerGrams("activation", x.shape, (True,) * x.ndim)
    unfoldings = [np.ascontiguousarray(unfold(x, mode)) for mode in range(x.ndim)]
    doubles = [matrix.astype(np.float64) for matrix in unfoldings]
    return {
        "adding to the Grams": lambda: grams.add(x),
        "ssyrk": lambda: [blas.ssyrk(1.0, matrix.T, trans=1) for matrix in unfoldings],  # M.T: Fortran order, no copy
        "dsyrk": lambda: [blas.dsyrk(1.0, matrix.T, trans=1) for matrix in doubles],
    }


# ---- a net -------------------------------------------------------------------------------


def calibrations(batch: int, batches: int, image_size: int) -> dict[str, Side]:
    """The bare forward passes, the calibration without and the eigenvectors alone."""
    net = models.create("mobilenetv2", num_classes=10, rng=0).eval()
    tune(net, "last:4")
    x = np.random.default_rng(0).standard_normal((batch, 3, image_size, image_size), dtype=np.float32)
    measured = calibrate(net, [x])

    def forward_passes() -> None:
        with no_grad():
            for _ in range(batches):
                net(Tensor(x))

    def eigenvectors() -> None:
        anew = measured.merge(measured)  # sums of the Grams, whose eigenvectors nobody has asked for yet
        for path in anew:
            anew[path]

    return {
        "forward passes": forward_passes,
        "forward passes and Grams": lambda: calibrate(net, [x] * batches, progress=False),
        "eigenvectors": eigenvectors,
    }


def share_of_recipe(timings: dict[str, Timing], batches: int) -> float:
    """Seconds of a calibration over :data:`RECIPE_BATCHES`, divided by those of its forward passes."""
    forward, grams, once = (
        timings[name].median for name in ("forward passes", "forward passes and Grams", "eigenvectors")
    )
    times = RECIPE_BATCHES / batches
    return (times * grams + once) / (times * forward)


# ---- the figures -------------------------------------------------------------------------


def compare(title: str, timings: dict[str, Timing], own: str) -> dict[str, Any]:
    """Print the rows of one comparison; gives them as they are written."""
    print(title)
    table = Table("", "ms", f"/ {own}", "min-max", first=26)
    for name, timing in timings.items():
        ratio = timing.median / timings[own].median
        table.row(name, number(1e3 * timing.median), number(ratio), span(timing.as_json()))
    return {name: timing.as_json() for name, timing in timings.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    shape, ranks = (QUICK_SHAPE, QUICK_RANKS) if options.quick else (SHAPE, RANKS)
    x = activation(shape)
    found: dict[str, Any] = {"shape": list(shape), "ranks": list(ranks)}

    of_one = timed(decompositions(x), options.repeats)
    theirs = tensorly_tucker(x, ranks) if options.tensorly else None
    if theirs is not None:
        of_one["tensorly tucker"], found["tensorly_iterations"] = theirs
    ours = of_one["grams and eigenvectors"].median
    found["activation"] = compare(f"one activation of {shape}", of_one, "grams and eigenvectors")
    targets = [Target("grams and eigenvectors: times faster than SVDs", of_one["four SVDs"].median / ours, 10, True)]
    if theirs is not None:
        what = "grams and eigenvectors: times faster than TensorLy's tucker"
        targets.append(Target(what, of_one["tensorly tucker"].median / ours, 100, True))

    adding = timed(accumulations(x), options.repeats)
    found["accumulation"] = compare("the Grams of all its modes", adding, "adding to the Grams")
    ratio = adding["adding to the Grams"].median / adding["ssyrk"].median
    targets.append(Target("adding to the Grams / ssyrk on the same matrices", ratio, 1.5))
    del x

    batch, batches, size = (2, 2, QUICK_IMAGE_SIZE) if options.quick else (options.batch, options.batches, IMAGE_SIZE)
    whole = timed(calibrations(batch, batches, size), options.repeats)
    title = f"MobileNetV2's last four layers, {batches} batches of {batch} images of {size} pixels"
    found |= {"batch": batch, "batches": batches, "image_size": size}
    found["calibration"] = compare(title, whole, "forward passes")
    found["share_of_forward_passes"] = share_of_recipe(whole, batches)
    what = f"calibration over {RECIPE_BATCHES} batches / bare forward passes"
    targets.append(Target(what, found["share_of_forward_passes"], 1.3))
    return {**found, "targets": targets}


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("benchmarks.calibration", __doc__, repeats=3)
    p.add_argument("--batch", type=count, default=32, help="images of a batch of the net's (default: %(default)s)")
    p.add_argument("--batches", type=count, default=10, help="calibration batches of the net (default: %(default)s)")
    p.add_argument("--no-tensorly", dest="tensorly", action="store_false", help="leave out the peer that takes minutes")
    return run(p, arguments, measure, peers=("tensorly",))


if __name__ == "__main__":
    sys.exit(run_main(main))
