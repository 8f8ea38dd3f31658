"""The tensor: a NumPy array that may remember how it was made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from lance_ref.engine.ownership import alone, lie_alike
from lance_ref.engine.state import state

Shape = tuple[int, ...]
Operator = Callable[..., "Tensor"]
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

_uid = itertools.count()


def next_uid() -> int:
    """A number that no other tensor has."""
    return next(_uid)


class Version:
    """Counts the in-place changes of one buffer; shared by a tensor and its views."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class Tensor:
    """A NumPy array that may take part in differentiation.

    Parameters
    ----------
    data : array_like
        float32 and float64 arrays are taken as they are, without a copy; Python numbers and
        lists become float32; integer and boolean arrays are kept (for labels and indices)
        but cannot require gradients.
    requires_grad : bool
        Whether :meth:`backward` should leave a gradient in :attr:`grad`.

    Attributes
    ----------
    data : numpy.ndarray
        The values. Assigning to it replaces them and is noticed by the tape.
    grad : numpy.ndarray or None
        The accumulated gradient of a leaf, of the same shape and dtype; None before backward.
    """

    __slots__ = (
        *("__weakref__", "_data", "_dtype", "_node", "_shape", "_version", "grad", "requires_grad", "uid"),
        "of_parameter",  # whether it is a parameter, or a look at the memory of one
    )
    __array_priority__ = 1000
    is_parameter = False

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        self._data: np.ndarray | None = _as_array(data)
        self._shape: Shape = self._data.shape
        self._dtype: np.dtype = self._data.dtype
        self._node: Any = None  # the autograd.Node that made it; autograd is built on this module
        self._version = Version()
        self.grad: np.ndarray | None = None
        self.uid = next(_uid)
        self.requires_grad = False
        self.of_parameter = self.is_parameter
        if requires_grad:
            self.requires_grad_()

    @staticmethod
    def of(data: np.ndarray, version: Version | None = None) -> Tensor:
        """A tensor on an array that an operation made, whose dtype is known to be one of a tensor.

        ``version`` is that of the tensor whose buffer it shares; by default it has one of its own.
        """
        tensor = Tensor.__new__(Tensor)
        if type(data) is not np.ndarray:  # NumPy's results without dimensions are no arrays
            data = np.asarray(data)
        tensor._data, tensor._shape, tensor._dtype = data, data.shape, data.dtype
        tensor._node, tensor._version, tensor.grad = None, version or Version(), None
        tensor.requires_grad, tensor.uid, tensor.of_parameter = False, next(_uid), False
        return tensor

    @staticmethod
    def meta(shape: Sequence[int], dtype: Any = np.float32, requires_grad: bool = False) -> Tensor:
        """A tensor that has a shape and a dtype but no data (see :func:`lance_ref.trace`)."""
        tensor = Tensor.__new__(Tensor)
        tensor._init_meta(tuple(int(n) for n in shape), np.dtype(dtype))
        if requires_grad:
            tensor.requires_grad_()
        return tensor

    def _init_meta(self, shape: Shape, dtype: np.dtype) -> None:
        self._data, self._shape, self._dtype = None, shape, dtype
        self._node, self._version, self.grad = None, Version(), None
        self.requires_grad, self.uid, self.of_parameter = False, next(_uid), self.is_parameter

    def __setstate__(self, state: tuple[dict[str, Any] | None, dict[str, Any]]) -> None:
        """What ``copy.deepcopy`` and ``pickle`` make is a tensor of its own, with a number of its own."""
        self.of_parameter = self.is_parameter
        for part in state:
            for name, value in (part or {}).items():
                setattr(self, name, value)
        self.uid = next(_uid)

    def __copy__(self) -> Tensor:
        """The same array at the same place of the tape, and so with the same number."""
        other = type(self).__new__(type(self))
        state: Any = self.__getstate__()
        other.__setstate__(state)
        other.uid = self.uid
        return other

    # ---- values ----------------------------------------------------------------------

    @property
    def data(self) -> np.ndarray:
        if self._data is None:
            raise RuntimeError(
                f"this tensor of shape {self._shape} has no data: it belongs to a trace, which runs a "
                "network on shapes alone. A forward() that looks at values cannot be traced"
            )
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        array = _as_array(value.data if isinstance(value, Tensor) else value)
        if array.shape != self._shape:
            raise ValueError(f"data has shape {array.shape}, expected {self._shape} (the tensor's own)")
        if self.requires_grad and array.dtype not in FLOATS:
            raise TypeError(f"data has dtype {array.dtype}, expected float32 or float64 for a tensor with gradients")
        # The tape compares versions, and so notices that a saved buffer is no longer what it was.
        self._data, self._dtype = array, array.dtype
        self._version.value += 1

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write into the tensor's own buffer; the tape notices. Only for tensors without history."""
        if self._node is not None:
            raise RuntimeError("cannot write in place into the result of a differentiable operation; use detach()")
        if self.requires_grad and state.grad_enabled:
            raise RuntimeError("a leaf that requires gradients can be written in place only inside no_grad()")
        new = value.data if isinstance(value, Tensor) else value
        if state.deferral is not None:
            state.deferral.compute()  # what was put off gets the values that it was called with
        self.data[index] = new
        self._version.value += 1

    @property
    def is_meta(self) -> bool:
        """Whether the tensor has a shape but no data."""
        return self._data is None

    @property
    def shape(self) -> Shape:
        return self._shape

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    @property
    def ndim(self) -> int:
        return len(self._shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for n in self._shape:
            size *= n
        return size

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("a tensor without dimensions has no len()")
        return self._shape[0]

    def __repr__(self) -> str:
        values = f"meta, shape={self._shape}" if self._data is None else np.array2string(self._data, separator=", ")
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"{type(self).__name__}({values}, dtype={self._dtype}{grad})"

    def numpy(self) -> np.ndarray:
        """The values as an array: :attr:`data` itself, not a copy."""
        return self.data

    def item(self) -> float:
        """The single value as a Python number."""
        if self.size != 1:
            raise ValueError(f"item() needs a tensor with one element, got shape {self._shape}")
        value: float = self.data.item()
        return value

    def detach(self) -> Tensor:
        """A tensor on the same buffer that is cut off from the tape."""
        if self._data is None:
            return Tensor.meta(self._shape, self._dtype)
        result = Tensor(self._data)
        result._version = self._version
        return result

    # ---- differentiation -------------------------------------------------------------

    @property
    def is_leaf(self) -> bool:
        """Whether no differentiable operation made this tensor."""
        return self._node is None

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Switch gradients for this leaf on or off, and return the tensor."""
        if requires_grad and self._dtype not in FLOATS:
            raise TypeError(f"only float32 and float64 tensors can require gradients, this one is {self._dtype}")
        if not requires_grad and self._node is not None:
            raise RuntimeError("only a leaf can stop requiring gradients; use detach() for a result")
        self.requires_grad = requires_grad
        return self

    def backward(self, gradient: Any = None, retain_graph: bool = False) -> None:
        """Add d(self)/d(leaf), weighted by ``gradient``, to every leaf's ``.grad``.

        Parameters
        ----------
        gradient : array_like, optional
            Gradient of the final quantity with respect to this tensor, of its shape and dtype.
            May be left out for a single element (then it is 1).
        retain_graph : bool
            Keep the saved arrays, so that ``backward`` can run again. Without it every node
            gives up its arrays as soon as it has used them.

        Raises
        ------
        RuntimeError
            If nothing here requires gradients, the graph was already consumed, a saved tensor
            or parameter was changed since the forward pass, or ``gradient`` is missing.
        """
        if not self.requires_grad:
            raise RuntimeError("backward() on a tensor that does not require gradients")
        if gradient is None:
            if self.size != 1:
                raise RuntimeError(
                    f"backward() without a gradient needs a single element, this has shape {self._shape}"
                )
            # The derivative of a number with respect to itself.
            seed = np.ones(self._shape, self._dtype)
        else:
            seed = np.asarray(gradient.data if isinstance(gradient, Tensor) else gradient)
            if seed.shape != self._shape:
                raise ValueError(f"gradient has shape {seed.shape}, expected {self._shape}")
            if seed.dtype != self._dtype:
                raise TypeError(f"gradient has dtype {seed.dtype}, expected {self._dtype}")
        if self._node is None:
            self.accumulate_grad(seed, owned=False)
        else:
            self._node.run_backward(seed, retain_graph)

    def accumulate_grad(self, grad: np.ndarray, owned: bool) -> None:
        """Add to this leaf's ``.grad``; an array that is not ``owned`` (may be in use elsewhere) is copied."""
        if self.grad is not None:
            total, self.grad = self.grad, None
            # A new array where somebody else holds the old gradient.
            in_place = alone(total) and lie_alike(total, grad)
            grad = np.add(total, grad, out=total if in_place else None)
        elif not owned:
            grad = grad.copy()
        self.grad = np.asarray(grad)  # NumPy's results without dimensions are no arrays

    # ---- operators and methods: lance_ref.functional hands its functions over -------

    FUNCTIONS: ClassVar[frozenset[str]] = frozenset()  # names of lance_ref.functional, for error messages
    __add__: ClassVar[Operator]
    __radd__: ClassVar[Operator]
    __sub__: ClassVar[Operator]
    __rsub__: ClassVar[Operator]
    __mul__: ClassVar[Operator]
    __rmul__: ClassVar[Operator]
    __truediv__: ClassVar[Operator]
    __rtruediv__: ClassVar[Operator]
    __pow__: ClassVar[Operator]
    __neg__: ClassVar[Operator]
    __matmul__: ClassVar[Operator]
    __rmatmul__: ClassVar[Operator]
    __getitem__: ClassVar[Operator]
    sum: ClassVar[Operator]
    mean: ClassVar[Operator]
    max: ClassVar[Operator]
    var: ClassVar[Operator]
    reshape: ClassVar[Operator]
    view: ClassVar[Operator]
    flatten: ClassVar[Operator]
    permute: ClassVar[Operator]
    transpose: ClassVar[Operator]
    exp: ClassVar[Operator]
    log: ClassVar[Operator]
    sqrt: ClassVar[Operator]
    tanh: ClassVar[Operator]
    sigmoid: ClassVar[Operator]
    relu: ClassVar[Operator]

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Tensor:
        """``array + tensor`` is :meth:`__radd__`; of tensors NumPy's functions compute nothing, and say so."""
        reflected = _REFLECTED.get(ufunc)
        in_place = out is not None and out[0] is inputs[0]  # array += tensor
        if (
            reflected is None
            or method != "__call__"
            or options
            or isinstance(inputs[0], Tensor)
            or (out and not in_place)
        ):
            name = ufunc.__name__
            ours = f"lance_ref.functional.{name}" if name in self.FUNCTIONS else "a function of lance_ref.functional"
            raise TypeError(f"np.{name} takes no Tensor, for NumPy does not differentiate: use {ours}, or tensor.data")
        result: Tensor = getattr(self, reflected)(inputs[0])
        return result


_REFLECTED = {
    np.add: "__radd__",
    np.subtract: "__rsub__",
    np.multiply: "__rmul__",
    np.divide: "__rtruediv__",
    np.matmul: "__rmatmul__",
}
"""The operator that a tensor has for NumPy's, where an array stands on the left."""


def _as_array(data: Any) -> np.ndarray:
    if isinstance(data, Tensor):
        raise TypeError("data is a Tensor already; use tensor.detach() or tensor.data")
    if isinstance(data, (np.ndarray, np.generic)):
        array = np.asarray(data)
        if array.dtype.kind in "iub" or array.dtype in FLOATS:
            return array
        raise TypeError(f"data has dtype {array.dtype}, expected float32, float64 or integers")
    try:
        array = np.asarray(data)
    except (TypeError, ValueError) as error:
        raise TypeError(f"data of type {type(data).__name__} is not numbers: {error}") from None
    if array.dtype.kind not in "biuf":  # NumPy would read None as NaN and "1" as 1
        raise TypeError(f"data of type {type(data).__name__} is not numbers, expected numbers or lists of numbers")
    return array.astype(np.float32)


def as_tensor(value: Any, like: Tensor | None = None) -> Tensor:
    """``value`` as a Tensor; a Python number takes the dtype of ``like``."""
    if isinstance(value, Tensor):
        return value
    if like is not None and isinstance(value, (int, float)):
        return Tensor(np.asarray(value, dtype=like.dtype))
    return Tensor(value)
