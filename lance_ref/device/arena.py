"""A static arena: every array gets a fixed offset before the first step.

Which arrays are alive when is known from the list of instructions. Two arrays may share addresses if one of them is
dead before the other is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lance_ref.engine.tensor import Shape

KINDS = ("image", "maps", "tiles", "channels", "masks", "cores", "trained weights", "gradients", "optimiser", "head")
"""What an array is for: the image; whole maps and their gradients; maps of a tile; single channels on their way; signs
of activations, as bits; what layers keep of their inputs; weights that train; their gradients, added up over a batch;
with momentum, the velocity in their place; the classifier, its weights and gradients."""
PERSISTENT = ("trained weights", "gradients", "optimiser", "head")
"""Kinds of arrays that outlive a step."""
POISON = 0xFF
"""Every float of such bytes is NaN."""


@dataclass(eq=False)
class Array:
    """One array of a program.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtype : numpy dtype
    kind : str
        One of :data:`KINDS`.
    first, last : int
        The first and the last instruction that touches it.
    offset : int
        Its address in the arena, in bytes.
    rows_first : bool
        Whether a map (C, H, W) lies in memory as (H, C, W).
    lead : int
        Bytes in front of its numbers that belong to it; ``over`` begins there.
    over : Array, optional
        An array that is written over this one while it is read, from its first byte on, and lives longer.
    is_state : bool
        Whether it is what was learned: these arrays lie one after the other at the start of the arena.
    """

    name: str
    shape: Shape
    dtype: Any
    kind: str
    first: int = -1
    last: int = -1
    offset: int = -1
    rows_first: bool = False
    lead: int = 0
    over: Array | None = None
    is_state: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.lead + math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def touch(self, time: int) -> None:
        """It is alive at this instruction."""
        self.first = time if self.first < 0 else min(self.first, time)
        self.last = max(self.last, time)

    def meets(self, other: Array) -> bool:
        """Whether both are alive at some instruction."""
        return self.first <= other.last and other.first <= self.last


def live_bytes(arrays: Iterable[Array], times: int) -> list[int]:
    """For each instruction of a program, the sum of the bytes that are alive while it runs."""
    change = [0] * (times + 1)
    for array in arrays:
        change[array.first] += array.nbytes
        change[array.last + 1] -= array.nbytes
    return list(np.cumsum(change[:-1]))


def place(arrays: Sequence[Array]) -> int:
    """Give every array an offset; returns the bytes of the arena.

    What was learned comes first, then what else outlives a step. For the rest several orders are tried, and the best of
    them is kept: each array in turn is put at the lowest address at which it overlaps none that is alive at the same
    time. The result is at least the largest sum of live bytes, and ``tests/device`` holds it within 5 % of that.
    """
    bound = max(live_bytes(arrays, max(array.last for array in arrays) + 1))
    widest = max(np.dtype(array.dtype).itemsize for array in arrays)
    best: tuple[dict[Array, int], int] | None = None
    for order in _orders(arrays):
        # Behind an array of an odd number of bytes others are moved to an even address: such arrays may come last.
        for odd_last in (True, False):
            placed = _in_order(
                sorted(
                    arrays,
                    key=lambda a: (
                        not a.is_state, a.kind not in PERSISTENT, odd_last and a.nbytes % widest > 0, order(a)
                    ),
                )
            )  # fmt: skip
            best = placed if best is None or placed[1] < best[1] else best
        if best is not None and best[1] == bound:
            break
    assert best is not None
    for array, offset in best[0].items():
        array.offset = offset
    return best[1]


_SHUFFLES, _PAIRS = 200, 3_000_000


def _orders(arrays: Sequence[Array]) -> Iterator[Callable[[Array], Any]]:
    """Keys to sort by: the long-lived first, the large first, both at once, then the large with some noise."""
    yield lambda a: (a.first - a.last, -a.nbytes)
    yield lambda a: (-a.nbytes, a.first)
    yield lambda a: (-a.nbytes * (a.last - a.first + 1), a.first)
    rng = np.random.default_rng(0)
    for _ in range(min(_SHUFFLES, _PAIRS // len(arrays) ** 2)):  # each looks at all pairs of arrays
        weight = {array: array.nbytes * float(rng.uniform(0.5, 1.5)) for array in arrays}
        yield lambda a, weight=weight: -weight[a]  # type: ignore[misc]


def _in_order(arrays: Sequence[Array]) -> tuple[dict[Array, int], int]:
    """First fit: offsets, and the bytes of all."""
    offsets: dict[Array, int] = {}
    placed: list[tuple[int, int, int, int]] = []  # first and last time, start and end address
    end = 0
    followers = {array.over for array in arrays if array.over is not None}
    for array in arrays:
        if array in followers:  # it was placed with the array that it is written over, or will be
            continue
        parts = [array] if array.over is None else [array, array.over]
        align = max(np.dtype(part.dtype).itemsize for part in parts)
        sizes = [(part.first, part.last, part.nbytes) for part in parts]
        taken = sorted(
            {
                (start, stop, nbytes)
                for born, died, start, stop in placed
                for first, last, nbytes in sizes
                if born <= last and first <= died
            }
        )
        at = 0
        for start, stop, nbytes in taken:
            if at + nbytes > start:
                at = max(at, -(-stop // align) * align)
        for part, (first, last, nbytes) in zip(parts, sizes, strict=True):
            offsets[part] = at
            placed.append((first, last, at, at + nbytes))
            end = max(end, at + nbytes)
    return offsets, end


class Memory:
    """The arena while a program runs: one buffer, in which every array is a view.

    Parameters
    ----------
    nbytes : int
    poison : bool
        Whether dead arrays are overwritten with NaN, so that reading one is a wrong number.
    """

    def __init__(self, nbytes: int, poison: bool = False) -> None:
        self.buffer = np.full(nbytes, POISON if poison else 0, np.uint8)
        self.poison = poison
        self.macs: dict[str, int] = {}
        self.rate = 0.0
        self._views: dict[tuple[Array, Shape], np.ndarray] = {}

    def view(self, array: Array, shape: Shape | None = None) -> np.ndarray:
        """The array, or its first numbers in another shape."""
        key = array, array.shape if shape is None else shape
        if key not in self._views:
            nbytes = math.prod(key[1]) * np.dtype(array.dtype).itemsize
            assert nbytes <= array.nbytes, (array.name, key[1], array.shape)
            start = array.offset + array.lead
            raw = self.buffer[start : start + nbytes].view(array.dtype)
            if array.rows_first:
                C, H, W = key[1]
                self._views[key] = raw.reshape(H, C, W).transpose(1, 0, 2)
            else:
                self._views[key] = raw.reshape(key[1])
        return self._views[key]

    __getitem__ = view

    def count(self, kind: str, macs: int) -> None:
        """So many multiply-adds ran."""
        self.macs[kind] = self.macs.get(kind, 0) + macs

    def bury(self, arrays: Iterable[Array]) -> None:
        """Overwrite arrays that are dead, if this memory poisons them."""
        if self.poison:
            for array in arrays:
                lives_on = 0 if array.over is None else array.over.nbytes
                self.buffer[array.offset + lives_on : array.offset + array.nbytes] = POISON
