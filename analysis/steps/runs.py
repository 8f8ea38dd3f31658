"""The methods on a real net: what :mod:`analysis.steps.methods` says of the records, done to the net itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from analysis.rules.recompute import flatten
from analysis.steps.changes import recomputed, retuned
from analysis.steps.methods import METHODS
from analysis.steps.nets import TracedStep
from analysis.steps.settings import MethodStep
from lance_ref.algebra.frame import Frame, feature_mode
from lance_ref.algebra.subspace import Subspace
from lance_ref.nn.lora import add_lora, put_back
from lance_ref.nn.module import Module
from lance_ref.stores import ActivationStore, Asi, GradientFilter, Hosvd, Lance, Quantized, Sketch


@contextmanager
def running(step: TracedStep, method: str, changed: MethodStep) -> Iterator[None]:
    """Inside the ``with`` block the net of ``step`` trains by this method; afterwards it is as it was.

    Micro-batches are the business of whoever runs the step.
    """
    with ExitStack() as stack:
        if METHODS[method].tune:
            stack.enter_context(retuned(step.net, **METHODS[method].tune))
        if method == "checkpoint":
            stack.enter_context(recomputed(step.net, changed.facts["asked"]))
        if method == "lora":
            stack.enter_context(_with_lora(step.net, changed.facts["layers"], changed.facts["rank"]))
        stack.enter_context(_with_stores(step, changed.stores))
        yield


@contextmanager
def _with_lora(net: Module, layers: list[str], rank: int) -> Iterator[None]:
    replaced = add_lora(net, layers, rank, rng=0)
    try:
        yield
    finally:
        put_back(net, replaced)


@contextmanager
def _with_stores(step: TracedStep, stores: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Stores that describe themselves so, with random factors: bytes and multiply-adds depend on nothing else."""
    rng = np.random.default_rng(0)
    shapes = {r.path: r.inputs[0].shape for r in flatten(step.records) if r.path in stores and "store" in r.attributes}
    layers = {path: step.net.get_submodule(path) for path in stores}
    before = {path: layer.store for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.store = make_store(stores[path], shapes[path], layer.weight.dtype, rng)
        yield
    finally:
        for path, layer in layers.items():
            layer.store = before[path]


def make_store(
    description: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator
) -> ActivationStore:
    """A real store of that description, for a layer with inputs of that shape; subspaces are random."""
    name = description["name"]
    if name == "lance":
        space = Subspace.random(shape, description["ranks"], rng)
        if description.get("centred"):
            space = replace(space, frame=Frame(None, np.ones(shape[feature_mode(shape)])))
        return Lance(space, dtype=dtype)
    if name == "hosvd":
        return Hosvd(ranks=description["ranks"])
    if name == "asi":
        return Asi(description["ranks"])
    if name == "gradient-filter":
        return GradientFilter(description["patch"])
    if name == "quantized":
        return Quantized(description["bits"])
    if name == "sketch":
        return Sketch(description["ratio"])
    raise ValueError(f"store is {name!r}, and there is no way to make one")
