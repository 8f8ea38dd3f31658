"""Reverse-mode automatic differentiation on NumPy arrays, with a tape one can read.

A :class:`~lance_ref.engine.tensor.Tensor` is an array that may remember how it was made. Each differentiable
operation is a :class:`Function`: its ``forward`` computes the result and *names* every
array that it keeps for later, its ``backward`` turns the gradient of the result into
gradients of the inputs. One :class:`Node` per executed function holds those named arrays;
the nodes, linked from result to inputs, are the tape.

A node never holds its input tensors: an array lives on the tape if, and only if,
``forward`` saved it. That is what makes the byte counts of :func:`lance_ref.tape` true.

The same functions run on shapes alone: a tensor without data ("meta" tensor) flows
through ``output_shape`` instead of ``forward``. See :mod:`lance_ref.nn.tracing`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from lance_ref.engine.ownership import alone, has_own_memory, lie_alike
from lance_ref.engine.random import Draws
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Shape, Tensor, Version

_sequence = itertools.count()


@contextmanager
def no_grad() -> Iterator[None]:
    """Inside the ``with`` block no operation is put on the tape."""
    previous, state.grad_enabled = state.grad_enabled, False
    try:
        yield
    finally:
        state.grad_enabled = previous


class Function:
    """One differentiable operation: subclass it, and call :meth:`apply`.

    Attributes
    ----------
    op : str
        The operation's name in tape reports, traces and cost rules.
    returns_view : bool
        Whether the result may share the first input's buffer.
    """

    op: ClassVar[str]
    returns_view: ClassVar[bool] = False

    @staticmethod
    def output_shape(*inputs: Tensor, **attributes: Any) -> Shape:
        """Check the inputs and give the result's shape, from shapes and dtypes alone.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what came, and what was expected.
        """
        raise NotImplementedError

    @staticmethod
    def forward(ctx: Node, *inputs: np.ndarray, **attributes: Any) -> np.ndarray:
        """Compute the result; save by name, on ``ctx``, what ``backward`` will need."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Node, grad_output: np.ndarray) -> tuple[np.ndarray | None, ...]:
        """Gradients of the inputs, in order; None where ``ctx.needs_input_grad`` is False."""
        raise NotImplementedError

    @staticmethod
    def second_run(ctx: Node) -> Node | None:
        """For operations that stand for a stretch of others: run these, on the tape; gives the last one's node.

        The backward pass then goes on through the nodes of that run in place of :meth:`backward`.
        """
        return None

    @classmethod
    def apply(cls, *inputs: Tensor, **attributes: Any) -> Tensor:
        """Check, compute, and, where an input requires gradients, put a node on the tape."""
        dtype = _common_dtype(cls.op, inputs)
        shape = cls.output_shape(*inputs, **attributes)
        requires_grad = is_meta = False
        for tensor in inputs:
            requires_grad |= tensor.requires_grad
            is_meta |= tensor.is_meta
        requires_grad &= state.grad_enabled
        segment, deferral = state.segment, state.deferral
        if segment is not None:
            segment.read(inputs)
        elif deferral is not None and not requires_grad and state.recorder is None:
            postponed: Tensor | None = deferral.take(cls, inputs, attributes, shape)
            if postponed is not None:
                return postponed
        if is_meta:
            output = Tensor.meta(shape, dtype, requires_grad)
        else:
            node = Node(cls, inputs, requires_grad and segment is None)
            data = cls.forward(node, *[tensor.data for tensor in inputs], **attributes)
            if data.shape != shape or data.dtype != dtype:
                raise AssertionError(f"{cls.op}: forward gave {data.shape} {data.dtype}, expected {shape} {dtype}")
            # A view shares its version too: writing into one of the two spoils what the tape saved of either.
            output = Tensor.of(data, inputs[0]._version if cls.returns_view else None)
            if cls.returns_view:
                output.of_parameter = inputs[0].of_parameter and np.may_share_memory(data, inputs[0].data)
            if requires_grad:
                # From here on the tape holds what forward saved by name, and no input.
                node.close(output)
                output._node = node if segment is None else segment.dropped
                output.requires_grad = True
        if state.recorder is not None:
            state.recorder.add(cls.op, inputs, attributes, output)
        return output


def _common_dtype(op: str, inputs: tuple[Tensor, ...]) -> np.dtype:
    """The floating dtype that all inputs share (integer inputs, such as labels, aside)."""
    common: np.dtype | None = None
    for tensor in inputs:
        dtype = tensor._dtype
        if dtype is common or dtype.kind != "f":
            continue
        if common is None:
            common = dtype
        elif dtype != common:
            raise TypeError(
                f"{op}: inputs have dtypes {[str(t.dtype) for t in inputs]}, expected one floating dtype; "
                "convert explicitly: the data with x.astype(np.float32), or the module with module.to(dtype)"
            )
    if common is None:
        raise TypeError(f"{op}: inputs have dtypes {[str(t.dtype) for t in inputs]}, expected float32 or float64")
    return common


class _Dropped(Function):
    """What ran inside a segment and was not kept."""

    op = "recompute"


class Segment:
    """A stretch of computation that keeps nothing on its first run, because backward will run it again.

    Attributes
    ----------
    inputs : tuple of Tensor
        What it starts from.
    leaves : dict of int to Tensor
        Parameters that it reads, by uid: unchanged, they give the second run the values of the first.
    draws : Draws
        Random generators that it draws from.
    dropped : Node
        Stands in the place of the nodes that are not kept.
    """

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = inputs
        self.leaves: dict[int, Tensor] = {}
        self.draws = Draws()
        self.dropped = Node(_Dropped, (), requires_grad=False)
        self.dropped.freed = True
        self.dropped.freed_because = (
            "this tensor was made inside a Recompute, which keeps its result alone; hand it out as the result"
        )

    def read(self, inputs: tuple[Tensor, ...]) -> None:
        """Take note of an operation's inputs.

        Raises
        ------
        RuntimeError
            If one of them carries gradients and came neither from the segment nor through its inputs.
        """
        for tensor in inputs:
            if any(tensor is x for x in self.inputs) or tensor._node is self.dropped:
                continue
            if tensor._node is not None and state.grad_enabled:
                raise RuntimeError(
                    f"Recompute in {state.path or 'the root module'}: a tensor of shape {tensor.shape} that needs "
                    "gradients came from outside of the segment; make it an input of the segment"
                )
            if getattr(tensor, "is_parameter", False) or (tensor.requires_grad and tensor._data is not None):
                self.leaves[tensor.uid] = tensor


class Saved:
    """One array on the tape: a name, the array, and the version of its buffer when it was saved."""

    __slots__ = ("array", "at_version", "is_parameter", "version")

    def __init__(self, array: np.ndarray, version: Version | None, is_parameter: bool) -> None:
        self.array = array
        self.version = version
        self.at_version = version.value if version is not None else 0
        self.is_parameter = is_parameter


class Node:
    """An executed function on the tape; also the ``ctx`` of its forward and backward.

    Attributes
    ----------
    function : type[Function]
        What ran.
    path : str
        Dotted path of the module in which it ran.
    needs_input_grad : tuple of bool
        Which inputs need a gradient.
    saved : dict of str to Saved
        The arrays kept for backward, by name. Nothing else of the inputs is kept.
    edges : tuple
        For each input: the node that made it, the leaf tensor to accumulate into, or None.
    owns_gradient : bool
        While ``backward`` runs: whether nobody else can see the gradient that it was given.
    """

    # What operations add, a geometry for instance, goes to the dict, which the others do without.
    __slots__ = (
        *("__dict__", "__weakref__", "_inputs", "edges", "freed", "function", "input_shapes", "needs_input_grad"),
        *("owns_gradient", "path", "saved", "sequence"),
    )
    freed_because = (
        "the graph was already consumed by a backward(); pass retain_graph=True to the first one to run it twice"
    )

    def __init__(self, function: type[Function], inputs: tuple[Tensor, ...], requires_grad: bool) -> None:
        self.function = function
        self.path = state.path
        self.sequence = next(_sequence)
        self.saved: dict[str, Saved] = {}
        self.freed = self.owns_gradient = False
        self.needs_input_grad: tuple[bool, ...]
        self.edges: tuple[Node | Tensor | None, ...]
        if requires_grad:
            # of lists: a generator takes three times as long
            self.needs_input_grad = tuple([tensor.requires_grad for tensor in inputs])
            self.edges = tuple([(t._node or t) if t.requires_grad else None for t in inputs])
            self.input_shapes = tuple([tensor._shape for tensor in inputs])
            self._inputs: tuple[Tensor, ...] | None = inputs  # only until forward has run
        else:
            self.needs_input_grad = (False,) * len(inputs)
            self.edges = ()
            self._inputs = None

    def save_for_backward(self, **arrays: np.ndarray) -> None:
        """Keep arrays that ``forward`` made, under these names."""
        for name, array in arrays.items():
            self.saved[name] = Saved(array, None, is_parameter=False)

    def save_input(self, name: str, position: int) -> None:
        """Keep the input at ``position`` itself; a later change of its values is then an error."""
        if self._inputs is not None:
            tensor = self._inputs[position]
            self.saved[name] = Saved(tensor.data, tensor._version, tensor.of_parameter)

    def __getitem__(self, name: str) -> np.ndarray:
        """The saved array of that name."""
        return self.saved[name].array

    def close(self, output: Tensor) -> None:
        """Let go of the input tensors: from here on only what was saved stays alive."""
        self._inputs = None
        for saved in self.saved.values():
            if saved.array is output._data:  # a saved result can be written to as well, through a detached tensor
                saved.version = output._version

    def release(self) -> None:
        """Give up the saved arrays and the links to earlier nodes."""
        self.__dict__.clear()
        self.saved, self.edges, self.freed = {}, (), True

    def run_backward(self, seed: np.ndarray, retain_graph: bool) -> None:
        """Carry ``seed``, the gradient of this node's result, back to every leaf."""
        _run_backward(self, seed, retain_graph)

    def reused(self, grad_output: np.ndarray, *others: np.ndarray) -> np.ndarray | None:
        """The gradient that ``backward`` was given, to be written over with one of its shape; None for a new array.

        ``others`` are what that is computed from besides: the result lies in memory as a new one would.
        """
        if not self.owns_gradient:
            return None
        for x in others:
            if x.shape == grad_output.shape and not lie_alike(x, grad_output):
                return None
        return grad_output

    def check_unchanged(self) -> None:
        """Raise if a saved tensor was written to since the forward pass."""
        for name, saved in self.saved.items():
            if saved.version is not None and saved.version.value != saved.at_version:
                kind = "parameter" if saved.is_parameter else "tensor"
                raise RuntimeError(
                    f"{self.function.op} in {self.path or 'the root module'}: the {kind} {name!r} saved for backward "
                    f"was changed after the forward pass ({saved.version.value - saved.at_version} change(s)); "
                    "its gradient would be wrong. Call backward() before changing it"
                )


def _run_backward(root: Node, seed: np.ndarray, retain_graph: bool) -> None:
    """Visit the nodes from the newest to the oldest: a node is always newer than its inputs."""
    pending: dict[int, np.ndarray] = {root.sequence: seed}
    nodes: dict[int, Node] = {root.sequence: root}
    queue = [-root.sequence]
    previous_path = state.path
    try:
        while queue:
            sequence = -heapq.heappop(queue)
            node, grad_output = nodes.pop(sequence), pending.pop(sequence)
            if node.freed:
                raise RuntimeError(f"{node.function.op} in {node.path or 'the root module'}: {node.freed_because}")
            # A saved array that was written to since would give a wrong gradient without a word.
            node.check_unchanged()
            state.path = node.path
            last = node.function.second_run(node)
            if last is not None:  # go on through its nodes, which are newer than all that is pending
                if not retain_graph:
                    node.release()
                pending[last.sequence], nodes[last.sequence] = grad_output, last
                heapq.heappush(queue, -last.sequence)
                del last, grad_output
                continue
            own = node.owns_gradient = alone(grad_output)
            grads = node.function.backward(node, grad_output)
            # The saved arrays go before earlier nodes run, so memory falls during the backward pass.
            edges, shapes = node.edges, node.input_shapes
            if not retain_graph:
                node.release()
            for position, (edge, grad, shape) in enumerate(zip(edges, grads, shapes, strict=True)):
                if edge is None or grad is None:
                    continue
                if grad.shape != shape or grad.dtype != grad_output.dtype:
                    raise AssertionError(
                        f"{node.function.op}: gradient {position} is {grad.shape} {grad.dtype}, "
                        f"expected {shape} {grad_output.dtype}"
                    )
                # The chain rule adds up over all uses of a tensor: in ``.grad`` of a leaf, in ``pending`` of a result.
                if isinstance(edge, Tensor):
                    in_use = (grad is grad_output and not own) or not has_own_memory(grad)
                    shared = in_use or (len(grads) > 1 and sum([grad is g for g in grads]) > 1)
                    edge.accumulate_grad(grad, owned=not shared)
                elif edge.sequence in pending:
                    first = pending.pop(edge.sequence)
                    in_place = alone(first) and lie_alike(first, grad)
                    pending[edge.sequence] = np.add(first, grad, out=first if in_place else None)
                    del first
                else:
                    pending[edge.sequence], nodes[edge.sequence] = grad, edge
                    heapq.heappush(queue, -edge.sequence)
                del grad
            del grads, grad_output, edges
    finally:
        state.path = previous_path
