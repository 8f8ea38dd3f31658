"""Spectra: the batch law against real calibrations, the file that is read from anywhere, the shipped one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lance_ref
from analysis import spectra as spectra_cli
from analysis.cost_model import cost
from analysis.ranks.batch_law import batch_spectrum, fit_batch_law, rank_for_energy
from analysis.ranks.choose import shipped_spectra
from analysis.ranks.spectra_file import LayerSpectra, Spectra, load_spectra
from lance_ref import datasets, models
from lance_ref.io.whole_file import sealed

# ---- ranks and the batch law ---------------------------------------------------------------


def test_rank_reaches_the_energy_and_one_less_misses_it() -> None:
    """Energies 6, 3, 1: shares 0.6, 0.9, 1."""
    energies = np.array([3.0, 6.0, 1.0])
    assert [rank_for_energy(energies, e) for e in (0.5, 0.6, 0.61, 0.9, 0.91, 1)] == [1, 1, 2, 2, 3, 3]


def test_full_energy_is_full_rank_also_with_zeros() -> None:
    """ε = 1 gives every direction, even those without energy."""
    assert rank_for_energy(np.array([1.0, 0.0, 0.0]), 1) == 3


def test_fit_recovers_v_and_m() -> None:
    """v·I + m·11ᵀ with v = 2, m = 3, n = 5, through its real eigenvalues."""
    gram = 2 * np.eye(5) + 3 * np.ones((5, 5))
    assert fit_batch_law(np.linalg.eigvalsh(gram)) == pytest.approx((2.0, 3.0))


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_exact_spectra_follow_the_law(n: int) -> None:
    """Without spread the prediction is the matrix's own spectrum at any other batch size."""
    measured = np.linalg.eigvalsh(2 * np.eye(16) + 3 * np.ones((16, 16)))
    expected = np.sort(np.linalg.eigvalsh(2 * np.eye(n) + 3 * np.ones((n, n))))[::-1]
    np.testing.assert_allclose(batch_spectrum(measured, n), expected, rtol=1e-9)


def test_at_the_measured_batch_the_spectrum_itself_is_used() -> None:
    """Nothing is fitted where everything is known."""
    energies = np.array([9.0, 4.0, 1.0])
    np.testing.assert_array_equal(batch_spectrum(energies[::-1], 3), energies)


def test_one_image_a_batch_says_nothing_about_more() -> None:
    with pytest.raises(ValueError, match="one image a batch say nothing about a batch of 4"):
        batch_spectrum(np.array([2.0]), 4)


BATCHES = 60


@pytest.fixture(scope="module", name="calibrations")
def _calibrations() -> dict[int, lance_ref.Calibration]:
    """Real calibrations of a small net on the bundled digits, at three batch sizes, 60 batches each."""
    images = datasets.load("digits", "train", channels=3)
    net = models.create("convnet", channels=4, rng=0)

    def shuffled(n: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(n)
        left = BATCHES
        while left > 0:
            for x, _ in datasets.batches(images, n, rng):
                yield x
                left -= 1
                if not left:
                    return

    return {n: lance_ref.calibrate(net, shuffled(n), layers=["conv1", "conv2", "conv3"]) for n in (8, 32, 128)}


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3"])
@pytest.mark.parametrize("target", [8, 32, 128])
@pytest.mark.parametrize("source", [8, 32, 128])
def test_predicted_batch_ranks_equal_real_calibrations(
    calibrations: dict[int, lance_ref.Calibration], layer: str, source: int, target: int
) -> None:
    """Rank at any batch size n from the spectrum at another: within 1 + n/100, and n/10 from 8 images to 128.

    Seven small eigenvalues tell little about the spread of 127; two batch sizes a factor of 4 apart do.
    """
    measured, real = calibrations[source][layer].spectra[0], calibrations[target][layer].spectra[0]
    assert measured is not None
    assert real is not None
    predicted = batch_spectrum(measured, target)
    tolerance = 0 if source == target else target / 10 if (source, target) == (8, 128) else 1 + target / 100
    for epsilon in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        assert abs(rank_for_energy(predicted, epsilon) - rank_for_energy(real, epsilon)) <= tolerance


def test_the_flat_law_alone_would_miss(calibrations: dict[int, lance_ref.Calibration]) -> None:
    """Why the bulk is stretched: v, v, v … overestimates the rank of a real calibration by far more."""
    measured, real = calibrations[32]["conv2"].spectra[0], calibrations[128]["conv2"].spectra[0]
    assert measured is not None
    assert real is not None
    v, m = fit_batch_law(measured)
    flat = np.array([v + 128 * m] + [v] * 127)
    assert rank_for_energy(flat, 0.95) - rank_for_energy(real, 0.95) > 10


# ---- the file ------------------------------------------------------------------------------


def small_spectra() -> Spectra:
    provenance = {"weights": "w", "images": "i", "image_count": 8, "batches": 2, "command": "c"}
    conv = LayerSpectra((4, 2, 3, 3), (np.array([5.0, 1, 1, 1]), np.array([7.0, 1]), np.array([6.0, 2, 0]), np.ones(3)))
    linear = LayerSpectra((4, 2), (np.array([2.5, 0.5, 0.5, 0.5]), np.array([3.0, 1.0])))
    return Spectra("tiny", 4, (2, 3, 3), provenance, {"conv": conv, "fc": linear})


def test_written_spectra_are_read_back(tmp_path: Path) -> None:
    """To the six digits that are written, as shares."""
    small_spectra().save(tmp_path / "s.json")
    read = load_spectra(tmp_path / "s.json")
    assert (read.net, read.batch, read.input_shape) == ("tiny", 4, (2, 3, 3))
    assert list(read.layers) == ["conv", "fc"]
    np.testing.assert_allclose(read.layers["conv"].energies[0], np.array([5, 1, 1, 1]) / 8)
    assert read.layers["conv"].ranks(0.7, 4) == (2, 1, 1, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def _damage(change: Callable[[dict[str, Any]], object]) -> Callable[[str], bytes]:
    def apply(text: str) -> bytes:
        document = json.loads(text)
        change(document)
        return json.dumps(sealed(document)).encode()

    return apply


def _layer(name: str, value: Any) -> Callable[[str], bytes]:
    return _damage(lambda d: d["layers"]["conv"].__setitem__(name, value))


DAMAGED: dict[str, Callable[[str], bytes]] = {
    "empty": lambda text: b"",
    "truncated": lambda text: text[: len(text) // 2].encode(),
    "binary": lambda text: bytes(range(256)),
    "not an object": lambda text: b"[1, 2]",
    "nested deeply": lambda text: b"[" * 100_000,
    "a number of many digits": lambda text: b'{"format": ' + b"9" * 10_000 + b"}",
    "another format": _damage(lambda d: d.update(format="other")),
    "another version": _damage(lambda d: d.update(version=2)),
    "no layers": _damage(lambda d: d.update(layers={})),
    "layers as a list": _damage(lambda d: d.update(layers=[])),
    "layer as a list": _damage(lambda d: d["layers"].update(conv=[])),
    "no net": _damage(lambda d: d.pop("net")),
    "no provenance": _damage(lambda d: d.update(provenance={})),
    "batch zero": _damage(lambda d: d.update(batch=0)),
    "batch true": _damage(lambda d: d.update(batch=True)),
    "another batch": _damage(lambda d: d.update(batch=5)),
    "shape of words": _layer("shape", ["a", 2, 3, 3]),
    "shape of five": _layer("shape", [4, 2, 3, 3, 3]),
    "huge shape": _layer("shape", [4, 2**40, 3, 3]),
    "missing mode": _damage(lambda d: d["layers"]["conv"].pop("width")),
    "too few energies": _layer("batch", [1, 1, 1]),
    "energies of words": _layer("batch", [1, 1, 1, "x"]),
    "energies true": _layer("batch", [1, 1, 1, True]),
    "nan": _layer("batch", [1, 1, 1, float("nan")]),
    "infinite": _layer("batch", [1, 1, 1, float("inf")]),
    "negative": _layer("batch", [1, 1, 1, -1e-9]),
    "all zero": _layer("batch", [0, 0, 0, 0]),
    "integer beyond floats": _layer("batch", [1, 1, 1, 10**400]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    """Nothing in the file is believed: the error names it, on one line."""
    path = tmp_path / "s.json"
    small_spectra().save(path)
    path.write_bytes(DAMAGED[name](path.read_text()))
    with pytest.raises(ValueError, match=r"s\.json: ") as error:
        load_spectra(path)
    assert "\n" not in str(error.value)


def test_an_oversized_file_is_refused_unread(tmp_path: Path) -> None:
    """A sparse file of 65 MiB costs no memory."""
    path = tmp_path / "s.json"
    with path.open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(ValueError, match="expected at most"):
        load_spectra(path)


def test_spectra_of_other_layers_or_shapes_are_refused(tmp_path: Path) -> None:
    """Ranks of another net would be numbers without meaning."""
    small_spectra().save(tmp_path / "s.json")
    with pytest.raises(ValueError, match=r"has no layer 'conv1'; it was measured on tiny"):
        cost("convnet", tune="all", spectra=str(tmp_path / "s.json"))


# ---- measuring -----------------------------------------------------------------------------


def test_measured_ranks_equal_the_calibrations_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line end to end: its file gives the ranks that calibrate() gives."""
    path = tmp_path / "convnet.json"
    arguments = ["--net", "convnet", "--data", "digits", "--batch", "16", "--batches", "3", "--image-size", "8"]
    lance_ref.manual_seed(0)
    assert spectra_cli.main([*arguments, "--output", str(path)]) == 0
    assert "spectra of 3 layers" in capsys.readouterr().out
    read = load_spectra(path)
    assert read.provenance["image_count"] == 48
    assert read.provenance["command"].startswith("python -m analysis.spectra --net convnet --data digits")

    lance_ref.manual_seed(0)
    net = models.create("convnet", num_classes=1000)
    images = datasets.load("digits", "train")
    batches = [x for x, _ in datasets.batches(images, 16, 0, image_size=8, channels=3)][:3]
    calibration = lance_ref.calibrate(net, batches, layers=list(read.layers))
    for epsilon in (0.7, 0.9, 1.0):
        for name, layer in read.layers.items():
            assert layer.ranks(epsilon, 16) == calibration.with_epsilon(epsilon)[name].ranks
    report = cost("convnet", batch=16, image_size=8, tune="last:1", spectra=str(path))
    row = next(row for row in report.rows if row.tuned)
    assert row.methods["lance"].ranks == calibration["conv3"].ranks
    source = f"--spectra {path} at epsilon 0.7: convnet, freshly initialised, 48 images of digits"
    assert report.ranks_from.startswith(source)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--net", "vgg", "--data", "digits"], "vgg"),
        (["--net", "convnet", "--data", "nowhere"], "nowhere"),
        (["--net", "convnet", "--data", "digits", "--batches", "0"], "batches is 0"),
        (["--net", "convnet", "--data", "digits", "--batches", "12"], "12 batches of 128 need 1536 images"),
    ],
)
def test_bad_input_gives_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], named: str
) -> None:
    """As for the cost model: one line, no file."""
    with pytest.raises(SystemExit) as exit_info:
        spectra_cli.main([*arguments, "--output", str(tmp_path / "x.json")])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert list(tmp_path.iterdir()) == []


# ---- the shipped file ----------------------------------------------------------------------


def shipped() -> Spectra:
    path = shipped_spectra("mobilenetv2", (3, 224, 224))
    assert path is not None
    return load_spectra(path)


def test_shipped_spectra_cover_every_layer_but_the_head() -> None:
    """Any --tune of the default net has spectra, and their provenance is stated."""
    read = shipped()
    report = cost("mobilenetv2", tune="all")
    assert set(report.tuned_layers) == set(read.layers)
    assert len(read.layers) == 52
    assert "imagenet" in read.provenance["weights"].lower()
    assert read.provenance["weights_sha256"] == models.PRETRAINED["mobilenetv2"].sha256
    assert read.provenance["image_count"] == read.batch * read.provenance["batches"]
    assert "analysis.spectra" in read.provenance["command"]


def test_shipped_spectra_of_one_activation_hold_the_same_energy_in_every_mode() -> None:
    """Every mode's spectrum is a share of the same ‖A‖²: it sums to one, to the digits written."""
    for layer in shipped().layers.values():
        for energies in layer.energies:
            assert energies.sum() == pytest.approx(1, abs=1e-4)


def test_another_batch_uses_the_law_and_says_so() -> None:
    """Batch 8 with spectra of batch 128: ranks within the batch, and the source line tells."""
    report = cost("mobilenetv2", batch=8, epsilon=0.95)
    for row in report.rows:
        if row.tuned:
            ranks = row.methods["lance"].ranks
            assert ranks is not None
            assert 1 <= (ranks[0] or 0) <= 8
    assert "batch mode predicted for 8: v + n*m once" in report.ranks_from


def test_other_image_sizes_have_no_spectra() -> None:
    """Spectra of 224 pixels say nothing about 192: the assumption is stated instead."""
    assert cost("mobilenetv2", image_size=192).ranks_from.startswith("assumed")


@pytest.mark.parametrize("seed", range(8))
def test_no_flipped_bit_gives_other_numbers(tmp_path: Path, seed: int) -> None:
    """Of 200 flips each is refused in one line that names the file, or leaves the document as it was."""
    path = tmp_path / "s.json"
    small_spectra().save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(seed)
    for _ in range(25):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            same = json.loads(bytes(damaged)) == json.loads(whole)
        except ValueError:
            same = False
        if same:
            assert load_spectra(path).net == "tiny"
        else:
            with pytest.raises(ValueError, match=re.escape(str(path))):
                load_spectra(path)


def test_a_device_is_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/zero has no end: it is refused for what it is."""
    with pytest.raises(ValueError, match="/dev/zero: is no ordinary file"):
        load_spectra("/dev/zero")
