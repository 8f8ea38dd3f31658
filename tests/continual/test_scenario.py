"""Scenarios: every image in its place, pixels in the order they say, and bad tasks refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lance_ref import datasets
from lance_ref.continual import networks
from lance_ref.continual import scenario as scenarios
from lance_ref.continual.scenario import STATISTICS, Samples, Scenario, Task, normaliser
from lance_ref.datasets import Dataset
from lance_ref.train.features import Features

RNG = np.random.default_rng(3)


def pixels(count: int, size: int = 2) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size, 1), dtype=np.uint8)


def task(labels: list[int], head: int = 0, images: np.ndarray | None = None) -> Task:
    samples = Samples(pixels(len(labels)) if images is None else images, np.array(labels, np.int64))
    return Task("a task", samples, samples, head)


def make(*tasks: Task, heads: tuple[int, ...] = (2,)) -> Scenario:
    return Scenario("mine", tasks, heads, normaliser(((0.0,), (1.0,))), "")


def test_split_divides_the_data() -> None:
    """Each image is in exactly one task, with its class counted from the first of the task."""
    train, test = (datasets.load_digits(part) for part in ("train", "test"))
    made = scenarios.load("split-digits")
    assert made.heads == (2, 2, 2, 2, 2)
    assert [t.head for t in made.tasks] == [0, 1, 2, 3, 4]
    for data, parts in ((train, [t.train for t in made.tasks]), (test, [t.test for t in made.tasks])):
        assert sum(map(len, parts)) == len(data)
        for number, part in enumerate(parts):
            rows = np.flatnonzero(data.labels // 2 == number)
            np.testing.assert_array_equal(part.images, data.images[rows])
            np.testing.assert_array_equal(part.labels + 2 * number, data.labels[rows])


def test_permuted_reorders_pixels() -> None:
    """Task 0 is the image as it is; another task gives back the image through the inverse order."""
    made = scenarios.load("permuted-digits", seed=4)
    plain = made.tasks[0].train.images.reshape(-1, 64)
    np.testing.assert_array_equal(made.tasks[0].train.stored(slice(None)), plain)
    orders = [t.train.permutation for t in made.tasks if t.train.permutation is not None]
    for order, each in zip(orders[1:], made.tasks[1:], strict=True):
        np.testing.assert_array_equal(each.train.stored(slice(9))[:, np.argsort(order)], plain[:9])
        assert each.test.permutation is order
        assert sum(np.array_equal(order, other) for other in orders) == 1
    assert made.heads == (10,)
    again = scenarios.load("permuted-digits", seed=5).tasks[1].train.permutation
    assert again is not None
    assert not np.array_equal(again, orders[1])


def test_normalisation() -> None:
    """(pixel/255 - mean) / std of each channel; images turn to (B, C, H, W), vectors stay vectors."""
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    images = RNG.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    x = normaliser((mean, std))(images)
    assert x.shape == (4, 3, 5, 6)
    assert x.dtype == np.float32
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(x, expected.transpose(0, 3, 1, 2), atol=1e-6)
    vectors = normaliser(((0.1,), (0.5,)))(images[:, :, 0, 0])
    np.testing.assert_allclose(vectors, (images[:, :, 0, 0] / 255 - 0.1) / 0.5, atol=1e-6)
    shown = scenarios.load("split-digits")
    train = np.concatenate([shown.convert(t.train.images).ravel() for t in shown.tasks])
    assert abs(train.mean()) < 1e-3
    assert abs(train.std() - 1) < 1e-3


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "has no tasks"),
        ([task([0, 1]), task([])], "empty"),
        ([task([1, 1, 1])], "all labels are 1"),
        ([task([0, 2])], "from 0 to 2, outside its head of 2"),
        ([task([-1, 1])], "from -1 to 1, outside"),
        ([task([0, 1], head=1)], r"head is 1, expected 0\.\.0"),
        ([task([0, 1]), task([0, 1], images=pixels(2, 3))], r"shape \(3, 3, 1\), those of the first task \(2, 2, 1\)"),
    ],
)
def test_bad_tasks_are_refused(tasks: list[Task], message: str) -> None:
    """Each fault is named with its task, before anything is trained."""
    with pytest.raises(ValueError, match=message):
        make(*tasks)


def test_classes_that_cannot_be_divided() -> None:
    """Ten classes in three tasks, a class without an image, and other classes in the test set."""
    train, test = (datasets.load_digits(part, limit=40) for part in ("train", "test"))
    with pytest.raises(ValueError, match="10 classes in train, 10 in test, expected the same number, a multiple of"):
        scenarios.split("s", train, test, 3, STATISTICS["digits"])
    with pytest.raises(ValueError, match=r"s, classes 4-5 \(train\): all labels are 1"):
        scenarios.split("s", train.subset(np.flatnonzero(train.labels != 4)), test, 5, STATISTICS["digits"])
    with pytest.raises(ValueError, match="all labels are 0"):
        scenarios.split("s", train, test, 10, STATISTICS["digits"])
    fewer = Dataset("d", "test", test.images, test.labels, (*test.class_names, "more"), "")
    with pytest.raises(ValueError, match="11 in test"):
        scenarios.split("s", train, fewer, 5, STATISTICS["digits"])


def test_limited_is_spread_over_classes() -> None:
    """The first tasks, the same number of images of each class, and no head too many."""
    made = scenarios.load("split-digits").limited(tasks=3, train=10, test=4)
    assert made.heads == (2, 2, 2)
    for each in made.tasks:
        assert np.bincount(each.train.labels).tolist() == [5, 5]
        assert np.bincount(each.test.labels).tolist() == [2, 2]
    with pytest.raises(ValueError, match="tasks is 6, but split-digits has 5"):
        scenarios.load("split-digits").limited(tasks=6)
    with pytest.raises(ValueError, match="unknown scenario"):
        scenarios.load("domains")


def test_domains_take_features() -> None:
    """Features of several data sets, with heads of different sizes, pass through unchanged."""
    parts = []
    for number, classes in enumerate((2, 3)):
        arrays, labels = RNG.standard_normal((6, 4)).astype(np.float32), np.arange(6) % classes
        parts.append(Features(arrays, labels, classes, 1, f"set {number}", "train", "", ""))
    made = scenarios.domains("d", [(parts[0], parts[0]), (parts[1], parts[1])], [2, 3])
    np.testing.assert_array_equal(made.convert(made.tasks[1].train.stored(slice(None))), parts[1].arrays)
    net = networks.make("mlp", made, 0)
    heads = networks.heads_of(net)
    assert heads is not None
    widths = []
    for head in range(2):
        heads.selected = head
        widths.append(net(parts[0].arrays).shape[1])
    assert widths == [2, 3]


def test_what_the_tasks_share() -> None:
    """Heads of their own are not shared layers; a head for all tasks is one."""
    split, permuted = scenarios.load("split-digits"), scenarios.load("permuted-digits")
    assert networks.body_layers(networks.make("mlp", split, 0)) == ["features.0", "features.2"]
    assert networks.body_layers(networks.make("mlp", permuted, 0)) == ["features.0", "features.2", "classifier"]
    assert networks.body_layers(networks.make("convnet", split, 0)) == ["conv1", "conv2", "conv3"]
    for name, message in (("alexnet-cl", "32x32 pixels at least"), ("vgg", "unknown network 'vgg'")):
        with pytest.raises(ValueError, match=message):
            networks.make(name, split, 0)
    with pytest.raises(ValueError, match="takes images"):
        networks.make("convnet", permuted, 0)


@pytest.mark.parametrize(
    ("name", "heads"),
    [("split-mnist", (2,) * 5), ("permuted-mnist", (10,)), ("split100", (10,) * 10), ("split-cifar10", (2,) * 5)],
)
def test_real_data(name: str, heads: tuple[int, ...], data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scenarios that need files have their tasks and heads, and their statistics are those of the pixels."""
    monkeypatch.setenv("LANCE_REF_DATA", str(data_dir))
    load = datasets.load
    few = 1000 if "mnist" not in name else None  # pictures take long to decode
    monkeypatch.setattr(datasets, "load", lambda data, part: load(data, part, limit=few))
    made = scenarios.load(name)
    assert len(made) == (10 if "permuted" in name else len(heads))
    assert made.heads == heads
    x = made.convert(np.concatenate([t.train.stored(slice(0, 400)) for t in made.tasks]))
    assert abs(x.mean()) < 0.05
    assert abs(x.std() - 1) < 0.05
