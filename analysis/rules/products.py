"""Cost rules of the operations that multiply matrices: convolutions, linear, matmul, attention.

A layer with weights keeps what its activation store keeps, so there is one rule per store as well, in
:mod:`analysis.rules.stores`.
"""

from __future__ import annotations

import math

from analysis.rules import subspace
from analysis.rules.layouts import Layout
from analysis.rules.op_cost import Call, OpCost, Saved, fresh, rule
from analysis.rules.stores import STORES, conv_sizes

IN_COORDINATES = ("lance", "patch-lance")
"""Stores that give the gradient of an update without that of the weight."""


@rule("conv2d", "conv_transpose2d", "conv3d")
def convolution(call: Call) -> OpCost:
    """Y = X ⋆ W + b; each of its three products takes B·C_out·H_out·W_out·(C_in/g)·k_h·k_w.

    Transposed, every input place meets the kernel: B·H·W·C_in·(C_out/g)·k_h·k_w. Volumes have one more size of each.

    PyTorch keeps the input and the weight of a convolution that backward comes through even where the
    weight is frozen, or the bias alone trains. With unequal padding it keeps a copy of the input, padded by as much as
    one side has more than the other; the rest, alike on both sides, is left to the convolution itself.
    """
    in_pytorch = call.save_input("input", 0)
    if call.record.op == "conv2d":  # the padding of the others is alike on both sides
        (top, bottom), (left, right) = call.record.attributes["padding"]
        if top != bottom or left != right:
            B, C_in, H, W = call.record.inputs[0].shape
            padded = B * C_in * (H + abs(top - bottom)) * (W + abs(left - right))
            in_pytorch = fresh("padded input", padded * call.itemsize)
    return _weighted(call, conv_sizes(call).macs, in_pytorch, pytorch_keeps_frozen=True)


@rule("linear")
def linear(call: Call) -> OpCost:
    """Y = X Wᵀ + b; each of its three products takes (Π leading sizes)·O·I."""
    x, layout = call.record.inputs[0], call.inputs[0]
    in_pytorch = call.save_input("input", 0)
    if layout.reshaped((-(-x.size // x.shape[-1]), x.shape[-1])) is None:
        in_pytorch = fresh("input, packed", x.nbytes)
    return _weighted(call, call.n_out * x.shape[-1], in_pytorch, pytorch_keeps_frozen=False)


def _weighted(call: Call, macs: int, in_pytorch: Saved, pytorch_keeps_frozen: bool) -> OpCost:
    """What all layers with weights share; ``in_pytorch`` is the input as PyTorch would keep it."""
    bias = call.has_bias
    name = call.record.attributes["store"]["name"]
    if name not in STORES:
        raise LookupError(
            f"no cost rule for the activation store {name!r} of layer {call.record.path!r}; there are {sorted(STORES)}"
        )
    store = STORES[name](call, macs)
    more, gradient = 0, store.grad_weight_macs
    if subspace.update_of(call.record) is not None:
        more = subspace.extra_macs(call.record)
        gradient += 0 if name in IN_COORDINATES else subspace.merging_macs(call.record)  # dW first, then dW ×₂ Qᵀ
    cost = OpCost(forward_macs=macs + more, elementwise=call.n_out * bias)
    if more:
        cost.elementwise += call.weight.size if subspace.is_merged(call.record) else call.n_out
    if call.needs(1):
        cost.grad_weight_macs, cost.paper_grad_weight_macs = gradient, store.paper_grad_weight_macs
        cost.projection_macs, cost.paper_projection_macs = store.projection_macs, store.paper_projection_macs
        cost.paper_bytes, cost.subspace_bytes, cost.ranks = store.kept_bytes, store.subspace_bytes, store.ranks
        cost.elementwise += store.elementwise
        cost.decomposition_macs = store.decomposition_macs
        cost.tape += store.tape
        cost.pytorch += [in_pytorch] if store.pytorch is None else store.pytorch
    elif call.on_tape and pytorch_keeps_frozen:
        cost.pytorch.append(in_pytorch)
    if call.needs(0):
        cost.grad_input_macs = more + (macs if more or store.grad_input_macs is None else store.grad_input_macs)
        cost.tape.append(call.save_input("weight", 1))
    if call.needs(0) or (call.on_tape and pytorch_keeps_frozen):
        cost.pytorch.append(call.save_input("weight", 1))
    if bias and call.needs(2):
        cost.elementwise += call.n_out
    return cost


@rule("scaled_dot_product_attention")
def attention(call: Call) -> OpCost:
    """softmax(scale·Q Kᵀ + mask)·V: two products. Of the gradients V takes one, Q and K one each and one for both.

    Per score: scaling 1, softmax 5, a mask 1; backward 4 and 1. Operands of four dimensions and one head size, whose
    mask is not trained, go through PyTorch's kernel for the CPU. It keeps the operands, its result and one number for
    each row of scores. Others go through the products, which keep scaled copies of Q and K, and the probabilities.
    """
    q, k, v, *mask = call.record.inputs
    scores = q.size // q.shape[-1] * k.shape[-2]
    of_scores, of_values = scores * q.shape[-1], scores * v.shape[-1]
    cost = OpCost(forward_macs=of_scores + of_values, elementwise=scores * (6 + len(mask)))
    if not call.on_tape:
        return cost
    needs_q, needs_k, needs_v = (call.needs(i) for i in range(3))
    needs_mask = bool(mask) and call.needs(3)
    through = needs_q or needs_k or needs_mask
    cost.grad_input_macs = of_values * (needs_v + through) + of_scores * (needs_q + needs_k)
    cost.elementwise += 5 * scores * through
    cost.tape = [fresh("probabilities", scores * call.itemsize)]
    kept = [call.save_input("q", 0), call.save_input("k", 1), call.save_input("v", 2)]
    cost.tape += [saved for saved, yes in zip(kept, (needs_k, needs_q, through), strict=True) if yes]
    if len(q.shape) == 4 and q.shape[-1] == v.shape[-1] and not needs_mask:
        rows = scores // k.shape[-2]
        cost.pytorch = [*kept, call.save_output(), fresh("logsumexp", rows * call.itemsize)]
        for value in mask:
            floating = value.dtype.startswith("float")
            cost.pytorch.append(call.save_input("mask", 3) if floating else fresh("mask", value.size * call.itemsize))
        return cost
    if through:
        cost.pytorch = [fresh("k, scaled", k.nbytes)] * needs_q + [fresh("q, scaled", q.nbytes)] * needs_k
        cost.pytorch.append(kept[2])
    cost.pytorch.append(fresh("probabilities", scores * call.itemsize))
    return cost


@rule("matmul")
def matmul(call: Call) -> OpCost:
    """(..., m, k) @ (..., k, n): result size · k, forward and for each gradient.

    A parameter's gradient is grad_weight, any other grad_input.
    """
    macs = call.n_out * call.record.inputs[0].shape[-1]
    cost = OpCost(forward_macs=macs)
    in_pytorch = _pytorch_operands(call)
    for this, other in ((0, 1), (1, 0)):
        if not call.needs(this):
            continue
        if call.record.inputs[this].parameter is not None:
            cost.grad_weight_macs += macs
        else:
            cost.grad_input_macs += macs
        cost.tape.append(call.save_input("ab"[other], other))
        cost.pytorch.append(in_pytorch[other])
    return cost


def _pytorch_operands(call: Call) -> tuple[Saved, Saved]:
    """The two operands as PyTorch's matmul hands them to its kernels.

    A batch of matrices becomes three-dimensional, or, against a single matrix, two-dimensional; where
    the strides do not allow that, or the other operand has to be repeated, a packed copy is made and kept.
    """
    a, b = call.record.inputs
    a_layout, b_layout = call.inputs
    saved_a, saved_b = call.save_input("a", 0), call.save_input("b", 1)
    a_dim, b_dim = len(a.shape), len(b.shape)
    if a_dim <= 2 and b_dim <= 2:
        return saved_a, saved_b
    if min(a_dim, b_dim) <= 2:  # many matrices against one: the many are stacked into a tall one, if that pays
        many, one, one_needs = (a_layout, b, call.needs(1)) if a_dim > 2 else (_transposed(b_layout), a, call.needs(0))
        tall = many.reshaped((math.prod(many.shape[:-1]), many.shape[-1]))
        if one_needs or ((len(one.shape) == 1 or a_dim > 2) and tall is not None):
            if tall is not None:
                return saved_a, saved_b
            copy = fresh("stacked", math.prod(many.shape) * call.itemsize)
            return (copy, saved_b) if a_dim > 2 else (saved_a, copy)
    batch = call.record.output.shape[: -2 if min(a_dim, b_dim) > 1 else -1]
    return _batched(call, a_layout, batch, saved_a), _batched(call, b_layout, batch, saved_b)


def _batched(call: Call, layout: Layout, batch: tuple[int, ...], saved: Saved) -> Saved:
    """An operand as (batch, m, k): a look at the same memory, or a copy where it must be repeated or packed."""
    matrix = layout.shape[-2:] if len(layout.shape) > 1 else layout.shape
    full = (*batch, *matrix)
    lead = len(full) - len(layout.shape)
    strides = [0] * lead + [
        0 if n == 1 and m != 1 else s for n, m, s in zip(layout.shape, full[lead:], layout.strides, strict=True)
    ]
    flat = Layout(layout.storage, full, tuple(strides)).reshaped((math.prod(batch), *matrix))
    return saved if flat is not None else fresh(f"{saved.what}, packed", math.prod(full) * call.itemsize)


def _transposed(layout: Layout) -> Layout:
    dims = [*range(len(layout.shape) - 2), len(layout.shape) - 1, len(layout.shape) - 2]
    return layout.permuted(dims)
