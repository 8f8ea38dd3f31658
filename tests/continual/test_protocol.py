"""The protocol: what R holds, that a stopped run ends like one that was not, and that protection protects."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from continual_resume_case import STEPS, learner, norm_net, small, timeless, train

from lance_ref import nn
from lance_ref.continual import networks, protocol
from lance_ref.continual.learners import LEARNERS, Learner
from lance_ref.continual.protection import leak
from lance_ref.continual.protocol import accuracy, run
from lance_ref.continual.scenario import Samples
from lance_ref.engine.autograd import no_grad
from lance_ref.engine.counting import count_macs
from lance_ref.io.npz import load_npz, save_npz
from lance_ref.nn.selection import weighted_layers
from lance_ref.train import checkpoint as checkpoints
from lance_ref.train.features import in_mode

SCRIPT = Path(__file__).parents[1] / "support" / "continual_resume_case.py"


class Stopped(Exception):  # noqa: N818  (it is no error)
    """Stands for SIGKILL within one process."""


def weights(made: Learner) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in made.net.state_dict().items()}


def stop_at(*moment: int) -> Any:
    def on_step(task: int, step: int) -> None:
        if (task, step) == moment:
            raise Stopped

    return on_step


# ---- what is measured ----------------------------------------------------------------------


def test_rows_and_columns() -> None:
    """R[t, i] is task i's accuracy after task t, both triangles; b is that of the network as it came."""
    made = learner("finetune")
    seen: list[list[float]] = []

    def look(task: int, step: int) -> None:
        if step == 0:  # before each task: after the one before it
            tasks = made.scenario.tasks
            seen.append([accuracy(made.net, made.scenario, each.test, each.head, 500) for each in tasks])

    result = run(made, on_step=look, progress=False)
    look(3, 0)
    assert result.R.shape == (3, 3)
    assert [result.baseline.tolist(), *result.R.tolist()] == seen
    assert np.diag(result.R).min() > 0.8, "each task is learned"
    assert result.R[0, 1:].max() < 0.8, "a head that was not trained knows nothing"


def test_accuracy_counts_right_answers() -> None:
    """By hand with a loop over single images, in uneven batches; mode and head are as they were."""
    scenario = small()
    net = networks.make("mlp", scenario, 0)
    heads = networks.heads_of(net)
    assert heads is not None
    heads.selected = 2
    samples = scenario.tasks[1].test
    right = 0
    for i in range(len(samples)):
        hidden = scenario.convert(samples.stored(slice(i, i + 1))).reshape(1, -1)
        for path in ("features.0", "features.2"):
            hidden = np.maximum(hidden @ weighted_layers(net)[path].weight.data.T, 0)
        right += int((hidden @ heads[1].weight.data.T).argmax() == samples.labels[i])
    for size in (7, 30, 500):
        assert accuracy(net, scenario, samples, 1, size) == right / len(samples)
    assert heads.selected == 2
    assert net.training


def test_images_may_be_stored_class_by_class() -> None:
    """Batch norm without running statistics makes batches of one class all look alike: they must be mixed."""
    scenario = small()
    task = scenario.tasks[0]
    rows = np.argsort(task.test.labels, kind="stable")
    by_class = Samples(task.test.images[rows], task.test.labels[rows])
    net = norm_net(scenario)
    made = learner("finetune", replace(scenario, tasks=scenario.tasks[:1], heads=scenario.heads[:1]), net, epochs=3)
    run(made, progress=False)
    assert accuracy(net, scenario, by_class, 0, 15) > 0.9

    right, size = 0, np.count_nonzero(by_class.labels == 0)
    with in_mode(net, training=False), no_grad():
        for own in (slice(None, size), slice(size, None)):
            x, y = scenario.convert(by_class.stored(own)), by_class.labels[own]
            right += int((net(x).data.argmax(axis=1) == y).sum())
    assert right / len(rows) < 0.8, "one batch for each class: the planted fault"


@pytest.mark.parametrize(("name", "kind"), [("split-digits", "gpm"), ("permuted-digits", "lance")])
def test_whole_bill(name: str, kind: str) -> None:
    """Multiply-adds of a task are its steps' and what comes between them: all that ran but the evaluation."""
    made = learner(kind, small(name, 2))
    with count_macs() as rest:  # what no counter inside the run has seen
        result = run(made, progress=False)
    evaluated = 3 * sum(len(task.test) for task in made.scenario.tasks)  # b and two rows of R
    one = sum(layer.weight.size for path, layer in weighted_layers(made.net).items() if path != "classifier.1")
    inside = sum(
        sum(task[part].values()) for task in result.tasks for part in ("step_macs", "before_macs", "after_macs")
    )
    assert [task["steps"] for task in result.tasks] == [STEPS, STEPS]
    assert sum(task["macs"] for task in result.tasks) == sum(rest.by_kind().values()) + inside - evaluated * one


# ---- protection ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "protects"), [("gpm", True), ("lance", True), ("lance-no-batch", True), ("finetune", False)]
)
def test_later_tasks_keep_off_protected_directions(name: str, protects: bool) -> None:
    """‖ΔW M‖ = 0 over all later tasks, momentum included, and biases and norms stay; fine-tuning fails this test."""
    scenario = small()
    made = learner(name, scenario, norm_net(scenario))
    twin = learner("gpm", scenario, made.net)  # only to find M of the first task
    kept: dict[str, Any] = {}

    def on_step(task: int, step: int) -> None:
        if (task, step) == (1, 0):
            twin.after_task(0, scenario.tasks[0].train)
            if isinstance(made, LEARNERS["lance"]):
                made.before_task(1, scenario.tasks[1].train)  # the twin took the stores off
            kept.update({path: layer.weight.data.copy() for path, layer in weighted_layers(made.net).items()})
            kept["rest"] = {
                n: p.data.copy() for n, p in made.net.named_parameters() if "bias" in n or "features.1" in n
            }

    run(made, on_step=on_step, progress=False)
    layers = weighted_layers(made.net)
    shares = [leak(kept[path], layers[path].weight.data, twin.protected[path]) for path in made.layers]  # type: ignore[attr-defined]
    same = all(np.array_equal(made.net.state_dict()[n], array) for n, array in kept["rest"].items())
    changed = any(not np.array_equal(kept[path], layers[path].weight.data) for path in made.layers)
    assert changed, "nothing was learned in the body"
    assert len(kept["rest"]) == 4  # two biases, weight and bias of the norm
    if protects:
        assert max(shares) < 1e-4
        assert same
    else:
        assert min(shares) > 0.05
        assert not same


def test_clipping_scales_the_gradient() -> None:
    """With a norm of 0.01 and lr 0.1 every step moves the weights, by 0.001 at most."""
    made = learner("finetune", clip_norm=0.01, momentum=0.0)
    start = {name: array.copy() for name, array in made.net.state_dict().items()}
    moves: list[float] = []
    run(made, on_step=note_moves(made, start, moves), progress=False)
    assert moves[0] == 0  # before the first step
    assert min(moves[1:]) > 0
    assert max(moves) <= 0.1 * 0.01 * 1.001


def note_moves(made: Learner, before: dict[str, np.ndarray], moves: list[float]) -> Any:
    def on_step(task: int, step: int) -> None:
        after = made.net.state_dict()
        moves.append(float(np.sqrt(sum(float(np.square(after[name] - before[name]).sum()) for name in after))))
        before.update({name: array.copy() for name, array in after.items()})

    return on_step


# ---- stopping and going on -----------------------------------------------------------------


@pytest.mark.parametrize("name", list(LEARNERS))
def test_stopped_and_resumed_is_bit_identical(name: str, tmp_path: Path) -> None:
    """Stopped between and inside tasks, at odd steps too: the same weights, R and bills as in one go."""
    whole, made = train(name)
    path = str(tmp_path / "run.npz")
    for moment in ((0, 0), (0, 5), (1, 0), (1, 4), (2, STEPS - 1)):
        with pytest.raises(Stopped):
            train(name, path, stop_at(*moment))
    result, resumed = train(name, path)
    assert timeless(result) == timeless(whole)
    assert weights(resumed) == weights(made)
    again, _ = train(name, path, stop_at(2, STEPS - 1))  # a finished run takes no step
    assert timeless(again) == timeless(whole)


@pytest.mark.parametrize("forgotten", ["learner/", "net/", "optimizer/momentum", "now/", "generators", "position"])
def test_whatever_a_checkpoint_forgets_is_noticed(
    forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is sharp enough: memory, start of the task, momentum, weights, dropout and place all count."""
    whole, made = train("lance")
    path = str(tmp_path / "run.npz")
    with pytest.raises(Stopped):
        train("lance", path, stop_at(1, 7))  # the checkpoint is of step 6
    load = checkpoints.load_npz

    def forgetful(file: Any, **options: Any) -> dict[str, np.ndarray]:
        arrays = load(file, **options)
        about = json.loads(arrays["about"].tobytes())
        if forgotten == "position":
            about["position"]["step"] -= 1
        if forgotten == "generators":
            about["generators"]["features.3.rng"]["state"]["state"] += 2
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        for name in [name for name in arrays if name.startswith(forgotten)]:
            protects = forgotten == "learner/"  # another direction; zeros for everything else
            arrays[name] = np.eye(len(arrays[name]))[:, :1] if protects else 0 * arrays[name]
        return arrays

    monkeypatch.setattr(checkpoints, "load_npz", forgetful)
    try:
        result, resumed = train("lance", path)
    except (ValueError, FloatingPointError):
        return  # zero weights have no activations to calibrate on
    assert timeless(result) != timeless(whole) or weights(resumed) != weights(made)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_resumed(tmp_path: Path) -> None:
    """By SIGKILL inside the second task, in processes of its own; then run on to the same result, bit by bit."""

    def process(name: str, *moment: str) -> int:
        files = [str(tmp_path / f"{name}.{kind}") for kind in ("npz", "json")]
        environment = {**os.environ, "LANCE_REF_NUMBA": "0"}
        return subprocess.run(
            [sys.executable, str(SCRIPT), "lance", *files, *moment], timeout=120, env=environment
        ).returncode

    assert process("whole") == 0
    assert process("killed", "1", "5") == -signal.SIGKILL
    assert any(name.startswith("now/") for name in load_npz(tmp_path / "killed.npz")), "not killed inside a task"
    assert not (tmp_path / "killed.json").exists()
    assert process("killed") == 0
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, "epochs is 2 there and 3 here"),
        ({"lr": 0.2}, "lr is 0.1 there and 0.2 here"),
        ({"thresholds": (0.9,)}, r"thresholds is \[0.8\] there"),
        ({"seed": 2}, "seed is 1 there and 2 here"),
    ],
)
def test_another_recipe_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Going on with other settings would give neither run; the checkpoint is left alone."""
    path = tmp_path / "run.npz"
    with pytest.raises(Stopped):
        train("gpm", str(path), stop_at(0, 4))
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        train("gpm", str(path), **change)
    with pytest.raises(ValueError, match="learner is gpm there and er here"):
        train("er", str(path))
    assert path.read_bytes() == content


def test_damaged_checkpoints(tmp_path: Path) -> None:
    """A truncated file and a file of another kind are one-line errors that name it."""
    path = tmp_path / "run.npz"
    with pytest.raises(Stopped):
        train("er", str(path), stop_at(1, 4))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"run\.npz"):
        train("er", str(path))
    save_npz(path, {"about": np.zeros(3, np.uint8)})
    with pytest.raises(ValueError, match="no checkpoint of continual learning"):
        train("er", str(path))


# ---- errors --------------------------------------------------------------------------------


def test_errors_say_where() -> None:
    """A task smaller than a batch, and a learning rate that blows up."""
    with pytest.raises(ValueError, match="43 training images, fewer than one batch of 44"):
        run(learner("finetune", batch_size=44), progress=False)
    with pytest.raises(FloatingPointError, match=r"task 0, step \d+ .*learning rate may be too large"):
        run(learner("finetune", lr=1e30), progress=False)
    with pytest.raises(ValueError, match="every_steps is 0"):
        run(learner("finetune"), every_steps=0, progress=False)


def test_labels_and_pixels_tell_scenarios_apart() -> None:
    """The same images with other labels, or in another order of pixels, or one other pixel, are another run's."""
    samples = small().tasks[0].train
    flipped = Samples(samples.images, 1 - samples.labels)
    turned = Samples(samples.images, samples.labels, np.arange(64)[::-1])
    others = Samples(samples.images.copy(), samples.labels)
    pixels = protocol._Pixels()
    assert protocol._digest(others, pixels) == protocol._digest(samples, pixels)
    changed = samples.images.copy()
    changed[-1].flat[-1] ^= 1
    other_pixel = Samples(changed, samples.labels)
    assert len({protocol._digest(each, pixels) for each in (samples, flipped, turned, other_pixel)}) == 4


def other_pixels(part: str) -> Any:
    scenario = small()
    samples = getattr(scenario.tasks[2], part)
    images = samples.images.copy()
    images[7].flat[20] ^= 1
    last = replace(scenario.tasks[2], **{part: replace(samples, images=images)})
    return learner("gpm", replace(scenario, tasks=(*scenario.tasks[:2], last)), norm_net(scenario))


def other_network(change: Any) -> Any:
    scenario = small()
    net: Any = norm_net(scenario)
    change(net.features)
    return learner("gpm", scenario, net)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: other_pixels("train"), "task .* is .* there and"),
        (lambda: other_pixels("test"), "task .* is .* there and"),
        (lambda: other_network(lambda f: setattr(f[3], "p", 0.3)), r"features.3 is Dropout\(p=0.2\) there and .*0.3"),
        (lambda: other_network(lambda f: f.add_module("4", nn.Linear(20, 100, bias=False, rng=1))), "features.4 is L"),
        (
            lambda: other_network(lambda f: f.add_module("0", nn.Linear(64, 20, rng=0).to(np.float64))),
            "0.weight is .*64",
        ),
    ],
)
def test_a_checkpoint_of_other_images_or_another_network(make: Any, message: str, tmp_path: Path) -> None:
    """One bit of one pixel of one image, a probability, a layer: the first difference is named."""
    path = tmp_path / "run.npz"
    with pytest.raises(Stopped):
        train("gpm", str(path), stop_at(0, 4))
    with pytest.raises(ValueError, match=rf"is a checkpoint of another run: .*{message}"):
        run(make(), checkpoint=path, every_steps=3, progress=False)


SPOILED: dict[str, Any] = {
    "float64 weights": lambda a: a.update({"now/features.0.weight": a["now/features.0.weight"].astype(np.float64)}),
    "complex weights": lambda a: a.update({"net/features.0.weight": a["net/features.0.weight"] + 0j}),
    "integer weights": lambda a: a.update({"net/features.4.bias": a["net/features.4.bias"].astype(np.int64)}),
    "NaN weights": lambda a: a["now/features.4.bias"].fill(np.nan),
    "infinite momentum": lambda a: a["optimizer/momentum_buffer.0"].fill(np.inf),
    "float64 momentum": lambda a: a.update({"optimizer/momentum_buffer.0": np.zeros(a["now/features.0.weight"].shape)}),
    "float32 memory": lambda a: a.update({"learner/features.0": a["learner/features.0"].astype(np.float32)}),
    "NaN memory": lambda a: a["learner/features.0"].fill(np.nan),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_checkpoint_that_no_training_leads_to(spoil: Any, tmp_path: Path) -> None:
    """Nothing is cast and nothing is carried along that is not a number."""
    path = tmp_path / "run.npz"
    with pytest.raises(Stopped):
        train("gpm", str(path), stop_at(1, 4))
    arrays = load_npz(path)
    spoil(arrays)
    save_npz(path, arrays)
    with pytest.raises(ValueError, match=r"the checkpoint does not fit: .*(dtype|NaN)"):
        train("gpm", str(path))


@pytest.mark.parametrize(
    "content", [b'{"format": true, "settings": {}, "position": {}, "generators": {}}', b"[]", b"{"]
)
def test_a_format_is_a_number(content: bytes, tmp_path: Path) -> None:
    """True equals 1, and is no format."""
    save_npz(tmp_path / "run.npz", {"about": np.frombuffer(content, np.uint8)})
    with pytest.raises(ValueError, match="is no checkpoint of continual learning, format 2"):
        train("gpm", str(tmp_path / "run.npz"))


def test_a_missing_folder_is_noticed_at_the_start(tmp_path: Path) -> None:
    """And not when an hour's work is to be saved."""
    steps: list[int] = []
    for path, what in ((tmp_path / "no" / "run.npz", "its folder does not exist"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"checkpoint is .* expected a file in an existing folder; .*{what}"):
            run(learner("finetune"), checkpoint=path, on_step=lambda t, step: steps.append(step), progress=False)
    assert not steps
