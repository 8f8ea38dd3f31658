"""What a learner is: the interface, the numbers of a run, and fine-tuning, which keeps nothing and does nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lance_ref.continual.networks import body_layers
from lance_ref.continual.scenario import Samples, Scenario
from lance_ref.lance.compression import UPDATES
from lance_ref.nn.module import Module
from lance_ref.optim import Optimizer
from lance_ref.train.run import Pass

Stream = Callable[[int], list[Pass]]
"""The passes of each step of one epoch, by its position."""


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run, the same for all learners.

    Attributes
    ----------
    epochs : int
        Per task.
    batch_size : int
        Images a step; an odd rest of an epoch is left out.
    lr, momentum : float
        Of SGD, constant; the optimiser starts anew with each task.
    clip_norm : float or None
        Largest norm of the whole gradient; a longer one is scaled down, which keeps it off protected directions.
    seed : int
        Of orders, samples and replay; not of the network.
    eval_batch_size : int
    basis_samples : int
        Images of a task from which subspaces and protected directions come.
    thresholds : tuple of float
        Share of the energy that is protected: one for all layers, or one for each.
    threshold_step : float
        Added to the thresholds with each task.
    epsilon : float
        Energy threshold of LANCE's subspaces.
    memory : int
        Images that replay keeps, of all tasks together.
    update : {"weight", "subspace"}
        What trains of LANCE's layers (:func:`lance_ref.continual.compress_for_task`).
    """

    epochs: int = 1
    batch_size: int = 10
    lr: float = 0.01
    momentum: float = 0.0
    clip_norm: float | None = None
    seed: int = 0
    eval_batch_size: int = 500
    basis_samples: int = 300
    thresholds: tuple[float, ...] = (0.95,)
    threshold_step: float = 0.0
    epsilon: float = 0.95
    memory: int = 200
    update: str = "weight"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size", "basis_samples", "memory"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        if self.update not in UPDATES:
            raise ValueError(f"update is {self.update!r}, expected one of {', '.join(UPDATES)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}, expected a positive number or None")
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon is {self.epsilon}, expected a number in (0, 1]")
        if not self.thresholds or not all(0 < value <= 1 for value in self.thresholds):
            raise ValueError(f"thresholds are {self.thresholds}, expected numbers in (0, 1]")
        if not 0 <= self.threshold_step < 1:
            raise ValueError(f"threshold_step is {self.threshold_step}, expected a number in [0, 1)")


class Learner:
    """Base class, and plain fine-tuning: nothing is kept and nothing is done.

    Parameters
    ----------
    net : Module
    scenario : Scenario
    recipe : Recipe

    Attributes
    ----------
    layers : list of str
        What the tasks share: the layers that train, without the tasks' own heads.
    """

    name: ClassVar[str] = "finetune"
    heeds: ClassVar[tuple[str, ...]] = ()
    """The numbers of the recipe that only some learners look at, and this one does."""

    def __init__(self, net: Module, scenario: Scenario, recipe: Recipe) -> None:
        self.net, self.scenario, self.recipe = net, scenario, recipe
        self.layers = body_layers(net)

    # ---- what the protocol calls -----------------------------------------------------

    def before_task(self, t: int, train: Samples) -> None:
        """Make ready for task t; depends on the weights and :meth:`state` alone, and may be called again."""

    def images(self, t: int) -> int:
        """How many images an epoch of task t goes through."""
        return len(self.scenario.tasks[t].train)

    def stream(self, t: int) -> Callable[[int], Stream]:
        """``stream(t)(epoch)(position)``: the passes of a step; the same whenever it is asked for."""
        task, B = self.scenario.tasks[t], self.recipe.batch_size
        x, y = self.scenario.convert(task.train.stored(slice(None))), task.train.labels

        def epoch(number: int) -> Stream:
            order = self.order(t, number, len(y))

            def passes(position: int) -> list[Pass]:
                rows = order[position * B : (position + 1) * B]
                return [Pass(task.head, x[rows], y[rows])]

            return passes

        return epoch

    def check(self, optimizer: Optimizer) -> None:
        """Raise ValueError if the optimiser would undo what this learner promises."""

    def after_backward(self) -> None:
        """Change the gradients before the optimiser's step."""

    def after_task(self, t: int, train: Samples) -> None:
        """Remember what is needed of task t."""

    # ---- the bill --------------------------------------------------------------------

    @property
    def ram_bytes(self) -> int:
        """Bytes that must be at hand during training, beside network and tape."""
        return 0

    @property
    def flash_bytes(self) -> int:
        """Bytes that are kept from one task to the next, beside the network."""
        return 0

    def notes(self) -> dict[str, Any]:
        """What a report says about the task that is under way; fit for JSON."""
        return {}

    # ---- stopping and going on ---------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """What :meth:`after_task` remembered, as arrays by name."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what :meth:`state` returned."""
        if state:
            raise ValueError(f"learner {self.name!r} remembers nothing, but the checkpoint holds {sorted(state)}")

    # ---- shared ----------------------------------------------------------------------

    def order(self, t: int, epoch: int, count: int) -> np.ndarray:
        """The order of an epoch's images; it depends on nothing else, so that it is the same after a restart."""
        return np.random.default_rng((self.recipe.seed, t, epoch)).permutation(count)

    def batches(self, t: int, train: Samples) -> list[np.ndarray]:
        """Some images of the task in full batches, for subspaces and protected directions."""
        B, rng = self.recipe.batch_size, np.random.default_rng((self.recipe.seed, t, 2**20))
        count = min(self.recipe.basis_samples, len(train)) // B * B
        chosen = rng.permutation(len(train))[: max(count, B)]
        x = self.scenario.convert(train.stored(chosen))
        return [x[start : start + B] for start in range(0, len(x), B)]
