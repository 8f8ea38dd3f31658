"""What HOSVD, ASI and LANCE hold while they save and while they make a weight gradient: within 5 %, from both sides.

The geometries have unfoldings of one block and of several, tall ones, views and copies, and kernels of one place.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import pytest

from analysis.check.store_case import Case, memory
from lance_ref.algebra.geometry import ConvGeometry, Geometry, LinearGeometry
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.algebra.subspace import Subspace
from lance_ref.stores import ActivationStore, Asi, Hosvd, Lance

GEOMETRIES: dict[str, Geometry] = {
    "3x3": ConvGeometry((16, 64, 14, 14), (32, 64, 3, 3), padding=((1, 1), (1, 1))),
    "1x1": ConvGeometry((8, 96, 28, 28), (16, 96, 1, 1)),
    "small maps": ConvGeometry((64, 128, 2, 2), (64, 128, 1, 1)),
    "many channels": ConvGeometry((2, 1024, 4, 4), (32, 1024, 1, 1)),
    "groups": ConvGeometry((16, 48, 12, 12), (32, 24, 3, 3), groups=2),
    "matrix": LinearGeometry((64, 784), (100, 784)),
    "long matrix": LinearGeometry((512, 256), (100, 256)),
    "tokens": LinearGeometry((16, 197, 256), (128, 256)),
}
OBJECTS = 24 * 1024
"""Bytes of Python's own objects, on one layer."""

Ranks = tuple[int | None, ...]
STORES: dict[str, Callable[[Geometry, Ranks], ActivationStore]] = {
    "hosvd": lambda g, ranks: Hosvd(ranks=ranks),
    "energy": lambda g, ranks: Hosvd(0.8),
    "most energy": lambda g, ranks: Hosvd(0.99),
    "asi": lambda g, ranks: Asi(ranks),
    "lance": lambda g, ranks: Lance(Subspace.random(g.input_shape, ranks, np.random.default_rng(0))),
}


@pytest.mark.skipif(not numba_enabled(), reason="the rules are those of the compiled loops")
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_layers_hold_what_is_predicted(name: str, store: str) -> None:
    """Several ranks of each mode, also of modes that are left alone."""
    g, rng = GEOMETRIES[name], np.random.default_rng(zlib.crc32(name.encode()))
    for _ in range(1 if "energy" in store else 3):
        ranks = tuple([None, 1, max(n // 4, 1), max(int(0.6 * n), 1)][rng.integers(4)] for n in g.input_shape)
        case = Case(name, g, np.dtype(np.float32), ranks if any(ranks) else (1, *ranks[1:]))
        found = memory(case, STORES[store](g, case.ranks))
        for moment, (predicted, measured) in zip(("forward", "backward"), found, strict=True):
            assert predicted == pytest.approx(measured, rel=0.05, abs=OBJECTS), f"{moment}, ranks {case.ranks}"
