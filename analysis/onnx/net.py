"""An ONNX file as a network of the library: it is traced, tuned, compressed, trained and measured like any other.

``OnnxNet("model.onnx")`` has one module for each convolution, linear layer and normalisation of the file, under
PyTorch's name where the exporter kept it, and one for each other operation. Its ``forward`` walks the graph. What
the file computes with shapes alone is evaluated on the way (:mod:`analysis.onnx.host`).
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from analysis.commands.memory import check_memory
from analysis.commands.names import plain
from analysis.onnx.choosing import evaluate_plain, is_plain
from analysis.onnx.constants import EXPECTED, LITERAL, MAX_FOLDED, at, folded, put_together, told_apart, weight_or_array
from analysis.onnx.file import Graph, Node, read_graph
from analysis.onnx.host import HOST, RANDOM, evaluate
from analysis.onnx.layers import LAYERS, Weight, as_weight, layer_for, plan_for
from analysis.onnx.ops import over_all_of_an_input, tensor_ops
from analysis.onnx.patterns import simplify
from analysis.onnx.recurrent import ORDER as RECURRENT
from analysis.onnx.recurrent import layer as recurrent_layer
from analysis.onnx.stages import stages
from analysis.onnx.telling import ATTENTION, FACTORS, left_frozen, untold
from analysis.onnx.tensor import shown
from lance_ref import functional as F
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module, Parameter
from lance_ref.nn.tracing import record

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
"""Operations whose first two inputs are multiplied."""


class Operation(Module):
    """One operation that is no layer.

    Attributes
    ----------
    stored_weights : tuple of Parameter
        That it multiplies with: :func:`lance_ref.tune` must not pass over them.
    """

    def __init__(self, node: Node, stored_weights: Sequence[Parameter] = ()) -> None:
        super().__init__()
        self.node, self.stored_weights = node, tuple(stored_weights)

    def forward(self, operands: Sequence[Any]) -> Any:
        return tensor_ops()[self.node.op](self.node, operands)

    def extra_repr(self) -> str:
        return self.node.op


class OnnxNet(Module):
    """The network in an ONNX file; ``remark`` is what the cost model says beneath its tables, empty for most.

    Without weights the parameters have shapes alone, which is enough for a trace, and files with the values need not be
    there. Raises ValueError, in one line, for what :func:`analysis.onnx.file.read_graph` refuses, operations without a
    rule, all of them named, or a node that does not fit.

    Notes
    -----
    A layer that stands in the graph twice, with the same weights, is one module that is called twice. Dropout is that
    of training. A Softmax or LogSoftmax over the classes at the end is left out in training, because the loss,
    cross-entropy, has one of its own; with ``eval()`` the network gives what the file says. A file that is fixed to one
    batch size runs on others as long as every value grows with the batch; if one does not, that is an error.
    """

    def __init__(self, file: str | os.PathLike[str], with_weights: bool = True) -> None:
        super().__init__()
        graph = read_graph(file)
        check_operations(graph)
        self.graph = graph
        self._with_weights = with_weights
        self._constants: dict[str, Any] = {}  # arrays, and weights that are not turned into parameters yet
        self._steps: list[tuple[Node, Module | None]] = []  # None: shape arithmetic
        self._fitting = {self._declared_batch}
        if with_weights:
            stored = sum(constant.size * constant.dtype.itemsize for constant in graph.constants.values())
            check_memory(stored, f"the weights of {shown(graph.file)}")
        for name, constant in graph.constants.items():
            self._constants[name] = weight_or_array(graph, name, constant)
        self._names: Counter[str] = Counter()
        self._made_by: dict[str, Node] = {}
        self._folded_elements = 0
        layers: dict[Any, Module] = {}
        given = {value.name for value in graph.inputs}
        self._live = set(given)  # values that depend on an input, and not on its shape alone
        self._tensors = set(given)  # those, and what is computed from parameters
        nodes = put_together([node for node in graph.nodes if not self._fold(node)], self._constants, self._live, graph)
        nodes = [self._as_pytorch_has_it(node) for node in simplify(nodes, self._constants, graph.outputs)]
        nodes = told_apart(nodes, self._constants)
        for node in nodes:
            self._made_by.update(dict.fromkeys(node.outputs, node))
            with at(graph, node):
                plan_for(node, self._constants)  # layers claim their weights before other operations read them
        for node in nodes:
            with at(graph, node):
                self._add(node, layers)
        self._normalising = _last_softmax(nodes, graph)
        self._untold = [*untold(nodes, self._constants, graph.outputs), *left_frozen(self._stored_factors())]
        self.batch_statistics = any(
            n.op == "BatchNormalization" and n.attributes.get("training_mode", 0) for n in nodes
        )
        self._left_out = False
        self._scores_again: dict[str, int] = {}  # multiply-adds of each attention's scores, in the last pass
        for output in graph.outputs:
            if output not in self._live:
                raise ValueError(f"{shown(graph.file)}: its output {shown(output)} does not depend on its input")

    @property
    def _declared_batch(self) -> int | None:
        shape = self.graph.input_shape
        return shape[0] if shape else None

    @property
    def remark(self) -> str:
        """What the file may lack, what was read otherwise than it stands there, and what of it was left out."""
        remarks = [*self._untold]
        if any(node.op == ATTENTION for node, _ in self._steps):
            again = 2 * sum(self._scores_again.values())
            remarks.append(
                "attention: as PyTorch's kernel for the CPU keeps it; there its backward pass computes the scores once "
                f"more, {again:,} FLOPs that are not counted here"
            )
        if self._left_out:
            ops = " and ".join(node.op for node in self._normalising)
            remarks.append(f"the {ops} at the end of this file is left out: the loss, cross-entropy, has its own")
        return "; ".join(remarks)

    @property
    def file_only(self) -> bool:
        """Whether the file may lack what the network keeps, so that an account is that of the file alone."""
        return bool(self._untold)

    # ---- building ----------------------------------------------------------------------

    def _fold(self, node: Node) -> bool:
        """Whether a node computes with constants alone, and its outputs are now constants as well."""
        if node.op in RANDOM or not all(name in self._constants for name in node.inputs if name):
            return False
        with at(self.graph, node):
            found = folded(node, [self._constants[name] if name else None for name in node.inputs])
        if found is not None:
            self._folded_elements += sum(np.size(array) for array in found if isinstance(array, np.ndarray))
            if self._folded_elements > MAX_FOLDED:
                raise ValueError(
                    f"{shown(self.graph.file)}: arrays of more than {MAX_FOLDED} elements computed beforehand"
                )
            self._constants.update(zip(node.outputs, found, strict=False))
        return found is not None

    def _add(self, node: Node, layers: dict[Any, Module]) -> None:
        """Make a node a step."""
        if node.op in LITERAL:
            for name in node.inputs[1 if node.op not in RANDOM else 0 :]:
                weight = self._constants.get(name)
                if isinstance(weight, Weight):
                    self._constants[name] = np.asarray(weight.constant.load())
        of_a_shape = node.op in ("Shape", "Size")
        names = [] if of_a_shape else [name for name in node.inputs if name]
        if any(name in self._live for name in names):
            self._live.update(filter(None, node.outputs))
        module: Module | None = None
        if any(name in self._tensors or isinstance(self._constants.get(name), Weight) for name in names):
            made = layer_for(node, self._constants, self._with_weights, layers)
            if node.op in RECURRENT:
                module, node = self._recurrent(node)
            elif made is None:
                module = operation = self._operation(node)
                node = operation.node
            else:
                module, node = made.layer, self._reading(node, made.reads)
                if made.key not in layers:
                    layers[made.key] = module
                    self.add_module(self._name(made.path or node.scope, node, bool(made.path)), module)
            self._tensors.update(filter(None, node.outputs))
        self._steps.append((node, module))

    def _recurrent(self, node: Node) -> tuple[Module, Node]:
        """An LSTM or GRU, and its node without the weights."""
        stored = [as_weight(self._constants.get(name), name) if name else None for name in node.inputs]
        weights = [None, *(w if isinstance(w, Weight) else None for w in stored[1:4]), *stored[4:5]]
        if any(name and weight is None for name, weight in zip(node.inputs[1:4], weights[1:], strict=False)):
            raise ValueError("its weights are not stored in the file")
        weights += [name or None for name in node.inputs[5:8]]
        module = recurrent_layer(node, weights, self._with_weights)
        self.add_module(self._name(node.scope, node, False), module)
        return module, replace(node, inputs=(node.inputs[0], *node.inputs[5:7]))

    def _operation(self, node: Node) -> Operation:
        """A node that is no layer."""
        if node.op not in tensor_ops():
            raise ValueError("no cost rule for this operation on weights alone")
        for position, option in enumerate(("transA", "transB")):
            weight = self._constants.get(node.inputs[position]) if node.op == "Gemm" else None
            if isinstance(weight, Weight) and node.attributes.get(option, 0):  # as another look at it
                turned = f"{node.inputs[position]}/turned"
                self._constants[turned] = weight.permuted((1, 0))
                inputs = (*node.inputs[:position], turned, *node.inputs[position + 1 :])
                node = replace(node, inputs=inputs, attributes={**node.attributes, option: 0})
        behind = self._behind(node.inputs[:2]) if node.op in PRODUCTS else []
        multiplied = [self._parameter(name) for name in behind]
        operation = Operation(self._reading(node, node.inputs), [p for p in multiplied if p is not None])
        self.add_module(self._name(node.scope, node, False), operation)
        return operation

    def _as_pytorch_has_it(self, node: Node) -> Node:
        """An InstanceNormalization whose ones and zeros no parameter of the file has stands for one without weights."""
        if node.op != "InstanceNormalization" or any(name in self.graph.constants for name in node.inputs[1:3]):
            return node
        values = [self._constants.get(name) for name in node.inputs[1:3]]
        plain = all(isinstance(v, np.ndarray) and (v == n).all() for v, n in zip(values, (1, 0), strict=True))
        return replace(node, attributes={**node.attributes, "plain": True}) if plain else node

    def _stored_factors(self) -> set[str]:
        """Stored arrays of no layer, with which values are multiplied, or that are added to scores of attention."""
        found: set[str] = set()
        for node, module in self._steps:
            if isinstance(module, Operation) and node.op in FACTORS:
                found.update(self._behind(node.inputs[slice(*FACTORS[node.op])]))
        return found

    def _behind(self, names: Iterable[str]) -> list[str]:
        """The stored weights that values are, or that they are computed from without the input."""
        found: dict[str, None] = {}
        seen, waiting = set(self._live), list(names)
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            if isinstance(self._constants.get(name), Weight):
                found[name] = None
            elif name in self._made_by and self._made_by[name].op not in ("Shape", "Size"):
                waiting += self._made_by[name].inputs
        return list(found)

    def _reading(self, node: Node, inputs: Sequence[str]) -> Node:
        """The node with these inputs; weights among them that no layer has become parameters of their own names."""
        for name in inputs:
            self._parameter(name)
        return replace(node, inputs=tuple(inputs))

    def _parameter(self, name: str) -> Parameter | None:
        """The parameter of a weight; None for anything else."""
        weight = self._constants.get(name)
        if not isinstance(weight, Weight):
            return None
        free = weight.root.owner is None
        parameter = (weight.root.owner or weight).make_parameter(self._with_weights)
        if free:
            self._parameters[self._unique(name)] = parameter
        return parameter

    def _name(self, path: str, node: Node, whole: bool) -> str:
        if not whole:
            path = f"{path}.{node.op.lower()}" if path else node.op.lower()
        return self._unique(path)

    def _unique(self, name: str) -> str:
        """A name that is fit for a table, unlike those before it and those that every module has."""
        name = re.sub(r"[^\w.:/-]+", "_", name)[:100].strip(".") or "onnx"
        if name in self.__dict__ or hasattr(type(self), name):
            name = f"onnx.{name}"
        self._names[name] += 1
        while self._names[name] > 1:
            name = f"{name}-{self._names[name]}"
            self._names[name] += 1
        return name

    def get_submodule(self, path: str) -> Module:
        """The module of a path, which may have dots in its own name."""
        return self._modules[path] if path in self._modules else super().get_submodule(path)

    def set_submodule(self, path: str, module: Module) -> None:
        """Put another module in the place of one of this network's own, whatever steps run it."""
        old = self.get_submodule(path)
        self._modules[path] = module
        self._steps = [(node, module if each is old else each) for node, each in self._steps]

    # ---- running -----------------------------------------------------------------------

    @property
    def input_dtype(self) -> np.dtype:
        """Of the first input: the network's own for every floating type."""
        dtype = self.graph.inputs[0].dtype
        return self._dtype if dtype.kind == "f" else dtype

    @property
    def _dtype(self) -> np.dtype:
        return next((p.dtype for p in self.parameters()), np.dtype(np.float32))

    def inputs_beside(self, x: Tensor) -> list[Tensor]:
        """Ones in place of the other inputs, in the shapes that the file declares: its own batch is that of ``x``.

        Raises ValueError for a size that the file leaves open and that no size of ``x`` tells.
        """
        first = self.graph.inputs[0]
        known = {name: n for name, n in zip(first.open, x.shape, strict=False) if name}
        made = []
        for value in self.graph.inputs[1:]:
            sizes = list(value.shape or ())
            for i, n in enumerate(sizes):
                if i == 0 and (n is None or n == self._declared_batch):
                    sizes[i] = x.shape[0]
                elif n is None:
                    sizes[i] = known.get(value.open[i])
            if value.shape is None or None in sizes:
                raise ValueError(f"input {shown(value.name)} has open sizes, expected sizes that the first input tells")
            dtype = self._dtype if value.dtype.kind == "f" else value.dtype
            shape = tuple(int(n) for n in sizes if n is not None)
            made.append(Tensor.meta(shape, dtype) if x.is_meta else Tensor(np.ones(shape, dtype)))
        return made

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        """The output, or a list of several; inputs that are not given are ones (:meth:`inputs_beside`)."""
        if x.ndim == 0 or (self.graph.input_shape is not None and x.ndim != len(self.graph.input_shape)):
            raise ValueError(f"x has shape {x.shape}, expected {len(self.graph.input_shape or ())} dimensions")
        names = [value.name for value in self.graph.inputs]
        if others and len(others) != len(names) - 1:
            raise ValueError(
                f"{1 + len(others)} inputs are given, expected {len(names)}: {', '.join(map(shown, names))}"
            )
        for value, tensor in zip(self.graph.inputs, (x, *others), strict=False):
            if (tensor.dtype.kind == "f") != (value.dtype.kind == "f"):
                raise TypeError(f"input {shown(value.name)} has dtype {tensor.dtype}, expected {value.dtype}")
        self.__dict__["_seen"] = x.shape
        given = [x, *(others or self.inputs_beside(x))]
        declared = self._declared_batch
        if declared is None or x.shape[0] == declared:
            return self._walk(given)
        try:
            sizes: dict[str, int] | None = {}
            if x.shape[0] not in self._fitting:
                with record():  # aside: these operations are not the network's own
                    alone = Tensor.meta((declared, *x.shape[1:]), x.dtype)
                    self._walk([alone, *self.inputs_beside(alone)], sizes=sizes, quietly=True)
            else:
                sizes = None
            result = self._walk(given, expected=sizes)
        except EXPECTED as error:
            raise ValueError(
                f"{error}; the file is made for a batch of {declared}: export it with a dynamic batch, or ask for that"
            ) from None
        self._fitting.add(x.shape[0])
        return result

    def _walk(
        self,
        given: Sequence[Tensor],
        expected: Mapping[str, int] | None = None,
        sizes: dict[str, int] | None = None,
        quietly: bool = False,
    ) -> Any:
        """Run the graph.

        ``sizes`` takes the number of elements of every value; ``expected`` are those of the batch that the file
        is made for, which must have grown with the batch. Quietly: past the hooks of the modules, and
        no remark changes.
        """
        values: dict[str, Any] = {value.name: x for value, x in zip(self.graph.inputs, given, strict=True)}
        self.run_steps(values, range(len(self._steps)), given[0].shape[0], expected, sizes, quietly)
        missing = [name for name in self.graph.outputs if name not in values]
        if missing:
            raise ValueError(f"{shown(self.graph.file)}: output {shown(missing[0])} is one that is not computed here")
        found = [values[name] for name in self.graph.outputs]
        return found if len(found) > 1 else found[0]

    def run_steps(
        self,
        values: dict[str, Any],
        steps: range,
        batch: int,
        expected: Mapping[str, int] | None = None,
        sizes: dict[str, int] | None = None,
        quietly: bool = False,
    ) -> None:
        """Run some steps of the graph on ``values``, by name: results are added, and what no later step reads goes."""
        last_use = self._last_use()
        left_out: list[Node] = []
        for i in steps:
            node, module = self._steps[i]
            with at(self.graph, node):
                operands = self._with_batch(node, [self._operand(name, values) for name in node.inputs], batch)
                if node.op == ATTENTION and not quietly:
                    self._scores_again[node.outputs[0]] = operands[0].size * operands[1].shape[-1]
                if module is None:
                    results: Any = evaluate(node, operands)
                elif is_plain(node, operands):
                    results = evaluate_plain(node, operands, self._dtype)
                elif self.training and self._is_of_the_loss(node, operands[0], left_out):
                    left_out.append(node)
                    results = operands[0]
                elif isinstance(module, Operation):
                    results = module.forward(operands) if quietly else module(operands)
                else:
                    results = module.forward(*operands) if quietly else module(*operands)
                for name, value in zip(node.outputs, results if isinstance(results, list) else [results], strict=False):
                    values[name] = value
                    self._compare(name, value, batch, expected, sizes)
            for name in last_use[i]:
                values.pop(name, None)
        if steps.stop == len(self._steps) and not quietly:
            self._left_out = bool(left_out)

    def stages(self) -> list[Module]:
        """Modules whose composition is this network: see :func:`analysis.onnx.stages.stages`."""
        return stages(self)

    @property
    def known_shape(self) -> tuple[int, ...] | None:
        """A shape that the input may have: the one that the file declares, or that of the last run; None if open."""
        seen, declared = self.__dict__.get("_seen"), self.graph.input_shape
        if declared is None or None in declared[1:]:
            return seen
        return (7 if declared[0] is None else int(declared[0]), *(int(n) for n in declared[1:] if n is not None))

    def modules_by_step(self) -> list[Module | None]:
        """By step: the layer or operation with parameters that it runs, if there is one."""
        return [module for _, module in self._steps]

    def _is_of_the_loss(self, node: Node, x: Any, left_out: Sequence[Node]) -> bool:
        """Whether a node makes probabilities, or their logarithms, of the scores that cross-entropy takes."""
        if not any(node.outputs == each.outputs for each in self._normalising):
            return False
        return bool(left_out) if node.op == "Log" else over_all_of_an_input(node, x.shape)

    def _operand(self, name: str, values: Mapping[str, Any]) -> Any:
        if not name:
            return None
        value = values[name] if name in values else self._constants.get(name)
        return value.tensor(self._with_weights) if isinstance(value, Weight) else value

    def _last_use(self) -> list[list[str]]:
        """For each step, the values that no later one reads; found once."""
        if "_last_uses" not in self.__dict__:
            last = {name: i for i, (node, _) in enumerate(self._steps) for name in (*node.inputs, *node.outputs)}
            for output in self.graph.outputs:
                last.pop(output, None)
            uses: list[list[str]] = [[] for _ in self._steps]
            for name, i in last.items():
                uses[i].append(name)
            self.__dict__["_last_uses"] = uses
        found: list[list[str]] = self.__dict__["_last_uses"]
        return found

    def _with_batch(self, node: Node, operands: list[Any], batch: int) -> list[Any]:
        """Where the file has its own batch written out, that of the input in its place."""
        declared = self._declared_batch
        if declared is None or declared == batch:
            return operands
        if node.op in RANDOM and operands[0].ndim and operands[0].shape[0] == declared:
            return [np.zeros((batch, *operands[0].shape[1:]), operands[0].dtype), *operands[1:]]
        if node.op == "Reshape" and len(operands) > 1 and isinstance(operands[1], np.ndarray) and operands[1].size:
            shape = operands[1].copy()
            if node.inputs[0] in self._live and shape[0] == declared and operands[0].shape[0] == batch:
                shape[0] = batch
            return [operands[0], shape]
        if node.op == "Concat" and node.attributes.get("axis", 0) != 0 and declared == 1:
            return [
                F.expand(x, (batch, *x.shape[1:]))
                if isinstance(x, Tensor) and name not in self._live and x.shape[0] == 1
                else x
                for x, name in zip(operands, node.inputs, strict=True)
            ]
        return operands

    def _compare(
        self, name: str, value: Any, batch: int, expected: Mapping[str, int] | None, sizes: dict[str, int] | None
    ) -> None:
        if name not in self._live or not hasattr(value, "shape"):
            return
        size = math.prod(value.shape)
        if sizes is not None:
            sizes[name] = size
        if expected is not None and size * (self._declared_batch or 1) != expected[name] * batch:
            raise ValueError(f"its result of shape {tuple(value.shape)} has not grown with the batch of {batch}")


def _last_softmax(nodes: Sequence[Node], graph: Graph) -> list[Node]:
    """The Softmax or LogSoftmax behind which the graph only looks at its result otherwise; with the Log behind it."""
    maker = {name: node for node in nodes for name in node.outputs}
    reads = Counter(name for node in nodes for name in node.inputs)
    if len(graph.outputs) > 1:
        return []
    (name,) = graph.outputs
    behind: list[Node] = []
    while name in maker and reads[name] == (name not in graph.outputs):
        node = maker[name]
        if node.op in ("Softmax", "LogSoftmax"):
            return [node, *behind]
        if node.op not in ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Log") or behind:
            return []
        behind = [node] if node.op == "Log" else []
        name = node.inputs[0]
    return []


def check_operations(graph: Graph) -> None:
    """Raise ValueError that names every operation without a rule."""
    live, missing = {value.name for value in graph.inputs}, set()
    for node in graph.nodes:
        depends = node.op not in ("Shape", "Size") and any(name in live for name in node.inputs)
        if depends:
            live.update(filter(None, node.outputs))
        if node.op not in {*tensor_ops(), *LAYERS, *RECURRENT} and (depends or node.op not in HOST):
            missing.add(node.op)
    if missing:
        names = ", ".join(plain(name) for name in sorted(missing)[:50])
        raise ValueError(f"{shown(graph.file)}: no cost rule for {names}; there are rules for {known_operations()}")


def known_operations() -> str:
    """Names of the operations that an input may go through."""
    return ", ".join(sorted(op for op in {*tensor_ops(), *LAYERS, *RECURRENT} if not op.startswith("torch.")))
