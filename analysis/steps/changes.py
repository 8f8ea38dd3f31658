"""What a method makes of the records of a plain training step: other gradients, other operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lance_ref
from analysis.rules.account import WEIGHTED
from analysis.rules.recompute import OP, flatten, inside
from analysis.rules.subspace import rank_of_update, with_update
from analysis.steps.nets import RAISED, TracedStep, said_by, step_records
from analysis.steps.settings import MethodStep, NotApplicableError
from lance_ref import nn
from lance_ref.engine.recording import OpRecord, Value
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.lora import add_lora, put_back
from lance_ref.nn.module import Module
from lance_ref.nn.selection import choose
from lance_ref.train.features import stages_of

# ---- what trains ---------------------------------------------------------------------------


@contextmanager
def retuned(net: Module, **changes: str) -> Iterator[None]:
    """Inside the ``with`` block the net is tuned with other arguments of :func:`lance_ref.tune`.

    Raises NotApplicableError if that selection does not fit the net.
    """
    tuning = net.tuning
    flags = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    frozen = [(module, module.frozen) for module in net.modules() if "frozen" in vars(module)]
    try:
        try:
            lance_ref.tune(net, **{"selection": tuning.selection, **changes})
        except ValueError as error:
            raise NotApplicableError(str(error)) from None
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, was in frozen:
            module.frozen = was
        net.tuning = tuning


def trained_parameters(step: TracedStep, changes: Mapping[str, str]) -> set[str]:
    """Names of the parameters that train after :func:`lance_ref.tune` with these arguments.

    Raises NotApplicableError if that selection does not fit the net.
    """
    net = step.net
    try:
        trains = choose(net, **{"selection": net.tuning.selection, **changes}).trains
    except ValueError as error:
        raise NotApplicableError(str(error)) from None
    return {name for name, parameter in net.named_parameters() if id(parameter) in trains}


def retrained(records: Sequence[OpRecord], trains: Collection[str]) -> list[OpRecord]:
    """The same operations with gradients for these parameters, and for what depends on them.

    An operation that has no gradient although an input needs one (under ``no_grad()``) gets none. A record
    that does not change stays the same object.
    """
    return _retrained(records, trains, {})


def _retrained(records: Sequence[OpRecord], trains: Collection[str], needs: dict[int, bool]) -> list[OpRecord]:
    """``needs`` says of the values made so far whether they need gradients now; is added to."""
    changed = []
    for record in records:
        within = _retrained(inside(record), trains, needs)
        inputs = tuple(
            _flagged(v, v.parameter in trains if v.parameter is not None else needs.get(v.id, v.requires_grad))
            for v in record.inputs
        )
        if within:
            needed = needs[record.output.id]
            record = replace(record, attributes={**record.attributes, "records": within})
        else:
            cut = any(value.requires_grad for value in record.inputs) and not record.output.requires_grad
            needed = not cut and any(value.requires_grad for value in inputs)
        needs[record.output.id] = needed
        output = _flagged(record.output, needed)
        same = output is record.output and all(a is b for a, b in zip(inputs, record.inputs, strict=True))
        changed.append(record if same else replace(record, inputs=inputs, output=output))
    return changed


def _flagged(value: Value, requires_grad: bool) -> Value:
    return value if value.requires_grad == requires_grad else replace(value, requires_grad=requires_grad)


# ---- LoRA ----------------------------------------------------------------------------------


def with_lora(step: TracedStep, rank: int) -> MethodStep:
    """Beside each tuned linear layer and 1x1 convolution of one group: down to ``rank``, up again, and the sum.

    y = Wx + b becomes base = Wx + b, low = Ax, update = B·low, y = base + update, with records of the paths
    ``layer``, ``layer.down``, ``layer.up`` and ``layer.sum``. Which parameters are new is said in the step's facts.

    Raises NotApplicableError if no tuned layer can be adapted.
    """
    layers = sorted({r.path for r in flatten(step.records) if r.path in step.tuned_layers and _can_adapt(r)})
    if not layers:
        raise NotApplicableError("none of the tuned layers is a linear layer or a 1x1 convolution of one group")
    values = (value.id for r in flatten(step.records) for value in (*r.inputs, r.output))
    fresh = itertools.count(1 + max(values))
    parameters: dict[str, Value] = {}

    def parameter(name: str, shape: tuple[int, ...], dtype: str) -> Value:
        return parameters.setdefault(name, Value(next(fresh), shape, dtype, True, name))

    def expand(record: OpRecord) -> list[OpRecord]:
        if record.path not in layers or record.op not in WEIGHTED:
            return [record]
        x, weight = record.inputs[:2]
        y, kernel = record.output, weight.shape[2:]
        A = parameter(f"{record.path}.down.weight", (rank, weight.shape[1], *kernel), weight.dtype)
        B = parameter(f"{record.path}.up.weight", (weight.shape[0], rank, *kernel), weight.dtype)
        low_shape = (*y.shape[:-1], rank) if record.op == "linear" else (y.shape[0], rank, *y.shape[2:])
        base, update = (Value(next(fresh), y.shape, y.dtype, True) for _ in range(2))
        low = Value(next(fresh), low_shape, y.dtype, True)
        exact: dict[str, Any] = {**record.attributes, "store": {"name": "exact"}}
        plain = exact if record.op == "linear" else {**exact, **_POINTWISE}
        return [
            replace(record, output=base),
            OpRecord(record.op, f"{record.path}.down", (x, A), low, exact),
            OpRecord(record.op, f"{record.path}.up", (low, B), update, plain),
            OpRecord("add", f"{record.path}.sum", (base, update), replace(y, requires_grad=True), {}),
        ]

    records = _expanded(step.records, expand)
    return MethodStep(records, facts={"layers": layers, "rank": rank, "parameters": sorted(parameters)})


_POINTWISE = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}


@contextmanager
def adapted(net: Module, layers: Sequence[str], rank: int) -> Iterator[None]:
    """Inside the ``with`` block these layers of the net have updates of low rank."""
    replaced = add_lora(net, layers, rank, rng=0)
    try:
        yield
    finally:
        put_back(net, replaced)


def _can_adapt(record: OpRecord) -> bool:
    pointwise = record.op == "conv2d" and record.inputs[1].shape[2:] == (1, 1) and record.attributes["groups"] == 1
    return record.op == "linear" or pointwise


def _expanded(records: Sequence[OpRecord], expand: Callable[[OpRecord], list[OpRecord]]) -> list[OpRecord]:
    changed: list[OpRecord] = []
    for record in records:
        if inside(record):
            within = _expanded(inside(record), expand)
            record = replace(record, attributes={**record.attributes, "records": within})
        changed += expand(record)
    return changed


# ---- training in a subspace ------------------------------------------------------------------


IN_SUBSPACES = ("conv2d", "linear")
"""Operations of the layers whose weights may train in a subspace."""


def in_subspace(changed: MethodStep) -> MethodStep:
    """The same step with D and s in place of each compressed layer's weight, where D is smaller.

    (x, W, [b]) becomes (x, D, [b], W_0, s); the paths of these layers are in the step's facts. Raises
    NotApplicableError for a compressed layer of another kind than :data:`IN_SUBSPACES`.
    """
    values = (value.id for r in flatten(changed.records) for value in (*r.inputs, r.output))
    fresh = itertools.count(1 + max(values))
    parameters: dict[str, Value] = {}

    def parameter(name: str, shape: tuple[int, ...], dtype: str) -> Value:
        return parameters.setdefault(name, Value(next(fresh), shape, dtype, True, name))

    updated: dict[str, None] = {}

    def expand(record: OpRecord) -> list[OpRecord]:
        store = changed.stores.get(record.path)
        if record.op not in WEIGHTED or store is None or not record.inputs[1].requires_grad:
            return [record]
        if record.op not in IN_SUBSPACES:
            raise NotApplicableError(
                f"layer {record.path!r} is a {record.op}, which trains in no subspace; tune other layers"
            )
        x, weight = record.inputs[:2]
        rank = store["ranks"][1 if len(x.shape) >= 4 else -1]
        groups, centred = record.attributes.get("groups", 1), bool(store.get("centred"))
        r = None if rank is None else rank_of_update(rank, weight.shape[1], groups, centred)
        if r is None:
            return [record]
        updated[record.path] = None
        D = parameter(f"{record.path}.update.weight", (weight.shape[0], r, *weight.shape[2:]), weight.dtype)
        return [with_update(record, r, D, parameter(f"{record.path}.update.decay", (), weight.dtype))]

    records = _expanded(changed.records, expand)
    return replace(changed, records=records, facts={**changed.facts, "updated": list(updated)})


# ---- checkpointing -------------------------------------------------------------------------


@contextmanager
def recomputed(net: Module, segments: int | None) -> Iterator[int]:
    """Inside the ``with`` block stages of the net run again in the backward pass; gives the number of segments.

    Arguments and errors are those of :func:`in_segments`.
    """
    parts, count = in_segments(net, segments)

    def forward(x: Tensor) -> Tensor:
        for part in parts:
            x = part(x)
        return x

    before = net.__dict__.get("forward")
    net.__dict__["forward"] = forward
    try:
        yield count
    finally:
        del net.__dict__["forward"]
        if before is not None:
            net.__dict__["forward"] = before


def in_segments(net: Module, segments: int | None) -> tuple[list[Module], int]:
    """The stages of a net, in segments that run again in the backward pass, and how many of these there are.

    The stages from the first that trains to the last but one are put together into so many ``segments``, the first ones
    longer where it does not come out even; by default each of them with parameters that train is one. Raises
    NotApplicableError if the net has no stages, ValueError if it has too few.
    """
    if not hasattr(net, "stages"):
        raise NotApplicableError(f"checkpointing takes a net with stages(), a {type(net).__name__} has none")
    *body, last = modules_of_stages(net)
    trains = [any(parameter.requires_grad for parameter in stage.parameters()) for stage in body]
    first = trains.index(True) if True in trains else len(body)
    stretch = body[first:]
    if segments is not None and segments > len(stretch):
        raise ValueError(
            f"segments is {segments}, expected at most {len(stretch)}, the stages from the first that trains to the "
            "last but one"
        )
    if segments is None:
        again = [nn.Recompute(stage) if yes else stage for stage, yes in zip(stretch, trains[first:], strict=True)]
        count = sum(trains)
    else:
        again = [
            nn.Recompute(stages[0] if len(stages) == 1 else nn.Sequential(*stages))
            for stages in _stretches(stretch, segments)
        ]
        count = segments
    return [*body[:first], *again, last], count


def modules_of_stages(net: Module) -> list[Module]:
    """What ``net.stages()`` gives, with parameters to look for in each.

    Raises ValueError in one line, if it raises, or gives anything but modules of the library; NotApplicableError if it
    gives none.
    """
    title = type(net).__name__
    try:
        stages = stages_of(net)
    except RAISED as error:
        raise ValueError(f"stages() of the {title} raised {said_by(error)}") from None
    if not stages:
        raise NotApplicableError(f"stages() of the {title} gives nothing: it cannot be cut")
    odd = next((stage for stage in stages if not isinstance(stage, Module)), None)
    if odd is not None:
        raise ValueError(
            f"stages() of the {title} gives a {type(odd).__name__} among others, expected a list of lance_ref.nn.Module"
        )
    return stages


def _stretches(stages: list[Module], count: int) -> Iterator[list[Module]]:
    length, longer = divmod(len(stages), count)
    start = 0
    for i in range(count):
        stop = start + length + (i < longer)
        yield stages[start:stop]
        start = stop


def checkpointed(step: TracedStep, segments: int | None) -> MethodStep:
    """The step with its stages recomputed (:func:`recomputed`), traced anew.

    Raises NotApplicableError if the net has no stages, or these run other operations than its forward pass.
    """
    with recomputed(step.net, segments) as count:
        records, _, ends = step_records(step.net, step.name, step.input_shape, step.batch, step.dtype)
    plain, ours = ([(r.op, r.path) for r in flatten(each) if r.op != OP] for each in (step.records, records))
    if ours != plain:
        raise NotApplicableError("checkpointing runs the stages() of the net, and these are not its forward()")
    return MethodStep(records, facts={"segments": count, "asked": segments}, own_trace=True, lifetimes=ends)


def numbers(records: Sequence[OpRecord], others: Sequence[OpRecord]) -> dict[int, int]:
    """The number of each value in another trace of the same operations, by its number in the first."""
    found: dict[int, int] = {}
    for one, other in zip(flatten(records), flatten(others), strict=True):
        for mine, theirs in zip((*one.inputs, one.output), (*other.inputs, other.output), strict=True):
            found[mine.id] = theirs.id
    return found
