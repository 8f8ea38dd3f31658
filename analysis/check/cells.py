"""One cell of the validation: a net, a batch size and a dtype, with every method predicted and run.

What agrees is for :mod:`analysis.check.measure` to say: what is counted, bytes and multiply-adds, must be equal in
every layer; the peak of memory, which ``tracemalloc`` measures together with Python's own objects, must be near.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.check.measure import compare
from analysis.commands.names import one_line
from analysis.commands.provenance import code_fingerprint
from analysis.steps.methods import METHODS
from analysis.steps.nets import CannotRunError
from analysis.steps.settings import NotApplicableError
from lance_ref import models

if TYPE_CHECKING:
    from analysis.reports.prediction import Prediction

CLASSES = 10
SHOWN_DIFFERENCES = 10
"""The largest number of differences that are shown for one method and one quantity; all are counted."""

Cell = dict[str, Any]


def cells(
    nets: Sequence[str], methods: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], ranks: float
) -> list[Cell]:
    """The grid, as arguments of :func:`validate_cell`."""
    return [
        {
            "net": net,
            "batch": batch,
            "dtype": dtype,
            "methods": list(methods),
            "ranks": ranks,
            "code": code_fingerprint(),  # a cell that ran on other code says nothing about this one
        }
        for net in dict.fromkeys(nets)
        for dtype in dict.fromkeys(dtypes)
        for batch in dict.fromkeys(batches)
    ]


def validate_cell(
    net: str, batch: int, dtype: str, methods: Sequence[str], ranks: float = 0.25, code: str = ""
) -> dict[str, Any]:
    """Predict and run one step of every method; ``ranks`` is a fraction of each mode for the methods that have ranks.

    ``code`` tells cells of other sources apart (:func:`code_fingerprint`). The result, for JSON, says what was run, and
    has for each method what :func:`_numbers` gives, ``{"left_out": why}``, or ``{"failed": message}``.
    """
    from analysis.reports.predict import predict

    shape = models.find(net).small_shape
    try:
        plain = predict(
            net, batch, input_shape=shape, num_classes=CLASSES, methods=["bp"], dtype=dtype, with_weights=True
        )
    except CannotRunError as error:  # batch norm with the statistics of one vector
        predict(net, batch + 1, input_shape=shape, num_classes=CLASSES, methods=["bp"])  # raises if not for the batch
        left_out = {method: {"left_out": one_line(error)} for method in methods}
        return {"input_shape": list(shape), "tuned_layers": [], "methods": left_out}
    outcome: dict[str, Any] = {"input_shape": list(shape), "tuned_layers": list(plain.step.tuned_layers), "methods": {}}
    for method in methods:
        try:
            prediction = predict(plain.step, methods=[method], ranks=str(ranks) if METHODS[method].ranks else None)
            outcome["methods"][method] = _numbers(prediction)
        except Exception as error:  # a cell that fails is a disagreement, and the others run on
            if isinstance(error.__context__, NotApplicableError):
                outcome["methods"][method] = {"left_out": one_line(error.__context__)}
            else:
                outcome["methods"][method] = {"failed": f"{type(error).__name__}: {one_line(error)}"}
    return outcome


def _numbers(prediction: Prediction) -> dict[str, Any]:
    """The comparison by quantity: predicted and measured totals, the count of numbers, and those that differ."""
    comparison = compare(prediction, peaks=True)
    found: dict[str, Any] = {}
    for line in comparison.lines:
        entry = found.setdefault(
            line.what, {"predicted": 0, "measured": 0, "numbers": 0, "differing": 0, "differences": []}
        )
        entry["predicted"] += line.predicted
        entry["measured"] += line.measured
        entry["numbers"] += 1
        if not line.agrees:
            entry["differing"] += 1
            if len(entry["differences"]) < SHOWN_DIFFERENCES:
                entry["differences"].append([line.layer, line.predicted, line.measured])
    return {"quantities": found, "notes": comparison.notes}


def with_fields(cell: Cell, outcome: dict[str, Any]) -> dict[str, Any]:
    """What ran and what came of it, as one entry of the results file; the fingerprint is said once for all."""
    return {**{name: cell[name] for name in ("net", "batch", "dtype")}, **outcome}
