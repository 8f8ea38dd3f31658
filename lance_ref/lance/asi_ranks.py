"""Ranks for ASI: one energy threshold per layer, the least summed error of the weight gradients within a budget.

As Nguyen et al. (arXiv 2505.05086) do before training: on a few batches, for each layer and each threshold
of a grid, the HOSVD ranks, the *perplexity* ‖dW − dŴ‖_F of the weight gradient at these ranks, and the
memory of core and factors; then one threshold per layer by a multiple-choice knapsack
(:func:`lance_ref.lance.knapsack.choose`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lance_ref.algebra import projection_fast
from lance_ref.algebra.magnitude import norm
from lance_ref.algebra.subspace import shape_text
from lance_ref.algebra.tucker import check_epsilon
from lance_ref.engine.counting import spending_on
from lance_ref.engine.tensor import Shape
from lance_ref.io.progress import aligned
from lance_ref.lance.gradient_samples import LayerSample
from lance_ref.lance.knapsack import choose
from lance_ref.nn.module import Module
from lance_ref.stores import Asi
from lance_ref.stores.core_and_factors import check_activation
from lance_ref.stores.hosvd import Directions, Ranks, all_directions

GRID = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The thresholds that are tried."""


@dataclass(frozen=True)
class RankOption:
    """What one threshold means for one layer.

    ``ranks`` has one per mode, None for a full one; ``kept_bytes`` are those of core and factors, of every call of the
    layer in a step; ``perplexity`` is ‖dW − dŴ‖_F, the mean over the samples.
    """

    epsilon: float
    ranks: Ranks
    kept_bytes: int
    perplexity: float


@dataclass(frozen=True)
class AsiPlan:
    """The ranks chosen for each layer, by layer path, with thresholds, perplexities and bytes of core and factors.

    ``budget_bytes`` is what ``total_bytes`` had to stay within.
    """

    ranks: dict[str, Ranks]
    epsilon: dict[str, float]
    perplexity: dict[str, float]
    kept_bytes: dict[str, int]
    budget_bytes: int

    @property
    def total_bytes(self) -> int:
        """Core and factors of all layers."""
        return sum(self.kept_bytes.values())

    @property
    def total_perplexity(self) -> float:
        """The sum of the chosen perplexities, which was minimised."""
        return sum(self.perplexity.values())

    def make(self, path: str, layer: Module | None = None, seed: int = 0) -> Asi:
        """A store for the layer at ``path``; ``plan.make`` is what :func:`lance_ref.lance.compression.attach` takes."""
        if path not in self.ranks:
            raise ValueError(f"no ranks were chosen for layer {path!r}, only for {', '.join(map(repr, self.ranks))}")
        return Asi(self.ranks[path], seed)

    def __str__(self) -> str:
        rows = [("layer", "epsilon", "ranks", "perplexity", "bytes")]
        for path, ranks in self.ranks.items():
            numbers = f"{self.perplexity[path]:.3g}", f"{self.kept_bytes[path]:,}"
            rows.append((path or "(root)", f"{self.epsilon[path]:g}", shape_text(ranks), *numbers))
        total, budget = self.total_bytes, self.budget_bytes
        rows.append(("total", "", "", f"{self.total_perplexity:.3g}", f"{total:,}"))
        lines = aligned(rows, right=(1, 3, 4))
        return "\n".join([*lines, f"budget {budget:,} bytes"])


def choose_ranks(
    samples: Mapping[str, Sequence[LayerSample]], budget_bytes: int, grid: Sequence[float] = GRID
) -> AsiPlan:
    """Choose one energy threshold per layer: the least summed perplexity within a budget of bytes.

    Parameters
    ----------
    samples : mapping of layer path to sequence of LayerSample
        From :func:`lance_ref.lance.gradient_samples.sample_gradients`; all of a layer of one shape.
    budget_bytes : int
        For core and factors of all these layers together.
    grid : sequence of float
        The thresholds to choose from, in (0, 1].

    Raises
    ------
    ValueError
        If the budget is below what the cheapest threshold of every layer takes (names both numbers), the grid
        is empty or out of range, or a layer has no samples or samples of two shapes.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, (int, np.integer)):
        raise TypeError(f"budget_bytes is {budget_bytes!r}, expected an integer")
    if not samples:
        raise ValueError("samples is empty, expected those of at least one layer")
    options = {path: rank_options(path, found, grid) for path, found in samples.items()}
    least = sum(min(option.kept_bytes for option in of_layer) for of_layer in options.values())
    if budget_bytes < least:
        raise ValueError(
            f"budget_bytes is {budget_bytes}, but the {len(options)} layer(s) keep at least {least} bytes, each at the "
            f"cheapest threshold of {tuple(grid)}; raise the budget, or put lower thresholds in the grid"
        )
    pairs = [[(option.kept_bytes, option.perplexity) for option in of_layer] for of_layer in options.values()]
    chosen = {
        path: of_layer[i] for (path, of_layer), i in zip(options.items(), choose(pairs, budget_bytes), strict=True)
    }
    return AsiPlan(
        {path: option.ranks for path, option in chosen.items()},
        {path: option.epsilon for path, option in chosen.items()},
        {path: option.perplexity for path, option in chosen.items()},
        {path: option.kept_bytes for path, option in chosen.items()},
        int(budget_bytes),
    )


def rank_options(path: str, samples: Sequence[LayerSample], grid: Sequence[float] = GRID) -> list[RankOption]:
    """Ranks, bytes and perplexity of one layer for each threshold of the grid.

    Notes
    -----
    ASI's ranks are fixed, while the HOSVD ranks of the samples differ. Taken is the largest of each mode, so
    that no sample keeps less than ε of its energy in any mode. dŴ is that of the HOSVD at these ranks, which
    the warm-started iteration approaches.
    """
    grid = [check_epsilon(epsilon) for epsilon in grid]
    if not grid:
        raise ValueError("grid is empty, expected energy thresholds in (0, 1]")
    if not samples:
        raise ValueError(f"layer {path!r} has no samples, expected at least one")
    shape = samples[0].activation.shape
    for sample in samples:
        check_activation(f"layer {path!r}", sample.activation)
        if sample.activation.shape != shape:
            raise ValueError(
                f"layer {path!r}: samples have shapes {shape} and {sample.activation.shape}, expected one shape, for "
                "ASI's ranks are fixed; drop the odd batch"
            )
    with spending_on("calibration"):
        directions = [
            all_directions(x, {mode: None for mode, n in enumerate(x.shape) if n > 1})  # of every mode that has any
            for x in (sample.activation for sample in samples)
        ]
        ranks = [_largest_ranks(shape, directions, epsilon) for epsilon in grid]
        perplexity = np.mean([_perplexities(*pair, ranks) for pair in zip(samples, directions, strict=True)], axis=0)
    calls = 1 + max(sample.call for sample in samples)
    itemsize = samples[0].activation.itemsize
    return [
        RankOption(epsilon, chosen, calls * itemsize * sum(kept_elements(shape, chosen)), float(loss))
        for epsilon, chosen, loss in zip(grid, ranks, perplexity, strict=True)
    ]


def kept_elements(shape: Shape, ranks: Ranks) -> tuple[int, int]:
    """Elements of the core and of the factors, Π r_n and Σ n·r_n; a mode of None is left whole and has no factor.

    >>> kept_elements((8, 6, 5), (2, None, 1))  # 2·6·1, and 8·2 + 5·1
    (12, 21)
    """
    core = math.prod(n if r is None else r for n, r in zip(shape, ranks, strict=True))
    return core, sum(n * r for n, r in zip(shape, ranks, strict=True) if r is not None)


def _perplexities(sample: LayerSample, directions: Mapping[int, Directions], ranks: Sequence[Ranks]) -> np.ndarray:
    """‖dW − dŴ‖_F of one sample for each choice of ranks."""
    exact = sample.geometry.weight_gradient(sample.activation, sample.grad_output)
    errors = []
    for chosen in ranks:
        factors = tuple(None if r is None else directions[mode].leading(r) for mode, r in enumerate(chosen))
        core = projection_fast.project(sample.activation, factors)
        errors.append(exact - projection_fast.weight_gradient(core, factors, sample.grad_output, sample.geometry))
    return np.array([norm(error) for error in errors])


def _largest_ranks(shape: Shape, directions: Sequence[Mapping[int, Directions]], epsilon: float) -> Ranks:
    """The largest rank of each mode over the samples, None for a full one."""
    if epsilon == 1:
        return (None,) * len(shape)
    ranks = (max(found[mode].rank(epsilon) if n > 1 else 1 for found in directions) for mode, n in enumerate(shape))
    return tuple(None if r == n else r for n, r in zip(shape, ranks, strict=True))
