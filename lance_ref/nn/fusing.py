"""What of a network runs fused: ``print(lance_ref.fuse(net, (32, 3, 224, 224)))``.

Nothing has to be switched on: whatever runs without gradients is fused when the network is called
(:mod:`lance_ref.fused.deferral`). This report says what that is, from shapes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lance_ref.engine.recording import OpRecord, itemsize
from lance_ref.fused import deferral
from lance_ref.fused.execute import most_workers
from lance_ref.fused.plan import Op, labels, plan
from lance_ref.fused.rules import STREAMED, detail, operands, why_not
from lance_ref.nn.module import Module
from lance_ref.nn.tracing import trace


@dataclass(frozen=True)
class Stretch:
    """Operations that follow each other and run together.

    Attributes
    ----------
    first, last : str
        Paths of the layers at its ends.
    groups : Counter of str
        How many groups there are of each kind, such as ``conv2d + batch_norm + relu6``.
    images : int
        At a time, in each of ``workers`` threads.
    arena_bytes : int
        What each thread holds.
    """

    first: str
    last: str
    groups: Counter[str]
    images: int
    workers: int
    arena_bytes: int


@dataclass(frozen=True)
class Fused:
    """What runs fused and what does not; prints as a table.

    Attributes
    ----------
    stretches : list of Stretch
    unfused : Counter of (str, str)
        How many operations of each kind run for themselves, and why.
    """

    stretches: list[Stretch] = field(default_factory=list)
    unfused: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = []
        for s in self.stretches:
            images = "1 image" if s.images == 1 else f"{s.images} images"
            threads = "1 thread" if s.workers == 1 else f"each of {s.workers} threads"
            lines.append(
                f"{s.first or '(root)'} to {s.last or '(root)'}: {images} at a time in {threads}, "
                f"{s.arena_bytes / 2**20:.2f} MiB a thread"
            )
            lines += [f"  {count:4d} x {kind}" for kind, count in s.groups.most_common()]
        if not self.stretches:
            lines.append("nothing is fused")
        if self.unfused:
            lines.append("for themselves:")
            lines += [f"  {count:4d} x {op}: {why}" for (op, why), count in self.unfused.most_common()]
        return "\n".join(lines)


def fuse(net: Module, input_shape: Sequence[int], dtype: Any = None) -> Fused:
    """Report which operations of ``net`` run fused in its present mode, with the parameters that train now.

    Parameters
    ----------
    input_shape : sequence of int
        Batch first.
    dtype : numpy dtype, optional
        As for :func:`lance_ref.trace`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`lance_ref.trace` does; ValueError if ``LANCE_REF_FUSE`` is neither 0 nor 1.

    Examples
    --------
    >>> import lance_ref
    >>> net = lance_ref.models.create("convnet", rng=0).eval()
    >>> with lance_ref.no_grad():
    ...     found = fuse(net, (1, 3, 16, 16))
    >>> for count, kind in sorted((count, kind) for kind, count in found.stretches[0].groups.items()):
    ...     print(count, kind)
    2 max_pool2d
    3 conv2d + relu
    """
    records, found = trace(net, input_shape, dtype), Fused()
    waiting: list[OpRecord] = []
    for i, record in enumerate(records):
        why = _why_not(record, waiting)
        if why is None:
            waiting.append(record)
            continue
        found.unfused[record.op, why] += 1
        if any(value.id == each.output.id for value in record.inputs for each in waiting):
            _together(waiting, records[i:], found)
            waiting = []
    _together(waiting, [], found)
    return found


def _why_not(record: OpRecord, waiting: Sequence[OpRecord]) -> str | None:
    if not deferral.enabled():
        return "LANCE_REF_FUSE is 0"
    if record.output.requires_grad:
        return "it is trained, or gradients go through it"
    if record.op not in STREAMED:
        return "it is no operation that is fused"
    images = record.inputs[: operands(record.op)]
    if record.op != "conv2d" and not any(value.id == each.output.id for value in images for each in waiting):
        return "no fused operation comes before it"
    return why_not(record.op, [value.shape for value in record.inputs], record.attributes)


def _together(waiting: Sequence[OpRecord], later: Sequence[OpRecord], found: Fused) -> None:
    """Add a stretch of operations; what ``later`` ones read is written down, and the result of the last."""
    if len(waiting) < 2:
        found.unfused.update((record.op, "there is nothing to join it with") for record in waiting)
        return
    numbers: dict[int, int] = {record.output.id: i for i, record in enumerate(waiting)}
    outside: list[tuple[int, ...]] = []
    ops = []
    for record in waiting:
        images = record.inputs[: operands(record.op)]
        for value in images:
            if value.id not in numbers:
                outside.append(value.shape[1:])
                numbers[value.id] = -len(outside)
        shapes = [value.shape for value in record.inputs]
        refs = tuple(numbers[value.id] for value in images)
        ops.append(Op(record.op, refs, record.output.shape[1:], detail(record.op, shapes, record.attributes)))
    read = {value.id for record in later for value in record.inputs}
    wanted = {i for i, record in enumerate(waiting) if record.output.id in read} | {len(ops) - 1}
    batch = waiting[0].output.shape[0]
    made = plan(ops, outside, wanted, batch, itemsize(waiting[0].output.dtype), most_workers())
    ends = waiting[0].path, waiting[-1].path
    found.stretches.append(Stretch(*ends, labels(made, ops), made.chunk, made.workers, made.arena_bytes))
