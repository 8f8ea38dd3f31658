"""Checkpoints of earlier versions stay readable: both files were written before the two training loops became one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lance_ref import datasets, fit, manual_seed, nn, optim
from lance_ref.continual import networks
from lance_ref.continual import scenario as scenarios
from lance_ref.continual.learners import LEARNERS, Recipe
from lance_ref.continual.protocol import run
from lance_ref.nn.module import Module
from lance_ref.stores import Asi

DATA = Path(__file__).parents[1] / "data"
STOPPED = 3
"""Steps that lie behind each of the two checkpoints, which are inside an epoch."""


def train(path: Path, on_step: Any = None) -> tuple[Any, Module]:
    """Two epochs of two steps: convolution, batch norm, dropout, momentum and a store with a warm start."""
    manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, rng=0), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1, rng=3),
        nn.Linear(72, 10, rng=1),
    )  # fmt: skip
    net[0].store = Asi((4, 1, 3, 3))
    result = fit(
        net, datasets.load_digits(limit=64), epochs=2, batch_size=32, checkpoint=path, checkpoint_every_steps=1,
        optimizer=lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9), on_step=on_step, progress=False,
    )  # fmt: skip
    return result, net


def learn(path: Path, on_step: Any = None) -> tuple[Any, Module]:
    """Two tasks of four steps with LANCE; the checkpoint is of the second task."""
    scenario = scenarios.load("split-digits").limited(tasks=2, train=40, test=20)
    net: Any = networks.make("mlp", scenario, 0)
    net.features = nn.Sequential(nn.Linear(64, 6, bias=False, rng=0), nn.ReLU(), nn.Dropout(0.2, rng=2))
    net.classifier = networks.TaskHeads(6, scenario.heads, 1)
    recipe = Recipe(lr=0.1, momentum=0.5, basis_samples=40, thresholds=(0.8,), epsilon=0.9)
    learner = LEARNERS["lance"](net, scenario, recipe)
    return run(learner, checkpoint=path, every_steps=1, on_step=on_step, progress=False), net


def test_a_run_of_fit_goes_on(tmp_path: Path) -> None:
    """Position, weights, momentum, warm starts and random states are taken up, and no step is run twice."""
    shutil.copy(DATA / "checkpoint_fit.npz", tmp_path / "run.npz")
    steps: list[int] = []
    result, net = train(tmp_path / "run.npz", lambda info: steps.append(info.step))
    whole, other = train(tmp_path / "whole.npz")
    assert steps == [STOPPED]
    np.testing.assert_allclose([row["loss"] for row in result.history], [row["loss"] for row in whole.history], 1e-4)
    for name, array in net.state_dict().items():
        np.testing.assert_allclose(array, other.state_dict()[name], atol=1e-4)


def test_a_run_of_continual_learning_goes_on(tmp_path: Path) -> None:
    """Protected directions, the start of the task, momentum and random states are taken up."""
    shutil.copy(DATA / "checkpoint_continual.npz", tmp_path / "run.npz")
    steps: list[tuple[int, int]] = []
    result, net = learn(tmp_path / "run.npz", lambda task, step: steps.append((task, step)))
    whole, other = learn(tmp_path / "whole.npz")
    assert steps == [(1, STOPPED)]
    np.testing.assert_allclose(result.R, whole.R, atol=0.051)
    for name, array in net.state_dict().items():
        np.testing.assert_allclose(array, other.state_dict()[name], atol=1e-4)
