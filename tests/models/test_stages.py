"""Stages: run one after the other they are the network, to the last bit, and they hold all that it has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lance_ref import Tensor, models, nn, no_grad
from lance_ref.nn import init

CASES: list[tuple[str, dict[str, Any], tuple[int, ...], int]] = [
    # name, options, input, number of stages
    ("convnet", {"num_classes": 3, "channels": 4}, (2, 3, 9, 8), 4),
    ("mlp", {"num_classes": 3, "in_features": 24, "hidden": (5, 4)}, (2, 3, 2, 4), 6),
    ("mobilenetv2", {"num_classes": 3, "width": 0.1}, (2, 3, 32, 32), 20),
    ("resnet18", {"num_classes": 3}, (2, 3, 32, 32), 10),
    ("mcunet", {"num_classes": 3}, (2, 3, 64, 32), 16),
    ("resnet8", {"num_classes": 3}, (2, 3, 16, 16), 5),
]


def through(stages: list[nn.Module], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage(x)
    return x


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "options", "shape", "count"), CASES, ids=[case[0] for case in CASES])
def test_composition_is_forward(
    name: str, options: dict[str, Any], shape: tuple[int, ...], count: int, training: bool
) -> None:
    """A stage left out, or in another order, would train another network than the one that is evaluated."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    whole, staged = (models.create(name, rng=3, **options).train(training) for _ in range(2))
    stages = staged.stages()
    assert len(stages) == count
    with no_grad():
        expected, got = whole(x), through(stages, Tensor(x))
    np.testing.assert_array_equal(got.data, expected.data)
    for key, array in whole.state_dict().items():  # running statistics too
        np.testing.assert_array_equal(staged.state_dict()[key], array)


@pytest.mark.parametrize("name", models.names())
def test_stages_hold_each_parameter_once(name: str) -> None:
    """A parameter in two stages, or in none, could be taken for frozen where it trains."""
    with init.shapes_only():
        net = models.create(name)
    before = [path for path, _ in net.named_modules()]
    held = [id(parameter) for stage in net.stages() for parameter in stage.parameters()]
    assert held == [id(parameter) for parameter in net.parameters()]
    assert [path for path, _ in net.named_modules()] == before  # asking for stages adds no module


def test_gradients_pass_through_stages() -> None:
    """Stages that copied their layers would leave the network without gradients."""
    net = models.create("convnet", num_classes=3, channels=2, rng=0)
    through(net.stages(), Tensor(np.ones((1, 3, 8, 8), np.float32))).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_stages_of_sequential_are_its_children() -> None:
    """A user's own Sequential must be as easy to cut as a built-in net."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, rng=0), nn.ReLU())
    assert net.stages() == list(net.children())
    x = Tensor(np.arange(8, dtype=np.float32).reshape(2, 2, 2))
    np.testing.assert_array_equal(through(net.stages(), x).data, net(x).data)
