"""Indexing: a view for integers and slices, a copy for arrays of positions."""
# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any

import numpy as np

from lance_ref.engine.arguments import Context, Gradients, smallest_unsigned
from lance_ref.engine.autograd import Function
from lance_ref.engine.tensor import Shape, Tensor, as_tensor


class _Index:
    """An index, one part for each dimension: an integer, a slice, None, or an array of positions.

    A record shows an array as ``("array", its shape)``, and everything else as it is.
    """

    def __init__(self, parts: tuple[Any, ...], shape: Shape) -> None:
        self.parts = parts  # a trace has a Tensor without data in the place of an array
        self.shape = shape  # of the result

    @property
    def has_arrays(self) -> bool:
        return any(isinstance(part, (np.ndarray, Tensor)) for part in self.parts)

    def describe(self) -> tuple[Any, ...]:
        return tuple(("array", p.shape) if isinstance(p, (np.ndarray, Tensor)) else p for p in self.parts)


class BasicIndex(Function):
    """Integers, slices and None: the result looks at the same buffer."""

    op = "index"
    returns_view = True

    @staticmethod
    def output_shape(x: Tensor, index: _Index) -> Shape:
        return index.shape

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, index: _Index) -> np.ndarray:
        ctx.parts = (*index.parts, Ellipsis)  # with an Ellipsis even x[0] is a view, not a number
        return np.asarray(x[ctx.parts])

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        grad = np.zeros(ctx.input_shapes[0], grad_output.dtype)
        grad[ctx.parts] = grad_output
        return (grad,)


class ArrayIndex(Function):
    """At least one array of positions: the result is a copy, and the positions are kept."""

    op = "index"

    @staticmethod
    def output_shape(x: Tensor, index: _Index) -> Shape:
        return index.shape

    @staticmethod
    def forward(ctx: Context, x: np.ndarray, index: _Index) -> np.ndarray:
        parts: list[Any] = list(index.parts)
        consumed = iter(x.shape)
        sizes = [0 if part is None else next(consumed) for part in parts]
        names: list[str] = []
        for i, part in enumerate(parts):
            if isinstance(part, np.ndarray):
                name = f"index{len(names) or ''}"
                positions = np.where(part < 0, part + sizes[i], part).astype(smallest_unsigned(max(sizes[i] - 1, 0)))
                ctx.save_for_backward(**{name: positions})
                names.append(name)
                parts[i] = name
        ctx.parts = tuple(parts)
        return x[index.parts]

    @staticmethod
    def backward(ctx: Context, grad_output: np.ndarray) -> Gradients:
        grad = np.zeros(ctx.input_shapes[0], grad_output.dtype)
        parts = tuple(ctx[part].astype(np.intp) if isinstance(part, str) else part for part in ctx.parts)
        np.add.at(grad, parts, grad_output)  # a position that was taken twice gets both gradients
        return (grad,)


def index(x: Any, index: Any) -> Tensor:
    """``x[index]`` with NumPy's meaning.

    Parameters
    ----------
    index : int, slice, None, Ellipsis, integer or boolean array, or a tuple of these
        Integers, slices and None give a view and keep nothing. Arrays (also as Tensors or lists)
        give a copy, and their positions are kept, in the smallest unsigned type that fits.

    Raises
    ------
    IndexError
        If there are too many indices or one is out of bounds.
    TypeError
        If an index is none of the above.
    """
    x = as_tensor(x)
    resolved = _resolve_index(x, index if isinstance(index, tuple) else (index,))
    return (ArrayIndex if resolved.has_arrays else BasicIndex).apply(x, index=resolved)


def _resolve_index(x: Tensor, index: tuple[Any, ...]) -> _Index:
    """One part per dimension, everything checked, and the shape of the result."""
    given = [_one_part(part) for part in index]
    widths = [0 if part is None or part is Ellipsis else _width(part) for part in given]
    missing = x.ndim - sum(widths)
    if missing < 0 or sum(part is Ellipsis for part in given) > 1:
        raise IndexError(
            f"index: {sum(widths)} indices for x of shape {x.shape}, expected at most {x.ndim} and one Ellipsis"
        )
    where = next((i for i, part in enumerate(given) if part is Ellipsis), len(given))
    given[where : where + 1] = [slice(None)] * missing
    parts: list[Any] = []
    slots: list[Shape | None] = []  # what each part leaves of its dimension; None for an array's
    dim = 0
    for part in given:
        if part is None:
            parts.append(None)
            slots.append((1,))
            continue
        sizes = x.shape[dim : dim + _width(part)]
        if isinstance(part, slice):
            parts.append(part)
            slots.append((len(range(*part.indices(sizes[0]))),))
        elif isinstance(part, int):
            _check_bounds(part, part, dim, x)
            parts.append(part)
            slots.append(())
        elif part.dtype.kind == "b":  # one array of positions for each of its dimensions
            if part.shape != sizes:
                raise IndexError(
                    f"index: a Boolean mask has shape {part.shape}, expected {sizes} (x has shape {x.shape})"
                )
            parts.extend(np.nonzero(part))
            slots.extend([None] * part.ndim)
        else:
            if isinstance(part, np.ndarray) and part.size:
                _check_bounds(int(part.min()), int(part.max()), dim, x)
            parts.append(part)
            slots.append(None)
        dim += len(sizes)
    return _Index(tuple(parts), _indexed_shape(parts, slots))


def _one_part(part: Any) -> Any:
    """None, Ellipsis, a slice, an int, an array of integers or Booleans, or a Tensor without data."""
    if part is None or part is Ellipsis:
        return part
    if isinstance(part, slice):
        if any(
            bound is not None and not isinstance(bound, (int, np.integer))
            for bound in (part.start, part.stop, part.step)
        ):
            raise TypeError(f"index: {part} has bounds that are not integers")
        return part
    if isinstance(part, Tensor):
        array: Any = part if part.is_meta else part.data
    else:
        array = np.asarray(part, dtype=np.intp if isinstance(part, (list, tuple)) and not len(part) else None)
    if array.dtype.kind not in "iub" or (array.ndim == 0 and array.dtype.kind == "b"):
        raise TypeError(
            f"index: an index is {part!r}, expected integers, slices, None, Ellipsis, integer or Boolean arrays"
        )
    if isinstance(array, Tensor):
        if array.dtype.kind == "b":
            raise RuntimeError(
                "index: how many elements a Boolean mask selects depends on its values; it cannot be traced"
            )
        return array
    return int(array) if array.ndim == 0 else array


def _width(part: Any) -> int:
    """How many dimensions of the indexed tensor a part stands for."""
    return len(part.shape) if isinstance(part, np.ndarray) and part.dtype.kind == "b" else 1


def _check_bounds(smallest: int, largest: int, dim: int, x: Tensor) -> None:
    size = x.shape[dim]
    if smallest < -size or largest >= size:
        wrong = smallest if smallest < -size else largest
        raise IndexError(f"index: {wrong} is out of bounds for dim {dim} of x of shape {x.shape}")


def _indexed_shape(parts: list[Any], slots: list[Shape | None]) -> Shape:
    """NumPy's rule: adjacent arrays leave their dimensions in place, separated ones go to the front."""
    arrays = [i for i, slot in enumerate(slots) if slot is None]
    kept = [n for slot in slots for n in (slot or ())]
    if not arrays:
        return tuple(kept)
    shapes = [parts[i].shape for i in arrays]
    try:
        broadcast = np.broadcast_shapes(*shapes)
    except ValueError:
        raise IndexError(f"index: index arrays of shapes {shapes} do not broadcast") from None
    advanced = [i for i, part in enumerate(parts) if slots[i] is None or isinstance(part, int)]
    adjacent = advanced[-1] - advanced[0] == len(advanced) - 1
    front = len([n for slot in slots[: advanced[0]] for n in (slot or ())]) if adjacent else 0
    return (*kept[:front], *broadcast, *kept[front:])
