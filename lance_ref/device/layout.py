"""From segments to instructions and arrays: what is alive when, and where it lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from lance_ref.device.arena import PERSISTENT, Array, live_bytes, place
from lance_ref.device.graph import Conv, Graph, Node
from lance_ref.device.instructions import Backward, Forward, Loss, SegmentPlan, Update
from lance_ref.device.layers import Core, Input, Layer, Pixels
from lance_ref.device.segments import ELEMENTWISE, Segment, segments
from lance_ref.device.tiles import Parts, node_name, parts_along, recomputed_macs, segment_name
from lance_ref.device.windows import whole
from lance_ref.engine.tensor import Shape

Factors = tuple[np.ndarray | None, ...]
"""U of channels or features, of height and of width; None for a mode left alone."""


@dataclass(frozen=True)
class Recipe:
    """How a step trains, whatever it is compiled to.

    Attributes
    ----------
    factors : mapping of layer path to Factors
        Layers that keep a core. Other layers whose weight trains keep their input.
    in_subspace : bool
        Whether D trains, in W = W_0 + D ×₂ U, where that is smaller than W.
    forward : {"auto", "factored", "merged"}
        How D comes into the forward pass.
    update : {"batch", "image"}
        Whether gradients are added up over the images of a step, or every image is an update.
    momentum : float
        Of SGD.
    head : str
        Path of the classifier.
    pixels : Pixels or None
        How an image in bytes is read; None for images of floats.
    """

    factors: Mapping[str, Factors]
    in_subspace: bool
    forward: str
    update: str
    momentum: float
    head: str
    pixels: Pixels | None

    @property
    def has_sums(self) -> bool:
        """Whether there is an array beside each one that trains: its gradient, or with momentum its velocity."""
        return self.update == "batch" or self.momentum > 0


@dataclass(frozen=True)
class Choice:
    """What the compiler is free to choose.

    Attributes
    ----------
    heads : mapping of Node to bool
        See :func:`lance_ref.device.segments.segments`.
    tiled : int
        How many segments, from the first, run tile by tile; 0 for none.
    tile : pair of int
        Height and width of a tile of the last of these segments' output.
    """

    heads: Mapping[Node, bool]
    tiled: int = 0
    tile: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class DeviceLayout:
    """A step whose arrays have addresses.

    Attributes
    ----------
    tiled : list of SegmentPlan
        The segments that run tile by tile.
    rows, columns : list of dict of int to pair of int
        For each row of tiles, and each column of them, the part of every map.
    forward : list of Forward
        Those after the tiles.
    loss, backward, update
        The others, in order.
    arrays : list of Array
    times : list of str
        The title of each instruction, by the number in ``Array.first``.
    image, logits : Array
    layers : dict of str to Layer
        Those that train, by path.
    recomputed_macs : int
        Multiply-adds of halos that several tiles compute.
    """

    choice: Choice
    segments: list[Segment]
    tiled: list[SegmentPlan]
    rows: list[Parts]
    columns: list[Parts]
    forward: list[Forward]
    loss: Loss
    backward: list[Backward]
    update: Update | None
    arrays: list[Array]
    times: list[str]
    image: Array
    logits: Array
    layers: dict[str, Layer]
    recomputed_macs: int = 0
    ram_bytes: int = 0
    lower_bound_bytes: int = field(init=False)
    live: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.live = [int(n) for n in live_bytes(self.arrays, len(self.times))]
        self.lower_bound_bytes = max(self.live)

    @cached_property
    def tiles(self) -> list[list[Forward]]:
        """The instructions of each tile."""
        spans = [{m: (row[m], column[m]) for m in row} for row in self.rows for column in self.columns]
        return [[Forward(plan, part) for plan in self.tiled] for part in spans]

    def place(self) -> None:
        """Give every array its address."""
        self.ram_bytes = place(self.arrays)

    @property
    def ram(self) -> dict[str, int]:
        """Bytes by kind at the moment when most are alive."""
        peak = self.live.index(self.lower_bound_bytes)
        kinds: dict[str, int] = {}
        for array in self.arrays:
            if array.first <= peak <= array.last:
                kinds[array.kind] = kinds.get(array.kind, 0) + array.nbytes
        return kinds


def lay_out(graph: Graph, recipe: Recipe, choice: Choice, split: list[Segment] | None = None) -> DeviceLayout:
    """The layout of a choice; :meth:`DeviceLayout.place` gives addresses. ``split``: its segments, if they are known.

    Raises
    ------
    NotTiledError
        If the segments that are to run in tiles train, or something after them needs what they leave inside.
    """
    return _Builder(graph, recipe, choice, split or segments(graph, choice.heads)).build()


class _Builder:
    def __init__(self, graph: Graph, recipe: Recipe, choice: Choice, split: list[Segment]) -> None:
        self.graph, self.recipe, self.choice = graph, recipe, choice
        self.dtype = graph.dtype
        self.segments = split
        self.largest: dict[int, tuple[int, ...]] = {}
        self.arrays: list[Array] = []
        self.trained: dict[str, Layer] = {}
        self.layers: dict[Node, Layer] = {}
        self.maps: dict[int, Array] = {}
        self.gradients: dict[int, Array] = {}
        self.draws: Array | None = None

    def build(self) -> DeviceLayout:
        g, n = self.graph, self.choice.tiled
        tiled = self.segments[:n]
        tile = enumerate(self.choice.tile)
        rows, columns = (parts_along(g, self.segments, n, axis, cut) if n else [] for axis, cut in tile)
        for m in rows[0] if n else ():
            self.largest[m] = tuple(max(part[m][1] - part[m][0] for part in parts) for parts in (rows, columns))
        C, H, W = g.shapes[0]
        in_bytes = self.recipe.pixels is not None
        if in_bytes:
            image = self._array("image", (H, W, C), np.uint8, "image")
        else:
            image = self._array("image", (C, H, W), self.dtype, "image")
        self.maps[0] = image
        if any(node.op == "dropout" for node in g.nodes):
            self.draws = self._array("counter of random numbers", (1,), np.uint32, "trained weights")
            self.draws.is_state = True
        self._place_maps(n)
        plans = [self._plan(segment, i < n) for i, segment in enumerate(self.segments)]
        full = {number: whole(shape[1:]) for number, shape in g.shapes.items()}  # type: ignore[arg-type]
        first = {m: (rows[0][m], columns[0][m]) for m in rows[0]} if n else {}
        forward = [Forward(plan, full) for plan in plans[n:]]
        logits = self.maps[g.output]
        loss = Loss(logits, self._gradient(g.output))
        needs = frozenset(g.needs_gradient)
        backward = [Backward(plan, needs) for plan in reversed(plans[n:]) if plan.segment.output in needs]
        self._first_uses(backward)
        pairs = [pair for layer in self.trained.values() for pair in layer.gradients.items()]
        update = Update(pairs, self.recipe.momentum) if pairs else None
        steps: list[Any] = [
            *(Forward(plan, first) for plan in plans[:n]),
            *forward,
            loss,
            *backward,
            *([update] if update else []),
        ]
        self._lifetimes(steps, n)
        if n and in_bytes and image.last < n:  # nothing after the tiles reads the image
            self._overlap(image, self.maps[tiled[-1].output], rows)
        layout = DeviceLayout(
            self.choice, self.segments, plans[:n], rows, columns, forward, loss, backward, update, self.arrays,
            [step.name for step in steps], image, logits, self.trained,
        )  # fmt: skip
        layout.recomputed_macs = recomputed_macs(g, tiled, rows, columns)
        return layout

    # ---- arrays ---------------------------------------------------------------------------------

    def _array(self, name: str, shape: Shape, dtype: Any, kind: str) -> Array:
        array = Array(name, tuple(int(n) for n in shape), np.dtype(dtype), kind)
        self.arrays.append(array)
        return array

    def _place_maps(self, tiled: int) -> None:
        """Every segment's output; one that is added to a map which nothing else needs later takes its place."""
        kept = {s.source for s in self.segments for node in s.nodes if self._keeps_source(s, node)}
        last = {number: i for i, s in enumerate(self.segments) for number in (s.source, s.residual)}
        for i, segment in enumerate(self.segments):
            C, H, W = self.graph.shapes[segment.output]
            inside = i < tiled - 1
            if inside:
                H, W = self.largest[segment.output]
            added = segment.residual
            free = added is not None and added not in kept and last[added] == i and added not in (segment.source, 0)
            if free and added is not None and i >= tiled:
                self.maps[segment.output] = self.maps[added]
            else:
                name = f"map of {segment_name(segment)}"
                self.maps[segment.output] = self._array(name, (C, H, W), self.dtype, "tiles" if inside else "maps")

    def _gradient(self, number: int) -> Array:
        if number not in self.gradients:
            name = next(f"gradient of map of {segment_name(s)}" for s in self.segments if s.output == number)
            self.gradients[number] = self._array(name, self.graph.shapes[number], self.dtype, "maps")
        return self.gradients[number]

    def _keeps_source(self, segment: Segment, node: Node) -> bool:
        """Whether a layer keeps the source of its segment as it is."""
        conv = node.conv
        exact = conv is not None and conv.weight_name is not None and conv.path not in self.recipe.factors
        return exact and node.inputs[0] == segment.source

    def _plan(self, segment: Segment, is_tiled: bool) -> SegmentPlan:
        g, needs = self.graph, self.graph.needs_gradient
        for node in segment.nodes:
            if node.conv is not None:
                self.layers[node] = self._layer(segment, node, node.conv)
        plan = SegmentPlan(
            segment, g.shapes, self.layers, self.maps, gradients=self.gradients, pixels=self.recipe.pixels,
            draws=self.draws if any(node.op == "dropout" for node in segment.everything) else None,
        )  # fmt: skip
        inner = [segment.head, *segment.body]
        first_body = segment.body[0] if segment.body else None
        if segment.head is None and first_body is not None and first_body.op in ELEMENTWISE:
            plan.channels[segment.source] = self._channel(segment.source, is_tiled)
        for maker in inner:
            if maker is not None and (maker is segment.head or maker.op not in ELEMENTWISE):
                plan.channels[maker.output] = self._channel(maker.output, is_tiled)
        for node in (*segment.body, *segment.post):
            if node.inputs[0] in needs:
                shape = self._mask(node)
                if shape is not None:
                    plan.masks[node] = self._array(f"signs of {node_name(node)}", shape[0], shape[1], "masks")
        if segment.output in needs:
            self._gradient(segment.output)
            before_tail = inner[-1].output if inner[-1] is not None else segment.source
            if segment.tail is not None and before_tail in needs:
                self._step(plan, before_tail)
            for node in segment.body:
                if node.op not in ELEMENTWISE and node.inputs[0] in needs:
                    self._step(plan, node.inputs[0])
        return plan

    def _channel(self, number: int, is_tiled: bool) -> Array:
        H, W = self.largest[number] if is_tiled else self.graph.shapes[number][1:]
        return self._array(f"channel {number}", (H, W), self.dtype, "channels")

    def _step(self, plan: SegmentPlan, number: int) -> None:
        if number not in plan.steps:
            size = self.graph.shapes[number][1:]
            plan.steps[number] = self._array(f"gradient of channel {number}", size, self.dtype, "channels")

    def _mask(self, node: Node) -> tuple[Shape, Any] | None:
        C, H, W = self.graph.shapes[node.output]
        if node.op in ("relu", "relu6", "dropout"):
            return (C, -(-H * W // 8)), np.uint8
        if node.op == "hardswish":
            return (C, H * W), self.dtype
        if node.op == "max_pool":
            assert node.window is not None
            return (C, H * W), np.uint8 if math.prod(node.window.kernel) <= 256 else np.uint16
        return None

    # ---- layers ---------------------------------------------------------------------------------

    def _layer(self, segment: Segment, node: Node, conv: Conv) -> Layer:
        recipe = self.recipe
        C, H, W = self.graph.shapes[node.inputs[0]]
        layer = Layer(conv, (H, W), self.graph.shapes[node.output][1:])  # type: ignore[arg-type]
        if not conv.trains:
            return layer
        self.trained[conv.path] = layer
        kind = "head" if conv.path == recipe.head else "trained weights"
        reaches = node.inputs[0] in self.graph.needs_gradient
        if conv.weight_name is not None:
            factors = recipe.factors.get(conv.path)
            if factors is not None:
                layer.keeps = self._core(conv, (C, H, W), factors, node is segment.head or node is segment.tail)
                U = factors[0]
                if recipe.in_subspace and U is not None and conv.groups == 1 and U.shape[1] < len(U):
                    self._subspace(layer, conv, U.shape[1], (H, W), reaches, kind)
            else:
                alias = self._keeps_source(segment, node)
                name = f"input of {conv.path}"
                array = self.maps[segment.source] if alias else self._array(name, (C, H, W), self.dtype, "cores")
                pixels = recipe.pixels if alias and segment.source == 0 else None
                layer.keeps = Input(array, not alias, pixels)
            if layer.change is None:
                layer.weight = self._array(conv.weight_name, conv.weight.shape, self.dtype, kind)
        if conv.bias_name is not None:
            layer.bias = self._array(conv.bias_name, conv.shift.shape, self.dtype, kind)
        for array in layer.trained:
            array.is_state = True
        if recipe.has_sums:
            for array in layer.trained:
                kind = "head" if kind == "head" else "optimiser" if recipe.momentum else "gradients"
                layer.gradients[array] = self._array(f"gradient of {array.name}", array.shape, self.dtype, kind)
        return layer

    def _core(self, conv: Conv, shape: Shape, factors: Factors, at_once: bool) -> Core:
        C, H, W = shape
        U, rows, columns = (None if f is None else np.ascontiguousarray(f, self.dtype) for f in factors)
        name = f"core of {conv.path}"
        if conv.is_linear and U is not None:
            return Core(self._array(name, (U.shape[1], 1, 1), self.dtype, "cores"), U.reshape(C, H, W, -1))
        h, w = (n if f is None else f.shape[1] for n, f in ((H, rows), (W, columns)))
        R = C if U is None else U.shape[1]
        array = self._array(name, (R, h, w), self.dtype, "cores")
        scratch = []
        if rows is not None or columns is not None:
            half = max(h * W, H * w)
            scratch.append(self._array(f"half of {conv.path}", (half,), self.dtype, "channels"))
            if at_once and conv.groups == 1:
                scratch.append(self._array(f"expanded core of {conv.path}", (R, H, W), self.dtype, "channels"))
            else:
                scratch.append(self._array(f"expanded channel of {conv.path}", (H, W), self.dtype, "channels"))
        basis = None if U is None else U.reshape(C, 1, 1, -1)
        return Core(array, basis, rows, columns, (H, W), tuple(scratch), at_once and conv.groups == 1)

    def _subspace(self, layer: Layer, conv: Conv, rank: int, size: tuple[int, int], reaches: bool, kind: str) -> None:
        C_out, C_in, k_h, k_w = conv.weight.shape
        kernel = (1, 1) if conv.is_linear else (k_h, k_w)
        name = f"change of {conv.weight_name}"
        layer.change = self._array(name, (C_out, rank, *kernel), self.dtype, kind)
        places = math.prod(layer.output_size)
        merged = C_out * C_in * rank * math.prod(kernel)
        factored = C_out * rank * math.prod(kernel) * places
        has_modes = isinstance(layer.keeps, Core) and bool(layer.keeps.scratch)
        factored += C_in * rank * math.prod(size) if has_modes else 0
        if self.recipe.forward == "auto":
            layer.is_merged = not conv.is_linear and merged < factored
        else:
            layer.is_merged = self.recipe.forward == "merged" and not conv.is_linear
        if layer.is_merged:
            return
        inner = (1, 1) if conv.is_linear else size
        if has_modes:
            layer.projected = self._array(f"projected input of {conv.path}", (rank, *inner), self.dtype, "channels")
        if reaches:
            layer.returned = self._array(f"returned gradient of {conv.path}", (rank, *inner), self.dtype, "channels")

    # ---- tiles and lifetimes -------------------------------------------------------------------

    def _first_uses(self, backward: Iterable[Backward]) -> None:
        seen = {self.graph.output}
        for step in backward:
            segment = step.plan.segment
            for number in (segment.residual, segment.source):
                if number is not None and number in self.gradients:
                    step.plan.is_first_use.setdefault(number, number not in seen)
                    seen.add(number)

    def _overlap(self, image: Array, output: Array, rows: Sequence[Parts]) -> None:
        """The tiles' output is written over rows of the image that no later tile reads.

        Both lie in memory row by row. The output begins far enough before the image that it never reaches a row
        which is still needed: after a row of tiles it ends at or before the first byte that the next row reads.
        """
        number = self.segments[self.choice.tiled - 1].output
        C, _, W = output.shape
        row, image_row = C * W * self.dtype.itemsize, image.shape[1] * image.shape[2]
        lead = max(
            part[number][1] * row - min(later[0][0] for later in rows[i:]) * image_row for i, part in enumerate(rows)
        )
        lead = max(0, -(-lead // self.dtype.itemsize) * self.dtype.itemsize)
        if lead < output.nbytes:
            output.rows_first, image.lead, image.over = True, lead, output
            output.first = self.choice.tiled  # until then its bytes are counted as the image's

    def _lifetimes(self, steps: Sequence[Any], tiled: int) -> None:
        for time, step in enumerate(steps):
            for array in step.touches:
                array.touch(time)
        for array in self.arrays:
            if array.kind in PERSISTENT:
                array.first, array.last = 0, len(steps) - 1
        if tiled:  # what comes in and what goes out lives through all tiles
            for array in (self.maps[0], self.maps[self.segments[tiled - 1].output]):
                array.touch(0)
                array.touch(tiled - 1)
        self.maps[0].touch(0)
        self.arrays[:] = [array for array in self.arrays if array.first >= 0]


def flash(graph: Graph, recipe: Recipe, layers: Mapping[str, Layer]) -> dict[str, np.ndarray]:
    """What never changes and lies in flash: frozen weights, what is added to channels, and factors."""
    found: dict[str, np.ndarray] = {}
    for node in graph.nodes:
        conv = node.conv
        if conv is None:
            continue
        layer = layers.get(conv.path)
        if layer is None or layer.weight is None:
            found[f"{conv.path}.weight"] = conv.weight
        if conv.has_norm or conv.bias is None:  # decided by shapes alone: a fresh norm's shift may be zero
            found[f"{conv.path}.shift"] = conv.shift
        for name, array in (("weight scale", conv.weight_scale), ("bias scale", conv.bias_scale)):
            if array is not None:
                found[f"{conv.path} {name}"] = array
        if layer is not None and isinstance(layer.keeps, Core):
            for name, array in (("U", layer.keeps.basis), ("U_h", layer.keeps.rows), ("U_w", layer.keeps.columns)):
                if array is not None:
                    found[f"{conv.path} {name}"] = array
    if recipe.pixels is not None:
        found["pixel scale"], found["pixel shift"] = recipe.pixels.scale, recipe.pixels.shift
    return found
