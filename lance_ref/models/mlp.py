"""A plain multilayer perceptron; 784-100-100-10 without bias is the one of Saha et al. (GPM, ICLR 2021)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.models.initialise import Rng, check_positive_int, source
from lance_ref.models.register import net


class MLP(nn.Module):
    """``flatten``, ``features`` (linear and ReLU in turn) and ``classifier``; see :func:`mlp`."""

    def __init__(self, num_classes: int, in_features: int, hidden: Sequence[int], bias: bool, rng: Rng) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        widths = (in_features, *hidden)
        layers: list[nn.Module] = []
        for I, O in itertools.pairwise(widths):  # noqa: E741  (in and out features, as everywhere)
            layers += [nn.Linear(I, O, bias=bias, rng=rng), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], num_classes, bias=bias, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.flatten(x)))  # (B, num_classes)

    def stages(self) -> list[nn.Module]:
        """Modules whose composition is ``forward``: ``flatten``, each of ``features``, ``classifier``."""
        return [self.flatten, *self.features, self.classifier]


@net("mlp", input_shape=(784,), small_shape=(64,), options_for=lambda shape: {"in_features": math.prod(shape)})
def mlp(
    num_classes: int = 10,
    in_features: int = 784,
    hidden: Sequence[int] = (100, 100),
    bias: bool = True,
    rng: Rng = None,
) -> MLP:
    """A multilayer perceptron with ReLU for inputs (B, ...) of ``in_features`` numbers each.

    Parameters
    ----------
    hidden : sequence of int
        Widths of the hidden layers; () leaves the classifier alone.
    bias : bool
        Of all layers.
    rng
        See :mod:`lance_ref.models`; the initialisation is PyTorch's default.
    """
    check_positive_int("num_classes", num_classes)
    check_positive_int("in_features", in_features)
    for position, width in enumerate(hidden):
        check_positive_int(f"hidden[{position}]", width)
    return MLP(num_classes, in_features, tuple(hidden), bias, source(rng))
