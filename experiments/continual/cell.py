"""One cell of the experiment of continual learning: one learner and one seed through all tasks, measured, predicted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from analysis.reports.continual_costs import bill, predict
from lance_ref.continual import networks
from lance_ref.continual import scenario as scenarios
from lance_ref.continual.learners import LEARNERS, Recipe
from lance_ref.continual.protocol import run as learn
from lance_ref.continual.scenario import Scenario
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers

EVERY_STEPS = 2000
"""Steps between checkpoints inside a task."""


RECIPE = {"batch": "batch_size", "clip": "clip_norm", "eval_batch": "eval_batch_size"}
"""Arguments of a cell that have another name in :class:`lance_ref.continual.learners.Recipe`."""


def run(learner: str, folder: str, seed: int, thresholds: Sequence[float], **given: Any) -> dict[str, Any]:
    """Learn all tasks of a scenario; all arguments are JSON, and so is the result.

    Learners that are given the same other arguments start from the same weights and see the same batches.

    Parameters
    ----------
    learner : str
        One of :data:`lance_ref.continual.learners.LEARNERS`.
    folder : str
        Where a checkpoint is kept while the cell runs, named after all arguments; "" keeps none.
    seed, thresholds, **given
        The arguments of :func:`prepare`, and the numbers of :class:`lance_ref.continual.learners.Recipe`.
    """
    arguments = {"learner": learner, "seed": seed, "thresholds": list(thresholds), **given}
    data = {name: given.pop(name) for name in ("scenario", "net", "tasks", "train_images", "test_images")}
    module, chosen = prepare(**data, seed=seed, folder=folder)
    numbers = {RECIPE.get(name, name): value for name, value in given.items()}
    recipe = Recipe(seed=seed, thresholds=tuple(thresholds), **numbers)
    made = LEARNERS[learner](module, chosen, recipe)
    checkpoint = None
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # by all arguments: another learning rate is another run, with a checkpoint of its own
        told_apart = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:16]
        checkpoint = Path(folder) / f"{data['scenario']}-{learner}-{seed}-{told_apart}.checkpoint.npz"
    result = learn(
        made, bill=bill, checkpoint=checkpoint, every_steps=EVERY_STEPS, settings={"net": data["net"]}, progress=False
    )
    outputs = {path: layer.weight.shape[0] for path, layer in weighted_layers(module).items()}
    for t, task in enumerate(result.tasks):
        task["predicted"] |= predict(learner, t, result.tasks, chosen, recipe, outputs)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return {
        "accuracy": result.R.tolist(),
        "baseline": result.baseline.tolist(),
        "metrics": result.metrics.as_dict(),
        "tasks": result.tasks,
        "about": chosen.about,
    }


def prepare(
    scenario: str,
    net: str,
    seed: int,
    tasks: int | None,
    train_images: int | None,
    test_images: int | None,
    folder: str,
) -> tuple[Module, Scenario]:  # fmt: skip
    """Network and tasks of a cell: at most so many tasks, and images of each; None leaves all.

    Raises
    ------
    ValueError, OSError
        If a name is unknown, a file is missing or damaged, or the network does not take the images.
    """
    if scenario == "domains":
        if net != networks.DEFAULT_NETWORK["domains"]:
            raise ValueError(f"--net is {net!r}, but the scenario domains has a network of its own")
        frozen = f"{folder}/frozen" if folder else None
        module, chosen = networks.domains(seed=seed, train=train_images, test=test_images, folder=frozen)
        return module, chosen.limited(tasks)
    chosen = _scenario(scenario, seed).limited(tasks, train_images, test_images)
    return networks.make(net, chosen, seed), chosen


@lru_cache(maxsize=2)  # a process runs many cells on the same images
def _scenario(name: str, seed: int) -> Scenario:
    return scenarios.load(name, seed)
