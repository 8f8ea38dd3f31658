"""The plan of a fused pass: which operations form a group, how many images go together, and where their maps lie.

A group is a source (a convolution, a pooling, a product, or a copy of a map) and what is done to its result in place,
row by row: a frozen batch norm, an addition, an activation function, each at most once and in this order. What lies
inside a group is never written down.

The maps of all groups have places in one arena; a place is used again as soon as its map is no longer needed. The
largest maps are placed first, each at the lowest place that is free all the time that it is needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lance_ref.algebra.kernels.threads import SERIAL_ELEMENTS
from lance_ref.engine.tensor import Shape
from lance_ref.fused.rules import ACTIVATIONS, WHOLE

CACHE_BYTES = 2 * 2**20
"""What a thread's maps may take: about the cache of a processor that is its own. One image at the least, and no more
than that all threads together hold half of the batch."""
PATCH_BYTES, PATCHES = 2**18, 64
"""Patches that are laid out as rows of a matrix at a time: so many bytes, but never fewer than so many patches."""
ALIGNED = 64
"""Every map begins at a multiple of so many bytes."""

Ref = int
"""A value: of operation i as i, of the i-th array from outside as −1 − i."""


@dataclass(frozen=True, slots=True)
class Op:
    """An operation as the plan sees it: ``operands`` are the values that are images, ``shape`` is (C, H, W)."""

    op: str
    operands: tuple[Ref, ...]
    shape: Shape
    detail: tuple = ()


@dataclass
class Group:
    """Operations that run together.

    Attributes
    ----------
    source : int
        The operation that makes the map; None: it is copied from ``reads[0]``.
    reads : list of int
        Values that the source reads.
    norm, activation : int, optional
        Operations in place.
    addition : tuple of int, optional
        The operation in place, and the value that it adds.
    result : int
        The value that is written down.
    """

    source: int | None
    reads: list[Ref]
    result: Ref
    norm: int | None = None
    addition: tuple[int, Ref] | None = None
    activation: int | None = None

    def members(self) -> list[int]:
        """All its operations in order."""
        added = None if self.addition is None else self.addition[0]
        return sorted(i for i in (self.source, self.norm, added, self.activation) if i is not None)


@dataclass
class PassPlan:
    """What to run; see above.

    Attributes
    ----------
    groups : list of Group
    chunk : int
        Images at a time.
    workers : int
        Threads, each with an arena of its own.
    places : dict
        Of values: offset in the arena in bytes. A value from outside is laid out anew if it has a place.
    workspaces : dict
        By group: offset and shape of what it lays out for itself while it runs, for convolutions that do.
    arena_bytes : int
    """

    groups: list[Group]
    chunk: int = 1
    workers: int = 1
    places: dict[Ref, int] = field(default_factory=dict)
    workspaces: dict[int, tuple[int, Shape]] = field(default_factory=dict)
    arena_bytes: int = 0


def plan(
    ops: Sequence[Op], outside: Sequence[Shape], wanted: Iterable[int], batch: int, item: int, threads: int
) -> PassPlan:
    """PassPlan a pass.

    Parameters
    ----------
    ops : sequence of Op
        In an order in which they can run. Those that run on the whole batch are left out.
    outside : sequence of tuple of int
        (C, H, W) of the arrays from outside.
    wanted : iterable of int
        Operations whose results are asked for, or read by those on the whole batch. The others run too, as they would
        one by one.
    batch : int
        Images.
    item : int
        Bytes of a number.
    threads : int
        At most so many workers.
    """
    made = PassPlan(_groups(ops, set(wanted)))
    shapes = {i: op.shape for i, op in enumerate(ops)} | {-1 - i: shape for i, shape in enumerate(outside)}
    little = batch * sum(math.prod(op.shape) for op in ops if op.op not in WHOLE) < SERIAL_ELEMENTS
    made.workers = 1 if little else max(1, min(threads, batch))
    _place(made, ops, shapes, 1, item, with_workspaces=False)
    made.chunk = max(1, min(batch // (2 * made.workers), CACHE_BYTES // max(made.arena_bytes, 1)))
    _place(made, ops, shapes, made.chunk, item, with_workspaces=True)
    return made


def needs_patches(op: Op) -> bool:
    """Whether a convolution is a product with patches: neither depthwise nor pixel by pixel."""
    if op.op != "conv2d":
        return False
    weight, stride, padding = op.detail[:3]
    plain = weight[2:] == (1, 1) and stride == (1, 1) and padding == ((0, 0), (0, 0))
    return not plain and not is_depthwise(op)


def maps_read(group: Group, ops: Sequence[Op]) -> list[Ref]:
    """The values that a group reads in their places; patches are taken from an array from outside as it is."""
    added = [] if group.addition is None else [group.addition[1]]
    if group.source is not None and needs_patches(ops[group.source]) and group.reads[0] < 0:
        return added
    return [*group.reads, *added]


def is_depthwise(op: Op) -> bool:
    """Whether each channel of a convolution is for itself."""
    return op.op == "conv2d" and op.detail[4] > 1


def _groups(ops: Sequence[Op], wanted: set[int]) -> list[Group]:
    readers: dict[Ref, list[int]] = {}
    streamed = [(i, op) for i, op in enumerate(ops) if op.op not in WHOLE]
    for i, op in streamed:
        for ref in op.operands:
            readers.setdefault(ref, []).append(i)
    groups: list[Group] = []
    taken: set[int] = set()
    there = {ref for ref in readers if ref < 0}
    for i, op in streamed:
        if i in taken:
            continue
        operands = op.operands
        latest, previous, reader = 0, i, _sole_reader(i, readers, wanted)
        group = Group(i, list(operands), i)
        if _order(op.op) is not None:  # on a copy of its first operand
            group.source, group.reads = None, [operands[0]]
            previous, reader = operands[0], i
        while reader is not None and (order := _order(ops[reader].op)) is not None and order > latest:
            if order == 2:
                a, b = ops[reader].operands
                other = b if a == previous else a
                if other not in there:
                    break
                group.addition = reader, other
            elif order == 1:
                group.norm = reader
            else:
                group.activation = reader
            latest, group.result, previous = order, reader, reader
            taken.add(reader)
            reader = _sole_reader(reader, readers, wanted)
        there.add(group.result)
        groups.append(group)
    return groups


def _order(op: str) -> int | None:
    """The place of an operation among those in place of a group; None for a source."""
    if op in ACTIVATIONS:
        return 3
    return {"batch_norm": 1, "add": 2}.get(op)


def _sole_reader(value: int, readers: dict[Ref, list[int]], wanted: set[int]) -> int | None:
    found = readers.get(value, [])
    return found[0] if len(found) == 1 and value not in wanted else None


def _place(
    made: PassPlan, ops: Sequence[Op], shapes: dict[Ref, Shape], chunk: int, item: int, *, with_workspaces: bool
) -> None:
    """Fill in ``places``, ``workspaces`` and ``arena_bytes`` for so many images at a time."""
    spans: dict[Ref, tuple[int, int]] = {}  # by value: the first and the last group that it is needed in
    workspaces: dict[int, Shape] = {}
    for g, group in enumerate(made.groups):
        if with_workspaces and (shape := _workspace(group, ops, chunk, item)) is not None:
            workspaces[g] = shape
        for ref in maps_read(group, ops):
            spans[ref] = (spans[ref][0] if ref in spans else g, g)
        spans[group.result] = (g, g)
    items: list[tuple[int, int, int, Ref | None, int]] = [
        (_aligned(chunk * math.prod(shapes[ref]) * item), *span, ref, -1) for ref, span in spans.items()
    ]
    items += [(_aligned(math.prod(shape) * item), g, g, None, g) for g, shape in workspaces.items()]
    items.sort(key=lambda entry: (-entry[0], entry[1], entry[4]))
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
    made.places, made.workspaces, made.arena_bytes = {}, {}, 0
    for size, first, last, value, g in items:
        offset = 0
        for start, end, begins, ends in placed:  # in order of their offsets
            if begins > last or ends < first:
                continue
            if start - offset >= size:
                break
            offset = max(offset, end)
        placed.append((offset, offset + size, first, last))
        placed.sort()
        made.arena_bytes = max(made.arena_bytes, offset + size)
        if value is None:
            made.workspaces[g] = offset, workspaces[g]
        else:
            made.places[value] = offset


def _workspace(group: Group, ops: Sequence[Op], chunk: int, item: int) -> Shape | None:
    """What a group lays out while it runs: patches (rows, W_out, K), or a depthwise weight (k_h, k_w, C)."""
    if group.source is None or ops[group.source].op != "conv2d":
        return None
    op = ops[group.source]
    C_out, C_in, k_h, k_w = op.detail[0]
    if is_depthwise(op):
        return k_h, k_w, C_out
    if not needs_patches(op):
        return None
    K = C_in * k_h * k_w
    W_out = op.shape[2]
    rows = max(PATCH_BYTES // (W_out * K * item), -(-PATCHES // W_out))
    return min(rows, chunk * op.shape[1]), W_out, K


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def labels(made: PassPlan, ops: Sequence[Op]) -> Counter[str]:
    """How many groups there are of each kind, such as ``conv2d + batch_norm + relu6``."""
    return Counter(" + ".join(ops[i].op for i in group.members()) for group in made.groups)
