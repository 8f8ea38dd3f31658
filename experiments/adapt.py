"""Adapt pretrained MobileNetV2 to a new task with LANCE: ``python -m experiments.adapt``.

Real weights, real images: calibrate once on images of the new task, then train a fresh head and the
last layers by SGD with cosine schedule and gradient clipping, and watch loss, accuracy, the tape and
the energy that the fixed subspaces keep. The tape is predicted from the op records alone and compared
with what is measured, at every step; any difference makes the exit code 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import lance_ref
from analysis.commands import cli, command_line
from analysis.commands.provenance import provenance
from analysis.reports.figures import save_figure
from analysis.rules.account import account
from analysis.steps.net_choice import NetChoice
from experiments import frame
from lance_ref import F, datasets, models, optim
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.selection import Tuning
from lance_ref.stores import Lance
from lance_ref.train.run import Pass, Run

SECONDS_PER_IMAGE = 0.05
"""At 224 pixels, on two cores."""
Batches = Iterator[tuple[np.ndarray, np.ndarray]]


def parser() -> argparse.ArgumentParser:
    p = frame.parser("experiments.adapt", __doc__)
    data = "data set of the new task, by name (%(default)s)"
    p.add_argument("--data", type=cli.named_data_set, default="eurosat", help=data)
    p.add_argument("--tune", default="last:4", help="layers that train beside the head (%(default)s)")
    p.add_argument("--steps", type=cli.count, default=50, help="training steps (%(default)s)")
    p.add_argument("--batch", type=cli.count, default=32, help="images a step (%(default)s)")
    p.add_argument("--image-size", type=cli.pixels, default=224, help="height and width in pixels (%(default)s)")
    p.add_argument(
        "--calibration-batches",
        type=cli.count,
        default=8,
        help="batches from which LANCE finds its directions (%(default)s)",
    )
    p.add_argument("--epsilon", type=cli.share, default=0.7, help="share of squared values kept (%(default)s)")
    p.add_argument("--lr", type=cli.positive, default=0.05, help="learning rate (%(default)s)")
    p.add_argument("--clip", type=cli.positive, default=2.0, help="largest length of the gradient (%(default)s)")
    p.add_argument("--test-images", type=cli.count, default=200, help="for the accuracy at the end (%(default)s)")
    p.add_argument("--seed", type=cli.seed, default=0, help="fixes everything (%(default)s)")
    frame.add_outputs(p, "loss, accuracy and the energy kept")
    return p


def endless(data: datasets.Dataset, options: argparse.Namespace) -> Batches:
    """Batches for ever, in a new order each epoch."""
    rng = np.random.default_rng(options.seed)
    taken: dict[str, Any] = {"normalise": models.preprocess, "image_size": options.image_size}
    while True:
        yield from datasets.batches(data, options.batch, rng=rng, **taken)


class Adaptation(Run):
    """The steps of the run, each of them recorded and its tape predicted.

    Attributes
    ----------
    history : list of dict
        One row of numbers for each step.
    """

    def __init__(self, net: Any, tuning: Tuning, batches: Batches, options: argparse.Namespace) -> None:
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        optimizer = optim.SGD(trained, lr=options.lr)
        super().__init__(net, optimizer, options.clip, optim.CosineAnnealingLR(optimizer, T_max=options.steps))
        self.steps = self.steps_per_epoch = options.steps
        self.tuning, self.batches = tuning, batches
        self.stores = {path: net.get_submodule(path).store for path in tuning.layers}
        self.history: list[dict[str, Any]] = []

    def stream(self, epoch: int) -> Callable[[int], Any]:
        return lambda position: [Pass(0, *next(self.batches))]

    def take(self, batch: Any) -> None:
        self.update(batch)

    def forward(self, each: Pass) -> Tensor:
        with lance_ref.record(self.net) as records:
            logits = self.net(each.x)
            loss = F.cross_entropy(logits, each.y)
        kept = {path: store.energy_kept for path, store in self.stores.items() if isinstance(store, Lance)}
        row = {
            "step": self.step,
            "loss": loss.item(),
            "accuracy": float((logits.data.argmax(axis=1) == each.y).mean()),
            "tape_bytes": lance_ref.tape(loss).total_bytes,
            "predicted_tape_bytes": sum(bill.tape_bytes for bill in account(records, self.tuning.head)),
            "energy_kept": kept,
        }
        self.history.append(row)
        if self.step % 5 == 0 or self.step == self.steps - 1:
            energies = "  ".join(f"{path} {value:.3f}" for path, value in kept.items() if value is not None)
            sizes = f"{row['tape_bytes']:9,}  {row['predicted_tape_bytes']:9,}"
            print(f"{self.step:4}  {row['loss']:6.3f}  {row['accuracy']:8.3f}  {sizes}  {energies}", flush=True)
        return loss


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole experiment; prints as it goes and returns what it measured."""
    train = datasets.load(options.data, "train")
    test = datasets.load(options.data, "test", limit=options.test_images)
    lance_ref.manual_seed(options.seed)
    net = models.mobilenetv2(num_classes=train.num_classes, padding="same", pretrained=True, rng=options.seed)
    net.train()
    tuning = lance_ref.tune(net, options.tune)
    batches = endless(train, options)
    images = options.batch * (options.steps + options.calibration_batches) + len(test)
    frame.begin(8 + images * SECONDS_PER_IMAGE * (options.image_size / 224) ** 2)
    print(f"calibrating on {options.calibration_batches} batches of {options.batch} images: {train.name}")
    first = itertools.islice(batches, options.calibration_batches)
    calibration = lance_ref.calibrate(net, first, epsilon=options.epsilon)
    print(calibration)
    lance_ref.compress(net, calibration)
    adaptation = Adaptation(net, tuning, batches, options)
    print(f"\n{'step':>4}  {'loss':>6}  {'accuracy':>8}  {'tape':>9}  {'predicted':>9}  energy kept by layer")
    adaptation.go()
    final = lance_ref.evaluate(net, test, 32, models.preprocess, options.image_size)
    print(f"\naccuracy on {len(test)} test images: {final:.3f} (chance {1 / train.num_classes:.3f})")
    return {
        **provenance("experiments.adapt", options.seed),
        "data": train.name,
        "tuned_layers": list(tuning.layers),
        "ranks": {path: list(store.ranks) for path, store in adaptation.stores.items()},
        "subspace_bytes": sum(store.factor_bytes for store in adaptation.stores.values()),
        "history": adaptation.history,
        "test_accuracy": final,
        "test_images": len(test),
    }


def draw(result: dict[str, Any], path: str) -> None:
    """Loss and accuracy of each step, and the share of energy that each layer's fixed subspace keeps."""
    from matplotlib.figure import Figure

    history = result["history"]
    steps = [row["step"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, [row["loss"] for row in history], color="black", label="loss (nats)")
    left.plot(steps, [row["accuracy"] for row in history], color="0.55", ls="--", label="accuracy of the batch")
    left.set(xlabel="step", ylim=(0, None), title=f"{result['data']}: head and {len(result['tuned_layers'])} layers")
    left.legend(frameon=False)
    styles = itertools.cycle([("-", "0.0"), ("--", "0.2"), ("-.", "0.3"), (":", "0.5")])
    for layer, (style, grey) in zip(result["tuned_layers"], styles, strict=False):
        ranks = "·".join(str(r) for r in result["ranks"][layer])
        kept = [row["energy_kept"][layer] for row in history]
        right.plot(steps, kept, ls=style, color=grey, label=f"{layer}, ranks {ranks}")
    right.set(xlabel="step", ylabel="‖S‖² / ‖A‖²", ylim=(0, 1), title="energy kept by the fixed subspaces")
    right.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def work(options: argparse.Namespace) -> int:
    """Check, run, show and write; 1 if the tape is not as predicted."""
    NetChoice("mobilenetv2").check_tune(options.tune)
    result = run(options)
    frame.write(options, lambda: result, lambda path: draw(result, path))
    losses = [row["loss"] for row in result["history"]]
    tenth = max(1, len(losses) // 10)
    first, last = np.mean(losses[:tenth]), np.mean(losses[-tenth:])
    print(f"mean loss of the first {tenth} steps {first:.3f}, of the last {last:.3f}")
    same = all(row["tape_bytes"] == row["predicted_tape_bytes"] for row in result["history"])
    print("the tape equals the prediction at every step" if same else "the tape DIFFERS from the prediction")
    return 0 if same else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    return command_line.run_command(parser, arguments, work)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
