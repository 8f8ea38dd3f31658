"""Readers of the published files of data sets: nothing is unpickled, unpacked to disk, or taken at its word.

Archives are read member by member into memory; a member's declared size is compared with what it must be
before anything is allocated, and its path is only ever compared with names, never opened.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lance_ref.datasets.dataset import check_memory, resize, size_pair, spread
from lance_ref.datasets.files import EXTENSIONS, MAX_FILE_BYTES, decode, image_archive, read_zip_members
from lance_ref.io.opening import one_line

Size = int | tuple[int, int] | None
Arrays = tuple[np.ndarray, np.ndarray, tuple[str, ...]]

CIFAR_PIXELS = 3 * 32 * 32
MAX_RECORDS = 50_000
MAX_NAMES_BYTES = 64 * 1024
MAX_IDX_BYTES = 64 * 1024**2
MAX_MAT_BYTES = 1024**2
TEST_EVERY = 5
"""In a published archive without a split, every fifth image of a class is for the test."""

_BROKEN = (tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, OSError, ValueError, struct.error)


# ---- CIFAR --------------------------------------------------------------------------------


def read_cifar(paths: Mapping[str, Path], split: str, image_size: Size, limit: int | None, kind: str) -> Arrays:
    """A split of CIFAR-10 or CIFAR-100 from the binary version's ``.tar.gz``, the one entry of ``paths``.

    Each record is one label byte (CIFAR-100: the superclass, then the class) and 3072 bytes of pixels,
    (3, 32, 32) in C order. Class names are those of the archive's own text files. ``kind`` is "cifar10", "cifar100" or
    "cifar100_coarse"; the other arguments are those of :func:`lance_ref.datasets.load`. What is wrong in the archive
    is a ValueError that names it.
    """
    (path,) = paths.values()
    folder = "cifar-10-batches-bin" if kind == "cifar10" else "cifar-100-binary"
    label_bytes, column = {"cifar10": (1, 0), "cifar100": (2, 1), "cifar100_coarse": (2, 0)}[kind]
    names_file = {"cifar10": "batches.meta", "cifar100": "fine_label_names", "cifar100_coarse": "coarse_label_names"}
    parts = ["train.bin" if split == "train" else "test.bin"]
    if kind == "cifar10":
        parts = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    text = f"{folder}/{names_file[kind]}.txt"
    record = label_bytes + CIFAR_PIXELS
    limits = {text: MAX_NAMES_BYTES, **{f"{folder}/{part}": MAX_RECORDS * record for part in parts}}
    found = dict(_members(path, limits))
    members = {name: found[name] for name in limits}  # in the order of the parts, not of the archive

    class_names = tuple(members.pop(text).decode("utf-8", "replace").split())
    for name, content in members.items():
        if not content or len(content) % record:
            raise ValueError(f"{path}: member {name}: {len(content)} bytes, expected a multiple of {record}")
    rows = np.concatenate([np.frombuffer(content, np.uint8).reshape(-1, record) for content in members.values()])
    labels = rows[:, column].astype(np.int64)
    if labels.max() >= len(class_names):
        raise ValueError(f"{path}: labels up to {labels.max()}, but {text} names {len(class_names)} classes")
    chosen = spread(labels, limit)
    images = rows[chosen, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, 32, 32, 3)
    return _resized(np.ascontiguousarray(images), image_size), labels[chosen], class_names


def _members(path: Path, limits: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """The named members of a ``.tar.gz`` as they come; ``limits`` are the most bytes that each may have."""
    left = set(limits)
    try:
        with tarfile.open(path, "r:gz") as archive:
            for info in archive:
                if info.name in left:
                    left.discard(info.name)
                    yield info.name, _read_tar_member(archive, info, limits[info.name])
                if not left:
                    return
    except _BROKEN as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    raise ValueError(f"{path}: member {min(left)} is missing")


def _read_tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo, most: int) -> bytes:
    if not info.isreg():
        raise ValueError(f"member {info.name} is no regular file")
    if info.size > most:
        raise ValueError(f"member {info.name} declares {info.size} bytes, at most {most} are read")
    file = archive.extractfile(info)  # a reader; nothing is written
    content = b"" if file is None else file.read(info.size)
    if len(content) != info.size:
        raise ValueError(f"member {info.name} is truncated: {len(content)} of {info.size} bytes")
    return content


# ---- MNIST --------------------------------------------------------------------------------


def read_idx(paths: Mapping[str, Path], split: str, image_size: Size, limit: int | None) -> Arrays:
    """A split of MNIST from its four ``idx`` files (big-endian header: 0, 0, type, dimensions, then sizes)."""
    stem = "train" if split == "train" else "t10k"
    images_path, labels_path = paths[f"{stem}-images-idx3-ubyte.gz"], paths[f"{stem}-labels-idx1-ubyte.gz"]
    images, labels = _read_idx_file(images_path, 3), _read_idx_file(labels_path, 1)
    if len(labels) != len(images) or not images.size:
        raise ValueError(f"{labels_path}: {len(labels)} labels for images of shape {images.shape}")
    if labels.max() > 9:
        raise ValueError(f"{labels_path}: labels up to {labels.max()}, expected 0..9")
    chosen = spread(labels, limit)
    names = tuple("0123456789")
    return _resized(images[chosen][..., None], image_size), labels[chosen].astype(np.int64), names  # (N, H, W, 1)


def _read_idx_file(path: Path, ndim: int) -> np.ndarray:
    """An ``idx`` file of unsigned bytes with that many dimensions."""
    try:
        with gzip.open(path, "rb") as file:
            magic, *shape = struct.unpack(f">{1 + ndim}I", file.read(4 * (1 + ndim)))
            if magic != 0x0800 + ndim:
                raise ValueError(f"starts with {magic:#010x}, expected {0x0800 + ndim:#010x}")
            count = math.prod(shape)
            if count > MAX_IDX_BYTES:
                raise ValueError(f"declares shape {tuple(shape)}, at most {MAX_IDX_BYTES} bytes are read")
            content = file.read(count)
            if len(content) != count or file.read(1):
                raise ValueError(f"declares shape {tuple(shape)}, but does not hold {count} bytes")
    except _BROKEN as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    return np.frombuffer(content, np.uint8).reshape(shape)


# ---- archives of pictures -----------------------------------------------------------------


def read_class_zip(paths: Mapping[str, Path], split: str, image_size: Size, limit: int | None) -> Arrays:
    """A split of EuroSAT from the zip archive of ``<top>/<class>/<Class>_<number>.jpg``.

    There is no official split. Here the images of a class are sorted by number, and every fifth is for
    the test; neighbouring patches of one scene may fall on both sides.
    """
    (path,) = paths.values()
    with image_archive(path) as archive:
        parts = {name: name.split("/") for name in archive.namelist() if name.lower().endswith(EXTENSIONS)}
        by_class: dict[str, list[str]] = {}
        for name, part in parts.items():
            if len(part) == 3:
                by_class.setdefault(part[1], []).append(name)
        class_names = tuple(sorted(by_class))
        members: list[tuple[str, int]] = []
        for label, class_name in enumerate(class_names):
            ordered = sorted(by_class[class_name], key=_by_number)
            members += [
                (name, label)
                for position, name in enumerate(ordered)
                if (position % TEST_EVERY == TEST_EVERY - 1) == (split == "test")
            ]
        if not members:
            raise ValueError(f"{path}: no images for {split} under <folder>/<class>/")
        images, labels = read_zip_members(archive, path, members, image_size, limit)
    return images, labels, class_names


def _by_number(name: str) -> tuple[int, str]:
    digits = re.findall(r"\d+", name.rpartition("/")[2])
    return (int(digits[-1][:18]) if digits else 0), name


def read_flowers(paths: Mapping[str, Path], split: str, image_size: Size, limit: int | None) -> Arrays:
    """The official train (1,020) or test (6,149) part of Oxford Flowers 102; the validation part is not used.

    The pictures differ in size, so ``image_size`` is needed: each is cut around its centre to that aspect
    ratio and resized bilinearly. Classes are named by the data set's labels, ``"001"`` to ``"102"``.
    """
    archive_path = paths["102flowers.tgz"]
    if image_size is None:
        raise ValueError(f"{archive_path}: the pictures differ in size: give image_size, e.g. 128")
    size = size_pair(image_size)
    all_labels = _read_mat(paths["imagelabels.mat"], "labels", 102)
    numbers = _read_mat(paths["setid.mat"], "trnid" if split == "train" else "tstid", len(all_labels))
    numbers = np.sort(numbers)
    labels = all_labels[numbers - 1] - 1
    chosen = spread(labels, limit)
    check_memory(len(chosen), size, 3)
    rows = {f"jpg/image_{number:05d}.jpg": row for row, number in enumerate(numbers[chosen])}
    images = np.empty((len(chosen), *size, 3), dtype=np.uint8)
    for name, content in _members(archive_path, dict.fromkeys(rows, MAX_FILE_BYTES)):
        images[rows[name]] = decode(content, f"{archive_path}: member {name}", size)
    return images, labels[chosen], tuple(f"{label:03d}" for label in range(1, 103))


def _read_mat(path: Path, key: str, most: int) -> np.ndarray:
    """A row of integers 1..``most`` of a MATLAB 5 file, as int64 (N,)."""
    from scipy.io import loadmat

    if path.stat().st_size > MAX_MAT_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, at most {MAX_MAT_BYTES} are read")
    try:
        values: Any = loadmat(path, variable_names=[key]).get(key)
    except Exception as error:  # the parser raises whatever a damaged file leads it to
        raise ValueError(f"{path}: not a readable MATLAB 5 file: {one_line(error)}") from None
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "iu" or not values.size:
        raise ValueError(f"{path}: variable {key!r} is missing or holds no row of integers")
    numbers = values.ravel().astype(np.int64)
    if numbers.min() < 1 or numbers.max() > most:
        raise ValueError(f"{path}: {key} runs from {numbers.min()} to {numbers.max()}, expected 1..{most}")
    return numbers


# ---- shared -------------------------------------------------------------------------------


def _resized(images: np.ndarray, image_size: Size) -> np.ndarray:
    if image_size is None:
        return images
    check_memory(len(images), size_pair(image_size), images.shape[3])
    return resize(images, image_size)
