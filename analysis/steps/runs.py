"""The methods on a real net: what :mod:`analysis.steps.methods` says of the records, done to the net itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from analysis.rules.recompute import flatten
from analysis.steps.changes import retuned
from analysis.steps.methods import METHODS
from analysis.steps.nets import TracedStep
from analysis.steps.register import tuned_layers
from analysis.steps.settings import MethodStep
from lance_ref.nn.subspace import train_in_subspace


@contextmanager
def running(step: TracedStep, name: str, changed: MethodStep) -> Iterator[None]:
    """Inside the ``with`` block the net of ``step`` trains by this method; afterwards it is as it was.

    Micro-batches are the business of whoever runs the step.
    """
    method = METHODS[name]
    with ExitStack() as stack:
        if method.tune:
            stack.enter_context(retuned(step.net, **method.tune))
        if method.on_net is not None:
            stack.enter_context(method.on_net(step.net, changed.facts))
        stack.enter_context(_with_stores(step, name, changed))
        yield


@contextmanager
def _with_stores(step: TracedStep, name: str, changed: MethodStep) -> Iterator[None]:
    """A new store of the method in every layer that has one."""
    make, paths = METHODS[name].make, changed.stores
    if make is None:
        yield
        return
    records = [r for r in flatten(step.records) if r.path in paths and "store" in r.attributes]
    layers = {path: step.net.get_submodule(path) for path in paths}
    before = {path: layer.store for path, layer in layers.items()}
    try:
        shapes = {record.path: record.inputs[0].shape for record in records}
        for tuned in tuned_layers(step.dtype, shapes, changed.ranks, changed.settings):
            layers[tuned.path].store = make(tuned)
        train_in_subspace(step.net, changed.facts.get("updated", []))
        yield
    finally:
        for path, layer in layers.items():
            layer.store = before[path]
        for path in changed.facts.get("updated", []):  # nothing was learned, so there is nothing to merge
            layers[path].update = None
            layers[path].weight.requires_grad_()
