"""How long the tensors of a forward pass live.

A tensor is given back when the last Python variable that names it is gone, and these variables are in the
network's own ``forward`` methods: ``out = self.bn(self.conv(out))`` holds the old ``out`` until the batch norm is
through. A pass over shapes alone runs these very methods, so its tensors come and go exactly when those of a real
step do.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from analysis.rules.loss import loss_of
from analysis.rules.recompute import OP, flatten
from lance_ref.engine.recording import OpRecord, Recorder, Value
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module

Lifetimes = Mapping[int, int]
"""By id of a value: after how many operations (segments themselves not counted) it is given back; no entry: never."""


class Watcher(Recorder):
    """A recorder that notes when the tensors it has seen are given back.

    Attributes
    ----------
    ends : dict
        By id of the value: after how many operations that was.
    """

    def __init__(self, parameter_names: Mapping[int, str]) -> None:
        super().__init__(parameter_names)
        self.operations = 0
        self.ends: dict[int, int] = {}
        self._watched: list[Any] = []

    def first_seen(self, tensor: Tensor, value: Value) -> None:
        if value.parameter is None:
            self._watched.append(weakref.ref(tensor, partial(self._given_back, value.id)))

    def add(self, op: str, inputs: Sequence[Tensor], attributes: Mapping[str, Any], output: Tensor) -> None:
        super().add(op, inputs, attributes, output)
        self.operations += 1

    def _given_back(self, value: int, _: Any) -> None:
        self.ends[value] = self.operations


@contextmanager
def watched(net: Module) -> Iterator[Watcher]:
    """As :func:`lance_ref.nn.tracing.record`, by a recorder that watches the tensors."""
    watcher = Watcher({p.uid: name for name, p in net.named_parameters()})
    previous, state.recorder = state.recorder, watcher
    try:
        yield watcher
    finally:
        state.recorder = previous


def lifetimes(net: Module, input_shape: Sequence[int], dtype: Any = np.float32) -> dict[int, int]:
    """When each tensor of ``loss_of(net(x), labels)`` is given back, from shapes alone.

    The net is in the mode and with the selection of the step. By id of the value, which
    is the same in any trace of this net and step: the number of operations after which it is given back. Input, labels
    and loss live on, and have no entry.
    """
    x, labels = Tensor.meta(input_shape, dtype), Tensor.meta((input_shape[0],), np.int64)
    with watched(net) as watcher:
        loss = loss_of(net(x), labels)
        ends = dict(watcher.ends)  # before x, labels and the loss go
    del loss
    return ends


def renumbered(ends: Lifetimes, numbers: Mapping[int, int]) -> dict[int, int]:
    """The same lifetimes where the values have other numbers; those that have none are left out."""
    return {numbers[value]: end for value, end in ends.items() if value in numbers}


def lifetimes_from_scopes(records: Sequence[OpRecord]) -> dict[int, int]:
    """A guess at the same from the records alone: a module's input lives until the module's call is over.

    Variables that a ``forward`` goes on naming are not known, so this may be too short, never too long. Inputs of the
    whole step, and its loss, live on.
    """
    steps = [record for record in flatten(records) if record.op != OP]
    if not steps:
        return {}
    made = {record.output.id: i for i, record in enumerate(steps)}
    last = {value.id: i for i, record in enumerate(steps) for value in record.inputs if value.id in made}
    ends = {}
    for value, i in made.items():
        if value not in last:
            ends[value] = i + 1
            continue
        ends[value] = _end_of_scope(steps, i, last[value])
    ends.pop(steps[-1].output.id, None)
    return ends


def _end_of_scope(steps: Sequence[OpRecord], made: int, used: int) -> int:
    """The end of the outermost module call around step ``used`` that step ``made`` is not a part of."""
    inner, outer = steps[used].path.split("."), steps[made].path.split(".")
    common = 0
    while common < min(len(inner), len(outer)) and inner[common] == outer[common]:
        common += 1
    if common == len(inner) or not steps[used].path:
        return used + 1
    scope = ".".join(inner[: common + 1])
    end = used
    while end < len(steps) and (steps[end].path == scope or steps[end].path.startswith(scope + ".")):
        end += 1
    return end
