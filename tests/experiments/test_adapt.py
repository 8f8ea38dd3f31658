"""The adaptation of pretrained MobileNetV2 runs end to end, and refuses bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import adapt

QUICK = ["--image-size", "96", "--batch", "16", "--calibration-batches", "2", "--test-images", "20", "--lr", "0.02"]


def test_a_short_run_learns_and_its_tape_is_as_predicted(data_dir: Path, tmp_path: Path) -> None:
    """Loss falls, every step's tape equals the prediction, and the files say where they come from."""
    output, figure = tmp_path / "run.json", tmp_path / "run.png"
    arguments = [*QUICK, "--steps", "20", "--output", str(output), "--figure", str(figure)]
    assert adapt.main(arguments) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert {"command", "seed", "versions", "machine"} <= set(result)
    history = result["history"]
    losses = [row["loss"] for row in history]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert all(row["tape_bytes"] == row["predicted_tape_bytes"] > 0 for row in history)
    assert set(history[0]["energy_kept"]) == set(result["tuned_layers"]) == set(result["ranks"])
    assert all(0 < share <= 1 for row in history for share in row["energy_kept"].values())
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.png"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--data", "imagenet"], "imagenet"),
        (["--epsilon", "1.5"], "1.5"),
        (["--tune", "last:99"], "last:99"),
        (["--output", "no/such/folder/run.json"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], says: str, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line on stderr that names what came."""
    with pytest.raises(SystemExit) as ended:
        adapt.main([*QUICK, *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_missing_data_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without LANCE_REF_DATA the error says what to set."""
    monkeypatch.delenv("LANCE_REF_DATA", raising=False)
    with pytest.raises(SystemExit) as ended:
        adapt.main(QUICK)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "LANCE_REF_DATA" in error
