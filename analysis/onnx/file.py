"""An ONNX file, read without trusting it: nodes in order, constants by shape, values only when asked for.

Nothing of the file is executed. Whatever is wrong with it is said in one line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np

from analysis.onnx.tensor import Constant, read_constant, refuse, shown, text

MAX_FILE_BYTES = 2**31 - 1
"""As protobuf itself; larger weights stand in files beside the model."""

MAX_NODES = 100_000
_NEWER = "pkg.torch.onnx."
_SCOPES = f"{_NEWER}name_scopes"


@dataclass(frozen=True)
class Node:
    """One operation of the graph."""

    op: str  #: ONNX's name; with the domain in front if that is not ONNX's own.
    #: The name in the file, and the dotted path of the module that made it, as far as the file tells.
    name: str
    scope: str
    #: Names of values; "" for an optional one that is absent.
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    #: Numbers, lists of numbers, strings, and tensors as :class:`Constant`.
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 1  #: Version of the operator set.
    anew: bool = False  #: Whether PyTorch's newer exporter wrote it.

    def __str__(self) -> str:
        return f"{self.op} node {shown(self.name or self.outputs[0])}"


@dataclass(frozen=True)
class Input:
    """One input of the graph."""

    name: str
    #: Batch first; None for a size that the file leaves open, and for an unknown rank.
    shape: tuple[int | None, ...] | None
    open: tuple[str, ...]  #: For each size the name that the file gives it; "" for none.
    dtype: np.dtype  #: float32 for every floating type.


@dataclass(frozen=True)
class Graph:
    """A file's graph as far as its outputs depend on it."""

    file: str
    nodes: list[Node]  #: Every node after those that it reads from.
    constants: dict[str, Constant]  #: By name.
    inputs: tuple[Input, ...]  #: Those that are no constants, and that an output depends on.
    outputs: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[int | None, ...] | None:
        """Of the first input."""
        return self.inputs[0].shape


def read_graph(file: str | os.PathLike[str]) -> Graph:
    """Read an ONNX file, without the values that it keeps elsewhere ("external data").

    Those are read only when asked for, and only from regular files in the same folder or below it.

    Raises ValueError, in one line, for no such file, one that is no ONNX, damaged, too large or cyclic, and for a graph
    of other things than tensors.
    """
    path = Path(file)
    model = _parse(path)
    graph = model.graph
    if not graph.node or not graph.output:
        refuse(path, "contains no graph with nodes and an output")
    if graph.sparse_initializer:
        refuse(path, "contains sparse tensors, expected dense ones")
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
    constants = {}
    for tensor in graph.initializer:
        name = text(tensor.name)
        if name in constants:
            refuse(path, f"contains tensor {shown(name)} twice")
        constants[name] = read_constant(path, tensor)
    inputs = [value for value in graph.input if text(value.name) not in constants]
    if not inputs:
        refuse(path, "has no inputs beside its weights, expected at least one")
    nodes = [_node(path, proto, i, opset) for i, proto in enumerate(graph.node)]
    results = tuple(dict.fromkeys(text(value.name) for value in graph.output))
    nodes = _ordered(path, nodes, {*(text(value.name) for value in inputs), *constants}, results)
    read = {name for node in nodes for name in node.inputs}
    used = [value for value in inputs if text(value.name) in read] or inputs[:1]
    return Graph(str(file), nodes, constants, tuple(_input(path, value) for value in used), results)


def input_shape(file: str | os.PathLike[str] | Graph, image_size: int | None = None) -> tuple[int, ...]:
    """Shape of one input as the file has it, without the batch; ``image_size`` replaces height and width of an image.

    Raises ValueError if the file cannot be read or leaves a size open.
    """
    graph = file if isinstance(file, Graph) else read_graph(file)
    declared, file = graph.input_shape, graph.file
    if declared is None:
        raise ValueError(f"{shown(file)}: the rank of its input is unknown, expected an input shape")
    sizes = declared[1:]
    if image_size is not None and len(sizes) == 3:
        sizes = (sizes[0], image_size, image_size)
    known = tuple(n for n in sizes if n is not None)
    if len(known) < len(sizes) or not known:
        sizes_shown = ", ".join("?" if n is None else str(n) for n in declared)
        raise ValueError(f"{shown(file)}: its input has shape ({sizes_shown}), expected an input shape in place of it")
    return known


def _parse(path: Path) -> Any:
    """The file as a protobuf message, its size checked before."""
    if not path.is_file():
        refuse(path, "is not a file" if path.exists() else "does not exist")
    if path.stat().st_size > MAX_FILE_BYTES:
        refuse(path, f"has {path.stat().st_size} bytes, expected at most {MAX_FILE_BYTES}")
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise ValueError(
            f"{shown(path)} needs the package onnx: python -m pip install -e '.[onnx]' in the checkout"
        ) from None
    model = onnx.ModelProto()
    try:
        content = path.read_bytes()
        if count_nodes(content) > MAX_NODES:
            refuse(path, f"has more than {MAX_NODES} nodes")
        model.ParseFromString(content)
    except (DecodeError, RuntimeError, EOFError) as error:
        refuse(path, f"is no ONNX file, or damaged: {' '.join(str(error).split()) or type(error).__name__}")
    except OSError as error:
        refuse(path, f"cannot be read: {error.strerror}")
    return model


def count_nodes(content: bytes) -> int:
    """How many nodes a file's graph has, from the top two levels of its messages; stops beyond ``MAX_NODES``.

    A message of two bytes takes a hundred when it is parsed: so they are counted before.

    Raises EOFError if the file ends in the middle of a field.
    """
    count = 0
    for graph in _fields(content, 0, len(content), 7):  # ModelProto.graph
        for _ in _fields(content, *graph, 1):  # GraphProto.node
            count += 1
            if count > MAX_NODES:
                return count
    return count


def _fields(content: bytes, start: int, stop: int, wanted: int) -> Iterable[tuple[int, int]]:
    """Where the submessages of one number begin and end."""
    while start < stop:
        key, start = _varint(content, start)
        kind = key & 7
        length = 0
        if kind == 0:
            _, start = _varint(content, start)
        elif kind == 2:
            length, start = _varint(content, start)
        else:
            length = {1: 8, 5: 4}.get(kind, stop + 1)
        if start + length > stop:
            raise EOFError("it ends in the middle of a field")
        if kind == 2 and key >> 3 == wanted:
            yield start, start + length
        start += length


def _varint(content: bytes, start: int) -> tuple[int, int]:
    value = 0
    for i in range(start, min(start + 10, len(content))):
        value |= (content[i] & 127) << 7 * (i - start)
        if content[i] < 128:
            return value, i + 1
    raise EOFError("it ends in the middle of a number")


_TYPES: dict[int, Any] = {
    **dict.fromkeys((1, 10, 11, 16), np.float32),
    **{2: np.uint8, 3: np.int8, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_},
}
"""What the elements of an input may be."""


def _input(path: Path, value: Any) -> Input:
    import onnx

    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        refuse(path, f"has input {shown(value.name)} that is no tensor")
    if kind.elem_type not in _TYPES:
        known = kind.elem_type in onnx.TensorProto.DataType.values()
        came = onnx.TensorProto.DataType.Name(kind.elem_type).lower() if known else f"type {kind.elem_type}"
        refuse(path, f"has input {shown(value.name)} of {came}, expected numbers or Booleans")
    dtype, name = np.dtype(_TYPES[kind.elem_type]), text(value.name)
    if not kind.HasField("shape"):
        return Input(name, None, (), dtype)
    dims = kind.shape.dim
    sizes = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in dims)
    return Input(name, sizes, tuple(text(d.dim_param) for d in dims), dtype)


# ---- nodes ---------------------------------------------------------------------------------


def _node(path: Path, proto: Any, number: int, opset: int) -> Node:
    op, domain = text(proto.op_type), text(proto.domain)
    inputs, outputs = (tuple(map(text, names)) for names in (proto.input, proto.output))
    if not any(outputs):
        refuse(path, f"has a node number {number} ({shown(op)}) without an output")
    attributes = {text(attribute.name): _attribute(path, attribute) for attribute in proto.attribute}
    name = op if domain in ("", "ai.onnx") else f"{domain}.{op}"
    anew = any(entry.key.startswith(_NEWER) for entry in proto.metadata_props)
    return Node(name, text(proto.name), _scope(proto), inputs, outputs, attributes, opset, anew)


def _attribute(path: Path, attribute: Any) -> Any:
    """The value; None for kinds that no operation here has (graphs, sparse tensors)."""
    kinds = {1: "f", 2: "i", 6: "floats", 7: "ints"}
    if attribute.type in kinds:
        value = getattr(attribute, kinds[attribute.type])
        return value if isinstance(value, (int, float)) else tuple(value)
    if attribute.type == 3:
        return attribute.s.decode("utf-8", "replace")
    if attribute.type == 8:
        return tuple(value.decode("utf-8", "replace") for value in attribute.strings)
    return read_constant(path, attribute.t) if attribute.type == 4 else None


def _scope(proto: Any) -> str:
    """Dotted path of the module that a node comes from, as PyTorch's two exporters note it.

    The newer one lists the paths of all modules around it, and the operation last; the older one names
    the node ``/layers/layers.0/conv/Conv``.
    """
    for entry in proto.metadata_props:
        if entry.key == _SCOPES:
            paths = re.findall(r"'([^']*)'", text(entry.value)[:10_000])
            return paths[-2] if len(paths) > 1 else ""
    parts: list[str] = []
    name = text(proto.name)
    for part in name.split("/")[1:-1] if name.startswith("/") else []:
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def _ordered(path: Path, nodes: Sequence[Node], given: set[str], outputs: Sequence[str]) -> list[Node]:
    """The nodes that the outputs depend on, each after those that it reads from."""
    maker: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for name in filter(None, node.outputs):
            if name in maker or name in given:
                refuse(path, f"has two sources for value {shown(name)}")
            maker[name] = i
    for output in outputs:
        if output not in maker:
            refuse(path, f"has no node that makes its output {shown(output)}")
    needed = {maker[output] for output in outputs}
    stack = sorted(needed)
    while stack:
        node = nodes[stack.pop()]
        for name in filter(None, node.inputs):
            if name not in maker and name not in given:
                refuse(path, f"has a {node} that reads {shown(name)}, which nothing makes")
            if name in maker and maker[name] not in needed:
                needed.add(maker[name])
                stack.append(maker[name])
    sources = {i: {maker[name] for name in nodes[i].inputs if name in maker} for i in sorted(needed)}
    if all(source < i for i, before in sources.items() for source in before):
        return [nodes[i] for i in sources]  # as ONNX requires
    try:
        return [nodes[i] for i in TopologicalSorter(sources).static_order()]
    except CycleError as error:
        refuse(path, f"has nodes in a circle, {nodes[error.args[1][0]]} among them")
