"""What LANCE's calibration costs, once, and after how many steps it is paid back against a HOSVD at every step.

For every calibrated mode of size n of an activation with P entries

    Gram          P·n                      K = A_(n) A_(n)ᵀ, for every batch
    eigenvectors  9n³/2, rounded down      of K, once; LAPACK's nominal count (Golub & Van Loan, section 8.3)

and for every batch one forward pass of the whole net; two of them where the mean activation has to be known first.
Orthogonal to the mean (``mean-free``) every activation loses its part along one direction of the feature mode, 2·P, and
the Gram of that mode goes to the n − 1 others and back: n²(n − 1) + 2n(n − 1)².
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.rules.account import WEIGHTED, Billed
from analysis.rules.stores.tucker import eigenvector_macs
from lance_ref.engine.recording import OpRecord

Ranks = tuple[int | None, ...]
MODE_NAMES = {
    2: ("batch", "feature"),
    3: ("batch", "token", "feature"),
    4: ("batch", "channel", "height", "width"),
    5: ("batch", "channel", "depth", "height", "width"),
}


@dataclass(frozen=True)
class ModeCalibration:
    """Multiply-adds for one mode of size ``size``: Grams of all batches, and the eigenvectors, once."""

    name: str
    size: int
    gram_macs: int
    eigenvector_macs: int


@dataclass(frozen=True)
class LayerCalibration:
    """One layer: its calibrated modes, and the multiply-adds of taking the mean's direction out, all batches."""

    path: str
    modes: tuple[ModeCalibration, ...]
    frame_macs: int = 0


@dataclass(frozen=True)
class CalibrationCost:
    """The calibration of all tuned layers."""

    batches: int
    forward_macs: int  #: Of the forward passes, all batches.
    layers: tuple[LayerCalibration, ...]
    #: Multiply-adds of decomposition and projection that every step saves against a HOSVD at the same ranks.
    saved_macs_per_step: int = 0

    @property
    def gram_macs(self) -> int:
        """Multiply-adds of all Gram matrices."""
        return sum(mode.gram_macs for layer in self.layers for mode in layer.modes)

    @property
    def frame_macs(self) -> int:
        """Multiply-adds of taking the mean's direction out."""
        return sum(layer.frame_macs for layer in self.layers)

    @property
    def eigenvector_macs(self) -> int:
        """Nominal multiply-adds of the eigendecompositions."""
        return sum(mode.eigenvector_macs for layer in self.layers for mode in layer.modes)

    @property
    def gram_bytes(self) -> int:
        """The Gram matrices, in memory from the first batch to the last: n² numbers of 8 bytes."""
        return sum(8 * mode.size**2 for layer in self.layers for mode in layer.modes)

    @property
    def total_macs(self) -> int:
        """All of it."""
        return self.forward_macs + self.gram_macs + self.frame_macs + self.eigenvector_macs

    @property
    def steps_to_pay_back(self) -> int | None:
        """The first step after which calibration and projections have cost no more than a HOSVD at every step.

        None where a step saves nothing.
        """
        return -(-self.total_macs // self.saved_macs_per_step) if self.saved_macs_per_step > 0 else None

    def to_json(self) -> dict[str, Any]:
        return {
            "batches": self.batches,
            "multiply_adds": {
                "forward": self.forward_macs,
                "gram": self.gram_macs,
                "frame": self.frame_macs,
                "eigenvectors": self.eigenvector_macs,
                "total": self.total_macs,
            },
            "gram_bytes": self.gram_bytes,
            "saved_multiply_adds_per_step": self.saved_macs_per_step,
            "steps_to_pay_back": self.steps_to_pay_back,
            "layers": {
                layer.path: {
                    "frame_multiply_adds": layer.frame_macs,
                    "modes": {
                        mode.name: {
                            "size": mode.size,
                            "gram_multiply_adds": mode.gram_macs,
                            "eigenvector_multiply_adds": mode.eigenvector_macs,
                        }
                        for mode in layer.modes
                    },
                }
                for layer in self.layers
            },
        }


def calibration_cost(
    records: Sequence[OpRecord],
    forward_macs: int,
    ranks: Mapping[str, Ranks],
    batches: int,
    kind: str = "plain",
    saved_macs_per_step: int = 0,
) -> CalibrationCost:
    """The cost of :func:`lance_ref.calibrate` on the modes that have a rank, in batches of the size of the step's.

    ``records`` are those of one step, those inside of segments included, and ``forward_macs`` of its forward pass;
    ``kind`` is "plain", "mean-free" or "center".
    """
    calls: dict[str, list[tuple[int, ...]]] = {}
    for record in records:
        if record.op in WEIGHTED and record.path in ranks:
            calls.setdefault(record.path, []).append(record.inputs[0].shape)
    layers = tuple(_layer(path, shapes, ranks[path], batches, kind) for path, shapes in calls.items())
    passes = 1 if kind == "plain" else 2
    return CalibrationCost(batches, passes * batches * forward_macs, layers, saved_macs_per_step)


def _layer(path: str, shapes: list[tuple[int, ...]], ranks: Ranks, batches: int, kind: str) -> LayerCalibration:
    """One layer, which is called with these shapes in every forward pass."""
    elements = batches * sum(math.prod(shape) for shape in shapes)
    names, feature = MODE_NAMES[len(ranks)], 1 if len(ranks) >= 4 else len(ranks) - 1
    modes = []
    for mode, (n, rank) in enumerate(zip(shapes[0], ranks, strict=True)):
        if rank is None:
            continue
        vectors = eigenvector_macs(n)
        if kind == "mean-free" and mode == feature:
            vectors = n * n * (n - 1) + 2 * n * (n - 1) ** 2 + eigenvector_macs(n - 1)
        modes.append(ModeCalibration(names[mode], n, elements * n, vectors))
    return LayerCalibration(path, tuple(modes), 2 * elements if kind == "mean-free" else 0)


def saved_per_step(compressed: Sequence[Billed], hosvd: Sequence[Billed]) -> int:
    """Multiply-adds of decomposition and projection of a step with HOSVD, less those of the other one."""

    def work(bills: Sequence[Billed]) -> int:
        return sum(bill.cost.decomposition_macs + bill.cost.projection_macs for bill in bills)

    return work(hosvd) - work(compressed)
