"""Train one network with many ways of compressing: ``python -m experiments.finetune.sweep``.

Energy thresholds, subsets of modes, with and without the mean, which layers train, and budgets that are
planned or spent by one threshold: accuracy against the bytes of the whole tape, and of tape and factors.
One learning rate for all; a finished run is kept in --folder and never run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.commands import cli, command_line
from analysis.commands.chance import sentence
from analysis.commands.provenance import provenance
from analysis.reports.figures import save_figure
from experiments import frame
from experiments.finetune.command import CELL, MODES, PAPERS_LR

MODE_SETS = {"all modes": MODES, "no batch": MODES[1:], "channel": ("channel",)}
EPSILONS = (0.5, 0.7, 0.9, 0.99)
BUDGETS_KIB = (12.5, 25.0, 50.0, 100.0, 200.0, 400.0)
SELECTIONS = ("last:1", "last:2", "last:3")
"""Beside the selection of --tune."""

QUICK = {"net": "convnet", "data": "digits", "tune": "last:2", "batch": [32], "lr": 0.2}
DEFAULTS = {"net": "mcunet", "data": "cifar10", "tune": "last:4", "batch": [128, 8], "lr": PAPERS_LR}
"""Values of the options that are not given, with and without ``--quick``."""

FIXED = {
    "calibration_batches": 100, "clip": 2.0, "epsilon": 0.7, "modes": list(MODES), "budget_kib": 200.0, "patch": 2,
    "ratio": 0.125, "validation": False,
}  # fmt: skip
"""Arguments of every run where the setting that is swept does not say otherwise."""

STYLES = {
    "uniform threshold": ("o", "0.75"), "uniform, mean-free": ("^", "0.55"), "uniform in a budget": ("s", "0.35"),
    "planned": ("*", "0.0"), "fewer layers": ("x", "0.45"), "fewer layers, exact": ("+", "0.45"),
    "head-only": ("v", "0.0"), "bp": ("D", "0.0"),
}  # fmt: skip
"""Marker and grey of each family."""


def parser() -> argparse.ArgumentParser:
    p = frame.parser("experiments.finetune.sweep", __doc__, epilog=command_line.nets_and_data())
    p.add_argument(
        "--quick", action="store_true",
        help="try it: a few settings of a small net on the digits of the package; a minute",
    )  # fmt: skip
    frame.add_net_data_and_tune(p)
    p.add_argument(
        "--batch", type=cli.count, nargs="+",
        help="images of one training step; each number is a sweep (128 8)",
    )  # fmt: skip
    p.add_argument("--epochs", type=cli.count, default=4, help="passes over the training images (%(default)s)")
    p.add_argument("--train-images", type=cli.count, default=4000, help="images to train on (%(default)s)")
    p.add_argument("--test-images", type=cli.count, default=2000, help="images to test on (%(default)s)")
    p.add_argument("--lr", type=cli.positive, help=f"learning rate ({PAPERS_LR})")
    p.add_argument("--seed", type=cli.seed, default=0, help="seed of the random numbers (%(default)s)")
    cli.add_sweep(p, "runs/finetune")
    frame.add_outputs(p, "accuracy against bytes")
    return p


def settings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every setting of the sweep: family, label, and what differs from the default cell."""
    epsilons: Sequence[float] = EPSILONS
    budgets: Sequence[float] = BUDGETS_KIB
    mode_sets: Mapping[str, Sequence[str]] = MODE_SETS
    if options.quick:
        epsilons, budgets, mode_sets = (0.7, 0.95), (4.0, 8.0), {"all modes": MODES, "channel": ("channel",)}
    found = [_setting("bp", "bp", method="bp"), _setting("head-only", "head-only", method="head-only")]
    for name, modes in mode_sets.items():
        for epsilon in epsilons:
            changes = {"epsilon": epsilon, "modes": list(modes)}
            found.append(_setting("uniform threshold", f"{name} {epsilon:g}", method="lance", **changes))
            label = f"{name} {epsilon:g}, mean-free"
            found.append(_setting("uniform, mean-free", label, method="lance-mean-free-epsilon", **changes))
    for kib in budgets:
        found.append(_setting("uniform in a budget", f"uniform {kib:g} KiB", method="lance-uniform", budget_kib=kib))
        found.append(_setting("planned", f"planned {kib:g} KiB", method="lance-planned", budget_kib=kib))
    for selection in () if options.quick else SELECTIONS:
        found.append(_setting("fewer layers, exact", f"{selection} exact", method="bp", tune=selection))
        changes = {"tune": selection, "epsilon": 0.9, "modes": list(MODES[1:])}
        found.append(_setting("fewer layers", f"{selection} mean-free", method="lance-mean-free-epsilon", **changes))
    return found


def _setting(family: str, label: str, **changes: Any) -> dict[str, Any]:
    return {"family": family, "label": label, "changes": changes}


def cell(options: argparse.Namespace, batch: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one run."""
    return {
        **frame.net_and_data(options),
        **{name: getattr(options, name) for name in ("tune", "lr", "seed", "epochs")},
        "batch": batch,
        **FIXED,
        "folder": f"{options.folder}/frozen",
        **changes,
    }


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All cells of all batch sizes, one dict of numbers for each; and where weights and images came from."""
    from experiments.finetune.cell import prepare_data

    swept = settings(options)
    batches = options.batch
    cells = [cell(options, batch, setting["changes"]) for batch in batches for setting in swept]
    origin = prepare_data(cells[0])
    expected = frame.expected_seconds(options, options.epochs, origin["images"]["count"])
    outcomes = frame.run_cells(options, cells, CELL, expected)
    points = [
        {
            "batch": one["batch"],
            "family": setting["family"],
            "label": setting["label"],
            "cell": one,
            "accuracy": outcome["accuracy"],
            "test_images": outcome["images"],
            "tape_bytes": outcome["tape_bytes"],
            "factor_bytes": outcome["factor_bytes"],
            "core_bytes": sum(outcome["layer_bytes"].values()),
            "predicted_equals_measured": outcome["tape_bytes"] == outcome["predicted_tape_bytes"],
            "ranks": outcome["notes"].get("ranks"),
        }
        for one, setting, outcome in zip(cells, swept * len(batches), outcomes, strict=True)
    ]
    return points, origin


def draw(points: Sequence[Mapping[str, Any]], path: str, title: str) -> None:
    """One row for each batch size: accuracy against the tape, and against tape and factors."""
    from matplotlib.figure import Figure

    from experiments.finetune.report import draw_front

    batches = list(dict.fromkeys(point["batch"] for point in points))
    figure = Figure(figsize=(11, 4.4 * len(batches)), layout="constrained")
    rows = figure.subplots(len(batches), 2, squeeze=False, sharey="row")
    for panels, batch in zip(rows, batches, strict=True):
        for panel, factors in zip(panels, (False, True), strict=True):
            of = [point for point in points if point["batch"] == batch]
            places = {
                point["label"]: (
                    (point["tape_bytes"] + factors * point["factor_bytes"]) / 1024,
                    100 * point["accuracy"],
                )
                for point in of
            }
            for family, (marker, grey) in STYLES.items():
                own = [places[point["label"]] for point in of if point["family"] == family]
                if own:
                    panel.plot(*zip(*own, strict=True), marker, color=grey, ms=6, label=family)
            what = "tape and factors" if factors else "tape"
            panel.set(xlabel=f"{what}, KiB (log)", title=f"{title}, batch {batch}")
            draw_front(panel, list(places.values()))
        panels[0].set_ylabel("accuracy, %")
    rows[0][1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def show(points: Sequence[Mapping[str, Any]]) -> None:
    """The settings that no other beats in both tape and accuracy, by batch size."""
    from experiments.finetune.report import pareto

    for batch in dict.fromkeys(point["batch"] for point in points):
        of = [point for point in points if point["batch"] == batch]
        front = pareto([(point["tape_bytes"], point["accuracy"]) for point in of])
        print(f"Batch {batch}: {len(of)} settings, of which none beats these in both tape and accuracy")
        for point in sorted(of, key=lambda point: point["tape_bytes"]):
            if (point["tape_bytes"], point["accuracy"]) in front:
                sizes = f"{point['tape_bytes'] / 1024:10,.1f} KiB {100 * point['accuracy']:6.1f} %"
                print(f"  {sizes}  {point['family']}: {point['label']}")
        print("  " + sentence([[point["accuracy"]] for point in of], min(point["test_images"] for point in of)))


def work(options: argparse.Namespace) -> None:
    """Check, run, show and write."""
    cli.fill_in(options, QUICK if options.quick else DEFAULTS)
    cli.check_once(options, "batch")
    cli.check_sweep(options)
    selections = {setting["changes"].get("tune", options.tune) for setting in settings(options)}
    frame.settle(options, options.tune, *sorted(selections))
    points, origin = run(options)
    show(points)
    frame.write(
        options,
        lambda: {**provenance("experiments.finetune.sweep", options.seed), **origin, "points": points},
        lambda path: draw(points, path, f"{options.net} on {options.data}"),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    return command_line.run_command(parser, arguments, work)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
