"""The device experiment: whole maps give the program's weights, every row runs, and a budget takes what fits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_case import strict_json

from experiments.device import cell as device_cell
from experiments.device import command as device_command
from experiments.device.report import Row, best_in, budget_cells, cells, rate_cells
from experiments.device.whole_maps import WholeMaps
from lance_ref import F, calibrate, compress, device, models, nn, optim, tune
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module
from lance_ref.train.features import tail

METHODS = ("head", "bias", "bp", "lance")


class Block(nn.Module):
    """A small inverted residual with everything that MCUNet's tail has: expansion, depthwise, addition."""

    def __init__(self, C: int, hidden: int, rng: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(C, hidden, 1, rng=rng)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, rng=rng)
        self.project = nn.Conv2d(hidden, C, 1, rng=rng)
        self.relu6 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.relu6(self.depthwise(self.relu6(self.expand(x)))))


def small_net() -> Module:
    """Two blocks behind a strided convolution with a frozen batch norm, on maps of 4x4."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, rng=0), nn.BatchNorm2d(6), nn.ReLU(), Block(6, 9, 1), Block(6, 8, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4, rng=3),
    )  # fmt: skip
    net[1].running_mean[:] = np.linspace(-0.2, 0.2, 6)
    return net


def images(count: int, shape: tuple[int, ...], classes: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, *shape)).astype(dtype), rng.integers(0, classes, count)


def made(
    net: Module,
    shape: tuple[int, ...],
    selection: str,
    method: str,
    update: str,
    x: np.ndarray,
    train: str = "subspace",
) -> tuple[device.Program, Any]:
    """The program, and its calibration or None."""
    tune(net, selection)
    calibration = None
    if method == "lance":
        calibration = calibrate(net, [x[:16], x[16:32]], modes=("channel",), mean_free=True, progress=False)
        ranks = {path: (None, min(3, calibration[path].shape[1] - 1), None, None) for path in calibration}
        calibration = calibration.with_ranks(ranks)
    program = device.compile(
        net, calibration, shape, None if method == "head" else selection, update, method=method, train=train
    )
    return program, calibration


def steps_of(x: np.ndarray, y: np.ndarray, batch: int, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [(x[rows], y[rows]) for rows in (rng.integers(0, len(y), batch) for _ in range(steps))]


def assert_near(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], start: dict[str, np.ndarray], off: float
) -> None:
    """Equal to ``off`` of the largest weight, after the weights have moved by much more than that."""
    assert set(got) == set(want)
    for name, value in want.items():
        largest = np.abs(value).max()
        assert np.abs(got[name] - value).max() <= off * largest, name
        assert np.abs(value - start[name]).max() > 100 * off * largest, name


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("update", ["image", "batch"])
@pytest.mark.parametrize("method", METHODS)
def test_whole_maps_give_the_programs_weights(method: str, update: str, dtype: Any) -> None:
    """50 updates: a wrong gradient, a missing bias or weights that change too early would part the two."""
    x, y = images(64, (3, 8, 8), 4, dtype)
    net, off = small_net().to(dtype), 1e-9 if dtype is np.float64 else 1e-5
    program, _ = made(net, (3, 8, 8), "last:5", method, update, x)
    maps = WholeMaps(program)
    start = program.weights()
    for xs, ys in steps_of(x, y, 1 if update == "image" else 2, 50):
        want, got = program.step(xs, ys, 0.05), maps.step(maps.frozen(xs), ys, 0.05)
        assert abs(got - want) < 1e3 * off
    assert_near(maps.weights(), program.weights(), start, off)


@pytest.mark.parametrize(("train", "clip"), [("subspace", None), ("weight", None), ("subspace", 0.1)])
def test_both_give_the_librarys_weights(train: str, clip: float | None) -> None:
    """LANCE by autograd and SGD trains whole weights; the update in the subspace is the same to rounding.

    So is the norm at which both are clipped.
    """
    x, y = images(64, (3, 8, 8), 4, np.float64)
    net = small_net().to(np.float64)
    program, calibration = made(net, (3, 8, 8), "last:5", "lance", "batch", x, train)
    maps, start = WholeMaps(program), program.weights()
    compress(net, calibration)
    norms: list[float] = []
    optimizer = optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
    for xs, ys in steps_of(x, y, 8, 50):
        optimizer.zero_grad()
        F.cross_entropy(net(Tensor(xs)), ys).backward()
        if clip is not None:
            norms.append(optim.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], clip))
        optimizer.step()
        maps.step(maps.frozen(xs), ys, 0.05, clip)
    assert not norms or max(norms) > 0.1
    want = {name: p.data for name, p in net.named_parameters() if p.requires_grad}
    assert_near(maps.weights(), want, start, 1e-9)


def test_a_wrong_gradient_is_noticed() -> None:
    """The comparison fails when the whole maps forget that the mask of ReLU6 cuts a gradient off."""
    x, y = images(64, (3, 8, 8), 4, np.float64)
    program, _ = made(small_net().to(np.float64), (3, 8, 8), "last:5", "bp", "image", x)
    maps, start = WholeMaps(program), program.weights()
    for operation in maps._operations.values():
        if hasattr(operation, "mask") or type(operation).__name__ == "_ReLU6":
            operation.backward = lambda g: g
    for xs, ys in steps_of(x, y, 1, 5):
        program.step(xs, ys, 0.05)
        maps.step(maps.frozen(xs), ys, 0.05)
    with pytest.raises(AssertionError):
        assert_near(maps.weights(), program.weights(), start, 1e-9)


def test_the_tail_of_mcunet_in_float32_and_its_time() -> None:
    """What the experiment runs, in its precision; and at least 20 times quicker than the program."""
    x, y = images(64, (96, 4, 4), 10, np.float32)
    net = models.create("mcunet", num_classes=10, rng=0)
    tune(net, "last:4")
    part = tail(net, 13)
    program, _ = made(part, (96, 4, 4), "last:4", "lance", "image", np.abs(x))
    maps, start = WholeMaps(program), program.weights()
    spent = {"program": 0.0, "maps": 0.0}
    for xs, ys in steps_of(np.abs(x), y, 1, 4):
        began = time.process_time()
        program.step(xs, ys, 0.1)
        between = time.process_time()
        maps.step(maps.frozen(xs), ys, 0.1)
        spent["maps"] += time.process_time() - between
        spent["program"] += between - began
    assert_near(maps.weights(), program.weights(), start, 1e-5)
    assert spent["program"] > 20 * spent["maps"]


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The quick experiment on still fewer images, once."""
    folder = tmp_path_factory.mktemp("device")
    files = [
        f"--{name}={folder / file}" for name, file in (("output", "r.json"), ("table", "r.md"), ("figure", "r.png"))
    ]
    small = ["--train-images=100", "--test-images=60", "--epochs=2", "--image-epochs=1", "--directions", "2"]
    assert device_command.main(["--quick", *small, f"--folder={folder / 'runs'}", *files]) == 0
    return folder, strict_json(folder / "r.json")


def test_every_method_has_two_rows(quick: tuple[Path, dict[str, Any]]) -> None:
    """Each method trains with both kinds of update, and its row says what the whole step takes."""
    folder, document = quick
    rows = {(row["method"], row["update"]): row for row in document["rows"]}
    assert list(rows) == [(method, update) for update in ("image", "batch") for method in METHODS]
    for (method, update), row in rows.items():
        (seed,) = row["seeds"]
        assert 0 <= row["accuracy_mean"] <= 1
        assert (seed["images"], seed["train_images"]) == (60, 100)
        assert seed["updates"] == (100 if update == "image" else 2 * (100 // 32))
        assert len(seed["loss"]) == (1 if update == "image" else 2)
        plan = row["plan"]
        assert plan["ram_bytes"] >= plan["lower_bound_bytes"] >= sum(plan["ram"].values()) > 0
        assert rows[method, "image"]["plan"]["ram_bytes"] < rows[method, "batch"]["plan"]["ram_bytes"]
        assert plan["ram_bytes"] <= rows["bp", update]["plan"]["ram_bytes"]
        assert row["plan_without_tiles"]["ram_bytes"] >= plan["ram_bytes"]
        assert row["plan_without_tiles"]["recomputed_macs"] == 0
    for budget in document["budgets"]:
        for plan in budget["plans"]:
            assert "why" in plan or plan["ram_bytes"] <= 1024 * budget["budget_kib"]
    assert (folder / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert "2206.15472" in (folder / "r.md").read_text()


def test_finished_runs_are_not_run_again(
    quick: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command again reads what is there: no cell runs, the rows are the same."""
    folder, document = quick

    def fail(**_: Any) -> None:
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(device_cell, "train", fail)
    monkeypatch.setattr(device_cell, "plan", fail)
    arguments = [a for a in document["arguments"] if not a.startswith(("--output", "--table", "--figure"))]
    assert device_command.main([*arguments, "--jobs=1", f"--output={folder / 'again.json'}"]) == 0
    assert json.loads((folder / "again.json").read_text())["rows"] == document["rows"]
    assert "LANCE within a budget" in capsys.readouterr().out


def test_learning_rates_go_on_while_the_end_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half and twice the rates are tried until the best lies between two others, and held-out images decide."""
    asked = []

    def pretend(_: Any, cells: list[dict[str, Any]], __: str) -> list[dict[str, Any]]:
        asked.extend(cells)
        best = {"head": 1.6, "bp": 0.05}
        return [{"accuracy": 1 / (1 + abs(np.log(cell["lr"] / best[cell["method"]])))} for cell in cells]

    monkeypatch.setattr(device_command.frame, "run_cells", pretend)
    given = ["--quick", "--methods", "head", "bp", "--updates", "batch"]
    rates = device_command.swept_rates(device_command.checked(device_command.parser().parse_args(given)))
    assert {key[0]: sorted(tried) for key, tried in rates.items()} == {
        "head": [0.2, 0.4, 0.8, 1.6, 3.2], "bp": [0.025, 0.05, 0.1, 0.2, 0.4]
    }  # fmt: skip
    assert {key[0]: device_command.best_rate(tried) for key, tried in rates.items()} == {"head": 1.6, "bp": 0.05}
    assert all(cell["validation"] and cell["seed"] == 0 for cell in asked)


def test_a_diverged_rate_is_not_the_best_one_and_a_diverged_run_is_an_error() -> None:
    cell: dict[str, Any] = {
        "net": "convnet", "data": "digits", "tune": "last:1", "method": "bp", "directions": None, "update": "batch",
        "lr": 1e30, "seed": 0, "epochs": 1, "batch": 16, "image_size": None, "train_images": 60, "test_images": 20,
        "calibration_batches": 1, "calibration_batch": 16, "validation": True, "folder": "",
    }  # fmt: skip
    outcome = device_cell.train(**cell)
    assert outcome["accuracy"] == 0
    assert "expected a finite number" in outcome["diverged"]
    with pytest.raises(FloatingPointError, match="expected"):
        device_cell.train(**{**cell, "validation": False})


class Recorder:
    """Whole maps that learn nothing and note what they are given."""

    sources = (0,)

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.images: list[int] = []

    def step(self, sources: dict[int, np.ndarray], labels: np.ndarray, lr: float, clip: float | None) -> float:
        self.rates.append(lr)
        self.images += sources[0].ravel().astype(int).tolist()
        assert sources[0].ravel().tolist() == labels.tolist()
        return float(labels.sum())

    def is_finite(self) -> bool:
        return True


def test_every_image_comes_once_in_an_epoch_and_the_rate_falls() -> None:
    """Half a cosine over all updates, an order of its own for each epoch, and no image twice in one."""
    numbers = np.arange(6)
    recorder = Recorder()
    losses = device_cell.run(recorder, [numbers[:, None, None] * 1.0], numbers, 2, 0.4, 2, 0)  # type: ignore[arg-type]
    np.testing.assert_allclose(recorder.rates, 0.2 * (1 + np.cos(np.pi * np.arange(6) / 6)))
    first, second = recorder.images[:6], recorder.images[6:]
    assert sorted(first) == sorted(second) == numbers.tolist()
    assert first != second
    assert losses == [5.0, 5.0]


def row(method: str, directions: int | None, update: str, accuracies: tuple[float, ...]) -> Row:
    seeds = tuple({"accuracy": accuracy, "images": 100} for accuracy in accuracies)
    plan = {"ram_bytes": 2048, "lower_bound_bytes": 1024, "flash_bytes": 512, "recomputed_macs": 1_500_000}
    return Row(method, directions, update, 0.1, {0.1: 0.5, 0.05: 0.25}, plan, {"ram_bytes": 4096}, seeds)


def test_the_tables_by_hand() -> None:
    """Mean, deviation and KiB are those of the numbers given, and a budget takes the most accurate row that fits."""
    rows = [
        row("lance", 8, "image", (0.5, 0.7)),
        row("lance", 8, "batch", (0.8, 0.8)),
        row("bp", None, "batch", (0.9,)),
    ]
    assert cells(rows[0]) == ["image", "LANCE, 8 directions", "60.0 ± 14.1", "0.1", "2.0", "1.0", "1.5", "4.0", "0.5"]
    assert rate_cells(rows[2]) == ["batch", "backpropagation", "0.05: 25.0, 0.1: 50.0"]
    fitting = {"ram_bytes": 3072, "tiles": 4, "tile": [2, 3], "recomputed_macs": 0}
    fits = {rows[0].key: fitting, rows[1].key: {"why": "too large"}}
    assert best_in(rows, fits) is rows[0]
    assert budget_cells(rows, 3.0, fits) == [
        "3", "LANCE, 8 directions", "image", "3.0", "4 of 2x3", "0.0", "60.0 ± 14.1"
    ]  # fmt: skip
    assert budget_cells(rows, 1.0, {rows[1].key: {"why": "too large"}})[:2] == ["1", "none"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "adam"], "invalid choice: 'adam'"),
        (["--methods", "bp", "--directions", "3"], "--directions has no effect here: it needs --methods lance"),
        (["--updates", "image", "--epochs", "3"], "--epochs has no effect here: it needs --updates batch"),
        (["--budgets", "3", "3"], "--budgets is 3.0 3.0, expected each once"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        raise SystemExit(device_command.main(["--quick", *arguments]))
    assert message in capsys.readouterr().err


def test_nets_that_whole_maps_cannot_run_are_named() -> None:
    """An operation without an entry is an error with its name, not a wrong number."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, rng=0), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2, rng=0))
    program = device.compile(net, None, (1, 6, 6), "all")
    with pytest.raises(device.UnsupportedError, match="'max_pool'"):
        WholeMaps(program)
