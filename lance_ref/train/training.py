"""Training: ``fit(net, train, test, epochs=…, batch_size=…)``, which can be continued and runs the frozen part once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from lance_ref.datasets import Dataset
from lance_ref.datasets.dataset import Normalise
from lance_ref.engine.autograd import no_grad
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module
from lance_ref.optim import SGD, CosineAnnealingLR, Optimizer, StepLR
from lance_ref.train import checkpoint as checkpoints
from lance_ref.train.chunks import chunks_of
from lance_ref.train.features import (
    Features,
    ImageSize,
    Part,
    data_digest,
    extract,
    frozen_stages,
    in_mode,
    sample_of,
    stages_of,
)
from lance_ref.train.rows import as_data
from lance_ref.train.run import FitRun, Recipe, Source, StepInfo, accuracy

__all__ = ["MAX_FEATURE_BYTES", "Features", "FitResult", "StepInfo", "evaluate", "extract", "fit"]

MAX_FEATURE_BYTES = 2 * 1024**3
"""Most bytes that :func:`lance_ref.fit` takes in memory for the outputs of the frozen part."""

SAMPLE = 32  # images on which `normalise` has to do the same twice

SCHEDULES = ("cosine", "constant")

MakeOptimizer = Callable[[Sequence[Tensor]], Optimizer]


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns.

    Attributes
    ----------
    history : list of dict
        For each epoch ``epoch`` (from 0), ``loss`` (mean over its batches, nats), ``train_accuracy`` (of its
        batches, as they were trained on), ``test_accuracy`` (after it, or None), ``tape_bytes`` (of its first
        step), ``learning_rate`` (likewise) and ``seconds`` (of training).
    test_accuracy : float or None
        After the last epoch.
    cached : bool
        Whether the frozen part ran once and not at every step; ``cache_note`` is a sentence on that, with the reason.
    seconds : dict
        ``training``, ``evaluation`` and ``frozen`` (running the frozen part once), summed over restarts.
    chunk : int
        Images that went forward and backward at a time; ``chunk_note`` is a sentence on that, empty if none was asked
        for.
    """

    history: list[dict[str, Any]]
    test_accuracy: float | None
    steps: int
    cached: bool
    cache_note: str
    seconds: dict[str, float]
    chunk: int
    chunk_note: str

    def to_json(self) -> dict[str, Any]:
        """The same as lists, mappings, numbers and text."""
        return asdict(self)


def fit(
    net: Module,
    train: Any,
    test: Any = None,
    *,
    epochs: int,
    batch_size: int,
    lr: float = 0.05,
    optimizer: MakeOptimizer | None = None,
    schedule: str = "cosine",
    clip_norm: float | None = 2.0,
    seed: int = 0,
    normalise: Normalise = None,
    image_size: ImageSize = None,
    chunk: int | str | None = None,
    cache_frozen: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every_steps: int | None = None,
    on_step: Callable[[StepInfo], Any] | None = None,
    progress: bool | None = None,
    eval_batch_size: int = 100,
) -> FitResult:
    """Train what requires gradients, by LANCE's recipe (arXiv 2509.21617) unless told otherwise.

    Cross-entropy; stochastic gradient descent without momentum; the learning rate falls from ``lr`` to 0 along a
    half cosine over all steps; the gradient's norm is clipped. Each epoch has an order of its own, drawn from
    (``seed``, epoch) alone; an incomplete last batch is left out.

    Parameters
    ----------
    net : Module
        Changed in place. Runs in training mode; afterwards every module is in the mode in which it was found.
    train, test : Dataset, Features, pair of arrays (x, y), or iterable of such pairs
        ``test`` is evaluated after each epoch. Features of the frozen part, made by :func:`extract`, stand
        for the images they were made of. Arrays are what the network takes: (N, ...) of any floating type, or integers,
        and integer labels (N,). Batches are put together in memory, and mixed anew in each epoch.
    lr : float
        Of the default optimiser.
    optimizer : callable, optional
        From a list of parameters to an :class:`~lance_ref.optim.Optimizer`, whose rate is the one to start
        from: ``lambda parameters: optim.Adam(parameters, lr=1e-3)``.
    schedule : {"cosine", "constant"}
    clip_norm : float or None
        Largest 2-norm of the whole gradient; None does not clip.
    seed : int
        Of the order of the images. Dropout draws from the generators that the network holds.
    normalise, image_size
        As for :func:`lance_ref.datasets.batches`.
    chunk : int or "auto", optional
        Most images that go forward and backward at a time: the batch goes in equal chunks, of the largest divisor of
        ``batch_size`` up to that many, and their gradients are added up, so that the tape and the activations shrink
        to those of a chunk. ``"auto"``: as many as :data:`lance_ref.train.chunks.AUTO_BYTES` of activations allow, or
        as many bytes as the gradients take, if these are more.
        The step is that of the whole batch to rounding, masks of dropout included. Where something mixes the images
        of a batch (batch norm with its statistics, a compressed batch mode, directions found at every step, codes of
        a common range, several dropouts on one generator) the batch stays whole, and ``chunk_note`` says why.
        By default it stays whole in any case: chunks sum in another order, which changes the last bits of a run, and
        products of few images take more time.
    cache_frozen : bool, optional
        Run the leading stages that do not train once over all images, and train on their outputs. By default
        this is done where it changes nothing (see :func:`lance_ref.train.features.frozen_stages`; ``normalise`` must
        give the same at each call) and takes at most :data:`MAX_FEATURE_BYTES`. True makes it an error where
        that is not so; False never does it.
    checkpoint : path, optional
        Written after each epoch. If it exists already, the run goes on from there and ends bit by bit as it
        would have without the interruption; if that run was complete, its result is returned. Everything else
        must be as it was when the run started, ``net`` newly made included. For one process at a time.
    checkpoint_every_steps : int, optional
        Write it that often within an epoch, too.
    on_step : callable, optional
        Gets a :class:`StepInfo` before each step. Whatever it changes, gradients, modes, stores and random
        generators included, it has to put back. It is not called for the steps that a checkpoint has behind it.
    progress : bool, optional
        Show a bar; by default if standard error is a terminal.
    eval_batch_size : int
        Images at a time in evaluation and in running the frozen part.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range; nothing trains; a data set is empty, smaller than a batch, of one class
        alone, or does not fit the network; or the checkpoint belongs to another run. Nothing has been changed.
    FloatingPointError
        If the loss, a gradient or a parameter becomes NaN or infinite. The message names epoch and step; an
        earlier checkpoint is intact.
    OSError
        If the checkpoint cannot be written; an earlier one is intact.

    Examples
    --------
    >>> import lance_ref
    >>> from lance_ref import datasets, models
    >>> net = models.create("convnet", in_channels=1, channels=8, rng=0)
    >>> tuning = lance_ref.tune(net, "last:1")
    >>> digits = [datasets.load("digits", split) for split in ("train", "test")]
    >>> result = fit(net, *digits, epochs=2, batch_size=64, normalise=(0.3, 0.05))
    >>> result.steps, result.test_accuracy > 0.5
    (44, True)
    >>> print(result.cache_note)
    The first 2 of 4 stages are frozen and ran once over all images (460,032 bytes of outputs).
    """
    _check_arguments(net, epochs, batch_size, schedule, clip_norm, seed, eval_batch_size)
    _positive("checkpoint_every_steps", 1 if checkpoint_every_steps is None else checkpoint_every_steps)
    train = as_data("train", train, normalise, image_size)
    test = None if test is None else as_data("test", test, normalise, image_size)
    given = {"train": train} if test is None else {"train": train, "test": test}
    sources = [Source(name, net, data, normalise, image_size) for name, data in given.items()]
    what = f"{train.name} ({train.split})"
    if batch_size > len(train):
        raise ValueError(f"batch_size is {batch_size}, but {what} has {len(train)} images: no full batch")
    if train.labels.min() == train.labels.max():
        raise ValueError(f"train has images of one class only, {train.labels[0]}: {what} teaches nothing")
    made = _optimizer(net, optimizer, lr)
    steps = epochs * (len(train) // batch_size)
    scheduler = CosineAnnealingLR(made, T_max=steps) if schedule == "cosine" else StepLR(made, steps, gamma=1.0)
    chunks = chunks_of(sources[0].net, sources[0].image_shape, sources[0].dtype, batch_size, chunk)
    recipe = Recipe(epochs, batch_size, chunks.images, clip_norm, seed, eval_batch_size)
    run = FitRun(net, sources[0], None if test is None else sources[1], made, scheduler, recipe)
    cached, cache_note = _cache_decision(net, sources, cache_frozen)
    path = None if checkpoint is None else checkpoints.checked_path(checkpoint)
    settings = {} if path is None else _settings(run, schedule, cached, sources)
    if path is not None and path.exists():
        run.load_state(checkpoints.load(path, net, made, scheduler, settings=settings))
    if cached and run.step < run.steps:
        began = perf_counter()
        run.train = _cached(run.train, net, eval_batch_size, progress)
        run.test = None if run.test is None else _cached(run.test, net, eval_batch_size, progress)
        run.seconds["frozen"] += perf_counter() - began

    def write() -> None:
        if path is not None:
            checkpoints.save(path, net, made, scheduler, meta=run.state(), settings=settings)

    run.train_all(on_step, progress, write, checkpoint_every_steps)
    once = cached or (isinstance(train, Features) and train.stage > 0)
    test_accuracy = run.history[-1]["test_accuracy"]
    return FitResult(run.history, test_accuracy, run.steps, once, cache_note, run.seconds, *chunks)


def evaluate(
    net: Module,
    data: Any,
    batch_size: int = 100,
    normalise: Normalise = None,
    image_size: ImageSize = None,
) -> float:
    """Share of right answers in [0, 1], in evaluation mode and without a tape; the network is left as it was found.

    ``data`` is anything that :func:`fit` takes, and ``batch_size`` images of it run at a time. ``normalise`` and
    ``image_size`` are as for :func:`lance_ref.datasets.batches`. ValueError or TypeError if there are none, or they
    or their labels do not fit the network.
    """
    data = as_data("data", data, normalise, image_size)
    return accuracy(net, Source("data", net, data, normalise, image_size), _positive("batch_size", batch_size))


# ---- the frozen part, run once ----------------------------------------------------------------


def _cache_decision(net: Module, sources: Sequence[Source], wanted: bool | None) -> tuple[bool, str]:
    """Whether features are to stand for the data sets (the training data first), and a sentence on that for reports.

    ``wanted`` is ``cache_frozen`` of :func:`lance_ref.fit`; ValueError if it is True and cannot be.
    """

    def repeats(source: Source) -> bool:
        """Whether ``normalise`` does the same twice; what draws random numbers is augmentation."""
        assert isinstance(source.data, Dataset)
        first, second = (sample_of(source.data, source.normalise, source.image_size, SAMPLE) for _ in range(2))
        return np.array_equal(first, second, equal_nan=True)

    given, stages = sources[0].data, len(stages_of(net))
    note = ""
    if isinstance(given, Features) and not given.stage:
        note = "The whole network ran at every step: arrays were given."
    elif isinstance(given, Features):
        note = f"The outputs of the first {given.stage} of {stages} stages were given."
    images = [source for source in sources if isinstance(source.data, Dataset)]
    if not images:
        return False, note
    stage, why = frozen_stages(net)
    total = 0
    if wanted is False:
        stage, why = 0, "this was asked for"
    elif stage and not all(repeats(source) for source in images):
        stage, why = 0, "normalise gives something else at each call"
    elif stage:
        with in_mode(net, training=False), no_grad():
            body = Part(net, stages_of(net)[:stage])
            total = sum(len(source) * body(source.batch(np.arange(1))[0]).data.nbytes for source in images)
        if total > MAX_FEATURE_BYTES:
            stage, why = 0, f"the outputs take {total:,} bytes, more than {MAX_FEATURE_BYTES:,}"
    if wanted and not stage:
        raise ValueError(f"cache_frozen is True, but the frozen part cannot be run once: {why}")
    if not stage:
        return False, note or f"The whole network ran at every step: {why}."
    ran = f"are frozen and ran once over all images ({total:,} bytes of outputs)"
    return True, note or f"The first {stage} of {stages} stages {ran}."


def _cached(source: Source, net: Module, batch_size: int, progress: bool | None) -> Source:
    """The same data as features of the frozen part, in memory."""
    if isinstance(source.data, Features):
        return source
    features = extract(net, source.data, source.normalise, source.image_size, batch_size, progress=progress)
    return Source(source.name, net, features, None, None)


# ---- arguments -----------------------------------------------------------------------------


def _optimizer(net: Module, make: MakeOptimizer | None, lr: float) -> Optimizer:
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if make is None:
        return SGD(parameters, lr=lr)
    if not callable(make):
        raise TypeError(f"optimizer is a {type(make).__name__}, expected a function from parameters to an Optimizer")
    made = make(parameters)
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer returned a {type(made).__name__}, expected an Optimizer")
    return made


def _settings(run: FitRun, schedule: str, cached: bool, sources: Sequence[Source]) -> dict[str, Any]:
    """Everything besides the network that must be the same when the run continues."""
    settings: dict[str, Any] = {**asdict(run.recipe), "schedule": schedule}
    settings["frozen part run once"] = cached
    settings |= {f"optimiser's {name}": float(getattr(run.optimizer, name)) for name in run.optimizer.settings}
    for source, name in zip(sources, ("train", "test"), strict=False):
        data = source.data
        settings[name] = repr(data)
        if isinstance(data, Features):
            settings[f"features of {name}"] = data.fingerprint
        else:
            sample = sample_of(data, source.normalise, source.image_size)
            settings[f"pixels and labels of {name}"] = data_digest(data)
            settings[f"{name} after image_size and normalise"] = checkpoints.digest({"x": sample})
    return settings


def _check_arguments(
    net: Module,
    epochs: int,
    batch_size: int,
    schedule: str,
    clip_norm: float | None,
    seed: int,
    eval_batch_size: int,
) -> None:
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
        _positive(name, value)
    _positive("seed", seed, smallest=0)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}, expected one of {SCHEDULES}")
    if clip_norm is not None and not (isinstance(clip_norm, (int, float)) and clip_norm > 0):
        raise ValueError(f"clip_norm is {clip_norm!r}, expected a positive number or None")
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError(f"no parameter of {type(net).__name__} requires gradients: there is nothing to train")


def _positive(name: str, value: int, smallest: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < smallest:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {smallest}")
    return int(value)
