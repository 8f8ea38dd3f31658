"""Cost rule of LANCE on patches: a linear layer over L = H_out·W_out tokens of K = C_in·k_h·k_w numbers."""

from __future__ import annotations

from analysis.rules import subspace, tucker_costs
from analysis.rules.op_cost import Call, fresh
from analysis.rules.stores.base import StoreCost, conv_sizes, store_rule


@store_rule("patch-lance")
def patch_lance(call: Call, macs: int) -> StoreCost:
    """The core (r1, r2, r3) of the patches (B, L, K), by fixed factors.

    ::

        projection      the cheapest order of the mode products from (B, L, K) to the ranks
        grad_weight     G (B, L, C_out) to (r1, r2, C_out), then r1·r2·C_out·r3 and C_out·r3·K, or the core's
                        features expanded first where that is cheaper

    Laying out patches multiplies nothing. The papers' bill of the projection, each mode on the whole activation, is
    that of the patches.
    """
    sizes = conv_sizes(call)
    if sizes.groups != 1:
        raise ValueError(f"layer {call.record.path!r}: patch-lance takes no groups, the convolution has {sizes.groups}")
    shape = sizes.B, sizes.places, sizes.C_in * sizes.offsets
    ranks = tuple(call.record.attributes["store"]["ranks"])
    seen, kept = shape, ranks
    if subspace.update_of(call.record) is not None:  # the gradient stays in the coordinates of the core's patches
        seen, kept = (*shape[:2], ranks[2]), (*ranks[:2], None)
    core = fresh("core", tucker_costs.core_elements(shape, ranks) * call.itemsize)
    return StoreCost(
        grad_weight_macs=tucker_costs.linear_weight_gradient_macs(seen, sizes.C_out, kept),
        paper_grad_weight_macs=tucker_costs.linear_weight_gradient_macs(seen, sizes.C_out, kept, "papers"),
        projection_macs=tucker_costs.projection_macs(shape, ranks),
        paper_projection_macs=tucker_costs.paper_projection_macs(shape, ranks),
        kept_bytes=core.storage.nbytes,
        subspace_bytes=tucker_costs.factor_elements(shape, ranks) * call.itemsize,
        ranks=ranks,
        tape=(core,),
        pytorch=(core,),
    )
