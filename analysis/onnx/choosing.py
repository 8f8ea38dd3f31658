"""ONNX's operations that choose elements, and those that no gradient goes through: of indices, masks, conditions.

The latter are evaluated in NumPy (:mod:`analysis.onnx.host`) and cost nothing in any account. In a trace, which has
shapes alone, zeros stand for their values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.onnx.file import Node
from analysis.onnx.host import BINARY, HOST, UNARY, axes_of, pieces, positions_of
from analysis.onnx.numbers import Inputs, operand
from lance_ref import functional as F
from lance_ref.engine.tensor import Tensor

MAX_PLAIN_ELEMENTS = 2**26
"""Of an array of indices or a mask that depends on the input."""

WITHOUT_GRADIENT = frozenset({
    *("ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf", "Not", "And"),
    *("Or", "Xor", "Floor", "Ceil", "Round", "Sign", "OneHot"),
})  # fmt: skip
"""Operations whose result has no gradient, whatever they are of."""


OF_INTEGERS = frozenset({"CumSum", "Mod", "ReduceProd", "Trilu"})
"""Operations that are evaluated of integers, and of numbers with a gradient refused."""


EACH_ELEMENT = frozenset({*BINARY, *UNARY, "Cast", "CastLike", "Where", "IsInf", "Mod"})
"""Operations that make one element of one of each operand."""


def is_plain(node: Node, operands: Sequence[Any]) -> bool:
    """Whether no gradient goes through a node: its tensors are integers and Booleans, or its result has none."""
    tensors = [x for x in operands if isinstance(x, Tensor)]
    if not tensors or node.op not in HOST:
        return False
    if node.op in WITHOUT_GRADIENT:
        return True
    return all(x.dtype.kind in "iub" for x in tensors)


def evaluate_plain(node: Node, operands: Sequence[Any], dtype: np.dtype) -> Any:
    """The result of such a node as Tensors; floating ones have ``dtype``."""
    shapes_alone = any(isinstance(x, Tensor) and x.is_meta for x in operands)
    if shapes_alone and node.op in EACH_ELEMENT:
        shape = np.broadcast_shapes(*(x.shape for x in operands if x is not None))
        with np.errstate(all="ignore"):  # ones, by which everything can be divided
            one = np.asarray(HOST[node.op](node, [None if x is None else np.ones((), x.dtype) for x in operands]))
        return Tensor.meta(shape, dtype if one.dtype.kind == "f" else one.dtype)
    arrays = [_array(x) if isinstance(x, Tensor) else x for x in operands]
    with np.errstate(all="ignore"):
        result = HOST[node.op](node, arrays)
    several = isinstance(result, list)
    made = []
    for array in result if several else [result]:
        found = np.asarray(array)
        if found.dtype.kind == "f":
            found = found.astype(dtype)
        made.append(Tensor.meta(found.shape, found.dtype) if shapes_alone else Tensor(np.ascontiguousarray(found)))
    return made if several else made[0]


def _array(x: Tensor) -> np.ndarray:
    """The values; zeros of its shape, which take no memory, for a tensor without values."""
    if x.size > MAX_PLAIN_ELEMENTS:
        raise ValueError(f"an array of shape {x.shape}, expected at most {MAX_PLAIN_ELEMENTS} elements")
    return np.broadcast_to(np.zeros((), x.dtype), x.shape) if x.is_meta else x.data


def _gather(node: Node, x: Inputs) -> Tensor:
    """One position is a look at the same memory; several are a copy, and rows of a matrix are those of a table."""
    table, positions = x[0], x[1]
    if not isinstance(table, Tensor):
        raise ValueError("constants are gathered at places that depend on the input")
    (axis,) = axes_of([node.attributes.get("axis", 0)], table.ndim)
    dtype = getattr(positions, "dtype", np.dtype(np.float32))
    if dtype.kind not in "iu":
        raise ValueError("the positions are no integers")
    if isinstance(positions, Tensor) and axis == 0 and table.ndim == 2:
        return F.embedding(positions, table)
    where: Any = int(positions) if isinstance(positions, np.ndarray) and positions.ndim == 0 else positions
    return table[(slice(None),) * axis + (where,)]


def _gather_elements(node: Node, x: Inputs) -> Tensor:
    """x[i, j, ...] with the index in place of the position along one axis."""
    table, positions = x[0], x[1]
    (axis,) = axes_of([node.attributes.get("axis", 0)], table.ndim)
    return table[tuple(positions_of(positions, axis))]


def _gather_nd(node: Node, x: Inputs) -> Tensor:
    """Positions along the leading dimensions stand in the last dimension of the index."""
    if node.attributes.get("batch_dims", 0):
        raise ValueError("batch_dims is not 0")
    positions = x[1]
    if not isinstance(positions, np.ndarray):
        raise ValueError("the positions are not known beforehand")
    return x[0][tuple(positions[..., i] for i in range(positions.shape[-1]))]


def _scatter_nd(node: Node, x: Inputs) -> Tensor:
    """Other values at places that are known beforehand: x where nothing is written, and the updates laid out there."""
    table, positions, updates = x[0], x[1], x[2]
    if node.attributes.get("reduction", "none") != "none":
        raise ValueError(f"reduction is {node.attributes['reduction']!r}, expected 'none'")
    if not isinstance(positions, np.ndarray):
        raise ValueError("the positions are not known beforehand")
    shape = table.shape
    k = positions.shape[-1]
    rows = math.prod(shape[:k])
    flat = np.ravel_multi_index(tuple(np.moveaxis(positions, -1, 0).reshape(k, -1)), shape[:k], mode="wrap")
    like = table if isinstance(table, Tensor) else updates
    if len(np.unique(flat)) < flat.size:
        raise ValueError("a place is written to twice")
    source = np.zeros(rows, np.intp)
    source[flat] = np.arange(flat.size)
    written = np.zeros(rows, bool)
    written[flat] = True
    inner = shape[k:]
    values = _tensor(updates, like)
    laid_out = F.reshape(values, (flat.size, *inner))[source]  # (rows, *inner): of rows that stay, any update
    kept = F.reshape(_tensor(table, like), (rows, *inner))
    chosen = F.where(written.reshape(rows, *[1] * len(inner)), laid_out, kept)
    return F.reshape(chosen, shape)


def _tensor(value: Any, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else Tensor(np.asarray(value).astype(like.dtype))


def _where(node: Node, x: Inputs) -> Tensor:
    """Of a condition that is known, or depends on numbers without a gradient."""
    condition, a, b = x
    like = next(v for v in (a, b) if isinstance(v, Tensor)) if any(isinstance(v, Tensor) for v in (a, b)) else None
    if like is None:
        raise ValueError("both values are constants")
    if not isinstance(condition, (Tensor, np.ndarray)) or condition.dtype.kind != "b":
        raise ValueError("the condition is not Boolean")
    return F.where(condition, operand(a, like), operand(b, like))


def split(node: Node, x: Inputs) -> list[Tensor]:
    (axis,) = axes_of([node.attributes.get("axis", 0)], x[0].ndim)
    return [x[0][(slice(None),) * axis + (part,)] for part in pieces(node, x[0].shape[axis], x)]


CHOOSING = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "Where": _where,
    "Split": split,
}
"""What each of these operations is here."""
