"""What one operation costs, and how a rule that says so gets into the table of operations.

A rule is a pure function from a :class:`Call` to an :class:`OpCost`. The rules themselves are in
:mod:`analysis.rules.elementwise` and :mod:`analysis.rules.products`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from analysis.rules.layouts import Layout, Memory, Storage
from analysis.rules.operations import OPERATIONS, column, known
from lance_ref.engine.recording import OpRecord, Value, itemsize

MAC_KINDS = ("forward", "grad_input", "grad_weight", "projection", "decomposition", "recompute")
"""The kinds of products whose multiply-adds are counted."""


class MissingRuleError(LookupError):
    """An operation that nobody has written a cost rule for. Never counted as zero."""


@dataclass(frozen=True)
class Saved:
    """Memory that an operation keeps for its backward pass."""

    what: str
    storage: Storage


@dataclass
class OpCost:
    """The cost of one executed operation.

    Attributes
    ----------
    forward_macs, grad_input_macs, grad_weight_macs, projection_macs, decomposition_macs, recompute_macs : int
        Multiply-adds of products; 1 multiply-add = 2 FLOPs. Decomposition: finding the directions that
        this very step projects on (none where they are fixed); LAPACK's part at its nominal count.
        Recompute: the forward pass once more, of what stands inside a recomputed segment.
    paper_projection_macs, paper_grad_weight_macs : int
        The same two as the LANCE paper bills them (``--convention paper``).
    elementwise : int
        Scalar operations of everything else, forward and the backward that is needed.
    tape, pytorch : list of Saved
        What our lean tape keeps, and what PyTorch's autograd would keep.
    paper_bytes : int
        What the papers would count for this layer if it is tuned: its input, or its core.
    subspace_bytes : int
        Fixed factors that must be at hand.
    ranks : tuple or None
        Rank of each mode, for a compressed layer.
    second_tape_bytes : int
        Of a recomputed segment: what its second run keeps while the segment is differentiated, beside
        ``tape``, which is what is kept until then.
    """

    forward_macs: int = 0
    grad_input_macs: int = 0
    grad_weight_macs: int = 0
    projection_macs: int = 0
    decomposition_macs: int = 0
    recompute_macs: int = 0
    paper_projection_macs: int = 0
    paper_grad_weight_macs: int = 0
    elementwise: int = 0
    tape: list[Saved] = field(default_factory=list)
    pytorch: list[Saved] = field(default_factory=list)
    paper_bytes: int = 0
    subspace_bytes: int = 0
    ranks: tuple[int | None, ...] | None = None
    second_tape_bytes: int = 0

    def repeated(self, times: int) -> OpCost:
        """The cost of the operation if it runs several times, one tape after the other."""
        numbers = vars(self)
        return OpCost(**{**numbers, **{name: times * numbers[name] for name in COUNTS if numbers[name]}})


COUNTS = (
    *(f"{kind}_macs" for kind in MAC_KINDS),
    "paper_projection_macs",
    "paper_grad_weight_macs",
    "elementwise",
)
"""The attributes of an OpCost that count operations, not bytes."""


@dataclass(frozen=True)
class Call:
    """One operation as a rule sees it."""

    record: OpRecord
    #: Where its values live.
    inputs: tuple[Layout, ...]
    output: Layout
    on_tape: bool  #: Whether the backward pass comes through here.
    #: While it runs back: whether nothing else refers to the memory of the gradient that came in.
    owns_gradient: bool = False

    def needs(self, position: int) -> bool:
        """Whether the gradient of that input is computed."""
        return self.on_tape and self.record.inputs[position].requires_grad

    @property
    def weight(self) -> Value:
        """The weight of a convolution or a linear layer; W_0 of one that trains in a subspace."""
        return weight_of(self.record)

    @property
    def has_bias(self) -> bool:
        """Whether the third input is a bias: it is in (x, W, b) and in (x, D, b, W_0, s)."""
        return len(self.record.inputs) % 2 == 1

    @property
    def n_in(self) -> int:
        """Elements of the first input."""
        return self.record.inputs[0].size

    @property
    def n_out(self) -> int:
        """Elements of the result."""
        return self.record.output.size

    @property
    def itemsize(self) -> int:
        """Bytes of one element of the result."""
        return itemsize(self.record.output.dtype)

    def save_input(self, what: str, position: int) -> Saved:
        """An input itself: whatever memory it lives in stays alive."""
        return Saved(what, self.inputs[position].storage)

    def save_output(self, what: str = "output") -> Saved:
        """The result itself."""
        return Saved(what, self.output.storage)


def weight_of(record: OpRecord) -> Value:
    """The weight of a convolution or a linear layer: W, or W_0 where D alone trains, (x, D, [b], W_0, s)."""
    return record.inputs[-2 if "update" in record.attributes else 1]


def fresh(what: str, nbytes: int) -> Saved:
    """An array that the operation makes in order to keep it."""
    return Saved(what, Storage(nbytes))


def index_bytes(count: int) -> int:
    """Bytes of the smallest unsigned type that holds 0 .. count − 1.

    >>> index_bytes(256), index_bytes(257)
    (1, 2)
    """
    return np.min_scalar_type(max(count - 1, 0)).itemsize


def bit_bytes(count: int) -> int:
    """Bytes of one bit per element, packed.

    >>> bit_bytes(9)
    2
    """
    return -(-count // 8)


Rule = Callable[[Call], OpCost]


rule: Callable[..., Callable[[Rule], Rule]] = column("cost")
"""``@rule("add", "sub")``: the function below is the cost rule of these operations, which are our own."""


def cost_of(record: OpRecord, memory: Memory, on_tape: bool) -> OpCost:
    """The cost of one record; ``memory`` must have followed all records before it.

    Raises MissingRuleError if the operation has no rule; the message names it and the layer.
    """
    price = known(record.op).cost
    if price is None:
        raise MissingRuleError(
            f"no cost rule for operation {record.op!r} in layer {record.path or '(root)'!r}; "
            f"there are rules for {', '.join(sorted(name for name, row in OPERATIONS.items() if row.cost))}"
        )
    inputs = tuple([memory.of(value) for value in record.inputs])
    cost: OpCost = price(Call(record, inputs, memory.follow(record, inputs), on_tape))
    return cost
