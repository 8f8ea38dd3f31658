"""What protecting earlier tasks costs: GPM and LANCE, layer by layer, in training and between tasks.

Sizes. A layer takes in ``shape``, (B, L, n) or (B, n): rows of a linear layer, or the L = H_out·W_out patches of
n = C_in·k_h·k_w numbers of a convolution; P is the product of ``shape``. Its weight is (C_out, n), m directions of the
n are protected.

* RAM: what must be at hand in training beside the tape. GPM needs its bases, LANCE its factors.
* Flash: the bases, which both need between tasks.

A multiply-add is two FLOPs. LAPACK counts nominally (Golub & Van Loan, half of the FLOPs): 9n³/2 for all eigenvectors
of a symmetric (n, n) matrix, 2n²m − nm² + m³/3 for all of the orthogonal factor of an (n, m) one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.rules import tucker_costs
from analysis.rules.tucker_costs import Ranks


@dataclass(frozen=True)
class LayerBill:
    """One layer's cost of learning a task without forgetting."""

    ram_bytes: int  #: Bases or factors, in memory all through training.
    flash_bytes: int  #: Bases, in between.
    kept_bytes: int  #: What the tape keeps of the layer's input.
    #: Of one step.
    projection_macs: int
    grad_weight_macs: int

    @property
    def training_bytes(self) -> int:
        """Tape and RAM together."""
        return self.ram_bytes + self.kept_bytes

    @property
    def step_macs(self) -> int:
        """Multiply-adds of one step, forward and input gradient aside: these are the same for all."""
        return self.projection_macs + self.grad_weight_macs


def gpm_bill(
    shape: Sequence[int], input_elements: int, C_out: int, m: int, itemsize: int = 4, flash_itemsize: int = 8
) -> LayerBill:
    """GPM keeps the whole input, and projects the gradient by two products, (∇W M) and (·) Mᵀ.

    A saturated layer (m = n) has a gradient of zero, for which no basis need be at hand.

    >>> gpm_bill((8, 6), 48, 5, m=2).projection_macs  # 2·5·6·2
    120
    >>> gpm_bill((8, 6), 48, 5, m=6).ram_bytes
    0
    """
    n = shape[-1]
    working = 0 if m == n else m
    return LayerBill(
        ram_bytes=n * working * itemsize,
        flash_bytes=n * m * flash_itemsize,
        kept_bytes=input_elements * itemsize,
        projection_macs=2 * C_out * n * working,
        grad_weight_macs=math.prod(shape) * C_out,
    )


def lance_bill(
    shape: Sequence[int], ranks: Ranks | None, C_out: int, m: int, itemsize: int = 4, flash_itemsize: int = 8
) -> LayerBill:
    """LANCE keeps the core, and projects the input on its factors; ``ranks`` of None: a frozen layer, at no cost.

    >>> lance_bill((8, 6), (3, 2), 5, m=4)  # core 6, factors 24 + 12; 48·2 + 16·3
    LayerBill(ram_bytes=144, flash_bytes=192, kept_bytes=24, projection_macs=144, grad_weight_macs=210)
    """
    flash = shape[-1] * m * flash_itemsize
    if ranks is None:
        return LayerBill(0, flash, 0, 0, 0)
    return LayerBill(
        ram_bytes=tucker_costs.factor_elements(shape, ranks) * itemsize,
        flash_bytes=flash,
        kept_bytes=tucker_costs.core_elements(shape, ranks) * itemsize,
        projection_macs=tucker_costs.projection_macs(shape, ranks),
        grad_weight_macs=tucker_costs.linear_weight_gradient_macs(shape, C_out, ranks),
    )


# ---- between tasks -------------------------------------------------------------------------


def gram_macs(samples: int, n: int) -> int:
    """K = R Rᵀ of R (n, samples): samples·n².

    >>> gram_macs(10, 3)
    90
    """
    return samples * n**2


def update_macs(n: int, m: int, added: int) -> int:
    """One update of a basis of m directions, to which ``added`` come.

    With f = n − m: the null space, K N (n·n·f), Nᵀ(K N) (f·n·f), its eigenvectors, and N V (n·f·added). Without a basis
    so far the eigenvectors of K alone; a saturated one is left as it is.

    >>> update_macs(4, 0, 2), update_macs(4, 4, 0)  # 9·64/2
    (288, 0)
    >>> update_macs(4, 1, 1)  # ⌊(96 − 12 + 1)/3⌋ + 48 + 36 + ⌊9·27/2⌋ + 12
    245
    """
    f = n - m
    if f == 0:
        return 0
    eigenvectors = 9 * f**3 // 2
    if m == 0:
        return eigenvectors
    null_space = (6 * n**2 * m - 3 * n * m**2 + m**3) // 3
    return null_space + n * n * f + f * n * f + eigenvectors + n * f * added


def calibration_macs(shape: Sequence[int], selected: Sequence[bool], m: int, convolution: bool) -> int:
    """Gram matrices of the selected modes of one batch, outside of m protected directions.

    P·n_mode for each mode, and 2·P·m to take the protected part out; of patches, which are laid out anew for each
    mode, once for each mode. The eigenvectors, once a task, are not counted.

    >>> calibration_macs((8, 6), (True, True), 2, False)  # 48·(2·2) + 48·8 + 48·6
    864
    """
    P = math.prod(shape)
    modes = [n for n, chosen in zip(shape, selected, strict=True) if chosen]
    return P * sum(modes) + 2 * P * m * (len(modes) if convolution else 1)
