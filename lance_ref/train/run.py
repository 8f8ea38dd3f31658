"""The loop of training: one step after the other, from the step on at which a checkpoint was written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref.datasets import Dataset
from lance_ref.datasets.dataset import Normalise
from lance_ref.engine.autograd import no_grad
from lance_ref.engine.tape_report import tape
from lance_ref.engine.tensor import Shape, Tensor
from lance_ref.io.progress import progress_bar
from lance_ref.nn.module import Module
from lance_ref.optim import LRScheduler, Optimizer, clip_grad_norm_
from lance_ref.train import features as parts
from lance_ref.train.features import Features, ImageSize, in_mode, mixed_batches


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward and backward pass of a step, on images of one head.

    ``share`` is the weight of its mean loss in the loss of the step.
    """

    head: int
    x: np.ndarray
    y: np.ndarray
    share: float = 1.0


class Run:
    """The steps of a training, and the step that is next. The methods of a subclass say what is learned in a step.

    Attributes
    ----------
    step, steps, steps_per_epoch : int
        Steps that are done, steps altogether, and steps of each epoch.
    """

    step: int = 0
    steps: int
    steps_per_epoch: int

    def __init__(
        self, net: Module, optimizer: Optimizer, clip_norm: float | None = None, scheduler: LRScheduler | None = None
    ) -> None:
        self.net, self.optimizer, self.clip_norm, self.scheduler = net, optimizer, clip_norm, scheduler

    # ---- what a subclass says ----------------------------------------------------------

    def stream(self, epoch: int) -> Callable[[int], Any]:
        """A function from a position in the epoch to the batch of that step; it gives the same batch at every call."""
        raise NotImplementedError

    def take(self, batch: Any) -> None:
        """One step on what :meth:`stream` gave; calls :meth:`update`."""
        raise NotImplementedError

    def forward(self, each: Pass) -> Tensor:
        """The mean loss of a pass."""
        return F.cross_entropy(self.net(each.x), each.y)

    def after_backward(self) -> None:
        """Change the gradients before they are clipped."""

    def stepped(self, position: int, save: bool) -> None:
        """Called after each step with its position in the epoch, and whether a checkpoint is due."""

    def end_epoch(self, epoch: int) -> None:
        """Called after the last step of an epoch."""

    def where(self) -> str:
        """The step under way, for errors."""
        return f"step {self.step} (counted from 0); the learning rate may be too large"

    # ---- the loop ----------------------------------------------------------------------

    def go(self, every_steps: int | None = None) -> None:
        """Train to the end, with a checkpoint each time that the given number of steps has passed."""
        while self.step < self.steps:
            # After a restart the run is inside an epoch: its first steps lie behind.
            epoch, done = divmod(self.step, self.steps_per_epoch)
            batches = self.stream(epoch)
            for position in range(done, self.steps_per_epoch):
                self.take(batches(position))
                self.step += 1
                self.stepped(position, save=every_steps is not None and self.step % every_steps == 0)
            self.end_epoch(epoch)

    def update(self, passes: Iterable[Pass]) -> float:
        """Gradients of L = Σ share·L_pass over all passes, clipping, and the update; gives L.

        Raises
        ------
        FloatingPointError
            If a loss or the gradient is not finite; the parameters are as before the step then.
        """
        total = 0.0
        self.optimizer.zero_grad()
        # NumPy's warnings would come for the same numbers that are looked for here by name.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for each in passes:
                loss = self.forward(each)
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} in {self.where()}")
                total += each.share * value
                loss.backward(np.asarray(each.share, loss.dtype))
                del each, loss  # before the images of the next pass are there
            self.after_backward()
            try:
                # Without a largest norm nothing is scaled, but a gradient that is not finite is still found.
                clip_grad_norm_(self.optimizer.params, self.clip_norm or math.inf)
            except ValueError:
                raise FloatingPointError(f"the gradient is not finite in {self.where()}") from None
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return total


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch's images. It depends on the arguments alone, so that it is the same after a restart."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def right_answers(net: Module, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> int:
    """The number of images that the network classifies correctly in evaluation mode; the mode is restored."""
    with in_mode(net, training=False), no_grad():
        return sum(int((net(x).data.argmax(axis=1) == y).sum()) for x, y in batches)


# ---- the run of fit() ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StepInfo:
    """What ``on_step`` of :func:`lance_ref.train.training.fit` gets before a step.

    Attributes
    ----------
    step, epoch : int
        Both from 0; steps are counted over all epochs.
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
    """A data set, or features of one, with what takes its batches (``net``); checked before anything is trained.

    Raises
    ------
    ValueError
        If it is empty, the features are not of this network, the network does not take the images, or
        a label is outside the network's outputs. The message begins with ``name``, "train" or "test".
    """

    def __init__(
        self, name: str, net: Module, data: Dataset | Features, normalise: Normalise, image_size: ImageSize
    ) -> None:
        if not isinstance(data, (Dataset, Features)):
            raise TypeError(f"{name} is a {type(data).__name__}, expected a Dataset or Features")
        if not len(data):
            raise ValueError(f"{name} is empty: {data.name} ({data.split}) has 0 images")
        self.name, self.data, self.normalise, self.image_size = name, data, normalise, image_size
        self.dtype = parts.dtype_of(net)
        if isinstance(data, Features) and data.stage:
            if data.stage > len(parts.stages_of(net)) or data.part != parts.part_digest(net, data.stage):
                why = "made by a network whose first stages differ from those of this one"
                raise ValueError(f"{name} is {data!r}, {why}")
            self.net: Module = parts.tail(net, data.stage)
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
            x, y = parts.images_of(self.data, indices, self.normalise, self.image_size)
        floating = x.astype(self.dtype, copy=False) if x.dtype.kind == "f" else x  # others are indices
        return floating, y

    def _check_outputs(self, name: str, net: Module) -> None:
        x, _ = self.batch(np.arange(min(2, len(self.data))))  # one image has no variance for a batch norm to use
        self.image_shape: Shape = x.shape[1:]
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
    """Share of correct answers. The whole network is in evaluation mode, even where only its last part runs."""
    with in_mode(net, training=False):
        return right_answers(source.net, map(source.batch, mixed_batches(len(source), batch_size))) / len(source)


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
    """The numbers of :func:`lance_ref.train.training.fit`; ``chunk`` is ``batch_size`` where the batch stays whole."""

    epochs: int
    batch_size: int
    chunk: int
    clip_norm: float | None
    seed: int
    eval_batch_size: int


class FitRun(Run):
    """The run of :func:`lance_ref.train.training.fit`.

    Attributes
    ----------
    history : list of dict
        One for each finished epoch.
    seconds : dict
        Of training and of evaluation, all epochs, and of running the frozen part once.
    """

    scheduler: LRScheduler

    def __init__(
        self, net: Module, train: Source, test: Source | None, optimizer: Optimizer, scheduler: LRScheduler,
        recipe: Recipe,
    ) -> None:  # fmt: skip
        super().__init__(net, optimizer, recipe.clip_norm, scheduler)
        self.train, self.test, self.recipe = train, test, recipe
        self.steps_per_epoch = len(train) // recipe.batch_size
        self.steps = recipe.epochs * self.steps_per_epoch
        self.history: list[dict[str, Any]] = []
        self.seconds = dict.fromkeys(("training", "evaluation", "frozen"), 0.0)
        self.tally = Tally()

    def state(self) -> dict[str, Any]:
        """The progress of the run, for a checkpoint."""
        return {"step": self.step, "history": self.history, "seconds": self.seconds, "tally": vars(self.tally)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        self.tally = Tally(**state["tally"])

    def train_all(
        self, on_step: Callable[[StepInfo], Any] | None, progress: bool | None, write: Callable[[], None],
        every_steps: int | None,
    ) -> None:  # fmt: skip
        """Train to the end with a progress bar; ``write`` is called after each epoch and at each step that is due."""
        self.on_step, self.write = on_step, write
        with in_mode(self.net, training=True), progress_bar("training", self.steps, progress, self.step) as advance:
            self.advance = advance
            self.go(every_steps)

    def stream(self, epoch: int) -> Callable[[int], Any]:
        order, size = epoch_order(self.recipe.seed, epoch, len(self.train)), self.recipe.batch_size
        return lambda position: order[position * size : (position + 1) * size]

    def take(self, batch: np.ndarray) -> None:
        began = time.perf_counter()
        x, y = self.train.batch(batch)
        loaded = time.perf_counter() - began
        if self.on_step is not None:
            self.on_step(StepInfo(self.step, self.step // self.steps_per_epoch, self.steps, self.train.net, x, y))
        began = time.perf_counter()
        if self.step % self.steps_per_epoch == 0:
            self.tally.learning_rate = self.optimizer.lr
        self.tally.loss += self.update(self._chunks(x, y))
        self.tally.seconds += loaded + time.perf_counter() - began

    def _chunks(self, x: np.ndarray, y: np.ndarray) -> Iterator[Pass]:
        """The gradient of the mean loss over the batch, L = Σ_chunks (k / B)·L_chunk of k images each."""
        size, batch = self.recipe.chunk, len(x)
        for start in range(0, batch, size):
            some = slice(start, start + size)
            # a chunk is copied: the tape would keep the whole batch alive through a look at it
            yield Pass(0, x if size >= batch else x[some].copy(), y[some], len(y[some]) / batch)

    def forward(self, each: Pass) -> Tensor:
        logits = self.train.net(each.x)
        loss = F.cross_entropy(logits, each.y)
        if not self.tally.tape_bytes:  # the first pass of the epoch
            self.tally.tape_bytes = tape(loss).total_bytes
        self.tally.right += int((logits.data.argmax(axis=1) == each.y).sum())
        return loss

    def stepped(self, position: int, save: bool) -> None:
        done, tally = position + 1, self.tally
        images = done * self.recipe.batch_size
        words = f"loss {tally.loss / done:.3f}, accuracy {tally.right / images:.3f}, "
        words += f"{images / max(tally.seconds, 1e-9):,.0f} images/s, tape {tally.tape_bytes:,} bytes"
        self.advance(1, words)
        if save and done < self.steps_per_epoch:  # the epoch's end saves by itself
            self._check_parameters()
            self.write()

    def end_epoch(self, epoch: int) -> None:
        """Evaluate, put the epoch into the history, and save."""
        self._check_parameters()
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
        self.write()

    def _check_parameters(self) -> None:
        """Nothing that is not finite gets into a checkpoint or a result."""
        trained = ((name, p.data) for name, p in self.net.named_parameters() if p.requires_grad)
        for name, array in (*trained, *self.net.named_buffers()):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise FloatingPointError(f"{name} is not finite after {self.where(self.step - 1)}")

    def where(self, step: int | None = None) -> str:
        step = self.step if step is None else step
        return (
            f"epoch {step // self.steps_per_epoch}, step {step} of {self.steps} (counted from 0); training stopped, "
            "the learning rate may be too large"
        )
