"""``python -m analysis.cost_model --engine device``: RAM of device programs beneath the report."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from analysis import cost_model
from analysis.device.programs import DEVICE_METHODS, WHY_NOT, why_not
from analysis.reports.predict import predict
from analysis.steps.methods import METHODS
from lance_ref import device
from lance_ref.algebra.subspace import Subspace

NET = ("--net", "resnet8", "--num-classes", "10", "--batch", "4", "--engine", "device")


def test_every_method_has_a_program_or_a_reason() -> None:
    assert not set(DEVICE_METHODS) & set(WHY_NOT)
    assert {name for name in METHODS if not why_not(name)} == set(DEVICE_METHODS)
    assert set(DEVICE_METHODS.values()) == {"lance", "bp", "bias", "head"}


def test_ram_of_the_same_layers_and_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost_model.main([*NET, "--method", "bp", "lance", "hosvd", "--ranks", "0.5"]) == 0
    out = capsys.readouterr().out
    rows = {
        tuple(line.split()[:2]): line.split()[2:] for line in out.splitlines() if " image " in line or " batch " in line
    }
    prediction = predict(
        "resnet8", 4, None, None, 10, None, ["lance"], 1.0, "0.5", None, "flops", "float32", with_weights=True
    )
    assert prediction.choice is not None
    rng, net = np.random.default_rng(0), prediction.step.net
    shapes = {r.path: r.inputs[0].shape for r in prediction.step.records if r.path in prediction.choice.ranks}
    spaces = {
        path: Subspace.random(shapes[path], (None, *ranks[1:]), rng) for path, ranks in prediction.choice.ranks.items()
    }
    program = device.compile(net, spaces, (3, 32, 32), update="image")
    assert rows["lance", "image"][0] == f"{program.ram_bytes / 1024:,.1f}"
    assert rows["lance", "image"][1] == f"{program.flash_bytes / 1024:,.1f}"
    assert float(rows["bp", "batch"][0]) > float(rows["bp", "image"][0]) > program.ram_bytes / 1024
    assert "hosvd: no device program: it decomposes each batch" in out


def test_a_file_has_it_too(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    assert cost_model.main([*NET, "--method", "head-only", "--optimizer", "sgd-momentum", "--output", str(path)]) == 0
    assert re.search(r"^head-only +image +[0-9.]+ ", path.read_text(), re.MULTILINE)


def test_adam_and_other_nets_say_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost_model.main([*NET, "--method", "bp", "--optimizer", "adam"]) == 0
    assert "not Adam" in capsys.readouterr().out
    assert cost_model.main(["--net", "deit-tiny", "--batch", "1", "--method", "bp", "--engine", "device"]) == 0
    out = capsys.readouterr().out
    assert "bp: no device program: operation 'reshape'" in out
    assert max(map(len, out.splitlines())) <= 100


def test_only_tables_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cost_model.main([*NET, "--format", "json"])
    assert "--engine has no effect here: it needs --format table" in capsys.readouterr().err
