"""A traced network as operations on maps of one image: shapes and what trains, no numbers.

What the device does with a net is read from the trace a second time here, so that a mistake of the compiler is not
repeated: a frozen batch norm belongs to the convolution before it, and a linear layer is a convolution whose kernel is
as large as its input.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lance_ref.engine.recording import OpRecord, Value

Pair = tuple[int, int]
Map = tuple[int, int, int]
"""(C, H, W) of one image."""

ELEMENTWISE = ("relu", "relu6", "hardswish", "dropout")
POOLS = {"max_pool2d": "max_pool", "avg_pool2d": "avg_pool", "adaptive_avg_pool2d": "adaptive_pool"}


@dataclass(frozen=True)
class Sliding:
    """Kernel, stride, dilation and the padding in front, for height and width each."""

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    before: Pair = (0, 0)


@dataclass(frozen=True)
class Weights:
    """The weights of a convolution or linear layer.

    Attributes
    ----------
    outputs, inputs : int
        Output channels, and the input channels that each of them reads.
    kernel : pair of int
    groups : int
    trains, bias_trains : bool
        A trained shift of the batch norm behind counts as a trained bias.
    norm : bool
        Whether a frozen batch norm belongs to it.
    scales_bias : bool
        Whether the factor of that norm is applied to a bias that trains.
    is_linear : bool
    """

    outputs: int
    inputs: int
    kernel: Pair = (1, 1)
    groups: int = 1
    trains: bool = False
    bias_trains: bool = False
    norm: bool = False
    scales_bias: bool = False
    is_linear: bool = False

    @property
    def places(self) -> int:
        """Places of the kernel."""
        return math.prod(self.kernel)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs * self.places

    @property
    def channelwise(self) -> bool:
        """Whether each output channel reads the input channel of the same number, and nothing else."""
        return self.inputs == 1 and self.groups == self.outputs


@dataclass(frozen=True)
class Operation:
    """One operation. ``inputs`` and ``output`` are numbers of maps; the image is map 0."""

    kind: str
    path: str
    inputs: tuple[int, ...]
    output: int
    weights: Weights | None = None
    sliding: Sliding | None = None

    @property
    def mixes(self) -> bool:
        """Whether it is a convolution whose outputs read several channels: the compiler makes it a head or a tail."""
        return self.weights is not None and not self.weights.channelwise


@dataclass
class Network:
    """All operations in order.

    Attributes
    ----------
    operations : list of Operation
    maps : list of (C, H, W)
    wanted : set of int
        Maps whose gradient the backward pass needs.
    itemsize : int
        Bytes of a number.
    is_image : bool
        Whether the input has height and width.
    """

    operations: list[Operation] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    wanted: set[int] = field(default_factory=set)
    itemsize: int = 4
    is_image: bool = True

    @property
    def uses(self) -> Counter[int]:
        """How many operations read each map."""
        return Counter(number for operation in self.operations for number in operation.inputs)

    @property
    def classifier(self) -> str:
        """Path of the last layer with weights."""
        return [operation.path for operation in self.operations if operation.weights is not None][-1]

    def numbers(self, number: int) -> int:
        """How many numbers a map has."""
        return math.prod(self.maps[number])

    def area(self, number: int) -> int:
        """Places of a map: height times width."""
        return math.prod(self.maps[number][1:])


def read(records: Sequence[OpRecord], output: int | None = None) -> Network:
    """The operations of a trace on which its output depends.

    Parameters
    ----------
    records : sequence of OpRecord
        In training mode, with what trains chosen.
    output : int, optional
        Number of the value that the net gives. Default: that of the last record.

    Raises
    ------
    ValueError
        If an operation is none that a device runs.
    """
    image = records[0].inputs[0]
    net = Network(itemsize=np.dtype(image.dtype).itemsize, is_image=len(image.shape) == 4)
    net.maps.append(_map(image.shape))
    numbers = {image.id: 0}
    uses = Counter(value.id for record in records for value in record.inputs)
    for record in records:
        if record.inputs[0].id not in numbers:
            raise ValueError(f"operation {record.op!r} of layer {record.path!r} is on nothing that the image gives")
        source = numbers[record.inputs[0].id]
        if record.op == "reshape" or (record.op == "dropout" and not record.attributes["p"]):
            numbers[record.output.id] = source
        elif record.op == "batch_norm" and _joins(net, source, uses[record.inputs[0].id]):
            numbers[record.output.id] = source
            _join(net, record)
        else:
            inputs = tuple(numbers[value.id] for value in record.inputs[: 2 if record.op == "add" else 1])
            numbers[record.output.id] = len(net.maps)
            net.operations.append(_operation(net, record, inputs))
            keeps_shape = record.op in (*ELEMENTWISE, "batch_norm")
            net.maps.append(net.maps[source] if keeps_shape else _map(record.output.shape))
        if record.output.requires_grad and record.op != "reshape":
            net.wanted.add(numbers[record.output.id])
    _keep_what_matters(net, numbers[records[-1].output.id if output is None else output])
    return net


def _keep_what_matters(net: Network, output: int) -> None:
    """Drop operations without effect on the output."""
    matters = {output}
    for operation in reversed(net.operations):
        if operation.output in matters:
            matters |= set(operation.inputs)
    net.operations = [operation for operation in net.operations if operation.output in matters]


def _map(shape: Sequence[int]) -> Map:
    """The shape of one map, from the shape of a batch of maps or of vectors."""
    C, H, W = (*shape[1:], 1, 1)[:3]
    return C, H, W


def _operation(net: Network, record: OpRecord, inputs: tuple[int, ...]) -> Operation:
    number, a = len(net.maps), record.attributes
    if record.op in ("conv2d", "linear"):
        weight, *bias = record.inputs[1:]
        if record.op == "linear":
            C, H, W = net.maps[inputs[0]]
            kernel, groups, sliding = (H, W), 1, Sliding((H, W))
            outputs, read_by_each = weight.shape[0], C
        else:
            outputs, read_by_each, *sides = weight.shape
            kernel, groups = (sides[0], sides[1]), a["groups"]
            sliding = Sliding(kernel, a["stride"], a["dilation"], (a["padding"][0][0], a["padding"][1][0]))
        weights = Weights(
            outputs, read_by_each, kernel, groups, weight.requires_grad, bool(bias) and bias[0].requires_grad,
            is_linear=record.op == "linear",
        )  # fmt: skip
        return Operation("conv", record.path, inputs, number, weights, sliding)
    if record.op == "batch_norm":  # behind something else than a convolution it is one, with a kernel of one place
        C = net.maps[inputs[0]][0]
        weights = Weights(C, 1, groups=C, bias_trains=_shift_trains(record), norm=True)
        return Operation("conv", record.path, inputs, number, weights, Sliding())
    if record.op in POOLS:
        fixed = record.op != "adaptive_avg_pool2d"
        sliding = Sliding(a["kernel_size"], a["stride"], before=a["padding"]) if fixed else None  # type: ignore[assignment]
        return Operation(POOLS[record.op], record.path, inputs, number, sliding=sliding)
    if record.op not in (*ELEMENTWISE, "add"):
        raise ValueError(f"operation {record.op!r} of layer {record.path!r} is none that a device runs")
    return Operation(record.op, record.path, inputs, number)


def _joins(net: Network, source: int, uses: int) -> bool:
    """Whether a batch norm belongs to the convolution right before it, whose output nothing else reads."""
    last = net.operations[-1] if net.operations else None
    return last is not None and last.weights is not None and last.output == source and uses == 1


def _join(net: Network, record: OpRecord) -> None:
    last = net.operations[-1]
    assert last.weights is not None
    shift = _shift_trains(record)
    scales_bias = last.weights.bias_trains and not shift
    weights = replace(last.weights, norm=True, bias_trains=last.weights.bias_trains or shift, scales_bias=scales_bias)
    net.operations[-1] = replace(last, weights=weights)


def _shift_trains(record: OpRecord) -> bool:
    shifts: list[Value] = [v for v in record.inputs[1:] if (v.parameter or "").rpartition(".")[2] == "bias"]
    return any(value.requires_grad for value in shifts)
