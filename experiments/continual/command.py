"""Learn one task after the other with every learner: ``python -m experiments.continual --quick``.

The table has a row for each learner: accuracy at the end, forgetting and transfer, over seeds; bytes in RAM and in
flash, predicted and measured; multiply-adds of the steps and between tasks. All learners start from the same weights
and see the same batches.

A finished run of one learner and seed is kept in --folder and never runs again. A run that was stopped continues where
it stopped.

    lance-ref continual --quick
    lance-ref continual --data pictures/ --net mynets:net --seeds 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from analysis.commands import cli, command_line
from experiments import frame

CELL = "experiments.continual.cell:run"
ABOUT = {
    "finetune": "keeps training on each next task; nothing protects the earlier ones",
    "gpm": "takes out of every gradient what earlier tasks need (gradient projection memory)",
    "lance": "LANCE in directions outside of those that earlier tasks need",
    "lance-no-batch": "the same, the batch left uncompressed",
    "head-only": "the first task trains the whole net, later ones their own classifiers",
    "joint": "trains on the images of all tasks so far: an upper bound, which keeps all images",
    "er": "keeps a few images of earlier tasks and trains on them too (experience replay)",
}
"""Every learner in a few words."""
THRESHOLDS = {"threshold": "thresholds"}
"""The option that has another name in :class:`lance_ref.continual.learners.Recipe`."""

MLP = {
    "epochs": 5, "batch": 10, "lr": 0.01, "basis_samples": 300, "threshold": [0.95, 0.99, 0.99], "threshold_step": 0.0,
    "epsilon": 0.95, "memory": 200, "eval_batch": 500, "clip": None,
}  # fmt: skip
"""The recipe of GPM's authors for their MLP (Saha et al., ICLR 2021)."""

IMAGES = {
    **MLP, "epochs": 10, "batch": 64, "lr": 0.01, "basis_samples": 320, "threshold": [0.97], "threshold_step": 0.003,
    "eval_batch": 64,
}  # fmt: skip
OWN = "own"
"""The scenario that ``--data`` makes."""
DIGITS = {**MLP, "lr": 0.05, "memory": 50}

DEFAULTS: dict[str, dict[str, Any]] = {
    "split-digits": {**DIGITS, "threshold": [0.95]},
    "permuted-digits": {**DIGITS, "threshold": [0.95]},
    "split-mnist": {**MLP, "threshold": [0.95, 0.99], "epochs": 1},
    "permuted-mnist": MLP,
    "split-cifar10": IMAGES,
    "split100": IMAGES,
    "split-cifar100": IMAGES,
    "domains": {
        **IMAGES, "batch": 32, "lr": 0.05, "clip": 2.0, "threshold": [0.95], "threshold_step": 0.0,
        "basis_samples": 256,
    },
    OWN: {**IMAGES, "batch": 32, "basis_samples": 100, "threshold": [0.95], "threshold_step": 0.0},
}  # fmt: skip
"""Values of the options that are not given, by scenario."""

QUICK = {"seeds": 1, "train_images": 150, "test_images": 60, "epochs": 5}


def parser() -> argparse.ArgumentParser:
    from lance_ref.continual.learners import LEARNERS
    from lance_ref.continual.metrics import DEFINITIONS

    defined = "R[t, i]: accuracy on task i after task t, of T tasks. " + ". ".join(DEFINITIONS.values())
    learners = command_line.listing("learners", ABOUT)
    p = frame.parser(
        "experiments.continual", __doc__, epilog=f"{learners}\n\n{defined}.\n\n{command_line.nets_and_data()}"
    )
    named = [name for name in DEFAULTS if name != OWN]
    p.add_argument(
        "--scenario", type=cli.name_of(lambda: named), default="split-digits",
        help=f"tasks by name, one of {', '.join(named)} (split-digits)",
    )  # fmt: skip
    p.add_argument(
        "--data", type=cli.data_set,
        help=f"images of yours, in place of --scenario; each task has a few of their classes. {cli.DATA_HELP}",
    )  # fmt: skip
    p.add_argument("--classes-per-task", type=cli.integer(2, 1000), metavar="N", help="with --data: classes a task (2)")
    p.add_argument("--quick", action="store_true", help="try it: few images of each task, one seed; a minute")
    p.add_argument(
        "--learners", type=cli.name_of(lambda: LEARNERS), nargs="+", default=list(LEARNERS), metavar="LEARNER",
        help="names of the list below (all)",
    )  # fmt: skip
    default = "mlp for digits and mnist, convnet for --data, mcunet for domains, else alexnet-cl"
    nets = f"{cli.NET_HELP}. Where tasks have heads of their own, these replace its last layer ({default})"
    p.add_argument("--net", type=cli.any_net, help=nets)
    p.add_argument("--image-size", type=cli.pixels, help="with --data: height and width in pixels (as they are)")
    cli.add_pixels(p)
    p.add_argument("--seeds", type=cli.few, help="how often each learner runs, with other random numbers each time (5)")
    p.add_argument("--tasks", type=cli.integer(2, 10_000), help="number of tasks to learn, from the first on (all)")
    p.add_argument("--epochs", type=cli.count, help="passes over the images of each task (the scenario's)")
    p.add_argument("--batch", type=cli.count, help="images of one training step (the scenario's)")
    p.add_argument("--lr", type=cli.positive, help="learning rate (the scenario's)")
    p.add_argument("--momentum", type=cli.share_below_one, default=0.0, help="momentum of the optimiser, SGD (0)")
    p.add_argument("--clip", type=cli.positive, help="longer gradients are shortened to this length (none; domains 2)")
    p.add_argument(
        "--train-images", type=cli.count,
        help="images to train on in each task, spread over its classes (all)",
    )  # fmt: skip
    p.add_argument("--test-images", type=cli.count, help="images to test on in each task (all)")
    p.add_argument(
        "--threshold", type=cli.share, nargs="+",
        help="for gpm and lance: share of the squared values of earlier tasks that is protected, one or one a layer "
        "(the scenario's)",
    )  # fmt: skip
    p.add_argument(
        "--threshold-step", type=cli.share_below_one,
        help="what is added to --threshold with each task (the scenario's)",
    )  # fmt: skip
    p.add_argument(
        "--epsilon", type=cli.share,
        help="for lance: share of the squared values that a task's directions keep (0.95)",
    )  # fmt: skip
    p.add_argument(
        "--update", choices=["weight", "subspace"], default="weight",
        help="for lance: what trains, weights or their coordinates in the task's directions (weight)",
    )  # fmt: skip
    p.add_argument(
        "--basis-samples", type=cli.count,
        help="for gpm and lance: images from which directions are found (the scenario's)",
    )  # fmt: skip
    p.add_argument(
        "--memory", type=cli.count,
        help="for er: images that are kept of all tasks together (the scenario's)",
    )  # fmt: skip
    p.add_argument("--eval-batch", type=cli.count, help="images at a time where nothing is learned (the scenario's)")
    cli.add_sweep(p, "runs/continual", "finished and stopped runs")
    frame.add_outputs(p, "matrices of accuracy and the first task over time", table=True)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return command_line.run_command(parser, given, lambda options: _run(checked(options), given))


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """Defaults of the scenario, and everything checked that can be before anything runs."""
    from lance_ref.continual.learners import LEARNERS
    from lance_ref.continual.networks import DEFAULT_NETWORK

    if options.data is not None:
        cli.check_no_effect(options, ("scenario",), "--data has tasks of its own")
        options.scenario = OWN
    for name in ("classes_per_task", "image_size"):
        cli.check_effect(options, name, options.data is not None, "--data")
    cli.check_no_effect(
        options, ("channels", "mean", "std") if options.scenario == "domains" else (), "domains has its own"
    )
    defaults = {"net": DEFAULT_NETWORK.get(options.scenario, "convnet"), "seeds": 5, **DEFAULTS[options.scenario]}
    cli.fill_in(options, {**defaults, **QUICK} if options.quick else defaults)
    cli.check_once(options, "learners")
    cli.check_sweep(options)
    options.own = frame.own_mark(options.net, "digits" if options.data is None else options.data)
    for name in ("memory", "epsilon", "update", "threshold", "threshold_step", "basis_samples"):
        heeding = [learner.name for learner in LEARNERS.values() if THRESHOLDS.get(name, name) in learner.heeds]
        takes = f"the learner {heeding[0]}" if len(heeding) == 1 else f"a learner of {', '.join(heeding)}"
        cli.check_effect(options, name, bool(set(heeding) & set(options.learners)), takes)
    return options


def cell(options: argparse.Namespace, learner: str, seed: int) -> dict[str, Any]:
    """The arguments of one run."""
    from experiments.continual.cell import OWN_ARGUMENTS

    names = (
        "scenario", "net", "tasks", "train_images", "test_images", "epochs", "batch", "lr", "momentum", "clip",
        "epsilon", "threshold_step", "basis_samples", "memory", "eval_batch",
    )  # fmt: skip
    return {
        **{name: getattr(options, name) for name in names},
        "thresholds": options.threshold,
        # left out where it is the default, so that cells of before keep their names
        **({} if options.update == "weight" else {"update": options.update}),
        **{name: getattr(options, name) for name in OWN_ARGUMENTS if getattr(options, name) is not None},
        "learner": learner,
        "seed": seed,
        "folder": f"{options.folder}/running",
    }


def _run(options: argparse.Namespace, arguments: list[str]) -> None:
    from experiments.continual.report import Row, draw, markdown, results, show

    cells = [cell(options, learner, seed) for learner in options.learners for seed in range(options.seeds)]
    about, images, origin = _check(cells[0])
    title = f"{options.scenario}: {about}. {_recipe(options)}"
    groups = frame.by_seed(frame.run_cells(options, cells, CELL), options.seeds)
    rows = [Row(learner, seeds) for learner, seeds in zip(options.learners, groups, strict=True)]
    show(rows, title, images)
    frame.write(
        options,
        lambda: results(rows, vars(options), arguments, origin),
        lambda path: draw(rows, path, f"{options.scenario}, {options.net}, {options.seeds} seed(s)"),
        lambda: markdown(rows, title, arguments, images),
    )


def _check(arguments: dict[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """Open the data once here, so that what is wrong with it is said once, in one line.

    Returns
    -------
    (str, int, dict)
        What the scenario is, the test images of all its tasks, and where weights and images came from.
    """
    from experiments.continual.cell import OWN_ARGUMENTS, network_and_tasks, prepare
    from lance_ref import datasets
    from lance_ref.continual.networks import body_layers

    names = ("scenario", "net", "seed", "tasks", "train_images", "test_images", "folder")
    given = {name: arguments[name] for name in (*names, *OWN_ARGUMENTS) if name in arguments}
    origin: dict[str, Any] = {}
    if arguments["scenario"] == "domains":
        net, scenario = prepare(**given)
    else:
        del given["folder"]
        net, scenario, weights = network_and_tasks(**given)
        origin["weights"] = asdict(weights)
    if "data" in arguments:
        origin["images"] = {"data": arguments["data"], "sha256": datasets.checksum(arguments["data"])}
    layers, given = body_layers(net), arguments["thresholds"]
    if len(given) not in (1, len(layers)):
        raise ValueError(f"--threshold has {len(given)} numbers, expected 1 or {len(layers)}: {', '.join(layers)}")
    smallest = min(len(task.train) for task in scenario.tasks)
    if arguments["batch"] > smallest:
        raise ValueError(f"--batch is {arguments['batch']}, but a task has {smallest} training images")
    if len(scenario) < 2:
        raise ValueError(f"{arguments['scenario']} has {len(scenario)} task(s), expected at least 2")
    return scenario.about, sum(len(task.test) for task in scenario.tasks), origin


def _recipe(options: argparse.Namespace) -> str:
    return (
        f"{options.net}, {options.epochs} epoch(s) a task, batch {options.batch}, SGD with lr {options.lr:g} and "
        f"momentum {options.momentum:g}; thresholds {' '.join(f'{value:g}' for value in options.threshold)} "
        f"(+{options.threshold_step:g} a task), epsilon {options.epsilon:g}"
    )


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
