"""Reading files from anywhere: what is whole is read exactly, everything else is refused in one line."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref.io.npz import REMEDY, load_npz, save_npz

DTYPES = [np.bool_, np.uint8, np.int16, np.int64, np.float32, np.float64, np.complex64, "S5", "U7", ">f4"]


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def header(text: str) -> bytes:
    """An npy header with this text, and no data."""
    padded = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded


def write_zip(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that occur twice
        for name, content in members:
            archive.writestr(name, content)


def refused(path: Path, message: str, **options: Any) -> None:
    """load_npz raises one line that names the file."""
    with pytest.raises(ValueError, match=message) as caught:
        load_npz(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    fortran=st.booleans(),
)
def test_round_trip_is_exact(
    tmp_path_factory: Any, data: Any, dtype: Any, shape: tuple[int, ...], fortran: bool
) -> None:
    """Every dtype, shape (also empty and 0-d) and memory order comes back bit by bit, and NumPy reads it too."""
    raw = np.random.default_rng(data.draw(st.integers(0, 99))).integers(33, 90, size=shape)
    array = np.asarray(raw.astype(dtype), order="F" if fortran else "C")
    path = tmp_path_factory.mktemp("npz") / "file.npz"
    save_npz(path, {"a": array, "b/c": np.arange(3)})
    loaded = load_npz(path)
    assert list(loaded) == ["a", "b/c"]
    assert loaded["a"].dtype == array.dtype
    np.testing.assert_array_equal(loaded["a"], array)
    assert loaded["a"].flags.writeable
    with np.load(path, allow_pickle=False) as by_numpy:
        np.testing.assert_array_equal(by_numpy["a"], array)


def test_reads_what_numpy_writes_compressed(tmp_path: Path) -> None:
    """np.savez_compressed files, larger than one chunk and larger than the header's buffer."""
    path = tmp_path / "numpy.npz"
    x = np.random.default_rng(0).integers(0, 9, (700, 1000)).astype(np.float32)  # 2.8 MB
    np.savez_compressed(path, x=x, y=np.asfortranarray(x[:3]))
    loaded = load_npz(path)
    np.testing.assert_array_equal(loaded["x"], x)
    np.testing.assert_array_equal(loaded["y"], x[:3])


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock and no platform in the file: rebuilding a shipped file changes nothing."""
    arrays = {"x": np.arange(5.0), "label": np.array("text")}
    save_npz(tmp_path / "a.npz", arrays)
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setattr("sys.platform", "win32")
    save_npz(tmp_path / "b.npz", arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All or nothing: a failing move or a full disk keeps the old file, without temporary leftovers."""
    path = tmp_path / "file.npz"
    save_npz(path, {"x": np.arange(3)})
    before = path.read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    for target in ("os.replace", "numpy.lib.format.write_array"):
        with monkeypatch.context() as patch:
            patch.setattr(target, fail if target == "os.replace" else lambda *a, **k: fail())
            with pytest.raises(OSError, match="disk full"):
                save_npz(path, {"x": np.arange(4)})
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["file.npz"]


def test_save_refuses_objects_before_it_writes(tmp_path: Path) -> None:
    """An object array would be a pickle."""
    with pytest.raises(TypeError, match="'bad' has dtype object"):
        save_npz(tmp_path / "x.npz", {"good": np.ones(2), "bad": np.array([{}])})
    assert not os.listdir(tmp_path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    """Not there is something else than broken."""
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "none.npz")


class Exploit:
    """Unpickling this would run code."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("exploited",))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("x.npy", npy(np.array([Exploit()], object), allow_pickle=True))], "x.npy: is an object array"),
        ([("x.npy", pickle.dumps([1]))], "x.npy: .*magic"),
        ([("x.txt", b"hello")], "'x.txt', expected only .npy"),
        ([("x.npy", b"")], "x.npy: .*magic|x.npy: EOF"),
        ([("x.npy", npy(np.arange(3))), ("x.npy", npy(np.arange(3)))], "'x.npy' twice"),
        ([("x.npy", npy(np.arange(3.0))[:-1])], r"x.npy: its header says shape \(3,\) float64, 24 bytes, .* 23"),
        ([("x.npy", npy(np.arange(3.0)) + b"\0")], "24 bytes, but it holds 25"),
        ([("x.npy", header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}"))], "holds 0"),
        ([("x.npy", header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1)}"))], "shape"),
        ([("x.npy", header("{'descr': '<U0', 'fortran_order': False, 'shape': (9,)}"))], "expected numbers or text"),
        ([("x.npy", header("{'descr': '<M8[s]', 'fortran_order': False, 'shape': (0,)}"))], "expected numbers or text"),
        ([("x.npy", header("__import__('os').mkdir('exploited')"))], "x.npy: "),
        ([("x.npy", header("{" + " " * 12000 + "}"))], "x.npy: "),
        ([("x.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1))], "x.npy: "),
        ([("x.npy", b"\x93NUMPY\x03\x00" + struct.pack("<I", 4) + b"{}\n")], r"format \(3, 0\)"),
    ],
)
def test_members_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[tuple[str, bytes]], message: str
) -> None:
    """Pickles, wrong sizes, wrong headers: refused without running or allocating anything."""
    monkeypatch.chdir(tmp_path)
    write_zip(tmp_path / "x.npz", members)
    tracemalloc.start()
    refused(tmp_path / "x.npz", message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert os.listdir(tmp_path) == ["x.npz"]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """Cut a good file anywhere: never a wrong array, always one line."""
    path = tmp_path / "x.npz"
    save_npz(path, {"x": np.arange(5.0), "y": np.arange(3)})
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        refused(path, "x.npz: ")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_in_the_data_is_refused(tmp_path: Path, compressed: bool) -> None:
    """The checksum is compared, also for a member that is read to its last byte and no further."""
    path = tmp_path / "x.npz"
    write_zip(path, [("x.npy", npy(np.arange(5000.0)))], zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    refused(path, "x.npy")


def test_the_total_size_is_bounded(tmp_path: Path) -> None:
    """Two arrays that fit one by one, but not together."""
    path = tmp_path / "x.npz"
    save_npz(path, {"x": np.zeros(100), "y": np.zeros(100)})
    assert len(load_npz(path, max_bytes=2100)) == 2
    refused(path, "expected at most 1700", max_bytes=1700)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """64 MiB of zeros in 64 KiB on disk: over the bound, refused from the directory alone."""
    path = tmp_path / "x.npz"
    write_zip(path, [("x.npy", npy(np.zeros(2**23)))], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**17
    tracemalloc.start()
    refused(path, "expected at most", max_bytes=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_directory_that_lies_about_sizes_is_refused(tmp_path: Path, method: int) -> None:
    """A member that claims a gigabyte in a file of a few hundred bytes is not believed, nothing is allocated."""
    path = tmp_path / "x.npz"
    content = header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000,)}")
    claimed = struct.pack("<I", 1_000_000_000 + len(content))
    write_zip(path, [("x.npy", content)], method)
    raw = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 18), (b"PK\x01\x02", 20)):  # sizes in the local and central headers
        at = raw.index(signature) + offset
        raw[at + 4 : at + 8] = claimed
        if method == zipfile.ZIP_STORED:
            raw[at : at + 4] = claimed
    path.write_bytes(raw)
    refused(path, f"claims {1_000_000_000 + len(content)} bytes, more than the file of", max_bytes=2**33)


def test_something_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    """A text file, a bare .npy and an empty file."""
    path = tmp_path / "x.npz"
    for content in (b"", b"hello", npy(np.arange(3))):
        path.write_bytes(content)
        refused(path, "not a zip")


def test_reads_the_real_files(data_dir: Path) -> None:
    """The data sets and weights that the project uses, exactly as NumPy reads them."""
    for path in [data_dir / "omniglot_small_28.npz", *sorted((data_dir / "weights").glob("*.npz"))]:
        loaded = load_npz(path)
        with np.load(path, allow_pickle=False) as expected:
            assert set(loaded) == set(expected.files)
            for name in expected.files:
                np.testing.assert_array_equal(loaded[name], expected[name], err_msg=f"{path.name}: {name}")


def test_every_byte_of_a_small_file(tmp_path: Path) -> None:
    """Headers, names and the record at the end included: all arrays are the same, or the file is refused by name."""
    path = tmp_path / "x.npz"
    save_npz(path, {"x": np.arange(3.0), "names": np.array(["a", "b"])})
    content = path.read_bytes()
    for at in range(len(content)):
        for bit in (0, at % 7 + 1):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = load_npz(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: "), at  # noqa: PT017
                assert str(error).endswith(REMEDY), at  # noqa: PT017
                continue
            assert list(found) == ["x", "names"], at
            assert (found["x"].dtype, found["x"].tolist()) == (np.dtype("<f8"), [0, 1, 2]), at
            assert found["names"].tolist() == ["a", "b"], at


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def test_exchanged_members_are_refused(tmp_path: Path) -> None:
    """Within a file or between two, each array with its own right CRC; names and order count too."""
    path = tmp_path / "x.npz"
    save_npz(path, {"a": np.arange(3), "b": np.arange(3) + 2})
    other = members_of(path)
    save_npz(path, {"a": np.arange(3), "b": np.arange(3) + 1})
    own = members_of(path)
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
    for changed in (
        {"a.npy": own["b.npy"], "b.npy": own["a.npy"]},
        {"b.npy": own["b.npy"], "a.npy": own["a.npy"]},
        {"b.npy": own["a.npy"], "a.npy": own["b.npy"]},
        {"a.npy": own["a.npy"]},
        {"a.npy": own["a.npy"], "b.npy": other["b.npy"]},
    ):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in changed.items():
                archive.writestr(name, data)
            archive.comment = comment
        refused(path, "its checksum is not that of its contents; if it was sound before")
    write_zip(path, list(own.items()))
    assert list(load_npz(path)) == ["a", "b"], "other programs write no checksum"
    refused(path, "it has no checksum", needs_checksum=True)
