"""The experiment of continual learning: every learner runs and is predicted to the byte, and errors are one line."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_case import strict_json

from analysis.commands import sweep
from analysis.reports import continual_costs
from experiments.continual import cell as continual_cell
from experiments.continual import command as continual
from experiments.continual.report import Row, agrees, cells, markdown, results
from lance_ref.continual import networks
from lance_ref.continual import scenario as scenarios
from lance_ref.continual.learners import LEARNERS
from lance_ref.continual.metrics import metrics
from lance_ref.train.features import Features

CELL: dict[str, Any] = {
    "scenario": "split-digits", "net": "mlp", "seed": 0, "tasks": 2, "train_images": 40, "test_images": 20, "epochs": 1,
    "batch": 10, "lr": 0.1, "momentum": 0.0, "clip": None, "thresholds": [0.9], "threshold_step": 0.0, "epsilon": 0.9,
    "basis_samples": 40, "memory": 10, "eval_batch": 100, "folder": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """Every learner with two seeds, through the command line."""
    folder = tmp_path_factory.mktemp("continual")
    arguments = [
        "--quick",
        "--seeds=2",
        "--tasks=3",
        "--train-images=80",
        "--test-images=40",
        f"--folder={folder / 'runs'}",
    ]
    outputs = [f"--{n}={folder / file}" for n, file in (("output", "r.json"), ("table", "r.md"), ("figure", "r.png"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANCE_REF_THREADS", "1")
        patch.setattr(sweep, "_in_processes", lambda tasks, jobs: ((task, sweep.run_cell(task)) for task in tasks))
        assert continual.main([*arguments, *outputs]) == 0
    return folder, strict_json(folder / "r.json"), arguments


def test_one_seed_has_no_spread(table: tuple[Path, dict[str, Any], list[str]]) -> None:
    """Where nothing can be said of the spread the file holds null, and no NaN."""
    seed = table[1]["rows"][0]["seeds"][0]
    (row,) = results([Row("finetune", (seed,))], {}, [])["rows"]
    assert {row[name] for name in row if name.endswith("_sd")} == {None}


def test_every_learner_has_its_row(table: tuple[Path, dict[str, Any], list[str]]) -> None:
    """All learners, bytes and multiply-adds as predicted for every task, metrics those of the matrix."""
    folder, document, _ = table
    rows = {row["learner"]: row for row in document["rows"]}
    assert list(rows) == list(LEARNERS)
    for name, row in rows.items():
        assert row["predicted_equals_measured"], name
        assert len(row["seeds"]) == 2
        for seed in row["seeds"]:
            assert np.shape(seed["accuracy"]) == (3, 3)
            assert seed["metrics"] == metrics(np.array(seed["accuracy"]), np.array(seed["baseline"])).as_dict()
        assert row["acc_mean"] == pytest.approx(np.mean([seed["metrics"]["acc"] for seed in row["seeds"]]))
        assert row["acc_mean"] > 0.7, name
    tape = {name: row["seeds"][0]["tasks"][1]["tape_bytes"] for name, row in rows.items()}
    assert tape["head-only"] < tape["lance"] < tape["finetune"] == tape["gpm"] == tape["er"] == tape["joint"]
    assert rows["head-only"]["learning_accuracy_mean"] < rows["joint"]["learning_accuracy_mean"]
    assert rows["finetune"]["seeds"][0]["baseline"] == rows["lance"]["seeds"][0]["baseline"], "same initial weights"
    assert rows["finetune"]["seeds"][0]["baseline"] != rows["finetune"]["seeds"][1]["baseline"]
    assert (folder / "r.png").read_bytes()[:4] == b"\x89PNG"
    text = (folder / "r.md").read_text()
    assert text.count("| lance") == 2
    assert "BWT = mean over i < T-1 of R[T-1, i] - R[i, i]" in text
    assert not list((folder / "runs" / "running").glob("*.npz")), "a finished run leaves no checkpoint"


def test_finished_runs_are_not_run_again(
    table: tuple[Path, dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command again reads what is there, and prints definitions with their brackets."""

    def fail(**_: Any) -> None:
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(continual_cell, "run", fail)
    assert continual.main(table[2]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "lance-no-batch" in out
    assert "mean over i < T-1 of R[T-1, i] - R[i, i]" in out


def test_a_stopped_cell_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cell left in the folder is taken up and gives the same result; another setting starts a run of its own."""
    whole = continual_cell.run(**CELL, learner="gpm")
    arguments = {**CELL, "folder": str(tmp_path), "learner": "gpm"}
    learn, moments = continual_cell.learn, []

    def stopping(*given: Any, **options: Any) -> Any:
        def on_step(task: int, step: int) -> None:
            moments.append((task, step))
            if (task, step) == (1, 3):
                raise KeyboardInterrupt

        return learn(*given, **options, on_step=on_step)

    monkeypatch.setattr(continual_cell, "EVERY_STEPS", 2)
    monkeypatch.setattr(continual_cell, "learn", stopping)
    with pytest.raises(KeyboardInterrupt):
        continual_cell.run(**arguments)
    monkeypatch.setattr(continual_cell, "learn", learn)
    assert moments[-1] == (1, 3)
    (kept,) = tmp_path.glob("*.npz")
    other = continual_cell.run(**{**arguments, "epsilon": 0.8, "epochs": 2})  # starts its own run, and leaves this one
    assert len(other["tasks"]) == 2
    assert list(tmp_path.glob("*.npz")) == [kept]
    result = continual_cell.run(**arguments)
    assert result["accuracy"] == whole["accuracy"]
    assert [task["loss"] for task in result["tasks"]] == [task["loss"] for task in whole["tasks"]]
    assert all(agrees(task) for task in result["tasks"])
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize(("learner", "net"), [("lance", "convnet"), ("gpm", "convnet"), ("lance-no-batch", "convnet")])
def test_convolutions_are_predicted_too(learner: str, net: str) -> None:
    """Patches of convolutions: bytes and multiply-adds of every task's step, with and without the batch mode."""
    result = continual_cell.run(**{**CELL, "net": net, "train_images": 20}, learner=learner)
    assert all(agrees(task) for task in result["tasks"])
    protected = result["tasks"][1]["notes"]["protected"]
    assert [n for n, _ in protected.values()] == [9, 16 * 9, 32 * 9]


@pytest.mark.parametrize("net", ["mlp", "convnet"])
def test_tasks_in_the_subspace_are_predicted(net: str) -> None:
    """Steps that write weights down, and one more after the task; the cell has an argument for it, by default none."""
    result = continual_cell.run(**{**CELL, "net": net, "train_images": 20}, learner="lance", update="subspace")
    assert all(agrees(task) for task in result["tasks"])
    assert all(task["predicted"]["merging_macs"] > 0 for task in result["tasks"])
    for more, expected in ([], {}), (["--update=subspace"], {"update": "subspace"}):
        options = continual.checked(continual.parser().parse_args(["--quick", "--learners=lance", *more]))
        arguments = continual.cell(options, "lance", 0)
        assert {name: value for name, value in arguments.items() if name == "update"} == expected


@pytest.mark.parametrize("learner", list(LEARNERS))
def test_heads_of_different_sizes_are_predicted(learner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, three and five classes on the same float features: forward passes between tasks run the task's own head."""
    rng, parts = np.random.default_rng(0), []
    for classes in (2, 3, 5):
        x = rng.standard_normal((45, 12)).astype(np.float32)
        part = Features(x, np.arange(45) % classes, classes, 1, f"{classes} classes", "train", "", "")
        parts.append((part, part))
    scenario = scenarios.domains("three", parts, (2, 3, 5))
    monkeypatch.setattr(continual_cell, "prepare", lambda **_: (networks.make("mlp", scenario, 0), scenario))
    result = continual_cell.run(**CELL, learner=learner)
    assert [agrees(task) for task in result["tasks"]] == [True] * 3
    if learner == "er":  # 3 images of 12 float32 numbers for each of three tasks, a label and a task number
        assert result["tasks"][2]["flash_bytes"] == 9 * (48 + 4)


@pytest.mark.parametrize("name", ["tape_bytes", "ram_bytes", "flash_bytes", "step_macs", "before_macs", "after_macs"])
def test_a_wrong_prediction_is_seen(name: str) -> None:
    """One byte or one multiply-add more, and the table says so."""
    result = continual_cell.run(**CELL, learner="lance")
    assert cells(Row("lance", (result,)))[10] == "equal"
    wrong = copy.deepcopy(result)
    if name.endswith("macs"):
        wrong["tasks"][1][name]["projection" if name == "step_macs" else "calibration"] += 1
    else:
        wrong["tasks"][1][name] += 1
    assert cells(Row("lance", (wrong,)))[10] == "DIFFERS"


def test_numbers_of_the_table() -> None:
    """Means over seeds of the task that takes most, and spreads, by hand."""

    def seed(acc: float, tape: tuple[int, int], ram: tuple[int, int]) -> dict[str, Any]:
        tasks = []
        for i in range(2):
            foretold = {
                "tape_bytes": tape[i],
                "ram_bytes": ram[i],
                "flash_bytes": 1024 * (i + 1),
                "step_macs": {**dict.fromkeys(continual_costs.MAC_KINDS, 0), "forward": 2_000_000},
                "before_macs": {},
                "after_macs": {"calibration": 1_000_000},
            }
            tasks.append({**foretold, "macs": 7_000_000, "seconds": 5.5, "predicted": foretold})
        R = [[1.0, 0.5], [acc, acc]]
        return {"tasks": tasks, "accuracy": R, "metrics": metrics(np.array(R), np.array([0.5, 0.5])).as_dict()}

    row = Row("gpm", (seed(0.5, (2048, 1024), (0, 4096)), seed(1.0, (2048, 1024), (0, 6144))))
    assert cells(row) == [
        "gpm", "75.00 ± 35.36", "-25.00 ± 35.36", "0.00 ± 0.00", "25.00 ± 35.36", "87.50 ± 17.68",
        "2.0", "5.0", "6.0", "2.0", "equal", "2.000", "2", "14", "11.0",
    ]  # fmt: skip
    assert "| gpm | 75.00 ± 35.36 |" in markdown([row], "title", ["--quick"], 100)
    assert math.isclose(row.R[1, 1], 0.75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario", "split-imagenet"], "--scenario is 'split-imagenet', expected one of split-digits"),
        (["--learners", "gpm", "ewc"], "--learners is 'ewc', expected one of finetune"),
        (["--learners", "gpm", "gpm"], "expected each once"),
        (["--net", "vgg"], "--net is 'vgg', expected one of"),
        (["--net", "alexnet-cl"], "32x32 pixels at least"),
        (["--tasks", "1"], "--tasks is 1, expected an integer of at least 2"),
        (["--tasks", "6"], "tasks is 6, but split-digits has 5"),
        (["--epochs", "0"], "--epochs is 0, expected a positive integer"),
        (["--batch", "151"], "--batch is 151, but a task has 150 training images"),
        (["--lr", "0"], "--lr is 0,"),
        (["--lr", "nan"], "--lr is nan"),
        (["--clip", "0"], "--clip is 0,"),
        (["--momentum", "1"], "--momentum is 1,"),
        (["--epsilon", "1.5"], "--epsilon is 1.5"),
        (["--threshold", "0.9", "0"], "--threshold is 0, expected"),
        (["--threshold", "0.9", "0.9", "0.9"], "--threshold has 3 numbers, expected 1 or 2: features.0, features.2"),
        (["--threshold-step", "-1"], "--threshold-step is -1,"),
        (["--scenario", "split-mnist"], "mnist"),
        (["--scenario", "domains", "--net", "mlp"], "a network of its own"),
        (["--output", "no/such/folder/r.json"], "there is no folder"),
        (["--memory", "x"], "--memory is 'x', expected a positive integer"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, one line that names what came, and nothing has run."""
    monkeypatch.delenv("LANCE_REF_DATA", raising=False)
    monkeypatch.setattr(sweep, "run_cells", lambda *a, **k: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stopped:
        continual.main(["--quick", f"--folder={tmp_path}", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_failing_cell_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that blows up says where, with exit code 2."""
    monkeypatch.setenv("LANCE_REF_THREADS", "1")
    monkeypatch.setattr(sweep, "_in_processes", lambda tasks, jobs: ((task, sweep.run_cell(task)) for task in tasks))
    with pytest.raises(SystemExit) as stopped:
        continual.main(["--quick", f"--folder={tmp_path}", "--lr=1e30", "--learners", "finetune", "--tasks=2"])
    assert stopped.value.code == 2
    assert re.search(
        r"task 0, step \d+ \(counted from 0\); the learning rate may be too large\n$", capsys.readouterr().err
    )


def test_help_defines_the_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    """--help says what BWT is, and how forgetting is counted."""
    with pytest.raises(SystemExit):
        continual.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "BWT = mean over i < T-1 of R[T-1, i] - R[i, i]" in text
    assert "Chaudhry et al., ECCV 2018" in text
