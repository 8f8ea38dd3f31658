"""The fine-tuning experiment: every method runs, is predicted to the byte, and starts from the same place."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_case import strict_json
from PIL import Image

import lance_ref
from analysis.rules import stores as store_rules
from experiments import frame
from experiments.finetune import cell as finetune_cell
from experiments.finetune import command as finetune
from experiments.finetune.cell import Watch, measure_step, run
from experiments.finetune.methods import Start, methods, prepare
from experiments.finetune.report import Row, markdown, results
from lance_ref import models
from lance_ref.nn.module import Module
from lance_ref.train.features import Part, frozen_stages, tail
from lance_ref.train.training import StepInfo

CELL: dict[str, Any] = {
    "net": "convnet", "data": "digits", "tune": "last:2", "lr": 0.2, "seed": 0, "epochs": 1, "batch": 32,
    "image_size": None, "train_images": 200, "test_images": 100, "calibration_batches": 4, "clip": 2.0, "epsilon": 0.7,
    "modes": ["batch", "channel", "height", "width"], "budget_kib": 8.0, "patch": 2, "ratio": 0.125,
    "validation": False, "folder": "",
}  # fmt: skip
ALL_MODES = ("batch", "channel", "height", "width")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every method once, on few images."""
    folder = tmp_path_factory.mktemp("finetune")
    outputs = [
        f"--{name}={folder / file}" for name, file in (("output", "r.json"), ("table", "r.md"), ("figure", "r.png"))
    ]
    small = ["--epochs=2", "--train-images=400", "--test-images=100", "--calibration-batches=4"]
    assert finetune.main(["--quick", *small, f"--folder={folder / 'runs'}", *outputs]) == 0
    return folder, strict_json(folder / "r.json")


def test_every_method_has_its_row(table: tuple[Path, dict[str, Any]]) -> None:
    """The quick command prints the table for every method; bytes and multiply-adds are those predicted."""
    folder, document = table
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == list(methods())
    for method, row in rows.items():
        assert row["predicted_equals_measured"], method
        assert 0 <= row["accuracy_mean"] <= 1
    tape = {method: row["seeds"][0]["tape_bytes"] for method, row in rows.items()}
    assert tape["head-only"] < tape["lance"] < tape["lance-uniform"] < tape["int8"] < tape["bp"]
    assert tape["micro-batch"] * 4 == tape["bp"]  # at the same images, a fourth at a time
    assert (folder / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "r.md").read_text().count("| lance") == sum(m.startswith("lance") for m in methods())
    assert document["settings"]["epochs"] == 2
    assert document["arguments"][0] == "--quick"


def test_exact_methods_learn_the_same(table: tuple[Path, dict[str, Any]]) -> None:
    """Same seed, weights and batches: recomputing and micro-batches differ from plain training by rounding only."""
    rows = {row["method"]: row["seeds"][0] for row in table[1]["rows"]}
    assert rows["checkpoint"]["loss"] == rows["bp"]["loss"]
    np.testing.assert_allclose(rows["micro-batch"]["loss"], rows["bp"]["loss"], rtol=1e-4)
    assert rows["checkpoint"]["macs"]["recompute"] > 0
    assert rows["checkpoint"]["second_tape_bytes"] > 0
    assert rows["lance"]["loss"] != rows["bp"]["loss"]


def test_chunks_of_images_learn_the_same() -> None:
    """A fourth of the images at a time: a smaller tape, the same multiply-adds, and a whole batch for HOSVD."""
    whole, parts = run(**CELL, method="bp"), run(**CELL, method="bp", chunk=CELL["batch"] // 4)
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-4)
    assert parts["tape_bytes"] == parts["predicted_tape_bytes"] == whole["tape_bytes"] / 4
    assert parts["macs"] == whole["macs"]
    assert parts["chunks"].startswith("Each step took its")
    assert "stayed whole" in run(**CELL, method="hosvd", chunk=1)["chunks"]


def test_at_full_rank_lance_is_backpropagation() -> None:
    """ε = 1 in every mode: the whole training run follows plain backpropagation's, with cosines of 1."""
    exact, full = run(**CELL, method="bp"), run(**{**CELL, "epsilon": 1.0}, method="lance")
    np.testing.assert_allclose(full["loss"], exact["loss"], rtol=1e-4)
    for when in ("start", "middle", "end"):
        np.testing.assert_allclose(list(full["cosines"][when].values()), 1, atol=1e-5)
        np.testing.assert_allclose(list(full["energy_kept"][when].values()), 1, atol=1e-5)


@pytest.mark.parametrize("method", ["lance", "lance-center"])
def test_in_the_subspace_the_run_is_the_same(method: str) -> None:
    """Losses, cosines with the whole gradient and energies to rounding; bytes and multiply-adds as predicted."""
    whole, inside = run(**CELL, method=method), run(**CELL, method=method, update="subspace")
    np.testing.assert_allclose(inside["loss"], whole["loss"], rtol=1e-4)
    assert inside["predicted_tape_bytes"] == inside["tape_bytes"] == whole["tape_bytes"]
    assert inside["predicted_macs"] == inside["macs"] != whole["macs"]
    for when in ("start", "middle", "end"):
        assert inside["cosines"][when] == pytest.approx(whole["cosines"][when], rel=1e-3)
        assert inside["energy_kept"][when] == pytest.approx(whole["energy_kept"][when], rel=1e-3)


def test_a_setting_of_its_own_default_names_no_new_cell() -> None:
    """Finished cells of before are found again: what is not given is not among the arguments."""
    plain, inside = (
        finetune.cell(finetune.checked(finetune.parser().parse_args(["--quick", *more])), "lance", 0, 0.1)
        for more in ([], ["--update=subspace"])
    )
    assert inside == {**plain, "update": "subspace"}


def test_finished_runs_are_not_run_again(
    table: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command again reads what is there: no cell runs, the table is the same."""
    folder, document = table

    def fail(**_: Any) -> None:
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(finetune_cell, "run", fail)
    arguments = [a for a in document["arguments"] if not a.startswith(("--output", "--table", "--figure"))]
    assert finetune.main([*arguments, "--jobs=1", f"--output={folder / 'again.json'}"]) == 0
    again = json.loads((folder / "again.json").read_text())
    assert again["rows"][2]["seeds"] == document["rows"][2]["seeds"]
    assert "Recipe: papers" in capsys.readouterr().out


def test_tuned_rates_are_chosen_on_held_out_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each method gets the rate that did best on the held-out part, and the test set is not looked at for it."""
    asked: list[dict[str, Any]] = []

    def pretend(cells: list[dict[str, Any]], *_: Any, **__: Any) -> list[dict[str, Any]]:
        asked.extend(cells)
        best = {"bp": 0.1, "head-only": 0.2}
        real = run(**{**CELL, "folder": ""}, method="head-only")
        return [{**real, "accuracy": 1 - abs(cell["lr"] - best[cell["method"]])} for cell in cells]

    monkeypatch.setattr("analysis.commands.sweep.run_cells", pretend)
    arguments = ["--quick", "--methods", "bp", "head-only", "--recipe", "tuned", "--train-images=200"]
    assert finetune.main([*arguments, f"--folder={tmp_path}", f"--output={tmp_path / 'r.json'}"]) == 0
    rates = {row["method"]: row["lr"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rates == {"bp": 0.1, "head-only": 0.2}
    assert [cell["validation"] for cell in asked] == [True] * 7 + [False] * 2  # the grid, then twice its largest
    capsys.readouterr()


def test_held_out_images_are_of_the_training_set() -> None:
    """Nine tenths to train on, a tenth of every class to compare on, none of them twice."""
    labels = np.repeat(np.arange(4), 50)
    train, held = finetune_cell._held_out(labels, seed=3)
    assert len(train) + len(held) == 200
    assert not set(train) & set(held)
    assert np.bincount(labels[held]).tolist() == [5, 5, 5, 5]


def test_the_watch_leaves_no_trace() -> None:
    """Measuring cosines changes neither gradients nor the random sketches that come next."""
    results = []
    for watched in (False, True):
        net = models.create("convnet", in_channels=1, rng=0)
        tuning = prepare(net, "last:2", "sketch")
        x = np.random.default_rng(0).random((16, 1, 8, 8), np.float32)
        y = np.arange(16) % 10
        methods()["sketch"].begin(Start(net, tuning, [(x, y)], ALL_MODES, {"ratio": 0.25}, 0))
        if watched:
            watch = Watch(tuning)
            watch(StepInfo(0, 0, 2, net, x, y))
            assert all(-1 <= value <= 1 for value in watch.cosines["start"].values())
            assert net.get_submodule("conv2").weight.grad is None
        lance_ref.F.cross_entropy(net(x), y).backward()
        results.append(net.get_submodule("conv2").weight.grad)
    np.testing.assert_array_equal(*results)


NETS = {"mcunet": "blocks.13.project", "mobilenetv2": "features.18.0"}
PIXELS, IMAGES = 64, 8


def made(name: str) -> Module:
    options = {"width": 0.35} if name == "mobilenetv2" else {}  # eigenvectors of 960 channels take seconds
    net = models.create(name, num_classes=10, rng=0, **options)
    net.train()
    lance_ref.tune(net, "last:4")
    return net


@cache
def frozen_outputs(name: str) -> tuple[int, np.ndarray]:
    """How many stages do not train, and what they give for a few random images."""
    net = made(name)
    stage, _ = frozen_stages(net)
    images = np.random.default_rng(0).standard_normal((2 * IMAGES, 3, PIXELS, PIXELS)).astype(np.float32)
    with lance_ref.no_grad():
        return stage, Part(net, net.stages()[:stage])(images).data


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", [method for method in methods() if method != "head-only"])
def test_predicted_equals_measured_on_the_last_four_layers(name: str, method: str) -> None:
    """Bytes and executed multiply-adds of one step of every method, depthwise layers among them."""
    net = made(name)
    tuning = prepare(net, "last:4", method)
    assert NETS[name] in tuning.layers
    stage, outputs = frozen_outputs(name)
    labels = np.arange(IMAGES) % 10
    batches = [(half.copy(), labels) for half in np.split(outputs, 2)]  # the tape would keep all through a view
    last = tail(net, stage)
    values = {"epsilon": 0.9, "budget_kib": 16_000 / 1024, "patch": 2, "ratio": 0.25}
    methods()[method].begin(Start(last, tuning, batches, ALL_MODES, values, 0))
    cost = measure_step(last, tuning, batches[0], 2 if method == "micro-batch" else None)
    assert cost["tape_bytes"] == cost["predicted_tape_bytes"]
    assert {kind: cost["macs"].get(kind, 0) for kind in cost["predicted_macs"]} == cost["predicted_macs"]


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row says DIFFERS when a rule forgets something, here the cores that LANCE keeps."""
    from dataclasses import replace

    right = store_rules.STORES["lance"]
    monkeypatch.setitem(store_rules.STORES, "lance", lambda call, macs: replace(right(call, macs), tape=()))
    row = Row("papers", "lance", 0.2, (run(**CELL, method="lance"),))
    assert not row.agrees
    assert "DIFFERS" in markdown([row], [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "lanse"], "unknown method 'lanse'"),
        (["--methods", "bp", "bp"], "each once"),
        (["--methods", "bp@3"], "takes no value"),
        (["--methods", "lance@1.5"], "epsilon is 1.5, expected a number in (0, 1]"),
        (["--methods", "asi@-3"], "budget_kib is -3, expected a positive number"),
        (["--methods", "gradient-filter@x"], "a positive integer"),
        (["--data", "nowhere"], "nowhere"),
        (["--net", "nonet"], "nonet"),
        (["--tune", "nolayer"], "nolayer"),
        (["--epsilon", "0"], "--epsilon is 0"),
        (["--ratio", "2"], "--ratio is 2"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--lr", "-1"], "--lr is -1"),
        (["--lr-grid", "0.1", "0"], "--lr-grid"),
        (["--batch", "5000"], "fewer than one batch of 5000"),
        (["--methods", "asi@0.01", "--jobs", "1"], "asi"),
        (["--methods", "lance-planned@0.01", "--jobs", "1"], "budget"),
        (["--output", "/nowhere/r.json"], "/nowhere"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and one line on stderr that names what came."""
    with pytest.raises(SystemExit) as stopped:
        finetune.main(["--quick", "--epochs=1", "--train-images=100", f"--folder={tmp_path}", *arguments])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m experiments.finetune: error:")
    assert words in last


def test_own_pictures_of_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder in which there is nothing to tell apart is refused before anything trains."""
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / split / "cat" / f"{i}.png")
    with pytest.raises(SystemExit):
        finetune.main(["--quick", f"--data={tmp_path}", "--batch=4", f"--folder={tmp_path / 'runs'}"])
    assert "class" in capsys.readouterr().err.strip().splitlines()[-1]


def test_help_says_what_each_method_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that the table prints must be explained somewhere."""
    assert all(of.about for of in methods().values())
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    assert "lance-center lance-mean-free, the mean's own gradient" in " ".join(capsys.readouterr().out.split())


def test_spread_of_one_seed_is_not_invented() -> None:
    """A standard deviation needs two runs."""
    outcome = run(**CELL, method="head-only")
    row = Row("papers", "head-only", 0.2, (outcome,))
    assert not [line for line in markdown([row], []).splitlines() if line.startswith("| head-only") and "±" in line]
    assert results([row], {}, [])["rows"][0]["accuracy_sd"] is None


# ---- each method's own learning rate -----------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "best", "runs"),
    [
        ({0.1: 0.5, 0.2: 0.6, 0.4: 0.55}, 0.2, 3),  # the largest of the grid is best: twice as much is tried
        ({0.1: 0.5, 0.2: 0.6, 0.4: 0.7, 0.8: 0.8, 1.6: 0.0}, 0.8, 5),  # and again, until training diverges
        ({0.1: 0.6, 0.2: 0.6}, 0.1, 2),  # a tie goes to the smaller rate
        ({0.1: 0.7, 0.2: 0.6}, 0.1, 2),
    ],
)
def test_the_best_rate_is_not_at_the_edge_of_the_grid(
    accuracies: dict[float, float], best: float, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A best rate at the edge says that the grid was too small, and favours methods that it happened to suit."""
    asked: list[dict[str, Any]] = []

    def outcomes(options: Any, cells: list[dict[str, Any]], function: str) -> list[dict[str, Any]]:
        asked.extend(cells)
        return [{"accuracy": accuracies[cell["lr"]] if cell["method"] == "bp" else -cell["lr"]} for cell in cells]

    monkeypatch.setattr(frame, "run_cells", outcomes)
    given = ["--methods", "bp", "head-only", "--lr-grid", "0.2", "0.1", "--recipe", "tuned", "--quick"]
    options = finetune.checked(finetune.parser().parse_args(given))
    assert finetune.best_rates(options) == {"bp": best, "head-only": 0.1}
    assert [cell["lr"] for cell in asked if cell["method"] == "bp"] == sorted(accuracies)
    assert len([cell for cell in asked if cell["method"] == "bp"]) == runs
    assert all(cell["validation"] and cell["seed"] == 0 for cell in asked)


def test_training_that_diverges_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate at which the loss is not finite scores 0 among rates, and is an error in the experiment itself."""

    def diverge(*args: Any, **kwargs: Any) -> None:
        raise FloatingPointError("the loss is nan in epoch 0")

    monkeypatch.setattr(finetune_cell, "fit", diverge)
    options = finetune.checked(finetune.parser().parse_args(["--methods", "head-only", "--quick"]))
    tuning = finetune.cell(options, "head-only", 0, 1.0, validation=True) | {"folder": ""}
    assert finetune_cell.run(**tuning)["accuracy"] == 0
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        finetune_cell.run(**{**tuning, "validation": False})
