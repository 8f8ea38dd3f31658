"""Networks with a head for each task, and the scenario that needs one: domains on a frozen MCUNet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lance_ref import datasets, models, nn
from lance_ref.continual import scenario as scenarios
from lance_ref.continual.scenario import Scenario
from lance_ref.models.alexnet_cl import Heads
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.train.features import extract, frozen_stages, tail

NETWORKS = ("mlp", "convnet", "alexnet-cl")
"""What :func:`make` makes; :func:`with_heads` gives heads to any other network."""

DEFAULT_NETWORK = {
    **dict.fromkeys(("split-digits", "split-mnist", "permuted-digits", "permuted-mnist"), "mlp"),
    **dict.fromkeys(("split-cifar10", "split100", "split-cifar100"), "alexnet-cl"),
    "domains": "mcunet",
}
"""The network of each scenario where none is asked for."""

DOMAIN_LAYERS = ("blocks.12.expand", "blocks.12.project", "blocks.13.expand", "blocks.13.project")
"""What trains in MCUNet: the 1x1 convolutions of the last two blocks; the depthwise ones between them stay."""

Rng = np.random.Generator | int | None


class TaskHeads(Heads):
    """Linear classifiers without bias on the same features, of any numbers of classes, of which ``selected`` runs."""

    def __init__(self, in_features: int, classes: Sequence[int], rng: Rng) -> None:
        nn.Sequential.__init__(self, *(nn.Linear(in_features, width, bias=False, rng=rng) for width in classes))
        self.selected = 0


def heads_of(net: Module) -> Heads | None:
    """The module that holds the heads, or None if one head serves all tasks."""
    return next((module for module in net.modules() if isinstance(module, Heads)), None)


def body_layers(net: Module) -> list[str]:
    """Paths of the layers with weights that train, the tasks' own heads left out; a shared head is one.

    These are what tasks share, and so what is protected and compressed.
    """
    heads = heads_of(net)
    own = set() if heads is None else {id(module) for module in heads.modules()}
    return [path for path, layer in weighted_layers(net).items() if layer.weight.requires_grad and id(layer) not in own]


def make(name: str, scenario: Scenario, rng: Rng = None) -> Module:
    """A network for a scenario, freshly drawn, with as many heads as that asks for.

    ``name`` is one of :data:`NETWORKS`, else ValueError; the MLP has two hidden layers of 100, and no biases.
    """
    rng = np.random.default_rng(rng) if isinstance(rng, int) else rng
    shape, widest = scenario.input_shape, max(scenario.heads)
    options: dict[str, dict[str, Any]] = {
        "mlp": {"in_features": int(np.prod(shape)), "bias": False},
        "convnet": {"in_channels": shape[0]},
        "alexnet-cl": {"heads": len(scenario.heads)},
    }
    if name not in options:
        raise ValueError(f"unknown network {name!r}, expected one of {', '.join(NETWORKS)}")
    least = {"mlp": 0, "convnet": 4, "alexnet-cl": 32}[name]
    if least and (len(shape) != 3 or min(shape[1:]) < least):
        raise ValueError(f"network {name!r} takes images of {least}x{least} pixels at least, those here have {shape}")
    net = models.create(name, num_classes=widest, rng=rng, **options[name])
    with_heads(net, scenario, rng)
    net.train()
    return net


def with_heads(net: Module, scenario: Scenario, rng: Rng = None) -> None:
    """Put a head for each task in the place of the last layer of a network, where tasks have heads of their own.

    Raises
    ------
    ValueError
        If the last Conv2d or Linear layer is no Linear.
    """
    if scenario.shared_head or heads_of(net) is not None:
        return
    path, last = next(reversed(weighted_layers(net).items()), ("", None))
    if not isinstance(last, nn.Linear):
        raise ValueError(
            f"the last layer {path!r} is a {type(last).__name__}, expected a Linear that heads can replace"
        )
    net.set_submodule(path, TaskHeads(last.in_features, scenario.heads, rng))


def domains(
    names: Sequence[str] = scenarios.DOMAINS["domains"],
    seed: int = 0,
    train: int | None = None,
    test: int | None = None,
    image_size: int = 128,
    folder: str | os.PathLike[str] | None = None,
) -> tuple[Module, Scenario]:
    """Pretrained MCUNet whose last 1x1 convolutions train, and one data set after the other through the rest of it.

    The network is what follows the frozen part, with one head, drawn from ``seed``, for each data set. Of each data
    set at most ``train`` and ``test`` images are taken, spread over the classes and resized to ``image_size`` pixels.
    The outputs of the frozen part are kept in ``folder`` for the next time, if there is one. Pixels are normalised as
    the network expects, (pixel − 127.5)·2/255. Biases of the convolutions do not train.
    """
    net = models.create("mcunet", num_classes=2, pretrained=True, rng=seed)
    net.requires_grad_(False)
    layers = weighted_layers(net)
    for path in DOMAIN_LAYERS:
        layers[path].weight.requires_grad = True
    stage, _ = frozen_stages(net)
    features, classes = [], []
    for name in names:
        parts = []
        for split, limit in (("train", train), ("test", test)):
            data = datasets.load(name, split, image_size=None if limit is None else image_size, limit=limit)
            file = None
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                file = Path(folder) / f"mcunet_{name}_{split}_{len(data)}_{image_size}.npy"
            convert = models.preprocessing("mcunet")
            parts.append(extract(net, data, convert, image_size, path=file, progress=False))
        features.append((parts[0], parts[1]))
        classes.append(parts[0].num_classes)
    net.classifier = TaskHeads(net.classifier.in_features, classes, np.random.default_rng(seed))
    net.classifier.requires_grad_()
    part = tail(net, stage)
    part.train()
    return part, scenarios.domains("domains", features, classes)
