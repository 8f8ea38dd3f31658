"""One writer for all files: whole or not at all, several processes at once, and checksums that notice."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lance_ref.io.whole_file import (
    STALE_SECONDS,
    read_bytes,
    read_json,
    remove_leftovers,
    whole_file,
    write_json,
    write_text,
)


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """Half of a new file never takes the place of an old one."""
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def half() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_is_named(tmp_path: Path) -> None:
    """Not "has an empty name"."""
    with pytest.raises(IsADirectoryError, match="is a folder, expected the name of a file"):
        write_text(tmp_path, "text")
    with pytest.raises(FileNotFoundError, match=r"its folder does not exist: .*no/x"):
        write_text(tmp_path / "no" / "x", "text")


def test_leftovers_of_dead_processes_alone_are_removed(tmp_path: Path) -> None:
    """Of this very name, and old: a living process may be writing a young one."""
    old, young, other = (
        tmp_path / name
        for name in (".a.0123456789ab.unfinished", ".a.ba9876543210.unfinished", ".b.0123456789ab.unfinished")
    )
    for file in (old, young, other):
        file.write_bytes(b"")
    long_ago = time.time() - 2 * STALE_SECONDS
    for file in (old, other):
        os.utime(file, (long_ago, long_ago))
    write_text(tmp_path / "a", "text")
    assert [file.exists() for file in (old, young, other)] == [False, True, True]


def test_what_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    """However old it looks: a process that waits holds the file's lock, and its file becomes whole."""
    code = (
        "import sys; from lance_ref.io.whole_file import whole_file\n"
        "with whole_file(sys.argv[1]) as file:\n    file.write(b'whole'); print(flush=True); input()"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    (unfinished,) = tmp_path.glob(".a.*.unfinished")
    os.utime(unfinished, (1, 1))
    remove_leftovers(tmp_path / "a")
    remove_leftovers(tmp_path / "a", older_than=0)
    assert unfinished.exists()
    writer.communicate("\n", timeout=60)
    assert (writer.returncode, (tmp_path / "a").read_bytes()) == (0, b"whole")
    assert os.listdir(tmp_path) == ["a"]


def test_a_checksum_notices_every_changed_entry(tmp_path: Path) -> None:
    """Another value, another name, a checksum that is not there."""
    path = tmp_path / "a.json"
    write_json(path, {"a": 1, "b": [2.5, "x"]})
    text = path.read_text()
    assert read_json(path, 1000) == {"a": 1, "b": [2.5, "x"]}
    for old, new in (("2.5", "2.6"), ('"a"', '"c"'), ('"sha256"', '"sha255"')):
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"a\.json: (its checksum|has no checksum)"):
            read_json(path, 1000)


def test_sizes_are_compared_before_anything_is_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte and a device without end cost nothing."""
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="1099511627776 bytes, expected at most 10"):
        read_bytes(path, 10)
    with pytest.raises(ValueError, match="is no ordinary file"):
        read_bytes("/dev/zero", 10)


DRAWS = """
import sys
from matplotlib.figure import Figure
from analysis.reports.figures import save_figure
figure = Figure(figsize=(1, 1))
figure.subplots().plot([0, 1])
for _ in range(15):
    save_figure(figure, sys.argv[1])
"""


def test_processes_that_draw_one_figure_do_not_meet(tmp_path: Path) -> None:
    """Each has a temporary name of its own; what stays is one whole figure."""
    path = tmp_path / "figure.png"
    command = [sys.executable, "-c", DRAWS, str(path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert os.listdir(tmp_path) == ["figure.png"]


def test_a_leftover_that_another_process_takes_away_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing and the look at it; the others are removed all the same, and the listing is closed."""
    leftovers = [tmp_path / f".a.{digit * 12}.unfinished" for digit in "123"]
    long_ago = time.time() - 2 * STALE_SECONDS
    for file in leftovers:
        file.write_bytes(b"")
        os.utime(file, (long_ago, long_ago))
    unlink, gone = os.unlink, []

    def overtaken(path: str) -> None:
        unlink(path)
        if not gone:
            gone.append(path)
            raise FileNotFoundError(path)

    monkeypatch.setattr(os, "unlink", overtaken)
    write_text(tmp_path / "a", "text")
    gc.collect()  # a listing that was left open warns here, and warnings are errors
    assert os.listdir(tmp_path) == ["a"]
