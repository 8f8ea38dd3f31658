"""What the operations share in reading their arguments: operands, dimensions, broadcasting."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lance_ref.engine.blocks import pieces
from lance_ref.engine.tensor import Shape, Tensor, as_tensor

Context = Any
"""A :class:`~lance_ref.engine.autograd.Node`, on which an operation also hangs the small Python values
(dimensions, sizes, never arrays) that its backward needs."""

Gradients = tuple[np.ndarray | None, ...]
"""What a backward returns: one gradient per input, None where none is needed."""

NUMBERS = (int, float, np.integer, np.floating, np.bool_)


def with_numpy_names(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, which takes NumPy's ``axis=`` and ``keepdims=`` for ``dim=`` and ``keepdim=``, as in PyTorch.

    TypeError if both names of one argument are given.
    """

    @functools.wraps(function)
    def renamed(*arguments: Any, **named: Any) -> Tensor:
        for theirs, ours in (("axis", "dim"), ("keepdims", "keepdim")):
            if theirs in named:
                if ours in named:
                    raise TypeError(f"{function.__name__}: {theirs} and {ours} are both given, expected one of them")
                named[ours] = named.pop(theirs)
        return function(*arguments, **named)

    return renamed


def operands(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Both arguments as Tensors; a number takes the dtype of the other one."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a, b
    if isinstance(a, NUMBERS) and not isinstance(b, NUMBERS):
        b = as_tensor(b)
        return as_tensor(float(a), like=b), b
    a = as_tensor(a)
    return a, as_tensor(float(b), like=a) if isinstance(b, NUMBERS) else as_tensor(b)


def number(op: str, name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> float:
    """``value`` as a float.

    Parameters
    ----------
    op, name : str
        What an error calls the operation and the argument.
    expected : str
        Completes "expected ...".
    fits : callable
        Whether a finite number will do.

    Raises
    ------
    ValueError
        For anything but a number, for booleans, NaN and infinity, and where ``fits`` is False.
    """
    whole = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not whole or not math.isfinite(value) or not fits(float(value)):
        raise ValueError(f"{op}: {name} is {value!r}, expected {expected}")
    return float(value)


def share(op: str, name: str, value: Any) -> float:
    """``value`` as a float in [0, 1], else a ValueError."""
    return number(op, name, value, "a number in [0, 1]", lambda x: 0 <= x <= 1)


def positive(op: str, name: str, value: Any) -> float:
    """``value`` as a positive, finite float, else a ValueError."""
    return number(op, name, value, "a positive, finite number", lambda x: x > 0)


def require_floating(op: str, **tensors: Tensor) -> None:
    """Raise TypeError, naming the argument, unless all are float32 or float64.

    For operations with several inputs: that at least one of them is floating, and all floating ones
    alike, is checked wherever a Function is applied.
    """
    for name, tensor in tensors.items():
        if tensor._dtype.kind != "f":  # there are no floats but these two
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected float32 or float64")


def require_images(op: str, x: Tensor) -> None:
    """Raise unless ``x`` is a (B, C, H, W)."""
    if x.ndim != 4:
        raise ValueError(f"{op}: x has shape {x.shape}, expected 4 dimensions (B, C, H, W)")


def broadcast_shape(op: str, a: Tensor, b: Tensor) -> Shape:
    """The shape of an element-wise operation on ``a`` and ``b``; checks their dtypes too."""
    require_floating(op, a=a, b=b)
    if a._shape == b._shape:
        return a._shape
    try:
        return np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise ValueError(
            f"{op}: a has shape {a.shape} and b has shape {b.shape}, expected shapes that broadcast: "
            "from the last dimension backwards, equal sizes or 1"
        ) from None


def unbroadcast(grad: Any, shape: Shape) -> np.ndarray:
    """The adjoint of broadcasting: sum ``grad`` over the dimensions along which ``shape`` was repeated.

    >>> unbroadcast(np.ones((4, 2, 3)), (2, 1)).tolist()
    [[12.0], [12.0]]
    """
    if grad.shape == shape:
        return np.asarray(grad)
    extra = grad.ndim - len(shape)
    repeated = tuple(i for i, n in enumerate(shape, start=extra) if n == 1 and grad.shape[i] != 1)
    result = np.empty(shape, grad.dtype)  # no view of the sum: a leaf then need not copy it
    grad.sum(axis=(*range(extra), *repeated), keepdims=True, out=result[(np.newaxis,) * extra])
    return result


def unbroadcast_product(a: np.ndarray, b: np.ndarray, shape: Shape, over: np.ndarray | None = None) -> np.ndarray:
    """``unbroadcast(a * b, shape)``, of whose product only pieces are made where it has to be summed.

    ``over`` is ``a``, if its shape is the result's and it may be written over.
    """
    if over is not None or a.shape == b.shape == shape:
        return np.asarray(np.multiply(a, b, out=over))
    full = np.broadcast_shapes(a.shape, b.shape)
    repeated = [i for i in range(len(full)) if i < len(full) - len(shape) or shape[i - len(full)] != full[i]]
    if full == shape or 0 in full or len(repeated) == len(full):
        return unbroadcast(a * b, shape)
    a, b = np.broadcast_to(a, full), np.broadcast_to(b, full)
    result = np.empty(shape, a.dtype)
    kept = result.reshape([1 if i in repeated else n for i, n in enumerate(full)])
    for part in pieces(full, repeated):
        kept[part] = (a[part] * b[part]).sum(axis=tuple(repeated), keepdims=True)
    return result


def one_dim(op: str, x: Tensor, dim: int, name: str = "dim") -> int:
    """``dim`` counted from the front."""
    if not isinstance(dim, (int, np.integer)) or isinstance(dim, bool) or not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{op}: {name} is {dim!r}, expected an integer in [{-x.ndim}, {x.ndim}) for shape {x.shape}")
    return int(dim) % x.ndim


def many_dims(op: str, x: Tensor, dim: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """``dim`` as a tuple counted from the front; None (all dimensions) stays None."""
    if dim is None:
        return None
    dims = tuple(one_dim(op, x, d) for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))
    if not dims or len(set(dims)) != len(dims):
        raise ValueError(f"{op}: dim is {dim!r}, expected at least one dimension and none of them twice")
    return dims


def smallest_unsigned(largest: int) -> np.dtype:
    """The smallest unsigned integer type that holds ``largest``.

    >>> [str(smallest_unsigned(n)) for n in (0, 255, 256, 65536)]
    ['uint8', 'uint8', 'uint16', 'uint32']
    """
    return np.min_scalar_type(largest)
