"""Measure the spectra of a net's activations: ``python -m analysis.spectra --net mobilenetv2 --data flowers102 …``.

Real weights, real images, one calibration pass; only eigenvalues are written, with what they were
measured on. The cost model reads the file (``--spectra``), and ships with one for MobileNetV2:

    python -m analysis.spectra --net mobilenetv2 --data flowers102 --split all --batches 12 \\
        --output analysis/data/mobilenetv2_224.json
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli import OneLineParser, check_writable, one_line, run_main

if TYPE_CHECKING:
    from analysis.spectra_file import Spectra
    from lance_ref.datasets import Dataset
    from lance_ref.nn.module import Module


@dataclass(frozen=True)
class _Source:
    """A net with weights, and the words for where they are from."""

    net: Module
    weights: str
    weights_sha256: str
    image_size: int
    normalise: Any


def measure(
    net: str,
    data: str,
    split: str = "train",
    batch: int = 128,
    batches: int = 6,
    image_size: int | None = None,
    seed: int = 0,
    command: str = "",
) -> Spectra:
    """Calibrate every layer of a net but its head, and keep the eigenvalues.

    Parameters
    ----------
    net : str
        A built-in net, with its pretrained weights if there are any, or ``pkg.module:factory`` with its own.
    data : str
        A data set of ``lance_ref.datasets``, or a folder of pictures.
    split : {"train", "test", "all"}
        Which images of a data set.
    batch, batches : int
        Images a batch, and number of batches. No image is used twice.
    image_size : int, optional
        Pixels; by default those of the pretrained weights, else 224.
    seed : int
        Of the order of the images.
    command : str
        What to state as the command in the provenance.

    Raises
    ------
    ValueError, OSError
        In one line that names what came and what is allowed.
    """
    import numpy as np
    import scipy

    import lance_ref
    from analysis.spectra_file import LayerSpectra, Spectra

    for name, number in (("batch", batch), ("batches", batches), ("image size", image_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}, expected a positive integer")
    source = _source(net, image_size)
    images, images_sha256 = _images(data, split, source.image_size)
    if batch * batches > len(images):
        there = f"{images.name} ({images.split}) has {len(images)}"
        raise ValueError(f"{batches} batches of {batch} need {batch * batches} images, {there}")
    body = lance_ref.tune(source.net, "all").layers
    shown = _batches(images, batch, batches, source, seed)
    calibration = lance_ref.calibrate(source.net, shown, layers=list(body))
    layers = {}
    for path, subspace in calibration.items():
        energies = tuple(np.maximum(spectrum, 0.0) for spectrum in subspace.spectra if spectrum is not None)
        layers[path] = LayerSpectra(tuple(subspace.shape), energies)
    provenance = {
        "weights": source.weights,
        "weights_sha256": source.weights_sha256,
        "images": f"{images.name}, {images.split}",
        "images_sha256": images_sha256,
        "images_source": images.source,
        "image_count": batch * batches,
        "batches": batches,
        "seed": seed,
        "command": command,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
    }
    return Spectra(net, batch, (3, source.image_size, source.image_size), provenance, layers)


def _source(net: str, image_size: int | None) -> _Source:
    from analysis.nets import DEFAULT_IMAGE_SIZE, build
    from lance_ref import models

    if net in models.PRETRAINED:
        weights = models.PRETRAINED[net]
        size = image_size or weights.image_size
        normalise = models.preprocessing(net)
        return _Source(models.create(net, pretrained=True), weights.origin, weights.sha256, size, normalise)
    size = image_size or DEFAULT_IMAGE_SIZE
    module = build(net, None, (3, size, size), without_weights=False)
    digest = hashlib.sha256()
    for array in module.state_dict().values():
        digest.update(array.tobytes())
    words = f"those of {net}" if ":" in net else f"{net}, freshly initialised"
    return _Source(module, words, digest.hexdigest(), size, None)


def _images(data: str, split: str, size: int) -> tuple[Dataset, str]:
    """The images, and a checksum of the file that they are read from (of the pixels, for a folder)."""
    import numpy as np

    from lance_ref import datasets

    if data in datasets.names():
        halves = [datasets.load(data, half) for half in (["train", "test"] if split == "all" else [split])]
        images = dataclasses.replace(
            halves[0],
            split=" + ".join(half.split for half in halves),
            images=np.concatenate([half.images for half in halves]),
            labels=np.concatenate([half.labels for half in halves]),
        )
        if data in datasets.SOURCES:
            digest = hashlib.sha256()
            for file in datasets.data_files(data)[0].values():
                digest.update(file.read_bytes())
            return images, digest.hexdigest()
    elif Path(data).is_dir():
        images = datasets.load_folder(data, size)
    else:
        raise ValueError(f"--data is {data!r}, expected a folder of pictures or one of {', '.join(datasets.names())}")
    return images, hashlib.sha256(images.images.tobytes()).hexdigest()


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
            self.images, self.batch, self.seed, normalise=source.normalise, image_size=source.image_size, channels=3
        )
        for x, _ in itertools.islice(one_pass, self.batches):
            yield x


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m analysis.spectra",
        description="Measure the spectra of a net's activations on real images and write them to a small file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--net", required=True, help="name of a built-in net, or pkg.module:factory")
    p.add_argument("--data", required=True, help="a data set of lance_ref.datasets, or a folder of pictures")
    p.add_argument("--split", default="train", choices=["train", "test", "all"], help="which images of a data set")
    p.add_argument("--batch", type=int, default=128, help="images a batch")
    p.add_argument("--batches", type=int, default=6, help="number of batches")
    p.add_argument("--image-size", type=int, help="pixels (those of the pretrained weights, else 224)")
    p.add_argument("--seed", type=int, default=0, help="of the order of the images")
    p.add_argument("--output", required=True, help="the file to write, whole or not at all")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    p = parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = p.parse_args(given)
    try:
        check_writable(options.output)
        command = shlex.join(["python", "-m", "analysis.spectra", *given])
        spectra = measure(
            options.net, options.data, options.split, options.batch, options.batches, options.image_size,
            options.seed, command,
        )  # fmt: skip
        spectra.save(options.output)
    except (ValueError, TypeError, LookupError, OSError, MemoryError) as error:
        p.error(one_line(error))
    print(f"{options.output}: spectra of {len(spectra.layers)} layers; {spectra.source}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
