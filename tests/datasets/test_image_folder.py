"""ImageFolder: the user's own pictures become what the user meant, or an error that names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lance_ref import datasets
from lance_ref.datasets import dataset as dataset_module


def fill(folder: Path, content: dict[str, int], size: tuple[int, int] = (6, 4)) -> Path:
    """One grey picture of that level at each path, (width, height)."""
    for name, level in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (level, level, level)).save(path)
    return folder


def test_classes_are_the_subfolders(tmp_path: Path) -> None:
    """Labels must follow the sorted names, pictures keep their size, and other files be left alone."""
    fill(tmp_path, {"dog/b.png": 40, "dog/a.PNG": 30, "cat/z.png": 10, "cat/a.jpg": 20, ".cache/x.png": 1})
    (tmp_path / "dog" / "notes.txt").write_text("no picture")
    (tmp_path / "readme.md").write_text("no class")
    data = datasets.ImageFolder(tmp_path)
    assert (data.name, data.split, data.class_names) == (tmp_path.name, "all", ("cat", "dog"))
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.images.shape == (4, 4, 6, 3)
    assert data.images[:, 0, 0, 0].tolist() == [20, 10, 30, 40]
    assert datasets.ImageFolder(tmp_path, limit=2).labels.tolist() == [0, 1]
    assert datasets.ImageFolder(str(tmp_path), (8, 5), channels=1).images.shape == (4, 8, 5, 1)


def test_train_and_test_share_their_classes(tmp_path: Path) -> None:
    """A class without test pictures would shift the labels of the test part."""
    fill(tmp_path, {"train/a/0.png": 1, "train/b/0.png": 2, "train/c/0.png": 3, "test/c/0.png": 4, "test/b/0.png": 5})
    train, test = (datasets.ImageFolder(tmp_path, split=split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2], [1, 2])
    assert test.images[:, 0, 0, 0].tolist() == [5, 4]
    assert (train.split, test.split) == ("train", "test")
    with pytest.raises(ValueError, match=r"holds train/ and test/: give split"):
        datasets.ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="split is 'valid'"):
        datasets.ImageFolder(tmp_path, split="valid")


def test_train_alone(tmp_path: Path) -> None:
    """A folder with train/ only must not become one class called "train"."""
    fill(tmp_path, {"train/a/0.png": 1, "train/b/0.png": 2})
    assert datasets.ImageFolder(tmp_path, split="train").class_names == ("a", "b")
    with pytest.raises(ValueError, match="holds train/: give split"):
        datasets.ImageFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no subfolder test/"):
        datasets.ImageFolder(tmp_path, split="test")


def test_classes_may_be_called_train(tmp_path: Path) -> None:
    """Pictures of trains beside pictures of cars are two classes, not a part of a data set."""
    fill(tmp_path, {"train/0.png": 1, "car/0.png": 2})
    assert datasets.ImageFolder(tmp_path).class_names == ("car", "train")
    with pytest.raises(FileNotFoundError, match="no subfolder train/ with classes"):
        datasets.ImageFolder(tmp_path, split="train")


def test_other_kinds_of_pixels_are_converted(tmp_path: Path) -> None:
    """Grey, indexed, transparent and CMYK pictures have other channels in the file; all must become RGB."""
    fill(tmp_path, {"a/rgb.png": 200})
    (tmp_path / "b").mkdir()
    rgb = Image.new("RGB", (6, 4), (200, 200, 200))
    rgb.convert("L").save(tmp_path / "b" / "0.png")
    rgb.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "b" / "1.png")
    Image.new("RGBA", (6, 4), (200, 200, 200, 100)).save(tmp_path / "b" / "2.png")
    rgb.convert("CMYK").save(tmp_path / "b" / "3.jpg")
    Image.new("LA", (6, 4), (200, 0)).save(tmp_path / "b" / "4.png")
    data = datasets.ImageFolder(tmp_path)
    assert data.images.shape == (6, 4, 6, 3)
    assert np.abs(data.images.astype(int) - 200).max() <= 2
    grey = datasets.ImageFolder(tmp_path, channels=1)
    assert grey.images.shape == (6, 4, 6, 1)
    assert np.abs(grey.images.astype(int) - 200).max() <= 2


def test_corrupt_picture_is_named(tmp_path: Path) -> None:
    """One damaged picture of thousands must be found by its name; it must not become a grey image."""
    fill(tmp_path, {"a/0.png": 1, "b/0.png": 2, "b/bad.jpg": 3})
    whole = (tmp_path / "b" / "bad.jpg").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "b" / "bad.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"b.bad\.jpg: not a readable image") as caught:
            datasets.ImageFolder(tmp_path)
        assert "\n" not in str(caught.value)


def test_sizes_must_agree_or_be_given(tmp_path: Path) -> None:
    """Pictures of several sizes fit no array; with image_size they do."""
    fill(tmp_path, {"a/0.png": 1})
    fill(tmp_path, {"b/0.png": 2}, size=(7, 4))
    with pytest.raises(ValueError, match=r"b.0\.png: 4x7 pixels, the first image has 4x6: give image_size"):
        datasets.ImageFolder(tmp_path)
    assert datasets.ImageFolder(tmp_path, 4).images.shape == (2, 4, 4, 3)


BAD: list[tuple[dict[str, int], dict[str, Any], str]] = [
    ({"a/0.png": 1}, {}, r"1 class\(es\), expected at least 2"),
    ({"0.png": 1}, {}, r"0 class\(es\), expected at least 2"),
    ({}, {}, r"0 class\(es\), expected at least 2"),
    ({"train/a/0.png": 1, "test/a/0.png": 1}, {"split": "train"}, r"1 class\(es\)"),
    ({"a/0.png": 1, "b/deeper/0.png": 1}, {}, "class 'b' of all holds no pictures"),
    ({"a/0.png": 1, "b/0.png": 1}, {"channels": 4}, "channels is 4, expected 1 or 3"),
    ({"a/0.png": 1, "b/0.png": 1}, {"image_size": 0}, "image_size is 0"),
    ({"a/0.png": 1, "b/0.png": 1}, {"limit": 0}, "limit is 0"),
]


@pytest.mark.parametrize(("content", "options", "message"), BAD, ids=[case[2][:20] + str(case[1]) for case in BAD])
def test_bad_folders_are_refused(
    tmp_path: Path, content: dict[str, int], options: dict[str, Any], message: str
) -> None:
    """A folder that cannot teach anything must be refused before training starts."""
    with pytest.raises(ValueError, match=message):
        datasets.ImageFolder(fill(tmp_path, content), **options)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    """A misspelt path must come back as it was given."""
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        datasets.ImageFolder(tmp_path / "nowhere")


def test_memory_is_checked_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of photographs at full size could take all memory."""
    fill(tmp_path, {"a/0.png": 1, "b/0.png": 2})
    monkeypatch.setattr(dataset_module, "MAX_BYTES", 2 * 4 * 6 * 3 - 1)
    with pytest.raises(ValueError, match="2 images of 4x6x3 take 144 bytes, more than 143"):
        datasets.ImageFolder(tmp_path)
