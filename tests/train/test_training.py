"""fit: the recipe by hand, what stops a run, what callbacks and reports get."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import F, Tensor, datasets, fit, nn, no_grad, optim, tape, tune
from lance_ref.datasets import Dataset
from lance_ref.train.run import epoch_order
from lance_ref.train.training import StepInfo, evaluate

CLASSES = ("a", "b", "c")


def images(count: int = 26, size: int = 4, seed: int = 0, channels: int = 1) -> Dataset:
    """Random pixels whose brightness tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = rng.integers(0, 60, (count, size, size, channels)) + 80 * labels[:, None, None, None]
    return Dataset("toy", "train", pixels.astype(np.uint8), labels.astype(np.int64), CLASSES, "made here")


def small_net(dtype: Any = np.float32) -> nn.Sequential:
    rng = np.random.default_rng(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, rng=rng), nn.ReLU(), nn.Conv2d(3, 4, 2, rng=rng), nn.Flatten(), nn.Linear(4, 3, rng=rng)
    ).to(dtype)


def values(net: nn.Module) -> dict[str, np.ndarray]:
    return net.state_dict()


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_the_recipe_is_the_one_that_is_promised() -> None:
    """Bit by bit a loop by hand: order from (seed, epoch), clipping, SGD, cosine over all steps, history."""
    data, net, by_hand = images(), small_net(), small_net()
    result = fit(net, data, images(9, seed=1), epochs=3, batch_size=8, lr=0.5, clip_norm=0.1, seed=5)
    parameters = list(by_hand.parameters())
    for epoch in range(3):
        order = np.random.default_rng((5, epoch)).permutation(26)
        losses, right, rates = [], 0, []
        for step in range(3):
            chosen = order[8 * step : 8 * step + 8]
            x = (data.images[chosen].transpose(0, 3, 1, 2) * np.float32(1 / 255)).astype(np.float32)  # (8, 1, 4, 4)
            logits = by_hand(x)
            loss = F.cross_entropy(logits, data.labels[chosen])
            losses.append(loss.item())
            right += int((logits.data.argmax(axis=1) == data.labels[chosen]).sum())
            bytes_of_step = tape(loss).total_bytes
            by_hand.zero_grad()
            loss.backward()
            optim.clip_grad_norm_(parameters, 0.1)
            rates.append(0.5 * (1 + math.cos(math.pi * (3 * epoch + step) / 9)) / 2)
            for parameter in parameters:
                parameter.data = parameter.data - rates[-1] * parameter.grad
        row = result.history[epoch]
        assert (row["epoch"], row["tape_bytes"], row["learning_rate"]) == (epoch, bytes_of_step, rates[0])
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
        assert row["train_accuracy"] == right / 24
    assert same(values(net), values(by_hand))
    assert result.steps == 9
    assert result.test_accuracy == result.history[-1]["test_accuracy"] == evaluate(by_hand, images(9, seed=1))


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 50))
def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone(seed: int, epoch: int, count: int) -> None:
    """A permutation, the same whenever it is asked for, and another one in the next epoch."""
    order = epoch_order(seed, epoch, count)
    assert sorted(order) == list(range(count))
    np.random.default_rng(0).random(3)
    assert np.array_equal(order, epoch_order(seed, epoch, count))
    if count > 20:
        assert not np.array_equal(order, epoch_order(seed, epoch + 1, count))


def test_a_seed_fixes_the_run_and_another_one_changes_it() -> None:
    """Twice the same settings give the same bits."""
    nets = [small_net() for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        fit(net, images(), epochs=2, batch_size=4, seed=seed)
    assert same(values(nets[0]), values(nets[1]))
    assert not same(values(nets[0]), values(nets[2]))


def test_schedule_and_optimiser_of_choice() -> None:
    """A constant rate; Adam with its own rate, which then follows the cosine."""
    constant = fit(small_net(), images(), epochs=3, batch_size=8, lr=0.01, schedule="constant")
    assert [row["learning_rate"] for row in constant.history] == [0.01] * 3
    net, by_hand = small_net(), small_net()
    adam = fit(net, images(), epochs=2, batch_size=13, optimizer=lambda ps: optim.Adam(ps, lr=0.02))
    assert [row["learning_rate"] for row in adam.history] == pytest.approx([0.02, 0.01])
    fit(by_hand, images(), epochs=2, batch_size=13, lr=0.02)
    assert not same(values(net), values(by_hand)), "Adam was not used"


def test_a_short_run_learns_and_without_a_learning_rate_does_not() -> None:
    """The bundled digits, a small network from random weights."""
    train, test = (datasets.load("digits", split, limit=n) for split, n in (("train", 640), ("test", 200)))
    reached = []
    for lr in (0.05, 0.0):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32, rng=0), nn.ReLU(), nn.Linear(32, 10, rng=1))
        reached.append(fit(net, train, test, epochs=4, batch_size=16, lr=lr, normalise=(0.3, 0.3)).test_accuracy or 0)
    assert reached[0] > 0.75
    assert reached[1] < 0.3


# ---- evaluation, callbacks, reports ------------------------------------------------------


def test_evaluate_counts_every_image_and_leaves_the_net_alone() -> None:
    """The odd last batch counts; dropout is off; the mode of each module is put back, and no tape was made."""
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.9, rng=0), nn.Linear(16, 3, rng=0))
    list(net)[1].eval()
    data = images(11)
    x = data.images.reshape(11, 16) * np.float32(1 / 255)  # (11, 16)
    scores = x @ net[2].weight.data.T + net[2].bias.data
    expected = (scores.argmax(axis=1) == data.labels).sum() / 11
    assert evaluate(net, data, batch_size=4) == expected
    assert [module.training for module in net.modules()] == [True, True, False, True]
    assert net[2].weight.grad is None


def test_fit_puts_the_modes_back() -> None:
    """It trains in training mode, also a net that was in evaluation mode, and leaves it as it was."""
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5, rng=0), nn.Linear(16, 3, rng=0)).eval()
    seen = []
    fit(net, images(), images(), epochs=2, batch_size=13, on_step=lambda info: seen.append(info.net[1].training))
    assert seen == [True] * 4
    assert not any(module.training for module in net.modules())


def test_on_step_gets_the_batch_before_the_step_and_does_not_disturb() -> None:
    """Numbers of step and epoch, the arrays of the batch, a net that takes them; the run is what it is without."""
    infos: list[StepInfo] = []

    def look(info: StepInfo) -> None:
        infos.append(info)
        with no_grad():
            assert info.net(info.x).shape == (8, 3)

    watched, alone = small_net(), small_net()
    data = images()
    fit(watched, data, epochs=2, batch_size=8, seed=4, on_step=look)
    fit(alone, data, epochs=2, batch_size=8, seed=4)
    assert same(values(watched), values(alone))
    assert [(info.step, info.epoch, info.steps) for info in infos] == [(s, s // 3, 6) for s in range(6)]
    order = epoch_order(4, 1, 26)
    assert np.array_equal(infos[3].y, data.labels[order[:8]])
    assert np.array_equal(infos[3].x[:, 0], data.images[order[:8], :, :, 0] * np.float32(1 / 255))


def test_the_result_is_json() -> None:
    """Reports store it as it is."""
    result = fit(small_net(), images(), epochs=1, batch_size=8)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False)) == result.to_json()
    assert result.to_json()["test_accuracy"] is None
    assert set(result.seconds) == {"training", "evaluation", "frozen"}
    assert result.seconds["training"] == pytest.approx(sum(row["seconds"] for row in result.history))


def test_the_bar_says_how_it_goes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, accuracy, speed and tape on standard error; nothing without a terminal unless asked for."""
    monkeypatch.setenv("COLUMNS", "200")
    fit(small_net(), images(), epochs=1, batch_size=8)
    assert capsys.readouterr() == ("", "")
    fit(small_net(), images(), epochs=1, batch_size=8, progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert all(word in err for word in ("training", "3/3", "loss ", "accuracy ", "images/s", "tape ", " bytes"))


# ---- what stops a run ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient", "parameter"])
def test_what_is_not_finite_stops_the_run_and_spares_the_checkpoint(where: str, tmp_path: Path) -> None:
    """Named with epoch and step; neither the network's earlier values in the checkpoint nor a result carry NaN."""
    path, net = tmp_path / "run.npz", small_net()
    before: list[bytes] = []

    def poison(info: StepInfo) -> None:
        if info.step == 4:  # of 3 steps an epoch
            before.append(path.read_bytes())
            if where == "loss":
                net[4].bias.data = np.array([np.nan, 0, 0], np.float32)
        if where == "gradient" and info.step == 4:
            net[2].store = Spoiling()

    lr = 0.05 if where != "parameter" else 1e39
    message = {
        "loss": r"loss is nan in epoch 1, step 4 of 9 ",
        "gradient": r"gradient is not finite in epoch 1, step 4 of 9 ",
        "parameter": r"(loss is nan in|weight is not finite after) epoch 0, step \d of 9 ",
    }[where]
    with pytest.raises(FloatingPointError, match=message):
        fit(net, images(), epochs=3, batch_size=8, lr=lr, checkpoint=path, on_step=poison)
    if where == "parameter":
        assert not path.exists()
    else:
        assert path.read_bytes() == before[0]
        assert all(np.isfinite(array).all() for array in np.load(path).values())


class Spoiling(type(nn.Linear(1, 1).store)):  # type: ignore[misc]
    """An exact store whose weight gradient overflows."""

    def weight_gradient(self, saved: Any, grad_output: Any, geometry: Any) -> np.ndarray:
        return np.full(geometry.weight_shape, np.inf, np.float32)


def test_a_single_step_that_overflows_is_noticed() -> None:
    """The loss of the last step is finite, the parameters after it are not."""
    with pytest.raises(FloatingPointError, match=r"0\.weight is not finite after epoch 0, step 0 of 1 "):
        fit(small_net(), images(), epochs=1, batch_size=26, lr=1e39)


def test_running_statistics_that_overflow_are_noticed() -> None:
    """With a single large batch the loss is finite while the statistics are not."""
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3, rng=0))
    net[0].running_var = np.array([np.inf], np.float32)
    with pytest.raises(FloatingPointError, match=r"0\.running_var is not finite after epoch 0, step 0 of 1 "):
        fit(net, images(), epochs=1, batch_size=26)


def one_class() -> Dataset:
    data = images()
    return data.subset(np.flatnonzero(data.labels == 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": one_class()}, "train has images of one class only, 1"),
        ({"train": images(0)}, r"train is empty: toy \(train\) has 0 images"),
        ({"test": images(0)}, r"test is empty"),
        ({"batch_size": 27}, r"batch_size is 27, but toy \(train\) has 26 images"),
        ({"batch_size": 0}, "batch_size is 0, expected an integer of at least 1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": True}, "epochs is True"),
        ({"seed": -1}, "seed is -1"),
        ({"chunk": 0}, "chunk is 0, expected 'auto', None, or a positive number of images"),
        ({"chunk": True}, "chunk is True"),
        ({"chunk": 1.5}, "chunk is 1.5"),
        ({"chunk": "large"}, "chunk is 'large'"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0"),
        ({"checkpoint_every_steps": 0}, "checkpoint_every_steps is 0"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"clip_norm": 0}, "clip_norm is 0"),
        ({"lr": -1}, "lr is -1"),
        ({"train": images(channels=3)}, r"train: Sequential does not take Dataset\('toy'.*4x4x3.*\(2, 3, 4, 4\)"),
        ({"test": images(size=8)}, r"test: Sequential does not take Dataset\('toy'.*8x8x1"),
        ({"image_size": 5}, r"train: Sequential does not take"),
        ({"checkpoint": "no/such/folder/run.npz"}, "its folder does not exist"),
        ({"checkpoint": "."}, "is a folder"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    """Before anything is trained."""
    net = small_net()
    before = values(net)
    arguments: dict[str, Any] = {"train": images(), "epochs": 1, "batch_size": 8, **change}
    with pytest.raises(ValueError, match=message):
        fit(net, arguments.pop("train"), arguments.pop("test", None), **arguments)
    assert same(values(net), before)


def test_labels_outside_the_head() -> None:
    """In training and in test data; the message has both numbers."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, rng=0))
    with pytest.raises(ValueError, match="train: labels run up to 2, but the network has 2 outputs"):
        fit(net, images(), epochs=1, batch_size=8)
    low = images()
    low = low.subset(np.flatnonzero(low.labels < 2))
    with pytest.raises(ValueError, match="test: labels run up to 2"):
        fit(net, low, images(), epochs=1, batch_size=8)
    with pytest.raises(ValueError, match=r"output for 2 images has shape \(2, 3, 2, 2\)"):
        evaluate(small_net()[:2], images())


def test_nothing_to_train_and_wrong_kinds() -> None:
    """A frozen net; an optimiser that is none; data that are none."""
    with pytest.raises(ValueError, match="nothing to train"):
        fit(small_net().requires_grad_(False), images(), epochs=1, batch_size=8)
    with pytest.raises(TypeError, match="optimizer returned a list"):
        fit(small_net(), images(), epochs=1, batch_size=8, optimizer=list)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer is a str"):
        fit(small_net(), images(), epochs=1, batch_size=8, optimizer="sgd")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="train: batch 0 is a int"):
        fit(small_net(), [1], epochs=1, batch_size=8)  # type: ignore[arg-type]


def test_only_what_is_selected_changes() -> None:
    """fit trains what tune chose."""
    net = small_net()
    before = values(net)
    tune(net, "head")
    fit(net, images(), epochs=1, batch_size=8)
    changed = [name for name, array in values(net).items() if not np.array_equal(array, before[name])]
    assert changed == ["4.weight", "4.bias"]
    assert isinstance(net(np.zeros((1, 1, 4, 4), np.float32)), Tensor)
