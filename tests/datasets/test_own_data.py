"""The user's own data: what is said with --data becomes the images that were meant, or an error says why."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lance_ref import datasets


def arrays(count: int = 20, shape: tuple[int, ...] = (4, 6), classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Images of which each one is told from all others by its first pixel, and labels 0, 1, 0, 1, …"""
    x = np.zeros((count, *shape), np.uint8)
    x[:, 0, 0] = np.arange(count).reshape(-1, *[1] * (len(shape) - 2))
    return x, np.arange(count) % classes


def write(path: Path, **content: np.ndarray) -> str:
    np.savez(path, **content)
    return str(path)


def test_parts_of_a_file_of_arrays(tmp_path: Path) -> None:
    """x_train … y_test: each part is its own, in its order; both have the classes of both."""
    x, y = arrays(6, classes=3)
    file = write(tmp_path / "d.npz", x_train=x[:4], y_train=y[:4] % 2, x_test=x[4:], y_test=np.array([2, 0]))
    train, test, both = (datasets.open_data(file, split) for split in ("train", "test", "all"))
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert test.images[:, 0, 0, 0].tolist() == [4, 5]
    assert both.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert (train.num_classes, test.num_classes, test.class_names) == (3, 3, ("0", "1", "2"))
    assert (train.name, train.split, both.split) == ("d", "train", "train + test")
    assert datasets.load_arrays(file, "test").labels.tolist() == [2, 0]


def test_without_a_test_part_a_fifth_of_each_class_is_one(tmp_path: Path) -> None:
    """x and y: 2 of 10 images of each class are the test set, the same ones each time, and none is in both parts."""
    x, y = arrays(20)
    file = write(tmp_path / "d.npz", x=x, y=y, class_names=np.array(["cat", "dog"]))
    train, test = (datasets.open_data(file, split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [8, 8]
    assert np.bincount(test.labels).tolist() == [2, 2]
    seen = [*train.images[:, 0, 0, 0], *test.images[:, 0, 0, 0]]
    assert sorted(seen) == list(range(20))
    assert test.images.tolist() == datasets.open_data(file, "test").images.tolist()
    assert train.class_names == ("cat", "dog")
    assert "a fifth of each class is the test set" in test.source


@pytest.mark.parametrize(
    ("channels", "asked", "expected"),
    [(5, None, [7, 14, 21, 28, 35]), (5, 3, [7, 14, 21]), (5, 1, [21]), (1, 3, [7, 7, 7]), (3, 4, [7, 14, 21, 7])],
)
def test_any_number_of_channels(tmp_path: Path, channels: int, asked: int | None, expected: list[int]) -> None:
    """Channels c of value 7 (c + 1): as they are, the first ones, their mean, and repeated."""
    x = np.broadcast_to(7 * np.arange(1, channels + 1, dtype=np.uint8), (4, 3, 3, channels))
    found = datasets.open_data(write(tmp_path / "d.npz", x=x, y=np.arange(4) % 2), "all", channels=asked)
    assert found.images[0, 2, 1].tolist() == expected


def test_five_channels_are_resized_one_by_one() -> None:
    """A picture of five channels in another size has in each channel what a grey picture would have."""
    x = np.random.default_rng(0).integers(0, 256, (2, 7, 5, 5), dtype=np.uint8)
    found = datasets.resize(x, (3, 4))
    for c in range(5):
        np.testing.assert_array_equal(found[..., c : c + 1], datasets.resize(x[..., c : c + 1], (3, 4)))


def test_a_folder_without_parts_has_a_test_set(tmp_path: Path) -> None:
    """One sub-folder a class: 4 of 5 pictures train, the other one tests; without classes all of them are taken."""
    for name in ("a", "b"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (4, 4), (10 * i, 0, 0)).save(tmp_path / "own" / name / f"{i}.png")
    folder = str(tmp_path / "own")
    sizes = {split: len(datasets.open_data(folder, split)) for split in ("train", "test", "all")}
    assert sizes == {"train": 8, "test": 2, "all": 10}
    assert datasets.open_data(folder, channels=1).images.shape == (8, 4, 4, 1)
    flat = datasets.open_data(f"{folder}/a", "train", image_size=4, labelled=False)
    assert flat.images.shape == (5, 4, 4, 3)


def test_the_limit_is_spread_over_the_classes(tmp_path: Path) -> None:
    """Four of twenty images: two of each class."""
    x, y = arrays(20)
    found = datasets.open_data(write(tmp_path / "d.npz", x=x, y=np.sort(y)), "train", limit=4)
    assert found.labels.tolist() == [0, 0, 1, 1]


def test_a_checksum_of_every_kind_of_data(tmp_path: Path) -> None:
    """It changes with one pixel and with a name, and with nothing else."""
    x, y = arrays()
    file = write(tmp_path / "d.npz", x=x, y=y)
    before = datasets.checksum(file)
    x[3, 2, 1] += 1
    assert datasets.checksum(write(tmp_path / "d.npz", x=x, y=y)) != before
    (tmp_path / "own" / "a").mkdir(parents=True)
    picture = tmp_path / "own" / "a" / "1.png"
    Image.new("L", (2, 2), 3).save(picture)
    first = datasets.checksum(str(tmp_path / "own"))
    assert datasets.checksum(str(tmp_path / "own")) == first
    picture.rename(picture.with_name("2.png"))
    assert datasets.checksum(str(tmp_path / "own")) != first
    assert len(datasets.checksum("digits")) == 64


X, Y = arrays(8)
BAD = {
    "floats": ({"x": X.astype(np.float32), "y": Y}, "x has shape (8, 4, 6) and dtype float32, expected uint8"),
    "vectors": ({"x": X[:, 0], "y": Y}, "expected uint8 (N, H, W) or (N, H, W, C)"),
    "no labels": ({"x": X}, "has no array 'y'"),
    "half": ({"x_train": X, "y_train": Y}, "has no array 'x_test', 'y_test'"),
    "labels of another length": ({"x": X, "y": Y[:5]}, "y has shape (5,) and dtype int64, expected integers (8,)"),
    "floating labels": ({"x": X, "y": Y / 2}, "expected integers (8,)"),
    "negative labels": ({"x": X, "y": Y - 1}, "y runs from -1 to 0"),
    "huge labels": ({"x": X, "y": Y + 10**9}, "expected labels from 0"),
    "few names": ({"x": X, "y": Y, "class_names": np.array(["one"])}, "class_names has shape (1,)"),
    "two sizes": ({"x_train": X, "y_train": Y, "x_test": X[:, 1:], "y_test": Y}, "expected one shape (H, W, C)"),
    "empty": ({"x": X[:0], "y": Y[:0]}, "x has shape (0, 4, 6)"),
    "other names": ({"images": X, "labels": Y}, "expected x_train, y_train"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, case: str) -> None:
    """The file, the array, what came and what was expected."""
    content, said = BAD[case]
    file = write(tmp_path / "d.npz", **content)
    with pytest.raises(ValueError, match=r"d\.npz: ") as error:
        datasets.open_data(file)
    assert said in str(error.value)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    """An array of objects is refused before anything of it is unpickled."""
    file = tmp_path / "d.npz"
    np.savez(file, x=np.array([{"a": 1}], dtype=object), y=np.zeros(1, int))
    with pytest.raises(ValueError, match="pickle"):
        datasets.open_data(str(file))
    (tmp_path / "p.npz").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"p\.npz"):
        datasets.open_data(str(tmp_path / "p.npz"))


def test_a_header_that_asks_for_more_than_there_is(tmp_path: Path) -> None:
    """Four terabytes of pixels in a file of a few bytes: nothing is allocated."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**20, 2048, 2048)})
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    with pytest.raises(ValueError, match="its header says shape"):
        datasets.open_data(str(tmp_path / "d.npz"))


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ("nowhere", {}, "data is 'nowhere', expected one of"),
        ("nowhere.npz", {}, "data is 'nowhere.npz', expected one of"),
        ("", {}, "data is ''"),
        ("digits", {"split": "valid"}, "split is 'valid'"),
        ("digits", {"channels": 0}, "channels is 0"),
        ("digits", {"limit": 0}, "limit is 0"),
    ],
)
def test_bad_arguments(data: str, options: dict[str, object], said: str) -> None:
    """Each is named with what was expected."""
    with pytest.raises(ValueError, match=re.escape(said)):
        datasets.open_data(data, **options)  # type: ignore[arg-type]
