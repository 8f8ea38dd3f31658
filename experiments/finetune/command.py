"""Fine-tune one network with every method, on the same batches: ``python -m experiments.finetune --quick``.

The table has a row for each method: accuracy over seeds; bytes that are kept between forward and backward pass,
predicted and measured; multiply-adds by kind; time compared with backpropagation; and the angle between its weight
gradients and the exact ones. --net and --data take a network and images of yours.

A finished run of one method and seed is kept in --folder and never runs again, so that a stopped command can continue.

    lance-ref finetune --quick
    lance-ref finetune --net mynets:net --data pictures/ --methods bp lance
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from analysis.commands import cli, command_line
from experiments import frame

CELL = "experiments.finetune.cell:run"
PAPERS_LR = 0.05
QUICK = {
    "net": "convnet", "data": "digits", "tune": "last:2", "epochs": 8, "batch": 32, "image_size": None,
    "calibration_batches": 20, "lr": 0.2, "seeds": 1, "budget_kib": 8.0, "recipe": ["papers"],
}  # fmt: skip
"""What --quick stands for, where an option is not given."""

DEFAULTS = {
    "net": "mcunet", "data": "cifar10", "tune": "last:4", "epochs": 15, "batch": 128, "image_size": None,
    "calibration_batches": 100, "lr": PAPERS_LR, "seeds": 3, "budget_kib": 200.0, "recipe": ["papers"],
}  # fmt: skip
MODES = ("batch", "channel", "height", "width")


def parser() -> argparse.ArgumentParser:
    from analysis.steps.register import add_settings
    from experiments.finetune.methods import methods

    known = methods()
    about = command_line.listing("methods", {name: of.about for name, of in known.items()})
    p = frame.parser("experiments.finetune", __doc__, epilog=f"{about}\n\n{command_line.nets_and_data()}")
    p.add_argument("--quick", action="store_true", help="try it: a small net on the digits of the package; a minute")
    frame.add_net_data_and_tune(p)
    p.add_argument(
        "--methods", "--method", nargs="+", default=list(known), metavar="METHOD",
        help="names of the list below; lance@0.9 sets the first number that a method has, here --epsilon (all)",
    )  # fmt: skip
    p.add_argument(
        "--recipe", nargs="+", choices=["papers", "tuned"],
        help="papers: one learning rate for all methods; tuned: for each its own best of --lr-grid (papers)",
    )  # fmt: skip
    add_settings(p, known, later=DEFAULTS)
    p.add_argument(
        "--modes", type=cli.name_of(lambda: MODES), nargs="+", default=list(MODES), metavar="MODE",
        help="sizes of the activations that LANCE compresses: batch, channel, height, width (all four)",
    )  # fmt: skip
    p.add_argument("--seeds", type=cli.few, help="how often each method runs, with other random numbers each time (3)")
    p.add_argument("--epochs", type=cli.count, help="passes over the training images (15)")
    p.add_argument("--batch", type=cli.count, help="images of one training step (128)")
    p.add_argument(
        "--chunk", type=cli.chunk,
        help="images that run at a time, or auto, where the step stays the same (the whole batch)",
    )  # fmt: skip
    p.add_argument("--lr", type=cli.positive, help="learning rate of --recipe papers (0.05)")
    p.add_argument(
        "--lr-grid", type=cli.positive, nargs="+", default=[0.05, 0.1, 0.2],
        help="learning rates that --recipe tuned tries; where the largest is best, twice as much is tried too "
        "(0.05 0.1 0.2)",
    )  # fmt: skip
    p.add_argument(
        "--tuning-epochs", type=cli.count, default=5,
        help="with --recipe tuned: passes over the images for comparing learning rates (5)",
    )  # fmt: skip
    p.add_argument("--clip", type=cli.positive, default=2.0, help="longer gradients are shortened to this length (2.0)")
    p.add_argument(
        "--calibration-batches", type=cli.count,
        help="batches on which LANCE finds its directions, or all there are (100)",
    )  # fmt: skip
    p.add_argument("--train-images", type=cli.count, help="images to train on, spread over the classes (all)")
    p.add_argument("--test-images", type=cli.count, help="images to test on (all)")
    cli.add_sweep(p, "runs/finetune")
    frame.add_outputs(p, "accuracy against bytes", table=True)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return command_line.run_command(parser, given, lambda options: _run(checked(options), given))


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """Defaults of the chosen size, and everything checked that can be before anything runs."""
    from experiments.finetune.methods import all_settings, methods

    cli.fill_in(options, QUICK if options.quick else DEFAULTS)
    known, own = methods(), [own_settings(spec) for spec in options.methods]
    for name in ("methods", "recipe", "modes", "lr_grid"):
        cli.check_once(options, name)
    tuned = "tuned" in options.recipe
    cli.check_effect(options, "lr", "papers" in options.recipe, "--recipe papers")
    cli.check_effect(options, "lr_grid", tuned, "--recipe tuned")
    cli.check_effect(options, "tuning_epochs", tuned, "--recipe tuned")
    cli.check_sweep(options)
    with_modes = [name for name, of in known.items() if of.modes]
    open_modes = any(settings["method"] in with_modes for settings in own)
    cli.check_effect(options, "modes", open_modes, f"a method of {', '.join(with_modes)}")
    for name, setting in all_settings().items():
        takers = [method for method, of in known.items() if setting in of.settings]
        effective = any(settings["method"] in takers and name not in settings for settings in own)
        cli.check_effect(options, name, effective, f"a method of {', '.join(takers)}, without a value of its own")
    frame.settle(options, options.tune)
    return options


def own_settings(spec: str) -> dict[str, Any]:
    """``lance@0.8`` as ``{"method": "lance", "epsilon": 0.8}``.

    >>> own_settings("asi@50")
    {'method': 'asi', 'budget_kib': 50.0}
    """
    from experiments.finetune.methods import methods

    known = methods()
    method, at, value = spec.partition("@")
    if method not in known:
        raise ValueError(f"unknown method {method!r}, expected some of {', '.join(known)}")
    if not at:
        return {"method": method}
    if not known[method].settings:
        takers = ", ".join(name for name, of in known.items() if of.settings)
        raise ValueError(f"method {spec!r}: {method} takes no value; these do: {takers}")
    setting = known[method].settings[0]
    try:
        return {"method": method, setting.name: setting.check(value)}
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"method {spec!r}: {setting.name} {error}") from None


def cell(options: argparse.Namespace, spec: str, seed: int, lr: float, validation: bool = False) -> dict[str, Any]:
    """The arguments of one run."""
    from experiments.finetune.methods import all_settings

    return {
        **frame.net_and_data(options),
        **{name: getattr(options, name) for name in ("tune", "batch", "calibration_batches", "clip")},
        "lr": lr,
        "seed": seed,
        "epochs": options.tuning_epochs if validation else options.epochs,
        "modes": list(options.modes),
        # what has no value is left out, so that cells of before keep their names
        **({} if options.chunk is None else {"chunk": options.chunk}),
        **{name: getattr(options, name) for name in all_settings() if getattr(options, name) is not None},
        "validation": validation,
        "folder": f"{options.folder}/frozen",
        **own_settings(spec),
    }


def _run(options: argparse.Namespace, arguments: list[str]) -> None:
    from experiments.finetune.cell import prepare_data
    from experiments.finetune.report import Row, draw, markdown, results, show

    # The data are opened once here: what is wrong with them is said once, and the frozen outputs are kept.
    for validation in sorted({recipe == "tuned" for recipe in options.recipe} | {False}, reverse=True):
        origin = prepare_data(cell(options, options.methods[0], 0, options.lr, validation))
    rows: list[Row] = []
    for recipe in options.recipe:
        rates = best_rates(options) if recipe == "tuned" else dict.fromkeys(options.methods, options.lr)
        cells = [cell(options, spec, seed, rates[spec]) for spec in options.methods for seed in range(options.seeds)]
        expected = frame.expected_seconds(options, options.epochs, origin["images"]["count"])
        groups = frame.by_seed(frame.run_cells(options, cells, CELL, expected), options.seeds)
        rows += [Row(recipe, spec, rates[spec], seeds) for spec, seeds in zip(options.methods, groups, strict=True)]
    show(rows, origin)
    frame.write(
        options,
        lambda: results(rows, vars(options), arguments, origin),
        lambda path: draw(rows, path, f"{options.net} on {options.data}, {options.tune}"),
        lambda: markdown(rows, arguments, origin),
    )


def best_rates(options: argparse.Namespace) -> dict[str, float]:
    """The learning rate of each method that is best on held-out training images, seed 0; ties go to the smaller one.

    All of the grid is tried; a method that does best at its largest rate is tried at twice that, until it does not.
    """
    found: dict[str, dict[float, float]] = {spec: {} for spec in options.methods}
    trials = [(spec, lr) for spec in options.methods for lr in sorted(options.lr_grid)]
    best: dict[str, float] = {}
    while trials:
        cells = [cell(options, spec, 0, lr, validation=True) for spec, lr in trials]
        outcomes = frame.run_cells(options, cells, CELL)
        for (spec, lr), outcome in zip(trials, outcomes, strict=True):
            found[spec][lr] = outcome["accuracy"]
        best = {spec: max(sorted(tried), key=tried.__getitem__) for spec, tried in found.items()}
        trials = [(spec, 2 * lr) for spec, lr in best.items() if lr == max(found[spec])]
    return best


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
