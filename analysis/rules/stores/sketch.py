"""Cost rule of a random sketch of the batch mode."""

from __future__ import annotations

import math

from analysis.rules.op_cost import Call, Saved, fresh
from analysis.rules.stores.base import StoreCost, store_rule
from analysis.rules.stores.tucker import orthonormal_macs


@store_rule("sketch")
def sketch(call: Call, macs: int) -> StoreCost:
    """r rows in place of the n of the batch, and a seed.

    projection      n·r·(elements of one image)                      Sᵀ A
    decomposition   2·(2nr² − ⅔r³)                                   the directions, made in forward and in backward
    grad_weight     n·r·(outputs of one image) + macs·r/n            Sᵀ G, then the exact products of r images
    """
    shape = call.record.inputs[0].shape
    n, r = shape[0], directions(shape[0], call.record.attributes["store"]["ratio"])
    kept = (fresh("sketch", r * math.prod(shape[1:]) * call.itemsize), seed())
    grad_weight = call.n_out * r + macs // n * r
    return StoreCost(
        grad_weight_macs=grad_weight,
        paper_grad_weight_macs=grad_weight,
        projection_macs=call.n_in * r,
        paper_projection_macs=call.n_in * r,
        decomposition_macs=drawing_macs(n, r),
        kept_bytes=sum(saved.storage.nbytes for saved in kept),
        elementwise=drawing_elementwise(n, r),
        ranks=(r, *(None for _ in shape[1:])),
        tape=kept,
        pytorch=kept,
    )


def directions(n: int, ratio: float) -> int:
    """Directions of a batch of n: ratio·n to the nearest integer (of two, the even one), at least 1.

    >>> directions(16, 0.125), directions(3, 0.125), directions(5, 0.5)
    (2, 1, 2)
    """
    return max(round(ratio * n), 1)


def seed() -> Saved:
    """A 64-bit number from which backward draws the directions again."""
    return fresh("seed", 8)


def drawing_macs(n: int, r: int) -> int:
    """Orthonormal directions of a Gaussian (n, r) matrix, in forward and again in backward.

    >>> drawing_macs(2, 1)  # 2·2 − 2/3 → 3, twice
    6
    """
    return 2 * orthonormal_macs(n, r)


def drawing_elementwise(n: int, r: int) -> int:
    """The random numbers, their signs and their scale, twice."""
    return 2 * 3 * n * r
