"""Bytes of a step, by kind and by instruction, from shapes.

Every block of memory has a first and a last instruction. The instructions are: the segments in order (those in tiles
once, for all tiles), the loss, the segments backward as far as something trains, and the update where gradients are
stored. A block is there from the first instruction that touches it to the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from analysis.device.choices import Choices, DeviceSettings
from analysis.device.layers import Layer, layer
from analysis.device.operations import ELEMENTWISE, Network, Operation
from analysis.device.segments import Part, Segment, tile_parts


@dataclass(frozen=True)
class Block:
    """Bytes of one kind, alive from one instruction to another.

    ``kind`` is one of image, maps, tiles, channels, masks, cores, trained weights, gradients, optimiser and head.
    """

    kind: str
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Tiles:
    """The part of each map that a tile needs, for rows and for columns of tiles."""

    rows: Sequence[Mapping[int, Part]] = ()
    columns: Sequence[Mapping[int, Part]] = ()

    def largest(self, number: int) -> int:
        """Places of the largest part of a map."""
        return math.prod(max(p[number][1] - p[number][0] for p in parts) for parts in (self.rows, self.columns))

    def computed(self, number: int) -> int:
        """Places of a map that all tiles compute together, some of them several times."""
        return math.prod(sum(p[number][1] - p[number][0] for p in parts) for parts in (self.rows, self.columns))


class Step:
    """The schedule of a step, and what follows from it.

    Parameters
    ----------
    net : Network
    segments : list of Segment
    settings : DeviceSettings
    choices : Choices

    Attributes
    ----------
    layers : dict of Operation to Layer
        Every layer with weights.
    backward : dict of int to int
        The instruction that runs a segment backward, by the segment's place.
    instructions : int
        How many there are.
    """

    def __init__(self, net: Network, segments: list[Segment], settings: DeviceSettings, choices: Choices) -> None:
        self.net, self.segments, self.settings, self.choices = net, segments, settings, choices
        n = choices.tiled
        tiled = segments[:n]
        self.tiles = Tiles(*(tile_parts(net, tiled, axis, choices.tile[axis]) for axis in (0, 1))) if n else Tiles()
        self.layers: dict[int, Layer] = {
            operation.output: layer(net, operation, settings, operation in (segment.head, segment.tail))
            for segment in segments
            for operation in segment.inner
            if operation.weights is not None
        }
        self.loss = len(segments)
        run_back = [i for i in reversed(range(n, len(segments))) if segments[i].output in net.wanted]
        self.backward = {i: self.loss + 1 + k for k, i in enumerate(run_back)}
        trains = any(of.weights.trains or of.weights.bias_trains for of in self.layers.values())
        self.stores_gradients = settings.adds_up or settings.momentum
        self.instructions = self.loss + 1 + len(run_back) + (trains and self.stores_gradients)

    # ---- all blocks ------------------------------------------------------------------------------

    def blocks(self) -> list[Block]:
        """Every block of memory of the step."""
        found = [*self._maps(), *self._gradients_of_maps(), *self._weights()]
        for i, segment in enumerate(self.segments):
            found += [*self._channels(i, segment), *self._masks(i, segment)]
            found += [block for operation in segment.inner for block in self._kept(i, segment, operation)]
        return found

    def _block(self, kind: str, numbers: int, *times: int) -> Block:
        return Block(kind, numbers * self.net.itemsize, min(times), max(times))

    # ---- maps ------------------------------------------------------------------------------------

    def _maps(self) -> Iterator[Block]:
        """The image, and the output of every segment; a sum takes the place of what was added, if that is free."""
        net, tiled = self.net, self.choices.tiled
        times: dict[int, list[int]] = {0: [0]}
        place = {0: 0}
        for i, segment in enumerate(self.segments):
            place[segment.output] = place[segment.added] if self._in_place(i, segment) else segment.output  # type: ignore[index]
            for number in (segment.output, *segment.reads):
                times.setdefault(place[number], []).append(i)
            times[place[segment.source]] += [self.backward[i] for o in segment.inner if self._keeps_map(segment, o)]
        if tiled:
            last = place[self.segments[tiled - 1].output]
            for number in (0, last):
                times[number] += [0, tiled - 1]
        times[place[self.segments[-1].output]].append(self.loss)
        lead = self._lead() if tiled and max(times[0]) < tiled else None
        for number, when in times.items():
            if number == 0 and self.settings.pixels:
                yield Block("image", net.numbers(0) + (lead or 0), min(when), max(when))
            elif number == 0:
                yield self._block("image", net.numbers(0), *when)
            elif max(when) < tiled and number != self.segments[tiled - 1].output:
                yield self._block("tiles", net.maps[number][0] * self.tiles.largest(number), *when)
            elif tiled and lead is not None and number == self.segments[tiled - 1].output:
                yield self._block("maps", net.numbers(number), tiled, max(*when, tiled))
            else:
                yield self._block("maps", net.numbers(number), *when)

    def _in_place(self, i: int, segment: Segment) -> bool:
        """Whether the output is written over what is added: nothing later reads that, and nothing keeps it."""
        added = segment.added
        if added is None or i < self.choices.tiled or added in (0, segment.source):
            return False
        later = any(added in other.reads for other in self.segments[i + 1 :])
        kept = any(o.inputs[0] == added == s.source and self._keeps_map(s, o) for s in self.segments for o in s.inner)
        return not later and not kept

    def _keeps_map(self, segment: Segment, operation: Operation) -> bool:
        """Whether a layer that keeps its exact input needs no copy, as its input is a whole map."""
        of = self.layers.get(operation.output)
        return of is not None and of.weights.trains and not of.has_core and operation.inputs[0] == segment.source

    def _lead(self) -> int | None:
        """How far before the image's bytes the tiles' output begins, if it is written over bytes that were read.

        Both lie row by row. When a row of tiles is written, its last byte must lie before the first row of the image
        which that row of tiles, or a later one, still reads.
        """
        if not self.settings.pixels:
            return None
        number = self.segments[self.choices.tiled - 1].output
        C, _, W = self.net.maps[number]
        C_image, _, W_image = self.net.maps[0]
        lead, still_read = 0, self.net.maps[0][1]
        for parts in reversed(self.tiles.rows):
            still_read = min(still_read, parts[0][0])
            lead = max(lead, parts[number][1] * C * W * self.net.itemsize - still_read * C_image * W_image)
        lead += -lead % self.net.itemsize
        return lead if lead < self.net.numbers(number) * self.net.itemsize else None

    def _gradients_of_maps(self) -> Iterator[Block]:
        for i, segment in enumerate(self.segments):
            if segment.output in self.net.wanted:
                users = [self.backward[j] for j, s in enumerate(self.segments) if segment.output in s.reads]
                begins = min(users, default=self.loss)
                yield self._block("maps", self.net.numbers(segment.output), begins, self.backward[i])

    # ---- one channel at a time ----------------------------------------------------------------------

    def _channels(self, i: int, segment: Segment) -> Iterator[Block]:
        """Room for one channel of every inner map that is not changed in place, and for its gradient."""
        net = self.net
        makes = [o.output for o in segment.body if o.kind not in ELEMENTWISE]
        if segment.head is not None:
            makes.append(segment.head.output)
        elif segment.body and segment.body[0].kind in ELEMENTWISE:
            makes.append(segment.source)  # a copy, for the whole map stays as it is
        for number in makes:
            yield self._block("channels", self.tiles.largest(number) if i < self.choices.tiled else net.area(number), i)
        if i in self.backward:
            reads = {o.inputs[0] for o in segment.body if o.kind not in ELEMENTWISE}
            reads |= set() if segment.tail is None else {segment.tail.inputs[0]}
            for number in reads & net.wanted:
                yield self._block("channels", net.area(number), self.backward[i])

    def _masks(self, i: int, segment: Segment) -> Iterator[Block]:
        for operation in (*segment.body, *segment.after):
            if operation.inputs[0] in self.net.wanted:
                nbytes = self._mask(operation)
                if nbytes:
                    yield Block("masks", nbytes, i, self.backward[i])

    def _mask(self, operation: Operation) -> int:
        """A bit for each number, by channels of whole bytes; of hard-swish the slope, of max-pooling a place."""
        C, places = self.net.maps[operation.output][0], self.net.area(operation.output)
        if operation.kind in ("relu", "relu6", "dropout"):
            return C * math.ceil(places / 8)
        if operation.kind == "hardswish":
            return C * places * self.net.itemsize
        if operation.kind == "max_pool" and operation.sliding is not None:
            return C * places * (1 if math.prod(operation.sliding.kernel) <= 2**8 else 2)
        return 0

    # ---- layers that train -----------------------------------------------------------------------

    def _kept(self, i: int, segment: Segment, operation: Operation) -> Iterator[Block]:
        """What a layer keeps of its input for the weight gradient, and what it works with."""
        of = self.layers.get(operation.output)
        if of is None or not of.weights.trains:
            return
        back, merged = self.backward[i], operation.path in self.choices.merged
        C, H, W = of.source
        if of.has_core:
            yield self._block("cores", math.prod(of.core), i, back)
        elif not self._keeps_map(segment, operation):
            yield self._block("cores", C * H * W, i, back)
        if of.has_places_projected:
            yield self._block("channels", of.half, i, back)
            yield self._block("channels", (of.core[0] if of.at_once else 1) * H * W, back)
        if of.in_subspace and not merged:
            if of.has_places_projected:
                yield self._block("channels", of.projected, i)
            if operation.inputs[0] in self.net.wanted:
                yield self._block("channels", of.projected, back)

    def _weights(self) -> Iterator[Block]:
        """What outlives the step: weights that train, beside each its gradient or velocity; dropout's counter."""
        always = 0, self.instructions - 1
        if any(operation.kind == "dropout" for operation in self.net.operations):
            yield Block("trained weights", 4, *always)
        beside = "optimiser" if self.settings.momentum else "gradients"
        for operation in self.net.operations:
            of = self.layers.get(operation.output)
            if of is None:
                continue
            is_head = operation.path == self.net.classifier
            numbers = of.weights.outputs if of.weights.bias_trains else 0
            if of.weights.trains:
                numbers += of.change if of.in_subspace else of.weights.size
            if numbers:
                yield self._block("head" if is_head else "trained weights", numbers, *always)
                if self.stores_gradients:
                    yield self._block("head" if is_head else beside, numbers, *always)
