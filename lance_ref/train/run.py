"""The loop of training: one step after the other, from wherever a checkpoint left it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref.datasets import Dataset
from lance_ref.datasets.dataset import Normalise
from lance_ref.engine.autograd import no_grad
from lance_ref.engine.tape_report import tape
from lance_ref.io.progress import progress_bar
from lance_ref.nn.module import Module
from lance_ref.optim import LRScheduler, Optimizer, clip_grad_norm_
from lance_ref.train.features import (
    Features,
    ImageSize,
    dtype_of,
    images_of,
    in_mode,
    mixed_batches,
    part_digest,
    stages_of,
    tail,
)


@dataclass(frozen=True, eq=False)
class StepInfo:
    """What ``on_step`` of :func:`lance_ref.train.training.fit` gets before a step.

    Attributes
    ----------
    step : int
        From 0, over all epochs.
    epoch : int
        From 0.
    steps : int
        Of the whole run.
    net : Module
        What takes ``x``: the network, or what follows its frozen part if that is run once. Its layers are the
        network's, under the same paths.
    x, y : numpy.ndarray (B, ...), (B,)
        The batch of this step.
    """

    step: int
    epoch: int
    steps: int
    net: Module
    x: np.ndarray
    y: np.ndarray


class Source:
    """A data set, or features of one, with what takes its batches; checked before anything is trained.

    Parameters
    ----------
    name : str
        ``"train"`` or ``"test"``, for errors.
    net : Module
    data : Dataset or Features
    normalise, image_size
        For a data set.

    Raises
    ------
    ValueError
        If it is empty, the features are not of this network, the network does not take the images, or
        a label is outside the network's outputs.
    """

    def __init__(
        self, name: str, net: Module, data: Dataset | Features, normalise: Normalise, image_size: ImageSize
    ) -> None:
        if not isinstance(data, (Dataset, Features)):
            raise TypeError(f"{name} is a {type(data).__name__}, expected a Dataset or Features")
        if not len(data):
            raise ValueError(f"{name} is empty: {data.name} ({data.split}) has 0 images")
        self.name, self.data, self.normalise, self.image_size = name, data, normalise, image_size
        self.dtype = dtype_of(net)
        if isinstance(data, Features):
            self._check_features(name, net, data)
            self.net: Module = tail(net, data.stage)
        else:
            self.net = net
        self._check_outputs(name, net)

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x (B, ...) in the network's dtype and y (B,)."""
        if isinstance(self.data, Features):
            x, y = np.take(np.asarray(self.data.arrays), indices, axis=0), self.data.labels[indices]
        else:
            x, y = images_of(self.data, indices, self.normalise, self.image_size)
        return x.astype(self.dtype, copy=False), y

    def _check_features(self, name: str, net: Module, data: Features) -> None:
        if data.stage > len(stages_of(net)) or data.part != part_digest(net, data.stage):
            raise ValueError(f"{name} is {data!r}, made by a network whose first stages differ from those of this one")

    def _check_outputs(self, name: str, net: Module) -> None:
        x, _ = self.batch(np.arange(min(2, len(self.data))))  # one image has no variance for a batch norm to use
        try:
            with in_mode(net, training=False), no_grad():
                shape = self.net(x).shape
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {type(net).__name__} does not take {self.data!r}: {error}") from None
        if len(shape) != 2:
            raise ValueError(
                f"{name}: the network's output for {len(x)} images has shape {shape}, expected ({len(x)}, classes)"
            )
        largest = int(self.data.labels.max())
        if largest >= shape[1]:
            raise ValueError(f"{name}: labels run up to {largest}, but the network has {shape[1]} outputs")


def accuracy(net: Module, source: Source, batch_size: int) -> float:
    """Share of right answers, in evaluation mode; the mode is put back."""
    right = 0
    with in_mode(net, training=False), no_grad():
        for rows in mixed_batches(len(source), batch_size):
            x, y = source.batch(rows)
            right += int((source.net(x).data.argmax(axis=1) == y).sum())
    return right / len(source)


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch's images; it depends on nothing else, so that it is the same after a restart."""
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass
class Tally:
    """Sums over the steps of the epoch that is under way."""

    loss: float = 0.0
    right: int = 0
    tape_bytes: int = 0
    learning_rate: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """The numbers of :func:`lance_ref.train.training.fit`; ``micro_batch`` is ``batch_size`` where it is not used."""

    epochs: int
    batch_size: int
    micro_batch: int
    clip_norm: float | None
    seed: int
    eval_batch_size: int


@dataclass
class Run:
    """A training run and how far it has come.

    Attributes
    ----------
    step : int
        Steps done.
    history : list of dict
        One for each finished epoch.
    seconds : dict
        Of training and of evaluation, all epochs, and of running the frozen part once.
    """

    net: Module
    train: Source
    test: Source | None
    optimizer: Optimizer
    scheduler: LRScheduler
    recipe: Recipe
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("training", "evaluation", "frozen"), 0.0))
    tally: Tally = field(default_factory=Tally)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train) // self.recipe.batch_size

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    def state(self) -> dict[str, Any]:
        """How far it has come, for a checkpoint."""
        return {"step": self.step, "history": self.history, "seconds": self.seconds, "tally": vars(self.tally)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        self.tally = Tally(**state["tally"])

    def go(
        self,
        on_step: Callable[[StepInfo], Any] | None,
        progress: bool | None,
        save: Callable[[], None],
        every_steps: int | None,
    ) -> None:
        """Train to the end; ``save`` is called after each epoch, and after every so many steps."""
        with in_mode(self.net, training=True), progress_bar("training", self.steps, progress, self.step) as advance:
            while self.step < self.steps:
                epoch, done = divmod(self.step, self.steps_per_epoch)
                order = epoch_order(self.recipe.seed, epoch, len(self.train))
                for position in range(done, self.steps_per_epoch):
                    start = position * self.recipe.batch_size
                    self._step(order[start : start + self.recipe.batch_size], epoch, on_step)
                    advance(1, self._words(position + 1))
                    if every_steps and self.step % every_steps == 0 and self.step % self.steps_per_epoch:
                        self._check_parameters(epoch)
                        save()
                self._finish_epoch(epoch)
                save()

    def _step(self, indices: np.ndarray, epoch: int, on_step: Callable[[StepInfo], Any] | None) -> None:
        """One batch: gradients, clipping, update."""
        began = time.perf_counter()
        x, y = self.train.batch(indices)
        loaded = time.perf_counter() - began
        if on_step is not None:
            on_step(StepInfo(self.step, epoch, self.steps, self.train.net, x, y))
        began = time.perf_counter()
        self.optimizer.zero_grad()
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # what comes of it is looked for below
            self._accumulate_gradients(x, y, epoch)
            try:
                clip_grad_norm_(self.optimizer.params, self.recipe.clip_norm or math.inf)
            except ValueError:
                raise FloatingPointError(f"the gradient is not finite in {self._where(epoch)}") from None
            if self.step % self.steps_per_epoch == 0:
                self.tally.learning_rate = self.optimizer.lr
            self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        self.tally.seconds += loaded + time.perf_counter() - began

    def _accumulate_gradients(self, x: np.ndarray, y: np.ndarray, epoch: int) -> None:
        """The gradient of the mean loss over the batch, L = Σ_parts (k / B)·L_part, k = ``micro_batch``."""
        share = self.recipe.micro_batch / self.recipe.batch_size
        loss_of_batch = 0.0
        for start in range(0, len(x), self.recipe.micro_batch):
            part = slice(start, start + self.recipe.micro_batch)
            # a part is copied: the tape would keep the whole batch alive through a look at it
            logits = self.train.net(x if share == 1 else x[part].copy())
            loss = F.cross_entropy(logits, y[part])
            if start == 0 and self.step % self.steps_per_epoch == 0:
                self.tally.tape_bytes = tape(loss).total_bytes
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} in {self._where(epoch)}")
            loss_of_batch += share * value
            self.tally.right += int((logits.data.argmax(axis=1) == y[part]).sum())
            loss.backward(np.asarray(share, loss.dtype))
        self.tally.loss += loss_of_batch

    def _finish_epoch(self, epoch: int) -> None:
        """Evaluate, and put the epoch into the history."""
        self._check_parameters(epoch)
        began = time.perf_counter()
        test_accuracy = None if self.test is None else accuracy(self.net, self.test, self.recipe.eval_batch_size)
        self.seconds["evaluation"] += time.perf_counter() - began
        self.seconds["training"] += self.tally.seconds
        self.history.append(
            {
                "epoch": epoch,
                "loss": self.tally.loss / self.steps_per_epoch,
                "train_accuracy": self.tally.right / (self.steps_per_epoch * self.recipe.batch_size),
                "test_accuracy": test_accuracy,
                "tape_bytes": self.tally.tape_bytes,
                "learning_rate": self.tally.learning_rate,
                "seconds": self.tally.seconds,
            }
        )
        self.tally = Tally()

    def _check_parameters(self, epoch: int) -> None:
        """Nothing that is not finite gets into a checkpoint or a result."""
        for name, array in self._changing():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise FloatingPointError(f"{name} is not finite after {self._where(epoch, self.step - 1)}")

    def _changing(self) -> Iterator[tuple[str, np.ndarray]]:
        """What training changes: the parameters that train, and running statistics."""
        yield from ((name, p.data) for name, p in self.net.named_parameters() if p.requires_grad)
        yield from self.net.named_buffers()

    def _where(self, epoch: int, step: int | None = None) -> str:
        step = self.step if step is None else step
        return (
            f"epoch {epoch}, step {step} of {self.steps} (counted from 0); training stopped, "
            "the learning rate may be too large"
        )

    def _words(self, done: int) -> str:
        """How it goes, ``done`` steps into the epoch."""
        images, tally = done * self.recipe.batch_size, self.tally
        return (
            f"loss {tally.loss / done:.3f}, accuracy {tally.right / images:.3f}, "
            f"{images / max(tally.seconds, 1e-9):,.0f} images/s, tape {tally.tape_bytes:,} bytes"
        )
