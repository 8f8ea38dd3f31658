"""A training run that can be killed: ``python resume_case.py checkpoint.npz result.json [where]``.

``where`` is one of ``step:n`` (before step n), ``write:n:k`` (while the k-th array of the n-th checkpoint of this
process is written), ``move:n`` (before the n-th checkpoint takes the earlier one's place) and ``after:n`` (after
that). The process then kills itself by SIGKILL, which runs no handler and closes nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from lance_ref import calibrate, compress, datasets, fit, nn, optim, tune
from lance_ref.stores import Asi
from lance_ref.train.training import FitResult, StepInfo

EPOCHS, BATCH, IMAGES = 3, 32, 256
STEPS = EPOCHS * (IMAGES // BATCH)


def build(train: datasets.Dataset) -> nn.Sequential:
    """A frozen convolution, one compressed by LANCE, one by ASI (warm starts); dropout from two generators."""
    rng = np.random.default_rng(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, rng=rng),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, rng=rng),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.1),
        nn.Conv2d(6, 8, 3, rng=rng),
        nn.Flatten(),
        nn.Dropout(0.3, rng=np.random.default_rng(5)),
        nn.Linear(32, 10, rng=rng),
    )
    tune(net, "last:2", train_batchnorm=True)
    batches = datasets.batches(train, BATCH, rng=1)
    compress(net, calibrate(net, [next(batches)], epsilon=0.9), layers="2")
    net[7].store = Asi((8, 3, 3, 3))
    return net


def train(path: str | None, on_step: Callable[[StepInfo], Any] | None = None, **settings: Any) -> Any:
    """The run, and the network after it."""
    data = [datasets.load_digits(split, limit=n) for split, n in (("train", IMAGES), ("test", 60))]
    net = build(data[0])
    recipe: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "normalise": (0.3, 0.3), "seed": 2}
    recipe |= {"optimizer": lambda ps: optim.SGD(ps, lr=0.05, momentum=0.9), "checkpoint_every_steps": 3, **settings}
    return fit(net, *data, checkpoint=path, on_step=on_step, **recipe), net


def timeless(result: FitResult) -> dict[str, Any]:
    """The result without what a clock says."""
    report = result.to_json()
    report.pop("seconds")
    for row in report["history"]:
        row.pop("seconds")
    return report


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(where: str) -> Callable[[StepInfo], None]:
    """Put the traps in place; the one for steps is returned."""
    kind, *numbers = where.split(":")
    at = [int(number) for number in numbers]
    count = {"checkpoints": 0, "arrays": 0}
    write, move = np.lib.format.write_array, os.replace

    def trapped_write(*arguments: Any, **options: Any) -> None:
        count["arrays"] += 1
        if kind == "write" and at == [count["checkpoints"], count["arrays"] - 1]:
            die()
        write(*arguments, **options)

    def trapped_move(*arguments: Any) -> None:
        if kind == "move" and at == [count["checkpoints"]]:
            die()
        move(*arguments)
        if kind == "after" and at == [count["checkpoints"]]:
            die()
        count.update(checkpoints=count["checkpoints"] + 1, arrays=0)

    np.lib.format.write_array, os.replace = trapped_write, trapped_move
    return lambda info: die() if kind == "step" and at == [info.step] else None


if __name__ == "__main__":
    checkpoint, output, *trap = sys.argv[1:]
    result, _ = train(checkpoint, arm(*trap) if trap else None)
    with open(output, "w") as file:
        json.dump(timeless(result), file)
