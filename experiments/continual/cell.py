"""One cell of the experiment of continual learning: one learner and one seed through all tasks, measured, predicted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

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


def run(
    scenario: str,
    learner: str,
    seed: int,
    net: str,
    tasks: int | None,
    train_images: int | None,
    test_images: int | None,
    epochs: int,
    batch: int,
    lr: float,
    momentum: float,
    clip: float | None,
    thresholds: Sequence[float],
    threshold_step: float,
    epsilon: float,
    basis_samples: int,
    memory: int,
    eval_batch: int,
    folder: str,
    update: str = "weight",
) -> dict[str, Any]:
    """Learn all tasks of a scenario; all arguments are JSON, and so is the result.

    Learners that are given the same other arguments start from the same weights and see the same batches.

    Parameters
    ----------
    scenario, learner, net : str
        Names: of :func:`prepare`'s scenarios, of :data:`lance_ref.continual.learners.LEARNERS`, of a network.
    tasks, train_images, test_images : int or None
        At most so many tasks, and images of each; None: all.
    thresholds, threshold_step, basis_samples, epsilon, memory, update
        As in :class:`lance_ref.continual.learners.Recipe`.
    folder : str
        Where a checkpoint is kept while the cell runs, named after all arguments; "" keeps none.
    """
    arguments = {name: value for name, value in locals().items() if name != "folder"}
    module, chosen = prepare(scenario, net, seed, tasks, train_images, test_images, folder)
    recipe = Recipe(
        epochs=epochs, batch_size=batch, lr=lr, momentum=momentum, clip_norm=clip, seed=seed,
        eval_batch_size=eval_batch, basis_samples=basis_samples, thresholds=tuple(thresholds),
        threshold_step=threshold_step, epsilon=epsilon, memory=memory, update=update,
    )  # fmt: skip
    made = LEARNERS[learner](module, chosen, recipe)
    checkpoint = None
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # by all arguments: another learning rate is another run, with a checkpoint of its own
        told_apart = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:16]
        checkpoint = Path(folder) / f"{scenario}-{learner}-{seed}-{told_apart}.checkpoint.npz"
    result = learn(
        made, bill=bill, checkpoint=checkpoint, every_steps=EVERY_STEPS, settings={"net": net}, progress=False
    )
    outputs = {path: layer.weight.shape[0] for path, layer in weighted_layers(module).items()}
    seen = [predict(learner, t, result.tasks, chosen, recipe, outputs) for t in range(len(chosen))]
    for task, foretold in zip(result.tasks, seen, strict=True):
        task["predicted"] |= foretold
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return {
        "accuracy": np.asarray(result.R).tolist(),
        "baseline": np.asarray(result.baseline).tolist(),
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
) -> tuple[Module, Scenario]:
    """Network and tasks of a cell.

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
