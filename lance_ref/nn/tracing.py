"""The trace: what a network computes, as a list of op records, from shapes alone.

``trace(net, input_shape)`` runs the network's own ``forward`` on a tensor without data.
Every :class:`~lance_ref.engine.autograd.Function` then gives its output shape instead of its
output, so a trace costs no memory and next to no time, at any batch size. The same
recorder can listen to a real run (:func:`record`), and hears the same list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from lance_ref.engine.state import state
from lance_ref.engine.tensor import Shape, Tensor
from lance_ref.nn.module import Module


@dataclass(frozen=True)
class Value:
    """A tensor as the trace sees it.

    Attributes
    ----------
    id : int
        The same for every use of the same tensor, numbered from 0 in order of appearance.
    shape, dtype : tuple of int, str
        ``dtype`` is NumPy's name, for instance ``"float32"``.
    requires_grad : bool
        Whether a gradient with respect to this value is needed.
    parameter : str or None
        Dotted name of the parameter, None for activations. A parameter shared by several
        layers has one name and one id everywhere.
    """

    id: int
    shape: Shape
    dtype: str
    requires_grad: bool
    parameter: str | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of an array of this shape and dtype."""
        return math.prod(self.shape) * itemsize(self.dtype)


@cache
def itemsize(dtype: str) -> int:
    """Bytes of one element, for NumPy's name of a dtype."""
    return np.dtype(dtype).itemsize


_name_of_dtype = cache(str)  # NumPy puts a dtype's name together anew each time


@dataclass(frozen=True)
class OpRecord:
    """One executed operation.

    Attributes
    ----------
    op : str
        Name of the operation, e.g. ``"conv2d"``.
    path : str
        Dotted path of the module in which it ran, ``""`` for the root.
    inputs : tuple of Value
        The operation's tensor inputs in order; ``input.requires_grad`` says which need gradients.
    output : Value
        Its result; ``output.requires_grad`` is False where nothing is put on the tape.
    attributes : mapping
        The operation's other arguments, normalised (``stride=(2, 2)``, never ``stride=2``).
    """

    op: str
    path: str
    inputs: tuple[Value, ...]
    output: Value
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Recorder:
    """Collects the op records of one thread, in order of execution."""

    def __init__(self, parameter_names: Mapping[int, str]) -> None:
        self.records: list[OpRecord] = []
        self._parameter_names = parameter_names  # by uid
        self._values: dict[int, Value] = {}  # by uid

    def value(self, tensor: Tensor) -> Value:
        """The tensor as the trace sees it: the same object at every use, unless the tensor has changed since."""
        uid = tensor.uid
        known = self._values.get(uid)
        dtype = _name_of_dtype(tensor._dtype)
        if known is not None and known.requires_grad == tensor.requires_grad and known.dtype == dtype:
            return known
        number = len(self._values) if known is None else known.id
        name = self._parameter_names.get(uid)
        if name is None and tensor.is_parameter:
            name = f"parameter {number}"
        value = self._values[uid] = Value(number, tensor._shape, dtype, tensor.requires_grad, name)
        if known is None:
            self.first_seen(tensor, value)
        return value

    def first_seen(self, tensor: Tensor, value: Value) -> None:
        """Called once for every tensor; here it does nothing."""

    def add(self, op: str, inputs: Sequence[Tensor], attributes: Mapping[str, Any], output: Tensor) -> None:
        described = {k: v.describe() if hasattr(v, "describe") else v for k, v in attributes.items()}
        values = tuple([self.value(tensor) for tensor in inputs])
        self.records.append(OpRecord(op, state.path, values, self.value(output), described))

    @contextmanager
    def aside(self) -> Iterator[list[OpRecord]]:
        """Inside the ``with`` block records go to a list of their own."""
        outer, self.records = self.records, []
        try:
            yield self.records
        finally:
            self.records = outer


@contextmanager
def record(net: Module | None = None) -> Iterator[list[OpRecord]]:
    """Record every operation that runs inside the ``with`` block, on arrays or on shapes.

    Parameters
    ----------
    net : Module, optional
        Its parameters are recorded under their dotted names.
    """
    names = {} if net is None else {p.uid: name for name, p in net.named_parameters()}
    recorder = Recorder(names)
    previous, state.recorder = state.recorder, recorder
    try:
        yield recorder.records
    finally:
        state.recorder = previous


def trace(net: Module, input_shape: Sequence[int], dtype: Any = None) -> list[OpRecord]:
    """The op records of one forward pass of ``net``, without computing anything.

    Parameters
    ----------
    net : Module
        Any module; a user's own needs no registration.
    input_shape : sequence of int
        Shape of the input, batch first.
    dtype : numpy dtype, optional
        float32 or float64; the dtype of the network's parameters by default.

    Returns
    -------
    list of OpRecord
        In order of execution. A module called twice appears twice.

    Raises
    ------
    ValueError, TypeError
        As the forward pass itself would for an input of that shape.
    RuntimeError
        If the forward pass looks at values (``tensor.data``), which a trace does not have.

    Examples
    --------
    >>> from lance_ref import nn
    >>> [(r.op, r.path, r.output.shape) for r in trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (8, 3))]
    [('linear', '0', (8, 2)), ('relu', '1', (8, 2))]
    """
    if not isinstance(net, Module):
        raise TypeError(f"net is a {type(net).__name__}, expected a lance_ref.nn.Module")
    shape = tuple(input_shape)
    if not shape or any(not isinstance(n, (int, np.integer)) or n < 1 for n in shape):
        raise ValueError(f"input_shape is {input_shape}, expected positive integers, batch first")
    if dtype is None:
        dtype = next((p.dtype for _, p in net.named_parameters()), np.dtype(np.float32))
    with record(net) as records:
        net(Tensor.meta(shape, dtype))
    return records
