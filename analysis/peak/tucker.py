"""What stores of cores hold at a time: LANCE, HOSVD at every step, ASI; and the chains of mode products of them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from analysis.peak.stores import STORES, Layer, Ranks, StorePeak, at_a_time, checking, drawing
from analysis.rules import tucker_costs
from analysis.rules.layouts import Layout, Storage, packed_strides
from analysis.rules.op_cost import Call
from analysis.rules.stores import conv_sizes, tucker
from lance_ref.algebra import projection_fast
from lance_ref.algebra.geometry import WORKSPACE_BYTES as BLOCK_BYTES
from lance_ref.algebra.kernels import threads
from lance_ref.algebra.kernels.depthwise import LANES, MOST_PLACES
from lance_ref.stores.core_and_factors import UNFOLDED_BYTES

# ---- chains of mode products -----------------------------------------------------------------


def chain(shape: Sequence[int], ranks: Ranks) -> tuple[int, int]:
    """Mode products from ``shape`` to ``ranks`` in the cheapest order: (most elements at a time, elements at the end).

    A product's operand lives until its result is there; the tensor that the chain starts from is not counted.

    >>> chain((4, 10), (3, 1)), chain((4, 10), (None, None))  # 4 and 3 at the same time
    ((7, 3), (0, 0))
    """
    elements = tucker_costs.cheapest_chain(shape, ranks)[1]
    return at_a_time(elements), elements[-1] if elements else 0


def projecting(shape: Sequence[int], ranks: Ranks, order: str = "auto") -> int:
    """Elements at a time while the core is made, with the factor of both where height and width are one mode."""
    sizes, taken = tucker_costs.map_as_one(shape, ranks) if order == "auto" else (shape, ranks)
    of_both = sizes[2] * (taken[2] or 0) if len(sizes) < len(shape) else 0
    return (chain(sizes, taken)[0] or math.prod(shape)) + of_both


def core_gradient(call: Call, layer: Layer, ranks: Ranks, order: str = "auto") -> int:
    """Bytes of making a weight gradient from a core, beside the gradient, which comes last of all."""
    shape, weight = call.record.inputs[0].shape, call.record.inputs[1].shape
    item = call.itemsize
    if call.record.op == "linear":
        Z, end = chain(call.record.output.shape, (*ranks[:-1], None))
        early = Z * item - call.record.inputs[1].nbytes
        if ranks[-1] is None:
            return max(early, end * item)
        rows = math.prod(tucker_costs.core_shape(shape, ranks)[:-1])
        O, I, r = weight[0], shape[-1], ranks[-1]  # noqa: E741
        if O * r * (rows + I) <= rows * I * (r + O):
            return max(early, (end + O * r) * item)
        turned = rows * r if min(rows, r) > 1 else 0  # the core, which is free again before the gradient is made
        return max(early, (end + rows * I) * item + max(turned * item - call.record.inputs[1].nbytes, 0))
    expanded: tuple[int, ...] = ()
    cheapest = order
    if order == "auto":
        _, cheapest, expanded = tucker_costs.conv_cheapest(conv_sizes(call), ranks)
    if cheapest == "papers":
        return _papers(call, layer, ranks)
    left = [None if mode in expanded else r for mode, r in enumerate(ranks)]
    one_pass = left[0] is None and left[1] is None and _in_one_pass(call, left, order == "auto")
    contracting = _loops(call, left) if one_pass else _separable(call, left, order == "auto", bool(expanded))
    if not expanded:
        return contracting
    full = [n if mode in expanded else None for mode, n in enumerate(shape)]
    making, core = chain(tucker_costs.core_shape(shape, ranks), full)
    if one_pass:
        return max(making * item - call.record.inputs[1].nbytes, core * item + contracting)
    return max(max(making, 2 * core) * item - call.record.inputs[1].nbytes, contracting)


def _in_one_pass(call: Call, ranks: Ranks, one_product: bool) -> bool:
    """Whether compiled loops make the weight gradient of a core with batch and channels at full size."""
    sizes = conv_sizes(call)
    depthwise = call.record.op == "conv2d" and sizes.groups > 1 and sizes.width == 1
    two_modes = len(tucker_costs.contraction(sizes, ranks, one_product)[0]) == 4
    return depthwise and two_modes and sizes.places <= MOST_PLACES and threads.numba_enabled()


def _loops(call: Call, ranks: Ranks) -> int:
    """What these loops lay out: some channels' plane, whole and after its first product, in each thread."""
    (C_out, _, k_h, k_w), (_, _, H_out, W_out) = call.record.inputs[1].shape, call.record.output.shape
    r3, r4 = tucker_costs.core_shape(call.record.inputs[0].shape, ranks)[2:]
    half, _ = tucker_costs.cheapest_chain((H_out, W_out), (k_h * r3, k_w * r4))[1]
    elements = H_out * W_out + half + r3 * r4 + k_h * k_w + 1
    return min(threads._threads(), C_out) * LANES * elements * call.itemsize


def _papers(call: Call, layer: Layer, ranks: Ranks) -> int:
    """Z1; height and width of the core a few slices at a time; their correlation with Z1."""
    sizes, own, item = conv_sizes(call), call.record.inputs[1].shape, call.itemsize
    r1, c, *of_map = tucker_costs.core_shape(sizes.input_shape, ranks)
    Z1 = 0 if ranks[0] is None else r1 * math.prod(call.record.output.shape[1:])
    channels = (c, sizes.C_out) if sizes.transposed else (sizes.C_out, c)
    narrow = own if ranks[1] is None else (*channels, *sizes.kernel)
    slices = min(max(1, BLOCK_BYTES // (c * math.prod(sizes.size) * item)), r1)
    wide = [None if r is None else n for n, r in zip(sizes.size, ranks[2:], strict=True)]
    making, Z2 = chain((slices, c, *of_map), (None, None, *wide))
    several = Z2 if slices < r1 else 0
    product = layer.smaller((slices, c, *sizes.size), narrow) // item + math.prod(narrow)
    summing = Z1 + max(making + several, Z2 + product)
    if ranks[1] is None:
        return summing * item
    Z3, weights = math.prod(narrow), math.prod(own)
    # Z3 with its channels last, then the product before its axes are in order: neither for a kernel of one place
    turned = sizes.offsets > 1 or sizes.transposed
    expanding = Z1 + Z3 + (max(Z3, weights) if turned else 0) + _turning(sizes, weights)
    return max(summing + Z3 - weights, expanding) * item


def _turning(sizes: tucker_costs.ConvSizes, weights: int) -> int:
    """Elements of the gradient with its output channels first, from which a transposed one is put in order."""
    return weights if sizes.transposed else 0


def packed(shape: Sequence[int]) -> Layout:
    """An array in C order, of which the bytes are of no interest."""
    return Layout(Storage(0), tuple(shape), packed_strides(shape))


def _separable(call: Call, ranks: Ranks, one_product: bool, expanded: bool) -> int:
    """Z, which is laid out once more for the product with the core; the core too; neither where a view will do.

    A core that was ``expanded`` is an array that is not kept anyway.
    """
    sizes = conv_sizes(call)
    C_out, width, groups, offsets = sizes.C_out, sizes.width, sizes.groups, sizes.offsets
    r1, c, *of_map = tucker_costs.core_shape(sizes.input_shape, ranks)
    # of one output channel: its slice of the output gradient, then what each product gives
    (B, _, *places), wanted = tucker_costs.contraction(sizes, ranks, one_product)
    slices = (B, 1, *places)
    steps = [math.prod(slices), *tucker_costs.cheapest_chain(slices, wanted)[1]]
    of_both = places[0] * (wanted[2] or 0) if len(places) == 1 else 0
    Z, narrow, wide = steps[-1], offsets * (width if ranks[1] is None else c), width * offsets
    fit = projection_fast.CONTRACTION_BYTES // (max(at_a_time(steps), 2 * Z) * call.itemsize)
    # what is there beside the gradient: Z3, and its product with U_2 before its axes are in order; for a kernel of one
    # place they are, and the last product is the gradient
    late = (narrow if ranks[1] is not None else 0) + (wide if offsets > 1 else 0)
    pairs = packed((r1, C_out, *(size for pair in zip(sizes.kernel, of_map, strict=True) for size in pair)))
    last = len(pairs.shape)
    offsets_first = pairs.permuted((1, *range(2, last, 2), 0, *range(3, last, 2)))
    again = 0 if offsets_first.reshaped((C_out * offsets, r1 * math.prod(of_map))) is not None else Z
    in_core = groups if ranks[1] is None else 1
    places_of_core = math.prod(of_map)
    channels_last = packed((r1, in_core, c // in_core, places_of_core)).permuted((1, 0, 3, 2))
    a_view = channels_last.reshaped((in_core, r1 * places_of_core, c // in_core)) is not None
    core = 0 if a_view and not expanded else r1 * c * places_of_core
    if fit >= C_out:
        working = C_out * max(max(at_a_time(steps[1:]), Z + again + narrow) - wide, late)
    else:  # a few channels at a time, each with a copy of its slice
        unit = 1 if groups == 1 else C_out // groups
        working = max(fit // unit, 1) * unit * max(at_a_time(steps), Z + again + narrow, late + wide)
    working = max(working, _turning(sizes, C_out * wide))
    return (core + working + of_both) * call.itemsize


# ---- LANCE -----------------------------------------------------------------------------------


def _lance_ranks(call: Call) -> Ranks:
    store = call.record.attributes["store"]
    ranks = list(store["ranks"])
    if store.get("batch_mode") == "sketch":
        ranks[0] = max(round(store["batch_ratio"] * call.record.inputs[0].shape[0]), 1)
    return ranks


def _lance_save(call: Call, layer: Layer) -> int:
    store, shape, ranks = call.record.attributes["store"], call.record.inputs[0].shape, _lance_ranks(call)
    most = projecting(shape, ranks, store.get("order", "auto"))
    core = tucker_costs.core_elements(shape, ranks)
    directions, drawn = _lance_directions(call)
    most = max(most, core + checking(core) // call.itemsize)
    if "core_bits" in store:
        most = max(most, 3 * core)
    if store.get("centred"):  # the core of the mean; then the activation without it, a few images at a time
        image = call.n_in // shape[0]
        most = max(most, 2 * core, core + min(max(BLOCK_BYTES // (image * call.itemsize), 1), shape[0]) * image)
        most = max(most, core + _core_of_mean(shape, ranks))
    return max(directions + most * call.itemsize, drawn)


def _lance_directions(call: Call) -> tuple[int, int]:
    """Bytes of the directions of a sketched batch, which are there all the while, and while they are drawn."""
    if call.record.attributes["store"].get("batch_mode") != "sketch":
        return 0, 0
    n, r = call.record.inputs[0].shape[0], _lance_ranks(call)[0] or 0
    return n * r * call.itemsize, drawing(n, r, call.itemsize)


def _core_of_mean(shape: Sequence[int], ranks: Ranks) -> int:
    """Elements while the core of the mean is made: a factor times its vector, beside the outer product so far."""
    most, outer = 0, 1
    for n, r in zip(shape, ranks, strict=True):
        most = max(most, outer + n * (r or 1))
        outer *= r or n
    return most


def _lance_weight(call: Call, layer: Layer, g: Layout) -> int:
    store, ranks = call.record.attributes["store"], _lance_ranks(call)
    unpacked = 2 * tucker_costs.core_elements(call.record.inputs[0].shape, ranks) if "core_bits" in store else 0
    mean = _mean_weight(call) if store.get("centred") else 0
    gradient = unpacked * call.itemsize + core_gradient(call, layer, ranks, store.get("order", "auto"))
    directions, drawn = _lance_directions(call)
    return max(directions + max(gradient, mean), drawn)


def _mean_weight(call: Call) -> int:
    """The mean's own weight gradient, beside that from the core: an outer product, and its copy in the weight's order.

    Kernels of one place need no copy; a convolution has the output gradient summed over the batch before.
    """
    weight, kernel = call.record.inputs[1], call.record.inputs[1].shape[2:]
    summed = call.n_out // call.record.inputs[0].shape[0] * call.itemsize if kernel else 0
    in_order = math.prod(kernel) == 1 and call.record.op != "conv_transpose2d"
    return max((1 if in_order else 2) * weight.nbytes, summed)


STORES["lance"] = StorePeak(
    _lance_save,
    _lance_weight,
    by_image=lambda store: store["ranks"][0] is None and "core_bits" not in store,  # a sketch says its rank
)


def _patch_save(call: Call, layer: Layer) -> int:
    shape, ranks = _patches(call)
    columns = min(BLOCK_BYTES, math.prod(shape) * call.itemsize)
    return 2 * columns + tucker_costs.core_elements(shape, ranks) * call.itemsize


def _patch_weight(call: Call, layer: Layer, g: Layout) -> int:
    shape, ranks = _patches(call)
    C_out = call.record.inputs[1].shape[0]
    most, end = chain((shape[0], C_out, shape[1]), (ranks[0], None, ranks[1]))
    narrow = 0 if ranks[2] is None or "update" in call.record.attributes else C_out * ranks[2]
    return (max(most, 2 * end) + narrow) * call.itemsize


def _patches(call: Call) -> tuple[tuple[int, int, int], Ranks]:
    sizes = conv_sizes(call)
    shape = sizes.B, sizes.places, sizes.C_in * sizes.offsets
    return shape, call.record.attributes["store"]["ranks"]


STORES["patch-lance"] = StorePeak(
    _patch_save, _patch_weight, shared=lambda call: True, by_image=lambda store: store["ranks"][0] is None
)


# ---- HOSVD and ASI ---------------------------------------------------------------------------


def _unfolded(call: Call, mode: int) -> list[tuple[int, int]]:
    """The blocks of an unfolding one after the other: (columns, elements that are laid out, none for a view)."""
    shape = call.record.inputs[0].shape
    n, pre, post = shape[mode], math.prod(shape[:mode]), math.prod(shape[mode + 1 :])
    columns = max(1, UNFOLDED_BYTES // (call.itemsize * n))
    if post == 1:
        return [(min(columns, pre - start), 0) for start in range(0, pre, columns)]
    width, depth = min(post, columns), max(1, columns // post)
    sizes = [
        (min(depth, pre - first), min(width, post - start))
        for first in range(0, pre, depth)
        for start in range(0, post, width)
    ]
    return [(rows * wide, n * rows * wide if rows > 1 else 0) for rows, wide in sizes]


def _block_by_block(blocks: Sequence[tuple[int, int]], beside: Callable[[int, int], int]) -> int:
    """The most elements while blocks are used one after the other: a new one is laid out while the last is there.

    ``beside``: (columns of the block before, or 0; columns of this one, or 0 while it is laid out) -> elements that
    are made of them.
    """
    most = before = last = 0
    for columns, laid_out in blocks:
        most = max(most, last + laid_out + beside(before, 0), laid_out + beside(before, columns))
        before, last = columns, laid_out
    return most


def _is_outer(shape: Sequence[int], mode: int) -> bool:
    """Whether the unfolding in this mode is a view."""
    return mode in (0, len(shape) - 1)


def _basis(n: int, r: int) -> int:
    """Elements of an orthonormal basis of n by r numbers: these, what QR makes of them, Q in order, and R."""
    return 3 * n * r + r * r


def _hosvd_save(call: Call, layer: Layer) -> int:
    """Gram and eigenvectors mode by mode; the factors, while all eigenvectors are there; then the core.

    LAPACK's divide and conquer takes a Gram of n², results of n² and 2n² of work.
    """
    shape, store = call.record.inputs[0].shape, call.record.attributes["store"]
    ranks = tucker.own_ranks(call)
    chosen, epsilon = tucker.decomposed(shape, ranks, store), store.get("epsilon")
    tall = []
    held = most = 0
    for mode in sorted((m for m, yes in enumerate(chosen) if yes), key=lambda m: shape[m]):
        n, rest = shape[mode], call.n_in // shape[mode]
        wanted = store["ranks"][mode] if epsilon is None else None
        if n > rest and (wanted is None or wanted <= rest):
            tall.append(mode)
            held += 0 if _is_outer(shape, mode) else call.n_in
            if not (len(shape) == 2 and all(chosen) and shape[0] != shape[1]):  # else found with the other mode
                most = max(most, held + 4 * rest * rest)
                held += rest * rest
            continue
        gram = n * n

        def products(before: int, now: int, gram: int = gram) -> int:
            """The sum so far, and the product that is added to it."""
            return gram * ((before > 0) + (now > 0))

        most = max(most, held + 4 * gram, held + _block_by_block(_unfolded(call, mode), products))
        held += gram
    if all(r is None for r in ranks):
        return max(most, held) * call.itemsize
    made = 0
    for mode, (n, r) in enumerate(zip(shape, ranks, strict=True)):
        if r is not None:
            rest = call.n_in // n
            most = max(most, held + made + (max(_basis(n, r), n * r + rest * r) if mode in tall else n * r))
            made += n * r
    return max(most, made + _core(call, ranks)) * call.itemsize


def _core(call: Call, ranks: Ranks) -> int:
    """Elements while the core is made, and then looked through."""
    shape = call.record.inputs[0].shape
    core = tucker_costs.core_elements(shape, ranks)
    return max(projecting(shape, ranks), core + checking(core) // call.itemsize)


def _asi_save(call: Call, layer: Layer) -> int:
    """One thin product and one QR decomposition per mode; the factors of the step before stay until then."""
    shape, ranks = call.record.inputs[0].shape, tucker.own_ranks(call)
    held = most = 0
    for mode, (n, r) in enumerate(zip(shape, ranks, strict=True)):
        if r is None:
            continue
        image = n * r

        def products(before: int, now: int, r: int = r, image: int = image) -> int:
            """V of the block before and of this one; the image, and what is added to it."""
            return image + max(r * (before + now), r * now + image if now else 0)

        most = max(most, held + _block_by_block(_unfolded(call, mode), products), held + _basis(n, r))
        held += n * r
    return max(most, held + _core(call, ranks)) * call.itemsize if held else 0


def _asi_carried(shape: tuple[int, ...], store: Mapping[str, Any]) -> int:
    """The factors, from which the iteration of the next step starts."""
    return sum(n * r for n, r in zip(shape, store["ranks"], strict=True) if r is not None and r < n)


STORES["hosvd"] = StorePeak(_hosvd_save, lambda call, layer, g: core_gradient(call, layer, tucker.own_ranks(call)))
STORES["asi"] = StorePeak(_asi_save, STORES["hosvd"].weight_gradient, carried=_asi_carried)
