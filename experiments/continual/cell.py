"""One cell of the experiment of continual learning: one learner and one seed through all tasks, measured, predicted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from analysis.reports.continual_costs import bill, predict
from analysis.steps.net_choice import NetChoice, Weights
from lance_ref import datasets
from lance_ref.continual import networks
from lance_ref.continual import scenario as scenarios
from lance_ref.continual.learners import LEARNERS, Recipe
from lance_ref.continual.protocol import run as learn
from lance_ref.continual.scenario import Scenario
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers

EVERY_STEPS = 2000
"""Steps between checkpoints inside a task."""


OWN_ARGUMENTS = ("data", "classes_per_task", "image_size", "channels", "mean", "std", "own")
"""Arguments of a cell that are there only with a net or with images of the user."""

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
    data |= {name: given.pop(name) for name in OWN_ARGUMENTS if name in given}
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
    **own: Any,
) -> tuple[Module, Scenario]:  # fmt: skip
    """Network and tasks of a cell. ``tasks`` and the numbers of images are upper limits; None means all.

    ``own`` are arguments of :data:`OWN_ARGUMENTS`.

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
    module, chosen, _ = network_and_tasks(scenario, net, seed, tasks, train_images, test_images, **own)
    return module, chosen


def network_and_tasks(
    scenario: str,
    net: str,
    seed: int,
    tasks: int | None,
    train_images: int | None,
    test_images: int | None,
    data: str | None = None,
    classes_per_task: int = 2,
    image_size: int | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    own: str | None = None,
) -> tuple[Module, Scenario, Weights]:
    """As :func:`prepare`, for any net and for images of the user; and where the weights came from.

    Images are normalised as pretrained weights expect, or by ``mean`` and ``std``, else by mean and standard deviation
    of the training images.
    """
    choice = NetChoice(net)
    channels = choice.channels if channels is None else channels
    if data is None:
        chosen = _scenario(scenario, seed)
    else:
        size = choice.image_size if image_size is None else image_size
        chosen = _own_scenario(data, classes_per_task, size, channels)
    normalise, how = choice.normalise(mean, std)
    if mean is not None or choice.pretrained is not None:
        about = f"{chosen.about.partition('; x = ')[0]}; {how}"
        chosen = replace(chosen, convert=normalise, about=about)
    chosen = chosen.limited(tasks, train_images, test_images)
    if net in networks.NETWORKS:
        module = networks.make(net, chosen, seed)
        return module, chosen, choice.origin(module)
    module, weights = choice.make(max(chosen.heads), chosen.input_shape, seed)
    networks.with_heads(module, chosen, np.random.default_rng(seed))
    return module, chosen, weights


@lru_cache(maxsize=2)  # a process runs many cells on the same images
def _own_scenario(data: str, classes_per_task: int, image_size: int | None, channels: int | None) -> Scenario:
    """The user's images as tasks of consecutive classes, the same number of classes in each."""
    parts = [datasets.open_data(data, split, image_size, None, channels) for split in ("train", "test")]
    if image_size is not None:
        parts = [replace(part, images=datasets.resize(part.images, image_size)) for part in parts]
    train, test = parts
    if train.num_classes % classes_per_task:
        raise ValueError(
            f"--classes-per-task is {classes_per_task}, but {train.name} has {train.num_classes} classes, expected a "
            "number that divides them"
        )
    pixels = train.images.reshape(-1, train.images.shape[3]) / 255
    mean, std = (tuple(round(float(x), 4) for x in of) for of in (pixels.mean(axis=0), pixels.std(axis=0)))
    if min(std) <= 0:
        raise ValueError(f"{train.name} has a channel in which all pixels are equal: give --mean and --std")
    return scenarios.split("own", train, test, train.num_classes // classes_per_task, (mean, std))


@lru_cache(maxsize=2)  # a process runs many cells on the same images
def _scenario(name: str, seed: int) -> Scenario:
    return scenarios.load(name, seed)
