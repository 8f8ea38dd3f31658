"""Calibrated on other images than those of training: the loss of energy is seen, and mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import domain_shift


def test_negatives_of_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other domain's subspaces keep less from the first step on; calibrated again they keep more."""
    output, figure = tmp_path / "shift.json", tmp_path / "shift.png"
    small = ["--quick", "--epochs=3", "--train-images=480", "--test-images=60"]
    assert domain_shift.main([*small, f"--output={output}", f"--figure={figure}"]) == 0
    same, other, mended = json.loads(output.read_text())["runs"]
    conv2 = [run["energy_kept"]["conv2"] for run in (same, other, mended)]
    assert conv2[0][0] > conv2[1][0] + 0.05
    assert conv2[1][0] == conv2[2][0]  # the same weights, batches and subspaces at first
    assert conv2[2][-1] > conv2[1][-1] + 0.05
    assert not same["events"]
    assert not other["events"]
    assert {event["layer"] for event in mended["events"]} >= {"conv2"}
    assert other["tape_bytes"] == mended["tape_bytes"]
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert "calibrated again on 8 batches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick", "--epochs", "0"], "--epochs is 0"),
        (["--quick", "--train-images", "20"], "fewer than one batch"),
        (["--data", "nowhere"], "nowhere"),
        (["--quick", "--share", "2", "--epochs", "1", "--train-images", "100"], "share is 2"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and one line that names what came."""
    with pytest.raises(SystemExit) as stopped:
        domain_shift.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
