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

from lance_ref import functional as F
from lance_ref.continual.learners import Learner, Pass
from lance_ref.continual.metrics import Metrics, metrics
from lance_ref.continual.networks import heads_of
from lance_ref.continual.scenario import Samples, Scenario
from lance_ref.engine.autograd import no_grad
from lance_ref.engine.counting import count_macs
from lance_ref.engine.recording import OpRecord
from lance_ref.engine.tape_report import tape
from lance_ref.engine.tensor import Tensor
from lance_ref.io.npz import digest, load_npz, save_npz
from lance_ref.io.progress import Advance, progress_bar
from lance_ref.nn.module import Module
from lance_ref.nn.tracing import record
from lance_ref.optim import SGD, clip_grad_norm_
from lance_ref.train.checkpoint import (
    _compare,
    _examples,
    _plain,
    _unplain,
    check_dtypes,
    check_sound,
    checked_path,
    describe,
    generators,
)
from lance_ref.train.features import in_mode, mixed_batches

FORMAT = 2
Bill = Callable[[Sequence[Sequence[OpRecord]]], Mapping[str, Any]]
"""From the op records of each pass of a step to what a prediction says of them, fit for JSON."""


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
        Write it also after so many steps of a task.
    settings : mapping, optional
        What else must be the same for a checkpoint to fit, beside learner, recipe, network and scenario.
    on_step : callable, optional
        Called with task and step before each step.
    progress : bool, optional
        Show a bar; by default if standard error is a terminal.

    Returns
    -------
    Result

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
    path = None if checkpoint is None else checked_path(checkpoint)
    own = _Run(learner, bill, path, every_steps, settings or {}, on_step)
    return own.go(progress)


class _Run:
    """A run and where it is."""

    def __init__(
        self,
        learner: Learner,
        bill: Bill | None,
        path: Path | None,
        every_steps: int | None,
        settings: Mapping[str, Any],
        on_step: Callable[[int, int], Any] | None,
    ) -> None:
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
        total = sum(self._steps(t) for t in range(len(self.scenario)))
        done = sum(self._steps(t) for t in range(self.at.task)) + self.at.step
        with in_mode(self.net, training=True), progress_bar(self.learner.name, total, progress, done) as advance:
            while self.at.task < len(self.scenario):
                self._task(advance, saved)
                saved = {}
        return Result(np.array(self.at.rows), np.array(self.at.baseline), self.at.tasks)

    # ---- one task --------------------------------------------------------------------

    def _task(self, advance: Advance, saved: Mapping[str, np.ndarray]) -> None:
        """From wherever it is to its end. ``saved``: what a checkpoint inside the task holds."""
        t, at, learner = self.at.task, self.at, self.learner
        train = self.scenario.tasks[t].train
        if self.path is not None and not saved:
            self.start = self._arrays()
        if self.heads is not None:
            self.heads.selected = self.scenario.tasks[t].head
        began = time.perf_counter()
        before = self._counted(lambda: learner.before_task(t, train))
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        if not saved:
            at.current = {"task": self.scenario.tasks[t].name, "before_macs": before, "ram_bytes": learner.ram_bytes}
        if trained:
            optimizer = SGD(trained, lr=self.recipe.lr, momentum=self.recipe.momentum)
            learner.check(optimizer)
            if saved:
                self._take_up(saved, optimizer)
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # the optimiser looks at the gradients
                self._train(t, optimizer, began, advance)
        else:  # every direction of every layer is protected, and the head is shared: nothing is left to learn in
            self._note_first(self._counted(lambda: None), [], 0)
            at.current["loss"] = None
        if self.heads is not None:  # replay has run others
            self.heads.selected = self.scenario.tasks[t].head
        after = self._counted(lambda: learner.after_task(t, train))
        at.seconds += time.perf_counter() - began
        steps, each = self._steps(t) if trained else 0, at.current["step_macs"]
        at.current |= {
            "steps": steps,
            "after_macs": after,
            "macs": steps * sum(each.values()) + sum(at.current["before_macs"].values()) + sum(after.values()),
            "flash_bytes": learner.flash_bytes,
            "seconds": at.seconds,
            "after": learner.notes(),
        }
        at.rows.append(self._accuracies())
        at.tasks.append(at.current)
        self.at = _Position(t + 1, 0, at.rows, at.baseline, at.tasks)
        self._save(None)

    def _train(self, t: int, optimizer: SGD, began: float, advance: Advance) -> None:
        """The steps of a task; nothing in this loop that a step does not need."""
        at, per_epoch = self.at, self._steps(t) // self.recipe.epochs
        stream, spent = self.learner.stream(t), at.seconds
        while at.step < self._steps(t):
            epoch, position = divmod(at.step, per_epoch)
            at.loss = 0.0 if position == 0 else at.loss
            passes = stream(epoch)
            for place in range(position, per_epoch):
                if self.on_step is not None:
                    self.on_step(t, at.step)
                at.loss += self._step(passes(place), optimizer) if at.step else self._first(passes(0), optimizer)
                at.step += 1
                if at.step % 100 == 0:
                    advance(100, f"task {t + 1} of {len(self.scenario)}, loss {at.loss / (place + 1):.3f}")
                if self.every_steps and at.step % self.every_steps == 0 and at.step < self._steps(t):
                    at.seconds = spent + time.perf_counter() - began
                    self._save(optimizer)
        at.seconds = spent
        at.current["loss"] = at.loss / per_epoch

    def _step(self, passes: Sequence[Pass], optimizer: SGD) -> float:
        """Gradients of all passes, the learner's say, and the update; gives the loss."""
        total = 0.0
        optimizer.zero_grad()
        for each in passes:
            total += self._backward(each, self._forward(each))
        self._update(optimizer)
        return total

    def _forward(self, each: Pass) -> Tensor:
        """The mean loss of a pass."""
        if self.heads is not None:
            self.heads.selected = each.head
        return F.cross_entropy(self.net(each.x), each.y)

    def _backward(self, each: Pass, loss: Tensor) -> float:
        """Its share in the gradients; gives its share in the loss."""
        value = each.share * float(loss.data)
        loss.backward(None if each.share == 1 else np.asarray(each.share, loss.dtype))
        return value

    def _update(self, optimizer: SGD) -> None:
        try:
            self.learner.after_backward()
            if self.recipe.clip_norm is not None:
                clip_grad_norm_(optimizer.params, self.recipe.clip_norm)
            optimizer.step()
        except ValueError as error:
            where = f"task {self.at.task}, step {self.at.step} (counted from 0)"
            raise FloatingPointError(f"{error}, in {where}; the learning rate may be too large") from None

    def _first(self, passes: Sequence[Pass], optimizer: SGD) -> float:
        """The first step of a task, counted: what the tape holds, what runs, and the records for the bill."""
        total, largest = 0.0, 0
        records: list[list[OpRecord]] = []
        optimizer.zero_grad()
        with count_macs() as counter:
            for each in passes:
                with record(self.net) as own:
                    loss = self._forward(each)
                records.append(own)
                largest = max(largest, tape(loss).total_bytes)
                total += self._backward(each, loss)
            self._update(optimizer)
        self._note_first(counter.by_kind(), records, largest)
        return total

    def _note_first(self, macs: dict[str, int], records: Sequence[Sequence[OpRecord]], tape_bytes: int) -> None:
        self.at.current |= {
            "tape_bytes": tape_bytes,
            "step_macs": macs,
            "notes": self.learner.notes(),
            "predicted": {} if self.bill is None else dict(self.bill(records)),
        }

    def _counted(self, action: Callable[[], Any]) -> dict[str, int]:
        """Multiply-adds of ``action`` by kind."""
        with count_macs() as counter:
            action()
        return counter.by_kind()

    def _steps(self, t: int) -> int:
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
        return {"learner": self.learner.name, **asdict(self.recipe), **given, "scenario": self.scenario.about,
                "order of tasks": list(tasks), **tasks, **describe(self.net)}  # fmt: skip

    def _arrays(self) -> dict[str, np.ndarray]:
        """Copies of the weights, and what the learner remembers."""
        weights = {f"net/{name}": np.array(array) for name, array in self.net.state_dict().items()}
        return weights | {f"learner/{name}": np.array(array) for name, array in self.learner.state().items()}

    def _save(self, optimizer: SGD | None) -> None:
        """Between tasks without, inside one with the optimiser; all or nothing."""
        if self.path is None:
            return
        about = {
            "format": FORMAT,
            "settings": self.settings,
            "position": vars(self.at),
            "generators": {name: _plain(rng.bit_generator.state) for name, rng in generators(self.net).items()},
        }
        arrays = self._arrays() if optimizer is None else dict(self.start)
        if optimizer is not None:
            arrays |= {f"now/{name}": np.array(array) for name, array in self.net.state_dict().items()}
            arrays |= {f"optimizer/{name}": array for name, array in optimizer.state_dict().items()}
        try:
            check_sound(arrays)
        except ValueError as error:
            where = f"before step {self.at.step} of task {self.at.task} (counted from 0)"
            raise FloatingPointError(f"{error} {where}; the learning rate may be too large") from None
        text = np.frombuffer(json.dumps(about, allow_nan=False).encode(), np.uint8)
        save_npz(self.path, {"about": text, **arrays})

    def _load(self) -> dict[str, np.ndarray]:
        """Go where the checkpoint says, if there is one; what it holds beside the start of the task."""
        if self.path is None or not self.path.exists():
            return {}
        arrays = load_npz(self.path, needs_checksum=True)
        about = _about(self.path, arrays.pop("about", None))
        _compare(self.path, about["settings"], self.settings)
        try:
            check_sound(arrays)
            own = self._arrays()
            now = {f"now/{name.removeprefix('net/')}": array for name, array in own.items() if name.startswith("net/")}
            check_dtypes(arrays, {**own, **now})
            self.at = _Position(**about["position"])
            self.net.load_state_dict(_part(arrays, "net/"))
            self.learner.load_state(_part(arrays, "learner/"))
            for name, rng in generators(self.net).items():
                rng.bit_generator.state = _unplain(about["generators"][name])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: the checkpoint does not fit: {' '.join(str(error).split())}") from None
        self.start = {name: array for name, array in arrays.items() if name.startswith(("net/", "learner/"))}
        return {name: array for name, array in arrays.items() if name.startswith(("now/", "optimizer/"))}

    def _take_up(self, saved: Mapping[str, np.ndarray], optimizer: SGD) -> None:
        """The weights and the momentum of a checkpoint inside the task; subspaces were made anew from its start."""
        try:
            check_dtypes(saved, _examples(saved, self.net, optimizer))
            self.net.load_state_dict(_part(saved, "now/"))
            optimizer.load_state_dict(_part(saved, "optimizer/"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: the checkpoint does not fit: {' '.join(str(error).split())}") from None


def accuracy(net: Module, scenario: Scenario, samples: Samples, head: int, batch_size: int) -> float:
    """Share of right answers of one head, in evaluation mode; mode and selected head are put back.

    The batches are those of :func:`lance_ref.train.features.mixed_batches`, of at most ``batch_size`` images.
    """
    heads = heads_of(net)
    selected = 0 if heads is None else heads.selected
    right = 0
    with in_mode(net, training=False), no_grad():
        if heads is not None:
            heads.selected = head
        for rows in mixed_batches(len(samples), batch_size):
            scores = net(scenario.convert(samples.stored(rows))).data
            right += int((scores.argmax(axis=1) == samples.labels[rows]).sum())
    if heads is not None:
        heads.selected = selected
    return right / len(samples)


def _digest(samples: Samples, pixels: _Pixels) -> str:
    """Of the images, the order of their pixels, and the labels."""
    order = {} if samples.permutation is None else {"permutation": samples.permutation}
    return digest({"pixels": np.array(pixels.digest(samples.images)), "labels": samples.labels, **order})


class _Pixels:
    """Digests of images, each array's once: the tasks of a permuted scenario share their images."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def digest(self, images: np.ndarray) -> str:
        """Of an array that stays alive as long as this object."""
        if id(images) not in self._known:
            self._known[id(images)] = digest({"images": images})
        return self._known[id(images)]


def _part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _about(path: Path, text: np.ndarray | None) -> dict[str, Any]:
    try:
        about = json.loads(b"" if text is None else text.tobytes())
        version, parts = about["format"], [about[name] for name in ("settings", "position", "generators")]
        if (type(version), version) != (int, FORMAT) or not all(isinstance(part, dict) for part in parts):
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path}: is no checkpoint of continual learning, format {FORMAT}") from None
    return dict(about)
