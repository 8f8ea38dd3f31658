"""Tiles: which part of every map a tile of the output needs, and what the overlap of these parts costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lance_ref.device.graph import Graph, Node
from lance_ref.device.segments import Segment
from lance_ref.device.windows import needed

Parts = dict[int, tuple[int, int]]
"""Along one axis, the part of each map."""


class NotTiledError(ValueError):
    """These segments cannot run tile by tile."""


def parts_along(graph: Graph, split: Sequence[Segment], tiled: int, axis: int, tile: int) -> list[Parts]:
    """For each tile along one axis, the part of every map that it needs, from the last output back to the image.

    Raises
    ------
    NotTiledError
        If the segments that are to run in tiles train, or something after them needs what they leave inside.
    """
    inside = {node.output for s in split[:tiled] for node in s.everything} - {split[tiled - 1].output}
    for segment in split[tiled:]:
        if {segment.source, segment.residual} & inside:
            raise NotTiledError(f"a map that {segment_name(segment)} needs is made in tiles")
    for segment in split[:tiled]:
        is_whole = any(
            n.op in ("adaptive_pool", "dropout") or (n.conv and n.conv.is_linear) for n in segment.everything
        )
        if segment.trains or is_whole:
            raise NotTiledError(f"{segment_name(segment)} cannot run in tiles")
    nodes = [node for segment in reversed(split[:tiled]) for node in reversed(segment.everything)]
    last = split[tiled - 1].output
    n = graph.shapes[last][1 + axis]
    found = []
    for start in range(0, n, tile):
        part: Parts = {last: (start, min(start + tile, n))}
        for node in nodes:
            window = node.conv.window if node.conv is not None else node.window
            for number in node.inputs:
                low, high = part[node.output]
                if window is not None:
                    low, high = needed(window, axis, (low, high), graph.shapes[number][1 + axis])
                before = part.get(number, (low, high))
                part[number] = min(low, before[0]), max(high, before[1])
        found.append(part)
    return found


def recomputed_macs(graph: Graph, tiled: Sequence[Segment], rows: Sequence[Parts], columns: Sequence[Parts]) -> int:
    """Multiply-adds of halos that several tiles compute."""
    macs = 0
    for segment in tiled:
        for node in segment.nodes:
            if node.conv is not None:
                places = math.prod(sum(p[node.output][1] - p[node.output][0] for p in each) for each in (rows, columns))
                macs += node.conv.weight.size * (places - math.prod(graph.shapes[node.output][1:]))
    return macs


def segment_name(segment: Segment) -> str:
    """What arrays and errors call a segment: its last layer, or its last operation where it has no layer."""
    last = segment.everything[-1]
    convs = [node for node in segment.nodes if node.conv is not None]
    return node_name(convs[-1] if convs else last)


def node_name(node: Node) -> str:
    """What arrays and errors call a node: a layer by its path, an operation by its name and its output."""
    return f"{node.path or node.op}" if node.conv is not None else f"{node.op} {node.output}"
