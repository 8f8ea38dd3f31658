"""A run that is killed and taken up again ends bit by bit like one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from resume_case import EPOCHS, STEPS, timeless, train

from lance_ref import checkpoint, manual_seed
from lance_ref.engine.random import as_generator
from lance_ref.io.npz import load_npz
from lance_ref.train.training import StepInfo

SCRIPT = Path(__file__).parents[1] / "support" / "resume_case.py"


class Killed(Exception):  # noqa: N818  (it is no error)
    """Stands for SIGKILL within one process."""


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """As in a fresh process."""
    manual_seed(0)


def contents(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays of a checkpoint, and what it says beside them, without times."""
    arrays = load_npz(path)
    about = json.loads(arrays.pop("about").tobytes())
    about["meta"].pop("seconds")
    for row in [*about["meta"]["history"], about["meta"]["tally"]]:
        row.pop("seconds")
    return arrays, about


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, statistics, momentum, warm starts, random states, position and history."""
    (arrays, about), (other_arrays, other_about) = contents(a), contents(b)
    assert about == other_about
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        assert array.dtype == other_arrays[name].dtype
        assert array.tobytes() == other_arrays[name].tobytes(), name


def run_script(*arguments: object) -> int:
    """Exit code of the run in a process of its own; NumPy in place of Numba, which takes a second to start."""
    environment = {**os.environ, "LANCE_REF_NUMBA": "0"}
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], timeout=120, env=environment).returncode


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    """Killed by SIGKILL between steps, within a checkpoint, before and after it takes its place; then run on."""
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    assert run_script(folders[0] / "run.npz", folders[0] / "result.json") == 0
    path, result = folders[1] / "run.npz", folders[1] / "result.json"
    rng = np.random.default_rng(7)
    array, another = rng.integers(1, len(contents(folders[0] / "run.npz")[0]), 2)
    moments = ["step:2", f"write:1:{array}", f"step:{rng.integers(9, 14)}", "move:1", "after:1", f"write:1:{another}"]
    for where in moments:
        assert run_script(path, result, where) == -signal.SIGKILL, where
        assert not result.exists()
    assert list(folders[1].glob(".*.unfinished")), "it was not killed within a checkpoint"
    assert run_script(path, result) == 0
    assert_same_run(folders[0] / "run.npz", path)
    assert result.read_bytes() == (folders[0] / "result.json").read_bytes()
    assert sorted(os.listdir(folders[1])) == ["result.json", "run.npz"]


def interrupted(path: Path, *moments: int) -> Any:
    """The same run in this process, stopped before each of these steps and built anew; result and network."""

    def stop_at(step: int) -> Any:
        def on_step(info: StepInfo) -> None:
            if info.step == step:
                raise Killed

        return on_step

    for step in moments:
        with pytest.raises(Killed):
            train(str(path), stop_at(step))
        manual_seed(0)
    return train(str(path))


def test_interrupted_at_every_third_step(tmp_path: Path) -> None:
    """In one process: the same checkpoint, network and history as without interruption, and without checkpoints."""
    whole, net = train(str(tmp_path / "whole.npz"))
    manual_seed(0)
    parts, other = interrupted(tmp_path / "parts.npz", *range(1, STEPS, 3))
    manual_seed(0)
    plain, third = train(None)
    assert_same_run(tmp_path / "whole.npz", tmp_path / "parts.npz")
    assert timeless(whole) == timeless(parts) == timeless(plain)
    for name, array in net.state_dict().items():
        assert array.tobytes() == other.state_dict()[name].tobytes() == third.state_dict()[name].tobytes()
    assert whole.cached, "the frozen part is to be run anew after each interruption"
    assert len(whole.history) == EPOCHS


@pytest.mark.parametrize("forgotten", ["optimizer/", "store/", "net/3.", "default", "9.rng", "tally", "step"])
def test_whatever_a_checkpoint_forgets_is_noticed(
    forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is sharp enough: momentum, warm starts, statistics, random states, sums and position all count."""
    train(str(tmp_path / "whole.npz"))
    manual_seed(0)
    restore, load = checkpoint._restore, checkpoint.load

    def forgetful_restore(arrays: Any, randomness: Any, net: Any, optimizer: Any, scheduler: Any) -> None:
        own, own_randomness = checkpoint._collect(net, optimizer, scheduler)
        # what a fresh run lacks altogether (momentum, warm starts) is dropped, the rest keeps its present value
        kept = {name: array for name, array in arrays.items() if not name.startswith(forgotten)}
        kept |= {name: array for name, array in own.items() if name.startswith(forgotten)}
        randomness = {name: own_randomness[name] if name == forgotten else randomness[name] for name in randomness}
        restore(kept, randomness, net, optimizer, scheduler)

    def forgetful_load(*arguments: Any, **options: Any) -> Any:
        meta = load(*arguments, **options)
        if forgotten == "tally":
            meta["tally"]["loss"] = 0.0
        if forgotten == "step":
            meta["step"] += 1
        return meta

    monkeypatch.setattr(checkpoint, "_restore", forgetful_restore)
    monkeypatch.setattr(checkpoint, "load", forgetful_load)
    interrupted(tmp_path / "parts.npz", 14)  # the last checkpoint is of 12 steps, within an epoch
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "whole.npz", tmp_path / "parts.npz")


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    """The same result and network, times included, without a step; the file is not written again."""
    path = tmp_path / "run.npz"
    first, net = train(str(path))
    content, after = path.read_bytes(), as_generator(None).bit_generator.state
    manual_seed(1)
    steps: list[StepInfo] = []
    again, other = train(str(path), steps.append)
    assert not steps
    assert again == first
    assert path.read_bytes() == content
    assert as_generator(None).bit_generator.state == after
    assert all(np.array_equal(array, other.state_dict()[name]) for name, array in net.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": EPOCHS + 1}, f"epochs is {EPOCHS} there and {EPOCHS + 1} here"),
        ({"batch_size": 16}, "batch_size is 32 there and 16 here"),
        ({"seed": 3}, "seed is 2 there and 3 here"),
        ({"schedule": "constant"}, "schedule is cosine there and constant here"),
        ({"clip_norm": None}, "clip_norm is 2.0 there and None here"),
        ({"optimizer": None}, "optimiser's momentum is 0.9 there and 0.0 here"),
        ({"normalise": None}, "train after image_size and normalise is"),
        ({"cache_frozen": False}, "frozen part run once is True there and False here"),
    ],
)
def test_another_recipe_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Resuming with other settings would give neither run; the checkpoint is left alone."""
    path = tmp_path / "run.npz"
    with pytest.raises(Killed):
        train(str(path), _stop_at_step_4)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        train(str(path), **change)
    assert path.read_bytes() == content


def _stop_at_step_4(info: StepInfo) -> None:
    if info.step == 4:
        raise Killed
