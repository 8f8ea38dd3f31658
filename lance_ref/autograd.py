"""Reverse-mode automatic differentiation on NumPy arrays, with a tape one can read.

A :class:`Tensor` is an array that may remember how it was made. Each differentiable
operation is a :class:`Function`: its ``forward`` computes the result and *names* every
array that it keeps for later, its ``backward`` turns the gradient of the result into
gradients of the inputs. One :class:`Node` per executed function holds those named arrays;
the nodes, linked from result to inputs, are the tape.

A node never holds its input tensors: an array lives on the tape if, and only if,
``forward`` saved it. That is what makes the byte counts of :func:`lance_ref.tape` true.

The same functions run on shapes alone: a tensor without data ("meta" tensor) flows
through ``output_shape`` instead of ``forward``. See :mod:`lance_ref.tracing`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from lance_ref._state import state

Shape = tuple[int, ...]
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

_sequence = itertools.count()
_uid = itertools.count()


@contextmanager
def no_grad() -> Iterator[None]:
    """Inside the ``with`` block no operation is put on the tape."""
    previous, state.grad_enabled = state.grad_enabled, False
    try:
        yield
    finally:
        state.grad_enabled = previous


class _Version:
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

    __slots__ = ("__weakref__", "_data", "_dtype", "_node", "_shape", "_version", "grad", "requires_grad", "uid")
    __array_priority__ = 1000
    __array_ufunc__ = None  # so that `ndarray + Tensor` comes to Tensor.__radd__

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        self._data: np.ndarray | None = _as_array(data)
        self._shape: Shape = self._data.shape
        self._dtype: np.dtype = self._data.dtype
        self._node: Node | None = None
        self._version = _Version()
        self.grad: np.ndarray | None = None
        self.uid = next(_uid)
        self.requires_grad = False
        if requires_grad:
            self.requires_grad_()

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
        self._node, self._version, self.grad = None, _Version(), None
        self.requires_grad, self.uid = False, next(_uid)

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
        self._data, self._dtype = array, array.dtype
        self._version.value += 1

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write into the tensor's own buffer; the tape notices. Only for tensors without history."""
        if self._node is not None:
            raise RuntimeError("cannot write in place into the result of a differentiable operation; use detach()")
        if self.requires_grad and state.grad_enabled:
            raise RuntimeError("a leaf that requires gradients can be written in place only inside no_grad()")
        self.data[index] = value.data if isinstance(value, Tensor) else value
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
        """The values as an array; refuses a tensor that requires gradients (use ``detach().numpy()``)."""
        if self.requires_grad:
            raise RuntimeError("this tensor requires gradients; use tensor.detach().numpy()")
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
                raise RuntimeError(f"backward() without a gradient needs a single element, this has shape {self._shape}")
            seed = np.ones(self._shape, self._dtype)
        else:
            seed = np.asarray(gradient.data if isinstance(gradient, Tensor) else gradient)
            if seed.shape != self._shape:
                raise ValueError(f"gradient has shape {seed.shape}, expected {self._shape}")
            if seed.dtype != self._dtype:
                raise TypeError(f"gradient has dtype {seed.dtype}, expected {self._dtype}")
        if self._node is None:
            _accumulate(self, seed, owned=False)
        else:
            _run_backward(self._node, seed, retain_graph)

    # ---- operators: each is a function of lance_ref.functional -----------------------

    def __add__(self, other: Any) -> Tensor:
        return F.add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Tensor:
        return F.sub(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return F.sub(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return F.mul(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Tensor:
        return F.div(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return F.div(other, self)

    def __pow__(self, exponent: Any) -> Tensor:
        return F.pow(self, exponent)

    def __neg__(self) -> Tensor:
        return F.neg(self)

    def __matmul__(self, other: Any) -> Tensor:
        return F.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return F.matmul(other, self)

    def __getitem__(self, index: Any) -> Tensor:
        return F.index(self, index)

    def sum(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
        return F.sum(self, dim, keepdim)

    def mean(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
        return F.mean(self, dim, keepdim)

    def max(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        return F.max(self, dim, keepdim)

    def var(self, dim: int | Sequence[int] | None = None, correction: int = 1, keepdim: bool = False) -> Tensor:
        return F.var(self, dim, correction, keepdim)

    def reshape(self, *shape: Any) -> Tensor:
        return F.reshape(self, _variadic(shape))

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        return F.flatten(self, start_dim, end_dim)

    def permute(self, *dims: Any) -> Tensor:
        return F.permute(self, _variadic(dims))

    def transpose(self, dim0: int, dim1: int) -> Tensor:
        return F.transpose(self, dim0, dim1)

    def exp(self) -> Tensor:
        return F.exp(self)

    def log(self) -> Tensor:
        return F.log(self)

    def sqrt(self) -> Tensor:
        return F.sqrt(self)

    def tanh(self) -> Tensor:
        return F.tanh(self)

    def sigmoid(self) -> Tensor:
        return F.sigmoid(self)

    def relu(self) -> Tensor:
        return F.relu(self)


def _variadic(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """``f(2, 3)`` and ``f((2, 3))`` mean the same, as in PyTorch."""
    if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        return tuple(arguments[0])
    return arguments


def _as_array(data: Any) -> np.ndarray:
    if isinstance(data, Tensor):
        raise TypeError("data is a Tensor already; use tensor.detach() or tensor.data")
    if isinstance(data, (np.ndarray, np.generic)):
        array = np.asarray(data)
        if array.dtype.kind in "iub" or array.dtype in FLOATS:
            return array
        raise TypeError(f"data has dtype {array.dtype}, expected float32, float64 or integers")
    try:
        return np.asarray(data, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"data of type {type(data).__name__} is not numbers: {error}") from None


def as_tensor(value: Any, like: Tensor | None = None) -> Tensor:
    """``value`` as a Tensor; a Python number takes the dtype of ``like``."""
    if isinstance(value, Tensor):
        return value
    if like is not None and isinstance(value, (int, float)):
        return Tensor(np.asarray(value, dtype=like.dtype))
    return Tensor(value)


# ---- functions and the tape ----------------------------------------------------------


class Function:
    """One differentiable operation: subclass it, and call :meth:`apply`.

    Attributes
    ----------
    op : str
        The operation's name in tape reports, traces and cost rules.
    returns_view : bool
        Whether the result may share the first input's buffer.
    """

    op: ClassVar[str]
    returns_view: ClassVar[bool] = False

    @staticmethod
    def output_shape(*inputs: Tensor, **attributes: Any) -> Shape:
        """Check the inputs and give the result's shape, from shapes and dtypes alone.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what came, and what was expected.
        """
        raise NotImplementedError

    @staticmethod
    def forward(ctx: Node, *inputs: np.ndarray, **attributes: Any) -> np.ndarray:
        """Compute the result; save by name, on ``ctx``, what ``backward`` will need."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Node, grad_output: np.ndarray) -> tuple[np.ndarray | None, ...]:
        """Gradients of the inputs, in order; None where ``ctx.needs_input_grad`` is False."""
        raise NotImplementedError

    @classmethod
    def apply(cls, *inputs: Tensor, **attributes: Any) -> Tensor:
        """Check, compute, and, where an input requires gradients, put a node on the tape."""
        dtype = _common_dtype(cls.op, inputs)
        shape = cls.output_shape(*inputs, **attributes)
        requires_grad = state.grad_enabled and any(tensor.requires_grad for tensor in inputs)
        if any(tensor._data is None for tensor in inputs):
            output = Tensor.meta(shape, dtype, requires_grad)
        else:
            node = Node(cls, inputs, requires_grad)
            data = cls.forward(node, *[tensor.data for tensor in inputs], **attributes)
            if data.shape != shape or data.dtype != dtype:
                raise AssertionError(f"{cls.op}: forward gave {data.shape} {data.dtype}, expected {shape} {dtype}")
            output = Tensor(data)
            if cls.returns_view:
                output._version = inputs[0]._version
            if requires_grad:
                node.close(output)
                output._node = node
                output.requires_grad = True
        if state.recorder is not None:
            state.recorder.add(cls.op, inputs, attributes, output)
        return output


def _common_dtype(op: str, inputs: tuple[Tensor, ...]) -> np.dtype:
    """The floating dtype that all inputs share (integer inputs, such as labels, aside)."""
    common: np.dtype | None = None
    for tensor in inputs:
        dtype = tensor._dtype
        if dtype.kind != "f":
            continue
        if common is None:
            common = dtype
        elif dtype != common:
            raise TypeError(
                f"{op}: inputs have dtypes {[str(t.dtype) for t in inputs]}, expected one floating dtype; "
                "convert explicitly, for instance with module.to(dtype)"
            )
    if common is None:
        raise TypeError(f"{op}: inputs have dtypes {[str(t.dtype) for t in inputs]}, expected float32 or float64")
    return common


class Saved:
    """One array on the tape: a name, the array, and the version of its buffer when it was saved."""

    __slots__ = ("array", "at_version", "is_parameter", "version")

    def __init__(self, array: np.ndarray, version: _Version | None, is_parameter: bool) -> None:
        self.array = array
        self.version = version
        self.at_version = version.value if version is not None else 0
        self.is_parameter = is_parameter


class Node:
    """An executed function on the tape; also the ``ctx`` of its forward and backward.

    Attributes
    ----------
    function : type[Function]
        What ran.
    path : str
        Dotted path of the module in which it ran.
    needs_input_grad : tuple of bool
        Which inputs need a gradient.
    saved : dict of str to Saved
        The arrays kept for backward, by name. Nothing else of the inputs is kept.
    edges : tuple
        For each input: the node that made it, the leaf tensor to accumulate into, or None.
    """

    def __init__(self, function: type[Function], inputs: tuple[Tensor, ...], requires_grad: bool) -> None:
        self.function = function
        self.path = state.path
        self.sequence = next(_sequence)
        self.saved: dict[str, Saved] = {}
        self.freed = False
        self.needs_input_grad: tuple[bool, ...]
        self.edges: tuple[Node | Tensor | None, ...]
        if requires_grad:
            self.needs_input_grad = tuple(tensor.requires_grad for tensor in inputs)
            self.edges = tuple((t._node or t) if t.requires_grad else None for t in inputs)
            self.input_shapes = tuple(tensor._shape for tensor in inputs)
            self._inputs: tuple[Tensor, ...] | None = inputs  # only until forward has run
        else:
            self.needs_input_grad = (False,) * len(inputs)
            self.edges = ()
            self._inputs = None

    def save_for_backward(self, **arrays: np.ndarray) -> None:
        """Keep arrays that ``forward`` made, under these names."""
        for name, array in arrays.items():
            self.saved[name] = Saved(array, None, is_parameter=False)

    def save_input(self, name: str, position: int) -> None:
        """Keep the input at ``position`` itself; a later change of its values is then an error."""
        if self._inputs is not None:
            tensor = self._inputs[position]
            self.saved[name] = Saved(tensor.data, tensor._version, getattr(tensor, "is_parameter", False))

    def __getitem__(self, name: str) -> np.ndarray:
        """The saved array of that name."""
        return self.saved[name].array

    def close(self, output: Tensor) -> None:
        """Let go of the input tensors: from here on only what was saved stays alive."""
        self._inputs = None
        for saved in self.saved.values():
            if saved.array is output._data:  # a saved result can be written to as well, through a detached tensor
                saved.version = output._version

    def release(self) -> None:
        """Give up the saved arrays and the links to earlier nodes."""
        self.saved, self.edges, self.freed = {}, (), True
        for name in list(self.__dict__):
            if name not in _NODE_FIELDS:
                del self.__dict__[name]

    def check_unchanged(self) -> None:
        """Raise if a saved tensor was written to since the forward pass."""
        for name, saved in self.saved.items():
            if saved.version is not None and saved.version.value != saved.at_version:
                kind = "parameter" if saved.is_parameter else "tensor"
                raise RuntimeError(
                    f"{self.function.op} in {self.path or 'the root module'}: the {kind} {name!r} saved for backward "
                    f"was changed after the forward pass ({saved.version.value - saved.at_version} change(s)); "
                    "its gradient would be wrong. Call backward() before changing it"
                )


_NODE_FIELDS = frozenset({"function", "path", "sequence", "saved", "freed", "needs_input_grad", "edges", "_inputs"})


def _run_backward(root: Node, seed: np.ndarray, retain_graph: bool) -> None:
    """Visit the nodes from the newest to the oldest: a node is always newer than its inputs."""
    pending: dict[int, np.ndarray] = {root.sequence: seed}
    nodes: dict[int, Node] = {root.sequence: root}
    queue = [-root.sequence]
    previous_path = state.path
    try:
        while queue:
            sequence = -heapq.heappop(queue)
            node, grad_output = nodes.pop(sequence), pending.pop(sequence)
            if node.freed:
                raise RuntimeError(
                    f"{node.function.op} in {node.path or 'the root module'}: the graph was already consumed by a "
                    "backward(); pass retain_graph=True to the first one to run it twice"
                )
            node.check_unchanged()
            state.path = node.path
            grads = node.function.backward(node, grad_output)
            edges, shapes = node.edges, node.input_shapes
            if not retain_graph:
                node.release()
            for position, (edge, grad, shape) in enumerate(zip(edges, grads, shapes, strict=True)):
                if edge is None or grad is None:
                    continue
                if grad.shape != shape or grad.dtype != grad_output.dtype:
                    raise AssertionError(
                        f"{node.function.op}: gradient {position} is {grad.shape} {grad.dtype}, "
                        f"expected {shape} {grad_output.dtype}"
                    )
                if isinstance(edge, Tensor):
                    shared = grad is grad_output or grad.base is not None or sum(grad is g for g in grads) > 1
                    _accumulate(edge, grad, owned=not shared)
                elif edge.sequence in pending:
                    pending[edge.sequence] = pending[edge.sequence] + grad
                else:
                    pending[edge.sequence], nodes[edge.sequence] = grad, edge
                    heapq.heappush(queue, -edge.sequence)
            del grads, grad_output, edges
    finally:
        state.path = previous_path


def _accumulate(leaf: Tensor, grad: np.ndarray, owned: bool) -> None:
    """Add to a leaf's ``.grad`` without ever sharing a buffer with anyone else."""
    if leaf.grad is not None:
        leaf.grad = np.asarray(leaf.grad + grad)
    else:
        leaf.grad = np.asarray(grad if owned else grad.copy())


from lance_ref import functional as F  # noqa: E402  (the operators above are its functions)
