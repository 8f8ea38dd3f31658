"""Learners that keep later tasks off the directions that earlier ones need: GPM, and LANCE in two kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from lance_ref.algebra.subspace import Subspace
from lance_ref.continual.bases import feature_gram, update_protected
from lance_ref.continual.gpm import GPM
from lance_ref.continual.learner import Learner, Recipe
from lance_ref.continual.networks import heads_of
from lance_ref.continual.protection import check_optimizer, compress_for_task
from lance_ref.continual.scenario import Samples, Scenario
from lance_ref.engine import counting
from lance_ref.lance.compression import restore
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.optim import Optimizer


class Protecting(Learner):
    """What GPM and LANCE share: a basis M of protected directions for each layer, grown after each task.

    After the first task biases and norms train no more: a gradient that is orthogonal to the inputs of earlier tasks
    says nothing about them.
    """

    heeds: ClassVar[tuple[str, ...]] = ("thresholds", "threshold_step", "basis_samples")

    def __init__(self, net: Module, scenario: Scenario, recipe: Recipe) -> None:
        super().__init__(net, scenario, recipe)
        if len(recipe.thresholds) not in (1, len(self.layers)):
            raise ValueError(
                f"thresholds are {recipe.thresholds}, expected one, or one for each of {len(self.layers)} layers: "
                f"{', '.join(self.layers)}"
            )
        layers = weighted_layers(net)
        self.protected = {path: np.zeros((layers[path].weight.data[0].size, 0)) for path in self.layers}

    def thresholds(self, t: int) -> dict[str, float]:
        """The energy threshold of each layer after task t."""
        given = self.recipe.thresholds
        each = given * len(self.layers) if len(given) == 1 else given
        return {
            path: min(1.0, value + t * self.recipe.threshold_step)
            for path, value in zip(self.layers, each, strict=True)
        }

    def before_task(self, t: int, train: Samples) -> None:
        if t:
            freeze_beside_weights(self.net)

    def check(self, optimizer: Optimizer) -> None:
        if any(M.shape[1] for M in self.protected.values()):
            check_optimizer(optimizer, self.net, self.protected)

    def after_task(self, t: int, train: Samples) -> None:
        restore(self.net)
        grams = feature_gram(self.net, self.batches(t, train), self.layers)
        for path, threshold in self.thresholds(t).items():
            grown = update_protected(self.protected[path], grams[path].matrix, threshold)
            self.protected[path] = grown.basis

    @property
    def flash_bytes(self) -> int:
        """Bytes of the bases, in float64 as they are kept between tasks."""
        return sum(M.nbytes for M in self.protected.values())

    def notes(self) -> dict[str, Any]:
        return {"protected": {path: list(M.shape) for path, M in self.protected.items()}}

    def state(self) -> dict[str, np.ndarray]:
        return dict(self.protected)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        if set(state) != set(self.protected):
            raise ValueError(f"checkpoint protects {sorted(state)}, expected {sorted(self.protected)}")
        self.protected = dict(state)


class Gpm(Protecting):
    """Gradient projection memory (Saha et al., ICLR 2021): exact gradients, their part along M taken out."""

    name = "gpm"

    def __init__(self, net: Module, scenario: Scenario, recipe: Recipe) -> None:
        super().__init__(net, scenario, recipe)
        self.gpm: GPM | None = None

    def before_task(self, t: int, train: Samples) -> None:
        super().before_task(t, train)
        self.gpm = GPM(self.net, self.protected) if t else None

    def after_backward(self) -> None:
        if self.gpm is not None:
            self.gpm.project()

    @property
    def ram_bytes(self) -> int:
        return 0 if self.gpm is None else self.gpm.ram_bytes


class LanceLearner(Protecting):
    """LANCE: compressed activations whose feature directions are orthogonal to M, so that the gradient is as well.

    With ``recipe.update`` of "subspace" the layers train in these directions, and are merged after the task.
    """

    name = "lance"
    heeds = (*Protecting.heeds, "epsilon", "update")
    modes: ClassVar[tuple[str, ...]] = ("batch", "token", "feature")

    def __init__(self, net: Module, scenario: Scenario, recipe: Recipe) -> None:
        super().__init__(net, scenario, recipe)
        self.task: Any = None

    def before_task(self, t: int, train: Samples) -> None:
        super().before_task(t, train)
        restore(self.net)
        self.task = compress_for_task(
            self.net, self.batches(t, train), self.protected, epsilon=self.recipe.epsilon, modes=self.modes,
            update=self.recipe.update,
        )  # fmt: skip
        with counting.spending_on("calibration"):
            for path, subspace in self.task.subspaces.items():
                counting.add(basis_macs(subspace, self.protected[path].shape[1]))

    @property
    def ram_bytes(self) -> int:
        return sum(layer.store.factor_bytes for layer in weighted_layers(self.net).values())

    def notes(self) -> dict[str, Any]:
        ranks = {path: list(ranks) for path, ranks in self.task.ranks.items()}
        return {**super().notes(), "ranks": ranks, "frozen": list(self.task.frozen)}


class LanceNoBatch(LanceLearner):
    """LANCE with the batch mode left alone."""

    name = "lance-no-batch"
    modes = ("token", "feature")


def basis_macs(subspace: Subspace, m: int) -> int:
    """Nominal multiply-adds of finding the factors of one layer's Gram matrices, which calibration does not count.

    Of the feature mode, of which m directions are protected: Q of the protected basis, NᵀKN, its eigenvectors V and
    N V (:meth:`lance_ref.algebra.grams.LayerGrams.basis`).
    """
    *others, n = [U.shape[0] if U is not None else 0 for U in subspace.factors]
    total = sum(counting.eigh_macs(size) for size in others) + counting.eigh_macs(n - m)
    if m:
        total += (6 * n**2 * m - 3 * n * m**2 + m**3) // 3 + n * (n - m) * (n + 2 * (n - m))
    return total


def freeze_beside_weights(net: Module) -> None:
    """Biases and norms train no more; the weights of convolutions and linear layers do as before."""
    weights = {id(layer.weight) for layer in weighted_layers(net).values()}
    own = heads_of(net)
    heads = set() if own is None else {id(parameter) for parameter in own.parameters()}
    for parameter in net.parameters():
        if id(parameter) not in weights | heads:
            parameter.requires_grad = False
