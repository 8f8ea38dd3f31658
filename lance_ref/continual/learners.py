"""Learners by name: what each does before, during and after a task, on one interface.

All of them train the same network on the same batches. They differ in what they keep from earlier tasks, and in what
they do with the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lance_ref.continual.learner import Learner, Pass, Recipe, Stream
from lance_ref.continual.networks import heads_of
from lance_ref.continual.protecting import Gpm, LanceLearner, LanceNoBatch, Protecting
from lance_ref.continual.scenario import Samples, Scenario
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers


class Joint(Learner):
    """Trains on the images of all tasks so far, each epoch through all of them: an upper bound.

    With a shared head a batch mixes the tasks; with a head for each task it is of one of them.
    """

    name = "joint"

    def __init__(self, net: Module, scenario: Scenario, recipe: Recipe) -> None:
        super().__init__(net, scenario, recipe)
        self.seen = 0  # tasks whose images are kept

    def images(self, t: int) -> int:
        B = self.recipe.batch_size
        sizes = [len(task.train) for task in self.scenario.tasks[: t + 1]]
        return sum(sizes) if self.scenario.shared_head else sum(size // B * B for size in sizes)

    def stream(self, t: int) -> Callable[[int], Stream]:
        tasks, convert = self.scenario.tasks[: t + 1], self.scenario.convert
        stored = np.concatenate([task.train.stored(slice(None)) for task in tasks])
        y = np.concatenate([task.train.labels for task in tasks])
        heads = np.repeat([task.head for task in tasks], [len(task.train) for task in tasks])

        def epoch(number: int) -> Stream:
            order = self.order(t, number, len(y))
            batches = self._mixed(order) if self.scenario.shared_head else self._separate(order, heads)

            def passes(position: int) -> list[Pass]:
                rows = batches[position]
                return [Pass(int(heads[rows[0]]), convert(stored[rows]), y[rows])]

            return passes

        return epoch

    def _mixed(self, order: np.ndarray) -> list[np.ndarray]:
        B = self.recipe.batch_size
        return [order[start : start + B] for start in range(0, len(order) // B * B, B)]

    def _separate(self, order: np.ndarray, heads: np.ndarray) -> list[np.ndarray]:
        """Full batches of one head each, in the order in which their first images come."""
        batches = [batch for head in np.unique(heads) for batch in self._mixed(order[heads[order] == head])]
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        return sorted(batches, key=lambda batch: int(place[batch[0]]))

    def after_task(self, t: int, train: Samples) -> None:
        self.seen = t + 1

    @property
    def flash_bytes(self) -> int:
        """Images and labels (of 2 bytes) of the tasks so far."""
        return sum(len(task.train) * (task.train.image_bytes + 2) for task in self.scenario.tasks[: self.seen])

    def state(self) -> dict[str, np.ndarray]:
        return {"seen": np.array(self.seen)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.seen = int(state["seen"])


class Replay(Learner):
    """Experience replay (Chaudhry et al., 2019): every step also runs a batch from a small memory of earlier tasks.

    The step's loss is the mean of both batches' losses. After each task the memory is divided equally among the tasks
    so far. A batch from memory is of one head.
    """

    name = "er"
    heeds = ("memory",)

    def __init__(self, net: Module, scenario: Scenario, recipe: Recipe) -> None:
        super().__init__(net, scenario, recipe)
        first = scenario.tasks[0].train
        self.memory = {
            "images": np.zeros((0, *first.shape), first.images.dtype),
            "labels": np.zeros(0, np.int16),
            "tasks": np.zeros(0, np.int16),
        }

    def stream(self, t: int) -> Callable[[int], Stream]:
        fresh, steps = super().stream(t), self.images(t) // self.recipe.batch_size
        if not t:
            return fresh

        def epoch(number: int) -> Stream:
            new, old = fresh(number), self._picks(t, number, steps)

            def passes(position: int) -> list[Pass]:
                (batch,) = new(position)
                return [Pass(batch.head, batch.x, batch.y, 0.5), self._recall(old[position])]

            return passes

        return epoch

    def _picks(self, t: int, epoch: int, steps: int) -> np.ndarray:
        """Positions in the memory (steps, B), those of a step all of one head."""
        rng = np.random.default_rng((self.recipe.seed, t, epoch, 1))
        tasks, B = self.memory["tasks"], self.recipe.batch_size
        if self.scenario.shared_head:
            return rng.integers(len(tasks), size=(steps, B))
        first, counts = (np.unique(tasks, return_index=True, return_counts=True))[1:]
        chosen = rng.integers(len(first), size=steps)
        inside: np.ndarray = rng.integers(counts[chosen][:, None], size=(steps, B))
        return first[chosen][:, None] + inside

    def _recall(self, rows: np.ndarray) -> Pass:
        head = self.scenario.tasks[self.memory["tasks"][rows[0]]].head
        labels = self.memory["labels"][rows].astype(np.int64)
        return Pass(head, self.scenario.convert(self.memory["images"][rows]), labels, 0.5)

    def after_task(self, t: int, train: Samples) -> None:
        """The first images of each task's own random order stay: as many as there is room for."""
        room = max(1, self.recipe.memory // (t + 1))
        order = np.random.default_rng((self.recipe.seed, t, 2**20 + 1)).permutation(len(train))[:room]
        new = {
            "images": train.stored(order),
            "labels": train.labels[order].astype(np.int16),
            "tasks": np.full(len(order), t, np.int16),
        }
        tasks = self.memory["tasks"]
        keep = np.concatenate([np.flatnonzero(tasks == old)[:room] for old in range(t)] or [np.zeros(0, np.int64)])
        self.memory = {name: np.concatenate([self.memory[name][keep], new[name]]) for name in new}

    @property
    def ram_bytes(self) -> int:
        return sum(array.nbytes for array in self.memory.values())

    @property
    def flash_bytes(self) -> int:
        return self.ram_bytes

    def state(self) -> dict[str, np.ndarray]:
        return dict(self.memory)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        if set(state) != set(self.memory):
            raise ValueError(f"checkpoint holds {sorted(state)}, expected {sorted(self.memory)}")
        self.memory = dict(state)


class HeadOnly(Learner):
    """The whole network learns the first task; afterwards the heads alone train."""

    name = "head-only"

    def before_task(self, t: int, train: Samples) -> None:
        if t:
            own = heads_of(self.net)
            last = list(weighted_layers(self.net).values())[-1]
            self.net.requires_grad_(False)
            (last if own is None else own).requires_grad_()


LEARNERS: dict[str, type[Learner]] = {
    learner.name: learner for learner in (Learner, Gpm, LanceLearner, LanceNoBatch, HeadOnly, Joint, Replay)
}
"""Every learner by its name on the command line."""

__all__ = [
    "LEARNERS",
    "Gpm",
    "HeadOnly",
    "Joint",
    "LanceLearner",
    "LanceNoBatch",
    "Learner",
    "Pass",
    "Protecting",
    "Recipe",
    "Replay",
    "Stream",
]
