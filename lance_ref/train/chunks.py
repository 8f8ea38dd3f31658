"""Chunks of a batch: when a step may take its images a few at a time, and how many at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lance_ref import nn
from lance_ref.engine.recording import OpRecord
from lance_ref.engine.tensor import Shape
from lance_ref.nn.module import Module
from lance_ref.nn.tracing import trace
from lance_ref.stores import ActivationStore
from lance_ref.train.features import in_mode

AUTO_BYTES = 8 * 1024**2
"""Of a chunk of ``"auto"``: the most bytes that the results of all operations that get gradients may take, unless the
gradients of the parameters take more anyway."""

SIZES = (2, 3)
"""Two batch sizes; what does not grow from one to the other in proportion mixes images."""


class Chunks(NamedTuple):
    """How a step takes its batch: the images that run at a time, and a sentence about it for reports."""

    images: int
    note: str


def chunks_of(net: Module, input_shape: Shape, dtype: Any, batch: int, asked: int | str | None) -> Chunks:
    """How many images a training step of ``net`` takes at a time.

    A chunk must not change the step beyond rounding: the batch stays whole where an operation or an activation store
    mixes its images. The network is traced on shapes alone, in training mode.

    Parameters
    ----------
    net : Module
        With its selection and its stores.
    input_shape : tuple of int
        Of one image.
    dtype : numpy dtype
        Of the images.
    batch : int
        Images of a step.
    asked : int, "auto" or None
        At most so many, or with ``"auto"`` at most so many as :data:`AUTO_BYTES` allow, in equal chunks: the largest
        divisor of ``batch`` up to that. None: all of them.

    Raises
    ------
    ValueError
        If ``asked`` is none of these.
    """
    check_chunk(asked)
    if asked is None or (asked != "auto" and int(asked) >= batch):
        return Chunks(batch, "")
    why = mixing_store(net)  # first: a compressed batch mode would fit no other batch size
    if why is None:
        try:
            with in_mode(net, training=True):
                few, more = (trace(net, (size, *input_shape), dtype) for size in SIZES)
        except Exception as error:  # a user's forward() may raise anything where it gets no values
            why = f"the network cannot be traced on shapes alone ({type(error).__name__}: {error})"
        else:
            why = mixing_operation(few, more) or shared_draws(net, few) or unseen_store(net, few)
    if why is not None:
        return Chunks(batch, f"Each batch stayed whole: {why}.")
    images = at_a_time(few, SIZES[0], batch, asked)
    if images == batch:
        return Chunks(batch, "Each batch stayed whole: it is small enough.")
    return Chunks(images, f"Each step took its {batch} images {images} at a time.")


def check_chunk(asked: object) -> None:
    """Raise ValueError unless this can be asked for."""
    number = isinstance(asked, (int, np.integer)) and not isinstance(asked, bool) and asked >= 1
    if not (number or asked is None or asked == "auto"):
        raise ValueError(f"chunk is {asked!r}, expected 'auto', None, or a positive number of images")


def at_a_time(records: Iterable[OpRecord], traced: int, batch: int, asked: int | str) -> int:
    """The images of a chunk, for what was asked of :func:`chunks_of`; ``records`` are a trace of ``traced`` images."""
    if isinstance(asked, str):
        results = {record.output.id: record.output.nbytes for record in flat(records) if record.output.requires_grad}
        values = {value.id: value for record in flat(records) for value in record.inputs if value.requires_grad}
        gradients = sum(value.nbytes for value in values.values() if value.parameter is not None)
        # A chunk adds its gradients to those of the chunks before: where they are most of the memory, it does not pay.
        most = max(AUTO_BYTES, gradients) * traced // max(sum(results.values()), 1)
    else:
        most = int(asked)
    return next(images for images in range(max(1, min(most, batch)), 0, -1) if batch % images == 0)


def mixing_operation(few: Sequence[OpRecord], more: Sequence[OpRecord], sizes: tuple[int, int] = SIZES) -> str | None:
    """Why the images of a batch do not go through a net one by one, as a clause; None where they do.

    ``few`` and ``more`` are traces of the same forward pass at two batch ``sizes``: what depends on the images must
    grow in proportion. An operation that permutes images is not noticed, nor is one that looks at their values.
    """
    if [(r.op, r.path) for r in flat(few)] != [(r.op, r.path) for r in flat(more)]:
        return "the forward pass runs other operations for another batch size"
    of_images: set[int] = set()
    for a, b in zip(flat(few), flat(more), strict=True):
        of_images |= {v.id for v, w in zip(a.inputs, b.inputs, strict=True) if v.shape != w.shape}
        if of_images.isdisjoint(value.id for value in a.inputs):
            continue
        of_images.add(a.output.id)
        where = f"{a.op} in {a.path or 'the network itself'}"
        if a.op == "batch_norm" and a.attributes["training"]:
            return f"{where} uses the statistics of the batch"
        along = a.attributes.get("dim")
        if isinstance(along, int) and a.inputs[0].shape[along] != b.inputs[0].shape[along]:
            return f"{where} runs along the batch"
        if a.output.size * sizes[1] != b.output.size * sizes[0]:
            return f"{where} mixes the images of a batch"
    return None


def mixing_store(net: Module) -> str | None:
    """Which activation store keeps something that depends on all images of a batch, as a clause; None if none does."""
    for path, layer in net.named_modules():
        store: ActivationStore | None = getattr(layer, "store", None)
        if store is not None and not store.by_image and any(p.requires_grad for p in layer.parameters()):
            return f"what the store {store.name!r} of {path} keeps depends on all images of a batch"
    return None


def unseen_store(net: Module, records: Sequence[OpRecord]) -> str | None:
    """Which operation has an activation store that no layer of the net holds, so that nothing is known of it."""
    modules = dict(net.named_modules())
    for record in flat(records):
        name = record.attributes.get("store", {"name": "exact"})["name"]
        if name != "exact" and not hasattr(modules.get(record.path), "store"):
            return f"{record.op} in {record.path or 'the network itself'} has a store {name!r} that is no layer's"
    return None


def shared_draws(net: Module, records: Sequence[OpRecord]) -> str | None:
    """Why dropout would draw other masks for chunks, as a clause: two draws of a step from one generator change places.

    A generator of its own gives each layer, chunk by chunk, what it gives for the whole batch.
    """
    modules = dict(net.named_modules())
    draws = [modules.get(record.path) for record in flat(records) if record.op == "dropout"]
    sources = Counter(id(module.rng) if isinstance(module, nn.Dropout) else 0 for module in draws)
    if len(draws) > 1 and (sources[0] or max(sources.values()) > 1):
        return "several dropouts draw from one random generator"
    return None


def flat(records: Iterable[OpRecord]) -> Iterator[OpRecord]:
    """All records, those inside of recomputed segments too."""
    for record in records:
        yield record
        yield from flat(record.attributes.get("records", ()))
