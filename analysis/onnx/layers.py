"""The layers of an ONNX file: nodes with stored weights, as the library's own modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.onnx.file import Node
from analysis.onnx.host import axes_of, integers, new_shape
from analysis.onnx.ops import conv_options, number
from analysis.onnx.tensor import Constant
from lance_ref import nn
from lance_ref.nn.init import shapes_only
from lance_ref.nn.module import Module, Parameter

PRECISION = np.dtype(np.float32)
"""Of the parameters; a network is converted to another one by ``net.to(dtype)``."""


@dataclass(eq=False)
class Weight:
    """A stored floating tensor, or what the file makes of one beforehand, by shape.

    Attributes
    ----------
    constant : Constant
    key : tuple
        The same for the same values: the name in the file, and what was done to it.
    parameter : Parameter or None
        Made when a step first needs it.
    views : dict
        Its transpose.
    """

    constant: Constant
    key: tuple[Any, ...]
    parameter: Parameter | None = None
    views: dict[str, Weight] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.constant.shape

    @staticmethod
    def of(array: np.ndarray, name: str) -> Weight:
        """An array as a weight."""
        return Weight(Constant(array.shape, array.dtype, lambda: array), (name,))

    @property
    def transposed(self) -> Weight:
        """Of two dimensions; twice is the weight itself."""
        if "T" not in self.views:
            turned = self.made(self.shape[::-1], lambda w: w.T, "T")
            turned.views["T"] = self
            self.views["T"] = turned
        return self.views["T"]

    def made(self, shape: tuple[int, ...], function: Callable[[np.ndarray], np.ndarray], what: Any) -> Weight:
        """What a function makes of the values."""
        load = self.constant.load
        return Weight(Constant(shape, self.constant.dtype, lambda: function(load())), (*self.key, what))

    def make_parameter(self, with_weights: bool) -> Parameter:
        """The parameter; the same whenever it is asked for."""
        if self.parameter is None:
            if with_weights:
                values = np.ascontiguousarray(self.constant.load().astype(PRECISION)).reshape(self.shape)
                self.parameter = Parameter(values.copy())
            else:
                self.parameter = Parameter.meta_parameter(self.shape, PRECISION)
        return self.parameter

    @staticmethod
    def folded(node: Node, x: list[Any]) -> list[Weight] | None:
        """What a node makes of weights, if that is another look at them or the same in another number format."""
        first = x[0] if x else None
        if not isinstance(first, Weight):
            return None
        if node.op == "Identity" or (node.op == "Cast" and node.attributes.get("to") in (1, 10, 11, 16)):
            return [first] if first.constant.is_floating else None
        if node.op == "Transpose":
            dims = tuple(axes_of(node.attributes.get("perm") or range(len(first.shape))[::-1], len(first.shape)))
            if dims == (1, 0):
                return [first.transposed]
            return [first.made(tuple(first.shape[d] for d in dims), lambda w: w.transpose(dims), dims)]
        if node.op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze") and not any(isinstance(v, Weight) for v in x[1:]):
            shape = _without_unknown(new_shape(node, first.shape, x), first.constant.size)
            return [first.made(shape, lambda w: w.reshape(shape), shape)]
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            return [_requantized(node, first, x)]
        return None


def _without_unknown(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    known = math.prod(n for n in shape if n != -1)
    whole = tuple(size // max(known, 1) if n == -1 else n for n in shape)
    if math.prod(whole) != size or shape.count(-1) > 1:
        raise ValueError(f"a weight of {size} elements does not fit into shape {shape}")
    return whole


def _requantized(node: Node, first: Weight, x: list[Any]) -> Weight:
    """scale·(q − zero point), or back: of a weight, done once, beforehand. Scales are per tensor or per channel."""
    axis = node.attributes.get("axis", 1)

    def along(value: Any, ndim: int, default: float) -> np.ndarray:
        array = np.asarray(default if value is None else _loaded(value), np.float32)
        shape = [1] * ndim
        if array.size > 1:
            shape[axis] = array.size
        return array.reshape(shape if array.size > 1 else ())

    def values(w: np.ndarray) -> np.ndarray:
        given, zero = (*x[1:], None)[:2]
        scale, offset = along(given, w.ndim, 1.0), along(zero, w.ndim, 0.0)
        if node.op == "DequantizeLinear":
            return np.asarray((w.astype(np.float32) - offset) * scale)
        limits = np.iinfo(np.uint8 if zero is None else _loaded(zero).dtype)
        return np.asarray(np.clip(np.rint(w / scale) + offset, limits.min, limits.max))

    made = first.made(first.shape, values, node.outputs[0])
    return Weight(Constant(made.shape, PRECISION, made.constant.load), made.key)


def _loaded(value: Any) -> np.ndarray:
    return np.asarray(value.constant.load() if isinstance(value, Weight) else value)


# ---- layers --------------------------------------------------------------------------------

Values = Mapping[str, Any]
Made = tuple[Module | None, Any, str]


def layer_for(node: Node, values: Values, with_weights: bool, made: Mapping[Any, Module]) -> Made:
    """The layer of a node whose weights are stored.

    Parameters
    ----------
    node : Node
    values : mapping
        Constants by name.
    with_weights : bool
        False: parameters have shapes alone.
    made : mapping
        Layers by key, so far.

    Returns
    -------
    tuple
        The layer, its key (the same weights and options give the same), and the path that its weight's name
        tells, "" if none. None, None and "" for an operation without stored weights. For a key in ``made`` the
        layer is None.
    """
    if node.op not in LAYERS:
        return None, None, ""
    weights = [_weight(values.get(name), name) for name in node.inputs[1:]]
    plan = LAYERS[node.op](node, weights)
    if plan is None:
        if node.op in ("BatchNormalization", "LayerNormalization"):
            raise ValueError("its weights are not stored in the file")
        return None, None, ""
    make, weight, bias, key = plan
    key = (node.op, key, *(w if w is None else w.key for w in (weight, bias)))
    if key in made:
        return None, key, ""
    with shapes_only():
        layer = make()
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            shape = getattr(layer, name).shape
            if value.shape != shape:
                raise ValueError(f"{name} has shape {value.shape}, expected {shape}")
            setattr(layer, name, value.make_parameter(with_weights))
    if isinstance(layer, nn.BatchNorm2d) and with_weights:
        for name, value in zip(("running_mean", "running_var"), weights[2:], strict=True):
            layer.register_buffer(name, _loaded(value).astype(PRECISION))
    return layer, key, _path(weight, node)


def _weight(value: Any, name: str) -> Any:
    """A weight of one element (of one channel, say) is an array among the constants."""
    return Weight.of(value, name) if isinstance(value, np.ndarray) and value.ndim and value.dtype.kind == "f" else value


def _path(weight: Weight | None, node: Node) -> str:
    """``features.0`` for the weight ``features.0.weight``; else where the node stands."""
    name = str(weight.key[0]) if weight is not None else ""
    return name.removesuffix(".weight") if name.endswith(".weight") else node.scope


Plan = tuple[Callable[[], Module], Weight | None, Weight | None, Any]


def _conv(node: Node, weights: list[Any]) -> Plan | None:
    weight, bias = (*weights, None)[:2]
    if not isinstance(weight, Weight) or not (bias is None or isinstance(bias, Weight)):
        return None
    options = conv_options(node, weight.shape)
    mode = node.attributes.get("auto_pad", "NOTSET")
    sides = integers(node.attributes.get("pads") or (0, 0, 0, 0), "pads")
    if mode == "NOTSET" and len(sides) == 4:
        padding: Any = ((sides[0], sides[2]), (sides[1], sides[3]))
    elif mode in ("SAME_UPPER", "VALID") or (mode == "SAME_LOWER" and _symmetric(weight.shape, options["stride"])):
        padding = "valid" if mode == "VALID" else "same"
    else:
        raise ValueError(f"auto_pad is {mode!r} and pads are {sides}, which a convolution of images cannot have")
    C_out, C_in, *kernel = weight.shape
    options["padding"] = padding

    def make() -> Module:
        return nn.Conv2d(C_in * options["groups"], C_out, kernel, bias=bias is not None, **options)

    return make, weight, bias, tuple(sorted((k, repr(v)) for k, v in options.items()))


def _symmetric(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return all(k % 2 for k in shape[2:]) and set(stride) == {1}


def _gemm(node: Node, weights: list[Any]) -> Plan | None:
    weight, bias = (*weights, None)[:2]
    options = [node.attributes.get(name, default) for name, default in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))]
    if options != [1.0, 1.0, 0] or not isinstance(weight, Weight) or len(weight.shape) != 2:
        return None
    return _linear(weight if node.attributes.get("transB", 0) else weight.transposed, bias)


def _matmul(node: Node, weights: list[Any]) -> Plan | None:
    """x @ W, with the bias of an Add behind it where :mod:`analysis.onnx.patterns` joined the two."""
    weight, bias = (*weights, None)[:2]
    if not isinstance(weight, Weight) or len(weight.shape) != 2:
        return None
    return _linear(weight.transposed, bias)


def _linear(weight: Weight, bias: Any) -> Plan | None:
    O, I = weight.shape  # noqa: E741
    if isinstance(bias, Weight) and bias.shape != (O,) and bias.constant.size == O == bias.shape[-1]:
        bias = bias.made((O,), lambda b: b.reshape(-1), (O,))
    if not (bias is None or (isinstance(bias, Weight) and bias.shape == (O,))):
        return None
    return lambda: nn.Linear(I, O, bias is not None), weight, bias, "linear"


def _batch_norm(node: Node, weights: list[Any]) -> Plan | None:
    if len(weights) != 4 or not all(isinstance(w, Weight) and len(w.shape) == 1 for w in weights):
        return None
    weight, bias, mean, var = weights
    if mean.shape != weight.shape or var.shape != weight.shape:
        raise ValueError(f"mean has shape {mean.shape} and variance {var.shape}, expected {weight.shape}")
    eps, momentum = node.attributes.get("epsilon", 1e-5), 1 - node.attributes.get("momentum", 0.9)
    make = lambda: _AnyBatchNorm(weight.shape[0], eps, momentum)  # noqa: E731
    return make, weight, bias, (eps, momentum, mean.key, var.key)


class _AnyBatchNorm(nn.BatchNorm2d):
    """Of images, sequences and vectors alike."""

    _dimensions = (2, 3, 4)
    _expected = "(B, {C}, ...)"


def _layer_norm(node: Node, weights: list[Any]) -> Plan | None:
    weight, bias = (*weights, None)[:2]
    if not isinstance(weight, Weight) or not (bias is None or isinstance(bias, Weight)):
        return None
    axis, eps = node.attributes.get("axis", -1), node.attributes.get("epsilon", 1e-5)
    if axis < 0 and len(weight.shape) != -axis:
        raise ValueError(f"axis is {axis} and scale has shape {weight.shape}, expected {-axis} dimensions")
    bias = bias or Weight(Constant(weight.shape, PRECISION, lambda: np.zeros(weight.shape, PRECISION)), ("zeros",))
    return lambda: nn.LayerNorm(weight.shape, eps), weight, bias, (axis, eps)


def _dropout(node: Node, weights: list[Any]) -> Plan | None:
    given = weights[0] if weights else node.attributes.get("ratio")
    ratio = number(given.constant.load() if isinstance(given, Weight) else given, "the ratio", 0.5)
    return lambda: nn.Dropout(ratio), None, None, node.outputs[0]


LAYERS: dict[str, Callable[[Node, list[Any]], Plan | None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Dropout": _dropout,
}
"""Operations that become layers if their weights are stored; the weights are the inputs after the first."""
