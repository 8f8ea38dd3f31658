"""The fold: from op records to the cost of every operation under every accounting.

Attribution only. What an operation costs is said in the rules; how it is shown, in
:mod:`analysis.reports.report` and :mod:`analysis.reports.tables`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from analysis.commands.names import plain
from analysis.rules import elementwise, norms, products  # noqa: F401  (they register their rules)
from analysis.rules.layouts import Memory, Storage
from analysis.rules.op_cost import OpCost, Saved
from analysis.rules.recompute import OP, Executed, cost_inside, cost_outside, executed, inside
from lance_ref.engine.recording import OpRecord

WEIGHTED = ("conv2d", "linear", "conv3d", "conv_transpose2d")
"""Operations of the layers with weights: :func:`lance_ref.tune` selects them, and stores keep what they take in."""
EXACT = {"name": "exact"}
"""What the store of plain backpropagation says of itself."""


class Billed(NamedTuple):
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


def with_described_stores(records: Sequence[OpRecord], stores: Mapping[str, Mapping[str, Any]]) -> list[OpRecord]:
    """The same records with these activation stores, as the stores describe themselves, and exact ones elsewhere.

    A record that has its store already stays the same object.
    """
    changed = []
    for record in records:
        if record.op in WEIGHTED:
            store = stores.get(record.path, EXACT)
            if record.attributes["store"] != store:
                record = replace(record, attributes={**record.attributes, "store": store})
        elif record.op == OP:
            within = with_described_stores(inside(record), stores)
            record = replace(record, attributes={**record.attributes, "records": within})
        changed.append(record)
    return changed


def is_tuned(record: OpRecord, head: str | None) -> bool:
    """Whether this is a call of a layer that trains, the classifier head left out, or a segment with one inside."""
    if record.op in WEIGHTED:
        return record.inputs[1].requires_grad and record.path != head
    return any(is_tuned(each, head) for each in inside(record))


@dataclass
class CostCache:
    """The costs of records that several methods have in common, and where their values live.

    For the methods of one trace, where a number stands for one value. A record that a method leaves as it is
    (the same object) is costed once for all of them.
    """

    memory: Memory = field(default_factory=Memory)
    in_pytorch: Memory = field(default_factory=lambda: Memory(in_pytorch=True))
    #: By identity of the record, and whether backward comes through: the record itself, its cost here, and what PyTorch
    #: keeps.
    costs: dict[tuple[int, bool], tuple[OpRecord, OpCost, list[Saved]]] = field(default_factory=dict)

    def of(self, step: Executed) -> tuple[OpCost, list[Saved]]:
        """The cost of one record in its place, and what PyTorch keeps; all records before it must have been asked."""
        if step.segment is not None:
            self.in_pytorch.follow(step.record)
            return cost_inside(step, self.memory), []
        key = id(step.record), step.on_tape
        if key not in self.costs:
            cost, in_pytorch = (cost_outside(step, memory) for memory in (self.memory, self.in_pytorch))
            self.costs[key] = step.record, cost, in_pytorch.pytorch
        return self.costs[key][1:]


def account(
    records: Sequence[OpRecord], head: str | None, repeats: int = 1, cache: CostCache | None = None
) -> list[Billed]:
    """Cost of every record of one training step, the loss last; what a segment contains follows its record.

    Parameters
    ----------
    head : str or None
        Path of the classifier.
    repeats : int
        How often the records run in one step. Micro-batches follow each other, each on its own tape: with the records
        of one of them, the bytes are those of the step, and the operations count as often as there are micro-batches.
    cache : CostCache, optional
        Costs of other methods on the same trace.
    """
    cache = CostCache() if cache is None else cache
    tape_seen: set[Storage] = set()
    pytorch_seen: set[Storage] = set()
    with_factors: set[str] = set()
    steps = executed(records)
    billed = []
    for step, name in zip(steps, row_names([step.record for step in steps]), strict=True):
        record = step.record
        cost, saved_in_pytorch = cache.of(step)
        tuned = is_tuned(record, head)
        subspace_bytes = cost.subspace_bytes
        if subspace_bytes:  # a layer called twice has its factors once
            subspace_bytes = 0 if record.path in with_factors else subspace_bytes
            with_factors.add(record.path)
        billed.append(
            Billed(
                record,
                name,
                tuned,
                cost if repeats == 1 else cost.repeated(repeats),
                paper_bytes=cost.paper_bytes if tuned else 0,
                pytorch_bytes=_bill(saved_in_pytorch, pytorch_seen) if saved_in_pytorch else 0,
                tape_bytes=_bill(cost.tape, tape_seen) if cost.tape else 0,
                subspace_bytes=subspace_bytes,
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
    places = [(plain(record.path), plain(record.op)) for record in records]
    ops: dict[str, set[str]] = {}
    for path, op in places[:-1]:
        ops.setdefault(path, set()).add(op)
    names: list[str] = []
    times: Counter[str] = Counter()
    for path, op in places[:-1]:
        name = path if path and len(ops[path]) == 1 else f"{path or '(root)'}/{op}"
        times[name] += 1
        names.append(name if times[name] == 1 else f"{name}#{times[name]}")
    return [*names, "loss"] if places else []
