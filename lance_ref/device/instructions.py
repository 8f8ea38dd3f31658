"""The instructions of a program: a segment forward, a segment backward, the loss, and the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lance_ref.device.arena import Array, Memory
from lance_ref.device.arithmetic import apply, pack
from lance_ref.device.graph import Node, Window
from lance_ref.device.layers import Layer, Pixels
from lance_ref.device.segments import Segment
from lance_ref.device.windows import Span, reach, size_of, whole
from lance_ref.engine.tensor import Shape


@dataclass(eq=False)
class SegmentPlan:
    """What the instructions of one segment share.

    Attributes
    ----------
    segment : Segment
    shapes : dict of int to (C, H, W)
        Of whole maps.
    layers : dict of Node to Layer
    maps : dict of int to Array
        Where whole maps and maps of a tile lie; map 0 is the image.
    channels : dict of int to Array
        Where channels of inner maps lie. A map that is missing is changed in place of the one before it.
    masks : dict of Node to Array
        What an activation, dropout or pooling keeps for the backward pass.
    gradients : dict of int to Array
        Of whole maps.
    steps : dict of int to Array
        Gradients of channels of inner maps.
    pixels : Pixels or None
        How the image is read, if it is stored as bytes.
    draws : Array, optional
        The counter of random numbers.
    """

    segment: Segment
    shapes: Mapping[int, Shape]
    layers: Mapping[Node, Layer]
    maps: Mapping[int, Array]
    channels: dict[int, Array] = field(default_factory=dict)
    masks: dict[Node, Array] = field(default_factory=dict)
    gradients: Mapping[int, Array] = field(default_factory=dict)
    steps: dict[int, Array] = field(default_factory=dict)
    pixels: Pixels | None = None
    draws: Array | None = None
    is_first_use: dict[int, bool] = field(default_factory=dict)

    def size(self, number: int) -> tuple[int, int]:
        """Height and width of a whole map."""
        return self.shapes[number][1], self.shapes[number][2]

    def layer(self, node: Node | None) -> Layer | None:
        """The layer of a node, None for no node."""
        return None if node is None else self.layers.get(node)


Spans = Mapping[int, Span]
"""Which part of each map there is."""


@dataclass(eq=False)
class Forward:
    """One segment, from its source to its output."""

    plan: SegmentPlan
    spans: Spans

    @property
    def name(self) -> str:
        return f"forward {_title(self.plan.segment)}"

    @property
    def touches(self) -> list[Array]:
        """All arrays that it reads or writes."""
        p, segment = self.plan, self.plan.segment
        layers = [layer for layer in map(p.layer, segment.nodes) if layer is not None]
        found = [p.maps[segment.source], p.maps[segment.output], *p.channels.values(), *p.masks.values()]
        found += [] if segment.residual is None else [p.maps[segment.residual]]
        found += [] if p.draws is None else [p.draws]
        return found + [array for layer in layers for array in _forward_arrays(layer)]

    def run(self, m: Memory, training: bool = True) -> None:
        p, segment, spans = self.plan, self.plan.segment, self.spans
        x, out = self._map(m, segment.source), self._map(m, segment.output)
        head, tail = p.layer(segment.head), p.layer(segment.tail)
        if head is not None:
            _clear(m, head)
            for c in range(len(x)):
                head.look(m, c, x[c])
        for node in (*segment.body, segment.tail):
            layer = p.layer(node)
            if layer is not None:
                _clear(m, layer)
        self._begin(m, out, tail)
        for c in range(p.shapes[segment.head.output if segment.head else segment.source][0]):
            h = self._first(m, c, x, head)
            for node in segment.body:
                h = self._act(m, node, c, h, training)
            if tail is None:
                out[c] += h
            else:
                tail.look(m, c, h)
                tail.use(m, c, h, out, spans[segment.end], spans[_source(segment)])
        if tail is not None:
            tail.finish(m, out)
        for node in segment.post:
            for c in range(len(out)):
                self._act(m, node, c, out[c], training)

    def _map(self, m: Memory, number: int) -> np.ndarray:
        """The part of a whole map that there is to read or to write; a view, except of an image in bytes."""
        p, array = self.plan, self.plan.maps[number]
        (top, bottom), (left, right) = self.spans[number]
        if number == 0 and p.pixels is not None:
            return p.pixels.read(m[array][top:bottom, left:right])
        if array.kind == "tiles":
            return m.view(array, (p.shapes[number][0], bottom - top, right - left))
        return m[array][:, top:bottom, left:right]

    def _begin(self, m: Memory, out: np.ndarray, tail: Layer | None) -> None:
        """The output before the first channel: what is added to it, and the tail's shift."""
        p, segment = self.plan, self.plan.segment
        if segment.residual is None:
            out[:] = 0
        elif p.maps[segment.residual] is not p.maps[segment.output]:
            out[:] = self._residual(m, segment.residual)
        if tail is not None:
            out += tail.shift(m)[:, None, None]

    def _residual(self, m: Memory, number: int) -> np.ndarray:
        whole_part, (top, _), (left, _) = self._map(m, number), *self.spans[number]
        (first, end), (begin, stop) = self.spans[self.plan.segment.output]
        return whole_part[:, first - top : end - top, begin - left : stop - left]

    def _first(self, m: Memory, c: int, x: np.ndarray, head: Layer | None) -> np.ndarray:
        """Channel ``c`` of the head, or of the source."""
        segment, spans = self.plan.segment, self.spans
        if head is None or segment.head is None:
            copy = self.plan.channels.get(segment.source)
            if copy is None:
                return x[c]
            h = m.view(copy, x[c].shape)
            h[:] = x[c]
            return h
        h = m.view(self.plan.channels[segment.head.output], size_of(spans[segment.head.output]))
        head.make(m, c, x, h, spans[segment.head.output], spans[segment.source])
        return h

    def _act(self, m: Memory, node: Node, c: int, h: np.ndarray, training: bool) -> np.ndarray:
        """One operation on channel ``c``: in place, or into the channel's next place."""
        p = self.plan
        mask = m[p.masks[node]][c] if node in p.masks else None
        if node.op in _IN_PLACE:
            return _IN_PLACE[node.op](h, mask)
        if node.op == "dropout":
            if training:
                assert p.draws is not None
                kept = draw(m[p.draws], h.size, float(node.attributes["p"])).reshape(h.shape)
                h *= kept * h.dtype.type(_raised(node))
                if mask is not None:
                    pack(mask, kept)
            return h
        source, output = self.spans[node.inputs[0]], self.spans[node.output]
        out = m.view(p.channels[node.output], size_of(output))
        if node.conv is not None:
            layer = p.layers[node]
            if layer.keeps is not None:
                layer.keeps.add(m, c, h)
            layer.make(m, c, _Only(c, h), out, output, source)  # type: ignore[arg-type]
        else:
            places = None if mask is None else mask.reshape(out.shape)
            pool(node, h, out, output, source, p.size(node.inputs[0]), places)
        return out


class _Only:
    """Channel ``c`` of a map, where only that exists: ``[c : c + 1]`` is all that a depthwise convolution reads."""

    def __init__(self, c: int, channel: np.ndarray) -> None:
        self.c, self.channel = c, channel

    def __getitem__(self, channels: slice) -> np.ndarray:
        assert channels == slice(self.c, self.c + 1)
        return self.channel[None]


@dataclass(eq=False)
class Backward:
    """One segment, from the gradient of its output to that of its source."""

    plan: SegmentPlan
    needs: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        return f"backward {_title(self.plan.segment)}"

    @property
    def touches(self) -> list[Array]:
        """All arrays that it reads or writes."""
        p, segment = self.plan, self.plan.segment
        layers = [layer for layer in map(p.layer, segment.nodes) if layer is not None]
        found = [p.gradients[segment.output], *p.masks.values(), *p.steps.values()]
        found += [p.gradients[v] for v in (segment.source, segment.residual) if v is not None and v in p.gradients]
        return found + [array for layer in layers for array in _backward_arrays(layer)]

    def run(self, m: Memory) -> None:
        p, segment = self.plan, self.plan.segment
        g = m[p.gradients[segment.output]]
        for node in reversed(segment.post):
            for c in range(len(g)):
                self._act(m, node, c, g[c])
        if segment.residual is not None and segment.residual in p.gradients:
            self._give(m, segment.residual, g)
        head, tail = p.layer(segment.head), p.layer(segment.tail)
        for layer in map(p.layer, segment.nodes):
            if layer is not None and layer.keeps is not None:
                layer.keeps.prepare(m)
        if self._reaches(_source(segment)):
            self._channels(m, g, head, tail)
        if tail is not None:
            tail.learn(m, g, slice(0, len(g)))

    def _reaches(self, number: int) -> bool:
        """Whether the gradient of a map is wanted."""
        return number in self.needs

    def _channels(self, m: Memory, g: np.ndarray, head: Layer | None, tail: Layer | None) -> None:
        p, segment = self.plan, self.plan.segment
        start = segment.head.output if segment.head else segment.source
        source = p.gradients.get(segment.source)
        if source is not None and p.is_first_use[segment.source] and segment.residual != segment.source:
            m[source][:] = 0
        if head is not None and head.returned is not None:
            m[head.returned][:] = 0
        if tail is not None:
            tail.turn(m, g)
        for c in range(p.shapes[start][0]):
            if tail is None:
                h = g[c]
            else:
                h = m[p.steps[_source(segment)]]
                tail.use_back(m, c, g, h)
            for node in reversed(segment.body):
                h = self._act(m, node, c, h)
                if not self._reaches(node.inputs[0]):
                    break
            else:
                if head is None:
                    m[p.gradients[segment.source]][c] += h
                else:
                    if source is not None:
                        head.make_back(m, c, h, m[source])
                    head.learn(m, h[None], slice(c, c + 1))
        if head is not None and source is not None:
            head.finish_back(m, m[source])

    def _give(self, m: Memory, number: int, g: np.ndarray) -> None:
        """The gradient of what was added."""
        target = m[self.plan.gradients[number]]
        if self.plan.is_first_use[number]:
            target[:] = g
        else:
            target += g

    def _act(self, m: Memory, node: Node, c: int, g: np.ndarray) -> np.ndarray:
        """The gradient of channel ``c`` of what an operation read."""
        p = self.plan
        reaches = self._reaches(node.inputs[0])
        mask = m[p.masks[node]][c] if node in p.masks else None
        if node.op == "hardswish":
            assert mask is not None
            g *= mask.reshape(g.shape)
            return g
        if mask is not None and node.op != "max_pool":
            apply(mask, g, _raised(node) if node.op == "dropout" else 1.0)
            return g
        layer = p.layers.get(node)
        out = m[p.steps[node.inputs[0]]] if reaches else g
        if layer is not None:
            if reaches:
                out[:] = 0
                layer.make_back(m, c, g, _Only(c, out))  # type: ignore[arg-type]
            layer.learn(m, g[None], slice(c, c + 1))
        elif reaches:
            pool_back(node, g, out, None if mask is None else mask.reshape(g.shape))
        return out


@dataclass(eq=False)
class Loss:
    """Cross-entropy of the logits, whose gradient takes their place."""

    logits: Array
    gradient: Array
    name: str = "loss"

    @property
    def touches(self) -> list[Array]:
        return [self.logits, self.gradient]

    def run(self, m: Memory, label: int, images: int) -> float:
        """The loss of one image; its gradient is divided by the number of images."""
        z = m[self.logits].reshape(-1)
        z -= z.max()
        loss = np.log(np.exp(z).sum()) - z[label]
        p = m[self.gradient].reshape(-1)
        np.exp(z, out=p)
        p /= p.sum()
        p[label] -= 1
        p /= p.dtype.type(images)
        return float(loss)


@dataclass(eq=False)
class Update:
    """SGD: every array that trains loses the rate times its gradient, or with momentum times its velocity."""

    pairs: Sequence[tuple[Array, Array]]
    momentum: float = 0.0
    name: str = "update"

    @property
    def touches(self) -> list[Array]:
        return [array for pair in self.pairs for array in pair]

    def begin(self, m: Memory) -> None:
        """Before the first image of an update: gradients start from momentum times the last."""
        for _, gradient in self.pairs:
            g = m[gradient]
            g *= g.dtype.type(self.momentum)

    def run(self, m: Memory) -> None:
        for weight, gradient in self.pairs:
            m[weight][:] -= m[gradient].dtype.type(m.rate) * m[gradient]


# ---- operations on one channel ------------------------------------------------------------------


def _relu(h: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is not None:
        pack(mask, h > 0)
    return np.maximum(h, 0, out=h)


def _relu6(h: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is not None:
        pack(mask, (h > 0) & (h < 6))
    return np.clip(h, 0, 6, out=h)


def _hardswish(h: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """x · relu6(x + 3) / 6; its slope is kept as it is, a number for each element."""
    if mask is not None:
        slope = np.where(h <= -3, 0, np.where(h >= 3, 1, (2 * h + 3) / 6))
        mask[:] = slope.reshape(mask.shape)
    h *= np.clip(h + 3, 0, 6) / 6
    return h


_IN_PLACE: dict[str, Any] = {"relu": _relu, "relu6": _relu6, "hardswish": _hardswish}


def _raised(node: Node) -> float:
    """What dropout multiplies with what it keeps."""
    p = float(node.attributes["p"])
    return 0.0 if p == 1 else 1 / (1 - p)


def draw(counter: np.ndarray, count: int, p: float) -> np.ndarray:
    """Which of the next elements dropout keeps: pseudo-random numbers from a counter, in 32-bit integers.

    The counter is scrambled by the finalizer of MurmurHash3 (Appleby); the same few lines run in C.
    """
    x = np.arange(count, dtype=np.uint32) + counter
    counter += np.uint32(count)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return np.asarray(x >= np.uint32(min(p * 2.0**32, 2.0**32 - 1)))


def adaptive(n: int, m: int) -> Iterator[slice]:
    """The windows of adaptive pooling along one axis: floor(i·n/m) up to ceil((i + 1)·n/m)."""
    for i in range(m):
        yield slice(i * n // m, -(-(i + 1) * n // m))


def pool(
    node: Node, h: np.ndarray, out: np.ndarray, output: Span, source: Span, size: tuple[int, int], place: Any
) -> None:
    """Pooling of one channel; ``place`` becomes the place of each maximum in its window."""
    if node.op == "adaptive_pool":
        for i, rows in enumerate(adaptive(h.shape[0], out.shape[0])):
            for j, columns in enumerate(adaptive(h.shape[1], out.shape[1])):
                out[i, j] = h[rows, columns].mean()
        return
    assert node.window is not None
    if node.op == "max_pool":
        out[:] = -np.inf
        for p, q, written, read in reach(node.window, output, source).taps:
            larger = h[read] > out[written]
            if place is not None:
                np.copyto(place[written], p * node.window.kernel[1] + q, where=larger)
            np.maximum(out[written], h[read], out=out[written])
        return
    out[:] = 0
    for _, _, written, read in reach(node.window, output, source).taps:
        out[written] += h[read]
    out /= divisors(node, output, size).astype(out.dtype)


def pool_back(node: Node, g: np.ndarray, gradient: np.ndarray, place: Any) -> None:
    """The gradient of what pooling read, of one whole channel."""
    gradient[:] = 0
    if node.op == "adaptive_pool":
        for i, rows in enumerate(adaptive(gradient.shape[0], g.shape[0])):
            for j, columns in enumerate(adaptive(gradient.shape[1], g.shape[1])):
                part = gradient[rows, columns]
                part += g[i, j] / g.dtype.type(part.size)
        return
    assert node.window is not None
    if node.op == "avg_pool":
        g = g / divisors(node, whole(g.shape), gradient.shape).astype(g.dtype)
    for p, q, written, read in reach(node.window, whole(g.shape), whole(gradient.shape)).taps:
        if node.op == "avg_pool":
            gradient[read] += g[written]
        else:
            gradient[read] += g[written] * (place[written] == p * node.window.kernel[1] + q)


def divisors(node: Node, output: Span, size: tuple[int, int]) -> np.ndarray:
    """How many numbers each mean of average pooling is over."""
    window, attributes = node.window, node.attributes
    assert isinstance(window, Window)
    counts = []
    for axis in (0, 1):
        first = np.arange(*output[axis]) * window.stride[axis] - window.before[axis]
        padding = window.before[axis] if attributes["count_include_pad"] else 0
        end = np.minimum(first + window.kernel[axis], size[axis] + padding)
        counts.append(end - np.maximum(first, -padding))
    return np.asarray(np.outer(*counts))


# ---- names and arrays ---------------------------------------------------------------------------


def _title(segment: Segment) -> str:
    """The layers of a segment."""
    paths = [node.path for node in segment.nodes if node.conv is not None]
    return " ".join(paths) or " ".join(node.op for node in segment.everything)


def _source(segment: Segment) -> int:
    """The map that the tail reads."""
    inner = [node.output for node in (segment.head, *segment.body) if node is not None]
    return inner[-1] if inner else segment.source


def _clear(m: Memory, layer: Layer) -> None:
    """Cores and projections are sums over the channels."""
    if layer.keeps is not None and layer.keeps.basis is not None:
        m[layer.keeps.array][:] = 0
    if layer.projected is not None:
        m[layer.projected][:] = 0


def _forward_arrays(layer: Layer) -> list[Array]:
    found = [*layer.trained, *([] if layer.projected is None else [layer.projected])]
    if layer.keeps is not None:
        found += [layer.keeps.array, *layer.keeps.scratch[:1]]
    return found


def _backward_arrays(layer: Layer) -> list[Array]:
    found = [*layer.trained, *layer.gradients.values(), *([] if layer.returned is None else [layer.returned])]
    if layer.keeps is not None:
        found += [layer.keeps.array, *layer.keeps.scratch]
    return found
