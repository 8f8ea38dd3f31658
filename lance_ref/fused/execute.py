"""Running a plan: workers that each take a few images at a time through all groups, in an arena of their own.

A worker's products run in its own thread. Where the BLAS cannot be told so, there is one worker.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import numpy as np

from lance_ref.engine.workers import blas_alone, controllable, share_out, taken_from, threads
from lance_ref.fused import steps
from lance_ref.fused.plan import ALIGNED, Op, PassPlan, Ref, maps_read
from lance_ref.fused.steps import Arrays, Prepared

Results = dict[int, np.ndarray]


def most_workers() -> int:
    """Workers at most: ``LANCE_REF_THREADS``, by default the processors of this process."""
    return threads() if controllable() else 1


def execute(
    plan: PassPlan, ops: Sequence[Op], own: Sequence[Arrays], outside: Sequence[np.ndarray], wanted: Sequence[int]
) -> tuple[Results, Counter[int], bool]:
    """Run a plan over a batch.

    Parameters
    ----------
    own : sequence of tuple of array
        By operation: weight and bias of a convolution, scale and shift of a batch norm.
    outside : sequence of (B, C, H, W) array

    Returns
    -------
    results : dict of (B, C, H, W) array
        By operation, of those that are ``wanted``.
    macs : Counter
        Multiply-adds that ran, by operation.
    flagged : bool
        Whether the processor noted an overflow or an invalid value, deserved or not.
    """
    batch, dtype = len(outside[0]), outside[0].dtype
    results = {i: np.empty((batch, *ops[i].shape), dtype) for i in wanted}
    prepared = steps.prepare(plan.groups, ops, own, dtype)
    starts = deque(range(0, batch, plan.chunk))
    workers = [_Worker(plan, ops, prepared, outside, results, starts) for _ in range(plan.workers)]

    def run(start: int, stop: int) -> None:
        for worker in workers[start:stop]:
            worker.run()

    with blas_alone if plan.workers > 1 else nullcontext():
        share_out(len(workers), len(workers), run)
    macs: Counter[int] = Counter()
    for worker in workers:
        macs.update(worker.macs)
    return results, macs, any(worker.flagged for worker in workers)


class _Worker:
    """One thread's arena, and what it has run."""

    def __init__(
        self,
        plan: PassPlan,
        ops: Sequence[Op],
        prepared: Sequence[Prepared],
        outside: Sequence[np.ndarray],
        results: Results,
        starts: deque[int],
    ) -> None:
        self.plan, self.ops, self.prepared, self.outside = plan, ops, prepared, outside
        self.results, self.starts = results, starts
        self.macs: Counter[int] = Counter()
        self.flagged = False
        dtype = outside[0].dtype
        arena = np.empty(plan.arena_bytes + ALIGNED, np.uint8)
        skipped = -arena.ctypes.data % ALIGNED

        @cache  # maps that take turns in a place share their array
        def view(offset: int, shape: tuple[int, ...]) -> np.ndarray:
            size = math.prod(shape) * dtype.itemsize
            return arena[skipped + offset : skipped + offset + size].view(dtype).reshape(shape)

        self.maps: dict[Ref, np.ndarray] = {}
        for ref, offset in plan.places.items():
            C, H, W = ops[ref].shape if ref >= 0 else outside[-1 - ref].shape[1:]
            self.maps[ref] = view(offset, (plan.chunk, H, W, C))
        self.workspaces = {g: view(offset, shape) for g, (offset, shape) in plan.workspaces.items()}

    def run(self) -> None:
        """Take images until there are none left, or another worker has failed."""
        with np.errstate(invalid="call", over="call", call=self._note):
            try:
                for start in taken_from(self.starts):
                    self._run(slice(start, min(start + self.plan.chunk, len(self.outside[0]))))
            except BaseException:
                self.starts.clear()
                raise

    def _run(self, images: slice) -> None:
        count = images.stop - images.start
        whole = count == self.plan.chunk
        maps = self.maps if whole else {ref: array[:count] for ref, array in self.maps.items()}
        outside = {-1 - i: array[images].transpose(0, 2, 3, 1) for i, array in enumerate(self.outside)}
        entered: set[Ref] = set()
        for g, group in enumerate(self.plan.groups):
            for ref in maps_read(group, self.ops):
                if ref < 0 and ref not in entered:
                    np.copyto(maps[ref], outside[ref])
                    entered.add(ref)
            macs = steps.run(group, self.ops, self.prepared[g], maps, outside, self.workspaces.get(g))
            if macs:
                self.macs[group.source] += macs  # type: ignore[index]
            result = self.results.get(group.result)
            if result is not None:
                np.copyto(result[images], maps[group.result].transpose(0, 3, 1, 2))

    def _note(self, error: str, flags: int) -> None:
        self.flagged = True
