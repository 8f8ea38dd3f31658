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
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import lance_ref
from analysis.commands.cli import (
    OneLineParser,
    check_tune,
    count,
    figure_file,
    json_file,
    named_data_set,
    pixels,
    positive,
    run_command,
    run_main,
    seed,
    share,
)
from analysis.commands.provenance import provenance
from analysis.reports.figures import save_figure
from analysis.rules.account import account
from lance_ref import F, datasets, models, optim
from lance_ref.io.whole_file import write_json
from lance_ref.nn.module import Module
from lance_ref.stores import Lance


def parser() -> argparse.ArgumentParser:
    parse = OneLineParser(prog="python -m experiments.adapt", description=__doc__.split("\n\n")[0])
    parse.add_argument(
        "--data",
        type=named_data_set,
        default="eurosat",
        help="data set of the new task, by name (default: %(default)s)",
    )
    parse.add_argument("--tune", default="last:4", help="layers that train beside the head (default: %(default)s)")
    parse.add_argument("--steps", type=count, default=50, help="training steps (default: %(default)s)")
    parse.add_argument("--batch", type=count, default=32, help="images a step (default: %(default)s)")
    parse.add_argument("--image-size", type=pixels, default=224, help="pixels (default: %(default)s)")
    parse.add_argument("--calibration-batches", type=count, default=8, help="default: %(default)s")
    parse.add_argument("--epsilon", type=share, default=0.7, help="kept share of the energy (default: %(default)s)")
    parse.add_argument("--lr", type=positive, default=0.05, help="default: %(default)s")
    parse.add_argument("--clip", type=positive, default=2.0, help="largest norm of the gradient (default: %(default)s)")
    parse.add_argument(
        "--test-images", type=count, default=200, help="for the accuracy at the end (default: %(default)s)"
    )
    parse.add_argument("--seed", type=seed, default=0, help="fixes everything (default: %(default)s)")
    parse.add_argument("--output", type=json_file, help="also write the run as JSON")
    parse.add_argument(
        "--figure", type=figure_file, help="also draw loss, accuracy and the energy kept, as .png or .svg"
    )
    return parse


def endless(data: datasets.Dataset, arguments: argparse.Namespace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches for ever, in a new order each epoch."""
    rng = np.random.default_rng(arguments.seed)
    while True:
        yield from datasets.batches(
            data, arguments.batch, rng=rng, normalise=models.preprocess, image_size=arguments.image_size
        )


def accuracy(net: Module, data: datasets.Dataset, arguments: argparse.Namespace) -> float:
    """Share of right answers; activations are not kept, so any batch size will do."""
    right = 0
    net.eval()
    with lance_ref.no_grad():
        for x, y in datasets.batches(
            data, 32, shuffle=False, drop_last=False, normalise=models.preprocess, image_size=arguments.image_size
        ):
            right += int((net(x).data.argmax(axis=1) == y).sum())
    net.train()
    return right / len(data)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole experiment; prints as it goes and returns what it measured."""
    train = datasets.load(arguments.data, "train")
    test = datasets.load(arguments.data, "test", limit=arguments.test_images)
    lance_ref.manual_seed(arguments.seed)
    net = models.mobilenetv2(num_classes=train.num_classes, padding="same", pretrained=True, rng=arguments.seed)
    net.train()
    tuning = lance_ref.tune(net, arguments.tune)
    batches = endless(train, arguments)

    print(f"calibrating on {arguments.calibration_batches} batches of {arguments.batch} images: {train.name}")
    calibration = lance_ref.calibrate(
        net, itertools.islice(batches, arguments.calibration_batches), epsilon=arguments.epsilon
    )
    print(calibration)
    lance_ref.compress(net, calibration)
    stores = {path: net.get_submodule(path).store for path in tuning.layers}

    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = optim.SGD(trained, lr=arguments.lr)
    schedule = optim.CosineAnnealingLR(optimizer, T_max=arguments.steps)
    history = []
    print(f"\n{'step':>4}  {'loss':>6}  {'accuracy':>8}  {'tape':>9}  {'predicted':>9}  energy kept by layer")
    for step in range(arguments.steps):
        x, y = next(batches)
        with lance_ref.record(net) as records:
            logits = net(x)
            loss = F.cross_entropy(logits, y)
        measured = lance_ref.tape(loss).total_bytes
        predicted = sum(row.tape_bytes for row in account(records, tuning.head))
        kept = {path: store.energy_kept for path, store in stores.items() if isinstance(store, Lance)}
        right = float((logits.data.argmax(axis=1) == y).mean())
        history.append(
            {
                "step": step,
                "loss": loss.item(),
                "accuracy": right,
                "tape_bytes": measured,
                "predicted_tape_bytes": predicted,
                "energy_kept": kept,
            }
        )
        if step % 5 == 0 or step == arguments.steps - 1:
            energies = "  ".join(f"{path} {value:.3f}" for path, value in kept.items() if value is not None)
            print(f"{step:4}  {loss.item():6.3f}  {right:8.3f}  {measured:9,}  {predicted:9,}  {energies}", flush=True)
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm_(trained, arguments.clip)
        optimizer.step()
        schedule.step()
    final = accuracy(net, test, arguments)
    print(f"\naccuracy on {len(test)} test images: {final:.3f} (chance {1 / train.num_classes:.3f})")
    return {
        **provenance("experiments.adapt", arguments.seed),
        "data": train.name,
        "tuned_layers": list(tuning.layers),
        "ranks": {path: list(store.ranks) for path, store in stores.items()},
        "subspace_bytes": sum(store.factor_bytes for store in stores.values()),
        "history": history,
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
    check_tune("mobilenetv2", options.tune)
    result = run(options)
    if options.output:
        write_json(options.output, result)
    if options.figure:
        draw(result, options.figure)
    losses = [row["loss"] for row in result["history"]]
    tenth = max(1, len(losses) // 10)
    first, last = np.mean(losses[:tenth]), np.mean(losses[-tenth:])
    print(f"mean loss of the first {tenth} steps {first:.3f}, of the last {last:.3f}")
    same = all(row["tape_bytes"] == row["predicted_tape_bytes"] for row in result["history"])
    print("the tape equals the prediction at every step" if same else "the tape DIFFERS from the prediction")
    return 0 if same else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    return run_command(parser, arguments, work)


if __name__ == "__main__":
    sys.exit(run_main(main))
