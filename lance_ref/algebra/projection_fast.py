"""What stores run of :mod:`lance_ref.algebra.projection`: the same products in less time and memory.

The doorways are :func:`project` and :func:`weight_gradient`. Their docstrings name the plain code that they equal, and
a test compares the two on random layers. Four things are done here and nowhere else:

* the order of a weight gradient's products is decided once for each geometry (:func:`cheapest_order`);
* height and width of a small map are taken in one product (:func:`product_of_modes`);
* a depthwise layer's gradient may come from compiled loops (:func:`depthwise_alone`);
* what lies between the output gradient and the weight gradient stays within a workspace.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lance_ref.algebra import projection
from lance_ref.algebra.convolution import Convolution, Geometry
from lance_ref.algebra.geometry import WORKSPACE_BYTES, LinearGeometry
from lance_ref.algebra.kernels import threads as kernels
from lance_ref.algebra.kernels.depthwise import MOST_PLACES, depthwise_core_gradient
from lance_ref.algebra.modes import contraction_order, multi_mode_product
from lance_ref.algebra.projection import Factors, transposed
from lance_ref.engine.tensor import Shape

ModeRanks = Sequence[int | None]
"""One rank per mode, or None for a mode that is left alone."""

CONTRACTION_BYTES = 32 * 2**20
"""The workspace for the arrays between an output gradient and the weight gradient of a core."""

EXPANSIONS = ((), (0,), (1,), (0, 1))
"""Modes of a convolution's core that :func:`separable_order` may put back to full size first: batch, channels."""

EXPANDED_ELEMENTS = 2**22
"""At most, of a core put back to full size in some modes; and never more than a quarter of the activation."""

SMALL_MAP, SMALL_CORE = 128, 64
"""Places of the largest map, and numbers of its largest core, whose height and width are taken in one product. On
square maps with r_h = r_w that is up to 4.6 times the multiply-adds of two, more on lopsided ones, but less time."""


def project(activation: np.ndarray, factors: Factors, order: str = "auto") -> np.ndarray:
    """The core of an activation. It equals :func:`lance_ref.algebra.projection.project`.

    Parameters
    ----------
    activation : array of any number of dimensions
    factors : sequence of (n, r) arrays or None, one per mode
    order : {"auto", "papers", "separable"}
        ``"auto"`` by :func:`product_of_modes`, the others one mode after the other.
    """
    if order == "auto" and activation.ndim == 4 and all(U is not None for U in factors[2:]):  # no maps of volumes
        return product_of_modes(activation, transposed(factors))
    return projection.project(activation, factors)


def weight_gradient(
    core: np.ndarray, factors: Factors, grad_output: np.ndarray, geometry: Geometry, order: str = "auto"
) -> np.ndarray:
    """The weight gradient of Ã = S ×₁U_1 ×₂U_2 ….

    It equals :func:`lance_ref.algebra.projection.papers_order` and
    :func:`lance_ref.algebra.projection.separable_order`, which equal each other, and for a linear layer is
    :func:`lance_ref.algebra.projection.linear_weight_gradient`.

    Parameters
    ----------
    core : array of the ranks' shape
    factors : sequence of (n, r) arrays or None, one per mode
    grad_output : array of ``geometry.output_shape``
    geometry : Geometry
    order : {"auto", "papers", "separable"}
        Of a convolution; ``"auto"`` is :func:`cheapest_order`, with height and width of a small map in one product;
        the others take one mode after the other. A linear layer has one order only.

    Returns
    -------
    Array of ``geometry.weight_shape``.
    """
    if isinstance(geometry, LinearGeometry):
        return projection.linear_weight_gradient(core, factors, grad_output, geometry)
    assert isinstance(geometry, Convolution)
    expanded: Sequence[int] = ()
    one_product = order == "auto"
    if order == "auto":
        order, expanded = cheapest_order(_ranks(core.shape, factors), geometry)
    if order == "papers":
        return papers_order(core, factors, grad_output, geometry)
    return separable_order(core, factors, grad_output, geometry, expanded, one_product)


# ---- one product for height and width ------------------------------------------------------


def product_of_modes(tensor: np.ndarray, matrices: Sequence[np.ndarray | None]) -> np.ndarray:
    """:func:`~lance_ref.algebra.modes.multi_mode_product`, with height and width of a small map as one mode.

    The rows of A_(B·C × H·W) are maps, and A ×₃M_3 ×₄M_4 is A (M_3 ⊗ M_4)ᵀ: one product of a useful size in place of
    two with matrices of a few numbers, which a processor does at a tenth of its speed. A map with a depth is taken one
    mode after the other.
    """
    if tensor.ndim != 4:
        return multi_mode_product(tensor, matrices)
    M_batch, M_channel, M_height, M_width = matrices
    if M_height is None or M_width is None or not in_one_product(tensor.shape[2:], (len(M_height), len(M_width))):
        return multi_mode_product(tensor, matrices)
    (B, C, H, W), (r_h, r_w) = tensor.shape, (len(M_height), len(M_width))
    both = np.multiply(M_height[:, None, :, None], M_width[:, None], order="C").reshape(r_h * r_w, H * W)  # M_3 ⊗ M_4
    product = multi_mode_product(tensor.reshape(B, C, H * W), (M_batch, M_channel, both))
    return product.reshape(*product.shape[:2], r_h, r_w)


def in_one_product(size: Shape, ranks: ModeRanks) -> bool:
    """Whether :func:`product_of_modes` takes height and width together: small maps, and rank one, which is cheaper so.

    Parameters
    ----------
    size, ranks : (H, W), (r_h, r_w)
        Before and after.
    """
    r_h, r_w = ranks
    if r_h is None or r_w is None:
        return False
    return r_h == r_w == 1 or (math.prod(size) <= SMALL_MAP and r_h * r_w <= SMALL_CORE)


# ---- the two orders, within a workspace ------------------------------------------------------


def papers_order(core: np.ndarray, factors: Factors, grad_output: np.ndarray, geometry: Convolution) -> np.ndarray:
    """:func:`lance_ref.algebra.projection.papers_order`, whose Z2 has a few slices of the first mode at a time.

    They fit the workspace of :data:`~lance_ref.algebra.geometry.WORKSPACE_BYTES`.
    """
    U_batch, U_channel, *U_map = factors
    Z1 = multi_mode_product(grad_output, transposed((U_batch, *[None] * (grad_output.ndim - 1))))
    narrow = projection.narrow_layer(core, U_channel, geometry)
    Z3 = np.zeros(narrow.weight_shape, grad_output.dtype)
    step = max(1, WORKSPACE_BYTES // (math.prod(narrow.input_shape[1:]) * core.itemsize))
    for start in range(0, len(core), step):
        block = slice(start, start + step)
        # What is left to do for a few slices is (6) and (7): a layer whose batch and channels are left alone.
        Z3 += projection.papers_order(core[block], (None, None, *U_map), Z1[block], narrow)
    return projection.channels_of_narrow(Z3, narrow, U_channel, geometry)


def separable_order(
    core: np.ndarray,
    factors: Factors,
    grad_output: np.ndarray,
    geometry: Convolution,
    expanded: Sequence[int] = (),
    one_product: bool = False,
) -> np.ndarray:
    """:func:`lance_ref.algebra.projection.separable_order`, a few output channels at a time.

    Output channels do not meet in any of it; where Z and what comes before it would take more than
    :data:`CONTRACTION_BYTES`, they are worked on a few at a time.

    Parameters
    ----------
    expanded : sequence of int
        Modes (0 the batch, 1 the channels) that are put back first, S ×_n U_n, and count as left alone from then
        on: no U_1ᵀ on G, no U_2 in the end, and channels of other groups than an output's own no longer enter. That is
        cheaper where these ranks are small beside what G still has of other modes.
    one_product : bool
        Whether height and width of a small map are one mode (:func:`product_of_modes`).
    """
    if expanded:
        core = multi_mode_product(core, [U if mode in expanded else None for mode, U in enumerate(factors)])
        factors = [None if mode in expanded else U for mode, U in enumerate(factors)]
    U_batch, U_channel, *U_map = factors
    C_out, dtype, ranks = geometry.out_channels, grad_output.dtype, core.shape
    of_map = [projection.shifted_rows(U, geometry, axis).astype(dtype, copy=False) for axis, U in enumerate(U_map)]
    shape, after = chain_of(_ranks(ranks, factors), geometry, one_product)
    if len(shape) == 4 and depthwise_alone(factors, geometry) and kernels.numba_enabled():
        (rows, columns), (k_h, k_w) = of_map, geometry.kernel
        return depthwise_core_gradient(core, grad_output, rows, columns, (k_h, k_w))
    products = product_of_modes if one_product else multi_mode_product
    matrices = transposed((U_batch, None, *of_map))
    S, of_groups = projection.lay_out(core, U_channel, geometry), projection.rows_of_groups(U_channel, geometry)
    del core  # What was put back is in S now.

    def contract(channels: slice, groups: slice) -> np.ndarray:
        own = S[groups] if of_groups is None else S
        Z3 = projection.multiply_by_core(products(grad_output[:, channels], matrices), own, ranks, geometry)
        return projection.put_channels_back(Z3, None if of_groups is None else of_groups[groups])

    at_a_time = channels_at_a_time(geometry, shape, after, dtype.itemsize)
    if at_a_time == C_out:
        return geometry.as_weight(contract(slice(None), slice(None)))
    gradient = np.empty((C_out, geometry.width, *geometry.kernel), dtype)
    for start in range(0, C_out, at_a_time):
        stop = min(start + at_a_time, C_out)
        groups = slice(start * geometry.groups // C_out, -(-stop * geometry.groups // C_out))
        gradient[start:stop] = contract(slice(start, stop), groups)
    return geometry.as_weight(gradient)


def depthwise_alone(factors: Factors, geometry: Convolution) -> bool:
    """Whether compiled loops are faster than two products: depthwise, small, and height and width compressed alone."""
    small = math.prod(geometry.output_shape[2:]) <= MOST_PLACES
    return geometry.is_depthwise and small and factors[0] is None and factors[1] is None


def chain_of(ranks: ModeRanks, geometry: Convolution, one_product: bool) -> tuple[Shape, ModeRanks]:
    """Sizes of the output gradient and of Z in :func:`separable_order`, with three modes where a map is one."""
    shape, of_map = geometry.output_shape, core_shape(ranks, geometry)[2:]
    columns = [k * r for k, r in zip(geometry.kernel, of_map, strict=True)]
    if one_product and len(columns) == 2 and in_one_product(shape[2:], columns):
        return (*shape[:2], math.prod(shape[2:])), (ranks[0], None, math.prod(columns))
    return shape, (ranks[0], None, *columns)


def channels_at_a_time(geometry: Convolution, shape: Shape, ranks: ModeRanks, itemsize: int) -> int:
    """Output channels that :func:`separable_order` works on at a time: all, or whole groups in the workspace.

    Parameters
    ----------
    shape, ranks : tuple of int
        Of the output gradient and of Z, as they are multiplied.
    """
    C_out = geometry.out_channels
    sizes = [shape[0], 1, *shape[2:]]
    elements = [math.prod(sizes)]  # of one channel: its slice of G, then each product
    for mode in contraction_order(sizes, ranks):
        sizes[mode] = ranks[mode] or 1
        elements.append(math.prod(sizes))
    most = max(*(a + b for a, b in itertools.pairwise(elements)), 2 * elements[-1])  # Z is laid out once more
    fit = CONTRACTION_BYTES // (most * itemsize)
    unit = 1 if geometry.groups == 1 else C_out // geometry.groups
    return C_out if fit >= C_out else max(fit // unit, 1) * unit


# ---- which order: decided once for a geometry --------------------------------------------------


@lru_cache(maxsize=4096)  # Training asks for the same few layers at every step.
def cheapest_order(ranks: tuple[int | None, ...], geometry: Convolution) -> tuple[str, tuple[int, ...]]:
    """The order of fewest multiply-adds: ``"papers"``, or ``"separable"`` and the modes to put back first.

    As :func:`weight_gradient` does it by default, with height and width of a small map in one product.
    """
    best: tuple[str, tuple[int, ...]] = "papers", ()
    fewest = _papers_macs(ranks, geometry)
    for expanded in EXPANSIONS:
        if any(ranks[mode] is None for mode in expanded):
            continue
        left = [None if mode in expanded else r for mode, r in enumerate(ranks)]
        shape = core_shape(left, geometry)
        if expanded and math.prod(shape) > min(EXPANDED_ELEMENTS, math.prod(geometry.input_shape) // 4):
            continue
        back = [n if mode in expanded else None for mode, n in enumerate(shape)]
        macs = _chain_macs(core_shape(ranks, geometry), back) + _separable_macs(left, geometry)
        if macs < fewest:
            best, fewest = ("separable", expanded), macs
    return best


def core_shape(ranks: ModeRanks, geometry: Convolution) -> Shape:
    """The ranks, and the full size of each mode that is left alone."""
    return tuple(n if r is None else r for n, r in zip(geometry.input_shape, ranks, strict=True))


def _ranks(sizes: Shape, factors: Factors) -> tuple[int | None, ...]:
    """The size of each mode that has a factor, None for one that is left alone."""
    return tuple(None if U is None else r for U, r in zip(factors, sizes, strict=True))


def _papers_macs(ranks: ModeRanks, geometry: Convolution) -> int:
    """Multiply-adds of :func:`papers_order`: Z1, Z2, Z3 and dW."""
    core = core_shape(ranks, geometry)
    narrow, last = _channel_macs(ranks, geometry)
    first = core[0] * math.prod(geometry.output_shape) if ranks[0] is not None else 0
    wide = [None if r is None else n for n, r in zip(geometry.input_shape[2:], ranks[2:], strict=True)]
    return first + _chain_macs(core, (None, None, *wide)) + core[0] * geometry.places * narrow + last


def _separable_macs(ranks: ModeRanks, geometry: Convolution) -> int:
    """Multiply-adds of :func:`separable_order` with nothing to put back, and small maps in one product."""
    r1, _, *of_map = core_shape(ranks, geometry)
    narrow, last = _channel_macs(ranks, geometry)
    return _chain_macs(*chain_of(ranks, geometry, True)) + r1 * math.prod(of_map) * narrow + last


def _channel_macs(ranks: ModeRanks, geometry: Convolution) -> tuple[int, int]:
    """Numbers of (the gradient with r2 or with its group's channels, as each meets the core; the product ×₂ U_2)."""
    offsets, r2 = geometry.out_channels * math.prod(geometry.kernel), ranks[1]
    if r2 is None:
        return offsets * geometry.width, 0
    return offsets * r2, offsets * r2 * geometry.width


def _chain_macs(shape: Shape, ranks: ModeRanks) -> int:
    """Multiply-adds of :func:`~lance_ref.algebra.modes.multi_mode_product` from ``shape`` to ``ranks``."""
    sizes = list(shape)
    macs = 0
    for mode in contraction_order(shape, ranks):
        macs += math.prod(sizes) * (ranks[mode] or 1)
        sizes[mode] = ranks[mode] or 1
    return macs
