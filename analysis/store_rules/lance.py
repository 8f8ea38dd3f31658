"""Cost rules of plain backpropagation and of LANCE."""

from __future__ import annotations

import math

from analysis import tucker_costs
from analysis.op_cost import Call, fresh
from analysis.store_rules.base import StoreCost, conv_sizes, store_rule


@store_rule("exact")
def exact(call: Call, macs: int) -> StoreCost:
    """Plain backpropagation: the input itself; dW takes as many multiply-adds as the forward pass."""
    return StoreCost(macs, macs, kept_bytes=call.record.inputs[0].nbytes, tape=(call.save_input("activation", 0),))


@store_rule("lance")
def lance(call: Call, macs: int) -> StoreCost:
    """LANCE: the core alone, by fixed factors.

    ``elementwise`` is the squares summed of activation and core, for the share of energy kept.
    """
    shape, weight = call.record.inputs[0].shape, call.record.inputs[1].shape
    store = call.record.attributes["store"]
    ranks = tuple(store["ranks"])
    core = tucker_costs.core_elements(shape, ranks)
    if call.record.op == "conv2d":
        sizes = conv_sizes(call)
        grad_weight = tucker_costs.conv_weight_gradient_macs(sizes, ranks, store.get("order", "auto"))
        paper_grad_weight = tucker_costs.conv_papers_macs(sizes, ranks)
    else:
        grad_weight = paper_grad_weight = tucker_costs.linear_weight_gradient_macs(shape, weight[0], ranks)
    kept = fresh("core", core * call.itemsize)
    return StoreCost(
        grad_weight_macs=grad_weight,
        paper_grad_weight_macs=paper_grad_weight,
        projection_macs=tucker_costs.projection_macs(shape, ranks),
        paper_projection_macs=tucker_costs.paper_projection_macs(shape, ranks),
        kept_bytes=core * call.itemsize,
        subspace_bytes=tucker_costs.factor_elements(shape, ranks) * call.itemsize,
        elementwise=2 * (math.prod(shape) + core),
        ranks=ranks,
        tape=(kept,),
        pytorch=(kept,),
    )
