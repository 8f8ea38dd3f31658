"""What an activation store adds to the cost of a layer, and the register of the rules that say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from analysis.rules import tucker_costs
from analysis.rules.op_cost import Call, Saved


@dataclass(frozen=True)
class StoreCost:
    """What a layer's activation store adds: memory, and the cost of the weight gradient.

    ``pytorch`` is None where PyTorch keeps what it always keeps; ``grad_input_macs`` is None where the
    input gradient is the exact one.
    """

    grad_weight_macs: int
    paper_grad_weight_macs: int
    projection_macs: int = 0
    paper_projection_macs: int = 0
    decomposition_macs: int = 0
    grad_input_macs: int | None = None
    kept_bytes: int = 0
    subspace_bytes: int = 0
    elementwise: int = 0
    ranks: tuple[int | None, ...] | None = None
    tape: tuple[Saved, ...] = ()
    pytorch: tuple[Saved, ...] | None = None


StoreRule = Callable[[Call, int], StoreCost]
STORES: dict[str, StoreRule] = {}
"""One cost rule per activation store: (call, multiply-adds of the exact weight gradient) -> StoreCost."""


def store_rule(name: str) -> Callable[[StoreRule], StoreRule]:
    """Register a function as the cost rule of the activation stores of that name."""

    def register(function: StoreRule) -> StoreRule:
        STORES[name] = function
        return function

    return register


def conv_sizes(call: Call) -> tucker_costs.ConvSizes:
    """The sizes of the record of a convolution of any kind."""
    (B, C_in, *size), (_, C_out, *size_out) = call.record.inputs[0].shape, call.record.output.shape
    groups, transposed = call.record.attributes["groups"], call.record.op == "conv_transpose2d"
    kernel = call.weight.shape[2:]
    return tucker_costs.ConvSizes(B, C_in, tuple(size), C_out, tuple(size_out), kernel, groups, transposed)
