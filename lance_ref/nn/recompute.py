"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): keep a segment's input, run the segment twice.

The first run puts nothing on the tape. When the backward pass arrives at the segment, the segment
runs again from its input, this time on a tape, and the backward pass goes on through that tape. So

    tape = the inputs of the segments,     work = one more forward pass of every segment,

and while one segment is differentiated its own tape is alive as well.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lance_ref.engine.autograd import Function, Node, Saved, Segment
from lance_ref.engine.counting import spending_on
from lance_ref.engine.recording import OpRecord, Recorder
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.layers import Sequential
from lance_ref.nn.module import Module


class Recompute(Module):
    """Keep the input of ``segment`` alone, and run the segment again in the backward pass.

    Output and gradients are those of the segment itself, bit by bit: the second run draws the random
    numbers of the first (dropout), is in the same mode (training or evaluation), and leaves buffers such
    as the running statistics of a batch norm as it finds them. An activation store inside saves in the
    second run only.

    Parameters
    ----------
    segment : Module
        Of one or several tensors, which it takes as positional arguments; its result is one tensor.
        Best a stretch of layers: of a single layer little more than the input is kept anyway.

    Raises
    ------
    RuntimeError
        In the forward pass, if the segment uses a tensor with a history that is not one of its inputs. In
        the backward pass, if an input or a parameter was changed since, if the second run is not a
        repetition of the first, or if a tensor was smuggled out of the segment beside its result.
    TypeError
        If an input or the result is no Tensor.

    Notes
    -----
    The paths of the layers inside are what they would be without the wrapper, which has no name of its
    own: ``net.body = nn.Recompute(net.body)`` changes no path, no ``state_dict()`` and no selection of
    :func:`lance_ref.tune`; ``get_submodule("body")`` is the segment.

    The state of a random generator, of which one copy is kept for each that the segment draws from, is a
    few numbers, and is not on the tape; nor is the list of the operations of the first run. Hooks on
    modules inside are called in both runs. A segment that keeps counters of its own in plain attributes
    counts both runs.

    In a trace the segment is one record, op ``"recompute"``; its attribute ``records`` holds those of the
    operations inside, nested segments likewise. The multiply-adds of a second run are booked under the kind
    ``"recompute"``, for the layers that spend them.

    Examples
    --------
    >>> import numpy as np
    >>> from lance_ref import Tensor, nn, tape
    >>> block = nn.Sequential(nn.Linear(8, 8, rng=0), nn.Tanh(), nn.Linear(8, 8, rng=1), nn.Tanh())
    >>> x = Tensor(np.ones((4, 8), np.float32))
    >>> tape(block(x)).total_bytes, tape(nn.Recompute(block)(x)).total_bytes  # 3 and 1 times 4·8·4 bytes
    (384, 128)
    """

    def __init__(self, segment: Module) -> None:
        super().__init__()
        if not isinstance(segment, Module):
            raise TypeError(f"Recompute: segment is a {type(segment).__name__}, expected a Module")
        self.segment = segment

    def forward(self, *inputs: Tensor) -> Tensor:
        if not inputs:
            raise TypeError("Recompute: called without inputs, expected at least one Tensor")
        for position, value in enumerate(inputs):
            if not isinstance(value, Tensor):
                raise TypeError(f"Recompute: input {position} is a {type(value).__name__}, expected a Tensor")
        return _first_run(self.segment, inputs)

    def named_modules(self, prefix: str = "", _seen: set[int] | None = None) -> Iterator[tuple[str, Module]]:
        """(path, module) for this module, the segment under the same path, and all below it."""
        seen = set() if _seen is None else _seen
        if id(self) not in seen:
            seen.add(id(self))
            yield prefix, self
            yield from self.segment.named_modules(prefix, seen)

    def _named(self) -> Module:
        return self.segment._named()


class Segmented(Sequential):
    """Segments one after the other, whose children keep the names that they had in one Sequential."""

    def named_modules(self, prefix: str = "", _seen: set[int] | None = None) -> Iterator[tuple[str, Module]]:
        seen = set() if _seen is None else _seen
        if id(self) not in seen:
            seen.add(id(self))
            yield prefix, self
            for segment in self._modules.values():
                yield from segment.named_modules(prefix, seen)

    def _child(self, name: str) -> Module | None:
        found = (segment._named()._child(name) for segment in self._modules.values())
        return next((child for child in found if child is not None), None)


def checkpoint_sequential(net: Sequential, segments: int) -> Sequential:
    """The same modules one after the other, in ``segments`` stretches that are recomputed.

    The stretches, from 1 to the number of children, are as long as each other, the first ones longer by one where that
    does not come out even. ``net`` is left as it is; the result is a Sequential of :class:`Recompute` modules with the
    same children, whose paths do not change. Indices and iteration are over the stretches.

    Notes
    -----
    With n layers of equal activations, √n segments keep O(√n) of them: √n inputs between forward and
    backward, and the tape of one segment during backward (Chen et al. 2016, section 4.2). PyTorch's function of
    this name leaves the last stretch on the tape; here it is recomputed like the others.

    Examples
    --------
    >>> from lance_ref import nn
    >>> net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    >>> grouped = checkpoint_sequential(net, 2)
    >>> len(grouped), [path for path, module in grouped.named_modules() if isinstance(module, nn.Linear)]
    (2, ['0', '1', '2', '3', '4'])
    """
    if not isinstance(net, Sequential):
        raise TypeError(f"checkpoint_sequential: net is a {type(net).__name__}, expected a Sequential")
    children = list(net._modules.items())
    if isinstance(segments, bool) or not isinstance(segments, int) or not 1 <= segments <= len(children):
        raise ValueError(
            f"checkpoint_sequential: segments is {segments!r}, expected an integer from 1 to {len(children)}, "
            "the number of children"
        )
    length, longer = divmod(len(children), segments)
    starts = [i * length + min(i, longer) for i in range(segments + 1)]
    stretches = [children[start:stop] for start, stop in itertools.pairwise(starts)]
    return Segmented(*(Recompute(Sequential(OrderedDict(stretch))) for stretch in stretches))


class Rerun(Function):
    """The node of a segment: its inputs, the versions of its parameters, and what it takes to run it again."""

    op = "recompute"

    @staticmethod
    def second_run(ctx: Any) -> Node:
        """Run the segment again, on the tape: its last node, linked to the nodes that made the inputs."""
        repeated = Recorder({})
        with _as_in_the_first_run(ctx, repeated), spending_on("recompute"):
            output = ctx.segment(*_linked_inputs(ctx))
        if not isinstance(output, Tensor) or output._node is None or _outline(repeated.records) != ctx.outline:
            raise RuntimeError(
                f"Recompute in {ctx.path or 'the root module'}: the second run of the segment was not a repetition of "
                "the first; forward() must do the same at each call, and may not be changed before backward()"
            )
        if ctx.records is not None:
            ctx.records[:] = _with_attributes_of(repeated.records, ctx.records)
        return output._node


def _first_run(segment: Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The segment's result, with one node behind it that can run the segment again."""
    listening = state.recorder
    outer, own = state.segment, Segment(inputs)
    recorder = listening or Recorder({})
    previous_recorder, state.recorder = state.recorder, recorder
    state.segment = outer or own  # inside a segment that keeps nothing, neither does this one
    try:
        with recorder.aside() as records:
            output = segment(*inputs)
    finally:
        state.recorder, state.segment = previous_recorder, outer
    if not isinstance(output, Tensor):
        raise TypeError(f"Recompute: the segment returned a {type(output).__name__}, expected a Tensor")
    result = recorder.value(output)
    if not any(record.output.id == result.id for record in records):  # an input, handed through
        recorder.records += records
        return output
    values = tuple(recorder.value(x) for x in inputs)
    recorder.records.append(OpRecord(Rerun.op, state.path, values, result, {"records": records}))
    if output.requires_grad and outer is None and not output.is_meta:
        output._node = _node(segment, own, records, keep_records=listening is not None)
    return output


def _node(segment: Module, own: Segment, records: list[OpRecord], keep_records: bool) -> Node:
    """The node of a segment that has run."""
    node: Any = Node(Rerun, own.inputs, requires_grad=True)
    for position in range(len(own.inputs)):
        node.save_input("segment input" if len(own.inputs) == 1 else f"segment input {position}", position)
    names = {parameter.uid: name for name, parameter in segment.named_parameters()}
    for uid, leaf in own.leaves.items():
        node.saved[names.get(uid, f"parameter {uid}")] = Saved(leaf.data, leaf._version, is_parameter=True)
    node.segment, node.draws, node.paths = segment, own.draws, state.module_paths
    node.modes = [(module, module.training) for module in segment.modules()]
    node.outline, node.records = _outline(records), records if keep_records else None
    node._inputs = None
    return node


def _linked_inputs(ctx: Node) -> list[Tensor]:
    """The kept inputs as tensors; those that need gradients hang on the nodes that made them."""
    inputs = []
    for edge, saved in zip(ctx.edges, list(ctx.saved.values())[: len(ctx.edges)], strict=True):
        if isinstance(edge, Tensor):
            inputs.append(edge)
            continue
        tensor = Tensor(saved.array)
        if saved.version is not None:
            tensor._version = saved.version
        if edge is not None:
            tensor._node, tensor.requires_grad = edge, True
        inputs.append(tensor)
    return inputs


@contextmanager
def _as_in_the_first_run(ctx: Any, recorder: Recorder) -> Iterator[None]:
    """Paths, modes and random numbers of the first run; buffers are put back at the end, and all the rest too."""
    before = (state.recorder, state.segment, state.grad_enabled, state.module_paths, state.path)
    modes = [(module, module.training) for module, _ in ctx.modes]
    buffers = [(m, name, array, array.copy()) for m, _ in ctx.modes for name, array in m._buffers.items()]
    state.recorder, state.segment, state.grad_enabled = recorder, None, True
    state.module_paths, state.path = ctx.paths, ctx.path
    try:
        for module, mode in ctx.modes:
            module.training = mode
        with ctx.draws.again():
            yield
    finally:
        state.recorder, state.segment, state.grad_enabled, state.module_paths, state.path = before
        for module, mode in modes:
            module.training = mode
        for module, name, array, copy in buffers:
            array[...] = copy
            module._buffers[name] = array


def _outline(records: Sequence[OpRecord]) -> list[tuple[Any, ...]]:
    """What two runs of a segment must have in common, its values aside."""
    return [
        (r.op, r.path, r.output.shape, r.output.dtype, r.output.requires_grad, _fixed_attributes(r)) for r in records
    ]


def _fixed_attributes(record: OpRecord) -> dict[str, Any]:
    """The attributes without what a step finds out anew: ranks of a store, and what nested segments did."""
    return {name: value for name, value in record.attributes.items() if name not in ("store", "records")}


def _with_attributes_of(repeated: Sequence[OpRecord], records: Sequence[OpRecord]) -> list[OpRecord]:
    """The records of the first run with the attributes of the second, in which the stores have saved."""
    merged = []
    for second, first in zip(repeated, records, strict=True):
        if first.op == Rerun.op:  # the nested node will go on to update the list of the second run
            nested = second.attributes["records"]
            nested[:] = _with_attributes_of(nested, first.attributes["records"])
        merged.append(replace(first, attributes=second.attributes))
    return merged
