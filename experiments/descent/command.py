"""How often the compressed weight gradient points uphill: ``python -m experiments.descent``.

Random cases of each claim in :mod:`experiments.descent.cases`, where the mathematics is, and then real training: a
small convolutional network on the digits, with the exact weight gradient of each layer and batch computed beside the
compressed one that is used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.commands import cli, command_line
from analysis.commands.chance import NORMAL_95, sentence, share_variance
from analysis.commands.provenance import provenance
from analysis.reports.figures import save_figure
from experiments import frame
from experiments.descent import cases
from experiments.descent.cases import both_gradients, cosine, fixed_store, summary
from lance_ref import calibrate, compress, datasets, evaluate, models, optim, tune
from lance_ref.algebra.geometry import Geometry
from lance_ref.io.whole_file import sealed, write_text
from lance_ref.nn.module import Module
from lance_ref.stores import ActivationStore, Hosvd
from lance_ref.train.run import Pass, Run

EPSILON = 0.7
"""Energy threshold of the training runs, the papers'."""
BATCH = 64
CALIBRATION_BATCHES = 10
LEARNING_RATE = 0.05
MOMENTUM = 0.9
CLIP_NORM = 2.0
MODES = {
    "all modes": ("batch", "channel", "height", "width"),
    "without batch": ("channel", "height", "width"),
    "channel only": ("channel",),
}
METHODS = (
    ("BP", "nothing"),
    *((method, modes) for method in ("LANCE", "HOSVD") for modes in MODES),
    ("LANCE", "sketched batch"),
)
"""What is compressed of every convolution's input, and how. BP is there for its accuracy; its cosines are 1."""
FULL: dict[str, Any] = {"trials": 1000, "epochs": 10, "batches": cases.BATCHES, "images": None}
QUICK: dict[str, Any] = {"trials": 20, "epochs": 1, "batches": (2, 8), "images": 256}


class Beside(ActivationStore):
    """A store whose weight gradient is used, with the exact one of the same batch computed beside it.

    Output and input gradient are exact under the stores compared here, so that G is the same for both.
    """

    name = "beside"

    def __init__(self, store: ActivationStore) -> None:
        self.store = store
        self.cosines: list[float] = []

    def check(self, input_shape: tuple[int, ...]) -> None:
        self.store.check(input_shape)

    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        return {**self.store.save(activation), "whole": activation}

    def weight_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        dW_hat = self.store.weight_gradient(saved, grad_output, geometry)
        self.cosines.append(cosine(geometry.weight_gradient(saved["whole"], grad_output), dW_hat))
        return dW_hat


def attach(
    net: Module, layers: Sequence[str], method: str, modes: str, data: datasets.Dataset, seed: int
) -> dict[str, Beside]:
    """Have each of ``layers`` use one method's store, with the exact gradient beside it."""
    if method == "LANCE":
        batches = datasets.batches(data, BATCH, rng=seed)
        sketched = modes == "sketched batch"
        calibration = calibrate(
            net,
            [x for x, _ in itertools.islice(batches, CALIBRATION_BATCHES)],
            epsilon=EPSILON,
            modes=MODES["without batch" if sketched else modes],
        )
        compress(net, calibration, batch_mode="sketch" if sketched else "calibrated", seed=seed)
    besides = {}
    for path in layers:
        layer = net.get_submodule(path)
        besides[path] = Beside(Hosvd(EPSILON, modes=MODES[modes]) if method == "HOSVD" else layer.store)
        layer.store = besides[path]
    return besides


def train(method: str, modes: str, epochs: int, images: int | None, seed: int) -> dict[str, Any]:
    """Train on the digits with one method; the cosine of every layer and step, and the accuracy at the end."""
    data, test = datasets.load("digits", "train", limit=images), datasets.load("digits", "test")
    net = models.create("convnet", in_channels=1, rng=seed)
    besides = attach(net, tune(net, "all").layers, method, modes, data, seed)
    parameters = list(net.parameters())
    training = Run(net, optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM), CLIP_NORM)
    rng = np.random.default_rng(seed + 1)
    for _ in range(epochs):
        for x, y in datasets.batches(data, BATCH, rng=rng):
            training.update([Pass(0, x, y)])
    return {
        "method": method,
        "modes": modes,
        "test_accuracy": round(evaluate(net, test, len(test)), 4),
        "layers": {path: quantiles(beside.cosines) for path, beside in besides.items()},
        "cosines": {path: [round(value, 4) for value in beside.cosines] for path, beside in besides.items()},
    }


def quantiles(cosines: Sequence[float]) -> dict[str, Any]:
    """What :func:`~experiments.descent.cases.summary` says, and where 5 and 95 % lie."""
    low, high = (round(float(value), 6) for value in np.quantile(cosines, [0.05, 0.95]))
    return {**summary(cosines, cases.FLOAT32_ROUNDING), "quantile_05": low, "quantile_95": high}


def run(trials: int, epochs: int, batches: Sequence[int], images: int | None, seed: int) -> dict[str, Any]:
    """Everything; each part has its own random numbers, so that none depends on what ran before."""
    parts = {
        "one_mode": lambda rng: cases.one_mode_cases(trials, rng),
        "batch_mode": lambda rng: cases.batch_mode_cases(trials, rng, batches),
        "same_batch": lambda rng: cases.same_batch_cases(trials, rng),
        "sketch": lambda rng: cases.sketch_cases(trials, rng, batches[1::2]),
    }
    result: dict[str, Any] = {"trials": trials, "epochs": epochs, "examples": dict(examples())}
    for (name, part), child in zip(parts.items(), np.random.SeedSequence(seed).spawn(len(parts)), strict=True):
        result[name] = list(part(np.random.default_rng(child)))
    result["test_images"] = len(datasets.load("digits", "test"))
    result["training"] = [train(method, modes, epochs, images, seed) for method, modes in METHODS]
    return result


def examples() -> dict[str, dict[str, Any]]:
    """The examples to check by hand, computed."""
    rows = {}
    for name, example in cases.EXAMPLES.items():
        store = fixed_store(example.activation.shape, example.factors)
        exact, compressed = both_gradients(example.geometry, store, example.activation, example.grad_output)
        rows[name] = {
            "shape": list(example.activation.shape),
            "dW": exact.ravel().round(9).tolist(),
            "dW_hat": compressed.ravel().round(9).tolist(),
            "cosine": round(cosine(exact, compressed), 6),
        }
    return rows


# ---- what is printed and drawn -------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """The figures that matter, as text."""

    def share(row: dict[str, Any]) -> str:
        return f"negative {row['negative']:.4f}, least {row['least']:+.3f}, median {row['median']:.3f}"

    def size(row: dict[str, Any]) -> str:
        return f"B = {row['batch']:<3} r = {row['rank']:<2} {row['in']:>2} to {row['out']:<2}"

    off = 100 * NORMAL_95 * math.sqrt(share_variance(0.5, result["trials"]))
    lines = [
        f"{result['trials']} random cases of each kind; a share may be off by {off:.0f} points by chance (95 %).\n",
        "By hand",
    ]
    for name, row in result["examples"].items():
        lines.append(f"  {name:<30} dW = {row['dW']}, dŴ = {row['dW_hat']}, cosine {row['cosine']:.3f}")
    lines.append(f"\nOne mode on fixed random directions ({result['trials']} random small layers each)")
    lines += [f"  {row['layer']:<18} {row['mode']:<8} {share(row)}" for row in result["one_mode"]]
    lines.append("\nBatch mode on fixed directions, linear layer; alignment of the calibration with the batch")
    for row in result["batch_mode"]:
        if row["rank"] == max(1, row["batch"] // 4):
            expected = f", expected of noise {row['chance']:.4f}" if "chance" in row else ""
            lines.append(f"  {size(row)}  alignment {row['alignment']:<4} {share(row)}{expected}")
    lines.append("\nHOSVD of the very batch, random ranks in every mode")
    for row in result["same_batch"]:
        lines += [
            f"  {row['layer']:<18} random G: {share(row['random_G'])}",
            f"{'':<21}worst G:  {share(row['worst_G'])}",
        ]
    lines.append("\nSketched batch mode, linear layer")
    for row in result["sketch"]:
        lines.append(f"  {size(row)}  {share(row)}, expected of noise {row['chance']:.4f}; bias {row['bias']:.2f}")
    lines.append(f"\nDigits, {result['epochs']} epoch(s) from random weights, ε = {EPSILON}")
    for run_ in result["training"]:
        lines.append(f"  {run_['method']}, {run_['modes']}: accuracy {run_['test_accuracy']:.3f}")
        for path, row in run_["layers"].items():
            lines.append(f"    {path:<8} {share(row)}, 5 % below {row['quantile_05']:.3f}")
    accuracies = [[run_["test_accuracy"]] for run_ in result["training"]]
    lines.append(sentence(accuracies, result["test_images"]))
    return "\n".join(lines)


def draw(result: dict[str, Any], path: str) -> None:
    """Three panels: fixed batch mode on noise, HOSVD of the very batch, and the cosines of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    _draw_batch_mode(left, result["batch_mode"])
    _draw_same_batch(middle, result["same_batch"])
    _draw_training(right, result["training"])
    save_figure(figure, path)


def _draw_batch_mode(ax: Any, rows: Sequence[dict[str, Any]]) -> None:
    styles = {0.0: ("-", "0.0", "o"), 0.5: ("--", "0.25", "s"), 0.9: ("-.", "0.45", "^"), 1.0: (":", "0.6", "v")}
    for (alignment, (line, grey, marker)), (I, O) in itertools.product(styles.items(), ((1, 1), (4, 4))):  # noqa: E741
        chosen = [
            row
            for row in rows
            if (row["alignment"], row["in"], row["out"]) == (alignment, I, O)
            and row["rank"] == max(1, row["batch"] // 4)
        ]
        label = f"alignment {alignment:g}" if I == 1 else None
        x, y = [row["batch"] for row in chosen], [row["negative"] for row in chosen]
        ax.plot(x, y, ls=line, color=grey, marker=marker, ms=4, label=label, mfc=grey if I == 1 else "white")
    ax.set(xlabel="batch B, rank B/4", ylabel="share of negative ⟨dW, dŴ⟩", ylim=(-0.01, 0.5))
    ax.set_xscale("log", base=2)
    ax.set_title("fixed batch mode, noise\n(filled: 1 weight, open: 4 to 4)", fontsize=10)
    ax.legend(frameon=False, fontsize=8)


def _draw_same_batch(ax: Any, rows: Sequence[dict[str, Any]]) -> None:
    places = np.arange(len(rows))
    for shift, (which, grey, label) in enumerate((("random_G", "0.65", "random G"), ("worst_G", "0.15", "worst G"))):
        shares = [row[which]["negative"] for row in rows]
        bars = ax.bar(places + 0.4 * shift - 0.2, shares, 0.38, color=grey, label=label)
        ax.bar_label(bars, [f"{100 * share:.1f} %" if share else "0" for share in shares], fontsize=7, padding=2)
    ax.set_xticks(places, [row["layer"].replace(" ", "\n", 1) for row in rows], fontsize=8)
    ax.set(ylabel="share of negative ⟨dW, dŴ⟩", ylim=(0, 1.1))
    ax.set_title("HOSVD of the very batch,\nrandom activations and ranks", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_training(ax: Any, runs: Sequence[dict[str, Any]]) -> None:
    runs = [run_ for run_ in runs if run_["method"] != "BP"]
    layers = list(runs[0]["layers"])
    greys = np.linspace(0.65, 0.0, len(layers))
    for place, run_ in enumerate(runs):
        for shift, (path, row) in enumerate(run_["layers"].items()):
            y, color = place + 0.25 * (shift - (len(layers) - 1) / 2), str(greys[shift])
            ax.plot([row["quantile_05"], row["quantile_95"]], [y, y], color=color, lw=2.5, solid_capstyle="butt")
            ax.plot(row["median"], y, "|", color=color, ms=9, mew=2)
            ax.plot(row["least"], y, ".", color=color, ms=5, label=path if place == 0 else None)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_yticks(range(len(runs)), [f"{run_['method']}\n{run_['modes']}" for run_ in runs], fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="cosine of dW and dŴ", xlim=(None, 1.03))
    ax.set_title(
        f"training on the digits, ε = {EPSILON}\n(bar: 5 to 95 % of the steps, tick: median, dot: least)", fontsize=10
    )
    ax.legend(frameon=False, fontsize=8)


# ---- the command ---------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = frame.parser("experiments.descent", __doc__)
    p.add_argument("--trials", type=cli.count, help="random cases of each kind (1000)")
    p.add_argument("--epochs", type=cli.count, help="passes over the training images, for each method (10)")
    p.add_argument("--seed", type=cli.seed, default=0, help="fixes everything (%(default)s)")
    p.add_argument("--quick", action="store_true", help="a few seconds: few trials, batches, epochs and images")
    frame.add_outputs(p, "the shares and cosines")
    return p


def work(options: argparse.Namespace) -> None:
    """Run, show and write."""
    settings = dict(QUICK if options.quick else FULL)
    settings |= {name: getattr(options, name) for name in ("trials", "epochs") if getattr(options, name) is not None}
    # by far the most of it is training, which takes 9.5 s an epoch of all methods; a quick run takes 3 s
    frame.begin(3.0 if options.quick and options.epochs is None else 9.5 * settings["epochs"] + 3)
    started = time.perf_counter()
    result = {**provenance("experiments.descent", options.seed), **run(**settings, seed=options.seed)}
    result["seconds"] = round(time.perf_counter() - started, 1)
    print(report(result))
    if options.output:
        write_text(options.output, compact(sealed(result)))
    if options.figure:
        draw(result, options.figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    return command_line.run_command(parser, arguments, work)


def compact(result: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list):
            value_text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        else:
            value_text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {value_text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
