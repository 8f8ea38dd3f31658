"""What the machine can do, measured in the same run: GFLOP/s of a large product, GB/s of STREAM's triad.

No product of so many operations on so many bytes takes less than operations / GEMM, nor less than bytes / STREAM
(Williams et al. 2009).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.side_by_side import Side, peer, timed
from lance_ref.algebra.kernels.threads import Loops, numba_enabled

GEMM_SIZE, QUICK_GEMM_SIZE = 2048, 128
STREAM_ELEMENTS, QUICK_STREAM_ELEMENTS = 1 << 24, 1 << 12
"""float32, 64 MiB an array: more than any cache holds."""

Product = tuple[int, int]
"""Floating-point operations, and bytes of operands and result."""


@dataclass(frozen=True)
class Roofline:
    """The fastest repeat of each.

    Attributes
    ----------
    gflops : dict
        Of float32 matrix products, by the library that ran it.
    gbytes_per_second : dict
        STREAM's triad a = b + s·c, three arrays, or copy, two, by the library that ran it.
    """

    gflops: dict[str, float]
    gbytes_per_second: dict[str, float]

    def seconds(self, products: Sequence[Product]) -> float:
        """The least that these products can take, one after the other."""
        return sum(max(each) for each in self._each(products))

    def bound(self, products: Sequence[Product]) -> str:
        """What they wait for in the main: ``"arithmetic"`` or ``"memory"``."""
        arithmetic, memory = (sum(seconds) for seconds in zip(*self._each(products), strict=True))
        return "arithmetic" if arithmetic > memory else "memory"

    def _each(self, products: Sequence[Product]) -> list[tuple[float, float]]:
        """Seconds of arithmetic and of memory."""
        gflops, gbytes = max(self.gflops.values()), max(self.gbytes_per_second.values())
        return [(flops / gflops / 1e9, nbytes / gbytes / 1e9) for flops, nbytes in products]

    def as_json(self) -> dict[str, Any]:
        return {"gflops": self.gflops, "gbytes_per_second": self.gbytes_per_second}

    def __str__(self) -> str:
        products = ", ".join(f"{name} {value:.1f}" for name, value in self.gflops.items())
        memory = ", ".join(f"{name} {value:.1f}" for name, value in self.gbytes_per_second.items())
        return f"this machine: GFLOP/s of a product: {products}; GB/s of memory: {memory}"


def measure(repeats: int, quick: bool = False) -> Roofline:
    """Measure and print the machine's ceilings."""
    n = QUICK_GEMM_SIZE if quick else GEMM_SIZE
    elements = QUICK_STREAM_ELEMENTS if quick else STREAM_ELEMENTS
    torch = peer("torch")
    seconds = _fastest(_products(n, torch), repeats)
    gflops = {name: 2 * n**3 / of / 1e9 for name, of in seconds.items()}
    seconds = _fastest(_streams(elements, torch), repeats)
    arrays = {name: 2 if name.endswith("copy") else 3 for name in seconds}
    found = Roofline(gflops, {name: 4 * elements * arrays[name] / of / 1e9 for name, of in seconds.items()})
    print(found, flush=True)
    return found


def _fastest(sides: Mapping[str, Side], repeats: int) -> dict[str, float]:
    return {name: min(timing.wall) for name, timing in timed(sides, repeats).items()}


def _products(n: int, torch: Any) -> dict[str, Side]:
    a, b = np.random.default_rng(0).standard_normal((2, n, n), dtype=np.float32)
    out = np.empty_like(a)
    sides: dict[str, Side] = {"numpy": lambda: np.matmul(a, b, out=out)}
    if torch is not None:
        theirs = [torch.from_numpy(array.copy()) for array in (a, b, out)]
        sides["torch"] = lambda: torch.matmul(*theirs[:2], out=theirs[2])
    return sides


def _streams(elements: int, torch: Any) -> dict[str, Side]:
    a, b, c = (np.full(elements, value, np.float32) for value in (0, 1, 2))
    sides: dict[str, Side] = {"numpy copy": lambda: np.copyto(a, b)}
    if numba_enabled():
        sides["numba triad"] = lambda: _triad.run(elements, elements, a, b, c, np.float32(3))
    if torch is not None:
        theirs = [torch.from_numpy(array) for array in (a, b, c)]
        sides["torch triad"] = lambda: torch.add(theirs[1], theirs[2], alpha=3.0, out=theirs[0])
    return sides


@Loops
def _triad(start, stop, a, b, c, s):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        a[i] = b[i] + s * c[i]
