"""Cost rule of quantised activations, and of anything else that is kept as codes."""

from __future__ import annotations

from analysis.rules.op_cost import Call, Saved, fresh
from analysis.rules.stores.base import StoreCost, store_rule

QUANTISE_OPERATIONS = 7
"""Per entry: two comparisons for the range, then halve, subtract, divide, scale, round."""

DEQUANTISE_OPERATIONS = 5
"""Per entry: t = q / levels, 1 − t, two products and their sum."""


@store_rule("quantized")
def quantized(call: Call, macs: int) -> StoreCost:
    """Codes and one range for each channel; the weight gradient takes as many multiply-adds as the exact one."""
    shape = call.record.inputs[0].shape
    kept = codes(call, call.n_in, shape[1] if len(shape) >= 4 else shape[-1], call.record.attributes["store"]["bits"])
    return StoreCost(
        grad_weight_macs=macs,
        paper_grad_weight_macs=macs,
        kept_bytes=sum(saved.storage.nbytes for saved in kept),
        elementwise=call.n_in * (QUANTISE_OPERATIONS + DEQUANTISE_OPERATIONS),
        tape=kept,
        pytorch=kept,
    )


def codes(call: Call, elements: int, ranges: int, bits: int) -> tuple[Saved, ...]:
    """What stands for ``elements`` floats: their codes, ⌈elements·bits/8⌉ bytes, and two floats for each range."""
    return (
        fresh("codes", -(-elements * bits // 8)),
        fresh("minimum", ranges * call.itemsize),
        fresh("maximum", ranges * call.itemsize),
    )
