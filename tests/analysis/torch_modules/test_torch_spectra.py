"""Spectra of a PyTorch module beside those of the same network of this library, and their way into a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_twins import one_thread  # noqa: E402

import analysis  # noqa: E402
import lance_ref  # noqa: E402
from analysis import spectra  # noqa: E402
from analysis.ranks.spectra_file import load_spectra  # noqa: E402
from analysis.steps.nets import CannotRunError  # noqa: E402
from analysis.torch_modules.spectra import activation_spectra  # noqa: E402


def small() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.Flatten(),
        nn.Linear(80, 6),
        nn.Linear(6, 10),
    )


def test_energies_are_those_of_our_own_calibration() -> None:
    """Two batches; every mode of every layer but the head, in float64."""
    module = small().double().eval()
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((7, 1, 8, 8)) for _ in range(2)]
    with one_thread():
        found = activation_spectra(module, "small", batches)
    net = lance_ref.from_torch(module)
    lance_ref.tune(net, "all")
    calibration = lance_ref.calibrate(net, batches, layers=["0", "3", "5"])
    assert list(found) == ["0", "3", "5"]
    for path, layer in found.items():
        assert layer.shape == tuple(calibration[path].shape)
        for theirs, energies in zip(calibration[path].spectra, layer.energies, strict=True):
            np.testing.assert_allclose(energies, np.maximum(theirs, 0), rtol=1e-9, atol=1e-9 * energies[0])


def test_linear_layers_on_maps_count_as_tokens() -> None:
    """(B, H, W, C) has the modes batch, token and feature."""
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    x = np.random.default_rng(0).standard_normal((3, 2, 6, 5)).astype(np.float32)
    (layer,) = activation_spectra(module, "maps", [x]).values()
    assert layer.shape == (3, 12, 5)
    unfolded = x.reshape(3, 12, 5).transpose(1, 0, 2).reshape(12, -1).astype(np.float64)
    expected = np.linalg.eigvalsh(unfolded @ unfolded.T)[::-1]
    np.testing.assert_allclose(layer.energies[1], np.maximum(expected, 0), rtol=1e-10, atol=1e-10 * expected[0])


def test_the_command_writes_what_the_cost_model_reads(tmp_path: Path) -> None:
    """Ranks by energy, from digits, for a module of PyTorch."""
    file = tmp_path / "small.json"
    module = "test_torch_spectra:small"
    arguments = ["--net", module, "--data", "digits", "--input-shape", "1,8,8", "--batch", "16", "--batches", "3"]
    with one_thread():
        assert spectra.main([*arguments, "--output", str(file)]) == 0
    read = load_spectra(file)
    assert (read.net, read.batch, read.input_shape) == (module, 16, (1, 8, 8))
    report = analysis.cost(small(), batch=16, input_shape=(1, 8, 8), tune="all", spectra=str(file), epsilon=0.9)
    assert "at epsilon 0.9" in report.ranks_from
    row = next(row for row in report.rows if row.path == "3")
    assert row.methods["lance"].ranks == read.layers["3"].ranks(0.9, 16)


def test_refusals() -> None:
    """Inputs that do not fit, numbers that are none, and nothing to measure."""
    with pytest.raises(CannotRunError, match=r"cannot run on an input of shape \(2, 3, 8, 8\)"):
        activation_spectra(small(), "small", [np.ones((2, 3, 8, 8))])
    with pytest.raises(ValueError, match="NaN or infinite"):
        activation_spectra(small(), "small", [np.full((2, 1, 8, 8), np.nan)])
    with pytest.raises(ValueError, match="no linear layer"):
        activation_spectra(nn.Linear(3, 2), "one", [np.ones((2, 3))])
