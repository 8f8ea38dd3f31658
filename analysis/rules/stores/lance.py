"""Cost rules of plain backpropagation and of LANCE."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

from analysis.rules import subspace, tucker_costs
from analysis.rules.op_cost import Call, Saved, fresh
from analysis.rules.stores.base import StoreCost, conv_sizes, store_rule
from analysis.rules.stores.quantized import DEQUANTISE_OPERATIONS, QUANTISE_OPERATIONS, codes
from analysis.rules.stores.sketch import directions, drawing_elementwise, drawing_macs, seed
from analysis.rules.tucker_costs import Ranks


@store_rule("exact")
def exact(call: Call, macs: int) -> StoreCost:
    """Plain backpropagation: the input itself; dW takes as many multiply-adds as the forward pass."""
    return StoreCost(macs, macs, kept_bytes=call.record.inputs[0].nbytes, tape=(call.save_input("activation", 0),))


@store_rule("lance")
def lance(call: Call, macs: int) -> StoreCost:
    """LANCE: the core alone, by fixed factors.

    With a sketched batch mode r_1 follows from the batch and the ratio, there is no factor of that mode, and its
    directions are drawn twice. With ``core_bits`` the core is kept as codes. Centred, the layer has its mean beside the
    factors, subtracts it from the activation, and adds its weight gradient.

    ``elementwise`` is the squares summed of activation and core, for the share of energy kept, and what these
    options do number by number.
    """
    shape = call.record.inputs[0].shape
    store = call.record.attributes["store"]
    ranks, fixed = tuple(store["ranks"]), tuple(store["ranks"])
    decomposition = drawing = 0
    if store.get("batch_mode") == "sketch":
        r1 = directions(shape[0], store["batch_ratio"])
        ranks, fixed = (r1, *ranks[1:]), (None, *ranks[1:])
        decomposition, drawing = drawing_macs(shape[0], r1), drawing_elementwise(shape[0], r1)
    core = tucker_costs.core_elements(shape, ranks)
    grad_weight, paper_grad_weight = _gradient_macs(call, ranks)
    update, basis = subspace.update_of(call.record), 0
    if update is not None:
        narrow = subspace.of_update(call)
        own = tuple(narrow.record.attributes["store"]["ranks"])
        grad_weight, paper_grad_weight = _gradient_macs(narrow, (ranks[0], *own[1:]))
        feature = 1 if len(shape) >= 4 else len(shape) - 1
        groups, centred = call.record.attributes.get("groups", 1), bool(store.get("centred"))
        basis = subspace.basis_elements(shape[feature], groups, ranks[feature] or 0, update["rank"], centred)
    kept = kept_of_core(call, tucker_costs.core_shape(shape, ranks), store.get("core_bits"))
    coding = 0 if "core_bits" not in store else core * (QUANTISE_OPERATIONS + DEQUANTISE_OPERATIONS)
    if store.get("batch_mode") == "sketch":
        kept = (*kept, seed())
    mean = mean_elementwise = 0
    if store.get("centred"):
        mean = shape[1] if len(shape) >= 4 else shape[-1]
        mean_macs, mean_elementwise = of_mean(call)
        mean_elementwise += core_of_mean(shape, ranks)
        grad_weight, paper_grad_weight = grad_weight + mean_macs, paper_grad_weight + mean_macs
    return StoreCost(
        grad_weight_macs=grad_weight,
        paper_grad_weight_macs=paper_grad_weight,
        projection_macs=tucker_costs.projection_macs(shape, ranks, store.get("order", "auto")),
        paper_projection_macs=tucker_costs.paper_projection_macs(shape, ranks),
        decomposition_macs=decomposition,
        kept_bytes=sum(saved.storage.nbytes for saved in kept),
        subspace_bytes=(tucker_costs.factor_elements(shape, fixed) + mean + basis) * call.itemsize,
        elementwise=2 * (math.prod(shape) + core) + coding + drawing + mean_elementwise,
        ranks=ranks,
        tape=kept,
        pytorch=kept,
    )


def _gradient_macs(call: Call, ranks: Ranks) -> tuple[int, int]:
    """Multiply-adds of the weight gradient from a core: as it runs, and in the papers' order."""
    if call.record.op != "linear":
        sizes, order = conv_sizes(call), call.record.attributes["store"].get("order", "auto")
        return tucker_costs.conv_weight_gradient_macs(sizes, ranks, order), tucker_costs.conv_papers_macs(sizes, ranks)
    shape, out = call.record.inputs[0].shape, call.weight.shape[0]
    papers = tucker_costs.linear_weight_gradient_macs(shape, out, ranks, "papers")
    return tucker_costs.linear_weight_gradient_macs(shape, out, ranks), papers


def of_mean(call: Call) -> tuple[int, int]:
    """The weight gradient of the mean: (multiply-adds, operations number by number with the subtraction).

    Convolution: the output gradient is summed over the batch, then over the places that each kernel offset sees, the
    last axis first, C_out·H_out·W_out·k_w and C_out·H_out·k_h·k_w, then spread over the channels, C_out·k_h·k_w·C_in/g;
    linear: O·I.
    The sum of the gradients is added to the one from the core.
    """
    x, weight = call.record.inputs[0], call.record.inputs[1].shape
    elements = math.prod(weight)
    elementwise = x.size + call.n_out + elements
    if call.record.op == "linear":
        return elements, elementwise
    sums = list(call.record.output.shape[1:])  # C_out, H_out, W_out
    macs = elements
    for axis in reversed(range(len(weight) - 2)):
        macs += math.prod(sums) * weight[2 + axis]
        sums[1 + axis] = weight[2 + axis]
    return macs, elementwise


def core_of_mean(shape: Sequence[int], ranks: Ranks) -> int:
    """Operations of making the core of the mean, one vector for each mode and their outer product, and taking it off.

    >>> core_of_mean((4, 3), (2, None))  # (4·2 products and sums), 2 + 2·3, and 2·3
    30
    """
    vectors = sum(2 * n * r for n, r in zip(shape, ranks, strict=True) if r is not None)
    outer = list(itertools.accumulate(tucker_costs.core_shape(shape, ranks), operator.mul))
    return vectors + sum(outer) + outer[-1]


def kept_of_core(call: Call, shape: tuple[int, ...], bits: int | None) -> tuple[Saved, ...]:
    """The core as floats, or as codes: a range for each slice of the feature mode if such a slice has 32 entries."""
    elements = math.prod(shape)
    if bits is None:
        return (fresh("core", elements * call.itemsize),)
    slices = shape[1] if len(shape) >= 4 else shape[-1]
    return codes(call, elements, slices if elements >= 32 * slices else 1, bits)
