"""The layers of an ONNX file: nodes with stored weights, as the library's own modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from analysis.onnx.file import Node
from analysis.onnx.host import axes_of, new_shape
from analysis.onnx.numbers import number, operand
from analysis.onnx.tensor import Constant
from analysis.onnx.windows import conv_sizes, convolved, padding_of, transposed, transposed_sizes
from lance_ref import functional as F
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.init import shapes_only
from lance_ref.nn.module import Module, Parameter

PRECISION = np.dtype(np.float32)
"""Of the parameters; a network is converted to another one by ``net.to(dtype)``."""


Step = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Of a look at a tensor: "permute" or "reshape", the dimensions or the shape, and the shape before."""


@dataclass(eq=False)
class Weight:
    """A stored floating tensor, or another look at one, by shape.

    All looks at a tensor share one parameter. It has the shape of the look that claims it first; every other look is
    computed from it, so that gradients are summed.
    """

    constant: Constant
    key: tuple[Any, ...]  #: The same for the same values: the name in the file, and what was done to it.
    source: Weight | None = None  #: The stored tensor that this is a look at; None for that itself.
    steps: tuple[Step, ...] = ()  #: From the stored tensor to this look.
    owner: Weight | None = None  #: Of a stored tensor: the look whose shape the parameter has.
    parameter: Parameter | None = None  #: Of the owner; made when a step first needs it.
    #: Of a stored tensor: other looks at it, and what is computed from it beforehand.
    looks: dict[Any, Weight] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.constant.shape

    @property
    def root(self) -> Weight:
        """The stored tensor."""
        return self if self.source is None else self.source

    @staticmethod
    def of(array: np.ndarray, name: str) -> Weight:
        """An array as a weight."""
        return Weight(Constant(array.shape, array.dtype, lambda: array), (name,))

    def permuted(self, dims: Sequence[int]) -> Weight:
        """A look with the dimensions in another order."""
        return self._look(("permute", tuple(dims), self.shape))

    def reshaped(self, shape: Sequence[int]) -> Weight:
        """A look in another shape."""
        return self._look(("reshape", tuple(shape), self.shape))

    def _look(self, step: Step) -> Weight:
        root, steps = self.root, _shortened((*self.steps, step))
        place = _place(root.shape, steps)
        if place == _place(root.shape, ()):
            return root
        if place not in root.looks:
            constant = Constant(_shape_after(step), root.constant.dtype, lambda: _seen(root.constant.load(), steps))
            root.looks[place] = Weight(constant, (*root.key, place), root, steps)
        return root.looks[place]

    def made(self, function: Callable[[np.ndarray], np.ndarray], what: Any) -> Weight:
        """A stored tensor of this shape, in our precision, with what a function makes of the values."""
        if what not in self.looks:
            load = self.constant.load
            constant = Constant(self.shape, PRECISION, lambda: function(load()))
            self.looks[what] = Weight(constant, (*self.key, what))
        return self.looks[what]

    @property
    def is_claimable(self) -> bool:
        """Whether the parameter has, or can have, the shape of this look."""
        return self.root.owner is None or self.root.owner is self

    def make_parameter(self, with_weights: bool) -> Parameter:
        """The parameter of a look that can claim it; the same whenever it is asked for."""
        self.root.owner = self
        if self.parameter is None:
            if with_weights:
                values = np.ascontiguousarray(self.constant.load().astype(PRECISION)).reshape(self.shape)
                self.parameter = Parameter(values.copy())
            else:
                self.parameter = Parameter.meta_parameter(self.shape, PRECISION)
        return self.parameter

    def tensor(self, with_weights: bool) -> Tensor:
        """The look as an operation reads it: the parameter, or what is computed from it now."""
        owner = self.root.owner or self
        steps = (*_backwards(owner.steps), *self.steps)
        result: Tensor = _seen(owner.make_parameter(with_weights), _shortened(steps))
        return result

    @staticmethod
    def folded(node: Node, x: list[Any]) -> list[Weight] | None:
        """What a node makes of weights, if that is another look at them or the same in another number format."""
        first = x[0] if x else None
        if not isinstance(first, Weight):
            return None
        if node.op == "Identity" or (node.op == "Cast" and node.attributes.get("to") in (1, 10, 11, 16)):
            return [first] if first.constant.is_floating else None
        if node.op == "Transpose":
            dims = axes_of(node.attributes.get("perm") or range(len(first.shape))[::-1], len(first.shape))
            return [first.permuted(dims)]
        if node.op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze") and not any(isinstance(v, Weight) for v in x[1:]):
            return [first.reshaped(_without_unknown(new_shape(node, first.shape, x), first.constant.size))]
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            return [_requantized(node, first, x)]
        return None


def _shape_after(step: Step) -> tuple[int, ...]:
    kind, how, before = step
    return tuple(before[d] for d in how) if kind == "permute" else how


def _shortened(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The same look in fewer steps: neighbours of one kind joined, those that change nothing left out."""
    short: list[Step] = []
    for kind, how, before in steps:
        if short and short[-1][0] == kind:
            _, first, before = short.pop()
            how = tuple(first[d] for d in how) if kind == "permute" else how
        if how != (tuple(range(len(before))) if kind == "permute" else before):
            short.append((kind, how, before))
    return tuple(short)


def _place(shape: tuple[int, ...], steps: tuple[Step, ...]) -> Any:
    """Which number of the stored tensor stands where in a look: the same for looks that differ in their steps alone."""
    stored = np.empty(shape, np.int8)  # never read, and so never in memory, unless a step must copy
    look = _seen(stored, steps)
    if not np.may_share_memory(look, stored):
        return steps
    return look.shape, tuple(0 if n == 1 else s for n, s in zip(look.shape, look.strides, strict=True))


def _backwards(steps: Sequence[Step]) -> list[Step]:
    """From a look back to the stored tensor."""
    back = {"permute": lambda how, _: tuple(sorted(range(len(how)), key=how.__getitem__)), "reshape": lambda _, b: b}
    return [(step[0], back[step[0]](*step[1:]), _shape_after(step)) for step in reversed(steps)]


def _seen(x: Any, steps: Sequence[Step]) -> Any:
    """The look at an array, or at a Tensor."""
    for kind, how, _ in steps:
        if isinstance(x, Tensor):
            x = F.permute(x, how) if kind == "permute" else F.reshape(x, how)
        else:
            x = x.transpose(how) if kind == "permute" else x.reshape(how)
    return x


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
            if array.size != first.shape[axis]:
                raise ValueError(f"{array.size} scales or zero points for axis {axis} of shape {first.shape}")
            shape[axis] = array.size
        return array.reshape(shape if array.size > 1 else ())

    def values(w: np.ndarray) -> np.ndarray:
        given, zero = (*x[1:], None)[:2]
        scale, offset = along(given, w.ndim, 1.0), along(zero, w.ndim, 0.0)
        if node.op == "DequantizeLinear":
            return np.asarray((w.astype(np.float32) - offset) * scale)
        limits = np.iinfo(np.uint8 if zero is None else _loaded(zero).dtype)
        return np.asarray(np.clip(np.rint(w / scale) + offset, limits.min, limits.max))

    return first.made(values, (node.op, *node.inputs[1:], axis))


def _loaded(value: Any) -> np.ndarray:
    return np.asarray(value.constant.load() if isinstance(value, Weight) else value)


# ---- layers --------------------------------------------------------------------------------

Values = Mapping[str, Any]


class LayerPlan(NamedTuple):
    """A layer before it is made."""

    make: Callable[[], Module]  #: Gives the module, with weights of the right shapes.
    weight: Weight | None
    bias: Weight | None
    key: Any  #: Its options: layers of the same options and weights are one.
    reads: tuple[int, ...] = (0,)  #: Which inputs of the node it takes; the others are its weights.


class Made(NamedTuple):
    """A layer, made once for the same ``key``, the path that its weight's name tells, and the inputs that it reads."""

    layer: Module
    key: Any
    path: str
    reads: tuple[str, ...]


def plan_for(node: Node, values: Values) -> LayerPlan | None:
    """What layer a node is; its weights are claimed, so that whoever reads them in another shape looks at these.

    None for an operation without stored weights, or on weights that a layer before has in another shape.
    """
    if node.op not in LAYERS:
        return None
    plan = LAYERS[node.op](node, [as_weight(values.get(name), name) for name in node.inputs])
    if plan is None:
        if node.op == "LayerNormalization":
            raise ValueError("its weights are not stored in the file")
        return None
    stored = [weight for weight in (plan.weight, plan.bias) if weight is not None]
    if not all(weight.is_claimable for weight in stored):
        return None
    for weight in stored:
        weight.root.owner = weight
    return plan


def layer_for(node: Node, values: Values, with_weights: bool, made: Mapping[Any, Module]) -> Made | None:
    """The layer of a node whose weights are stored; None for any other operation.

    Without ``with_weights`` the parameters have shapes alone. ``made`` has the layers so far: the same weights and
    options give the same layer.
    """
    plan = plan_for(node, values)
    if plan is None:
        return None
    key = (node.op, plan.key, *(w if w is None else w.key for w in (plan.weight, plan.bias)))
    path, reads = _path(plan.weight, node), tuple(node.inputs[i] for i in plan.reads)
    if key in made:
        return Made(made[key], key, path, reads)
    with shapes_only():
        layer = plan.make()
    for name, value in (("weight", plan.weight), ("bias", plan.bias)):
        if value is not None:
            shape = getattr(layer, name).shape
            if value.shape != shape:
                raise ValueError(f"{name} has shape {value.shape}, expected {shape}")
            setattr(layer, name, value.make_parameter(with_weights))
    if isinstance(layer, nn.BatchNorm2d) and with_weights:
        for name, source in zip(("running_mean", "running_var"), node.inputs[3:5], strict=True):
            layer.register_buffer(name, _loaded(as_weight(values[source], source)).astype(PRECISION))
    return Made(layer, key, path, reads)


def as_weight(value: Any, name: str) -> Any:
    """A weight of one element (of one channel, say) is an array among the constants."""
    return Weight.of(value, name) if isinstance(value, np.ndarray) and value.ndim and value.dtype.kind == "f" else value


def _path(weight: Weight | None, node: Node) -> str:
    """``features.0`` for the weight ``features.0.weight``; else where the node stands."""
    name = str(weight.key[0]) if weight is not None else ""
    return name.removesuffix(".weight") if name.endswith(".weight") else node.scope


def _conv(node: Node, x: list[Any]) -> LayerPlan | None:
    weight, bias = (*x[1:], None)[:2]
    if not isinstance(weight, Weight) or not (bias is None or isinstance(bias, Weight)):
        return None
    sizes = conv_sizes(node, weight.shape)
    mode, count = node.attributes.get("auto_pad", "NOTSET"), len(weight.shape) - 2
    C_out, C_in, *kernel = weight.shape
    whole = mode in ("SAME_UPPER", "SAME_LOWER")
    sides = None if whole else padding_of(node, (1,) * count, tuple(kernel), sizes["stride"], sizes["dilation"])
    key = (mode, sides, *sorted((k, repr(v)) for k, v in sizes.items()))
    channels = C_in * sizes["groups"], C_out
    if count == 2 and mode != "SAME_LOWER":
        padding: Any = "same" if whole else sides
        return LayerPlan(
            lambda: nn.Conv2d(*channels, kernel, padding=padding, bias=bias is not None, **sizes), weight, bias, key
        )
    kind = {1: _Conv1d, 2: _Conv2d, 3: _Conv3d}[count]
    if count == 1:
        weight = weight.reshaped((C_out, C_in, 1, *kernel))
    return LayerPlan(lambda: kind(node, channels, kernel, bias is not None, sizes), weight, bias, key)


class _Windowed:
    """A convolution whose padding is worked out for each input, as its node says it."""

    def _say(self, node: Node, kernel: Sequence[int], sizes: dict[str, Any]) -> None:
        self.node, self.sizes, self.kernel = node, sizes, tuple(kernel)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, **more: Any) -> Tensor:
        sides = padding_of(self.node, x.shape[2:], self.kernel, self.sizes["stride"], self.sizes["dilation"])
        return convolved(x, weight, bias, sides, self.sizes, **more)


class _Conv2d(nn.Conv2d, _Windowed):
    """With "same" padding whose odd zero is at the top and left."""

    def __init__(self, node: Node, channels: tuple[int, int], kernel: Any, bias: bool, sizes: dict[str, Any]) -> None:
        super().__init__(*channels, kernel, bias=bias, **sizes)
        self._say(node, kernel, sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolved(x, self.weight, self.bias, store=self.store)


class _Conv1d(nn.Conv1d, _Windowed):
    """Of sequences; whoever looks at its input sees images of height 1."""

    def __init__(self, node: Node, channels: tuple[int, int], kernel: Any, bias: bool, sizes: dict[str, Any]) -> None:
        super().__init__(*channels, kernel[0], bias=bias, **{k: v[0] if k != "groups" else v for k, v in sizes.items()})
        self._say(node, kernel, sizes)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1:]
        sides = padding_of(self.node, length, self.kernel, self.sizes["stride"], self.sizes["dilation"])
        self.padding = ((0, 0), sides[0])
        return super().forward(x)


class _Conv3d(nn.Conv3d, _Windowed):
    def __init__(self, node: Node, channels: tuple[int, int], kernel: Any, bias: bool, sizes: dict[str, Any]) -> None:
        super().__init__(*channels, kernel, bias=bias, **sizes)
        self._say(node, kernel, sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolved(x, self.weight, self.bias, store=self.store)


class _ConvTranspose(nn.ConvTranspose2d):
    """Of images or sequences, with what an ONNX node may cut off beside."""

    def __init__(self, node: Node, shape: tuple[int, ...], bias: bool) -> None:
        groups = node.attributes.get("group", 1)
        super().__init__(shape[0], shape[1] * groups, shape[2:], groups=groups, bias=bias)
        self.node = node

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[2:] if x.ndim == 4 else self.weight.shape[3:]
        sizes = transposed_sizes(self.node, x.shape[2:], kernel)
        return transposed(x, self.weight, self.bias, sizes, store=self.store)


def _conv_transpose(node: Node, x: list[Any]) -> LayerPlan | None:
    weight, bias = (*x[1:], None)[:2]
    if not isinstance(weight, Weight) or not (bias is None or isinstance(bias, Weight)):
        return None
    if len(weight.shape) not in (3, 4):
        raise ValueError(f"weight has shape {weight.shape}, expected a transposed convolution of sequences or images")
    if len(weight.shape) == 3:
        weight = weight.reshaped((*weight.shape[:2], 1, weight.shape[2]))
    shape = weight.shape
    options = tuple(sorted((k, repr(v)) for k, v in node.attributes.items()))
    return LayerPlan(lambda: _ConvTranspose(node, shape, bias is not None), weight, bias, options)


class _Product(nn.Linear):
    """alpha·x Wᵀ + beta·b, or alpha·W x + beta·b with b along the rows; b its bias, or anything else that is given.

    ``left``: the weight stands on the left. ``turned``: x, a matrix, is transposed before.
    """

    def __init__(self, I: int, O: int, bias: bool, alpha: float, beta: float, left: bool, turned: bool) -> None:  # noqa: E741
        super().__init__(I, O, bias)
        self.alpha, self.beta, self.left, self.turned = float(alpha), float(beta), left, turned

    def forward(self, x: Tensor, summand: Any = None) -> Tensor:
        x = x.transpose(-2, -1) if self.left != self.turned else x
        joined = self.alpha == self.beta == 1
        y = F.linear(x, self.weight, self.bias if joined else None, store=self.store)
        y = y if self.alpha == 1 else y * self.alpha
        if self.bias is not None and not joined:
            y = y + (self.bias if self.beta == 1 else self.bias * self.beta)
        y = y.transpose(-2, -1) if self.left else y
        if summand is None:
            return y
        summand = operand(summand, y)
        return y + (summand if self.beta == 1 else summand * self.beta)


def _product(node: Node, x: list[Any], turned: list[bool]) -> LayerPlan | None:
    """Of a matrix that is stored and something that is not, each transposed before if ``turned`` says so.

    The third input is a bias; of a MatMul it is that of the Add which :mod:`analysis.onnx.patterns` joined to it.
    """
    bias = (*x, None)[2]
    left = isinstance(x[0], Weight) and not isinstance(x[1], Weight)
    weight = x[0] if left else x[1]
    if not isinstance(weight, Weight) or len(weight.shape) != 2 or (left and x[1] is not None):
        return None
    if turned[0 if left else 1] == left:  # then its rows are not the outputs
        weight = weight.permuted((1, 0))
    O, I = weight.shape  # noqa: E741
    joined = isinstance(bias, Weight) and fits_as_bias(bias.shape, O, left)
    bias = bias.reshaped((O,)) if joined else None
    apart = len(node.inputs) > 2 and bool(node.inputs[2]) and bias is None
    alpha, beta = (node.attributes.get(name, 1.0) for name in ("alpha", "beta"))
    options = (alpha, beta if bias is not None or apart else 1.0, left, turned[1 if left else 0])
    if options == (1.0, 1.0, False, False) and not apart:
        return LayerPlan(lambda: nn.Linear(I, O, bias is not None), weight, bias, "linear")
    reads = (int(left), 2) if apart else (int(left),)
    return LayerPlan(lambda: _Product(I, O, bias is not None, *options), weight, bias, options, reads)


def fits_as_bias(shape: Sequence[int], O: int, left: bool = False) -> bool:  # noqa: E741
    """Whether a stored array adds one number to each of O outputs: a row, or a column beside a weight on the left."""
    return (
        tuple(shape[-2:]) == (O, 1) and math.prod(shape) == O
        if left
        else tuple(shape[-1:]) == (O,) == (math.prod(shape),)
    )


def _batch_norm(node: Node, x: list[Any]) -> LayerPlan | None:
    weights = x[1:]
    if len(weights) != 4 or not all(isinstance(w, Weight) and len(w.shape) == 1 for w in weights):
        return None
    weight, bias, mean, var = weights
    if mean.shape != weight.shape or var.shape != weight.shape:
        raise ValueError(f"mean has shape {mean.shape} and variance {var.shape}, expected {weight.shape}")
    eps, momentum = node.attributes.get("epsilon", 1e-5), 1 - node.attributes.get("momentum", 0.9)
    make = lambda: _AnyBatchNorm(weight.shape[0], eps, momentum)  # noqa: E731
    return LayerPlan(make, weight, bias, (eps, momentum, mean.key, var.key))


class _AnyBatchNorm(nn.BatchNorm2d):
    """Of images, sequences and vectors alike."""

    _dimensions = (2, 3, 4, 5)
    _expected = "(B, {C}, ...)"


def _layer_norm(node: Node, x: list[Any]) -> LayerPlan | None:
    weight, bias = (*x[1:], None)[:2]
    if not isinstance(weight, Weight) or not (bias is None or isinstance(bias, Weight)):
        return None
    axis, eps = node.attributes.get("axis", -1), node.attributes.get("epsilon", 1e-5)
    if axis < 0 and len(weight.shape) != -axis:
        raise ValueError(f"axis is {axis} and scale has shape {weight.shape}, expected {-axis} dimensions")
    bias = bias or Weight(Constant(weight.shape, PRECISION, lambda: np.zeros(weight.shape, PRECISION)), ("zeros",))
    return LayerPlan(lambda: nn.LayerNorm(weight.shape, eps), weight, bias, (axis, eps))


def _dropout(node: Node, x: list[Any]) -> LayerPlan | None:
    given = x[1] if len(x) > 1 else node.attributes.get("ratio")
    ratio = number(given.constant.load() if isinstance(given, Weight) else given, "the ratio", 0.5)
    return LayerPlan(lambda: nn.Dropout(ratio), None, None, node.outputs[0])


LAYERS: dict[str, Callable[[Node, list[Any]], LayerPlan | None]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": lambda node, x: _product(node, x, [bool(node.attributes.get(name, 0)) for name in ("transA", "transB")]),
    "MatMul": lambda node, x: _product(node, x, [False, False]),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Dropout": _dropout,
}
"""Operations that become layers if their weights are stored."""
