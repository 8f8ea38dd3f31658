"""Accuracy against all RAM of a training step on a small device: ``python -m experiments.device --quick``.

Each method trains with the arithmetic of its device program, once with an update after every image and once with an
update after a batch, at the learning rate that is best for it on held-out training images. Beside the accuracy stands
the RAM of the compiled step of the whole network: image, maps, weights that train, gradients, everything.

A finished run is kept in --folder and never run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from analysis.commands import cli, command_line
from experiments import frame

ABOUT = {
    "head": "the classifier alone, which always trains",
    "bias": "the biases of the tuned layers too",
    "bp": "their weights too, by exact backpropagation",
    "lance": "their weights too, from few directions of their inputs",
}
METHODS = tuple(ABOUT)
UPDATES = ("image", "batch")
NO_LIMIT_KIB = 1e6
"""A budget in which nothing need be computed again."""
TRAIN, PLAN = "experiments.device.cell:train", "experiments.device.cell:plan"

QUICK = {
    "net": "convnet", "data": "digits", "tune": "last:1", "directions": [2, 6], "epochs": 4, "image_epochs": 2,
    "tuning_epochs": 1, "batch": 32, "calibration_batches": 2, "calibration_batch": 32, "train_images": 200,
    "test_images": 100, "clip": 2.0, "seeds": 1, "batch_rates": [0.2, 0.4], "image_rates": [0.02, 0.04],
    "budgets": [20.0, 40.0],
}  # fmt: skip
"""What --quick stands for, where an option is not given."""

DEFAULTS = {
    "net": "mcunet", "data": "cifar10", "tune": "last:4", "directions": [8, 24], "epochs": 15, "image_epochs": 5,
    "tuning_epochs": 2, "batch": 128, "calibration_batches": 4, "calibration_batch": 64, "train_images": 10000,
    "test_images": None, "clip": 2.0, "seeds": 3, "batch_rates": [0.05, 0.1, 0.2], "image_rates": [0.001, 0.002, 0.004],
    "budgets": [160.0, 200.0, 256.0, 320.0, 512.0],
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = frame.parser(
        "experiments.device", __doc__,
        epilog=f"{command_line.listing('methods', ABOUT)}\n\n{command_line.nets_and_data()}",
    )  # fmt: skip
    p.add_argument("--quick", action="store_true", help="try it: a small net on the digits of the package; a minute")
    frame.add_net_data_and_tune(p)
    p.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help="names of the list below (all)",
    )  # fmt: skip
    p.add_argument(
        "--directions", type=cli.count, nargs="+",
        help="with lance: directions of each layer's channels (8 24)",
    )  # fmt: skip
    p.add_argument(
        "--updates", nargs="+", choices=UPDATES, default=list(UPDATES),
        help="when weights change: after each image, or after a batch (both)",
    )  # fmt: skip
    p.add_argument("--batch", type=cli.count, help="images between two updates after a batch (128)")
    p.add_argument("--epochs", type=cli.count, help="passes over the images, where weights change after a batch (15)")
    p.add_argument(
        "--image-epochs", type=cli.count,
        help="passes over the images, where weights change after each image (5)",
    )  # fmt: skip
    p.add_argument(
        "--tuning-epochs", type=cli.count,
        help="passes to compare learning rates, where weights change after a batch; otherwise it is 1 (2)",
    )  # fmt: skip
    for update, rates in (("batch", "0.05 0.1 0.2"), ("image", "0.001 0.002 0.004")):
        p.add_argument(
            f"--{update}-rates", type=cli.positive, nargs="+", metavar="RATE",
            help=f"learning rates for updates after a{'n' if update[0] in 'i' else ''} {update} ({rates}); "
            "where the last at either end is best, the next is tried, half or twice as large",
        )  # fmt: skip
    p.add_argument("--clip", type=cli.positive, help="largest norm of the gradient of a batch (2.0)")
    p.add_argument("--no-clip", action="store_true", help="leave the gradient of a batch as it is")
    p.add_argument(
        "--budgets", type=cli.positive, nargs="+", metavar="KIB",
        help="RAM for which lance's programs are planned, too (160 200 256 320 512)",
    )  # fmt: skip
    p.add_argument("--seeds", type=cli.few, help="how often each method runs, with other random numbers each time (3)")
    p.add_argument("--calibration-batches", type=cli.count, help="batches on which lance finds its directions (4)")
    p.add_argument("--calibration-batch", type=cli.count, help="images of each of these batches (64)")
    p.add_argument("--train-images", type=cli.count, help="images to train on, spread over the classes (10000)")
    p.add_argument("--test-images", type=cli.count, help="images to test on (all)")
    cli.add_sweep(p, "runs/device")
    frame.add_outputs(p, "accuracy against RAM", table=True)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return command_line.run_command(parser, given, lambda options: _run(checked(options), given))


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """Defaults of the chosen size, and everything checked that can be before anything runs."""
    cli.fill_in(options, QUICK if options.quick else DEFAULTS)
    for name in ("methods", "directions", "updates", "batch_rates", "image_rates", "budgets"):
        cli.check_once(options, name)
    for name in ("directions", "calibration_batches", "calibration_batch", "budgets"):
        cli.check_effect(options, name, "lance" in options.methods, "--methods lance")
    cli.check_effect(options, "clip", not options.no_clip, "a run without --no-clip")
    for name in ("batch", "epochs", "tuning_epochs", "batch_rates", "clip", "no_clip"):
        cli.check_effect(options, name, "batch" in options.updates, "--updates batch")
    for name in ("image_epochs", "image_rates"):
        cli.check_effect(options, name, "image" in options.updates, "--updates image")
    cli.check_sweep(options)
    frame.settle(options, options.tune)
    return options


# ---- cells --------------------------------------------------------------------------------------

Key = tuple[str, int | None, str]
"""Method, directions and update: one row of the table."""


def keys(options: argparse.Namespace) -> list[Key]:
    """All rows, in the order of the table."""
    directions = {method: options.directions if method == "lance" else [None] for method in options.methods}
    variants = [(method, d) for method, of in directions.items() for d in of]
    return [(method, d, update) for update in options.updates for method, d in variants]


def train_cell(options: argparse.Namespace, key: Key, seed: int, lr: float, validation: bool = False) -> dict[str, Any]:
    """The arguments of one run."""
    method, directions, update = key
    by_image = update == "image"
    epochs = (
        (1 if by_image else options.tuning_epochs)
        if validation
        else (options.image_epochs if by_image else options.epochs)
    )
    return {
        **frame.net_and_data(options),
        "tune": options.tune,
        "method": method,
        "directions": directions,
        "update": update,
        "lr": lr,
        "seed": seed,
        "epochs": epochs,
        "batch": options.batch,
        "calibration_batches": options.calibration_batches,
        "calibration_batch": options.calibration_batch,
        "validation": validation,
        "folder": f"{options.folder}/frozen",
        **({} if by_image or options.no_clip else {"clip": options.clip}),
    }


def plan_cell(options: argparse.Namespace, key: Key, budget_kib: float | None = None) -> dict[str, Any]:
    """The arguments of one compilation."""
    method, directions, update = key
    classes, input_shape = _shape(options)
    return {
        "net": options.net,
        **({} if options.own is None else {"own": options.own}),
        "classes": classes,
        "input_shape": list(input_shape),
        "tune": options.tune,
        "method": method,
        "directions": directions,
        "update": update,
        "budget_kib": budget_kib,
    }


def _shape(options: argparse.Namespace) -> tuple[int, tuple[int, int, int]]:
    """The number of classes, and (C, H, W) of an image."""
    from experiments.finetune.cell import Setup

    setup = Setup.of({**frame.net_and_data(options), "tune": options.tune, "seed": 0})
    data = setup.images("train")
    return data.num_classes, setup.input_shape(data)


def swept_rates(options: argparse.Namespace) -> dict[Key, dict[float, float]]:
    """The accuracy of each row on held-out training images by learning rate, with seed 0.

    All of the grid is tried; a row that does best at its smallest or largest rate is tried at half or twice that, until
    it does not.
    """
    found: dict[Key, dict[float, float]] = {key: {} for key in keys(options)}
    grids = {"image": options.image_rates, "batch": options.batch_rates}
    trials = [(key, lr) for key in found for lr in sorted(grids[key[2]])]
    while trials:
        outcomes = frame.run_cells(
            options, [train_cell(options, key, 0, lr, validation=True) for key, lr in trials], TRAIN
        )
        for (key, lr), outcome in zip(trials, outcomes, strict=True):
            found[key][lr] = outcome["accuracy"]
        trials = [(key, lr) for key, tried in found.items() for lr in _next_rates(tried)]
    return found


def _next_rates(tried: dict[float, float]) -> list[float]:
    """The rate to try beside the best, where that is the last at either end.

    >>> _next_rates({1: 0.5, 2: 0.6}), _next_rates({1: 0.5, 2: 0.6, 4: 0.6}), _next_rates({1: 0.7, 2: 0.6})
    ([4], [], [0.5])
    """
    best = best_rate(tried)
    if list(tried.values()).count(tried[best]) > 1:  # another rate does as well: no smaller or larger one is wanted
        return []
    return [2 * best] * (best == max(tried)) + [best / 2] * (best == min(tried))


def best_rate(tried: dict[float, float]) -> float:
    """The rate with the highest accuracy; ties go to the smaller."""
    return max(sorted(tried), key=tried.__getitem__)


# ---- the command --------------------------------------------------------------------------------


def _run(options: argparse.Namespace, arguments: list[str]) -> None:
    from experiments.device.report import Row, draw, markdown, results, show
    from experiments.finetune.cell import prepare_data

    every = keys(options)
    origin = prepare_data(train_cell(options, every[0], 0, 1.0))
    plans = frame.run_cells(options, [plan_cell(options, key) for key in every], PLAN)
    untiled = frame.run_cells(options, [plan_cell(options, key, NO_LIMIT_KIB) for key in every], PLAN)
    lance = [key for key in every if key[0] == "lance"]
    tight = [(budget, key) for budget in options.budgets for key in lance]
    budgeted = (
        frame.run_cells(options, [plan_cell(options, key, budget) for budget, key in tight], PLAN) if tight else []
    )
    rates = swept_rates(options)
    best = {key: best_rate(tried) for key, tried in rates.items()}
    cells = [train_cell(options, key, seed, best[key]) for key in every for seed in range(options.seeds)]
    seeds = frame.by_seed(frame.run_cells(options, cells, TRAIN), options.seeds)
    rows = [Row(*key, best[key], rates[key], plans[i], untiled[i], seeds[i]) for i, key in enumerate(every)]
    fits: dict[float, dict[Key, dict[str, Any]]] = {budget: {} for budget in options.budgets if lance}
    for (budget, key), outcome in zip(tight, budgeted, strict=True):
        fits[budget][key] = outcome
    show(rows, fits)
    frame.write(
        options,
        lambda: results(rows, fits, vars(options), arguments, origin),
        lambda path: draw(rows, path, f"{options.net} on {options.data}, {options.tune}", options.batch),
        lambda: markdown(rows, fits, arguments),
    )


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
