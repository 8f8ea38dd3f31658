"""``python -m analysis.spectra`` on nets with any input, weights that are honest, and files that never end."""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

import lance_ref
from analysis import plan
from analysis import spectra as spectra_cli
from analysis.cost_model import cost
from analysis.steps.net_choice import NetChoice
from lance_ref import datasets, nn
from lance_ref.datasets.dataset import to_channels

OWN = """
import numpy as np
from lance_ref import nn

def grey():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))

def five():
    return nn.Sequential(nn.Conv2d(5, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))

def broken(value=np.nan):
    net = grey()
    net[0].weight.data[1, 0, 0, 0] = value
    return net

def endless():
    return broken(np.inf)
"""


@pytest.fixture(name="own")
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spectra_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def digit_batches(channels: list[int]) -> list[np.ndarray]:
    """Two batches of 8 digits as ``spectra`` takes them, pixel / 255, with these channels of the RGB-free picture."""
    images = datasets.load("digits", "train")
    return [x[:, channels] for x, _ in itertools.islice(datasets.batches(images, 8, 0, image_size=(8, 6)), 2)]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("factory", "channels"), [("grey", 1), ("five", 5)])
def test_nets_of_any_number_of_channels(factory: str, channels: int) -> None:
    """Grey pictures for one channel, repeated for five; height and width may differ."""
    lance_ref.manual_seed(3)
    found = spectra_cli.measure(f"spectra_nets:{factory}", "digits", batch=8, batches=2, input_shape=(channels, 8, 6))
    assert found.input_shape == (channels, 8, 6)
    assert found.layers["0"].shape == (8, channels, 8, 6)
    assert found.provenance["normalisation"] == "pixel / 255"
    for n, energies in enumerate(found.layers["0"].energies):
        expected = gram_energies(digit_batches([0] * channels), n)
        np.testing.assert_allclose(energies / energies.sum(), expected / expected.sum(), atol=1e-6)


def gram_energies(batches: list[np.ndarray], mode: int) -> np.ndarray:
    """Eigenvalues of the Gram matrix of one mode, descending, by their definition."""
    unfolded = [np.moveaxis(x.astype(np.float64), mode, 0).reshape(x.shape[mode], -1) for x in batches]
    values: np.ndarray = np.linalg.eigvalsh(sum(u @ u.T for u in unfolded))[::-1]
    return values


def test_a_net_for_vectors_gets_the_pixels() -> None:
    """17 numbers: the first of the 25 pixels of a grey square."""
    found = spectra_cli.measure("mlp", "digits", batch=8, batches=2, input_shape=(17,))
    assert found.layers["features.0"].shape == (8, 17)
    images = datasets.load("digits", "train")
    batches = [x.reshape(8, -1)[:, :17] for x, _ in itertools.islice(datasets.batches(images, 8, 0, image_size=5), 2)]
    energies = found.layers["features.0"].energies[1]
    expected = gram_energies(batches, 1)
    np.testing.assert_allclose(energies / energies.sum(), expected / expected.sum(), atol=1e-6)


@pytest.mark.usefixtures("own")
def test_the_normalisation_is_that_asked_for_and_recorded() -> None:
    """(pixel / 255 - mean) / std for each channel."""
    options = {"batch": 8, "batches": 2, "input_shape": (5, 8, 6), "mean": [0.1, 0.2, 0.3, 0.4, 0.5], "std": [0.5]}
    found = spectra_cli.measure("spectra_nets:five", "digits", **options)  # type: ignore[arg-type]
    assert found.provenance["normalisation"] == (
        "(pixel / 255 - mean) / std, mean [0.1, 0.2, 0.3, 0.4, 0.5], std [0.5]"
    )
    shift = np.array(options["mean"]).reshape(1, 5, 1, 1)
    expected = gram_energies([(x - shift) / 0.5 for x in digit_batches([0] * 5)], 1)
    energies = found.layers["0"].energies[1]
    np.testing.assert_allclose(energies / energies.sum(), expected / expected.sum(), atol=1e-6)


def test_colours_become_grey_by_their_mean() -> None:
    """One channel of an RGB picture; three channels stay as they are; a fourth is the first again."""
    pixels = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3) * 7
    for shape, expected in (
        ((1, 2, 2), np.rint(pixels.mean(axis=3, keepdims=True))),
        ((3, 2, 2), pixels),
        ((4, 2, 2), pixels[..., [0, 1, 2, 0]]),
    ):
        normalise, _ = NetChoice("tests:none").normalise()
        source = spectra_cli._Source(nn.ReLU(), "", "", shape, normalise, "")
        taken = source.prepare(to_channels(pixels, source.channels))
        np.testing.assert_allclose(taken, expected.transpose(0, 3, 1, 2) / 255, rtol=1e-6)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("factory", ["broken", "endless"])
def test_weights_that_are_not_finite_are_refused(
    factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parameter is named, and no file is written."""
    arguments = ["--net", f"spectra_nets:{factory}", "--data", "digits", "--input-shape", "1,8,8", "--batch", "2"]
    with pytest.raises(SystemExit):
        spectra_cli.main([*arguments, "--output", str(tmp_path / "s.json")])
    assert f"net 'spectra_nets:{factory}': 0.weight has values that are NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


def test_an_onnx_net_says_whose_weights_it_has(tmp_path: Path) -> None:
    """File name and checksum; it is not freshly initialised."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weights = {"w": (3, 2, 3, 3), "b": (3,), "v": (4, 3), "c": (4,)}
    arrays = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv"),
        helper.make_node("GlobalAveragePool", ["y"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "v", "c"], ["z"], name="head", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 8, 6])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4])], arrays,
    )  # fmt: skip
    path = tmp_path / "two_channels.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    found = spectra_cli.measure(str(path), "digits", batch=4, batches=2)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.provenance["weights"] == f"those of two_channels.onnx (sha256 {digest[:16]})"
    assert found.provenance["weights_sha256"] == digest
    assert found.input_shape == (2, 8, 6)
    report = tmp_path / "s.json"
    found.save(report)
    assert "those of two_channels.onnx" in cost(str(path), batch=4, tune="all", spectra=str(report)).ranks_from


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="there is no /dev/zero")
@pytest.mark.parametrize("option", ["--spectra", "--shares"])
def test_what_never_ends_is_not_read(option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A device or a pipe in place of a file: refused at once, in one line."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in ("/dev/zero", str(pipe)):
        with pytest.raises(SystemExit):
            plan.main(["--net", "convnet", "--budget", "1MiB", "--batch", "2", option, path])
        error = capsys.readouterr().err
        assert "is no ordinary file" in error
        assert path in error
        assert error.count("\n") == 1
