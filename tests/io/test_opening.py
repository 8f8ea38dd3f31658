"""Files that may come from anywhere: kind, size and number of entries are known before anything is read."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.ranks.spectra_file import load_spectra
from lance_ref import Calibration, checkpoint, nn
from lance_ref.datasets.files import read_zip
from lance_ref.io import opening, whole_file
from lance_ref.io.npz import load_npz, save_npz
from lance_ref.io.opening import open_regular, open_zip
from lance_ref.io.whole_file import read_bytes

ROOT = Path(__file__).parents[2]

READERS: dict[str, Callable[[Path], Any]] = {
    "npz": load_npz,
    "calibration": Calibration.load,
    "checkpoint": lambda path: checkpoint.load(path, nn.Linear(2, 1)),
    "spectra": load_spectra,
    "images": lambda path: read_zip(path, "train", None, None),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_devices_and_pipes_are_refused_unread(read: Callable[[Path], Any], tmp_path: Path) -> None:
    """/dev/zero never ends, and a pipe that nobody writes to never begins."""
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"{path.name}.* is no ordinary file but a device or a pipe"):
            read(path)


@pytest.mark.parametrize("read", [READERS[name] for name in READERS if name != "images"])
def test_a_folder_and_a_missing_file_are_named(read: Callable[[Path], Any], tmp_path: Path) -> None:
    """A missing one is an OSError, as for any other file."""
    with pytest.raises(ValueError, match=f"{tmp_path}: is no ordinary file but a folder"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


def test_a_size_is_known_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte; also of a file that grows while it is read."""
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ValueError, match="x: 5 bytes, expected at most 4"):
        open_regular(path, 4)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ValueError, match="expected at most 4"):
            open_regular(path, 4)
    assert len(os.listdir("/proc/self/fd")) == before, "what is refused is closed"
    monkeypatch.setattr(whole_file, "open_regular", lambda path, most: path.open("rb"))
    with pytest.raises(ValueError, match="x: more than 4 bytes"):
        read_bytes(path, 4)


def many_entries(path: Path, count: int) -> None:
    """A zip archive whose table of contents has so many entries, all of one member of no bytes."""
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, 8, 0)
    with path.open("wb") as file:
        file.write(local + b"name.npy")
        for number in range(count):
            name = b"%08x.npy" % number
            file.write(struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0))
            file.write(name)
        size, at = 58 * count, len(local) + 8
        end = file.tell()
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, at))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def test_a_million_entries_cost_nothing(tmp_path: Path) -> None:
    """``zipfile`` alone would take gigabytes for the table of contents; ours takes none of it."""
    many_entries(tmp_path / "few.npz", 3)
    with zipfile.ZipFile(tmp_path / "few.npz") as archive:
        assert len(archive.infolist()) == 3, "the table of contents is a right one"
    many_entries(tmp_path / "many.npz", 1_000_000)
    program = f"""
import resource, time
from pathlib import Path
from lance_ref.io.npz import load_npz
from lance_ref.datasets.files import read_zip
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for read in (load_npz, lambda path: read_zip(path, "train", None, None)):
    try:
        read(Path({str(tmp_path / "many.npz")!r}))
    except ValueError as error:
        assert "its table of contents has 58000000 bytes, expected at most" in str(error), error
    else:
        raise SystemExit("not refused")
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000
assert time.process_time() - started < 1
"""
    environment = {**os.environ, "LANCE_REF_NUMBA": "0"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_bound_on_the_table_of_contents(tmp_path: Path) -> None:
    """To the byte; what has to be checkpointed is far below."""
    path = tmp_path / "x.npz"
    save_npz(path, {f"{i}": np.zeros(1) for i in range(100)})
    with zipfile.ZipFile(path) as archive:
        size = archive.fp.seek(0, 2) - archive.start_dir - 22 - len(archive.comment)  # type: ignore[union-attr]
    with open_zip(path, size) as archive:
        assert len(archive.infolist()) == 100
    with pytest.raises(ValueError, match=f"its table of contents has {size} bytes, expected at most {size - 1}"):
        open_zip(path, size - 1).__enter__()
    assert size * 100 < opening.DIRECTORY_BYTES
