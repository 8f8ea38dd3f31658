"""One training step of a PyTorch module as plain data: what is kept and by whom, and what is multiplied and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("forward", "grad_input", "grad_weight", "recompute")
"""What a product is for."""
LOSS = "(loss)"
"""In place of a module's path, for what the loss keeps and computes."""


@dataclass(frozen=True)
class Storage:
    """One block of memory that the step keeps for its backward pass, whatever views of it there are."""

    nbytes: int
    #: Paths of the modules whose operations keep it, in order, each once; with it, whether it is kept there as the
    #: input of that layer, for the gradient of its weight.
    holders: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Seen:
    """A module that ran."""

    path: str
    kind: str  #: Name of its class.
    input_shape: tuple[int, ...]  #: Of its first tensor, in its first call; empty where it gets none.
    output_shape: tuple[int, ...]
    parameters: int  #: Numbers of its own parameters, without those of the modules within.
    calls: int


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that trains and ran as a module.

    Shapes are those of the library's own layers: input (B, C_in, H, W), (B, I) or (B, L, I), weight (C_out, C_in/g,
    k_h, k_w) or (O, I). ``exact`` says why no method can compress it; it is empty for most.
    """

    path: str
    op: str  #: ``"conv2d"`` or ``"linear"``, or the name of the class where methods know no such layer.
    shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    attributes: Mapping[str, Any]  #: Of a convolution: ``groups``, and ``stride`` and ``dilation`` in both directions.
    itemsize: int  #: Bytes of an element of the input, as it is kept.
    calls: int
    exact: str = ""


@dataclass(frozen=True)
class TorchStep:
    """What one training step keeps and computes."""

    batch: int
    input_shape: tuple[int, ...]  #: Of the first input, without the batch.
    classes: int | None  #: Of an output (B, classes); None for any other.
    dtype: str
    loss: str  #: In words.
    modules: tuple[Seen, ...]  #: In order of their first call.
    layers: dict[str, Layer]  #: Those that train, the head included.
    head: str | None  #: The last layer in order of registration, if it trains.
    kept: tuple[Storage, ...]  #: By PyTorch.
    macs: dict[tuple[str, str], int]  #: Multiply-adds by path and kind.
    parameters: int  #: Of the whole module, each once.
    trained_parameters: int
    uncounted: tuple[str, ...] = ()  #: Operations that multiply, without a rule.
    remarks: tuple[str, ...] = field(default=())
    #: What this library's tape keeps of the same step; None where it has not been asked for, or there is none.
    tape: tuple[Storage, ...] | None = None
    no_tape: str = ""  #: Why there is none.

    @property
    def tuned_layers(self) -> tuple[str, ...]:
        """Layers that train, the head left out."""
        return tuple(path for path in self.layers if path != self.head)

    @property
    def compressible(self) -> dict[str, Layer]:
        """Tuned layers that methods know, the head left out."""
        return {path: self.layers[path] for path in self.tuned_layers if not self.layers[path].exact}

    def bytes_by_path(self, compressed: Collection[str] = (), tape: bool = False) -> dict[str, int]:
        """Bytes that each module's operations are the first to keep, each storage once.

        ``compressed`` are layers that keep no input: what somebody else keeps stays, under the name of that one.
        With ``tape`` what this library's tape keeps, else what PyTorch does.
        """
        found: defaultdict[str, int] = defaultdict(int)
        for storage in (self.tape or ()) if tape else self.kept:
            for path, is_input in storage.holders:
                if not (is_input and path in compressed):
                    found[path] += storage.nbytes
                    break
        return dict(found)

    def total_bytes(self) -> int:
        """All that is kept, each storage once."""
        return sum(storage.nbytes for storage in self.kept)

    def total_macs(self, *kinds: str) -> int:
        """Multiply-adds of these kinds, of all kinds where none is named."""
        return sum(macs for (_, kind), macs in self.macs.items() if kind in (kinds or KINDS))
