"""The fold: from op records to the cost of every operation under every accounting.

Attribution only. What an operation costs is said in the rules; how it is shown, in
:mod:`analysis.report` and :mod:`analysis.tables`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from analysis import elementwise_rules, norm_rules, product_rules  # noqa: F401  (they register their rules)
from analysis.layouts import NUMPY_KEEPS_ORDER, PYTORCH_KEEPS_ORDER, Memory, Storage
from analysis.op_cost import OpCost, Saved
from analysis.recompute_rules import cost_inside, cost_outside, executed, flatten, inside
from lance_ref.tracing import OpRecord

Ranks = tuple[int | None, ...]
WEIGHTED = ("conv2d", "linear")


@dataclass(frozen=True)
class Billed:
    """One record with its cost and the bytes billed to it, each storage to the first that keeps it.

    ``in_segment``: whether it runs inside a recomputed segment, which stands before it in the list.
    """

    record: OpRecord
    name: str
    tuned: bool
    cost: OpCost
    paper_bytes: int
    pytorch_bytes: int
    tape_bytes: int
    subspace_bytes: int
    in_segment: bool = False


def with_stores(
    records: Sequence[OpRecord], ranks: Mapping[str, Ranks] | None = None, centred: bool = False
) -> list[OpRecord]:
    """The same records with other activation stores: LANCE on the layers in ``ranks``, exact elsewhere.

    ``centred``: LANCE of the activation without its mean, whose own weight gradient is added exactly.
    """
    changed = []
    for record in records:
        if record.op in WEIGHTED:
            store: dict[str, object] = {"name": "exact"}
            if ranks and record.path in ranks:
                store = {"name": "lance", "ranks": ranks[record.path], "order": "auto"}
                store |= {"centred": True} if centred else {}
            record = replace(record, attributes={**record.attributes, "store": store})
        elif inside(record):
            within = with_stores(inside(record), ranks, centred)
            record = replace(record, attributes={**record.attributes, "records": within})
        changed.append(record)
    return changed


def is_tuned(record: OpRecord, head: str | None) -> bool:
    """Whether this is a call of a layer that trains, the classifier head left out, or a segment with one inside."""
    if inside(record):
        return any(is_tuned(each, head) for each in inside(record))
    return record.op in WEIGHTED and record.inputs[1].requires_grad and record.path != head


def account(records: Sequence[OpRecord], head: str | None) -> list[Billed]:
    """Cost of every record of one training step; the last record is the loss.

    The operations inside a recomputed segment follow the segment's own record.

    A step with micro-batches of k examples needs no rule of its own: its passes follow each other, each on its
    own tape. Account for batch k; the bytes are those of the step, and its operations are those of batch k
    times the number of micro-batches.

    Raises
    ------
    MissingRuleError
        If an operation has no cost rule.
    """
    memory, in_pytorch = Memory(NUMPY_KEEPS_ORDER), Memory(PYTORCH_KEEPS_ORDER)
    tape_seen: set[Storage] = set()
    pytorch_seen: set[Storage] = set()
    with_factors: set[str] = set()
    billed = []
    steps = executed(records)
    for step, name in zip(steps, row_names(flatten(records)), strict=True):
        record, cost_of = step.record, cost_outside if step.segment is None else cost_inside
        cost = cost_of(step, memory)
        saved_in_pytorch = cost_of(step, in_pytorch).pytorch
        tuned = is_tuned(record, head)
        first_call = record.path not in with_factors  # a layer that is called twice has its factors once
        if cost.subspace_bytes:
            with_factors.add(record.path)
        billed.append(
            Billed(
                record,
                name,
                tuned,
                cost,
                paper_bytes=cost.paper_bytes if tuned else 0,
                pytorch_bytes=_bill(saved_in_pytorch, pytorch_seen),
                tape_bytes=_bill(cost.tape, tape_seen),
                subspace_bytes=cost.subspace_bytes if first_call else 0,
                in_segment=step.segment is not None,
            )
        )
    return billed


def _bill(saved: Iterable[Saved], seen: set[Storage]) -> int:
    """Bytes of the storages that nobody was billed for yet; parameters are billed to nobody."""
    total = 0
    for item in saved:
        if item.storage not in seen and not item.storage.is_parameter:
            seen.add(item.storage)
            total += item.storage.nbytes
    return total


def row_names(records: Sequence[OpRecord]) -> list[str]:
    """A unique name for every record: the layer's path, ``path/op`` where several run there, ``#2`` for repeats.

    The last record is the loss.
    """
    ops: dict[str, set[str]] = {}
    for record in records[:-1]:
        ops.setdefault(record.path, set()).add(record.op)
    names: list[str] = []
    times: Counter[str] = Counter()
    for record in records[:-1]:
        path = record.path or "(root)"
        name = path if record.path and len(ops[record.path]) == 1 else f"{path}/{record.op}"
        times[name] += 1
        names.append(name if times[name] == 1 else f"{name}#{times[name]}")
    return [*names, "loss"] if records else []
