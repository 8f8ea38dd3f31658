"""What the first call of every compiled kernel costs: ``python -m benchmarks.first_call``, a fresh process.

Prints one line of JSON: how many kernels there are and which of them were not reached, and the seconds of loading
Numba, of the first call of all, and of the second. What is in Numba's cache already is not compiled again: let
``NUMBA_CACHE_DIR`` name an empty folder. ``LANCE_REF_NUMBA=0`` runs everything without Numba.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import time

import numpy as np

import lance_ref.algebra.kernels as loops
from analysis.commands.command_line import run_main
from lance_ref import F, Subspace, Tensor, nn, no_grad
from lance_ref.algebra.kernels.threads import Loops, numba_enabled
from lance_ref.stores import Lance


def kernels() -> dict[str, Loops]:
    """All compiled loops of the library, by module and name."""
    found = {}
    for module in pkgutil.iter_modules(loops.__path__):
        for name, value in vars(importlib.import_module(f"{loops.__name__}.{module.name}")).items():
            if isinstance(value, Loops):
                found[f"{module.name}.{name}"] = value
    return found


def run_all() -> None:
    """Forward and backward of float32 convolutions, plain and depthwise, and of what follows them: every kernel."""
    rng = np.random.default_rng(0)
    for C in (3, 16):
        x = Tensor(rng.standard_normal((4, C, 6, 5), dtype=np.float32), requires_grad=True)
        weight, dense = (
            Tensor(rng.standard_normal((C, width, 3, 3), dtype=np.float32), requires_grad=True) for width in (1, C)
        )
        store = Lance(Subspace.random(x.shape, (2, 2, 2, 1), rng), "separable")
        y = F.conv2d(x, weight, padding=1, groups=C, store=store) + F.conv2d(x, weight, padding=1, groups=C)
        y = F.batch_norm(y, None, None, training=True)
        y = F.batch_norm(y, np.zeros(C, np.float32), np.ones(C, np.float32))  # frozen
        F.max_pool2d(F.dropout(F.relu6(F.conv2d(y, dense, padding=1)), 0.5), 2).sum().backward()
        planes = Lance(Subspace.random(x.shape, (None, None, 1, 2), rng), "separable")  # height and width alone
        F.conv2d(x, weight, padding=1, groups=C, store=planes).sum().backward()
    layers = nn.Conv2d(3, 8, 3, padding=1, rng=0), nn.Conv2d(8, 8, 3, padding=1, groups=8, rng=0), nn.ReLU()
    with no_grad():
        nn.Sequential(*layers)(rng.standard_normal((4, 3, 6, 5), dtype=np.float32))  # fused


def main() -> int:
    start = time.perf_counter()
    if numba_enabled():
        importlib.import_module("numba")
    loaded = time.perf_counter()
    run_all()
    first = time.perf_counter()
    run_all()
    second = time.perf_counter()
    every = kernels()
    found = {
        "numba": numba_enabled(),
        "kernels": len(every),
        "not_reached": sorted(name for name, loops in every.items() if loops.compiled is None),
        "loading_numba": loaded - start,
        "first_call": first - loaded,
        "second_call": second - first,
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
