"""The part of an ONNX graph that computes with shapes: small arrays, in NumPy.

Exporters write ``x.reshape(len(x), -1)`` as five nodes that take a shape apart and join it again. These
cost nothing worth counting; here they are evaluated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from analysis.onnx.file import Node
from analysis.onnx.tensor import Constant
from lance_ref.engine.random import as_generator

MAX_ELEMENTS = 2**20
"""Of an array of shape arithmetic: beyond this a file means something else, or harm."""

_CASTS = {1: np.float32, 2: np.uint8, 3: np.int8, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_, 11: np.float64}
_CASTS |= {10: np.float32, 16: np.float32}  # half precision: more digits do no harm here

Arrays = Sequence[Any]


def evaluate(node: Node, x: Arrays) -> list[np.ndarray]:
    """The outputs of a node whose inputs are arrays (None: absent).

    Raises ValueError if the inputs do not fit, or a result would be too large.
    """
    with np.errstate(all="ignore"):
        result = HOST[node.op](node, x)
    outputs = [np.asarray(r) for r in (result if isinstance(result, list) else [result])]
    for output in outputs:
        limited(output.shape)
    return outputs


def limited(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape, unless an array of it would be too large or cannot be."""
    sizes = tuple(int(n) for n in shape)
    if min(sizes, default=0) < 0 or math.prod(sizes) > MAX_ELEMENTS:
        raise ValueError(f"shape arithmetic on an array of shape {sizes}, expected at most {MAX_ELEMENTS} elements")
    return sizes


def integers(value: Any, what: str) -> tuple[int, ...]:
    """An array or list of integers as a tuple."""
    array = np.asarray(value)
    if array.ndim > 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"{what} is no list of integers")
    return tuple(int(n) for n in array.reshape(-1))


def argument(node: Node, x: Arrays, position: int, name: str) -> Any:
    """What newer operator sets take as an input, and older ones as an attribute; None if absent."""
    if len(x) > position and x[position] is not None:
        return x[position]
    return node.attributes.get(name)


def new_shape(node: Node, shape: Sequence[int], x: Arrays) -> tuple[int, ...]:
    """The shape that Reshape, Flatten, Squeeze or Unsqueeze gives to an array of this shape; may contain one −1."""
    if node.op == "Reshape":
        target = integers(argument(node, x, 1, "shape"), "shape")
        copied = not node.attributes.get("allowzero", 0)
        return tuple(shape[i] if n == 0 and copied else n for i, n in enumerate(target))
    if node.op == "Flatten":
        axis = node.attributes.get("axis", 1)
        if not -len(shape) <= axis <= len(shape):
            raise ValueError(f"axis is {axis}, for shape {tuple(shape)}")
        axis += len(shape) if axis < 0 else 0
        return math.prod(shape[:axis]), math.prod(shape[axis:])
    given = argument(node, x, 1, "axes")
    if node.op == "Squeeze":
        axes = [i for i, n in enumerate(shape) if n == 1] if given is None else axes_of(given, len(shape))
        if any(shape[axis] != 1 for axis in axes):
            raise ValueError(f"axes {axes} of shape {tuple(shape)} are not all of size 1")
        return tuple(n for i, n in enumerate(shape) if i not in axes)
    rank = len(shape) + len(integers(given, "axes"))
    axes = axes_of(given, rank)
    sizes = iter(shape)
    return tuple(1 if i in axes else next(sizes) for i in range(rank))


def axes_of(value: Any, rank: int) -> list[int]:
    """Axes counted from the front, each once."""
    axes = [axis + rank if axis < 0 else axis for axis in integers(value, "axes")]
    if any(not 0 <= axis < rank for axis in axes) or len(set(axes)) < len(axes):
        raise ValueError(f"axes are {integers(value, 'axes')}, expected axes of {rank} dimensions, each once")
    return axes


def reduced_axes(node: Node, rank: int, x: Arrays) -> tuple[int, ...]:
    """The axes that a reduction is over: all where none are given, unless the node says that this means none."""
    given = argument(node, x, 1, "axes")
    axes = () if given is None else tuple(axes_of(given, rank))
    return axes if axes or node.attributes.get("noop_with_empty_axes", 0) else tuple(range(rank))


def slices(node: Node, rank: int, x: Arrays) -> tuple[slice, ...]:
    """The index that Slice takes."""
    starts = integers(argument(node, x, 1, "starts"), "starts")
    ends = integers(argument(node, x, 2, "ends"), "ends")
    axes_given = argument(node, x, 3, "axes")
    axes = axes_of(range(len(starts)) if axes_given is None else axes_given, rank)
    steps = integers(x[4], "steps") if len(x) > 4 and x[4] is not None else (1,) * len(starts)
    index = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step == 0:
            raise ValueError("a step is 0")
        backwards_to_the_front = step < 0 and end < -(2**30)
        index[axis] = slice(start, None if backwards_to_the_front else end, step)
    return tuple(index)


def pieces(node: Node, size: int, x: Arrays) -> list[slice]:
    """The parts that Split makes of an axis."""
    given = argument(node, x, 1, "split")
    count = len(node.outputs)
    if given is None:
        each = -(-size // node.attributes.get("num_outputs", count))
        sizes: tuple[int, ...] = tuple(min(each, size - i * each) for i in range(count))
    else:
        sizes = integers(given, "split")
    if len(sizes) != count or sum(sizes) != size or min(sizes) < 0:
        raise ValueError(f"split is {sizes} into {count} outputs, of size {size}")
    stops = np.cumsum(sizes).tolist()
    return [slice(stop - n, stop) for n, stop in zip(sizes, stops, strict=True)]


def _constant(node: Node, x: Arrays) -> Any:
    for name in ("value", "value_int", "value_ints", "value_float", "value_floats"):
        value = node.attributes.get(name)
        if isinstance(value, Constant):
            limited(value.shape)
            return _plain(value.load())
        if value is not None:
            return np.asarray(value, np.int64 if "int" in name else np.float32)
    raise ValueError("the constant has no value of numbers")


def _plain(array: np.ndarray) -> np.ndarray:
    """bfloat16 and its like as float32."""
    return array if array.dtype.kind in "iubf" else array.astype(np.float32)


def _shape(node: Node, x: Arrays) -> Any:
    start, end = node.attributes.get("start", 0), node.attributes.get("end")
    return np.array(x[0].shape[start:end], np.int64)


def _filled(node: Node, x: Arrays) -> Any:
    value = node.attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else _plain(value.load())
    return np.full(limited(integers(x[0], "shape")), fill.reshape(-1)[0])


def _cast(node: Node, x: Arrays) -> Any:
    to = node.attributes.get("to")
    if to not in _CASTS:
        raise ValueError(f"cast to type {to}")
    return x[0].astype(_CASTS[to])


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Node, Arrays], Any]:
    def run(node: Node, x: Arrays) -> Any:
        limited(np.broadcast_shapes(*(v.shape for v in x)))
        return functools.reduce(function, x)  # of two, or of any number that Max, Min and Sum take

    return run


def _unary(function: Callable[[Any], Any]) -> Callable[[Node, Arrays], Any]:
    return lambda node, x: function(x[0])


def _divide(a: np.ndarray, b: np.ndarray) -> Any:
    """Integers are cut towards zero."""
    if a.dtype.kind not in "iu":
        return a / b
    if not np.all(b):
        raise ValueError("an integer is divided by 0")
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)


def _range(node: Node, x: Arrays) -> Any:
    start, limit, step = (v.item() for v in x)
    if not step:
        raise ValueError("the step is 0")
    limited((max(math.ceil((limit - start) / step), 0),))
    return np.arange(start, limit, step, dtype=x[0].dtype)


def _reduce(function: Callable[..., Any]) -> Callable[[Node, Arrays], Any]:
    def run(node: Node, x: Arrays) -> Any:
        axes = reduced_axes(node, x[0].ndim, x)
        return function(x[0], axis=axes, keepdims=bool(node.attributes.get("keepdims", 1))) if axes else x[0]

    return run


def _split(node: Node, x: Arrays) -> Any:
    (axis,) = axes_of([node.attributes.get("axis", 0)], x[0].ndim)
    return [x[0][(slice(None),) * axis + (part,)] for part in pieces(node, x[0].shape[axis], x)]


def _reshaped(node: Node, x: Arrays) -> Any:
    return x[0].reshape(new_shape(node, x[0].shape, x))


def _gather(node: Node, x: Arrays) -> Any:
    (axis,) = axes_of([node.attributes.get("axis", 0)], x[0].ndim)
    limited((*x[0].shape[:axis], *x[1].shape, *x[0].shape[axis + 1 :]))
    return np.take(x[0], x[1], axis=axis)


def _concat(node: Node, x: Arrays) -> Any:
    limited((sum(v.size for v in x),))
    return np.concatenate(x, axis=node.attributes["axis"])


def _where(node: Node, x: Arrays) -> Any:
    limited(np.broadcast_shapes(*(v.shape for v in x)))
    return np.where(*x)


def _expand(node: Node, x: Arrays) -> Any:
    shape = limited(np.broadcast_shapes(x[0].shape, limited(integers(x[1], "shape"))))
    return np.broadcast_to(x[0], shape)


def _trilu(node: Node, x: Arrays) -> Any:
    k = int(np.asarray(x[1])) if len(x) > 1 and x[1] is not None else 0
    return np.triu(x[0], k) if node.attributes.get("upper", 1) else np.tril(x[0], k)


def _cumsum(node: Node, x: Arrays) -> Any:
    if node.attributes.get("exclusive", 0) or node.attributes.get("reverse", 0):
        raise ValueError("exclusive or reverse is not 0")
    return np.cumsum(x[0], axis=int(np.asarray(x[1])), dtype=x[0].dtype)


def _chosen(function: Callable[..., Any]) -> Callable[[Node, Arrays], Any]:
    def run(node: Node, x: Arrays) -> Any:
        if node.attributes.get("select_last_index", 0):
            raise ValueError("select_last_index is not 0")
        axis = node.attributes.get("axis", 0)
        found = function(x[0], axis=axis).astype(np.int64)
        return np.expand_dims(found, axis) if node.attributes.get("keepdims", 1) else found

    return run


def _cast_like(node: Node, x: Arrays) -> Any:
    return x[0].astype(x[1].dtype)


def _tile(node: Node, x: Arrays) -> Any:
    times = integers(x[1], "repeats")
    limited([n * t for n, t in zip(x[0].shape, times, strict=True)])
    return np.tile(x[0], times)


def _scatter_nd(node: Node, x: Arrays) -> Any:
    if node.attributes.get("reduction", "none") != "none":
        raise ValueError(f"reduction is {node.attributes['reduction']!r}, expected 'none'")
    result = x[0].copy()
    result[tuple(np.moveaxis(x[1], -1, 0))] = x[2]
    return result


def _gather_nd(node: Node, x: Arrays) -> Any:
    if node.attributes.get("batch_dims", 0):
        raise ValueError("batch_dims is not 0")
    return x[0][tuple(np.moveaxis(x[1], -1, 0))]


def _uniform(node: Node, x: Arrays) -> Any:
    """Random numbers of a shape, from the library's own source."""
    limited(x[0].shape)
    low, high = node.attributes.get("low", 0.0), node.attributes.get("high", 1.0)
    return (as_generator(None).random(x[0].shape) * (high - low) + low).astype(np.float32)


def _gather_elements(node: Node, x: Arrays) -> Any:
    (axis,) = axes_of([node.attributes.get("axis", 0)], x[0].ndim)
    return x[0][tuple(positions_of(x[1], axis))]


def positions_of(index: Any, axis: int) -> list[Any]:
    """The place of every element of an index array, with the index in place of the place along one axis."""
    grids = np.ogrid[tuple(slice(n) for n in index.shape)]
    return [index if i == axis else grid for i, grid in enumerate(grids)]


RANDOM = frozenset({"RandomUniformLike"})
"""Operations that give other numbers at each run."""

UNARY = {"Floor": np.floor, "Ceil": np.ceil, "Sqrt": np.sqrt, "Neg": np.negative, "Abs": np.abs, "Not": np.invert,
         "Round": np.rint, "Sign": np.sign, "Exp": np.exp, "Log": np.log, "Sin": np.sin, "Cos": np.cos,
         "IsNaN": np.isnan, "Tanh": np.tanh}  # fmt: skip
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divide, "Sum": np.add, "Max": np.maximum,
    "Min": np.minimum, "Equal": np.equal, "Less": np.less, "Greater": np.greater, "And": np.logical_and,
    "Or": np.logical_or, "Xor": np.logical_xor, "GreaterOrEqual": np.greater_equal, "LessOrEqual": np.less_equal,
    "Pow": lambda a, b: np.power(a, b).astype(a.dtype),
}  # fmt: skip

HOST: dict[str, Callable[[Node, Arrays], Any]] = {
    "Constant": _constant,
    "Shape": _shape,
    "Size": lambda node, x: np.int64(math.prod(x[0].shape)),
    "ConstantOfShape": _filled,
    "Identity": lambda node, x: x[0],
    "Cast": _cast,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": lambda node, x: x[0][slices(node, x[0].ndim, x)],
    "Split": _split,
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshaped),
    "Transpose": lambda node, x: x[0].transpose(node.attributes.get("perm")),
    "Expand": _expand,
    "Range": _range,
    "Where": _where,
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceMean": _reduce(np.mean),
    "Reciprocal": lambda node, x: 1 / x[0],
    "IsInf": lambda node, x: (
        (np.isposinf(x[0]) & bool(node.attributes.get("detect_positive", 1)))
        | (np.isneginf(x[0]) & bool(node.attributes.get("detect_negative", 1)))
    ),
    "Trilu": _trilu,
    "Mod": lambda node, x: (np.fmod if node.attributes.get("fmod", 0) else np.mod)(*x),
    "CumSum": _cumsum,
    "ArgMax": _chosen(np.argmax),
    "ArgMin": _chosen(np.argmin),
    "CastLike": _cast_like,
    "Tile": _tile,
    "ScatterND": _scatter_nd,
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
    "RandomUniformLike": _uniform,
    "Clip": lambda node, x: np.clip(x[0], argument(node, x, 1, "min"), argument(node, x, 2, "max")).astype(x[0].dtype),
    **{op: _unary(function) for op, function in UNARY.items()},
    **{op: _binary(function) for op, function in BINARY.items()},
}
"""What each operation gives for arrays (``Shape`` and ``Size`` for anything with a shape)."""
