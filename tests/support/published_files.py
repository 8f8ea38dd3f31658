"""Data sets in small, in the formats in which their authors publish them."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

RNG = np.random.default_rng(0)


def tar_gz(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            if not isinstance(content, tarfile.TarInfo):
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def cifar_records(labels: list[list[int]], images: np.ndarray) -> bytes:
    """Label bytes, then the red, green and blue planes; ``images`` (N, 32, 32, 3)."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)  # (N, 3072)
    return b"".join(bytes(label) + plane.tobytes() for label, plane in zip(labels, planes, strict=True))


IMAGES = RNG.integers(0, 256, (12, 32, 32, 3), np.uint8)
FINE, COARSE = ["apple", "bee", "crab"], ["plants", "animals"]


def cifar10_archive() -> dict[str, bytes | tarfile.TarInfo]:
    folder = "cifar-10-batches-bin"
    names = ["airplane", "automobile", "bird"]
    batches: dict[str, bytes | tarfile.TarInfo] = {
        f"{folder}/data_batch_{i}.bin": cifar_records([[i % 3], [2]], IMAGES[2 * i - 2 : 2 * i]) for i in range(1, 6)
    }
    meta = ("\n".join(names) + "\n\n").encode()  # the official file ends with an empty line
    return {
        f"{folder}/batches.meta.txt": meta,
        **batches,
        f"{folder}/test_batch.bin": cifar_records([[1]], IMAGES[10:11]),
    }


def cifar100_archive() -> dict[str, bytes | tarfile.TarInfo]:
    return {
        "cifar-100-binary/fine_label_names.txt": "\n".join(FINE).encode(),
        "cifar-100-binary/coarse_label_names.txt": "\n".join(COARSE).encode(),
        "cifar-100-binary/test.bin": cifar_records([[1, 2]], IMAGES[3:4]),
        "cifar-100-binary/train.bin": cifar_records([[1, 2], [0, 0], [1, 1]], IMAGES[:3]),
    }


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim if magic is None else magic, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def mnist_files() -> dict[str, bytes]:
    grey = IMAGES[..., 0]
    return {
        "train-images-idx3-ubyte.gz": idx(grey[:5]),
        "train-labels-idx1-ubyte.gz": idx(np.array([5, 0, 4, 1, 9])),
        "t10k-images-idx3-ubyte.gz": idx(grey[5:7]),
        "t10k-labels-idx1-ubyte.gz": idx(np.array([7, 2])),
    }


def encoded(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, "PNG")
    return file.getvalue()


def eurosat_archive() -> bytes:
    """Two classes, ten pictures each, numbered 1..10; the level says class and number."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for label, name in [(1, "River"), (0, "Forest")]:
            for number in range(10, 0, -1):
                archive.writestr(f"EuroSAT_RGB/{name}/{name}_{number}.jpg", encoded(100 * label + number))
    return file.getvalue()


def mat(**variables: Any) -> bytes:
    file = io.BytesIO()
    savemat(file, variables, do_compression=True)
    return file.getvalue()


def flowers_files() -> dict[str, bytes]:
    pictures: dict[str, bytes | tarfile.TarInfo] = {
        f"jpg/image_{number:05d}.jpg": encoded(10 * number, (12, 8 + number)) for number in (4, 2, 1, 3)
    }
    return {
        "102flowers.tgz": tar_gz(pictures),
        "imagelabels.mat": mat(labels=np.array([[77, 1, 102, 77]], np.uint8)),
        "setid.mat": mat(
            trnid=np.array([[3, 2]], np.uint16), valid=np.array([[1]], np.uint16), tstid=np.array([[4, 1]], np.uint16)
        ),
    }


FILES: dict[str, dict[str, bytes]] = {
    "mnist": mnist_files(),
    "cifar10": {"cifar-10-binary.tar.gz": tar_gz(cifar10_archive())},
    "cifar100": {"cifar-100-binary.tar.gz": tar_gz(cifar100_archive())},
    "eurosat": {"EuroSAT_RGB.zip": eurosat_archive()},
    "flowers102": flowers_files(),
}
