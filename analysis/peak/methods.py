"""The peak of memory of every method of a prediction; :mod:`analysis.peak.memory` has the peak of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.account import row_names
from analysis.method_runs import running
from analysis.methods import METHODS
from analysis.nets import step_records
from analysis.peak.lifetimes import Lifetimes, lifetimes
from analysis.peak.memory import Peak, peak
from analysis.peak.simulation import Simulation
from analysis.rules.layouts import Storage
from analysis.rules.recompute import flatten
from lance_ref.tracing import OpRecord

if TYPE_CHECKING:
    from analysis.predict import Prediction


def peaks(prediction: Prediction, methods: Sequence[str] | None = None) -> dict[str, Peak]:
    """The peak of one step, by method.

    Parameters
    ----------
    prediction : Prediction
        Its net as it was traced.
    methods : sequence of str, optional
        All of the prediction by default.

    Notes
    -----
    Of a step in parts, the peak is that of the second part, when the gradients of the first are there; the images of
    the other parts are not counted.

    Tensors live as long as the net's own ``forward`` names them; where a method runs other operations, as long as in
    that method's forward pass.
    """
    step = prediction.step
    plain = lifetimes(step.net, (step.batch, *step.input_shape), np.dtype(step.dtype))
    found = {}
    for method in prediction.bills if methods is None else methods:
        bills, changed, ends = prediction.bills[method], prediction.steps[method], plain
        if METHODS[method].runs is not None:
            with running(step, method, changed):
                batch = step.batch // changed.repeats
                ends = lifetimes(step.net, (batch, *step.input_shape), np.dtype(step.dtype))
                if not changed.own_trace:
                    ends = _renumbered(
                        ends, step_records(step.net, step.name, step.input_shape, batch, step.dtype)[0], changed.records
                    )
        one = peak(bills, optimizer=prediction.asked.optimizer, parameters=step.net.parameters(), lifetimes=ends)
        found[method] = one if changed.repeats == 1 else _of_second_part(one, changed.records, ends)
    return found


def _of_second_part(first: Peak, records: Sequence[OpRecord], ends: Lifetimes) -> Peak:
    """The peak of a step in parts, from that of its first part: later ones add to gradients that are there."""
    everything = flatten(records)
    trained = {v.id: v for record in everything for v in record.inputs if v.parameter is not None and v.requires_grad}
    simulation = Simulation(records, ends)
    for value in trained.values():
        simulation.gradients[value.id] = Storage(value.nbytes)
        simulation.ledger.hold(simulation.gradients[value.id])
    simulation.run()
    most = {part: count + first.optimizer_state_bytes for part, count in simulation.ledger.most.items()}
    moment = max(most, key=lambda part: most[part])
    changes: dict[str, Any] = {"forward_bytes": most["forward"], "backward_bytes": most["backward"]}
    if most[moment] > first.optimizer_bytes:
        names = dict(zip(map(id, everything), row_names(everything), strict=True))
        changes |= {"peak_bytes": most[moment], "moment": moment, "at": names[id(simulation.ledger.at[moment])]}
    return replace(first, **changes)


def _renumbered(ends: Lifetimes, traced: Sequence[OpRecord], records: Sequence[OpRecord]) -> dict[int, int]:
    """Lifetimes of the values of one trace for those of the same operations under other numbers."""
    numbers: dict[int, int] = {}
    for ours, theirs in zip(flatten(traced), flatten(records), strict=True):
        for a, b in zip((*ours.inputs, ours.output), (*theirs.inputs, theirs.output), strict=True):
            numbers[a.id] = b.id
    return {numbers[value]: end for value, end in ends.items() if value in numbers}
