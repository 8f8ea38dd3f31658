"""The cost model's answer as a value: rows, totals that are their sums, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.account import Billed

SCHEMA = 1
ACCOUNTINGS = ("paper", "pytorch", "tape")
CONVENTIONS = ("flops", "paper")
FLOP_KINDS = ("forward", "grad_input", "grad_weight", "projection", "decomposition", "recompute")


@dataclass(frozen=True)
class MethodCost:
    """What one method costs, in one layer or in total.

    Attributes
    ----------
    ranks : tuple or None
        Rank of each mode (None: left alone) of a compressed layer.
    activation_bytes : dict
        Bytes under each of :data:`ACCOUNTINGS`.
    subspace_bytes : int
        Fixed factors, in memory beside the tape.
    flops : dict
        One entry for each of :data:`FLOP_KINDS`, and their sum, ``"total"``. Under the convention
        ``"paper"`` these are multiply-adds of the tuned layers alone.
    elementwise : int
        Scalar operations outside of products.
    """

    ranks: tuple[int | None, ...] | None
    activation_bytes: dict[str, int]
    subspace_bytes: int
    flops: dict[str, int]
    elementwise: int

    @classmethod
    def of(cls, billed: Billed, convention: str) -> MethodCost:
        cost, paper = billed.cost, convention == "paper"
        counts = dict.fromkeys(FLOP_KINDS, 0)
        if not paper:
            counts = {
                "forward": 2 * cost.forward_macs,
                "grad_input": 2 * cost.grad_input_macs,
                "grad_weight": 2 * cost.grad_weight_macs,
                "projection": 2 * cost.projection_macs,
                "decomposition": 2 * cost.decomposition_macs,
                "recompute": 2 * cost.recompute_macs,
            }
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
        return cls(
            None,
            {name: sum(c.activation_bytes[name] for c in costs) for name in ACCOUNTINGS},
            sum(c.subspace_bytes for c in costs),
            {kind: sum(c.flops[kind] for c in costs) for kind in (*FLOP_KINDS, "total")},
            sum(c.elementwise for c in costs),
        )

    @property
    def tape_and_factors(self) -> int:
        """Bytes of the tape and of the fixed factors together."""
        return self.activation_bytes["tape"] + self.subspace_bytes

    @property
    def is_free(self) -> bool:
        """Whether nothing is kept and nothing computed."""
        return not (any(self.activation_bytes.values()) or any(self.flops.values()) or self.elementwise)

    def to_json(self) -> dict[str, Any]:
        return {
            "ranks": None if self.ranks is None else list(self.ranks),
            "activation_bytes": self.activation_bytes,
            "subspace_bytes": self.subspace_bytes,
            "flops": self.flops,
            "elementwise": self.elementwise,
        }


@dataclass(frozen=True)
class Row:
    """One executed operation. ``path`` is its layer, ``name`` is unique in the report."""

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
    def of(cls, billed: Mapping[str, Billed], convention: str) -> Row:
        """One row out of the same record's bill under every method."""
        first = next(iter(billed.values()))
        record = first.record
        weights = [value for value in record.inputs if value.parameter is not None]
        has_weight = len(record.inputs) > 1 and record.inputs[1].parameter is not None
        return cls(
            first.name,
            record.op,
            record.path,
            record.inputs[0].shape,
            record.output.shape,
            record.inputs[1].shape if has_weight else None,
            sum(value.size for value in weights),
            first.tuned,
            {method: MethodCost.of(bill, convention) for method, bill in billed.items()},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "op": self.op,
            "input_shape": list(self.input_shape),
            "output_shape": list(self.output_shape),
            "weight_shape": None if self.weight_shape is None else list(self.weight_shape),
            "parameters": self.parameters,
            "tuned": self.tuned,
            "methods": {method: cost.to_json() for method, cost in self.methods.items()},
        }


@dataclass(frozen=True)
class Report:
    """The cost of one training step of one net, by layer and method.

    ``rows`` holds every operation that keeps a byte or costs an operation, in order of execution.
    """

    net: str
    batch: int
    image_size: int | None
    num_classes: int
    dtype: str
    convention: str
    tuned_layers: tuple[str, ...]
    ranks_from: str
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, bills: Mapping[str, Sequence[Billed]], convention: str, **facts: Any) -> Report:
        """Fold the bills of all methods into rows; ``facts`` are the report's other attributes."""
        methods = list(bills)
        rows = [
            Row.of(dict(zip(methods, same_record, strict=True)), convention)
            for same_record in zip(*bills.values(), strict=True)
        ]
        listed = tuple(row for row in rows if not all(cost.is_free for cost in row.methods.values()))
        return cls(convention=convention, rows=listed, **facts)

    @property
    def methods(self) -> list[str]:
        return list(self.rows[0].methods) if self.rows else []

    @property
    def totals(self) -> dict[str, MethodCost]:
        return {method: MethodCost.sum([row.methods[method] for row in self.rows]) for method in self.methods}

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
            "tuned_layers": list(self.tuned_layers),
            "ranks_from": self.ranks_from,
            "layers": [row.to_json() for row in self.rows],
            "totals": {method: cost.to_json() for method, cost in self.totals.items()},
        }

    def json_text(self) -> str:
        return json.dumps(self.to_json(), indent=1) + "\n"

    def csv_text(self) -> str:
        """The same rows flat: nested names joined by dots, shapes and ranks by ``x`` (``-``: left alone)."""
        flat = [_flatten(row.to_json()) for row in self.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(flat[0]) if flat else ["name"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return text.getvalue()


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat.update(_flatten(inner, f"{name}.{key}" if name else key))
        return flat
    if isinstance(value, list):
        return {name: "x".join("-" if n is None else str(n) for n in value)}
    return {name: "" if value is None else value}
