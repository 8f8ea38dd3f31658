"""Readers of published files: what is damaged or hostile is refused, by name, before memory is taken."""

from __future__ import annotations

import gzip
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_files import IMAGES, cifar100_archive, encoded, flowers_files, idx, mat, mnist_files, tar_gz

from lance_ref.datasets import archives


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


TRAIN = "cifar-100-binary/train.bin"
NAMES = "cifar-100-binary/fine_label_names.txt"
BAD_TARS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({TRAIN: None}, f"member {TRAIN} is missing"),
    "elsewhere": ({TRAIN: None, f"../{TRAIN}": b"x", f"/{TRAIN}": b"x"}, f"member {TRAIN} is missing"),
    "link": ({TRAIN: link(TRAIN, "/etc/hostname")}, f"member {TRAIN} is no regular file"),
    "ragged": ({TRAIN: bytes(3074 + 1)}, f"member {TRAIN}: 3075 bytes, expected a multiple of 3074"),
    "empty": ({TRAIN: b""}, f"member {TRAIN}: 0 bytes"),
    "label": ({TRAIN: bytes([0, 3]) + bytes(3072)}, "labels up to 3, but .* names 3 classes"),
    "names": ({NAMES: b"x" * 70000}, f"member {NAMES} declares 70000 bytes, at most 65536"),
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_bad_tar_is_refused(tmp_path: Path, case: str) -> None:
    """An archive is never unpacked, and a member that is not what it must be is named."""
    change, message = BAD_TARS[case]
    members = {key: content for key, content in {**cifar100_archive(), **change}.items() if content is not None}
    path = tmp_path / "c.tar.gz"
    path.write_bytes(tar_gz(members))
    with pytest.raises(ValueError, match=message) as caught:
        archives.read_cifar({path.name: path}, "train", None, None, "cifar100")
    assert str(caught.value).startswith(str(path))
    assert list(tmp_path.rglob("*")) == [path]


def test_oversized_member_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that declares gigabytes must not make anyone allocate them."""
    monkeypatch.setattr(archives, "MAX_RECORDS", 2)
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda *_: pytest.fail("was read"))
    path = tmp_path / "c.tar.gz"
    path.write_bytes(tar_gz({TRAIN: bytes(3 * 3074)}))
    with pytest.raises(ValueError, match="declares 9222 bytes, at most 6148"):
        archives.read_cifar({path.name: path}, "train", None, None, "cifar100")


@pytest.mark.parametrize("content", [b"", b"text", tar_gz(cifar100_archive())[:2000]], ids=["empty", "text", "cut"])
def test_unreadable_tar_is_named(tmp_path: Path, content: bytes) -> None:
    """Whatever the decompressor raises, the error names the archive in one line."""
    path = tmp_path / "c.tar.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.tar\.gz: ") as caught:
        archives.read_cifar({path.name: path}, "train", None, None, "cifar100")
    assert "\n" not in str(caught.value)


LABELS = "train-labels-idx1-ubyte.gz"
PIXELS = "train-images-idx3-ubyte.gz"
BAD_IDX: dict[str, tuple[dict[str, bytes], str]] = {
    "magic": ({PIXELS: idx(IMAGES[:5, ..., 0], 0x0D03)}, "starts with 0x00000d03, expected 0x00000803"),
    "huge": ({PIXELS: gzip.compress(struct.pack(">4I", 0x0803, 2**31, 2**15, 2**15))}, "declares shape .*at most"),
    "short": ({PIXELS: gzip.compress(struct.pack(">4I", 0x0803, 5, 32, 32) + bytes(99))}, "does not hold 5120"),
    "long": ({LABELS: gzip.compress(struct.pack(">2I", 0x0801, 5) + bytes(6))}, "does not hold 5 bytes"),
    "header": ({LABELS: gzip.compress(b"\0\0")}, LABELS),
    "count": ({LABELS: idx(np.arange(4))}, r"4 labels for images of shape \(5, 32, 32\)"),
    "label": ({LABELS: idx(np.array([1, 2, 3, 4, 10]))}, "labels up to 10"),
    "no gzip": ({LABELS: b"plain"}, LABELS),
    "cut": ({PIXELS: mnist_files()[PIXELS][:200]}, PIXELS),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_is_named(tmp_path: Path, case: str) -> None:
    """Sizes in a header are claims; they are compared before memory is taken."""
    change, message = BAD_IDX[case]
    for name, content in {**mnist_files(), **change}.items():
        (tmp_path / name).write_bytes(content)
    paths = {name: tmp_path / name for name in mnist_files()}
    with pytest.raises(ValueError, match=message) as caught:
        archives.read_idx(paths, "train", None, None)
    assert str(caught.value).startswith(str(tmp_path))


BAD_FLOWERS: dict[str, tuple[dict[str, bytes], str]] = {
    "no mat": ({"setid.mat": b"text"}, r"setid\.mat: not a readable MATLAB 5 file"),
    "empty mat": ({"setid.mat": b""}, r"setid\.mat: not a readable MATLAB 5 file"),
    "other mat": ({"imagelabels.mat": mat(other=np.ones((1, 3), np.uint8))}, "variable 'labels' is missing"),
    "floats": ({"imagelabels.mat": mat(labels=np.ones((1, 4)))}, "holds no row of integers"),
    "label 0": (
        {"imagelabels.mat": mat(labels=np.array([[0, 1, 2, 3]]))},
        r"labels runs from 0 to 3, expected 1\.\.102",
    ),
    "number": ({"setid.mat": mat(trnid=np.array([[5]]))}, r"trnid runs from 5 to 5, expected 1\.\.4"),
    "picture": ({"102flowers.tgz": tar_gz({"jpg/image_00002.jpg": b"x"})}, r"image_00002\.jpg: not a readable image"),
    "absent": ({"102flowers.tgz": tar_gz({"jpg/image_00002.jpg": encoded(1)})}, r"image_00003\.jpg is missing"),
}


@pytest.mark.parametrize("case", BAD_FLOWERS)
def test_bad_flowers_are_named(tmp_path: Path, case: str) -> None:
    """Labels and numbers index arrays; out of range they would wrap round or point elsewhere."""
    change, message = BAD_FLOWERS[case]
    for name, content in {**flowers_files(), **change}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        archives.read_flowers({name: tmp_path / name for name in flowers_files()}, "train", 4, None)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
