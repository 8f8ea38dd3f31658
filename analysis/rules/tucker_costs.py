"""LANCE's costs in closed form: elements kept, and multiply-adds of projection and weight gradient.

Pure functions of integers. A rank of None means that the mode is left alone: it keeps its full
size, has no factor, and costs nothing. The sizes are those of the layer: a convolution's input is
(B, C_in, H, W), its output (B, C_out, H_out, W_out), and its kernel has k_h·k_w positions; of volumes each has a depth
in front. A transposed convolution lays its kernel on the places of the input, all others on those of the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

Ranks = Sequence[int | None]
"""One rank per mode, None for a mode that is left alone."""


def core_shape(shape: Sequence[int], ranks: Ranks) -> tuple[int, ...]:
    """The shape of the Tucker core.

    >>> core_shape((8, 6, 5, 4), (3, None, 2, 1))
    (3, 6, 2, 1)
    """
    return tuple(n if r is None else r for n, r in zip(shape, ranks, strict=True))


def core_elements(shape: Sequence[int], ranks: Ranks) -> int:
    """Number of elements of the core: Π r_n."""
    return math.prod(core_shape(shape, ranks))


def factor_elements(shape: Sequence[int], ranks: Ranks) -> int:
    """Number of elements of all factors: Σ n·r_n over the compressed modes.

    >>> factor_elements((8, 6, 5, 4), (3, None, 2, 1))  # 24 + 10 + 4
    38
    """
    return sum(n * r for n, r in zip(shape, ranks, strict=True) if r is not None)


def mode_products_macs(shape: Sequence[int], ranks: Ranks) -> int:
    """Multiply-adds of mode products from ``shape`` to ``ranks`` (None: no product), in the cheapest of all orders.

    Each product takes (current number of elements)·(new size of its mode); a mode may shrink or grow.

    >>> mode_products_macs((2, 3), (None, 5))
    30
    >>> mode_products_macs((4, 10), (3, 1))  # 4·10·1 first, then 4·1·3; the other order takes 150
    52
    """
    return cheapest_chain(shape, ranks)[0]


def cheapest_chain(shape: Sequence[int], ranks: Ranks) -> tuple[int, list[int]]:
    """(multiply-adds, elements after each product) of the chain of :func:`mode_products_macs`.

    >>> cheapest_chain((4, 10), (3, 1))
    (52, [4, 3])
    """
    if len(shape) != len(ranks):
        raise ValueError(f"ranks are {tuple(ranks)}, expected one for each mode of shape {tuple(shape)}")
    found: list[tuple[int, list[int]]] = []
    for order in permutations((mode, rank) for mode, rank in enumerate(ranks) if rank is not None):
        sizes, macs, elements = list(shape), 0, []
        for mode, rank in order:
            macs += math.prod(sizes) * rank
            sizes[mode] = rank
            elements.append(math.prod(sizes))
        found.append((macs, elements))
    return min(found, key=lambda chain: chain[0])


def projection_macs(shape: Sequence[int], ranks: Ranks, order: str = "auto") -> int:
    """Multiply-adds of the projection S = A ×₁U_1ᵀ ×₂U_2ᵀ … of one activation.

    By default with height and width of a small map as one mode; mode by mode in the other orders.

    >>> projection_macs((2, 3, 4, 5), (None, None, 2, 2)), projection_macs((2, 3, 4, 5), (None, None, 2, 2), "papers")
    (480, 336)
    """
    return mode_products_macs(*map_as_one(shape, ranks)) if order == "auto" else mode_products_macs(shape, ranks)


SMALL_MAP, SMALL_CORE = 128, 64
"""Places of the largest map, and numbers of its largest core, whose height and width are taken in one product."""


def map_as_one(shape: Sequence[int], ranks: Ranks) -> tuple[Sequence[int], Ranks]:
    """Shape and ranks of the products that run: height and width of a small map, and of rank one, are one mode.

    Not where one of them is left alone.

    >>> map_as_one((8, 6, 7, 7), (3, None, 2, 3))
    ((8, 6, 49), (3, None, 6))
    >>> map_as_one((8, 6, 14, 14), (3, None, 2, 3))
    ((8, 6, 14, 14), (3, None, 2, 3))
    """
    if len(shape) != 4 or len(ranks) != 4 or ranks[2] is None or ranks[3] is None:
        return shape, ranks
    (B, C, H, W), core = shape, ranks[2] * ranks[3]
    if core > 1 and (H * W > SMALL_MAP or core > SMALL_CORE):
        return shape, ranks
    return (B, C, H * W), (ranks[0], ranks[1], core)


def paper_projection_macs(shape: Sequence[int], ranks: Ranks) -> int:
    """The projection as the LANCE paper bills it: B·C·H·W·Σr, each mode on the whole activation.

    >>> paper_projection_macs((2, 3, 4, 5), (1, 2, None, 3))  # 120 · 6
    720
    """
    return math.prod(shape) * sum(r for r in ranks if r is not None)


@dataclass(frozen=True)
class ConvSizes:
    """The sizes of one convolution of any kind that its costs depend on.

    ``size`` and ``size_out`` are those of the maps, (H, W) and (H_out, W_out), or (D, H, W) and (D_out, H_out, W_out);
    stride, padding and dilation enter through them alone.
    """

    B: int
    C_in: int
    size: tuple[int, ...]
    C_out: int
    size_out: tuple[int, ...]
    kernel: tuple[int, ...]
    groups: int
    transposed: bool = False

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.B, self.C_in, *self.size

    @property
    def width(self) -> int:
        """C_in/g, the input channels that an output channel sees."""
        return self.C_in // self.groups

    @property
    def offsets(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    @property
    def places(self) -> int:
        """Places of one image on which the kernel is laid."""
        return math.prod(self.size if self.transposed else self.size_out)

    @property
    def macs(self) -> int:
        """B·C_out·places·(C_in/g)·k_h·k_w: of forward, of grad_input, and of the exact grad_weight."""
        return self.B * self.C_out * self.places * self.width * self.offsets


def conv_papers_macs(sizes: ConvSizes, ranks: Ranks) -> int:
    """Multiply-adds of the weight gradient in the papers' order.

    Z1 = G ×₁U_1ᵀ                        B·C_out·H_out·W_out·r1
    Z2 = S ×₃U_3 ×₄U_4                   the cheaper of the two orders
    Z3 = correlate(Z2, Z1)               r1·C_out·places·r2·k_h·k_w
    dW = Z3 ×₂U_2                        C_out·k_h·k_w·r2·C_in/g
    """
    s = sizes
    core = core_shape(s.input_shape, ranks)
    Z1 = 0 if ranks[0] is None else s.B * s.C_out * math.prod(s.size_out) * core[0]
    expanded = [None if r is None else n for n, r in zip(s.size, ranks[2:], strict=True)]
    Z2 = mode_products_macs(core, (None, None, *expanded))
    each, dW = _channel_macs(s, ranks)
    Z3 = core[0] * s.places * each
    return Z1 + Z2 + Z3 + dW


def conv_separable_macs(sizes: ConvSizes, ranks: Ranks, expanded: Sequence[int] = (), one_product: bool = False) -> int:
    """Multiply-adds of the weight gradient in the separable order.

    Z = G ×₁U_1ᵀ ×₃[U_3^(p)]ᵀ ×₄[U_4^(q)]ᵀ    cheapest order; the stacked shifted rows have k_h·r3 (k_w·r4) columns
    Y = Z contracted with S over (r1, r3, r4)  C_out·k_h·k_w·r2·r1·r3·r4
    dW = Y ×₂U_2                               C_out·k_h·k_w·r2·C_in/g

    A height or width that is left alone has the identity for its factor, r = n. Modes in ``expanded`` (0 the batch,
    1 the channels) are put back to full size in the core first, in the cheaper order, and are left alone after that.
    With ``one_product`` height and width of a small map of Z are one mode.

    >>> sizes = ConvSizes(8, 6, (5, 7), C_out=4, size_out=(3, 6), kernel=(3, 2), groups=2)
    >>> conv_separable_macs(sizes, (3, 5, 2, 4), expanded=(1,))  # 120·6, 5184, 24·(6/2)·24
    7632
    """
    s = sizes
    if expanded:
        full = [n if mode in expanded else None for mode, n in enumerate(s.input_shape)]
        left = [None if mode in expanded else r for mode, r in enumerate(ranks)]
        back = mode_products_macs(core_shape(s.input_shape, ranks), full)
        return back + conv_separable_macs(s, left, one_product=one_product)
    r1, _, *of_map = core_shape(s.input_shape, ranks)
    Z = mode_products_macs(*contraction(s, ranks, one_product))
    each, dW = _channel_macs(s, ranks)
    Y = each * r1 * math.prod(of_map)
    return Z + Y + dW


def contraction(sizes: ConvSizes, ranks: Ranks, one_product: bool) -> tuple[Sequence[int], Ranks]:
    """Shapes of the output gradient and of Z, as they are multiplied; None for a mode without a product."""
    of_map = core_shape(sizes.input_shape, ranks)[2:]
    shifted = [k * r for k, r in zip(sizes.kernel, of_map, strict=True)]
    chain = (sizes.B, sizes.C_out, *sizes.size_out), (ranks[0], None, *shifted)
    return map_as_one(*chain) if one_product else chain


def _channel_macs(sizes: ConvSizes, ranks: Ranks) -> tuple[int, int]:
    """(multiply-adds with each number of one channel of the core, multiply-adds of dW = Y ×₂U_2).

    A core of compressed channels knows no groups: each output channel sees all r2 of them, and
    takes its own group's rows of U_2 in the end. Without compression it sees its C_in/g.
    """
    r2, width, offsets = ranks[1], sizes.C_in // sizes.groups, sizes.C_out * math.prod(sizes.kernel)
    return (offsets * width, 0) if r2 is None else (offsets * r2, offsets * r2 * width)


EXPANDED_ELEMENTS = 2**22
"""Most elements of a core with modes put back to full size; nor may it have more than a quarter of the activation's."""


def conv_cheapest(sizes: ConvSizes, ranks: Ranks) -> tuple[int, str, tuple[int, ...]]:
    """The order that runs by default: (multiply-adds, ``"papers"`` or ``"separable"``, modes put back first).

    >>> sizes = ConvSizes(8, 6, (5, 7), C_out=4, size_out=(3, 6), kernel=(3, 2), groups=2)
    >>> conv_cheapest(sizes, (3, 5, 1, 2))
    (4932, 'separable', (1,))
    """
    found: list[tuple[int, str, tuple[int, ...]]] = [(conv_papers_macs(sizes, ranks), "papers", ())]
    most = min(EXPANDED_ELEMENTS, math.prod(sizes.input_shape) // 4)
    for expanded in ((), (0,), (1,), (0, 1)):
        left = [None if mode in expanded else r for mode, r in enumerate(ranks)]
        fits = not expanded or core_elements(sizes.input_shape, left) <= most
        if fits and all(ranks[mode] is not None for mode in expanded):
            found.append((conv_separable_macs(sizes, ranks, expanded, one_product=True), "separable", expanded))
    return min(found, key=lambda each: each[0])  # the first of several


def conv_weight_gradient_macs(sizes: ConvSizes, ranks: Ranks, order: str = "auto") -> int:
    """Multiply-adds of the weight gradient; ``order`` is ``"papers"``, ``"separable"`` or ``"auto"`` (the cheapest)."""
    if order == "papers":
        return conv_papers_macs(sizes, ranks)
    if order == "separable":
        return conv_separable_macs(sizes, ranks)
    if order == "auto":
        return conv_cheapest(sizes, ranks)[0]
    raise ValueError(f"order is {order!r}, expected 'papers', 'separable' or 'auto'")


def linear_weight_gradient_macs(input_shape: Sequence[int], C_out: int, ranks: Ranks, order: str = "auto") -> int:
    """Multiply-adds of a linear layer's weight gradient from a core.

    The output gradient (outer modes.., O) is projected on the outer modes' factors (batch, or batch
    and token), in the cheapest order; what is left has m rows. Then, in the papers' order, it is contracted
    with the core, and the result with U_I of the feature mode; ``"auto"`` expands the core's features first
    where that is cheaper.

    papers     m·O·r + O·r·I
    expanded   m·r·I + m·O·I

    >>> linear_weight_gradient_macs((8, 6), 5, (3, 2))  # 8·5·3 + 3·5·2 + 5·2·6
    210
    >>> linear_weight_gradient_macs((2, 6), 5, (None, 4))  # 2·4·6 + 2·5·6
    108
    """
    if order not in ("papers", "auto"):
        raise ValueError(f"order is {order!r}, expected 'papers' or 'auto'")
    *outer, r = core_shape(input_shape, ranks)
    Z = mode_products_macs((*input_shape[:-1], C_out), (*ranks[:-1], None))
    m, I = math.prod(outer), input_shape[-1]  # noqa: E741
    if ranks[-1] is None:
        return Z + m * C_out * I
    papers = m * C_out * r + C_out * r * I
    return Z + (papers if order == "papers" else min(papers, m * r * I + m * C_out * I))
