"""The data sets as their authors publish them: addresses, checksums, and which reader takes the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lance_ref.datasets.archives import read_cifar, read_class_zip, read_flowers, read_idx

Arrays = tuple[np.ndarray, np.ndarray, tuple[str, ...]]
"""Images uint8 (N, H, W, C), labels int64 (N,), class names."""

Reader = Callable[[Mapping[str, Path], str, int | tuple[int, int] | None, int | None], Arrays]
"""A function of the paths by file name, the split, image_size and limit."""


@dataclass(frozen=True)
class Published:
    """A data set at the address where it is published.

    Attributes
    ----------
    url : str
        What a file name is appended to.
    checksums : mapping
        ``"md5:…"`` or ``"sha256:…"`` of each file, by its name; None where no checksum is known, so that the
        file is not downloaded.
    folder : str
        Where the files are in the cache, and in the folder of data.
    read : callable
        See :data:`Reader`.
    origin : str
        Where the data set comes from, its split and its terms.
    """

    title: str
    url: str
    checksums: Mapping[str, str | None]
    folder: str
    read: Reader
    origin: str


# Checksums as the publishers state them (CIFAR, EuroSAT) or as torchvision pins them (MNIST, Flowers).
_CIFAR100 = ("cifar100", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8")


def _cifar(title: str, kind: str, folder: str, file: str, md5: str) -> Published:
    origin = "www.cs.toronto.edu/~kriz/cifar.html, no licence stated"
    url, read = "https://www.cs.toronto.edu/~kriz/", partial(read_cifar, kind=kind)
    return Published(title, url, {file: f"md5:{md5}"}, folder, read, origin)


PUBLISHED = {
    "mnist": Published(
        "MNIST",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
        },
        "mnist",
        read_idx,
        "yann.lecun.com/exdb/mnist, by the copy at ossci-datasets.s3.amazonaws.com",
    ),
    "cifar10": _cifar("CIFAR-10", "cifar10", "cifar10", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": _cifar("CIFAR-100", "cifar100", *_CIFAR100),
    "cifar100_coarse": _cifar("CIFAR-100, 20 superclasses", "cifar100_coarse", *_CIFAR100),
    "eurosat": Published(
        "EuroSAT RGB",
        "https://zenodo.org/records/7711810/files/",
        {"EuroSAT_RGB.zip": "md5:f46e308c4d50d4bf32fedad2d3d62f3b"},
        "eurosat",
        read_class_zip,
        "zenodo.org/records/7711810, MIT; every fifth image of a class is for the test, no official split",
    ),
    "flowers102": Published(
        "Oxford Flowers 102",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        {
            "102flowers.tgz": "md5:52808999861908f626f3c1f4e79d11fa",
            "imagelabels.mat": "md5:e0620be6f572b9609742df49c70aed4d",
            "setid.mat": "md5:a5357ecc9cb78c4bef273ce3793fc85c",
        },
        "flowers102",
        read_flowers,
        "www.robots.ox.ac.uk/~vgg/data/flowers/102, no licence stated; the official train (1,020) and test (6,149)",
    ),
}
"""The data sets by their short names."""
