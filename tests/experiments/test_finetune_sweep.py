"""The sweep of thresholds, modes, layers and budgets runs, and every cell is predicted to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.finetune import sweep as finetune_sweep


def test_the_quick_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All families are there, budgets are kept, and the front is printed and drawn."""
    output, figure = tmp_path / "sweep.json", tmp_path / "sweep.png"
    small = ["--quick", "--epochs=1", "--train-images=200", "--test-images=100", f"--folder={tmp_path / 'runs'}"]
    assert finetune_sweep.main([*small, f"--output={output}", f"--figure={figure}"]) == 0
    points = json.loads(output.read_text())["points"]
    assert {point["family"] for point in points} >= {"bp", "head-only", "planned", "uniform in a budget"}
    assert all(point["predicted_equals_measured"] for point in points)
    for point in points:
        if "KiB" in point["label"]:
            assert 0 < point["core_bytes"] <= 1024 * point["cell"]["budget_kib"], point["label"]
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert "Batch 32: 14 settings" in capsys.readouterr().out


def test_settings_of_the_full_sweep() -> None:
    """Each setting once, every threshold with every subset of modes, with the mean and without."""
    swept = finetune_sweep.settings(finetune_sweep.parser().parse_args([]))
    labels = [setting["label"] for setting in swept]
    assert len(set(labels)) == len(labels) == 2 + 2 * 4 * 3 + 2 * 6 + 2 * 3
    assert {setting["family"] for setting in swept} == set(finetune_sweep.STYLES)


@pytest.mark.parametrize(
    "arguments", [["--epochs", "0"], ["--batch", "8", "0"], ["--quick", "--data", "x", "--jobs", "0"]]
)
def test_bad_arguments_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and one line that names what came."""
    with pytest.raises(SystemExit) as stopped:
        finetune_sweep.main(arguments)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
