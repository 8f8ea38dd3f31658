"""The library's default source of random numbers."""

from __future__ import annotations

import numpy as np

_default = np.random.default_rng(0)


def manual_seed(seed: int) -> None:
    """Restart the default generator, from which weights and dropout masks are drawn unless one is given.

    The generator starts from seed 0 when the library is imported, so that runs repeat.
    """
    global _default
    _default = np.random.default_rng(_checked(seed))


def as_generator(rng: np.random.Generator | int | None = None) -> np.random.Generator:
    """A generator as it is, a fresh one for a seed, the default one for None."""
    if rng is None:
        return _default
    return rng if isinstance(rng, np.random.Generator) else np.random.default_rng(_checked(rng))


def _checked(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}, expected a non-negative integer or a numpy.random.Generator")
    return int(seed)
