"""The cost model's answer as a value: rows, totals that are their sums, JSON, CSV, pandas and HTML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from analysis.commands.console import csv_text
from analysis.commands.names import plain
from analysis.rules.account import Billed
from analysis.rules.calibration_costs import CalibrationCost
from analysis.rules.op_cost import MAC_KINDS as FLOP_KINDS
from analysis.rules.op_cost import weight_of

if TYPE_CHECKING:
    from analysis.peak.memory import Peak
    from analysis.reports.continual_bill import TaskBill

SCHEMA = 1
ACCOUNTINGS = ("paper", "pytorch", "tape")
OF_THE_FILE = "what PyTorch keeps of the operations of this file; of the network that it was made of, it may keep more"
CONVENTIONS = ("flops", "paper")
OPTIMIZERS = ("sgd", "sgd-momentum", "adam")
_Place = tuple[str, str, int]


@dataclass(frozen=True)
class MethodCost:
    """What one method costs, in one layer or in total."""

    ranks: tuple[int | None, ...] | None  #: Rank of each mode (None: left alone) of a compressed layer.
    activation_bytes: dict[
        str, int
    ]  #: Bytes under each of :data:`ACCOUNTINGS`; some of PyTorch's modules have no tape.
    subspace_bytes: int  #: Fixed factors, in memory beside the tape.
    #: One entry for each of :data:`FLOP_KINDS`, and their sum, ``"total"``. Under the convention ``"paper"`` these are
    #: multiply-adds of the tuned layers alone.
    flops: dict[str, int]
    elementwise: int | None  #: Scalar operations outside of products; None where they are not counted.

    @classmethod
    def of(cls, billed: Billed, convention: str) -> MethodCost:
        cost, paper = billed.cost, convention == "paper"
        counts = dict.fromkeys(FLOP_KINDS, 0)
        if not paper:
            counts = {kind: 2 * getattr(cost, f"{kind}_macs") for kind in FLOP_KINDS}
        elif billed.tuned:
            counts["forward"] = cost.forward_macs
            counts["grad_weight"] = cost.paper_grad_weight_macs
            counts["projection"] = cost.paper_projection_macs
            counts["recompute"] = cost.recompute_macs
        return cls(
            cost.ranks,
            {"paper": billed.paper_bytes, "pytorch": billed.pytorch_bytes, "tape": billed.tape_bytes},
            billed.subspace_bytes,
            {**counts, "total": sum(counts.values())},
            cost.elementwise,
        )

    @classmethod
    def sum(cls, costs: Sequence[MethodCost]) -> MethodCost:
        """The totals: every number is the sum over the rows; ranks have none."""
        names = costs[0].activation_bytes if costs else ACCOUNTINGS
        counted = [c.elementwise for c in costs if c.elementwise is not None]
        return cls(
            None,
            {name: sum([c.activation_bytes[name] for c in costs]) for name in names},  # lists, for rows are many
            sum([c.subspace_bytes for c in costs]),
            {kind: sum([c.flops[kind] for c in costs]) for kind in (*FLOP_KINDS, "total")},
            sum(counted) if len(counted) == len(costs) else None,
        )

    @property
    def main(self) -> str:
        """The accounting that comes first: the tape, or what PyTorch keeps where there is no tape."""
        return "tape" if "tape" in self.activation_bytes else "pytorch"

    @property
    def tape_and_factors(self) -> int:
        """Bytes of the tape, or of what PyTorch keeps where there is no tape, and of the fixed factors together."""
        return self.activation_bytes[self.main] + self.subspace_bytes

    @property
    def is_free(self) -> bool:
        """Whether nothing is kept and nothing computed."""
        return not (any(self.activation_bytes.values()) or any(self.flops.values()) or self.elementwise)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "ranks": None if self.ranks is None else list(self.ranks)}


@dataclass(frozen=True)
class Row:
    """One executed operation. ``path`` is its layer, ``name`` is unique in the report.

    ``methods`` has the cost under every method that runs the operation; shapes are those of the first of them.
    """

    name: str
    op: str
    path: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_shape: tuple[int, ...] | None
    parameters: int
    tuned: bool
    methods: dict[str, MethodCost]

    @classmethod
    def of(cls, billed: Mapping[str, Billed], costs: Mapping[str, MethodCost], shown: set[str]) -> Row:
        """One row out of the same operation's bill and cost under every method that runs it.

        ``shown``: names of parameters that rows before have; those of this one are put there.
        """
        first = next(iter(billed.values()))
        record = first.record
        weights = {v.parameter: v for v in record.inputs if v.parameter is not None and v.parameter not in shown}
        shown.update(weights)
        has_weight = len(record.inputs) > 1 and record.inputs[1].parameter is not None
        return cls(
            first.name,
            record.op,
            record.path,
            record.inputs[0].shape,
            record.output.shape,
            weight_of(record).shape if has_weight else None,
            sum(value.size for value in weights.values()),
            first.tuned,
            dict(costs),
        )

    def to_json(self) -> dict[str, Any]:
        shown = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if k != "path"}
        return {**shown, "methods": {method: cost.to_json() for method, cost in self.methods.items()}}


@dataclass(frozen=True)
class Continual:
    """The bill of learning several tasks one after the other."""

    tasks: int
    protected: float  #: Share of each layer's directions that the last task must leave alone.
    basis_batches: int  #: Batches from which directions are found.
    bills: tuple[TaskBill, ...]  #: By learner, then by task.

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "bills": [bill.to_json() for bill in self.bills]}


@dataclass(frozen=True)
class Report:
    """The cost of one training step of one net, by layer and method.

    Attributes
    ----------
    rows : tuple of Row
        Every operation that keeps a byte or costs an operation, in order of execution. Operations of different
        methods are the same if layer, operation and its how-manieth call are; one that a method does not run has no
        cost under it.
    calibration : dict of method to CalibrationCost
        What is done once, before the first step, for methods with calibrated subspaces.
    settings : dict of method to dict
        As they turned out, for methods that have settings.
    notes : dict of method to str
        Why a method was left out.
    continual : Continual or None
        Where it was asked for.
    peaks_of : callable
        Gives the peak of memory of one step, by method; asked once, when somebody looks at ``peaks``.
    optimizer : str
        Whose state counts at the peak.
    chunks : dict of method to str
        How the method takes its batch, as a clause, where chunks were asked for.
    remark : str
        What must be known of the net itself; empty for most.
    file_only : bool
        Whether the net comes from a file that may lack what the network keeps: then PyTorch's column is marked.
    no_tape : str
        Of a module of PyTorch: why there is no column for this library's tape; empty where there is one.
    """

    net: str
    batch: int
    image_size: int | None
    num_classes: int | None  #: None for an output that is not (batch, classes).
    dtype: str
    convention: str
    tuned_layers: tuple[str, ...]
    ranks_from: str
    methods: tuple[str, ...]
    rows: tuple[Row, ...]
    calibration: dict[str, CalibrationCost] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    continual: Continual | None = None
    peaks_of: Callable[[], dict[str, Peak]] = field(default=dict, repr=False, compare=False)
    net_parameters: int | None = None
    optimizer: str = OPTIMIZERS[0]
    remark: str = ""
    chunks: dict[str, str] = field(default_factory=dict)
    file_only: bool = False
    no_tape: str = ""

    @classmethod
    def of(cls, bills: Mapping[str, Sequence[Billed]], convention: str, **facts: Any) -> Report:
        """Fold the bills of all methods into rows; ``facts`` are the report's other attributes."""
        seen: dict[tuple[Any, ...], MethodCost] = {}

        def cost(bill: Billed) -> MethodCost:
            """The same object for the same bills."""
            bytes_ = (bill.paper_bytes, bill.pytorch_bytes, bill.tape_bytes, bill.subspace_bytes)
            key = (id(bill.cost), bill.tuned, *bytes_)
            if key not in seen:
                seen[key] = MethodCost.of(bill, convention)
            return seen[key]

        shown: set[str] = set()  # parameters stand at the first operation that reads them
        rows = (Row.of(same, {method: cost(bill) for method, bill in same.items()}, shown) for same in _matched(bills))
        listed = tuple(row for row in rows if not all(cost.is_free for cost in row.methods.values()))
        return cls(convention=convention, methods=tuple(bills), rows=listed, **facts)

    @property
    def totals(self) -> dict[str, MethodCost]:
        return {
            method: MethodCost.sum([row.methods[method] for row in self.rows if method in row.methods])
            for method in self.methods
        }

    @cached_property
    def peaks(self) -> dict[str, Peak]:
        """The peak of memory of one step, by method: as much work as all the rest of the report."""
        return self.peaks_of()

    @property
    def accountings(self) -> tuple[str, ...]:
        """Those under which bytes are known."""
        known = {name for row in self.rows for cost in row.methods.values() for name in cost.activation_bytes}
        return tuple(name for name in ACCOUNTINGS if name in known or not self.rows)

    @property
    def main(self) -> str:
        """The accounting that comes first in tables: the tape, or what PyTorch keeps where there is no tape."""
        return "tape" if "tape" in self.accountings else "pytorch"

    @property
    def estimates(self) -> dict[str, str]:
        """What is an upper estimate, for want of a rule, and that it is one."""
        from analysis.peak.memory import ESTIMATED

        found = sorted({what for peak in self.peaks.values() for what in peak.estimated})
        return {f"peak of {what}": ESTIMATED for what in found}

    @property
    def parameters(self) -> int:
        """Numbers that the net's parameters have, each parameter once; of a report without its net those listed."""
        return sum(row.parameters for row in self.rows) if self.net_parameters is None else self.net_parameters

    @property
    def work_unit(self) -> str:
        """What ``flops`` counts."""
        return "multiply-adds of the tuned layers" if self.convention == "paper" else "FLOPs"

    def to_json(self) -> dict[str, Any]:
        """The object of schema 1."""
        return {
            "schema": SCHEMA,
            "net": self.net,
            "batch": self.batch,
            "image_size": self.image_size,
            "num_classes": self.num_classes,
            "dtype": self.dtype,
            "convention": self.convention,
            "tuned_layers": [plain(path) for path in self.tuned_layers],
            "ranks_from": self.ranks_from,
            "layers": [row.to_json() for row in self.rows],
            "totals": {
                method: {**cost.to_json(), "parameters": self.parameters} for method, cost in self.totals.items()
            },
            "units": {
                "activation_bytes": "bytes",
                "subspace_bytes": "bytes",
                "flops": self.work_unit,
                "elementwise": "operations",
                "calibration": "multiply-adds",
                "peak": "bytes",
            },
            "settings": self.settings,
            "calibration": {method: cost.to_json() for method, cost in self.calibration.items()},
            "notes": self.notes
            | ({"net": self.remark} if self.remark else {})
            | ({"pytorch": OF_THE_FILE} if self.file_only else {})
            | ({"tape": f"none: {self.no_tape}"} if self.no_tape else {})
            | self.estimates,
            "chunks": self.chunks,
            "optimizer": self.optimizer,
            "peak": {method: _peak_json(peak) for method, peak in self.peaks.items()},
            "continual": None if self.continual is None else self.continual.to_json(),
        }

    def json_text(self) -> str:
        return json.dumps(self.to_json(), indent=1) + "\n"

    def csv_text(self) -> str:
        """The same rows flat: nested names joined by dots, shapes and ranks by ``x`` (``-``: left alone).

        Nothing stands where a method does not run the operation.
        """
        flat = self._flat_rows()
        return csv_text(flat, _names(flat) or ["name"])

    def to_pandas(self) -> Any:
        """The rows as a ``pandas.DataFrame``, the columns named as in :meth:`csv_text`; missing where not run.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped]
        except ImportError:
            hint = "python -m pip install pandas"
            raise ImportError(f"Report.to_pandas() needs pandas, which is not installed: {hint}") from None
        flat = self._flat_rows()
        return pandas.DataFrame(flat, columns=_names(flat))

    def __repr__(self) -> str:
        return f"Report({self.net}, batch {self.batch}, {', '.join(self.methods)}: {len(self.rows)} rows)"

    def _flat_rows(self) -> list[dict[str, Any]]:
        return [_flatten(row.to_json()) for row in self.rows]


def reductions(bp: MethodCost, other: MethodCost) -> dict[str, float | None]:
    """The factor by which the other method takes less, by accounting; None where it takes nothing.

    Factors count for the other method only: ``"tape + factors"`` compares bp's tape with both. Where there is no tape,
    what PyTorch keeps takes its place.
    """
    ratios = {name: _over(kept, other.activation_bytes[name]) for name, kept in bp.activation_bytes.items()}
    ratios[f"{bp.main} + factors"] = _over(bp.tape_and_factors, other.tape_and_factors)
    ratios["bp pytorch / tape"] = _over(bp.activation_bytes["pytorch"], other.activation_bytes[other.main])
    ratios["bp pytorch / tape + factors"] = _over(bp.activation_bytes["pytorch"], other.tape_and_factors)
    ratios["flops"] = _over(bp.flops["total"], other.flops["total"])
    return ratios


def _over(a: int, b: int) -> float | None:
    return a / b if b else None


def _peak_json(peak: Peak) -> dict[str, Any]:
    bytes_ = ("parameters", "gradients", "optimizer_state", "forward", "backward", "optimizer")
    first = {"peak_bytes": peak.peak_bytes, "peak_moment": peak.moment, "peak_at": peak.at}
    return first | {f"{name}_bytes": getattr(peak, f"{name}_bytes") for name in bytes_}


def _matched(bills: Mapping[str, Sequence[Billed]]) -> list[dict[str, Billed]]:
    """The bills of the same operation under every method that runs it, in order of execution.

    An operation that the first method does not run stands behind the last one before it that an earlier method runs.
    """
    rows: dict[_Place, dict[str, Billed]] = {}
    for method, listed in bills.items():
        behind: dict[_Place | None, list[_Place]] = {}
        last: _Place | None = None
        for place, bill in zip(_places((b.record.path, b.record.op) for b in listed), listed, strict=True):
            if place in rows:
                rows[place][method], last = bill, place
                continue
            behind.setdefault(last, []).append(place)
            rows[place] = {method: bill}
        if behind:
            rows = {place: rows[place] for place in _in_order(rows, behind)}
    return list(rows.values())


def _places(operations: Iterable[tuple[str, str]]) -> list[_Place]:
    """Layer and operation with the number of its call."""
    times: Counter[tuple[str, str]] = Counter()
    places = []
    for operation in operations:
        times[operation] += 1
        places.append((*operation, times[operation]))
    return places


def _in_order(rows: Iterable[Any], behind: Mapping[Any, list[Any]]) -> list[Any]:
    """All keys, the new ones behind those that they follow (None: at the start)."""
    new = {key for keys in behind.values() for key in keys}
    order = list(behind.get(None, ()))
    for key in rows:
        if key not in new:
            order += [key, *behind.get(key, ())]
    return order


def _names(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """All columns, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in flat for name in row))


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat.update(_flatten(inner, f"{name}.{key}" if name else key))
        return flat
    if isinstance(value, list):
        return {name: "x".join("-" if n is None else str(n) for n in value)}
    return {name: "" if value is None else value}
