"""Cost rules of the stores that find a Tucker decomposition anew at every step: HOSVD and ASI.

Sizes: an activation of P elements, in mode n of size n, with m = P/n columns in its unfolding and rank r.
A mode of full rank is left alone: no factor, no decomposition, no projection.

Nominal multiply-adds of LAPACK (half of the FLOPs in Golub & Van Loan, Matrix Computations):
9n³/2 for all eigenvalues and vectors of a symmetric (n, n) matrix, 2nr² − ⅔r³ for R and Q of an (n, r) one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.rules import tucker_costs
from analysis.rules.op_cost import Call, fresh
from analysis.rules.stores.base import StoreCost, conv_sizes, store_rule
from analysis.rules.tucker_costs import Ranks


@store_rule("hosvd")
def hosvd(call: Call, macs: int) -> StoreCost:
    """Truncated HOSVD: core and factors on the tape, a Gram matrix and its eigenvectors for every mode.

    ``store["ranks"]`` must be known: those given, or those of the step that was recorded. With
    ``store["epsilon"]`` below 1 the modes of full rank were decomposed too, but for those of size 1 and
    those that ``store["selected"]`` leaves out.
    """
    shape, store = call.record.inputs[0].shape, call.record.attributes["store"]
    ranks = own_ranks(call)
    return _core_and_factors(call, ranks, hosvd_macs(shape, ranks, decomposed(shape, ranks, store)))


@store_rule("asi")
def asi(call: Call, macs: int) -> StoreCost:
    """One subspace iteration: core and factors on the tape; V = A_(n)ᵀU, A_(n)V and one QR for every mode.

    Between steps the factors are what the next one starts from; during a step they are the arrays on the tape.
    """
    ranks = own_ranks(call)
    return _core_and_factors(call, ranks, asi_macs(call.record.inputs[0].shape, ranks))


def hosvd_macs(shape: Sequence[int], ranks: Ranks, decomposed: Sequence[bool]) -> int:
    """Multiply-adds of finding the factors of a truncated HOSVD; ``decomposed`` says of which modes.

    The Gram of the unfolding's smaller side:

    n ≤ m, or a rank above m is wanted   K = A_(n) A_(n)ᵀ: P·n; eigenvectors of (n, n)
    n > m                                K = A_(n)ᵀ A_(n): P·m; eigenvectors of (m, m); U = orth(A_(n) V): P·r, QR

    A matrix has one Gram of its smaller side for both modes.

    >>> hosvd_macs((2, 3), (1, None), (True, False))  # 6·2 + 9·8/2
    48
    >>> hosvd_macs((2, 3), (1, 1), (True, True))  # 48 shared; 6·1 and 2·3 − 2/3 for U_2
    59
    """
    size, total = math.prod(shape), 0
    shared = len(shape) == 2 and all(decomposed) and shape[0] != shape[1]
    for n, r, found in zip(shape, ranks, decomposed, strict=True):
        m = size // n
        if not found:
            continue
        if n <= m or (r is not None and r > m):
            total += size * n + eigenvector_macs(n)
            continue
        rank = n if r is None else r
        total += 0 if shared else size * m + eigenvector_macs(m)
        total += size * rank + orthonormal_macs(n, rank)
    return total


def asi_macs(shape: Sequence[int], ranks: Ranks) -> int:
    """Multiply-adds of one subspace iteration per mode: V (m, r) and A_(n)V (n, r) at P·r each, and QR.

    >>> asi_macs((2, 3), (1, None))  # 2·6·1 and 2·2 − 2/3
    15
    """
    size = math.prod(shape)
    return sum(2 * size * r + orthonormal_macs(n, r) for n, r in zip(shape, ranks, strict=True) if r is not None)


def eigenvector_macs(n: int) -> int:
    """9n³/2, rounded down."""
    return 9 * n * n * n // 2


def orthonormal_macs(n: int, r: int) -> int:
    """2nr² − ⅔r³, rounded down."""
    return (6 * n * r * r - 2 * r * r * r) // 3


def own_ranks(call: Call) -> tuple[int | None, ...]:
    """The ranks of the store, None for a mode of full rank.

    Raises ValueError if no step has chosen them yet; names the layer.
    """
    store = call.record.attributes["store"]
    if store["ranks"] is None:
        raise ValueError(
            f"layer {call.record.path or '(root)'!r}: the ranks of its {store['name']!r} store are chosen at every "
            "step; expected the records of a real step, or a store with given ranks"
        )
    return tuple(
        None if r is None or r == n else r for n, r in zip(call.record.inputs[0].shape, store["ranks"], strict=True)
    )


def decomposed(shape: Sequence[int], ranks: Ranks, store: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which modes the HOSVD looked at: those with a rank below full, and those that only it found to be full."""
    epsilon = store.get("epsilon")
    if epsilon is None:
        return tuple(r is not None for r in ranks)
    selected = store.get("selected") or (True,) * len(shape)
    return tuple(epsilon < 1 and n > 1 and chosen for n, chosen in zip(shape, selected, strict=True))


def _core_and_factors(call: Call, ranks: Ranks, decomposition_macs: int) -> StoreCost:
    """A core and its factors, both on the tape; the input itself where every mode has full rank.

    ``elementwise`` is the squares summed of activation and core, for the share of energy kept.
    """
    shape, weight = call.record.inputs[0].shape, call.record.inputs[1].shape
    core = tucker_costs.core_elements(shape, ranks)
    if call.record.op != "linear":
        sizes = conv_sizes(call)
        grad_weight = tucker_costs.conv_weight_gradient_macs(sizes, ranks)
        paper_grad_weight = tucker_costs.conv_papers_macs(sizes, ranks)
    else:
        grad_weight = tucker_costs.linear_weight_gradient_macs(shape, weight[0], ranks)
        paper_grad_weight = tucker_costs.linear_weight_gradient_macs(shape, weight[0], ranks, "papers")
    kept = [fresh("core", core * call.itemsize)]
    kept += [
        fresh(f"factor {mode}", n * r * call.itemsize)
        for mode, (n, r) in enumerate(zip(shape, ranks, strict=True))
        if r is not None
    ]
    untouched = len(kept) == 1
    return StoreCost(
        grad_weight_macs=grad_weight,
        paper_grad_weight_macs=paper_grad_weight,
        projection_macs=tucker_costs.projection_macs(shape, ranks),
        paper_projection_macs=tucker_costs.paper_projection_macs(shape, ranks),
        decomposition_macs=decomposition_macs,
        kept_bytes=(core + tucker_costs.factor_elements(shape, ranks)) * call.itemsize,
        elementwise=2 * (math.prod(shape) + core),
        ranks=tuple(ranks),
        tape=(call.save_input("core", 0),) if untouched else tuple(kept),
        pytorch=None if untouched else tuple(kept),
    )
