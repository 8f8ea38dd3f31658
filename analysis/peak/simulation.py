"""A training step, buffer by buffer: what is alive while the records of a trace run forward and back again.

The order is that of the autograd: forward as traced; backward from the newest operation to the oldest, each giving up
what it kept once its gradients are there. A gradient to which nothing else refers is written over by the one that comes
of it, and gradients that meet are added up in the first one's array. A recomputed segment
(:mod:`analysis.rules.recompute`) runs forward once more when backward arrives at it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from analysis.peak.arrays import new
from analysis.peak.fused import AT_THE_END, PutOff, held
from analysis.peak.lifetimes import Lifetimes
from analysis.peak.rules import lie_alike, most_forward, run_backward
from analysis.peak.stores import STORES
from analysis.rules.layouts import Layout, Memory, Storage, backward_reaches
from analysis.rules.op_cost import Call, Saved, cost_of
from analysis.rules.recompute import OP as SEGMENT
from analysis.rules.recompute import flatten, inside
from lance_ref.engine.recording import OpRecord, Value, itemsize


@dataclass
class Ledger:
    """Bytes that are alive, and the most there have been."""

    live: int = 0
    moment: str = "forward"  #: What goes on: "forward" or "backward".
    most: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})  #: By moment.
    at: dict[str, OpRecord] = field(default_factory=dict)  #: During which operation that was.
    holders: Counter[Storage] = field(default_factory=Counter)
    outside: set[Storage] = field(default_factory=set)

    def hold(self, storage: Storage) -> None:
        """One more user of a storage; parameters, and what lies outside of the step, are nobody's."""
        if storage.is_parameter or storage in self.outside:
            return
        if not self.holders[storage]:
            self.live += storage.nbytes
        self.holders[storage] += 1

    def hold_from_the_start(self, storages: Iterable[Storage]) -> None:
        """What was there before the first operation, some of which may have run already."""
        before = self.live
        for storage in storages:
            self.hold(storage)
        self.most["forward"] += self.live - before

    def drop(self, storage: Storage) -> None:
        """One user less."""
        if storage.is_parameter or storage in self.outside:
            return
        self.holders[storage] -= 1
        if not self.holders[storage]:
            self.live -= storage.nbytes
            del self.holders[storage]

    def reach(self, extra: int, at: OpRecord) -> None:
        """During this operation so many bytes are allocated beside what is alive."""
        if self.live + extra > self.most[self.moment]:
            self.most[self.moment], self.at[self.moment] = self.live + extra, at


@dataclass
class _Ran:
    """An operation that has run forward, with what it needs to run back."""

    record: OpRecord
    call: Call
    kept: list[Storage]
    start: int  # operations before it


class Simulation:
    """Run a step, its loss last; ``ledger`` then has the peak of forward and backward, ``gradients`` those of leaves.

    ``ends``: lifetimes of the values, see :mod:`analysis.peak.lifetimes`.
    """

    def __init__(self, records: Sequence[OpRecord], ends: Lifetimes) -> None:
        self.records, self.ends = records, ends
        self.memory, self.ledger = Memory(), Ledger()
        self.gradients: dict[int, Storage] = {}  # of leaves, by id of the value
        self.itemsize = itemsize(records[-1].output.dtype) if records else 1  # of the loss, and of all gradients
        self.made = {record.output.id for record in flatten(records)}
        self.pending: dict[int, Layout] = {}
        self.values: dict[int, Storage] = {}  # tensors that are alive
        self.dying: defaultdict[int, list[int]] = defaultdict(list)
        for value, end in ends.items():
            self.dying[end].append(value)
        self.put_off = PutOff()
        self._carried: dict[str, Storage] = {}
        self._take_in_inputs()

    def gradients_before(self, gradients: Mapping[int, Storage]) -> None:
        """Gradients of leaves, by id of the value, that are there before the step, which adds to them."""
        self.gradients.update(gradients)
        self.ledger.hold_from_the_start(gradients.values())

    def run(self) -> None:
        """Forward and backward."""
        self._carry_over()
        reached = backward_reaches(self.records)
        ran = self._forward(self.records, reached, 0)
        self._run_together(len(flatten(self.records)))
        if not self.records or not self.records[-1].output.requires_grad:
            return
        self.ledger.moment = "backward"
        loss = self.records[-1].output
        self._give(loss.id, new(loss.shape, loss.nbytes // max(loss.size, 1)))
        self._backward(ran)

    # ---- forward ---------------------------------------------------------------------------

    def _take_in_inputs(self) -> None:
        """What no operation made: the batch and its labels are there from the start, statistics are the module's."""
        for record in flatten(self.records):
            statistics = 0
            if record.op == "batch_norm":
                statistics = 3 if record.attributes["affine"] else 1
            for position, value in enumerate(record.inputs):
                if value.id in self.made or value.id in self.memory.layouts:
                    continue
                storage = self.memory.of(value).storage
                if statistics and position >= statistics:
                    self.ledger.outside.add(storage)
                elif value.id not in self.ends:
                    self._name(value.id, storage)

    def _forward(
        self, records: Sequence[OpRecord], reached: Sequence[bool], done: int, *, put_off: bool = True
    ) -> list[_Ran]:
        """Run records of which ``reached`` are on the tape; ``done`` operations have run before them.

        Inside a segment, on its first run and on its second, nothing is put off.
        """
        ran = []
        for record, on_tape in zip(records, reached, strict=True):
            start = done
            if put_off and self.put_off.takes(record):
                self.memory.follow(record)
                self.put_off.add(record)
                done += 1
                self._forget(done)
                continue
            if any(value.id in self.put_off.made for value in record.inputs):
                self._run_together(done)
            if record.op == SEGMENT:
                inner = inside(record)
                self._forward(inner, [False] * len(inner), done, put_off=False)
                done += sum(each.op != SEGMENT for each in flatten(inner))
                layouts = tuple(self.memory.of(value) for value in record.inputs)
                call = Call(record, layouts, self.memory.of(record.output), on_tape)
                kept = [layout.storage for layout in layouts] if on_tape else []
            else:
                call, kept = self._operation(record, on_tape)
                done += 1
            for storage in kept:
                self.ledger.hold(storage)
            self._forget(done)
            if on_tape:
                ran.append(_Ran(record, call, kept, start))
        return ran

    def _run_together(self, done: int) -> None:
        """What was put off runs: results that are still named are written down, the others never were."""
        waiting = list(self.put_off.records)
        self.put_off.clear()
        alive = {r.output.id for r in waiting if self.ends.get(r.output.id, done + 1) > done}
        last = [record for record in waiting if record.op in AT_THE_END]
        together = [record for record in waiting if record.op not in AT_THE_END]
        if len(together) < 2:
            together, last = [], waiting
        read = {value.id for record in last for value in record.inputs}
        results = [r.output for r in together if r.output.id in read | alive]
        if together:
            beside = held(together, [value.id for value in results]).total
            self.ledger.reach(beside + sum(value.nbytes for value in results), together[-1])
            for value in results:
                self._name(value.id, self.memory.of(value).storage)
        for record in last:
            self._operation(record, on_tape=False)
        for record in waiting:
            if record.output.id not in alive and (storage := self.values.pop(record.output.id, None)) is not None:
                self.ledger.drop(storage)

    def _operation(self, record: OpRecord, on_tape: bool) -> tuple[Call, list[Storage]]:
        """One operation: its most, then its result and what it keeps."""
        for value in record.inputs:
            if value.id not in self.values and value.id not in self.made and value.parameter is None:
                self._name(value.id, self.memory.of(value).storage)
        inputs = tuple(self.memory.of(value) for value in record.inputs)
        saved: list[Saved] = cost_of(record, self.memory, on_tape).tape
        call = Call(record, inputs, self.memory.of(record.output), on_tape)
        self.ledger.reach(most_forward(call), record)
        self._name(record.output.id, call.output.storage)
        self._carry_on(record, saved)
        return call, [item.storage for item in saved]

    def _name(self, value: int, storage: Storage) -> None:
        if value not in self.values:
            self.values[value] = storage
            self.ledger.hold(storage)

    def _forget(self, done: int) -> None:
        for value in self.dying.get(done, ()):
            storage = self.values.pop(value, None)
            if storage is not None:
                self.ledger.drop(storage)

    def _carry_over(self) -> None:
        """What stores carry from the step before: there from the start, until this step has found its own."""
        for record in flatten(self.records):
            store = record.attributes.get("store", {})
            rule = STORES.get(store.get("name", ""))
            if rule is None or rule.carried is None or not record.inputs[1].requires_grad:
                continue
            if record.path not in self._carried:
                elements = rule.carried(record.inputs[0].shape, store)
                item = record.output.nbytes // max(record.output.size, 1)
                self._carried[record.path] = Storage(elements * item)
        self.ledger.hold_from_the_start(self._carried.values())

    def _carry_on(self, record: OpRecord, saved: Sequence[Saved]) -> None:
        if record.path in self._carried and any(item.what.startswith("factor") for item in saved):
            self.ledger.drop(self._carried.pop(record.path))
            for item in saved:
                if item.what.startswith("factor"):
                    self.ledger.hold(item.storage)  # by the store, beside the tape

    # ---- backward --------------------------------------------------------------------------

    def _give(self, value: int, gradient: Layout) -> None:
        self.pending[value] = gradient
        self.ledger.hold(gradient.storage)

    def _backward(self, ran: list[_Ran]) -> None:
        while ran:
            each = ran.pop()
            gradient = self.pending.get(each.record.output.id)
            if gradient is None:  # its own gradient was not needed after all
                self._release(each)
                continue
            if each.record.op == SEGMENT:
                again = self._second_run(each)
                self._release(each)
                self._backward(again)
                continue
            del self.pending[each.record.output.id]
            own = self._is_alone(gradient) and each.record is not self.records[-1]  # the loss's is the caller's
            back = run_backward(replace(each.call, owns_gradient=own), gradient)
            self.ledger.reach(back.most, each.record)
            made = [grad.storage for grad in back.gradients if grad is not None]
            for storage in made:
                self.ledger.hold(storage)
            self._release(each)
            for position, (value, grad) in enumerate(zip(each.record.inputs, back.gradients, strict=True)):
                if grad is not None:
                    self._accumulate(value, grad, position in back.shared, each.record)
            for storage in [*made, gradient.storage]:
                self.ledger.drop(storage)

    def _is_alone(self, gradient: Layout) -> bool:
        """Whether nothing else refers to a gradient's memory, all of which it is."""
        item = self.itemsize * math.prod(gradient.shape)
        repeats = any(step == 0 and n > 1 for n, step in zip(gradient.shape, gradient.strides, strict=True))
        return self.ledger.holders[gradient.storage] == 1 and gradient.storage.nbytes == item and not repeats

    def _release(self, each: _Ran) -> None:
        for storage in each.kept:
            self.ledger.drop(storage)

    def _accumulate(self, value: Value, grad: Layout, shared: bool, record: OpRecord) -> None:
        """A leaf keeps a gradient of its own; gradients that meet are added up in the first one's array if they can."""
        item = value.nbytes // max(value.size, 1)
        if value.id not in self.made:
            if value.id in self.gradients:
                return
            if shared:
                self.ledger.reach(value.nbytes, record)
                grad = new(value.shape, item)
            self.ledger.hold(grad.storage)
            self.gradients[value.id] = grad.storage
            return
        first = self.pending.get(value.id)
        if first is None:
            self._give(value.id, grad)
            return
        if self._is_alone(first) and lie_alike(first, grad):
            return
        self.ledger.reach(value.nbytes, record)
        self._give(value.id, new(value.shape, item, first))
        self.ledger.drop(first.storage)

    def _second_run(self, each: _Ran) -> list[_Ran]:
        """Run a segment again, on the tape; its tensors are new ones."""
        records = inside(each.record)
        for record in flatten(records):
            self.memory.layouts.pop(record.output.id, None)
            self.values.pop(record.output.id, None)
        ran = self._forward(records, backward_reaches(records, each.record.output), each.start, put_off=False)
        for record in flatten(records):
            storage = self.values.pop(record.output.id, None)
            if storage is not None:
                self.ledger.drop(storage)
        return ran
