"""Data sets: what is read is what is in the file, nothing unbounded is decoded, batches are reproducible."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lance_ref import F, datasets, manual_seed, models, optim
from lance_ref.datasets import dataset as dataset_module
from lance_ref.datasets import files
from lance_ref.datasets.dataset import spread


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """A folder of data with a small flowers archive; members are deliberately out of order."""
    members = {
        f"{split}/{name}/{i}.png": picture((10 * index, i, 0))
        for split in ("train", "test")
        for index, name in [(2, "c"), (0, "a"), (1, "b")]
        for i in (2, 0, 1)
    }
    archive(tmp_path / "flowers_128.zip", {"LICENSE.txt": b"text", **members})
    return tmp_path


# ---- digits -------------------------------------------------------------------------------


def test_digits_are_scikit_learns() -> None:
    """A wrong copy, split or scaling of the bundled file would change every lesson."""
    reference = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = datasets.load_digits("train"), datasets.load_digits("test")
    assert (len(train), len(test)) == (1437, 360)
    images = np.concatenate([train.images, test.images])[..., 0]
    np.testing.assert_array_equal(np.rint(images / 255 * 16), reference.images)
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), reference.target)
    assert (images.min(), images.max()) == (0, 255)


def test_digits_scaled_up_in_colour() -> None:
    """A net for 32-pixel colour images would not take the digits."""
    digits = datasets.load("digits", "test", image_size=32, limit=30, channels=3)
    assert digits.images.shape == (30, 32, 32, 3)
    np.testing.assert_array_equal(digits.images[..., 0], digits.images[..., 2])
    assert np.bincount(digits.labels).tolist() == [3] * 10


# ---- limits and sizes ---------------------------------------------------------------------


def test_spread_by_hand() -> None:
    """A limit must not take all its images from the first classes."""
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    assert spread(labels, 3).tolist() == [0, 4, 6]
    assert spread(labels, 5).tolist() == [0, 1, 4, 5, 6]
    assert spread(labels, 6).tolist() == [0, 1, 2, 4, 5, 6]
    assert spread(labels, 100).tolist() == list(range(7))
    assert spread(labels, None).tolist() == list(range(7))


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "5"])
def test_bad_limit_is_refused(limit: object) -> None:
    """A limit of zero would give an empty data set much later."""
    with pytest.raises(ValueError, match="limit is"):
        datasets.load("digits", limit=limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("image_size", [0, -3, (4,), (4, 0), 2.5, "big"])
def test_bad_image_size_is_refused(image_size: object) -> None:
    """A bad size would come back as an error of PIL."""
    with pytest.raises(ValueError, match="image_size is"):
        datasets.load("digits", image_size=image_size)  # type: ignore[arg-type]


def test_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resizing a whole data set could take all memory instead of an error that says what to do."""
    monkeypatch.setattr(dataset_module, "MAX_BYTES", 1437 * 20 * 20 - 1)
    with pytest.raises(ValueError, match="1437 images of 20x20x1 take 574800 bytes, more than 574799; give a limit"):
        datasets.load("digits", "train", image_size=20)
    assert datasets.load("digits", "train", image_size=20, limit=1436).images.shape[1:3] == (20, 20)


def test_resize_is_bilinear() -> None:
    """Another filter, or swapped height and width, would change all pixels."""
    images = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    resized = datasets.resize(images, (8, 9))
    expected = np.asarray(Image.fromarray(images[1]).resize((9, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resized[1], expected)
    assert datasets.resize(images, (4, 6)) is images
    grey = datasets.resize(images[..., :1], 5)
    np.testing.assert_array_equal(grey[0, :, :, 0], np.asarray(Image.fromarray(images[0, :, :, 0]).resize((5, 5), 2)))


# ---- batches ------------------------------------------------------------------------------


def test_batches_cover_the_data_once() -> None:
    """A batch with repeated or lost images would train on something else."""
    digits = datasets.load_digits("test")
    seen = [(x, y) for x, y in datasets.batches(digits, 100, drop_last=False)]
    assert [len(y) for _, y in seen] == [100, 100, 100, 60]
    pixels = np.concatenate([x for x, _ in seen])
    assert (pixels.dtype, pixels.shape) == (np.dtype(np.float32), (360, 1, 8, 8))
    expected = digits.images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    order = np.lexsort(pixels.reshape(360, -1).T)
    expected_order = np.lexsort(expected.reshape(360, -1).T)
    np.testing.assert_allclose(pixels[order], expected[expected_order], rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate([y for _, y in seen])[order], digits.labels[expected_order])
    assert seen[0][1].dtype == np.int64


def test_batches_drop_the_last_by_default() -> None:
    """A smaller last batch would not fit a subspace calibrated for the batch size."""
    assert [len(y) for _, y in datasets.batches(datasets.load_digits("test"), 100)] == [100] * 3


def test_batches_are_deterministic_by_seed() -> None:
    """Two runs with one seed would differ; two epochs with one generator would not."""
    digits = datasets.load_digits("test", limit=60)

    def labels(rng: int | np.random.Generator | None) -> list[int]:
        return [int(label) for _, y in datasets.batches(digits, 20, rng) for label in y]

    assert labels(3) == labels(3) == labels(np.random.default_rng(3))
    assert labels(3) != labels(4)
    generator = np.random.default_rng(3)
    assert labels(generator) != labels(generator)
    assert labels(None) != labels(None)
    manual_seed(3)
    assert labels(None) == labels(3)
    manual_seed(0)
    unshuffled = np.concatenate([y for _, y in datasets.batches(digits, 20, shuffle=False)])
    np.testing.assert_array_equal(unshuffled, digits.labels)


def test_batches_normalise() -> None:
    """A mean of the wrong scale or channel would shift every activation."""
    images = np.zeros((2, 1, 1, 3), np.uint8)
    images[0, 0, 0] = (51, 102, 255)
    data = datasets.Dataset("x", "all", images, np.zeros(2, np.int64), ("a",), "here")
    mean, std = (0.1, 0.2, 0.5), (0.5, 0.1, 0.25)
    ((x, _),) = datasets.batches(data, 2, shuffle=False, normalise=(mean, std))
    np.testing.assert_allclose(x[0, :, 0, 0], [(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.1, (1 - 0.5) / 0.25], rtol=1e-6)
    ((x, _),) = datasets.batches(data, 2, shuffle=False, normalise=models.preprocess)
    np.testing.assert_array_equal(x[0, :, 0, 0], np.array([-77, -26, 127]) / 128)


def test_batches_resize_and_colour_each_batch() -> None:
    """A batch must come in the size and channels asked for, equal to resizing the whole set."""
    digits = datasets.load_digits("test", limit=10)
    ((x, _),) = datasets.batches(digits, 10, shuffle=False, image_size=16, channels=3)
    expected = datasets.load_digits("test", image_size=16, limit=10, channels=3)
    np.testing.assert_allclose(x, expected.images.transpose(0, 3, 1, 2) / 255, rtol=1e-6)


def test_bad_batches_are_refused_when_called() -> None:
    """An error inside a generator would come only with the first batch, far from its cause."""
    digits = datasets.load_digits("test", limit=10)
    with pytest.raises(ValueError, match="batch_size is 0"):
        datasets.batches(digits, 0)
    with pytest.raises(ValueError, match=r"batch_size is 11, but digits \(test\) has 10 images"):
        datasets.batches(digits, 11)
    with pytest.raises(ValueError, match="normalise is"):
        datasets.batches(digits, 5, normalise=((0.5,), (0.0,)))
    with pytest.raises(ValueError, match="normalise is"):
        datasets.batches(digits, 5, normalise=((0.5, 0.5), (1.0, 1.0)))
    with pytest.raises(ValueError, match="channels is 0"):
        datasets.batches(digits, 5, channels=0)
    with pytest.raises(ValueError, match="image_size is 0"):
        datasets.batches(digits, 5, image_size=0)


def test_dataset_checks_its_parts() -> None:
    """A label outside the classes would index past the logits."""
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1])
    with pytest.raises(ValueError, match=r"labels run from 0 to 1, expected 0\.\.0"):
        datasets.Dataset("x", "all", images, labels, ("a",), "")
    with pytest.raises(ValueError, match=r"labels has shape \(3,\)"):
        datasets.Dataset("x", "all", images, np.zeros(3, np.int64), ("a",), "")
    with pytest.raises(ValueError, match="images has shape"):
        datasets.Dataset("x", "all", images[..., :0], labels, ("a", "b"), "")
    with pytest.raises(ValueError, match="float32"):
        datasets.Dataset("x", "all", images.astype(np.float32), labels, ("a", "b"), "")
    subset = datasets.Dataset("x", "all", images, labels, ("a", "b"), "").subset([1])
    assert (subset.labels.tolist(), subset.num_classes) == ([1], 2)


# ---- archives -----------------------------------------------------------------------------


def test_archive_is_read_in_sorted_order(flowers: Path) -> None:
    """Labels and order must not depend on the order of the archive's members."""
    data = datasets.load("flowers102", "test", data_dir=flowers)
    assert data.class_names == ("a", "b", "c")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.images[:, 0, 0, 0].tolist() == [0, 0, 0, 10, 10, 10, 20, 20, 20]
    assert data.images[:, 0, 0, 1].tolist() == [0, 1, 2] * 3


def test_limit_decodes_nothing_else(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit would cost the time of the whole archive."""
    decoded = []
    original = files.decode

    def recording(encoded: bytes, where: str, *arguments: Any) -> np.ndarray:
        decoded.append(where)
        return original(encoded, where, *arguments)

    monkeypatch.setattr(files, "decode", recording)
    data = datasets.load("flowers102", "train", limit=3, data_dir=flowers, image_size=4)
    assert [name.rpartition(" ")[2] for name in decoded] == ["train/a/0.png", "train/b/0.png", "train/c/0.png"]
    assert data.images.shape == (3, 4, 4, 3)


def test_class_index_counts_the_classes_of_all_splits(tmp_path: Path) -> None:
    """A class missing from one split would shift the labels of that split."""
    members = {name: picture((0, 0, 0)) for name in ("train/a/0.png", "train/b/0.png", "test/b/0.png")}
    archive(tmp_path / "flowers_128.zip", members)
    assert datasets.load("flowers102", "test", data_dir=tmp_path).labels.tolist() == [1]


DAMAGED = {
    "text": b"this is no picture",
    "empty": b"",
    "truncated": picture((1, 2, 3), (64, 64), "JPEG")[:300],
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_member_is_named(tmp_path: Path, content: bytes) -> None:
    """A damaged picture must be an error that names archive and member, not a grey image."""
    archive(tmp_path / "flowers_128.zip", {"train/a/0.png": picture((0, 0, 0)), "train/b/bad.jpg": content})
    with pytest.raises(ValueError, match=r"flowers_128\.zip: member train/b/bad\.jpg: not a readable image"):
        datasets.load("flowers102", "train", data_dir=tmp_path)


def test_wrong_checksum_is_named(tmp_path: Path) -> None:
    """Flipped bits inside a member would go unnoticed."""
    path = archive(tmp_path / "flowers_128.zip", {"train/a/0.png": picture((0, 0, 0))})
    raw = bytearray(path.read_bytes())
    raw[60] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"member train/a/0\.png: (damaged|not a readable image)"):
        datasets.load("flowers102", "train", data_dir=tmp_path)


@pytest.mark.parametrize("content", [b"no zip", b"", b"PK\x03\x04 cut"], ids=["text", "empty", "cut"])
def test_no_archive_is_named(tmp_path: Path, content: bytes) -> None:
    """A half-downloaded file must be named."""
    (tmp_path / "cifar10_jpeg.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar10_jpeg\.zip: not a readable zip archive"):
        datasets.load("cifar10", data_dir=tmp_path)


def test_archive_without_the_split_is_named(tmp_path: Path) -> None:
    """An archive of another layout would give an empty data set."""
    archive(tmp_path / "eurosat_subset.zip", {"pictures/0.png": picture((0, 0, 0))})
    with pytest.raises(ValueError, match="no images under train/"):
        datasets.load("eurosat", data_dir=tmp_path)


def test_pictures_of_different_sizes_are_refused(tmp_path: Path) -> None:
    """Without image_size the pictures must agree in size."""
    members = {"train/a/0.png": picture((0, 0, 0)), "train/a/1.png": picture((0, 0, 0), (8, 9))}
    archive(tmp_path / "flowers_128.zip", members)
    with pytest.raises(ValueError, match=r"member train/a/1\.png: 9x8 pixels, the first image has 8x8"):
        datasets.load("flowers102", data_dir=tmp_path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 16)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (10000, 10000), (60000, 60000)], ids=["ours", "PIL warns", "PIL stops"])
def test_decompression_bomb_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    """A file of a few bytes that declares a huge picture must be refused before memory is taken."""
    archive(tmp_path / "flowers_128.zip", {"train/a/bomb.png": png_header(*size)})
    with pytest.raises(ValueError, match=r"member train/a/bomb\.png: .*pixels"):
        datasets.load("flowers102", data_dir=tmp_path, image_size=8)


def test_oversized_member_is_refused(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that declares more bytes than any picture has must not be read."""
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    with pytest.raises(ValueError, match=r"member test/a/0\.png: declares \d+ bytes, at most 10"):
        datasets.load("flowers102", "test", data_dir=flowers)


# ---- names and files ----------------------------------------------------------------------


def test_unknown_names_are_refused() -> None:
    """A typing error must come back with the names there are."""
    with pytest.raises(ValueError, match="unknown data set 'cifar', expected one of cifar10, cifar100, cifar100_c"):
        datasets.load("cifar")
    for name in ("digits", "mnist"):
        with pytest.raises(ValueError, match="split is 'valid'"):
            datasets.load(name, "valid")


def test_missing_file_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the data the error must say in one line which file is missing and where it belongs."""
    monkeypatch.delenv("LANCE_REF_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz: .*LANCE_REF_DATA") as caught:
        datasets.load("mnist")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("LANCE_REF_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"cifar10_jpeg\.zip: put it at .*LANCE_REF_DATA"):
        datasets.load("cifar10")
    with pytest.raises(FileNotFoundError, match="data_dir"):
        datasets.load("cifar10", data_dir=tmp_path)


def test_npz_of_another_layout_is_named(tmp_path: Path) -> None:
    """Wrong arrays under the right file name would be taken for images."""
    good = {"x_train": np.zeros((2, 4, 4), np.uint8), "y_train": np.array([0, 9])}
    cases = [
        ({}, "missing"),
        ({"x_train": np.zeros((2, 4, 4), np.float32)}, "expected"),
        ({"y_train": np.array([0, 10])}, r"runs from 0 to 10, expected 0\.\.9"),
        ({"y_train": np.array([0])}, "expected"),
    ]
    for change, message in cases:
        np.savez(tmp_path / "mnist.npz", **({**good, **change} if change else {"x_train": good["x_train"]}))
        with pytest.raises(ValueError, match=rf"mnist\.npz: .*{message}"):
            datasets.load("mnist", data_dir=tmp_path)
    np.savez(tmp_path / "mnist.npz", **good)
    assert datasets.load("mnist", data_dir=tmp_path, image_size=8, channels=3).images.shape == (2, 8, 8, 3)


REAL = {
    # name: (train, test, shape, classes, a class and its index)
    "mnist": (60000, 10000, (28, 28, 1), 10, ("7", 7)),
    "notmnist": (8000, 2000, (28, 28, 1), 10, ("C", 2)),
    "cifar10": (20000, 10000, (32, 32, 3), 10, ("dog", 5)),
    "split100": (25000, 5000, (32, 32, 3), 100, ("n01443537", 0)),
    "eurosat": (2000, 1000, (64, 64, 3), 10, ("SeaLake", 9)),
    "flowers102": (880, 880, (128, 128, 3), 88, ("049", 42)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str, data_dir: Path) -> None:
    """A reader that loses images, channels or classes of a real file would distort every measurement."""
    train, test, shape, classes, (class_name, index) = REAL[name]
    assert set(datasets.SOURCES) == set(datasets.names()) - {"digits"}
    assert set(REAL) == {name for name, source in datasets.SOURCES.items() if source.file is not None}
    data = datasets.load(name, "test", limit=2 * classes, data_dir=data_dir)
    assert data.images.shape == (2 * classes, *shape)
    assert np.bincount(data.labels).tolist() == [2] * classes
    assert data.class_names.index(class_name) == index
    assert data.images.std() > 20
    if name in ("mnist", "eurosat"):
        assert len(datasets.load(name, "train", data_dir=data_dir)) == train
        assert len(datasets.load(name, "test", data_dir=data_dir)) == test


def test_real_mnist_is_mnist(data_dir: Path) -> None:
    """MNIST's published first labels and pixel mean."""
    data = datasets.load("mnist", "train", data_dir=data_dir)
    assert data.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.images.mean() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_lossy_copy_is_called_so() -> None:
    """Figures on the lossy copy must never be taken for CIFAR-10's."""
    assert datasets.SOURCES["cifar10"].title == "CIFAR-10 (JPEG q75 copy)"


# ---- a part set aside -------------------------------------------------------------------------


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
def test_validation_split_is_a_stratified_partition(labels: list[int], fraction: float, seed: int) -> None:
    """An image on both sides would leak; a class with none of its images set aside could not be judged."""
    counts = np.bincount(labels, minlength=5)
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    data = datasets.Dataset("x", "train", images, np.array(labels, dtype=np.int64), tuple("abcde"), "here")
    if counts.max() < 2:
        with pytest.raises(ValueError, match="nothing can be set aside"):
            datasets.validation_split(data, fraction, seed)
        return
    train, validation = datasets.validation_split(data, fraction, seed)
    assert (train.split, validation.split, train.class_names) == ("train", "validation", data.class_names)
    both = np.concatenate([train.images, validation.images]).ravel()
    assert sorted(both) == list(range(len(labels)))
    for part in (train, validation):
        assert (np.diff(part.images.ravel().astype(int)) > 0).all()
        np.testing.assert_array_equal(part.labels, data.labels[part.images.ravel()])
    aside = np.bincount(validation.labels, minlength=5)
    for count, taken in zip(counts, aside, strict=True):
        if count < 2:
            assert taken == 0
        else:
            assert 1 <= taken <= count - 1
            assert abs(taken - fraction * count) <= 0.5 or taken in (1, count - 1)
    again = datasets.validation_split(data, fraction, seed)[1]
    np.testing.assert_array_equal(again.images, validation.images)


def test_validation_split_follows_the_seed() -> None:
    """Another seed must set other images aside, or repeated runs would share one validation part."""
    digits = datasets.load_digits("test", limit=100)
    parts = [datasets.validation_split(digits, 0.2, seed)[1].images for seed in (0, 1)]
    assert (parts[0] != parts[1]).any()
    assert len(parts[0]) == 20


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan"), True, "half"])
def test_bad_fraction_is_refused(fraction: Any) -> None:
    """A fraction of 0 or 1 would leave one part empty."""
    with pytest.raises(ValueError, match="fraction is"):
        datasets.validation_split(datasets.load_digits("test", limit=20), fraction)
    with pytest.raises(ValueError, match="seed is -1"):
        datasets.validation_split(datasets.load_digits("test", limit=20), 0.5, seed=-1)


# ---- folders ------------------------------------------------------------------------------


def test_folder_of_classes(tmp_path: Path) -> None:
    """Sorted subfolders are the classes; each picture is cut around its centre, never squeezed."""
    for name, colour in [("b", (0, 255, 0)), ("a", (255, 0, 0))]:
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.png").write_bytes(picture(colour, (12, 8)))
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    wide = np.zeros((8, 12, 3), np.uint8)
    wide[:, 2:10] = 200  # the central square
    Image.fromarray(wide).save(tmp_path / "a" / "2.png")
    data = datasets.load_folder(tmp_path, 4)
    assert (data.class_names, data.labels.tolist()) == (("a", "b"), [0, 0, 0, 1, 1])
    assert data.images.shape == (5, 4, 4, 3)
    np.testing.assert_array_equal(data.images[2], 200)
    np.testing.assert_array_equal(data.images[3], np.broadcast_to([0, 255, 0], (4, 4, 3)))
    assert datasets.load_folder(tmp_path, 4, limit=2).labels.tolist() == [0, 1]
    assert datasets.load_folder(tmp_path, (4, 6), channels=1).images.shape == (5, 4, 6, 1)


def test_flat_folder_is_one_class(tmp_path: Path) -> None:
    """A folder of unlabelled pictures serves for calibration."""
    (tmp_path / "0.jpg").write_bytes(picture((9, 9, 9), kind="JPEG"))
    data = datasets.load_folder(tmp_path, 8)
    assert (data.labels.tolist(), data.num_classes, data.split) == ([0], 1, "all")


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    """A wrong path or a damaged picture must be named."""
    with pytest.raises(FileNotFoundError, match="no such folder"):
        datasets.load_folder(tmp_path / "missing", 8)
    with pytest.raises(ValueError, match="holds no pictures"):
        datasets.load_folder(tmp_path, 8)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad\.png: not a readable image"):
        datasets.load_folder(tmp_path, 8)


def test_sideways_picture_is_turned(tmp_path: Path) -> None:
    """Photographs taken upright would lie on their side."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    image = datasets.load_folder(tmp_path, 8).images[0, :, :, 0]
    np.testing.assert_array_equal(image, np.rot90(pixels[:, :, 0], -1))


def test_deep_pixels_are_refused(tmp_path: Path) -> None:
    """16-bit pixels would be cut off at 255."""
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"0\.png: .*8 bits a channel"):
        datasets.load_folder(tmp_path, 8)


# ---- learning -----------------------------------------------------------------------------


def test_digits_can_be_learned() -> None:
    """Images, labels, batches, gradients and updates together: a floor, and far below it without updates."""

    def accuracy(lr: float) -> float:
        net = models.convnet(10, in_channels=1, channels=8, rng=0)
        optimizer = optim.Adam(net.parameters(), lr=lr)
        normalise = ((0.3,), (0.38,))
        train, test = datasets.load_digits("train"), datasets.load_digits("test")
        rng = np.random.default_rng(0)
        for _ in range(4):
            for x, y in datasets.batches(train, 32, rng, normalise=normalise):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        ((x, y),) = datasets.batches(test, len(test), normalise=normalise)
        return float((net(x).detach().numpy().argmax(axis=1) == y).mean())

    assert accuracy(0.01) > 0.85
    assert accuracy(0.0) < 0.3
