"""Measure the spectra of a net's activations: ``python -m analysis.spectra --net mobilenetv2 --data flowers102 …``.

Real weights, real images, one calibration pass; only eigenvalues are written, with what they were
measured on. The cost model reads the file (``--spectra``), and ships with one for MobileNetV2:

    python -m analysis.spectra --net mobilenetv2 --data flowers102 --split all --batches 12 \\
        --output analysis/data/mobilenetv2_224.json
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.commands.cli import (
    DATA_HELP,
    NET_HELP,
    add_normalisation,
    any_file,
    any_net,
    check_effect,
    count,
    data_set,
    input_shape,
    pixels,
    seed,
)
from analysis.commands.command_line import OneLineParser, nets_and_data, run_command, run_main

if TYPE_CHECKING:
    import numpy as np

    from analysis.ranks.spectra_file import Spectra
    from lance_ref.datasets import Dataset


Normalise = Callable[["np.ndarray"], "np.ndarray"]


@dataclass(frozen=True)
class _Source:
    """A net with weights, the words for where they are from, and what its input is.

    ``normalise`` takes uint8 (B, H, W, C) to float32 (B, C, H, W); ``normalised`` says how.
    """

    net: Any
    weights: str
    weights_sha256: str
    shape: tuple[int, ...]
    normalise: Normalise
    normalised: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures; a net for vectors gets the pixels of a square."""
        if len(self.shape) == 3:
            return self.shape[1:]
        side = math.isqrt(self.shape[0] - 1) + 1
        return side, side

    @property
    def channels(self) -> int:
        """Channels of the pictures; a net for vectors gets grey ones."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """The net's input (B, *shape) out of pictures (B, H, W, C) of its size and channels."""
        planes = self.normalise(pixels)  # (B, C, H, W)
        return planes if len(self.shape) == 3 else planes.reshape(len(planes), -1)[:, : self.shape[0]]


def measure(
    net: str,
    data: str,
    split: str = "train",
    batch: int = 128,
    batches: int = 6,
    image_size: int | None = None,
    seed: int = 0,
    command: str = "",
    input_shape: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Spectra:
    """Calibrate every layer of a net but its head, and keep the eigenvalues.

    Parameters
    ----------
    net : str
        A built-in net, with its pretrained weights if there are any, ``pkg.module:factory``, which may give a module of
        PyTorch, or a ``file.onnx`` with their own.
    data : str
        As for :func:`lance_ref.datasets.open_data`, with labels or without; ``split`` says which of the images.
    batch, batches : int
        Images a batch, and number of batches. No image is used twice; ``seed`` is that of their order.
    image_size : int, optional
        Pixels; by default those of the pretrained weights, of the net or of the ONNX file.
    command : str
        What to state as the command in the provenance.
    input_shape : sequence of int, optional
        (C, H, W) or (N,), in place of ``image_size``. One channel is the mean of the images'; further channels than
        theirs are these, over and over again; N numbers are the pixels of a grey square.
    mean, std : sequence of float, optional
        (pixel / 255 - mean) / std, one number or one for each channel. By default what pretrained weights were trained
        with, and pixel / 255 for other nets.
    """
    import numpy as np
    import scipy

    import lance_ref
    from analysis.ranks.spectra_file import LayerSpectra, Spectra
    from analysis.steps.nets import is_torch_module
    from lance_ref import datasets

    for name, number in (("batch", batch), ("batches", batches), ("image size", image_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}, expected a positive integer")
    source = _source(net, image_size, input_shape, mean, std)
    images = datasets.open_data(data, split, source.size, None, source.channels, labelled=False)
    if batch * batches > len(images):
        there = f"{images.name} ({images.split}) has {len(images)}"
        raise ValueError(f"{batches} batches of {batch} need {batch * batches} images, {there}")
    shown = _batches(images, batch, batches, source, seed)
    layers = {}
    if is_torch_module(source.net):
        from analysis.torch_modules.spectra import activation_spectra

        layers = activation_spectra(source.net, net, shown)
    else:
        body = lance_ref.tune(source.net, "all").layers
        calibration = lance_ref.calibrate(source.net, shown, layers=list(body))
        for path, subspace in calibration.items():
            energies = tuple(np.maximum(spectrum, 0.0) for spectrum in subspace.spectra if spectrum is not None)
            layers[path] = LayerSpectra(tuple(subspace.shape), energies)
    provenance = {
        "weights": source.weights,
        "weights_sha256": source.weights_sha256,
        "images": f"{images.name}, {images.split}",
        "images_sha256": datasets.checksum(data),
        "images_source": images.source,
        "image_count": batch * batches,
        "normalisation": source.normalised,
        "batches": batches,
        "seed": seed,
        "command": command,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
    }
    return Spectra(net, batch, source.shape, provenance, layers)


def _source(
    net: str,
    image_size: int | None,
    given: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> _Source:
    from analysis.steps.net_choice import NetChoice
    from analysis.steps.nets import build, from_factory, input_shape_for
    from lance_ref import models

    choice = NetChoice(net)
    normalise, how = choice.normalise(mean, std)
    known = choice.pretrained
    shape = input_shape_for(net, known.image_size if known and image_size is None else image_size, given)
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ValueError(f"net {net!r} takes inputs of shape {shape}, expected (C, H, W) or (N,)")
    channels = shape[0] if len(shape) == 3 else 1
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, channels):
            raise ValueError(f"{name} is {list(values)}, expected 1 or {channels} finite numbers, one for each channel")
    module: Any
    if known is not None:
        module, words, digest = models.create(net, pretrained=True), known.origin, known.sha256
    else:  # a module of PyTorch is measured as it is, so that it need not have a counterpart
        of_factory = not choice.is_built_in and not choice.is_onnx
        module = from_factory(net, None) if of_factory else build(net, None, shape, without_weights=False)
        said = choice.origin(module)
        words, digest = said.words, said.sha256
    _check_finite(net, module)
    return _Source(module, words, digest, shape, normalise, how)


def _check_finite(net: str, module: Any) -> None:
    """Raise ValueError for weights that are NaN or infinite: every spectrum behind them would be."""
    import numpy as np

    from analysis.steps.net_choice import arrays_of

    for name, array in arrays_of(module).items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"net {net!r}: {name} has values that are NaN or infinite, its spectra cannot be measured")


class _batches:  # noqa: N801  (used like a function; a class so that the progress bar knows the length)
    """The first batches of the shuffled images."""

    def __init__(self, images: Dataset, batch: int, batches: int, source: _Source, seed: int) -> None:
        self.images, self.batch, self.batches, self.source, self.seed = images, batch, batches, source, seed

    def __length_hint__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        from lance_ref import datasets

        source = self.source
        one_pass = datasets.batches(
            self.images, self.batch, self.seed, normalise=source.prepare, image_size=source.size
        )
        for x, _ in itertools.islice(one_pass, self.batches):
            yield x


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m analysis.spectra",
        description="Measure how the values inside a net are spread over directions (their spectra), on real images, "
        "and write them to a small file. cost, plan and device choose ranks from it.\n\n"
        "Example: lance-ref spectra --net convnet --data digits --batch 32 --output spectra.json",
        epilog=nets_and_data(),
        allow_abbrev=False,
    )
    p.add_argument("--net", required=True, type=any_net, help=NET_HELP)
    p.add_argument("--data", required=True, type=data_set, help=f"{DATA_HELP}. Labels are not needed here")
    p.add_argument(
        "--split", default="train", choices=["train", "test", "all"], help="which images, of data that have parts"
    )
    p.add_argument("--batch", type=count, default=128, help="images of one batch")
    p.add_argument("--batches", type=count, default=6, help="number of batches")
    p.add_argument("--image-size", type=pixels, help="height and width in pixels (what the net is made for)")
    p.add_argument(
        "--input-shape", type=input_shape,
        help="shape of one input, as 3,32,32 or 784, in place of --image-size",
    )  # fmt: skip
    add_normalisation(p)
    p.add_argument("--seed", type=seed, default=0, help="seed of the order of the images")
    p.add_argument("--output", required=True, type=any_file, help="the file to write")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_command(parser, given, lambda options: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    from lance_ref import datasets

    with_parts = options.data in datasets.names() or datasets.has_parts(options.data)
    check_effect(options, "split", with_parts, "data with the parts train and test")
    check_effect(options, "image_size", options.input_shape is None, "no --input-shape, which states height and width")
    spectra = measure(
        options.net, options.data, options.split, options.batch, options.batches, options.image_size, options.seed,
        shlex.join(["python", "-m", "analysis.spectra", *given]), options.input_shape, options.mean, options.std,
    )  # fmt: skip
    spectra.save(options.output)
    print(f"{options.output}: spectra of {len(spectra.layers)} layers; {spectra.source}")


if __name__ == "__main__":
    sys.exit(run_main(main))
