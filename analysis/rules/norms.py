"""Cost rules of the normalisations: batch norm (frozen and training), and norms of layers, groups and instances."""

from __future__ import annotations

import math

from analysis.rules.op_cost import Call, OpCost, fresh, rule


def _affine_needs(call: Call) -> tuple[bool, bool]:
    """Whether the gradients of weight and bias are computed."""
    return (call.needs(1), call.needs(2)) if call.record.attributes["affine"] else (False, False)


@rule("batch_norm")
def batch_norm(call: Call) -> OpCost:
    """Frozen: y = scale·x + shift, of which backward needs the scale alone. Training: as layer_norm.

    PyTorch keeps the input even of a frozen batch norm; its running statistics are buffers of the
    module and are counted nowhere.
    """
    if call.record.attributes["training"]:
        return _normalised(call, groups=call.record.inputs[0].shape[1])
    n, C = call.n_out, call.record.inputs[0].shape[1]
    channel_bytes = C * call.itemsize
    weight, bias = _affine_needs(call)
    cost = OpCost(elementwise=2 * n)
    if call.needs(0):
        cost.elementwise += n
        cost.tape.append(fresh("scale", channel_bytes))
    if weight:
        cost.elementwise += 4 * n
        cost.tape += [call.save_input("x", 0), fresh("mean", channel_bytes), fresh("inv_std", channel_bytes)]
    if bias:
        cost.elementwise += n
    if call.on_tape:
        cost.pytorch.append(call.save_input("x", 0))
        if call.record.attributes["affine"]:
            cost.pytorch.append(call.save_input("weight", 1))
    return cost


@rule("layer_norm")
def layer_norm(call: Call) -> OpCost:
    return _normalised(call, groups=call.n_in // math.prod(call.record.attributes["normalized_shape"]))


@rule("group_norm", "instance_norm")
def group_norm(call: Call) -> OpCost:
    """As layer_norm, over groups of channels. PyTorch's instance norm keeps the weight once for each sample."""
    B, num_groups = call.record.inputs[0].shape[0], call.record.attributes["num_groups"]
    cost = _normalised(call, groups=B * num_groups)
    if call.on_tape and call.record.op == "instance_norm" and call.record.attributes["affine"]:
        repeated = fresh("weight, repeated", B * num_groups * call.itemsize)
        cost.pytorch = [call.save_input("x", 0), repeated, *cost.pytorch[1:3]]
    return cost


@rule("rms_norm")
def rms_norm(call: Call) -> OpCost:
    """x̂ = x·inv_rms over each group: 4 per element, 1 more with a weight.

    Backward: x̂ again (1), ∂x = inv_rms·(g − x̂·mean(g·x̂)) (5), with a weight g·w (1); weight Σ g·x̂ (2). PyTorch takes
    it apart: it keeps x, inv_rms, and, for the weight, x̂.
    """
    n, weighted = call.n_out, len(call.record.inputs) > 1
    group_bytes = n // math.prod(call.record.attributes["normalized_shape"]) * call.itemsize
    cost = OpCost(elementwise=(5 if weighted else 4) * n)
    if call.on_tape:
        cost.elementwise += n + (5 + weighted) * n * call.needs(0)
        cost.tape += [call.save_input("x", 0), fresh("inv_rms", group_bytes)]
    if call.needs(0):
        cost.pytorch += [call.save_input("x", 0), fresh("inv_rms", group_bytes)]
        if weighted:
            cost.tape.append(call.save_input("weight", 1))
            cost.pytorch.append(call.save_input("weight", 1))
    if weighted and call.needs(1):
        cost.elementwise += 2 * n
        cost.pytorch.append(fresh("x, normalised", n * call.itemsize))
    return cost


def _normalised(call: Call, groups: int) -> OpCost:
    """x̂ = (x − mean)·inv_std over each group: 6 per element, 2 more with weight and bias.

    Backward: x̂ again (2), ∂x = inv_std·(g − mean(g) − x̂·mean(g·x̂)) (7), weight Σ g·x̂ (2), bias Σ g (1).
    """
    n, affine = call.n_out, call.record.attributes["affine"]
    weight, bias = _affine_needs(call)
    cost = OpCost(elementwise=(8 if affine else 6) * n)
    group_bytes = groups * call.itemsize
    if call.needs(0) or weight:
        cost.elementwise += 2 * n
        cost.tape += [call.save_input("x", 0), fresh("mean", group_bytes), fresh("inv_std", group_bytes)]
    if call.needs(0):
        cost.elementwise += 7 * n
        if affine:
            cost.tape.append(call.save_input("weight", 1))
    cost.elementwise += 2 * n * weight + n * bias
    if call.on_tape:
        cost.pytorch += [call.save_input("x", 0), fresh("mean", group_bytes), fresh("inv_std", group_bytes)]
        if affine:
            cost.pytorch.append(call.save_input("weight", 1))
    return cost
