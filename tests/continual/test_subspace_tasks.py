"""Tasks learned in the subspace: the same as on whole weights, safe with any optimiser, merged in the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from continual_cases import BODY, LEAK, bases_of, make_net, sgd, task, train, weights
from continual_resume_case import RECIPE
from continual_resume_case import train as learn
from numpy.testing import assert_allclose

from lance_ref import merge
from lance_ref.continual import check_optimizer, compress_for_task, leak, networks
from lance_ref.continual import scenario as scenarios
from lance_ref.continual.learners import LEARNERS, Recipe
from lance_ref.continual.protocol import run
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.optim import Adam

KINDS = ["linear", "conv"]


def second_task(kind: str, update: str, **options: Any) -> tuple[Module, dict[str, np.ndarray], Any]:
    """A net compressed for a second task, what the first one protects, and the images of the second."""
    net = make_net(kind, np.float64)
    protected = bases_of(net, kind, task(kind, np.float64, 0)[0], 0.8)
    x, labels = task(kind, np.float64, 1)
    compress_for_task(net, [x], protected, epsilon=0.9, update=update, **options)
    return net, protected, (x, labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean_free", [False, True])
def test_the_same_as_on_whole_weights(kind: str, mean_free: bool) -> None:
    """Directions of features and of patches, with momentum and clipping."""
    nets = [second_task(kind, update, mean_free=mean_free) for update in ("weight", "subspace")]
    for net, protected, data in nets:
        optimizer = sgd(net, momentum=0.9, nesterov=True)
        check_optimizer(optimizer, net, protected)
        train(net, optimizer, *data, steps=30, clip=0.3)
    assert set(merge(nets[1][0])) == set(BODY[kind])
    for mine, theirs in zip(nets[1][0].parameters(), nets[0][0].parameters(), strict=True):
        assert_allclose(mine.data, theirs.data, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_any_optimiser_keeps_protected_answers(kind: str) -> None:
    """Adam on whole weights leaves the null space and is refused; on the coordinates it cannot leave it."""
    net, protected, data = second_task(kind, "subspace")
    before = weights(net, BODY[kind])
    adam = Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    check_optimizer(adam, net, protected)
    train(net, adam, *data, steps=5)
    merge(net)
    for path, W in before.items():
        after = weighted_layers(net)[path].weight
        assert np.abs(after.data - W).max() > 0.01
        assert leak(W, after, protected[path]) < LEAK[np.float64]


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_is_refused(kind: str) -> None:
    """s·W_0 shrinks along the protected directions too."""
    net, protected, data = second_task(kind, "subspace")
    before = weights(net, BODY[kind])
    optimizer = sgd(net, weight_decay=0.05)
    with pytest.raises(ValueError, match=r"weight_decay is 0.05, expected 0"):
        check_optimizer(optimizer, net, protected)
    train(net, optimizer, *data, steps=4)
    merge(net)
    assert max(leak(W, weighted_layers(net)[p].weight, protected[p]) for p, W in before.items()) > 1e-2


def test_bad_input_leaves_the_net_as_it_was() -> None:
    """A layer that trains in a subspace already, and a word that is no update."""
    net, protected, (x, _) = second_task("linear", "subspace")
    with pytest.raises(ValueError, match="trains in the subspace of its store; merge"):
        compress_for_task(net, [x], protected, epsilon=0.9)
    assert not net[0].weight.requires_grad
    assert net[0].update is not None
    with pytest.raises(ValueError, match="update is 'weights', expected one of weight, subspace"):
        compress_for_task(net, [x], protected, epsilon=0.9, update="weights")
    with pytest.raises(ValueError, match="update is 'weights', expected one of weight, subspace"):
        Recipe(update="weights")


@pytest.mark.parametrize("name", ["lance", "lance-no-batch"])
def test_learners_end_alike(name: str) -> None:
    """All tasks of a scenario, merged after each: the accuracies of whole weights, to a few images of rounding."""
    results = []
    for update in ("weight", "subspace"):
        scenario = scenarios.load("split-digits", 0).limited(3, 60, 40)
        net = networks.make("mlp", scenario, 0)
        recipe = Recipe(**{**RECIPE, "momentum": 0.5, "update": update})
        results.append(run(LEARNERS[name](net, scenario, recipe), progress=False))
        assert all(layer.update is None for layer in weighted_layers(net).values())
    assert_allclose(results[1].R, results[0].R, atol=0.051)
    assert results[1].R[0, 0] > 0.8


def test_learners_train_coordinates() -> None:
    """What the recipe says reaches the layers, and is merged after the task."""
    scenario = scenarios.load("split-digits", 0).limited(2, 60, 40)
    net = networks.make("mlp", scenario, 0)
    made = LEARNERS["lance"](net, scenario, Recipe(**{**RECIPE, "update": "subspace"}))
    made.before_task(0, scenario.tasks[0].train)
    assert all(weighted_layers(net)[path].update is not None for path in made.layers)
    made.after_task(0, scenario.tasks[0].train)
    assert all(weighted_layers(net)[path].update is None for path in made.layers)


def test_a_stopped_run_ends_bit_by_bit_alike(tmp_path: Any) -> None:
    """A checkpoint inside a task holds D and its velocity; subspaces are made anew from the task's start."""

    def stop(task: int, step: int) -> None:
        if (task, step) == (1, 5):
            raise KeyboardInterrupt

    whole, left = learn("lance", str(tmp_path / "whole.npz"), update="subspace")
    with pytest.raises(KeyboardInterrupt):
        learn("lance", str(tmp_path / "cut.npz"), stop, update="subspace")
    again, resumed = learn("lance", str(tmp_path / "cut.npz"), update="subspace")
    np.testing.assert_array_equal(again.R, whole.R)
    for mine, theirs in zip(resumed.net.parameters(), left.net.parameters(), strict=True):
        np.testing.assert_array_equal(mine.data, theirs.data)
