"""Calibrated on one data set, trained on another: ``python -m experiments.domain_shift --quick``.

LANCE calibrates once and assumes that training looks alike. Three runs from the same weights and with the same
batches: calibrated on images of the training set; on images of another set; and on those, but with every
layer calibrated again when it keeps too little.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import lance_ref
from analysis.commands import cli, command_line
from analysis.commands.chance import sentence
from analysis.commands.provenance import provenance
from analysis.reports.figures import save_figure
from analysis.steps.net_choice import NetChoice
from experiments import frame
from experiments.finetune.cell import Setup
from experiments.finetune.command import MODES
from lance_ref import datasets, models
from lance_ref.datasets import Dataset
from lance_ref.lance.recalibration import Recalibrator, measure_energy
from lance_ref.nn.selection import Tuning, weighted_layers
from lance_ref.stores import Lance
from lance_ref.train.features import tail
from lance_ref.train.training import Features, StepInfo, evaluate, fit

VARIANTS = ("same domain", "other domain", "other domain, recalibrated")
QUICK = {
    "net": "convnet", "data": "digits", "calibrate_on": "negatives", "tune": "last:2", "epochs": 6, "batch": 32,
    "lr": 0.2,
}  # fmt: skip
DEFAULTS = {
    "net": "mcunet", "data": "cifar10", "calibrate_on": "eurosat", "tune": "last:4", "epochs": 4, "batch": 128,
    "lr": 0.05,
}  # fmt: skip
"""Values of the options that are not given, with and without ``--quick``."""
NEGATIVES = "negatives"
"""A name in place of another data set: the training images with black and white exchanged."""


def other_data(text: str) -> str:
    """A type of option: the negatives, or a data set by its name."""
    return text if text == NEGATIVES else cli.named_data_set(text)


def parser() -> argparse.ArgumentParser:
    p = frame.parser("experiments.domain_shift", __doc__)
    p.add_argument(
        "--quick", action="store_true",
        help="try it: a small net on the digits of the package and their negatives; seconds",
    )  # fmt: skip
    p.add_argument("--net", type=cli.built_in_net, help="a built-in net; lance-ref finetune --help lists them (mcunet)")
    p.add_argument("--data", type=cli.named_data_set, help="data set to train on, by name (cifar10)")
    p.add_argument(
        "--calibrate-on", type=other_data,
        help=f"data set on which LANCE finds its directions, or {NEGATIVES} (eurosat)",
    )  # fmt: skip
    p.add_argument("--tune", help=f"{frame.TUNE_HELP} (last:4)")
    modes = cli.name_of(lambda: MODES)
    p.add_argument(
        "--modes", type=modes, nargs="+", default=list(MODES[1:]),
        help="sizes of the activations that LANCE compresses",
    )  # fmt: skip
    p.add_argument("--epsilon", type=cli.share, default=0.8, help="share of squared values that is kept (%(default)s)")
    alarm = "calibrate again where less than this share of the first energy is kept (%(default)s)"
    p.add_argument("--share", type=cli.share, default=0.9, help=alarm)
    p.add_argument("--train-images", type=cli.count, default=4000, help="images to train on (%(default)s)")
    p.add_argument("--test-images", type=cli.count, default=2000, help="images to test on (%(default)s)")
    p.add_argument(
        "--calibration-batches", type=cli.count, default=8,
        help="batches on which LANCE finds its directions (%(default)s)",
    )  # fmt: skip
    p.add_argument("--epochs", type=cli.count, help="passes over the training images (4)")
    p.add_argument("--batch", type=cli.count, help="images of one training step (128)")
    p.add_argument("--lr", type=cli.positive, help="learning rate (0.05)")
    p.add_argument("--seed", type=cli.seed, default=0, help="seed of the random numbers (%(default)s)")
    frame.add_outputs(p, "the energy kept at every step")
    return p


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants; one dict of numbers for each."""
    size = None if options.quick else models.find(options.net).image_size
    limits = options.train_images, options.test_images
    setup = Setup(options.net, options.data, options.tune, options.seed, size, *limits)
    train = datasets.load(options.data, "train", limit=options.train_images)
    test = datasets.load(options.data, "test", limit=options.test_images)
    other = _other(options, train)
    module, _ = setup.network(train)
    one = frame.expected_seconds(options, options.epochs, len(train))
    frame.begin(None if one is None else len(VARIANTS) * one)
    sources = [setup.after_frozen(module, each) for each in (train, test, other)]
    taken: dict[str, Any] = {"normalise": models.preprocessing(options.net), "image_size": size}
    results = []
    for variant in VARIANTS:
        module, tuning = setup.network(train)
        net = tail(module, sources[0].stage) if isinstance(sources[0], Features) else module
        source = sources[0] if variant == VARIANTS[0] else sources[2]
        seen = [x for x, _ in setup.calibration_batches(source, options.batch, options.calibration_batches)]
        calibration = lance_ref.calibrate(net, seen, epsilon=options.epsilon, modes=options.modes)
        lance_ref.compress(net, calibration)
        reference = measure_energy(net, seen)
        watch = Recalibrator(calibration, reference, options.share) if variant == VARIANTS[2] else None
        log = Log(tuning, watch)
        fitted = fit(
            module, sources[0], epochs=options.epochs, batch_size=options.batch, lr=options.lr, seed=options.seed,
            on_step=log, progress=False, **taken,
        )  # fmt: skip
        results.append(
            {
                "variant": variant,
                "accuracy": evaluate(module, sources[1], **taken),
                "test_images": len(test),
                "loss": [epoch["loss"] for epoch in fitted.history],
                "tape_bytes": fitted.history[0]["tape_bytes"],
                "reference": reference,
                "energy_kept": log.energies,
                "events": [dataclasses.asdict(event) for event in watch.events] if watch else [],
            }
        )
    return results


class Log:
    """What each compressed layer kept at each step; hands every step on to the one who watches."""

    def __init__(self, tuning: Tuning, watch: Recalibrator | None) -> None:
        self.watch = watch
        self.energies: dict[str, list[float]] = {path: [] for path in tuning.layers}

    def __call__(self, info: StepInfo) -> None:
        layers = weighted_layers(info.net)
        for path, kept in self.energies.items():
            store = layers[path].store
            if info.step and isinstance(store, Lance) and store.energy_kept is not None:
                kept.append(store.energy_kept)
        if self.watch is not None:
            self.watch(info)


def _other(options: argparse.Namespace, train: Dataset) -> Dataset:
    if options.calibrate_on == NEGATIVES:
        return dataclasses.replace(train, name=f"negatives of {train.name}", images=255 - train.images)
    channels = train.images.shape[3]
    limit = options.batch * options.calibration_batches
    return datasets.load(options.calibrate_on, "train", limit=limit, channels=channels)


def draw(results: Sequence[dict[str, Any]], path: str, title: str) -> None:
    """One panel a layer: the share of the energy kept at every step, one line a variant, a mark at each renewal."""
    from matplotlib.figure import Figure

    layers = list(results[0]["energy_kept"])
    figure = Figure(figsize=(3.6 * len(layers), 3.6), layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    styles = dict(zip(VARIANTS, (("-", "0.6"), (":", "0.0"), ("-", "0.0")), strict=True))
    for panel, layer in zip(panels, layers, strict=True):
        for result in results:
            style, grey = styles[result["variant"]]
            label = f"{result['variant']}: {100 * result['accuracy']:.1f} %"
            panel.plot(result["energy_kept"][layer], style, color=grey, lw=1.2, label=label)
            for event in result["events"]:
                if event["layer"] == layer:
                    panel.axvline(event["step"], color="0.8", lw=1, zorder=0)
        panel.set(xlabel="step", title=layer, ylim=(0, 1))
    panels[0].set_ylabel("‖S‖² / ‖A‖²")
    panels[-1].legend(frameon=False, fontsize=8, title=title, title_fontsize=8)
    save_figure(figure, path)


def show(results: Sequence[dict[str, Any]]) -> None:
    """Accuracy, the energy kept at start and end, and what was calibrated again."""
    for result in results:
        kept = [values for values in result["energy_kept"].values() if values]
        start, end = (np.mean([values[i] for values in kept]) for i in (0, -1))
        print(
            f"{result['variant']:<28} accuracy {100 * result['accuracy']:5.1f} %   "
            f"tape {result['tape_bytes']:,} bytes   energy kept {start:.3f} at the start, {end:.3f} at the end"
        )
        for event in result["events"]:
            print(
                f"  step {event['step']}: {event['layer']} kept {event['energy_before']:.3f} of "
                f"{event['reference']:.3f}; calibrated again on {event['batches']} batches, "
                f"{event['macs'] / 1e6:,.1f} M multiply-adds"
            )
    print(sentence([[result["accuracy"]] for result in results], results[0]["test_images"]))


def work(options: argparse.Namespace) -> None:
    """Check, run, show and write."""
    cli.fill_in(options, QUICK if options.quick else DEFAULTS)
    cli.check_once(options, "modes")
    NetChoice(options.net).check_tune(options.tune)
    results = run(options)
    show(results)
    frame.write(
        options,
        lambda: {**provenance("experiments.domain_shift", options.seed), "runs": results},
        lambda path: draw(results, path, f"trained on {options.data},\nother: {options.calibrate_on}"),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    return command_line.run_command(parser, arguments, work)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
