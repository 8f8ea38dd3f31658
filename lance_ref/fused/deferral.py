"""Operations put off until their results are looked at, and then run together.

While a module is called, an operation that no gradient goes through, and that treats every image for itself, is only
noted down: its result is a :class:`~lance_ref.fused.pending.Pending`. The first time that somebody looks at such a
tensor, all that are still alive are computed in one pass, a few images at a time. So whatever a ``forward`` keeps in a
variable is there when it is used, and what nobody can use any more is never written down. When the module that was
called first returns, nothing is pending.

Every operation has checked its inputs by then, and batch norms have read their statistics. Weights are read when the
pass runs. They may not be written to by NumPy within the same call, after they were used; writing through a tensor
(``tensor[...] = ...``) computes what is pending beforehand.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from lance_ref.engine import counting
from lance_ref.engine.autograd import Function, Node
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Shape, Tensor
from lance_ref.functional.normalization import inv_std_of, scale_and_shift_of
from lance_ref.fused.execute import execute, most_workers
from lance_ref.fused.pending import Pending, Promise, promise_of
from lance_ref.fused.plan import Op, PassPlan, Ref, plan
from lance_ref.fused.rules import STREAMED, WHOLE, detail, operands, why_not
from lance_ref.fused.steps import Arrays

REMEMBERED = 32
"""Plans that are kept for the next call with the same operations and shapes."""
_plans: OrderedDict[Any, tuple[PassPlan, tuple[Op, ...]]] = OrderedDict()


@cache
def enabled() -> bool:
    """Whether operations are put off at all (``LANCE_REF_FUSE``, 1 by default).

    Raises
    ------
    ValueError
        If the variable is neither 0 nor 1.
    """
    setting = os.environ.get("LANCE_REF_FUSE", "1")
    if setting not in ("0", "1"):
        raise ValueError(f"LANCE_REF_FUSE is {setting!r}, expected 0 or 1")
    return setting == "1"


@contextmanager
def deferring() -> Iterator[None]:
    """Inside the ``with`` block operations may be put off; at its end nothing is pending."""
    if state.deferral is not None or state.recorder is not None or state.segment is not None or not enabled():
        yield
        return
    deferral = Deferral()
    state.deferral = deferral
    try:
        yield
        deferral.compute()
    except Exception:
        with suppress(Exception):
            deferral.compute()  # whoever catches it may look at what there was so far
        raise
    finally:
        state.deferral, deferral.closed = None, True


class _Noted(NamedTuple):
    """An operation as it was called: all its inputs, as values or arrays, and where."""

    function: type[Function]
    inputs: tuple[Ref | np.ndarray, ...]
    attributes: dict[str, Any]
    path: str
    kind: str


class Deferral:
    """What one call of a module has put off."""

    def __init__(self) -> None:
        self.closed = False
        self.batch: tuple[int, np.dtype] | None = None  # images, and the dtype of all
        self.ops: list[Op] = []
        self.noted: list[_Noted] = []
        self.own: list[Arrays] = []
        self.outside: list[np.ndarray] = []
        self._tensors: dict[int, weakref.ref[Tensor]] = {}  # by operation
        self._refs: dict[int, Ref] = {}  # of arrays from outside, by identity

    def take(
        self, function: type[Function], inputs: tuple[Tensor, ...], attributes: dict[str, Any], shape: Shape
    ) -> Tensor | None:
        """The result of an operation, pending; None if it has to run now.

        ``shape`` is that of the result. A first operation has to be a convolution: on others nothing is won.
        """
        op, first = function.op, promise_of(inputs[0])
        whole = WHOLE.get(op) is function
        if not whole and STREAMED.get(op) is not function:
            return None
        images = inputs[: operands(op)]
        promises = [first, *map(promise_of, images[1:])]
        if op != "conv2d" and not any(promises):
            return None
        if any(promise is not None and promise.deferral is not self for promise in promises):
            return None
        there = [tensor for tensor, promise in zip(images, promises, strict=True) if promise is None]
        if any(type(tensor) is Pending or tensor._data is None for tensor in (*there, *inputs[len(images) :])):
            return None  # a weight that was put off itself, or a trace
        if not whole:
            if why_not(op, [tensor._shape for tensor in inputs], attributes) is not None:
                return None
            if any(promise is not None and self.ops[promise.index].op in WHOLE for promise in promises):
                return None
            batch = shape[0], inputs[0]._dtype
            if self.batch not in (None, batch):
                return None
            self.batch = batch
        return self._note(function, inputs, attributes, shape, promises)

    def _note(
        self,
        function: type[Function],
        inputs: tuple[Tensor, ...],
        attributes: dict[str, Any],
        shape: Shape,
        promises: list[Promise | None],
    ) -> Tensor:
        refs = tuple(
            self._outside(tensor.data) if promise is None else promise.index
            for tensor, promise in zip(inputs, promises, strict=False)
        )
        arrays = tuple(tensor.data for tensor in inputs[len(refs) :])
        own = arrays
        if function.op == "batch_norm":
            own = scale_and_shift_of(arrays, attributes["affine"], inv_std_of(arrays[-1], attributes["eps"]))
        self.ops.append(
            Op(function.op, refs, shape[1:], detail(function.op, [tensor._shape for tensor in inputs], attributes))
        )
        self.own.append(own)
        self.noted.append(_Noted(function, (*refs, *arrays), attributes, state.path, state.kind))
        version = inputs[0]._version if function.returns_view else None
        made = Pending.make(Promise(self, len(self.ops) - 1), shape, inputs[0]._dtype, version)
        self._tensors[len(self.ops) - 1] = weakref.ref(made)
        return made

    def _outside(self, array: np.ndarray) -> Ref:
        if id(array) not in self._refs:
            self.outside.append(array)
            self._refs[id(array)] = -len(self.outside)
        return self._refs[id(array)]

    def compute(self) -> None:
        """Run what was put off; every pending tensor that is still alive gets its values.

        What nobody can use any more runs too, so that what is counted does not depend on how a net is run.
        """
        if not self.ops:
            return
        alive = [(i, tensor) for i, ref in self._tensors.items() if type(tensor := ref()) is Pending]
        if self.closed:
            raise RuntimeError(
                f"this tensor of shape {alive[0][1].shape} has no data: the call that it comes from was interrupted"
            )
        self._tensors = {i: self._tensors[i] for i, _ in alive}
        results = self._results({i for i, _ in alive})
        for i, tensor in alive:
            tensor._data = results[i]
        self._start_anew()

    def _start_anew(self) -> None:
        """What was computed is an array like any other."""
        self.ops, self.noted, self.own, self.outside = [], [], [], []
        self._tensors, self._refs, self.batch = {}, {}, None

    def _results(self, wanted: set[int]) -> dict[int, np.ndarray]:
        """The arrays of these operations."""
        everything = range(len(self.ops))
        whole = [i for i in everything if self.ops[i].op in WHOLE]
        read = {ref for i in whole for ref in self.ops[i].operands if ref >= 0}
        results: dict[int, np.ndarray] = {}
        if len(everything) - len(whole) < 2:  # nothing to join: as it would have run at once
            one_by_one: Iterable[int] = everything
        else:
            order = sorted((wanted | read).difference(whole))
            planned, self.ops[:] = self._plan(order)  # equal operations, kept with the plan: those of this call may go
            results, macs, flagged = execute(planned, self.ops, self.own, self.outside, order)
            if flagged and not all(np.isfinite(array).all() for array in results.values()):
                results, one_by_one = {}, everything  # for whatever the caller's np.errstate asks for
            else:
                one_by_one = whole
                for i, count in macs.items():
                    with _as_called(self.noted[i]):
                        counting.add(count)
        for i in one_by_one:
            noted = self.noted[i]
            arrays = [self._value(each, results) for each in noted.inputs]
            with _as_called(noted):
                results[i] = noted.function.forward(_context(noted), *arrays, **noted.attributes)
        return results

    def _value(self, value: Ref | np.ndarray, results: dict[int, np.ndarray]) -> np.ndarray:
        if isinstance(value, np.ndarray):
            return value
        return results[value] if value >= 0 else self.outside[-1 - value]

    def _plan(self, wanted: list[int]) -> tuple[PassPlan, tuple[Op, ...]]:
        item, batch = self.outside[0].itemsize, len(self.outside[0])
        shapes = tuple(array.shape[1:] for array in self.outside)
        key = (tuple(self.ops), shapes, tuple(wanted), batch, item, most_workers())
        found = _plans.get(key)
        if found is None:
            found = plan(self.ops, shapes, wanted, batch, item, most_workers()), key[0]
            _plans[key] = found
            while len(_plans) > REMEMBERED:
                _plans.popitem(last=False)
        return found


def _context(noted: _Noted) -> Node:
    inputs: Any = noted.inputs  # no more than their number is asked for
    return Node(noted.function, inputs, requires_grad=False)


@contextmanager
def _as_called(noted: _Noted) -> Iterator[None]:
    """What runs is booked under the layer and the kind of the call."""
    path, kind = state.path, state.kind
    state.path, state.kind = noted.path, noted.kind
    try:
        yield
    finally:
        state.path, state.kind = path, kind
