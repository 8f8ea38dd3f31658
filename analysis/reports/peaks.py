"""The peak of memory of every method of a prediction; :mod:`analysis.peak.memory` has the peak of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.peak.lifetimes import Lifetimes, renumbered
from analysis.peak.memory import Peak, parameters_bytes, peak_of
from analysis.peak.simulation import Simulation
from analysis.rules.layouts import Storage
from analysis.rules.recompute import flatten
from analysis.steps.changes import numbers
from analysis.steps.methods import METHODS
from analysis.steps.nets import TracedStep, step_records
from analysis.steps.runs import running
from analysis.steps.settings import MethodStep
from lance_ref.engine.recording import OpRecord


def peaks(step: TracedStep, steps: Mapping[str, MethodStep], optimizer: str) -> dict[str, Peak]:
    """The peak of one step by method, where ``step`` is plain backpropagation and ``steps`` is what each method runs.

    Of a step in parts it is the peak of the second part, when the gradients of the first are there; the images of the
    other parts are not counted. Tensors live as long as the net's own ``forward`` names them; where a method runs other
    operations, as long as in that method's forward pass.
    """
    parameters = parameters_bytes(step.net.parameters())
    found = {}
    for name, changed in steps.items():
        plain = METHODS[name].runs is None
        simulation = Simulation(changed.records, step.lifetimes if plain else _lifetimes(step, name, changed))
        if changed.repeats > 1:
            simulation.gradients_before(_gradients(changed.records))
        simulation.run()
        found[name] = peak_of(simulation, optimizer, parameters)
    return found


def _gradients(records: Sequence[OpRecord]) -> dict[int, Storage]:
    """The gradients that the parts before left: of everything that trains, by id, in the order of backward."""
    values = (value for record in reversed(flatten(records)) for value in record.inputs)
    return {v.id: Storage(v.nbytes) for v in values if v.parameter is not None and v.requires_grad}


def _lifetimes(step: TracedStep, method: str, changed: MethodStep) -> Lifetimes:
    """When the tensors of a step that runs other operations than the plain one are given back."""
    if changed.lifetimes is not None:
        return changed.lifetimes
    with running(step, method, changed):
        traced = step_records(step.net, step.name, step.input_shape, step.batch, step.dtype)
    return renumbered(traced.lifetimes, numbers(traced.records, changed.records))
