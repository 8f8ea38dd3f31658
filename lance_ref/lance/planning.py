"""One byte budget over all layers and modes: which layers train, and with which ranks.

One energy threshold for all layers spends bytes without asking what they buy. Here every layer offers
many choices of ranks, rank 0 (do not train this layer) among them, each with its bytes and its loss, and
:func:`lance_ref.lance.knapsack.choose` picks the best of all combinations.

The loss of a layer at given ranks is

* without gradients, a bound on the energy that its core leaves out, per batch:
  ‖A − Â‖² ≤ Σ_n Σ_{i>r_n} λ_i^(n) (De Lathauwer et al. 2000, property 10), all of ‖A‖² at rank 0;
* with sampled output gradients, the mean of ‖dW − dŴ‖² over the samples, ‖dW‖² at rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lance_ref.algebra import projection_fast
from lance_ref.algebra.frame import Frame, feature_mode
from lance_ref.algebra.subspace import Subspace, shape_text
from lance_ref.algebra.tucker import energy_rank
from lance_ref.lance.asi_ranks import kept_elements
from lance_ref.lance.calibration import Calibration
from lance_ref.lance.calibration_file import Ranks
from lance_ref.lance.compression import compress
from lance_ref.lance.gradient_samples import LayerSample
from lance_ref.lance.knapsack import choose
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers

Samples = Mapping[str, Sequence[LayerSample]]
STEPS = 24
"""Ranks of one mode grow by at least this fraction of themselves from one candidate to the next: 1/24."""


@dataclass(frozen=True)
class RankPlan:
    """What :func:`plan_ranks` decided.

    Attributes
    ----------
    ranks : dict of layer path to tuple, or None
        One rank per mode, None for a mode left alone; None in place of all ranks: the layer is not trained.
    layer_bytes : dict of layer path to int
        Bytes of each layer's core (and factors, if they were to count).
    losses : dict of layer path to float
        Loss of each layer at these ranks, see :mod:`lance_ref.lance.planning`.
    """

    ranks: dict[str, Ranks | None]
    layer_bytes: dict[str, int]
    losses: dict[str, float]
    budget_bytes: int

    @property
    def total_bytes(self) -> int:
        """At most ``budget_bytes``."""
        return sum(self.layer_bytes.values())

    @property
    def loss(self) -> float:
        """The sum over layers that was minimised."""
        return sum(self.losses.values())

    @property
    def trained(self) -> list[str]:
        """Paths of the layers that train."""
        return [path for path, ranks in self.ranks.items() if ranks is not None]

    def apply(self, net: Module, calibration: Calibration, **options: Any) -> Calibration:
        """Compress the layers that train to these ranks, and freeze weight and bias of the others.

        ``calibration`` is the one that was planned for, and comes back with the ranks of the plan; options are those of
        :func:`lance_ref.compress`.
        """
        given = calibration.with_ranks({path: ranks for path, ranks in self.ranks.items() if ranks is not None})
        compress(net, given, layers=self.trained, **options)
        modules = weighted_layers(net)
        for path, ranks in self.ranks.items():
            if ranks is None:
                modules[path].requires_grad_(False)
        return given

    def __str__(self) -> str:
        lines = [f"{self.total_bytes:,} of {self.budget_bytes:,} bytes"]
        for path, ranks in self.ranks.items():
            what = "not trained" if ranks is None else f"ranks {shape_text(ranks)}, {self.layer_bytes[path]:,} bytes"
            lines.append(f"  {path:<24} {what}")
        return "\n".join(lines)


def plan_ranks(
    calibration: Calibration,
    budget_bytes: int,
    gradients: Samples | None = None,
    *,
    dtype: Any = np.float32,
    include_factors: bool = False,
) -> RankPlan:
    """The ranks of every calibrated layer, within one budget of bytes.

    Parameters
    ----------
    calibration : Calibration
        Its thresholds and ranks do not matter, only what it measured; modes that it left alone stay so.
    budget_bytes : int
        For the cores of all layers together.
    gradients : mapping of layer path to samples, optional
        A few batches from :func:`lance_ref.lance.gradient_samples.sample_gradients`; the plan then minimises the
        error of the weight gradient instead of the energy left out.
    dtype : numpy dtype
        Of the activations.
    include_factors : bool
        Whether the fixed factors count against the budget too.

    Returns
    -------
    RankPlan
        Deterministic; never over budget; its loss never rises with the budget, and is never above that of
        one energy threshold for all layers that takes as many bytes.

    Raises
    ------
    ValueError
        If the budget does not even pay for rank 1 in the cheapest layer, or samples are missing or do not
        fit; names the numbers.

    Notes
    -----
    Candidates of a layer: its ranks at every energy threshold (so that a uniform threshold is one of the
    combinations), and a greedy path from rank 1 in every mode, which takes in each step the mode that
    lowers the bound most per byte. Where only the feature mode is compressed, that is every rank.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, (int, np.integer)):
        raise TypeError(f"budget_bytes is {budget_bytes!r}, expected an integer")
    layers = {path: _Layer(path, calibration, dtype, include_factors) for path in calibration}
    cheapest = min(layers, key=lambda path: layers[path].bytes_of(layers[path].least))
    least = layers[cheapest].bytes_of(layers[cheapest].least)
    if budget_bytes < least:
        raise ValueError(
            f"budget_bytes is {budget_bytes}, but rank 1 in every mode of the cheapest layer, {cheapest!r}, "
            f"takes {least}"
        )
    if gradients is not None:
        _check_samples(calibration, gradients)
    candidates = {path: layer.candidates(budget_bytes) for path, layer in layers.items()}
    losses = {
        path: layer.bounds(candidates[path])
        if gradients is None
        else gradient_errors(calibration[path], layer.bases, candidates[path], gradients[path])
        for path, layer in layers.items()
    }
    options = [
        [(0 if r is None else layers[path].bytes_of(r), loss) for r, loss in zip(candidates[path], of, strict=True)]
        for path, of in losses.items()
    ]
    picked = dict(zip(layers, choose(options, int(budget_bytes)), strict=True))
    return RankPlan(
        {path: candidates[path][i] for path, i in picked.items()},
        {path: option[i][0] for option, (path, i) in zip(options, picked.items(), strict=True)},
        {path: losses[path][i] for path, i in picked.items()},
        int(budget_bytes),
    )


def uniform_ranks(calibration: Calibration, epsilon: float) -> dict[str, Ranks]:
    """The ranks of every layer at one energy threshold, with which a plan is compared."""
    return {path: space.ranks for path, space in calibration.with_epsilon(epsilon).items()}


def gradient_errors(
    subspace: Subspace,
    bases: Sequence[np.ndarray | None],
    candidates: Sequence[Ranks | None],
    samples: Sequence[LayerSample],
) -> list[float]:
    """The mean of ‖dW − dŴ‖² over the samples, for each choice of ranks; ‖dW‖² for None.

    ``subspace`` gives the shape and the frame (where the activation is centred, dŴ has the exact gradient of the
    mean), and ``bases`` all directions (n, m) of each mode, of which the leading ones are taken.
    """
    errors = np.zeros(len(candidates))
    f = feature_mode(subspace.shape)
    only_feature = all((U is None) == (mode != f) for mode, U in enumerate(bases))
    for sample in samples:
        whole = sample.geometry.weight_gradient(sample.activation, sample.grad_output)
        centred = Frame(None, subspace.frame.mean).apply(sample.activation)
        target = whole if centred is sample.activation else sample.geometry.weight_gradient(centred, sample.grad_output)
        U_all = [None if U is None else U.astype(centred.dtype) for U in bases]
        if only_feature and getattr(sample.geometry, "groups", 1) == 1:
            errors += _feature_errors(sample.geometry.outputs_first(target), whole, U_all[f], candidates, f)
            continue
        core = projection_fast.project(centred, U_all)
        for i, ranks in enumerate(candidates):
            if ranks is None:
                errors[i] += _energy(whole)
                continue
            part = core[tuple(slice(r) for r in ranks)]
            factors = [None if U is None else U[:, :r] for U, r in zip(U_all, ranks, strict=True)]
            ours = projection_fast.weight_gradient(
                np.ascontiguousarray(part), factors, sample.grad_output, sample.geometry
            )
            errors[i] += _energy(target - ours)
    return [float(error) for error in errors / len(samples)]


def _feature_errors(
    target: np.ndarray, whole: np.ndarray, U: np.ndarray | None, candidates: Sequence[Ranks | None], mode: int
) -> np.ndarray:
    """All ranks at once: dŴ = dW ×_f U Uᵀ, so ‖dW − dŴ‖² = ‖dW‖² − Σ_{i≤r} ‖dW ×_f u_iᵀ‖².

    ``target`` is dW with its outputs first.
    """
    assert U is not None
    columns = np.moveaxis(target, 1, -1).astype(np.float64) @ U  # (C_out, .., n)
    kept = np.cumsum(np.square(columns).sum(axis=tuple(range(columns.ndim - 1))))
    total = _energy(target)
    return np.array([_energy(whole) if r is None else max(total - kept[_rank(r, mode) - 1], 0.0) for r in candidates])


def _rank(ranks: Ranks, mode: int) -> int:
    r = ranks[mode]
    assert r is not None
    return r


def _energy(array: np.ndarray) -> float:
    return float(np.square(array, dtype=np.float64).sum())


class _Layer:
    """What planning needs to know of one layer."""

    def __init__(self, path: str, calibration: Calibration, dtype: Any, include_factors: bool) -> None:
        grams = calibration.grams_of(path)
        self.shape = grams.shape
        if grams.unit:
            raise ValueError(
                f"layer {path!r}: its activations are about 2**{grams.unit} in size, and their squares out of range; "
                "planning compares energies between layers"
            )
        self.itemsize, self.include_factors = np.dtype(dtype).itemsize, include_factors
        self.calibrated = [mode for mode, K in enumerate(grams.grams) if K is not None]
        both = {mode: grams.basis(mode) for mode in self.calibrated}
        self.bases = [both[mode][1] if mode in both else None for mode in range(len(self.shape))]
        self.energies = {
            mode: energies[: vectors.shape[1]] / grams.batches for mode, (energies, vectors) in both.items()
        }
        self.tails = {mode: np.append(np.cumsum(e[::-1])[::-1], 0.0) for mode, e in self.energies.items()}
        self.total = max(float(e.sum()) for e in self.energies.values())

    @property
    def least(self) -> Ranks:
        """Rank 1 in every calibrated mode."""
        return tuple(1 if mode in self.energies else None for mode in range(len(self.shape)))

    def bytes_of(self, ranks: Ranks) -> int:
        """Bytes of the core, and of the factors where the budget includes these."""
        core, factors = kept_elements(self.shape, ranks)
        return (core + factors if self.include_factors else core) * self.itemsize

    def bounds(self, candidates: Sequence[Ranks | None]) -> list[float]:
        """Bound on the energy left out at each choice of ranks."""
        return [
            self.total
            if ranks is None
            else min(self.total, float(sum(self.tails[mode][_rank(ranks, mode)] for mode in self.calibrated)))
            for ranks in candidates
        ]

    def candidates(self, budget_bytes: int) -> list[Ranks | None]:
        """Rank 0, the ranks at every threshold, and the greedy path, as far as the budget goes."""
        found: dict[Ranks | None, None] = {None: None}
        for path in (self._by_threshold(), self._greedy()):
            for ranks in path:
                if self.bytes_of(ranks) > budget_bytes:
                    break
                found[ranks] = None
        return list(found)

    def _by_threshold(self) -> Iterator[Ranks]:
        """The ranks as the energy threshold rises, from rank 1 everywhere to full rank."""
        yield self.least
        shares = [np.cumsum(e) / e.sum() for e in self.energies.values()]
        jumps = np.unique(np.minimum(np.concatenate([[0.0], *shares]), 1.0))
        for epsilon in [*(jumps[:-1] + jumps[1:]) / 2, 1.0]:  # between two jumps all ranks stay as they are
            yield self._ranks({mode: energy_rank(e, float(epsilon)) for mode, e in self.energies.items()})

    def _greedy(self) -> Iterator[Ranks]:
        """Ranks from 1 everywhere upwards; each step raises the mode that lowers the bound most for its bytes."""
        current = dict.fromkeys(self.calibrated, 1)
        while True:
            yield self._ranks(current)
            steps = []
            for mode, r in current.items():
                largest = len(self.energies[mode])
                raised = min(r + max(1, r // STEPS), largest) if len(current) > 1 else min(r + 1, largest)
                if raised > r:
                    after = self._ranks({**current, mode: raised})
                    gain = self.tails[mode][r] - self.tails[mode][raised]
                    steps.append((-gain / (self.bytes_of(after) - self.bytes_of(self._ranks(current))), mode, raised))
            if not steps:
                return
            _, mode, raised = min(steps)
            current[mode] = raised

    def _ranks(self, by_mode: Mapping[int, int]) -> Ranks:
        return tuple(by_mode.get(mode) for mode in range(len(self.shape)))


def _check_samples(calibration: Calibration, gradients: Samples) -> None:
    for path in calibration:
        shape = calibration.grams_of(path).shape
        if not gradients.get(path):
            raise ValueError(f"gradients has no samples of layer {path!r}, expected some of every calibrated layer")
        for sample in gradients[path]:
            seen = sample.activation.shape
            if seen[1:] != shape[1:] or (calibration[path].factors[0] is not None and seen[0] != shape[0]):
                raise ValueError(f"layer {path!r}: a sample has an activation of shape {seen}, calibrated was {shape}")
