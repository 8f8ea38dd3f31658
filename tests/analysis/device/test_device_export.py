"""``lance-ref device --export`` writes a folder of C that agrees with the program."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from analysis.device.command import main

SMALL = ("--net", "resnet8", "--tune", "last:2", "--image-size", "16")


@pytest.mark.skipif(shutil.which("gcc") is None or shutil.which("make") is None, reason="gcc or make is not installed")
def test_a_net_becomes_c_that_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert main([*SMALL, "--export", str(folder), "--weights", "int8"]) == 0
    assert f"compare it with this program: make -C {folder} test" in capsys.readouterr().out
    made = subprocess.run(["make", "CFLAGS=-O1", "test"], cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "all numbers are those of the NumPy program" in made.stdout


def test_the_report_for_machines_says_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--export", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exported"]["ram_bytes"] == report["ram_bytes"]
    assert report["exported"]["weights"] == "float32"


def test_sections_of_the_linker(tmp_path: Path) -> None:
    assert (
        main([*SMALL, "--export", str(tmp_path / "out"), "--ram-section", ".bss.dtcm", "--flash-section", ".qspi"]) == 0
    )
    header = (tmp_path / "out" / "lance_net.h").read_text(encoding="utf-8")
    assert 'LANCE_RAM __attribute__((section(".bss.dtcm")))' in header
    assert 'LANCE_FLASH __attribute__((section(".qspi")))' in header


def test_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    for options, words in (
        (("--weights", "int8"), "--weights has no effect here: it needs --export"),
        (("--ram-section", ".bss.dtcm"), "--ram-section has no effect here: it needs --export"),
        (("--export", str(tmp_path / "new"), "--ram-section", "a b"), "expected the name of a section"),
        (("--export", str(tmp_path)), "has files that are no export"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*SMALL, *options])
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert words in error
        assert error.count("\n") == 1
