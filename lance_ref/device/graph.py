"""The network as the device sees it: convolutions, what acts on one channel at a time, and additions.

A trace of the network becomes a list of nodes. Frozen batch norm is folded into the convolution before it, and a linear
layer is a convolution whose kernel covers its whole input. So there is one kind of layer with weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lance_ref.engine.recording import OpRecord, Value
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Shape, Tensor
from lance_ref.nn.module import Module
from lance_ref.nn.tracing import record as recording

Pair = tuple[int, int]
ACTIVATIONS = ("relu", "relu6", "hardswish")


class UnsupportedError(ValueError):
    """The network has something that a device program cannot run."""


@dataclass(frozen=True)
class Window:
    """How an operation slides over a map, for height and width each.

    Attributes
    ----------
    kernel, stride, dilation : pair of int
    before : pair of int
        Rows and columns of padding at the top and the left. Padding at the other sides follows from the sizes.
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    before: Pair = (0, 0)


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution or a linear layer, with the frozen batch norm behind it.

    Attributes
    ----------
    path : str
        Of the layer.
    weight : (C_out, C_in/groups, k_h, k_w) array
        Batch norm's factor is multiplied in, unless the weight trains.
    shift : (C_out,) array
        What is added to each output channel, without the bias if that trains.
    window : Window
    groups : int
    weight_name, bias_name : str or None
        Dotted names of the parameters that train; None for what is frozen.
    bias : (C_out,) array or None
        The bias that trains.
    weight_scale, bias_scale : (C_out,) array or None
        Batch norm's factor for what trains; None for a factor of one.
    is_linear : bool
        Whether the input is flattened, so that its features are C, H and W together.
    has_norm : bool
        Whether a frozen batch norm is folded in.
    """

    path: str
    weight: np.ndarray
    shift: np.ndarray
    window: Window
    groups: int = 1
    weight_name: str | None = None
    bias_name: str | None = None
    bias: np.ndarray | None = None
    weight_scale: np.ndarray | None = None
    bias_scale: np.ndarray | None = None
    is_linear: bool = False
    has_norm: bool = False

    @property
    def is_depthwise(self) -> bool:
        """Whether output channel c looks at input channel c alone."""
        return self.weight.shape[1] == 1 and self.groups == len(self.weight)

    @property
    def trains(self) -> bool:
        """Whether its weight or its bias trains."""
        return self.weight_name is not None or self.bias_name is not None


@dataclass(frozen=True, eq=False)
class Node:
    """One operation on maps of one image.

    Attributes
    ----------
    op : str
        ``conv``, ``add``, ``dropout``, ``max_pool``, ``avg_pool``, ``adaptive_pool``, or an activation.
    inputs, output : tuple of int, int
        Numbers of the maps. Map 0 is the image.
    conv : Conv, optional
        For ``conv``.
    window : Window, optional
        For pooling with fixed windows.
    attributes : mapping
        Of the record.
    path : str
        Of the module that runs it.
    """

    op: str
    inputs: tuple[int, ...]
    output: int
    conv: Conv | None = None
    window: Window | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    path: str = ""


@dataclass(eq=False)
class Graph:
    """All operations of a network, in order of execution.

    Attributes
    ----------
    nodes : list of Node
    shapes : dict of int to (C, H, W)
        Of every map.
    needs_gradient : set of int
        Maps whose gradient is needed, as something that trains lies before them.
    dtype : numpy dtype
    output : int
        The map of the logits.
    layers : set of str
        Paths of all layers that the network runs, those without effect on the output among them.
    """

    nodes: list[Node]
    shapes: dict[int, Shape]
    needs_gradient: set[int]
    dtype: Any
    output: int
    layers: frozenset[str]


def read(net: Module, input_shape: Sequence[int]) -> Graph:
    """The graph of ``net`` in training mode, with what trains as :func:`lance_ref.tune` left it.

    Raises
    ------
    UnsupportedError
        If an operation cannot run on a device; names the operation and the layer.
    ValueError
        If a weight is not finite, or the input does not fit the net.
    """
    was_training = [module for _, module in net.named_modules() if module.training]
    net.train()
    try:
        # two images, so that batch statistics are seen rather than an error
        dtype = next((p.dtype for p in net.parameters()), np.dtype(np.float32))
        x = Tensor.meta((2, *input_shape), dtype)
        with recording(net) as records:
            output = net(x)
            assert state.recorder is not None
            image, value = state.recorder.value(x), None
            if isinstance(output, Tensor):
                value = state.recorder.value(output)
    finally:
        net.eval()
        for module in was_training:
            module.training = True
    if value is None:
        raise UnsupportedError(f"the net gives a {type(output).__name__}, expected a Tensor of shape (batch, classes)")
    return _Reader(net, tuple(input_shape), image).read(records, value)


class _Reader:
    def __init__(self, net: Module, input_shape: Shape, image: Value) -> None:
        self.parameters = dict(net.named_parameters())
        self.modules = dict(net.named_modules())
        self.number = {image.id: 0}  # of a map, by the id of the value in the trace
        self.shapes: dict[int, Shape] = {0: _as_map(input_shape)}
        self.nodes: list[Node] = []
        self.needs_gradient: set[int] = set()
        self.users: dict[int, int] = {}  # how many records use a value
        self.seen: set[str] = set()

    def read(self, records: Sequence[OpRecord], output: Value) -> Graph:
        for record in records:
            for value in record.inputs:
                self.users[value.id] = self.users.get(value.id, 0) + 1
        for record in records:
            self._add(record)
        last = self.number.get(output.id)
        if last is None or self.shapes[last][1:] != (1, 1) or len(output.shape) != 2 or not self.nodes:
            shape = (None, *output.shape[1:])
            raise UnsupportedError(f"the net gives an output of shape {shape}, expected (batch, classes) of a layer")
        layers = frozenset(node.conv.path for node in self.nodes if node.conv is not None)
        return Graph(_alive(self.nodes, last), self.shapes, self.needs_gradient, np.dtype(output.dtype), last, layers)

    def _add(self, record: OpRecord) -> None:
        op, path = record.op, record.path
        here = f"operation {op!r} of layer {path or '(root)'!r}"
        if op not in SUPPORTED:
            raise UnsupportedError(f"{here} cannot run on a device; supported are {', '.join(SUPPORTED)}")
        inputs = record.inputs[:2] if op == "add" else record.inputs[:1]
        for value in inputs:
            if value.id not in self.number:
                raise UnsupportedError(f"{here} works on something that is not made from the image")
        source = self.number[inputs[0].id]
        if op == "reshape":
            return self._reshape(record, source, here)
        if op == "batch_norm":
            return self._fold(record, source, here)
        shape, attributes = record.output.shape[1:], dict(record.attributes)
        conv, window = None, None
        if op in ("conv2d", "linear"):
            conv = self._conv(record, source, here)
            op = "conv"
        elif op == "add" and inputs[0].shape != inputs[1].shape:
            raise UnsupportedError(f"{here} adds shapes {inputs[0].shape} and {inputs[1].shape}, expected equal shapes")
        elif op in ("max_pool2d", "avg_pool2d"):
            window = Window(attributes["kernel_size"], attributes["stride"], (1, 1), attributes["padding"])
        op = {"max_pool2d": "max_pool", "avg_pool2d": "avg_pool", "adaptive_avg_pool2d": "adaptive_pool"}.get(op, op)
        if op == "dropout" and attributes["p"] == 0:
            self.number[record.output.id] = source
            return None
        shape = self.shapes[source] if op in (*ACTIVATIONS, "dropout") else _as_map(shape)
        output = self._map(record.output, shape)
        maps = tuple(self.number[value.id] for value in inputs)
        self.nodes.append(Node(op, maps, output, conv, window, attributes, path))
        return None

    def _map(self, value: Value, shape: Shape) -> int:
        number = self.number[value.id] = len(self.shapes)
        self.shapes[number] = shape
        if value.requires_grad:
            self.needs_gradient.add(number)
        return number

    def _reshape(self, record: OpRecord, source: int, here: str) -> None:
        """Flattening changes nothing: the layer behind it looks at the whole map."""
        shape = record.output.shape[1:]
        if shape != record.inputs[0].shape[1:] and shape != (math.prod(self.shapes[source]),):
            raise UnsupportedError(f"{here} gives images of shape {shape}, expected one vector for each image")
        self.number[record.output.id] = source

    def _conv(self, record: OpRecord, source: int, here: str) -> Conv:
        weight_value, *rest = record.inputs[1:]
        weight = self._parameter(weight_value, here)
        bias = self._parameter(rest[0], here) if rest else None
        if record.op == "linear":
            if len(record.inputs[0].shape) != 2:
                raise UnsupportedError(f"{here} takes {record.inputs[0].shape}, expected one vector for each image")
            C, H, W = self.shapes[source]
            weight = weight.reshape(len(weight), C, H, W)
            window, groups = Window((H, W)), 1
        else:
            a = record.attributes
            before = (a["padding"][0][0], a["padding"][1][0])
            window, groups = Window(weight.shape[2:], a["stride"], a["dilation"], before), a["groups"]
        trains = weight_value.requires_grad
        trained_bias = rest[0].parameter if rest and rest[0].requires_grad else None
        zero = np.zeros(len(weight), weight.dtype)
        return Conv(
            record.path, weight, zero if bias is None or trained_bias else bias, window, groups,
            weight_value.parameter if trains else None, trained_bias, bias if trained_bias else None,
            is_linear=record.op == "linear",
        )  # fmt: skip

    def _parameter(self, value: Value, here: str) -> np.ndarray:
        if value.parameter is None or value.parameter not in self.parameters:
            raise UnsupportedError(f"{here} multiplies with something that is no parameter of the net")
        if value.requires_grad and value.parameter in self.seen:
            raise UnsupportedError(f"{here} trains {value.parameter!r}, which another operation uses too")
        self.seen.add(value.parameter)
        data: np.ndarray = self.parameters[value.parameter].data
        if not np.isfinite(data).all():
            raise ValueError(f"parameter {value.parameter!r} contains NaN or infinity, expected finite numbers")
        return data

    def _fold(self, record: OpRecord, source: int, here: str) -> None:
        """y = (x − mean) / √(var + eps) · weight + bias, put into the convolution that gave x."""
        if record.attributes["training"]:
            raise UnsupportedError(
                f"{here} uses the statistics of the batch, expected a frozen batch norm "
                "(tune(net, …) freezes those that keep running statistics)"
            )
        values = [v for v in record.inputs[1:] if v.parameter is not None]
        by_end = {v.parameter.rpartition(".")[2]: v for v in values if v.parameter is not None}
        if "weight" in by_end and by_end["weight"].requires_grad:
            raise UnsupportedError(f"{here} trains its weight, expected a frozen one")
        module: Any = self.modules[record.path]
        C, dtype = self.shapes[source][0], np.dtype(record.output.dtype)
        if module.running_mean.shape != (C,):
            raise UnsupportedError(f"{here} comes after a flattening of {self.shapes[source]}, expected before it")
        gamma = self._parameter(by_end["weight"], here) if "weight" in by_end else np.ones(C, dtype)
        beta = self._parameter(by_end["bias"], here) if "bias" in by_end else np.zeros(C, dtype)
        with np.errstate(all="ignore"):  # reported below
            scale = (gamma / np.sqrt(module.running_var + record.attributes["eps"])).astype(dtype)
        if not np.isfinite(scale).all() or not np.isfinite(module.running_mean).all():
            raise ValueError(f"{here} has running statistics that give NaN or infinity, expected finite numbers")
        trained = by_end["bias"].parameter if "bias" in by_end and by_end["bias"].requires_grad else None
        before = self.nodes[-1] if self.nodes else None
        if before is None or before.conv is None or before.output != source or self.users[record.inputs[0].id] > 1:
            # A batch norm that follows no convolution of its own is a depthwise convolution with a kernel of one.
            eye = Conv(record.path, np.ones((C, 1, 1, 1), dtype), np.zeros(C, dtype), Window(), C)
            before = Node("conv", (source,), self._map(record.output, self.shapes[source]), eye, path=record.path)
            self.nodes.append(before)
        else:
            self.number[record.output.id] = source
            if record.output.requires_grad:
                self.needs_gradient.add(source)
        assert before.conv is not None
        if trained is not None and before.conv.bias_name is not None:
            raise UnsupportedError(
                f"{here} trains its bias, and the layer before it trains {before.conv.bias_name!r}, which adds to the "
                "same channels, expected one of them"
            )
        folded = _folded(before.conv, scale, module.running_mean, beta, trained)
        self.nodes[-1] = replace(before, conv=folded)


def _alive(nodes: list[Node], output: int) -> list[Node]:
    """The nodes on whose results the output depends."""
    wanted, alive = {output}, []
    for node in reversed(nodes):
        if node.output in wanted:
            wanted.update(node.inputs)
            alive.append(node)
    return alive[::-1]


def _folded(conv: Conv, scale: np.ndarray, mean: np.ndarray, beta: np.ndarray, trained: str | None) -> Conv:
    """scale · (conv − mean) + beta as one convolution; ``trained`` is the name of beta, if it trains."""
    shift = scale * (conv.shift - mean) + (0 if trained else beta)
    frozen = conv.weight_name is None
    return replace(
        conv,
        weight=conv.weight * scale[:, None, None, None] if frozen else conv.weight,
        weight_scale=None if frozen else scale,
        shift=np.asarray(shift, conv.weight.dtype),
        bias_name=trained or conv.bias_name,
        bias=beta if trained else conv.bias,
        bias_scale=None if trained or conv.bias_name is None else scale,
        has_norm=True,
    )


def _as_map(shape: Sequence[int]) -> Shape:
    """(C, H, W) of one image's activation; a vector is a map of one place."""
    if len(shape) == 3:
        return tuple(shape)
    if len(shape) == 1:
        return (shape[0], 1, 1)
    raise UnsupportedError(f"an image has shape {tuple(shape)}, expected (C, H, W) or (features,)")


SUPPORTED = (
    "conv2d", "linear", "batch_norm", *ACTIVATIONS, "add", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
    "reshape", "dropout",
)  # fmt: skip
"""Names of the operations in a trace."""
