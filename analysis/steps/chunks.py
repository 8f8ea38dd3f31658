"""A step that takes its batch in chunks of images, one after the other: the same records for fewer images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from analysis.peak.stores import STORES
from analysis.rules.recompute import flatten
from analysis.steps.changes import retrained
from analysis.steps.nets import CannotRunError, TracedStep, step_records
from analysis.steps.register import method_step
from analysis.steps.settings import MethodStep, NotApplicableError, Ranks, Settings
from lance_ref.train.chunks import at_a_time, mixing_operation, shared_draws

MICRO_BATCHES = 4
"""The least number of micro-batches of a step, where the user gives none."""


def at_batch(step: TracedStep, batch: int) -> TracedStep:
    """The same training step with that many images, traced anew.

    Raises ValueError if the net does not run on so many, or was changed since ``step`` was traced.
    """
    if batch == step.batch:
        return step
    training = [(module, module.training) for module in step.net.modules()]
    step.net.train()
    try:
        records = step_records(step.net, step.name, step.input_shape, batch, step.dtype).records
    finally:
        for module, was in training:
            module.training = was
    values = [value for record in flatten(step.records) for value in record.inputs]
    records = retrained(records, {v.parameter for v in values if v.parameter is not None and v.requires_grad})
    if [(r.op, r.path) for r in flatten(records)] != [(r.op, r.path) for r in flatten(step.records)]:
        raise ValueError(f"net {step.name!r} was changed after its cost was predicted: predict it again")
    return replace(step, records=records, samples=batch)


def in_chunks(
    name: str,
    step: TracedStep,
    changed: MethodStep,
    settings: Settings,
    ranks: Mapping[str, Ranks],
    tuned: Mapping[str, tuple[int, ...]],
    asked: int | str,
) -> tuple[MethodStep, str]:
    """The step of a method in equal chunks of images, and a clause on that; as it is where something mixes the images.

    Parameters
    ----------
    name, step, settings, ranks, tuned
        Those of :func:`analysis.steps.register.method_step`, which gave ``changed``.
    asked : int or "auto"
        As ``chunk`` of :func:`lance_ref.fit`, which decides likewise.
    """
    if changed.repeats > 1:
        return changed, f"{step.batch // changed.repeats} images at a time"
    why = mixing_store(changed)
    if why is not None:
        return changed, f"each batch stays whole: {why}"
    images = at_a_time(changed.records[:-1], step.batch, step.batch, asked)
    if images == step.batch:
        return changed, "each batch stays whole: it is small enough"
    try:
        few = step.remember(("batch", images), lambda: at_batch(step, images))
    except CannotRunError as error:
        return changed, f"each batch stays whole: {error}"
    shapes = {path: (shape[0] * images // step.batch, *shape[1:]) for path, shape in tuned.items()}
    part = method_step(name, few, settings, ranks, shapes)
    sizes = images, step.batch
    why = mixing_operation(part.records[:-1], changed.records[:-1], sizes) or shared_draws(step.net, part.records)
    if why is not None:
        return changed, f"each batch stays whole: {why}"
    return replace(part, repeats=step.batch // images, own_trace=True), f"{images} images at a time"


def mixing_store(changed: MethodStep) -> str | None:
    """Which store keeps something that depends on all images of a batch, as a clause; None if none does."""
    for path, store in changed.stores.items():
        rule = STORES.get(store["name"])
        if rule is None or not rule.by_image(store):
            return f"what the store {store['name']!r} of {path} keeps depends on all images of a batch"
    return None


def in_micro_batches(step: TracedStep, images: int | None) -> MethodStep:
    """The step in parts of a given number of images, traced again, even where an operation mixes the images of a part.

    Raises ValueError if that is no divisor of the batch, NotApplicableError if the net does not run on so few: batch
    norm with the statistics of one vector.
    """
    if images is None:
        images = next(k for k in range(max(step.batch // MICRO_BATCHES, 1), 0, -1) if step.batch % k == 0)
    if step.batch % images:
        raise ValueError(f"micro_batch is {images}, expected a divisor of batch = {step.batch}")
    if images == step.batch:
        return MethodStep(step.records, facts={"micro_batch": images})
    try:
        part = at_batch(step, images)
    except CannotRunError as error:
        raise NotApplicableError(f"in parts of {images}: {error}") from None
    return MethodStep(part.records, step.batch // images, facts={"micro_batch": images}, own_trace=True)
