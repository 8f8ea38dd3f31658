"""The library's default source of random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lance_ref.engine.state import state

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


def will_draw(rng: np.random.Generator) -> None:
    """Say, before an operation draws random numbers, from which generator; see :class:`lance_ref.nn.Recompute`."""
    if state.segment is not None:
        state.segment.draws.note(rng)


class Draws:
    """The generators that a stretch of computation draws from, each as it was before the first draw."""

    def __init__(self) -> None:
        self._default = _default
        self._before: dict[Any, Any] = {}  # bit generator to its state

    def note(self, rng: np.random.Generator) -> None:
        source = rng.bit_generator
        if source not in self._before:
            self._before[source] = source.state  # NumPy gives a copy

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside the ``with`` block the same numbers are drawn; afterwards all is as it was found."""
        global _default
        now = {source: source.state for source in self._before}
        default, _default = _default, self._default
        for source, before in self._before.items():
            source.state = before
        try:
            yield
        finally:
            _default = default
            for source, current in now.items():
                source.state = current
