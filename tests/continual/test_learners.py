"""Learners: what each keeps, trains and leaves alone, with bytes worked by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from continual_resume_case import STEPS, learner, norm_net, small

from lance_ref import Subspace, models
from lance_ref.continual.learners import LEARNERS, Gpm, Joint, LanceLearner, Protecting, Recipe, Replay
from lance_ref.continual.protecting import basis_macs, freeze_beside_weights
from lance_ref.continual.protocol import run
from lance_ref.engine.counting import eigh_macs
from lance_ref.nn.selection import weighted_layers


def after(made: Any, tasks: int) -> Any:
    """The learner when it has seen so many tasks, without training."""
    for t in range(tasks):
        made.after_task(t, made.scenario.tasks[t].train)
    return made


# ---- batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(LEARNERS) - {"joint"}))
def test_all_see_the_same_batches(name: str) -> None:
    """The first pass of each step is the same for every learner, so that they differ in what they do alone."""
    made, plain = after(learner(name), 1), learner("finetune")
    for epoch in (0, 1):
        for position in (0, 3):
            mine, reference = (each.stream(1)(epoch)(position)[0] for each in (made, plain))
            np.testing.assert_array_equal(mine.x, reference.x)
            np.testing.assert_array_equal(mine.y, reference.y)
            assert mine.head == reference.head == 1


def test_an_epoch_takes_each_image_once() -> None:
    """Four batches of ten from 43 images: none twice, labels with their images, another order in each epoch."""
    made = learner("finetune")
    train = made.scenario.tasks[1].train
    x = made.scenario.convert(train.stored(slice(None)))
    orders = []
    for epoch in (0, 1):
        rows = []
        for position in range(4):
            (each,) = made.stream(1)(epoch)(position)
            found = [int(np.flatnonzero((x == image).all(axis=(1, 2, 3)))[0]) for image in each.x]
            np.testing.assert_array_equal(train.labels[found], each.y)
            rows += found
        assert len(set(rows)) == 40
        orders.append(rows)
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("name", "steps"), [("split-digits", 12), ("permuted-digits", 12)])
def test_joint_takes_all_tasks(name: str, steps: int) -> None:
    """An epoch of the third task goes through the images of all three, a batch of one head where heads differ."""
    made = learner("joint", small(name))
    assert isinstance(made, Joint)
    assert made.images(2) // 10 == steps
    passes = [made.stream(2)(0)(position)[0] for position in range(steps)]
    heads = [each.head for each in passes]
    assert sorted(heads) == ([0] * 4 + [1] * 4 + [2] * 4 if name.startswith("split") else [0] * 12)
    assert heads != sorted(heads) or not name.startswith("split"), "tasks one after the other would be fine-tuning"
    images = {image.tobytes() for each in passes for image in each.x}
    whole = [made.scenario.convert(task.train.stored(slice(None))) for task in made.scenario.tasks]
    assert len(images & {image.tobytes() for x in whole for image in x}) == 120
    assert after(made, 3).flash_bytes == 3 * 43 * (64 + 2)


# ---- replay --------------------------------------------------------------------------------


def test_memory_is_shared_equally() -> None:
    """12 images of one task, 6 and 6 of two, 4 of each of three; what stays was there before; bytes by hand."""
    made = learner("er")
    assert isinstance(made, Replay)
    assert made.ram_bytes == 0
    before: set[bytes] = set()
    for t in range(3):
        made.after_task(t, made.scenario.tasks[t].train)
        assert np.bincount(made.memory["tasks"]).tolist() == [12 // (t + 1)] * (t + 1)
        assert made.ram_bytes == made.flash_bytes == 12 * (64 + 2 + 2)
        images = [image.tobytes() for image in made.memory["images"]]
        fresh = made.scenario.tasks[t].train
        known = {image.tobytes(): label for image, label in zip(fresh.images, fresh.labels, strict=True)}
        for image, label, task in zip(images, made.memory["labels"], made.memory["tasks"], strict=True):
            assert known[image] == label if task == t else image in before
        before = set(images)


def test_replayed_batches_are_of_one_head() -> None:
    """Every earlier task has its turn, never the present one, and both losses count half."""
    made = after(learner("er", batch_size=2), 2)
    counts = {0: 0, 1: 0}
    for position in range(21):
        new, old = made.stream(2)(0)(position)
        assert (new.head, new.share, old.share) == (2, 0.5, 0.5)
        counts[old.head] += 1
        stored = made.memory["images"][made.memory["tasks"] == old.head]
        known = {image.tobytes() for image in made.scenario.convert(stored)}
        assert all(image.tobytes() in known for image in old.x)
    assert min(counts.values()) > 4
    shared = after(learner("er", small("permuted-digits")), 2)
    stored = shared.scenario.convert(shared.memory["images"])
    kept = {x.tobytes(): task for x, task in zip(stored, (0,) * 6 + (1,) * 6, strict=True)}
    mixed = {kept[x.tobytes()] for position in range(4) for x in shared.stream(2)(0)(position)[1].x}
    assert mixed == {0, 1}


# ---- what trains ---------------------------------------------------------------------------


def test_head_only_trains_heads() -> None:
    """All of the network in the first task, afterwards nothing but the head of the task."""
    made = learner("head-only")
    seen: list[dict[str, np.ndarray]] = []
    run(made, on_step=lambda t, s: seen.append(made.net.state_dict()) if s == 0 else None, progress=False)
    seen.append(made.net.state_dict())
    changed = [{n for n in a if not np.array_equal(a[n], b[n])} for a, b in itertools.pairwise(seen)]
    assert changed[0] == {"features.0.weight", "features.2.weight", "classifier.0.weight"}
    assert changed[1:] == [{"classifier.1.weight"}, {"classifier.2.weight"}]
    shared = learner("head-only", small("permuted-digits"))
    shared.before_task(1, shared.scenario.tasks[1].train)
    assert [n for n, p in shared.net.named_parameters() if p.requires_grad] == ["classifier.weight"]


@pytest.mark.parametrize("name", ["gpm", "lance"])
def test_protecting_learners_freeze_the_rest(name: str) -> None:
    """After the first task biases and norms train no more; weights of layers and heads do."""
    scenario = small()
    made = learner(name, scenario, norm_net(scenario))
    made.before_task(0, scenario.tasks[0].train)
    assert all(p.requires_grad for p in made.net.parameters())
    made.after_task(0, scenario.tasks[0].train)
    made.before_task(1, scenario.tasks[1].train)
    training = {n for n, p in made.net.named_parameters() if p.requires_grad}
    assert training == {"features.0.weight", "features.4.weight", *(f"classifier.{i}.weight" for i in range(3))}


def test_what_trains_beside_weights() -> None:
    """Heads, which belong to one task each; biases and norms of what tasks share do not."""
    net = models.create("alexnet-cl", num_classes=2, heads=3, rng=0)
    freeze_beside_weights(net)
    heads = {name for name, _ in net.named_parameters() if name.startswith("fc3.")}
    layers = {f"{path}.weight" for path in weighted_layers(net)}
    assert {name for name, p in net.named_parameters() if p.requires_grad} == heads | layers


def test_multiply_adds_of_finding_factors_by_hand() -> None:
    """Three directions of the batch's 4; of 6 features 2 are protected: QR, NᵀKN, its eigenvectors, and N V."""
    space = Subspace.random((4, 6), (3, 2), np.random.default_rng(0))
    qr = (6 * 36 * 2 - 3 * 6 * 4 + 8) // 3
    by_hand = eigh_macs(4) + eigh_macs(4) + qr + 6 * 4 * 6 + 6 * 4 * 4 + 6 * 4 * 4
    assert basis_macs(space, 2) == by_hand
    assert basis_macs(space, 0) == eigh_macs(4) + eigh_macs(6)


# ---- bytes ---------------------------------------------------------------------------------


def test_bytes_of_protected_directions() -> None:
    """GPM has 4 bytes a number in memory, LANCE its factors alone; both keep 8 a number between tasks."""
    made = after(learner("gpm"), 1)
    assert isinstance(made, Gpm)
    m, k = (made.protected[path].shape[1] for path in ("features.0", "features.2"))
    assert 0 < m < 64
    assert 0 < k < 100
    assert made.flash_bytes == 8 * (64 * m + 100 * k)
    assert made.ram_bytes == 0, "nothing is protected during the first task"
    made.before_task(1, made.scenario.tasks[1].train)
    assert made.ram_bytes == 4 * (64 * m + 100 * k)
    lance = after(learner("lance"), 1)
    assert isinstance(lance, LanceLearner)
    lance.before_task(1, lance.scenario.tasks[1].train)
    (b, r), (c, s) = (lance.task.ranks[path] for path in ("features.0", "features.2"))
    assert lance.ram_bytes == 4 * (10 * b + 64 * r + 10 * c + 100 * s)
    assert lance.flash_bytes == made.flash_bytes
    without = after(learner("lance-no-batch"), 1)
    without.before_task(1, without.scenario.tasks[1].train)
    assert without.ram_bytes == lance.ram_bytes - 4 * (10 * b + 10 * c)
    assert learner("finetune").ram_bytes == learner("head-only").flash_bytes == 0


def test_protection_grows() -> None:
    """Directions of earlier tasks stay as they are, and a higher threshold asks for more."""
    made = after(learner("gpm", thresholds=(0.8,), threshold_step=0.05), 1)
    assert isinstance(made, Protecting)
    first = dict(made.protected)
    made.after_task(1, made.scenario.tasks[1].train)
    for path, M in first.items():
        np.testing.assert_array_equal(made.protected[path][:, : M.shape[1]], M)
        assert made.protected[path].shape[1] > M.shape[1]
    assert made.thresholds(2) == {path: pytest.approx(0.9) for path in first}
    assert learner("gpm", thresholds=(0.9, 0.99), threshold_step=0.2).thresholds(3) == {  # type: ignore[attr-defined]
        "features.0": 1.0,
        "features.2": 1.0,
    }


@pytest.mark.parametrize("name", ["gpm", "lance"])
def test_nothing_left_to_learn_in(name: str) -> None:
    """Every direction protected, and the head shared: the run goes to its end, and no weight changes any more."""
    made = learner(name, small("permuted-digits"))
    assert isinstance(made, Protecting)
    held: dict[str, np.ndarray] = {}

    def fill(t: int, train: Any) -> None:
        made.protected = {path: np.eye(len(M)) for path, M in made.protected.items()}
        held.update(made.net.state_dict())

    made.after_task = fill  # type: ignore[method-assign]
    result = run(made, progress=False)
    assert all(np.array_equal(array, made.net.state_dict()[n]) for n, array in held.items())
    assert result.R[2].tolist() == result.R[0].tolist()
    assert [task["steps"] for task in result.tasks] == ([STEPS] * 3 if name == "gpm" else [STEPS, 0, 0])
    assert result.tasks[2]["ram_bytes"] == 0


# ---- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected a positive integer"),
        ({"memory": 1.5}, "memory is 1.5"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"thresholds": (1.2,)}, r"thresholds are \(1.2,\)"),
        ({"thresholds": ()}, r"thresholds are \(\)"),
        ({"threshold_step": -0.1}, "threshold_step is -0.1"),
    ],
)
def test_bad_recipes(change: dict[str, Any], message: str) -> None:
    """Numbers out of range are named before anything runs."""
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_what_does_not_fit() -> None:
    """Three thresholds for two layers, and the memory of another learner."""
    with pytest.raises(ValueError, match=r"one for each of 2 layers: features\.0, features\.2"):
        learner("lance", thresholds=(0.9, 0.9, 0.9))
    for name, state in (("finetune", {"labels": np.zeros(1)}), ("gpm", {}), ("er", {"labels": np.zeros(1)})):
        with pytest.raises(ValueError, match="checkpoint"):
            learner(name).load_state(state)
