"""The benchmark runs, writes what it prints, and times the same work on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import layers
from lance_ref import count_macs
from lance_ref.activations import EXACT


def test_a_quick_run_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One small layer: every side has its seconds, and the file says where it comes from."""
    output = tmp_path / "layers.json"
    name = "1x1 160-960 at 7"
    assert layers.main(["--batch", "2", "--repeats", "2", "--layers", name, "--output", str(output)]) == 0
    document = json.loads(output.read_text(encoding="utf-8"))
    assert {"command", "versions", "machine"} <= set(document)
    (row,) = document["rows"]
    assert row["layer"] == name
    assert {"bp", "lance"} <= set(row["seconds"])
    assert all(0 < side["min"] <= side["median"] <= side["max"] for side in row["seconds"].values())
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("name", layers.LAYERS)
def test_a_step_is_a_whole_step(name: str) -> None:
    """Forward and both gradients run: three times the multiply-adds of the layer."""
    geometry = layers.geometry_of(name, 1)
    with count_macs() as counter:
        layers.our_step(geometry, EXACT)()
    _, C_out, H_out, W_out = geometry.output_shape
    _, width, k_h, k_w = geometry.weight_shape
    macs = C_out * H_out * W_out * width * k_h * k_w
    kinds = counter.by_kind()
    assert (kinds["forward"], kinds["grad_input"], kinds["grad_weight"]) == (macs, macs, macs)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line."""
    assert layers.main(["--repeats", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
