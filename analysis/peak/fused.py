"""Operations without gradients that run together, a few images at a time: what a pass over them holds.

Such a pass writes down what is still wanted, and beside it holds an arena for each thread.
What belongs to a group, and where its map lies in the arena, is derived here anew, from the records alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from analysis.peak.arrays import UFUNC_BUFFER
from lance_ref.algebra.kernels.threads import SERIAL_ELEMENTS
from lance_ref.engine.recording import OpRecord, Value
from lance_ref.engine.workers import controllable, threads
from lance_ref.fused import deferral
from lance_ref.fused.plan import ALIGNED, CACHE_BYTES, PATCH_BYTES, PATCHES

SOURCES = ("conv2d", "mul", "max_pool2d", "adaptive_avg_pool2d")
IN_PLACE = {"batch_norm": 1, "add": 2, "relu": 3, "relu6": 3, "hardswish": 3, "hardsigmoid": 3}
"""What follows a source in its own map, with its place in the order."""
AT_THE_END = ("reshape", "linear")
"""What is put off too, and runs on the whole batch."""


@dataclass(frozen=True)
class Held:
    """Bytes of a pass, beside its results: the arenas of all threads, and the factors of batch norms."""

    arenas: int
    factors: int
    images: int  #: At a time in each arena.
    buffers: int = 0  #: Of NumPy's iterators in all threads, while a maximum is taken.

    @property
    def total(self) -> int:
        return self.arenas + self.factors + self.buffers


@dataclass
class PutOff:
    """The operations that wait at a moment."""

    records: list[OpRecord] = field(default_factory=list)
    made: dict[int, OpRecord] = field(default_factory=dict)  #: By id of the value.

    def takes(self, record: OpRecord) -> bool:
        """Whether an operation is put off when it is called."""
        if not deferral.enabled() or record.output.requires_grad:
            return False
        images = record.inputs[: 2 if record.op in ("add", "mul") else 1]
        waited_for = [self.made[value.id] for value in images if value.id in self.made]
        if any(value.id in self.made for value in record.inputs[len(images) :]):
            return False
        if record.op in AT_THE_END:
            return bool(waited_for)
        if not waited_for and record.op != "conv2d":
            return False
        first = images[0]
        if self.records and (first.shape[0], first.dtype) != (self.records[0].output.shape[0], record.output.dtype):
            return False
        return _streams(record, images) and all(other.op not in AT_THE_END for other in waited_for)

    def add(self, record: OpRecord) -> None:
        self.records.append(record)
        self.made[record.output.id] = record

    def clear(self) -> None:
        self.records.clear()
        self.made.clear()


def _streams(record: OpRecord, images: tuple[Value, ...]) -> bool:
    """Whether an operation treats the images one by one, in a way that a pass knows."""
    shape, attributes = images[0].shape, record.attributes
    if len(shape) != 4 or math.prod(shape) == 0:
        return False
    if record.op == "conv2d":
        depthwise = record.inputs[1].shape[:2] == (shape[1], 1)
        return "update" not in attributes and (attributes["groups"] == 1 or depthwise)
    if record.op in ("add", "mul"):
        shapes = {value.shape for value in images}
        largest = max(shapes, key=math.prod)
        return shapes <= ({largest, (*largest[:2], 1, 1)} if record.op == "mul" else {largest})
    if record.op == "batch_norm":
        return not attributes["training"]
    if record.op == "max_pool2d":
        return not attributes["ceil_mode"]
    if record.op == "adaptive_avg_pool2d":
        return tuple(attributes["output_size"]) == (1, 1)
    return record.op in IN_PLACE


@dataclass
class _Group:
    """Records that share a map: its value, and the values that are read as maps."""

    records: list[OpRecord]
    reads: list[int]

    @property
    def value(self) -> int:
        return self.records[-1].output.id


def held(records: Sequence[OpRecord], wanted: Iterable[int]) -> Held:
    """What a pass over the records holds that gives these values."""
    groups = _groups(records, set(wanted))
    values = {value.id: value for group in groups for r in group.records for value in (*r.inputs, r.output)}
    first = groups[0].records[0].output
    batch, item = first.shape[0], first.nbytes // first.size
    of_one = {i: value.nbytes // batch for i, value in values.items()}
    little = sum(record.output.size for record in records) < SERIAL_ELEMENTS
    workers = 1 if little or not controllable() else min(threads(), batch)
    alone = _arena(_maps(groups, of_one, 1))
    images = max(1, min(batch // (2 * workers), CACHE_BYTES // max(alone, 1)))
    arena = _arena(_maps(groups, of_one, images) + _laid_out(groups, images, item)) + ALIGNED
    factors, buffers = sum(map(_factors, groups)), max(_buffered(group, images) for group in groups)
    return Held(workers * arena, factors, images, workers * buffers * item)


def _groups(records: Sequence[OpRecord], wanted: set[int]) -> list[_Group]:
    """In the order in which they run: that of their first records."""
    readers = Counter(value.id for record in records for value in record.inputs)
    groups: list[_Group] = []
    of_value: dict[int, int] = {}  # the group that makes a value
    for record in records:
        images = [value.id for value in record.inputs[: 2 if record.op in ("add", "mul") else 1]]
        rank = IN_PLACE.get(record.op)
        latest = max(images, key=lambda value: of_value.get(value, -1))
        joins = rank is not None and latest in of_value and readers[latest] == 1 and latest not in wanted
        if joins and rank is not None:
            joins = IN_PLACE.get(groups[of_value[latest]].records[-1].op, 0) < rank
        if joins:
            group = groups[of_value[latest]]
            group.records.append(record)
            group.reads += [value for value in images if value != latest]
        else:
            groups.append(_Group([record], images))
            group = groups[-1]
        of_value[record.output.id] = groups.index(group)
    return groups


def _by_patches(group: _Group) -> bool:
    record = group.records[0]
    if record.op != "conv2d" or record.attributes["groups"] != 1:
        return False
    plain = {"stride": (1, 1), "padding": ((0, 0), (0, 0))}
    return record.inputs[1].shape[2:] != (1, 1) or any(record.attributes[k] != v for k, v in plain.items())


def _maps(groups: list[_Group], of_one: Mapping[int, int], images: int) -> list[tuple[int, int, int]]:
    """(bytes, first group, last group) of every map; patches are taken from an array from outside as it is."""
    spans: dict[int, tuple[int, int]] = {}
    made = {group.value for group in groups}
    for i, group in enumerate(groups):
        from_outside = group.reads[0] not in made
        reads = group.reads[1:] if _by_patches(group) and from_outside else group.reads
        for value in reads:
            spans[value] = (spans.get(value, (i, i))[0], i)
        spans[group.value] = (i, i)
    return [(images * of_one[value], *span) for value, span in spans.items()]


def _laid_out(groups: list[_Group], images: int, item: int) -> list[tuple[int, int, int]]:
    """The same of the patches that are laid out at a time, and of the weights of depthwise convolutions."""
    found = []
    for i, group in enumerate(groups):
        record = group.records[0]
        if record.op == "conv2d" and record.attributes["groups"] != 1:
            found.append((record.inputs[1].nbytes, i, i))
        elif _by_patches(group):
            H_out, W_out = record.output.shape[2:]
            row = W_out * math.prod(record.inputs[1].shape[1:]) * item
            lines = max(PATCH_BYTES // row, math.ceil(PATCHES / W_out))
            found.append((row * min(lines, images * H_out), i, i))
    return found


def _arena(blocks: list[tuple[int, int, int]]) -> int:
    """Bytes of the arena: the largest blocks first, each as low as those that live with it leave room."""
    padded = [(math.ceil(size / ALIGNED) * ALIGNED, first, last) for size, first, last in blocks]
    placed: list[tuple[int, int, int, int]] = []
    for size, first, last in sorted(padded, key=lambda block: (-block[0], block[1])):
        beside = sorted((low, high) for low, high, a, b in placed if a <= last and first <= b)
        low = 0
        for start, end in beside:
            if start < low + size:
                low = max(low, end)
            else:
                break
        placed.append((low, low + size, first, last))
    return max((high for _, high, _, _ in placed), default=0)


def _buffered(group: _Group, images: int) -> int:
    """Elements that NumPy's iterator has room for: of both operands and the result, one row of windows at a time."""
    record = group.records[0]
    if record.op != "max_pool2d":
        return 0
    _, C, _, W_out = record.output.shape
    return 3 * min(images * W_out * C, UFUNC_BUFFER)


def _factors(group: _Group) -> int:
    """Scale and shift of a norm, and a shift that takes in the bias before it."""
    value = group.records[-1].output
    norms = sum(record.op == "batch_norm" for record in group.records)
    biased = norms and group.records[0].op == "conv2d" and len(group.records[0].inputs) == 3
    return (2 * norms + bool(biased)) * value.shape[1] * (value.nbytes // value.size)
