"""Segments of a network, and the part of each map that a tile needs.

A segment reads one whole map and writes one. It may begin with a convolution that makes one channel from all channels
of the source (its head) and may end with one that spreads one channel over all channels of the output (its tail).
Between them a single channel exists at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from analysis.device.operations import ELEMENTWISE, Network, Operation, Sliding

Part = tuple[int, int]
"""First place and end, along one axis."""


@dataclass(eq=False)
class Segment:
    """One segment.

    Attributes
    ----------
    source : int
        The map that it reads.
    head, tail : Operation, optional
    body : list of Operation
        On one channel at a time.
    added : int, optional
        A map that is added to the output.
    sum : Operation, optional
        That addition.
    after : list of Operation
        On the whole output, in place.
    """

    source: int
    head: Operation | None = None
    body: list[Operation] = field(default_factory=list)
    tail: Operation | None = None
    added: int | None = None
    sum: Operation | None = None
    after: list[Operation] = field(default_factory=list)

    @property
    def inner(self) -> list[Operation]:
        """Head, body and tail."""
        return [operation for operation in (self.head, *self.body, self.tail) if operation is not None]

    @property
    def operations(self) -> list[Operation]:
        """All, in order."""
        return [*self.inner, *([] if self.sum is None else [self.sum]), *self.after]

    @property
    def output(self) -> int:
        """The map that it writes."""
        return self.operations[-1].output

    @property
    def reads(self) -> list[int]:
        """The whole maps that it reads."""
        return [self.source] if self.added is None else [self.source, self.added]


def split(net: Network, heads: Sequence[bool]) -> list[Segment]:
    """The segments in the order in which they are complete.

    Parameters
    ----------
    net : Network
    heads : sequence of bool
        For each convolution that mixes channels, in order, whether it is a head; the others are tails.

    Raises
    ------
    ValueError
        If there is not one of these for each such convolution.
    """
    mixing = [operation for operation in net.operations if operation.mixes]
    if len(heads) != len(mixing):
        raise ValueError(f"heads has {len(heads)} values, expected {len(mixing)}, one for each convolution that mixes")
    is_head = dict(zip((operation.output for operation in mixing), heads, strict=True))
    uses, ends = net.uses, _Ends()
    by_output: dict[int, Segment] = {}
    for time, operation in enumerate(net.operations):
        if operation.kind == "add":
            segment = _add(operation, time, by_output, uses, ends)
        else:
            segment = _place(operation, time, by_output.get(operation.inputs[0]), is_head, uses, ends)
        by_output[operation.output] = segment
        if segment.tail is operation:
            ends.end(segment, time, 1)
        elif uses[operation.output] != 1:
            ends.end(segment, time, 2)
    return ends.in_order()


class _Ends:
    """When each segment was complete: at an operation, and which of the events there."""

    def __init__(self) -> None:
        self.at: dict[Segment, tuple[int, int]] = {}

    def end(self, segment: Segment, time: int, event: int) -> None:
        self.at.setdefault(segment, (time, event))

    def in_order(self) -> list[Segment]:
        return sorted(self.at, key=lambda segment: self.at[segment])


def _place(
    operation: Operation, time: int, before: Segment | None, is_head: dict[int, bool], uses: dict[int, int], ends: _Ends
) -> Segment:
    """The segment of an operation with one input, which ``before`` made."""
    source = operation.inputs[0]
    runs_on = before is not None and before not in ends.at  # its last channel has not become a whole map
    if operation.mixes and is_head[operation.output]:
        if before is not None:
            ends.end(before, time, 0)
        return Segment(source, head=operation)
    segment = before if before is not None and runs_on else Segment(source)
    if operation.mixes:
        segment.tail = operation
    elif operation.kind in ELEMENTWISE and not runs_on and before is not None and uses[source] == 1:
        before.after.append(operation)
        return before
    else:
        segment.body.append(operation)
    return segment


def _add(operation: Operation, time: int, by_output: dict[int, Segment], uses: dict[int, int], ends: _Ends) -> Segment:
    """An addition goes to the segment that makes the later of the two maps, if nothing else reads that map."""
    made = []
    for i, number in enumerate(operation.inputs):
        segment = by_output.get(number)
        if segment is not None:
            ends.end(segment, time, i)
        made.append((number, segment, (-1, 0) if segment is None else ends.at[segment]))
    (first, _, _), (second, later, _) = sorted(made, key=lambda one: one[2])
    if later is not None and first != second and uses[second] == 1 and later.sum is None and not later.after:
        later.added, later.sum = first, operation
        return later
    segment = Segment(second, added=first, sum=operation)
    ends.end(segment, time, 3)
    return segment


def reads_of(sliding: Sliding, axis: int, part: Part, n: int) -> Part:
    """Along one axis the places of an input of ``n`` that a part of the output sees; at least one of them.

    >>> reads_of(Sliding((3, 3), (2, 2), (1, 1), (1, 1)), 0, (2, 4), 8)
    (3, 8)
    """
    first = part[0] * sliding.stride[axis] - sliding.before[axis]
    span = (part[1] - 1 - part[0]) * sliding.stride[axis] + sliding.dilation[axis] * (sliding.kernel[axis] - 1) + 1
    low = max(0, min(first, n - 1))
    return low, min(n, max(first + span, low + 1))


def tile_parts(net: Network, tiled: Sequence[Segment], axis: int, tile: int) -> list[dict[int, Part]]:
    """For each row of tiles (or column, by ``axis``) the part of every map that it computes or reads."""
    output = tiled[-1].output
    n = net.maps[output][1 + axis]
    return [_parts(net, tiled, axis, {output: (at, min(at + tile, n))}) for at in range(0, n, tile)]


def _parts(net: Network, tiled: Sequence[Segment], axis: int, parts: dict[int, Part]) -> dict[int, Part]:
    for segment in reversed(tiled):
        for operation in reversed(segment.operations):
            written = parts[operation.output]
            for number in operation.inputs:
                low, high = written
                if operation.sliding is not None:
                    low, high = reads_of(operation.sliding, axis, written, net.maps[number][1 + axis])
                known = parts.get(number, (low, high))
                parts[number] = min(known[0], low), max(known[1], high)
    return parts
