"""Who makes and who reads each value of an ONNX graph: what a group of nodes is recognised by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.onnx.file import Node
from analysis.onnx.layers import Weight


class Uses:
    """Who makes and who reads a value."""

    def __init__(self, nodes: Sequence[Node], constants: Mapping[str, Any], outputs: Iterable[str]) -> None:
        self.constants = constants
        self.maker = {name: node for node in nodes for name in node.outputs}
        self.readers: dict[str, list[Node]] = {}
        self.count: Counter[str] = Counter(outputs)
        for node in nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
                self.count[name] += 1

    def reader(self, node: Node, op: str) -> Node | None:
        """The node of this kind that alone reads the first output of ``node``."""
        name = node.outputs[0]
        readers = self.readers.get(name, [])
        alone = self.count[name] == 1 and len(readers) == 1 and not any(node.outputs[1:])
        return readers[0] if alone and readers[0].op == op else None

    def made_by(self, name: str, *ops: str) -> Node | None:
        node = self.maker.get(name)
        return node if node is not None and node.op in ops else None

    def number(self, name: str) -> float | None:
        """The value of a constant with one element."""
        value = self.constants.get(name)
        return float(value.reshape(())) if isinstance(value, np.ndarray) and value.size == 1 else None

    def times(self, node: Node | None, factor: float) -> str | None:
        """The operand that a Mul multiplies with ``factor``, or a Div divides by 1 / factor."""
        if node is None or len(node.inputs) != 2:
            return None
        a, b = node.inputs
        for operand, constant in ((a, b), (b, a)) if node.op == "Mul" else ((a, b),):
            value = self.number(constant)
            if value and math.isclose(value if node.op == "Mul" else 1 / value, factor, rel_tol=1e-3):
                return operand
        return None

    def other(self, node: Node, name: str) -> str:
        """The operand of a node of two operands beside this one; "" if it is both, or none."""
        a, b = (*node.inputs, "", "")[:2]
        return b if a == name != b else a if b == name != a else ""

    def alone(self, name: str) -> bool:
        """Whether a value is read once."""
        return self.count[name] == 1

    def array(self, name: str) -> np.ndarray | None:
        """The values of a constant that is known beforehand and no parameter."""
        value = self.constants.get(name)
        return value if isinstance(value, np.ndarray) else None

    def weight(self, name: str) -> Weight | None:
        value = self.constants.get(name)
        return value if isinstance(value, Weight) else None

    def closed(self, group: Sequence[Node]) -> bool:
        """Whether only the group itself reads what it computes, its last node apart."""
        inside: Callable[[str], int] = Counter(name for node in group for name in node.inputs).__getitem__
        return all(self.count[name] == inside(name) for node in group[:-1] for name in node.outputs if name)


Match = tuple[Node, list[Node]]
"""What takes the place of the last of a list of nodes; the others go."""
