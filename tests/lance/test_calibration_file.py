"""Calibration files: exact round trips, and every damage refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from small_nets import ThreeLayers, assert_same, batches

from lance_ref import Calibration, calibrate
from lance_ref.io.npz import load_npz, save_npz


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    """Every factor, spectrum, threshold and given rank comes back bit by bit; merging and re-truncating go on."""
    net, data = ThreeLayers(), batches()
    calibration = calibrate(net, data, epsilon=0.7, modes=("channel", "height"), layers="conv*")
    calibration = calibration.with_epsilon({"conv1": 0.1 + 0.2}).with_ranks({"conv2": (None, 2, 1, None)})
    path = tmp_path / "calibration.npz"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert_same(loaded, calibration, rtol=0, atol=0)
    for name in calibration:
        for ours, theirs in zip(calibration[name].factors, loaded[name].factors, strict=True):
            assert_array_equal(ours, theirs)
        assert loaded[name].epsilon == calibration[name].epsilon
    assert str(loaded) == str(calibration)
    assert_same(loaded.merge(calibration), calibration.merge(loaded), rtol=0, atol=0)
    assert_same(loaded.with_epsilon(1), calibration.with_epsilon(1), rtol=0, atol=0)
    assert os.listdir(tmp_path) == ["calibration.npz"]
    with np.load(path, allow_pickle=False) as arrays:
        assert json.loads(arrays["metadata"].tobytes())["schema"] == 3


def _change(metadata: dict[str, Any], arrays: dict[str, np.ndarray], fault: str) -> None:
    layer = metadata["layers"][0]
    if fault == "schema":
        metadata["schema"] = 4
    elif fault == "true schema":
        metadata["schema"] = True
    elif fault == "kind":
        del metadata["kind"]
    elif fault == "shape":
        layer["shape"][1] += 1
    elif fault == "negative shape":
        layer["shape"][1] = -2
    elif fault == "text shape":
        layer["shape"] = "5x2x7x5"
    elif fault == "dimensions":
        layer["shape"] = [5]
    elif fault == "epsilon":
        layer["epsilon"] = 0
    elif fault == "ranks":
        layer["ranks"] = [1, 9, 1, 1]
    elif fault == "modes":
        layer["modes"] = [0, 7]
    elif fault == "no layers":
        metadata["layers"] = []
    elif fault == "missing gram":
        del arrays["gram0.1"]
    elif fault == "extra array":
        arrays["gram9.0"] = np.eye(2)
    elif fault == "dtype":
        arrays["gram0.1"] = arrays["gram0.1"].astype(np.float32)
    elif fault == "not finite":
        arrays["gram0.1"][0, 0] = np.nan
    elif fault == "zero":
        for mode in range(4):
            arrays[f"gram0.{mode}"][:] = 0


@pytest.mark.parametrize(
    "fault",
    [
        "schema", "true schema", "kind", "shape", "negative shape", "text shape", "dimensions", "epsilon", "ranks",
        "modes", "no layers", "missing gram", "extra array", "dtype", "not finite", "zero",
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    """Whatever is wrong inside an intact .npz: one line that names the file, never a wrong subspace."""
    path = tmp_path / "calibration.npz"
    calibrate(ThreeLayers(), batches(), layers="conv1").save(path)
    arrays = load_npz(path)
    metadata = json.loads(arrays.pop("metadata").tobytes())
    _change(metadata, arrays, fault)
    save_npz(path, {"metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8), **arrays})
    with pytest.raises(ValueError, match="not a calibration file") as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Arrays without metadata, metadata that is no JSON object, a truncated file, no file."""
    path = tmp_path / "x.npz"
    junk = [{"x": np.ones(3)}, {"metadata": np.ones(3, np.uint8)}, {"metadata": np.frombuffer(b"[1]", np.uint8)}]
    for arrays in junk:
        save_npz(path, arrays)
        with pytest.raises(ValueError, match=r"x\.npz: not a calibration file"):
            Calibration.load(path)
    calibrate(ThreeLayers(), batches()).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"x\.npz: "):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none.npz")


def test_members_of_another_calibration_are_refused(tmp_path: Path) -> None:
    """Whoever puts the archive together anew; a file of an earlier version has no checksum, and is read."""
    path, other = tmp_path / "a.npz", tmp_path / "b.npz"
    calibrate(ThreeLayers(), batches(), layers="conv1").save(path)
    calibrate(ThreeLayers(), [2 * batch for batch in batches()], layers="conv1").save(other)
    right = Calibration.load(path)
    arrays = load_npz(path)
    np.savez(path, **{**arrays, "gram0.1": load_npz(other)["gram0.1"]})
    with pytest.raises(ValueError, match=r"a\.npz: not a calibration file: it has no checksum"):
        Calibration.load(path)
    metadata = {**json.loads(arrays["metadata"].tobytes()), "schema": 2}
    np.savez(path, **{**arrays, "metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8)})
    assert_same(Calibration.load(path), right, rtol=0, atol=0)
