"""The trace: what a network computes, as a list of op records, from shapes alone.

``trace(net, input_shape)`` runs the network's own ``forward`` on a tensor without data.
Every :class:`~lance_ref.engine.autograd.Function` then gives its output shape instead of its
output, so a trace costs no memory and next to no time, at any batch size. The same
recorder can listen to a real run (:func:`record`), and hears the same list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lance_ref.engine.recording import OpRecord, Recorder, Value
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module

__all__ = ["OpRecord", "Recorder", "Value", "record", "trace"]


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
    """The op records of one forward pass of ``net`` in order of execution, without computing anything.

    Any module will do; a module that is called twice appears twice.

    Parameters
    ----------
    input_shape : sequence of int
        Shape of the input, batch first.
    dtype : numpy dtype, optional
        float32 or float64; the dtype of the network's parameters by default.

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
