"""``lance-ref device``: what a step on a device takes, as a table and as JSON, predicted and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.device import check, command
from analysis.device.check import Difference
from experiments.command import main as lance_ref
from lance_ref import calibrate, datasets
from lance_ref.device import report

MCUNET = ("--net", "mcunet", "--tune", "last:4")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = command.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, _ = run(capsys, *arguments, "--format", "json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.parametrize(
    ("arguments", "kib"),
    [
        (("--directions", "8", "--update", "batch"), 240),
        (("--directions", "8", "--update", "image"), 180),
        (("--directions", "24", "--update", "image"), 256),
    ],
)
def test_mcunet_fits_a_small_device(capsys: pytest.CaptureFixture[str], arguments: Any, kib: int) -> None:
    found = as_json(capsys, *MCUNET, *arguments)
    assert found["ram_bytes"] <= kib * 1024
    assert found["num_classes"] == 10
    assert found["input_shape"] == [3, 128, 128]
    assert {of[0] for of in found["ranks"].values()} == {int(arguments[1])}


def test_json_has_the_arena_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "--net", "resnet8", "--directions", "4")
    assert sum(found["ram"].values()) == found["lower_bound_bytes"] <= found["ram_bytes"]
    assert found["ram_bytes"] == max(array["offset"] + array["bytes"] for array in found["arena"])
    assert {"name", "offset", "bytes", "first", "last"} <= set(found["arena"][0])
    assert found["macs"]["total"] == sum(n for kind, n in found["macs"].items() if kind != "total")
    assert found["macs"]["recomputed"] == found["recomputed_macs"]
    assert found["provenance"]["command"].startswith("python -m analysis.device")


@pytest.mark.parametrize("net", ["mcunet", "resnet8", "mlp"])
def test_tables_fit_a_terminal(capsys: pytest.CaptureFixture[str], net: str) -> None:
    code, out, _ = run(capsys, "--net", net, "--directions", "8", "--budget", "2MiB")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "<- peak" in out
    assert "grad_weight" in out
    assert len(f"{'':<{report.WIDTH}}{'':>12}  <- peak") <= 80


@pytest.mark.parametrize("method", ["bp", "bias", "head", "lance"])
def test_a_step_is_measured(capsys: pytest.CaptureFixture[str], method: str) -> None:
    code, out, _ = run(capsys, "--net", "resnet8", "--method", method, "--momentum", "--measure")
    assert code == 0
    assert out.endswith("RAM, flash and multiply-adds are as predicted\n")


def test_a_difference_is_named_and_is_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "differences", lambda *_: [Difference("multiply-adds merge", 1, 2)])
    code, _, err = run(capsys, "--net", "mlp", "--measure", "--json")
    assert code == 1
    assert "multiply-adds merge: predicted 1, measured 2" in err


def test_ranks_from_spectra_leave_the_batch_alone(capsys: pytest.CaptureFixture[str]) -> None:
    by_energy = as_json(capsys, *MCUNET, "--epsilon", "0.9")
    assert by_energy["ranks_from"].startswith("spectra shipped")
    assert all(None not in of and len(of) == 3 for of in by_energy["ranks"].values())
    assert as_json(capsys, "--net", "resnet8", "--ranks", "1")["ranks"]


def test_a_layer_with_fewer_channels_keeps_its_input(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "--net", "resnet8", "--directions", "32")
    assert set(found["ranks"]) < set(found["tuned_layers"])


def test_files_are_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, picture = tmp_path / "step.txt", tmp_path / "arena.png"
    code, out, _ = run(capsys, "--net", "mlp", "--output", str(table), "--plot", str(picture), "--measure")
    assert code == 0
    assert out.startswith("measured")
    assert "RAM: the whole arena" in table.read_text()
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--net", "resnet8", "--budget", "1KiB"), "budget is 1.0 KiB, but the step needs at least"),
        (("--net", "resnet8", "--budget", "much"), "budget is 'much', expected a positive number of bytes"),
        (("--net", "resnet8", "--epsilon", "0.9"), "--epsilon needs spectra, and there are none of resnet8 at 3x32x32"),
        (("--net", "resnet8", "--method", "bp", "--directions", "3"), "--directions has no effect here"),
        (("--net", "resnet8", "--method", "head", "--tune", "all"), "--tune has no effect here"),
        (("--net", "resnet8", "--directions", "0"), "--directions is 0, expected a positive integer"),
        (("--net", "resnet8", "--directions", "3", "--ranks", "0.5"), "not allowed with"),
        (("--net", "resnet8", "--tune", "nothing*"), "nothing*"),
        (("--net", "deit-tiny"), "expected one vector for each image"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: Any, words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        lance_ref(["device", *arguments])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


# ---- directions of images ------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Forty images of 8 by 8 in three classes, of one channel."""
    rng = np.random.default_rng(0)
    file = tmp_path / "data.npz"
    np.savez(file, x=rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), y=np.arange(40) % 3)
    return file


def test_the_directions_are_those_of_the_images(pictures: Path, tmp_path: Path) -> None:
    """As calibrated by hand: without the mean, most energy first; and pixels for a C program."""
    words = ["--net", "convnet", "--input-shape", "1,8,8", "--tune", "last:2", "--directions", "4"]
    options = command.parser().parse_args([*words, "--data", str(pictures), "--calibration-images", "20"])
    asked = command.asked_for(options)
    program, source = command.compiled(options, asked)
    net, images = asked.net, asked.images
    assert images is not None
    assert (asked.shape, source) == ((1, 8, 8), "4 mean-free directions of the channels of 20 images of data")
    first = next(iter(datasets.batches(datasets.open_data(str(pictures)), 20, 0)))[0]
    wanted = calibrate(net, [first], list(program.recipe.factors), 1.0, ("channel",), mean_free=True)
    for path, of in program.recipe.factors.items():
        U, V = of[0], wanted[path].factors[1]
        assert U is not None
        assert V is not None
        np.testing.assert_allclose(np.abs(np.sum(U * V[:, :4], axis=0)), 1, atol=1e-4)
    pixels, labels = images.some(8)
    assert (pixels.shape, pixels.dtype, labels.shape) == ((8, 8, 8, 1), np.uint8, (8,))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--net", "mlp"), "but --data needs pictures (C, H, W)"),
        (("--net", "convnet", "--calibration-images", "1000"), "--calibration-images is 1000"),
        (("--net", "convnet", "--epsilon", "0.9", "--spectra", "s.json"), "--spectra"),
        (("--net", "convnet", "--method", "bp"), "--data"),
    ],
)
def test_data_that_do_not_serve(capsys: pytest.CaptureFixture[str], pictures: Path, arguments: Any, words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([*arguments, "--data", str(pictures)])
    _, err = capsys.readouterr()
    assert ended.value.code == 2
    assert words in err
    assert len(err.splitlines()) == 1


def test_energy_of_the_images_says_how_many_directions(capsys: pytest.CaptureFixture[str], pictures: Path) -> None:
    found = as_json(capsys, "--net", "convnet", "--epsilon", "0.9", "--data", str(pictures))
    assert found["num_classes"] == 3
    assert found["ranks_from"] == "energy 0.9 of 31 images of data"
