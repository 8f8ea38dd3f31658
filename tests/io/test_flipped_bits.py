"""A bit that flips in any file that we write is an error, or harmless: no file loads as other numbers."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from continual_resume_case import small
from small_nets import ThreeLayers

import lance_ref
from analysis.commands.sweep import FORMAT, VERSION, _read, _task
from analysis.ranks.spectra_file import LayerSpectra, Spectra, load_spectra
from experiments.ledger.evidence import RESULTS, Evidence
from lance_ref import Calibration, calibrate, checkpoint, datasets, models, nn, optim
from lance_ref.continual import networks
from lance_ref.continual.learners import LEARNERS, Recipe
from lance_ref.continual.protocol import run
from lance_ref.io.whole_file import SEAL, read_json, write_json
from lance_ref.train.features import extract

FLIPS = 40


def arrays_of(net: nn.Module, optimizer: optim.Optimizer) -> list[bytes]:
    state = {**net.state_dict(), **optimizer.state_dict()}
    return [array.tobytes() for array in state.values()]


class Kind:
    """A kind of file: how one is made, and everything that comes of reading it, as something that can be compared."""

    def make(self, path: Path) -> None:
        raise NotImplementedError

    def read(self, path: Path) -> Any:
        raise NotImplementedError


class CalibrationFile(Kind):
    def make(self, path: Path) -> None:
        rng = np.random.default_rng(0)
        calibrate(ThreeLayers(), [rng.standard_normal((5, 2, 7, 5))], layers="conv1").save(path)

    def read(self, path: Path) -> Any:
        found = Calibration.load(path)
        grams = [None if K is None else K.tobytes() for name in found for K in found[name].spectra]
        return str(found), list(found), grams


class CheckpointFile(Kind):
    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3, rng=0), nn.BatchNorm2d(2))
        self.sgd = optim.SGD(list(self.net.parameters()), lr=0.1, momentum=0.9)
        for parameter in self.sgd.params:
            parameter.grad = parameter.data + 1
        self.sgd.step()

    def make(self, path: Path) -> None:
        checkpoint.save(path, self.net, self.sgd, meta={"loss": 0.25})

    def read(self, path: Path) -> Any:
        return checkpoint.load(path, self.net, self.sgd), arrays_of(self.net, self.sgd)


class ContinualFile(Kind):
    def run(self, path: Path) -> Any:
        scenario = small().limited(tasks=1)
        recipe = Recipe(epochs=1, batch_size=10, lr=0.1, seed=1)
        made = LEARNERS["finetune"](networks.make("mlp", scenario, 0), scenario, recipe)
        result = run(made, checkpoint=path, progress=False)
        return result.R.tolist(), result.tasks, [array.tobytes() for array in made.net.state_dict().values()]

    def make(self, path: Path) -> None:
        self.run(path)

    def read(self, path: Path) -> Any:
        return self.run(path)  # it is finished: nothing is computed, all is what the file says


class Stopped(Exception):  # noqa: N818  (it is no error)
    pass


class InsideTask(ContinualFile):
    """A checkpoint of a run that was stopped inside a task."""

    def run(self, path: Path, stop: bool = False) -> Any:
        def on_step(task: int, step: int) -> None:
            if stop and step == 3:
                raise Stopped

        scenario = small().limited(tasks=1)
        recipe = Recipe(epochs=1, batch_size=10, lr=0.1, momentum=0.5, seed=1, basis_samples=40, thresholds=(0.8,))
        made = LEARNERS["gpm"](networks.make("mlp", scenario, 0), scenario, recipe)
        result = run(made, checkpoint=path, every_steps=2, on_step=on_step, progress=False)
        return result.R.tolist(), [array.tobytes() for array in made.net.state_dict().values()]

    def make(self, path: Path) -> None:
        with contextlib.suppress(Stopped):
            self.run(path, stop=True)


class SpectraFile(Kind):
    def make(self, path: Path) -> None:
        provenance = {"weights": "w", "images": "i", "image_count": 8, "batches": 2, "command": "c"}
        rng = np.random.default_rng(0)
        conv = LayerSpectra((4, 5, 3, 3), tuple(np.sort(rng.random(n))[::-1] for n in (4, 5, 3, 3)))
        Spectra("tiny", 4, (2, 3, 3), provenance, {"conv": conv, "fc": conv}).save(path)

    def read(self, path: Path) -> Any:
        return repr(load_spectra(path))


class Cell(Kind):
    task = _task(0, {"x": 5}, "sweep_cells:square")

    def make(self, path: Path) -> None:
        about = {"format": FORMAT, "version": VERSION, "function": self.task.function, "cell": self.task.cell}
        write_json(path, {**about, "result": {"square": 25.125, "of": [1, 2.5]}, "seconds": 1.5})

    def read(self, path: Path) -> Any:
        found = _read(path, self.task)
        if found is None:
            raise ValueError("the cell is run again")
        return found["result"]


class Results(Kind):
    def make(self, path: Path) -> None:
        shutil.copy(RESULTS / "domain_shift.json", path)

    def read(self, path: Path) -> Any:
        document = Evidence(path.parent).results(path.stem, "command")
        return {name: document[name] for name in sorted(self.known & set(document))}

    @property
    def known(self) -> set[str]:
        return set(json.loads((RESULTS / "domain_shift.json").read_text())) - {SEAL}


class FeaturesFile(Kind):
    def __init__(self) -> None:
        self.net = models.create("convnet", in_channels=1, channels=8, rng=0)
        lance_ref.tune(self.net, "last:1")
        self.digits = datasets.load_digits("train", limit=40)

    def make(self, path: Path) -> None:
        extract(self.net, self.digits, path=path)

    def read(self, path: Path) -> Any:
        return np.asarray(extract(self.net, self.digits, path=path).arrays).tobytes()


class FeaturesAbout(FeaturesFile):
    """The file beside the array."""

    def make(self, path: Path) -> None:
        extract(self.net, self.digits, path=path.with_suffix(".npy"))
        path.with_suffix(".npy.json").rename(path)

    def read(self, path: Path) -> Any:
        shutil.copy(path, path.with_suffix(".npy.json"))
        return super().read(path.with_suffix(".npy"))


KINDS = [
    CalibrationFile, CheckpointFile, ContinualFile, InsideTask, SpectraFile, Cell, Results, FeaturesFile, FeaturesAbout,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_flipped_bit_never_loads_as_other_numbers(
    kind: type[Kind], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused in one line that names the file and says what to do, or the content is the same."""
    of, path = kind(), tmp_path / "file.json"
    of.make(path)
    content, right = path.read_bytes(), of.read(path)
    rng, refused = np.random.default_rng(1), 0
    for at in rng.integers(0, len(content), FLIPS):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        capsys.readouterr()
        try:
            found = of.read(path)
        except ValueError as error:
            words = str(error) if kind is not Cell else capsys.readouterr().err.strip()
            assert path.name in words, words
            assert "again" in words, words
            assert "\n" not in words
            refused += 1
        else:
            assert found == right, f"bit flipped in byte {at}"
    assert refused > FLIPS / 2 or kind in (FeaturesFile, FeaturesAbout), "the features are made anew at once"


@pytest.mark.parametrize("path", [*RESULTS.glob("*.json")], ids=lambda path: path.name)
def test_every_committed_result_has_its_checksum(path: Path) -> None:
    """Written by hand it would be refused."""
    assert SEAL not in read_json(path, 2**28)
