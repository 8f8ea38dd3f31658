"""The protocol: one task after the other, and after each the accuracy on all of them; stopped and taken up at will."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lance_ref.continual.learners import Learner
from lance_ref.continual.metrics import Metrics, metrics
from lance_ref.continual.networks import heads_of
from lance_ref.continual.scenario import Samples, Scenario
from lance_ref.engine.counting import count_macs
from lance_ref.engine.recording import OpRecord
from lance_ref.engine.tape_report import tape
from lance_ref.engine.tensor import Tensor
from lance_ref.io.npz import digest
from lance_ref.io.progress import progress_bar
from lance_ref.nn.module import Module
from lance_ref.nn.tracing import record
from lance_ref.optim import SGD
from lance_ref.train import checkpoint as checkpoints
from lance_ref.train.features import in_mode, mixed_batches
from lance_ref.train.run import Pass, Run, right_answers

Bill = Callable[[Sequence[Sequence[OpRecord]]], Mapping[str, Any]]
"""A function from the op records of each pass of a step to a prediction about them, fit for JSON."""


@dataclass(frozen=True)
class Result:
    """What :func:`run` gives.

    Attributes
    ----------
    R : (T, T) array
        ``R[t, i]``: accuracy on task i after task t.
    baseline : (T,) array
        Accuracy of the network as it came.
    tasks : list of dict
        Of each task, as measured: ``steps``, ``seconds``, ``loss`` (mean of the last epoch), ``tape_bytes`` (largest
        of a step's passes), ``ram_bytes``, ``flash_bytes``, ``step_macs`` by kind, ``before_macs`` and ``after_macs``
        (calibration; protected directions) and their sum over the task ``macs``, ``notes`` of the learner, and
        ``predicted``, what the bill says.
    """

    R: np.ndarray
    baseline: np.ndarray
    tasks: list[dict[str, Any]]

    @property
    def metrics(self) -> Metrics:
        return metrics(self.R, self.baseline)


@dataclass
class _Position:
    """How far a run has come: ``step`` steps of task ``task`` are done."""

    task: int = 0
    step: int = 0
    rows: list[list[float]] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    current: dict[str, Any] = field(default_factory=dict)  # what is known of the task under way
    loss: float = 0.0  # summed over the epoch under way
    seconds: float = 0.0  # of the task under way


def run(
    learner: Learner,
    *,
    bill: Bill | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every_steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
    on_step: Callable[[int, int], Any] | None = None,
    progress: bool | None = None,
) -> Result:
    """Learn all tasks of the learner's scenario in order.

    Parameters
    ----------
    learner : Learner
        Fresh, with its network; both are changed.
    bill : callable, optional
        Gets the op records of the first step of each task.
    checkpoint : path, optional
        File to write after each task, and to go on from if it is there. A run that was stopped and one that was not
        end bit by bit alike.
    every_steps : int, optional
        Number of steps of a task after which the checkpoint is written as well.
    settings : mapping, optional
        What else must be the same for a checkpoint to fit, beside learner, recipe, network and scenario.
    on_step : callable, optional
        Called with task and step before each step.

    Raises
    ------
    ValueError
        If a task has fewer images than a batch, or the checkpoint is damaged, of another run (other pixels included),
        or to be written to a folder that does not exist. Nothing has been computed then.
    FloatingPointError
        If the loss or a gradient is not finite; says where.
    """
    if every_steps is not None and (isinstance(every_steps, bool) or every_steps < 1):
        raise ValueError(f"every_steps is {every_steps!r}, expected a positive integer or None")
    path = None if checkpoint is None else checkpoints.checked_path(checkpoint)
    return _Tasks(learner, bill, path, every_steps, settings or {}, on_step).go(progress)


class _Tasks:
    """All tasks of a learner, and how far it has come with them."""

    def __init__(
        self, learner: Learner, bill: Bill | None, path: Path | None, every_steps: int | None,
        settings: Mapping[str, Any], on_step: Callable[[int, int], Any] | None,
    ) -> None:  # fmt: skip
        self.learner, self.net, self.scenario, self.recipe = learner, learner.net, learner.scenario, learner.recipe
        self.bill, self.path, self.every_steps, self.on_step = bill, path, every_steps, on_step
        self.heads = heads_of(self.net)
        self.at = _Position()
        self.start: dict[str, np.ndarray] = {}  # weights and learner at the start of the task under way
        self.settings = {} if path is None else json.loads(json.dumps(self._settings(settings)))
        for task in self.scenario.tasks:
            if len(task.train) < self.recipe.batch_size:
                raise ValueError(
                    f"{self.scenario.name}, {task.name}: {len(task.train)} training images, "
                    f"fewer than one batch of {self.recipe.batch_size}"
                )

    def go(self, progress: bool | None) -> Result:
        saved = self._load()
        if not self.at.baseline:
            self.at.baseline = self._accuracies()
        total = sum(self.steps(t) for t in range(len(self.scenario)))
        done = sum(self.steps(t) for t in range(self.at.task)) + self.at.step
        with in_mode(self.net, training=True), progress_bar(self.learner.name, total, progress, done) as self.advance:
            while self.at.task < len(self.scenario):
                self._task(saved)
                saved = {}
        return Result(np.array(self.at.rows), np.array(self.at.baseline), self.at.tasks)

    def _task(self, saved: Mapping[str, np.ndarray]) -> None:
        """Continue the task to its end. ``saved`` is the content of a checkpoint inside the task."""
        t, at, learner = self.at.task, self.at, self.learner
        train = self.scenario.tasks[t].train
        if self.path is not None and not saved:
            self.start = self._arrays()
        self.select(self.scenario.tasks[t].head)
        began, spent = time.perf_counter(), at.seconds
        # What a learner does before a task is done again after a restart, from the weights at the task's start. So
        # subspaces need no place in the checkpoint, and what they cost is counted alike.
        before = _counted(lambda: learner.before_task(t, train))
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        if not saved:
            at.current = {"task": self.scenario.tasks[t].name, "before_macs": before, "ram_bytes": learner.ram_bytes}
        if trained:
            # New for each task: the momentum of an earlier one has a part along the protected directions.
            optimizer = SGD(trained, lr=self.recipe.lr, momentum=self.recipe.momentum)
            learner.check(optimizer)
            if saved:
                self._take_up(saved, optimizer)
            _TaskRun(self, optimizer, began).go(self.every_steps)
            at.seconds = spent
            at.current["loss"] = at.loss / (self.steps(t) // self.recipe.epochs)
        else:  # every direction of every layer is protected, and the head is shared: nothing is left to learn in
            self.note_first({}, [], 0)
            at.current["loss"] = None
        self.select(self.scenario.tasks[t].head)  # replay has run others
        after = _counted(lambda: learner.after_task(t, train))
        at.seconds += time.perf_counter() - began
        steps, each = self.steps(t) if trained else 0, at.current["step_macs"]
        at.current |= {
            "steps": steps,
            "after_macs": after,
            "macs": steps * sum(each.values()) + sum(at.current["before_macs"].values()) + sum(after.values()),
            "flash_bytes": learner.flash_bytes,
            "seconds": at.seconds,
            "after": learner.notes(),
        }
        # The accuracies on tasks that are still to come are measured too: forward transfer is made of them.
        at.rows.append(self._accuracies())
        at.tasks.append(at.current)
        self.at = _Position(t + 1, 0, at.rows, at.baseline, at.tasks)
        self.save(None)

    def select(self, head: int) -> None:
        """The head that answers from now on, where there are several."""
        if self.heads is not None:
            self.heads.selected = head

    def note_first(self, macs: dict[str, int], records: Sequence[Sequence[OpRecord]], tape_bytes: int) -> None:
        """What the first step of a task has shown: one step is counted, and all others are like it."""
        self.at.current |= {
            "tape_bytes": tape_bytes,
            "step_macs": macs,
            "notes": self.learner.notes(),
            "predicted": {} if self.bill is None else dict(self.bill(records)),
        }

    def steps(self, t: int) -> int:
        """Steps of task t."""
        return self.learner.images(t) // self.recipe.batch_size * self.recipe.epochs

    def _accuracies(self) -> list[float]:
        """On the test images of every task."""
        return [
            accuracy(self.net, self.scenario, task.test, task.head, self.recipe.eval_batch_size)
            for task in self.scenario.tasks
        ]

    # ---- stopping and going on -------------------------------------------------------

    def _settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        pixels = _Pixels()
        tasks = {
            f"task {task.name}": [task.head, *(_digest(part, pixels) for part in (task.train, task.test))]
            for task in self.scenario.tasks
        }
        recipe = {name: value for name, value in asdict(self.recipe).items() if (name, value) != ("update", "weight")}
        return {"learner": self.learner.name, **recipe, **given, "scenario": self.scenario.about,
                "order of tasks": list(tasks), **tasks, **checkpoints.describe(self.net)}  # fmt: skip

    def _arrays(self) -> dict[str, np.ndarray]:
        """Copies of the weights, and what the learner remembers."""
        weights = {f"net/{name}": np.array(array) for name, array in self.net.state_dict().items()}
        return weights | {f"learner/{name}": np.array(array) for name, array in self.learner.state().items()}

    def save(self, optimizer: SGD | None) -> None:
        """Write the checkpoint: between tasks without an optimiser, inside one with it."""
        if self.path is None:
            return
        about = {
            "settings": self.settings,
            "position": vars(self.at),
            "generators": checkpoints.generator_states(self.net),
        }
        # Inside a task the weights at its start are kept beside those of now, for the subspaces come from the former.
        arrays = self._arrays() if optimizer is None else dict(self.start)
        if optimizer is not None:
            arrays |= {f"now/{name}": np.array(array) for name, array in self.net.state_dict().items()}
            arrays |= {f"optimizer/{name}": array for name, array in optimizer.state_dict().items()}
        try:
            checkpoints.check_sound(arrays)
        except ValueError as error:
            where = f"before step {self.at.step} of task {self.at.task} (counted from 0)"
            raise FloatingPointError(f"{error} {where}; the learning rate may be too large") from None
        checkpoints.write(self.path, about, arrays)

    def _load(self) -> dict[str, np.ndarray]:
        """Go where the checkpoint says, if there is one; what it holds beside the start of the task."""
        if self.path is None or not self.path.exists():
            return {}
        parts = ("settings", "position", "generators")
        about, arrays = checkpoints.read(self.path, parts, "checkpoint of continual learning,")
        checkpoints.compare(self.path, about["settings"], self.settings)
        try:
            checkpoints.check_sound(arrays)
            own = self._arrays()
            now = {f"now/{name}": array for name, array in checkpoints.part(own, "net/").items()}
            checkpoints.check_dtypes(arrays, {**own, **now})
            self.at = _Position(**about["position"])
            self.net.load_state_dict(checkpoints.part(arrays, "net/"))
            self.learner.load_state(checkpoints.part(arrays, "learner/"))
            checkpoints.set_generators(self.net, about["generators"])
        except checkpoints.BROKEN as error:
            raise checkpoints.misfit(self.path, error) from None
        self.start = {name: array for name, array in arrays.items() if name.startswith(("net/", "learner/"))}
        return {name: array for name, array in arrays.items() if name.startswith(("now/", "optimizer/"))}

    def _take_up(self, saved: Mapping[str, np.ndarray], optimizer: SGD) -> None:
        """The weights and the momentum of a checkpoint inside the task; its subspaces came from its start."""
        try:
            checkpoints.check_dtypes(saved, checkpoints.examples(saved, self.net, optimizer))
            self.net.load_state_dict(checkpoints.part(saved, "now/"))
            optimizer.load_state_dict(checkpoints.part(saved, "optimizer/"))
        except checkpoints.BROKEN as error:
            raise checkpoints.misfit(self.path, error) from None


class _TaskRun(Run):
    """The steps of one task; the first of them is counted and recorded."""

    optimizer: SGD

    def __init__(self, tasks: _Tasks, optimizer: SGD, began: float) -> None:
        super().__init__(tasks.net, optimizer, tasks.recipe.clip_norm)
        self.tasks, self.at, self.step, self.task = tasks, tasks.at, tasks.at.step, tasks.at.task
        self.began, self.spent = began, tasks.at.seconds
        self.steps = tasks.steps(self.task)
        self.steps_per_epoch = self.steps // tasks.recipe.epochs
        self.batches = tasks.learner.stream(self.task)
        self.records: list[list[OpRecord]] = []
        self.largest_tape = 0

    def stream(self, epoch: int) -> Callable[[int], Sequence[Pass]]:
        if self.step % self.steps_per_epoch == 0:
            self.at.loss = 0.0
        return self.batches(epoch)

    def take(self, batch: Sequence[Pass]) -> None:
        if self.tasks.on_step is not None:
            self.tasks.on_step(self.task, self.step)
        if self.step:
            self.at.loss += self.update(batch)
            return
        with count_macs() as counter:
            self.at.loss += self.update(batch)
        self.tasks.note_first(counter.by_kind(), self.records, self.largest_tape)

    def forward(self, each: Pass) -> Tensor:
        self.tasks.select(each.head)
        if self.step:
            return super().forward(each)
        with record(self.net) as own:
            loss = super().forward(each)
        self.records.append(own)
        self.largest_tape = max(self.largest_tape, tape(loss).total_bytes)
        return loss

    def after_backward(self) -> None:
        self.tasks.learner.after_backward()

    def stepped(self, position: int, save: bool) -> None:
        self.at.step = self.step
        if self.step % 100 == 0:
            words = f"task {self.task + 1} of {len(self.tasks.scenario)}, loss {self.at.loss / (position + 1):.3f}"
            self.tasks.advance(100, words)
        if save and self.step < self.steps:  # the task's end saves by itself
            self.at.seconds = self.spent + time.perf_counter() - self.began
            self.tasks.save(self.optimizer)

    def where(self) -> str:
        return f"task {self.task}, step {self.step} (counted from 0); the learning rate may be too large"


def _counted(action: Callable[[], Any]) -> dict[str, int]:
    """Multiply-adds of ``action`` by kind."""
    with count_macs() as counter:
        action()
    return counter.by_kind()


def accuracy(net: Module, scenario: Scenario, samples: Samples, head: int, batch_size: int) -> float:
    """Share of right answers of one head, in evaluation mode; mode and selected head are put back.

    The batches are those of :func:`lance_ref.train.features.mixed_batches`, of at most ``batch_size`` images.
    """
    heads = heads_of(net)
    selected = 0 if heads is None else heads.selected
    if heads is not None:
        heads.selected = head
    batches = mixed_batches(len(samples), batch_size)
    right = right_answers(net, ((scenario.convert(samples.stored(rows)), samples.labels[rows]) for rows in batches))
    if heads is not None:
        heads.selected = selected
    return right / len(samples)


def _digest(samples: Samples, pixels: _Pixels) -> str:
    """A digest of the images, the order of their pixels, and the labels."""
    order = {} if samples.permutation is None else {"permutation": samples.permutation}
    return digest({"pixels": np.array(pixels.digest(samples.images)), "labels": samples.labels, **order})


class _Pixels:
    """Digests of images, each array's once: the tasks of a permuted scenario share their images."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def digest(self, images: np.ndarray) -> str:
        """The digest of an array, which stays alive as long as this object."""
        if id(images) not in self._known:
            self._known[id(images)] = digest({"images": images})
        return self._known[id(images)]
