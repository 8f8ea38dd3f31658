"""A run of continual learning that can be killed: ``continual_resume_case.py learner run.npz result.json [t s]``.

With task and step it kills itself by SIGKILL before that step, which runs no handler and closes nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from lance_ref import nn
from lance_ref.continual import networks
from lance_ref.continual import scenario as scenarios
from lance_ref.continual.learners import LEARNERS, Learner, Recipe
from lance_ref.continual.protocol import Result, run
from lance_ref.continual.scenario import Scenario
from lance_ref.nn.module import Module

STEPS = 2 * 4
"""Of each task: two epochs of four batches."""

RECIPE: dict[str, Any] = {
    "epochs": 2, "batch_size": 10, "lr": 0.1, "momentum": 0.5, "seed": 1, "basis_samples": 40, "memory": 12,
    "thresholds": (0.8,), "epsilon": 0.9,
}  # fmt: skip


def small(name: str = "split-digits", tasks: int = 3) -> Scenario:
    """A few digits in each task."""
    return scenarios.load(name).limited(tasks=tasks, train=43, test=30)


def norm_net(scenario: Scenario) -> Module:
    """Biases, dropout, and batch norm that keeps no running statistics, as in the AlexNet of continual learning."""
    net = networks.make("mlp", scenario, 0)
    net.features = nn.Sequential(
        nn.Linear(64, 20, rng=0), nn.BatchNorm1d(20, track_running_stats=False), nn.ReLU(), nn.Dropout(0.2, rng=2),
        nn.Linear(20, 100, rng=1), nn.ReLU(),
    )  # fmt: skip
    return net


def learner(name: str, scenario: Scenario | None = None, net: Module | None = None, **changes: Any) -> Learner:
    """Of the small scenario, with a fresh network."""
    scenario = small() if scenario is None else scenario
    net = networks.make("mlp", scenario, 0) if net is None else net
    return LEARNERS[name](net, scenario, Recipe(**{**RECIPE, **changes}))


def train(
    name: str, checkpoint: str | None = None, on_step: Callable[[int, int], Any] | None = None, **changes: Any
) -> tuple[Result, Learner]:
    """The run with its checkpoints, and the learner after it."""
    scenario = small()
    made = learner(name, scenario, norm_net(scenario), **changes)
    return run(made, checkpoint=checkpoint, every_steps=3, on_step=on_step, progress=False), made


def timeless(result: Result) -> dict[str, Any]:
    """The result without what a clock says."""
    tasks = [{name: value for name, value in task.items() if name != "seconds"} for task in result.tasks]
    return {"R": result.R.tolist(), "b": result.baseline.tolist(), "tasks": tasks}


if __name__ == "__main__":
    name, path, output, *moment = sys.argv[1:]

    def die(task: int, step: int) -> None:
        if moment == [str(task), str(step)]:
            os.kill(os.getpid(), signal.SIGKILL)

    outcome, _ = train(name, path, die)
    with open(output, "w") as file:
        json.dump(timeless(outcome), file)
