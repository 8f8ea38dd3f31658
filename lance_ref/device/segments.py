"""Segments: stretches of a network whose inner maps exist one channel at a time.

A segment reads one whole map and writes one whole map. Its *head* is a convolution that makes a channel from all
channels of the source; its *body* works on each channel alone (activations, depthwise convolutions, pooling); its
*tail* is a convolution that adds what a channel contributes to all channels of the output. Between head and tail there
is one channel at a time: an inverted residual block is such a segment. Head and tail may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lance_ref.device.graph import ACTIVATIONS, Graph, Node

ELEMENTWISE = (*ACTIVATIONS, "dropout")


@dataclass(eq=False)
class Segment:
    """One segment.

    Attributes
    ----------
    source : int
        The map that it reads.
    head, tail : Node, optional
        Convolutions.
    body : list of Node
    residual : int, optional
        A map that is added to the output.
    post : list of Node
        Activations of the whole output, in place.
    """

    source: int
    head: Node | None = None
    body: list[Node] = field(default_factory=list)
    tail: Node | None = None
    residual: int | None = None
    sum: Node | None = None
    post: list[Node] = field(default_factory=list)

    @property
    def nodes(self) -> list[Node]:
        """All operations but the addition and ``post``, in order."""
        return [node for node in (self.head, *self.body, self.tail) if node is not None]

    @property
    def end(self) -> int:
        """The map that the last of these gives."""
        nodes = self.nodes
        return nodes[-1].output if nodes else self.source

    @property
    def output(self) -> int:
        """The map that it writes."""
        if self.post:
            return self.post[-1].output
        return self.end if self.sum is None else self.sum.output

    @property
    def everything(self) -> list[Node]:
        """All operations, in order."""
        return [*self.nodes, *([] if self.sum is None else [self.sum]), *self.post]

    @property
    def trains(self) -> bool:
        """Whether a layer of it trains."""
        return any(node.conv is not None and node.conv.trains for node in self.nodes)


def mixes(node: Node) -> bool:
    """Whether it is a convolution whose channels look at several channels."""
    return node.conv is not None and not node.conv.is_depthwise


def convolutions(graph: Graph) -> list[Node]:
    """Those that can be a head or a tail."""
    return [node for node in graph.nodes if mixes(node)]


def first_roles(graph: Graph) -> dict[Node, bool]:
    """Whether each convolution is a head, chosen greedily: those before the largest maps."""
    users = consumers(graph)
    chains = []
    for node in convolutions(graph):
        size, at = 0, node
        while True:
            size = max(size, _numbers(graph, at.output))
            following = users.get(at.output, [])
            if len(following) != 1 or following[0].op == "add":
                break
            at = following[0]
            if mixes(at):
                chains.append((size, node, at))
                break
    heads: set[Node] = set()
    tails: set[Node] = set()
    for _, head, tail in sorted(chains, key=lambda chain: -chain[0]):
        if head not in tails and tail not in heads:
            heads.add(head)
            tails.add(tail)
    return {node: node in heads for node in convolutions(graph)}


def segments(graph: Graph, heads: Mapping[Node, bool]) -> list[Segment]:
    """The network as segments, in order of execution.

    Parameters
    ----------
    graph : Graph
    heads : mapping of Node to bool
        For each convolution whether it makes channels (a head) or uses them up (a tail).
    """
    return _Splitter(graph, heads).split()


class _Splitter:
    def __init__(self, graph: Graph, heads: Mapping[Node, bool]) -> None:
        self.graph, self.heads = graph, heads
        self.users = consumers(graph)
        self.open: dict[int, Segment] = {}  # by the map that its last operation gives
        self.closed: list[Segment] = []

    def split(self) -> list[Segment]:
        for node in self.graph.nodes:
            self._add(node)
        for segment in list(self.open.values()):
            self._close(segment)
        return self.closed

    def _add(self, node: Node) -> None:
        if node.op == "add":
            return self._sum(node)
        source = node.inputs[0]
        segment = self.open.pop(source, None)
        if mixes(node) and self.heads[node]:
            if segment is not None:
                self._close(segment)
            segment = Segment(source, head=node)
        elif mixes(node):
            segment = segment or Segment(source)
            segment.tail = node
            return self._close(segment)
        else:
            before = self._latest(source)
            if segment is None and node.op in ELEMENTWISE and before is not None:
                before.post.append(node)
                return None
            segment = segment or Segment(source)
            segment.body.append(node)
        if len(self.users.get(node.output, [])) == 1:
            self.open[node.output] = segment
        else:
            self._close(segment)
        return None

    def _sum(self, node: Node) -> None:
        for source in node.inputs:
            if source in self.open:
                self._close(self.open.pop(source))
        places = {segment.output: i for i, segment in enumerate(self.closed)}
        a, b = sorted(node.inputs, key=lambda source: places.get(source, -1))
        latest = self._latest(b)
        # The later of the two is added to as it is computed, if nothing else wants it.
        if latest is not None and a != b and latest.sum is None and not latest.post and latest.nodes:
            latest.residual, latest.sum = a, node
        else:
            self._close(Segment(b, residual=a, sum=node))

    def _latest(self, source: int) -> Segment | None:
        """The segment that gives this map, if only one operation uses it."""
        made = [segment for segment in self.closed if segment.output == source]
        return made[-1] if made and len(self.users.get(source, [])) == 1 else None

    def _close(self, segment: Segment) -> None:
        self.closed.append(segment)


def consumers(graph: Graph) -> dict[int, list[Node]]:
    """The operations that use each map."""
    users: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for source in node.inputs:
            users.setdefault(source, []).append(node)
    return users


def _numbers(graph: Graph, number: int) -> int:
    C, H, W = graph.shapes[number]
    return C * H * W
