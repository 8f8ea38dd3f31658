"""Cost rule of a recomputed segment (``lance_ref.nn.Recompute``), and how it changes the cost of what is inside.

A segment is one record, op ``"recompute"``, whose attribute ``records`` holds the operations inside. With
gradient checkpointing (Chen et al. 2016, arXiv 1604.06174)

* the segment keeps its inputs, and the operations inside keep nothing;
* once backward arrives, all operations inside run forward again, and are differentiated as usual;
* a segment within a segment runs forward once more for each segment around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from analysis.rules.layouts import Memory, backward_reaches
from analysis.rules.op_cost import Call, OpCost, cost_of, rule
from lance_ref.engine.recording import OpRecord

OP = "recompute"


@rule(OP)
def recompute(call: Call) -> OpCost:
    """The inputs of the segment alone; PyTorch's ``checkpoint`` keeps the same.

    The state of the random generators is counted nowhere: a few numbers here, some 5 KB in PyTorch.
    """
    cost = OpCost()
    if call.on_tape:
        cost.tape = [call.save_input("segment input", position) for position in range(len(call.inputs))]
        cost.pytorch = list(cost.tape)
        cost.paper_bytes = sum(value.nbytes for value in call.record.inputs)
    return cost


def inside(record: OpRecord) -> list[OpRecord]:
    """The operations of a segment, nested segments not unfolded; none of any other record."""
    return list(record.attributes["records"]) if record.op == OP else []


def flatten(records: Sequence[OpRecord]) -> list[OpRecord]:
    """All records, each segment followed by what is inside."""
    found: list[OpRecord] = []
    for record in records:
        found.append(record)
        if record.op == OP:
            found += flatten(inside(record))
    return found


class Executed(NamedTuple):
    """One record with its place in the step."""

    record: OpRecord
    on_tape: bool  #: Whether the backward pass comes through here.
    segment: OpRecord | None = None  #: The innermost segment around it.
    runs_again: int = 0  #: How often it runs forward after the first time.


def executed(records: Sequence[OpRecord]) -> list[Executed]:
    """All records of a step, its loss last, in the order of :func:`flatten`."""
    found: list[Executed] = []
    for record, on_tape in zip(records, backward_reaches(records), strict=True):
        step = Executed(record, on_tape)
        found += _unfold(step) if record.op == OP else (step,)
    return found


def _unfold(outer: Executed) -> Iterator[Executed]:
    yield outer
    records = inside(outer.record)
    reached = backward_reaches(records, outer.record.output) if outer.on_tape else [False] * len(records)
    for record, on_tape in zip(records, reached, strict=True):
        yield from _unfold(Executed(record, on_tape, outer.record, outer.runs_again + outer.on_tape))


def cost_inside(item: Executed, memory: Memory) -> OpCost:
    """The cost of an operation inside a segment: nothing kept until backward, forward as often as it runs.

    Parameters
    ----------
    memory : Memory
        Has followed all records before it.
    """
    forward = cost = cost_of(item.record, memory, False)
    if item.on_tape:
        cost = cost_of(item.record, memory, True)
    return replace(
        cost,
        recompute_macs=item.runs_again * forward.forward_macs,
        elementwise=cost.elementwise + item.runs_again * forward.elementwise,
        tape=[],
        pytorch=[],
        paper_bytes=0,
        second_tape_bytes=_second_tape_bytes(item, memory),
    )


def cost_outside(item: Executed, memory: Memory) -> OpCost:
    """The cost of an operation that stands in no segment, or of a segment itself."""
    cost = cost_of(item.record, memory, item.on_tape)
    return replace(cost, second_tape_bytes=_second_tape_bytes(item, memory)) if item.record.op == OP else cost


def _second_tape_bytes(item: Executed, memory: Memory) -> int:
    """What the operations right inside a segment keep on its second run, the segment's inputs not counted again."""
    if not item.on_tape:
        return 0
    records = inside(item.record)
    seen = {memory.of(value).storage for value in item.record.inputs}
    total = 0
    for record, on_tape in zip(records, backward_reaches(records, item.record.output), strict=True):
        for saved in cost_of(record, memory, on_tape).tape:
            if saved.storage not in seen and not saved.storage.is_parameter:
                seen.add(saved.storage)
                total += saved.storage.nbytes
    return total
