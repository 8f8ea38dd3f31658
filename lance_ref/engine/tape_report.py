"""What the tape holds, to the byte: ``print(lance_ref.tape(loss))``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from lance_ref.engine.autograd import Node
from lance_ref.engine.tensor import Shape, Tensor


@dataclass(frozen=True)
class TapeEntry:
    """One array that an operation saved for its backward pass.

    Attributes
    ----------
    path, op, what : str
        The layer, the operation, and the name under which the operation saved the array.
    shape, dtype : tuple of int, str
        Of the saved array.
    nbytes : int
        Bytes of the *whole buffer* that this entry keeps alive, 0 if an earlier entry keeps the
        same buffer: the entries of a report therefore add up to what is really held.
    """

    path: str
    op: str
    what: str
    shape: Shape
    dtype: str
    nbytes: int


class TapeReport:
    """Everything that the graph behind a tensor keeps alive for backward.

    Attributes
    ----------
    entries : list of TapeEntry
        In order of execution; each buffer is billed once, to the first operation that saved it.
    parameters : list of TapeEntry
        Parameters that backward will need. They are in memory anyway and not part of the total.
    """

    def __init__(self, entries: list[TapeEntry], parameters: list[TapeEntry]) -> None:
        self.entries = entries
        self.parameters = parameters

    @property
    def total_bytes(self) -> int:
        """Bytes that the tape keeps alive, parameters excluded."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters that the tape refers to."""
        return sum(entry.nbytes for entry in self.parameters)

    def by_layer(self) -> dict[str, int]:
        """Bytes by layer path, in order of execution."""
        return self._sum("path")

    def by_op(self) -> dict[str, int]:
        """Bytes by operation."""
        return self._sum("op")

    def _sum(self, attribute: str) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for entry in self.entries:
            totals[getattr(entry, attribute)] += entry.nbytes
        return dict(totals)

    def __str__(self) -> str:
        rows = [("layer", "op", "saved", "shape", "dtype", "bytes")]
        rows += [
            (e.path or "(root)", e.op, e.what, "x".join(map(str, e.shape)) or "scalar", e.dtype, f"{e.nbytes:,}")
            for e in self.entries
        ]
        rows.append(("total", "", "", "", "", f"{self.total_bytes:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = [
            "  ".join(
                cell.rjust(w) if column == 5 else cell.ljust(w)
                for column, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rule = "-" * len(lines[0])
        lines.insert(1, rule)
        lines.insert(-1, rule)
        lines.append(f"parameters that backward refers to, not counted above: {self.parameter_bytes:,} bytes")
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def tape(tensor: Tensor) -> TapeReport:
    """Report every array that ``tensor``'s graph holds for backward.

    Parameters
    ----------
    tensor : Tensor
        Usually the loss, before ``backward()``.

    Returns
    -------
    TapeReport
        Empty if nothing behind ``tensor`` requires gradients or backward has consumed it.

    Examples
    --------
    >>> import numpy as np
    >>> from lance_ref import Tensor, functional as F
    >>> x = Tensor(np.ones((4, 16), np.float32), requires_grad=True)
    >>> tape(F.relu(x).sum()).total_bytes  # one bit per element
    8
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tape() takes a Tensor, got {type(tensor).__name__}")
    entries: list[TapeEntry] = []
    parameters: list[TapeEntry] = []
    billed: set[int] = set()
    for node in _nodes(tensor):
        for what, saved in node.saved.items():
            buffer = base_buffer(saved.array)
            nbytes = 0 if id(buffer) in billed else buffer.nbytes
            billed.add(id(buffer))
            entry = TapeEntry(node.path, node.function.op, what, saved.array.shape, str(saved.array.dtype), nbytes)
            (parameters if saved.is_parameter else entries).append(entry)
    return TapeReport(entries, parameters)


def base_buffer(array: np.ndarray) -> np.ndarray:
    """The array that owns the memory which ``array`` looks at."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _nodes(tensor: Tensor) -> list[Node]:
    """All nodes behind ``tensor``, in order of execution."""
    stack = [tensor._node] if tensor._node is not None else []
    found: dict[int, Node] = {}
    while stack:
        node = stack.pop()
        if node.sequence not in found:
            found[node.sequence] = node
            stack.extend(edge for edge in node.edges if isinstance(edge, Node))
    return [found[sequence] for sequence in sorted(found)]
