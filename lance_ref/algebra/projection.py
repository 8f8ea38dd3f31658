"""LANCE's arithmetic: the projected activation, and the weight gradient from it.

Notation. A (B, C, H, W) is a convolution's input, G (B, C_out, H_out, W_out) the gradient of its
output, U_1..U_4 the fixed factors (n, r) of batch, channel, height and width, and
S = A ×₁U_1ᵀ ×₂U_2ᵀ ×₃U_3ᵀ ×₄U_4ᵀ the core. Wanted is the weight gradient of Ã = S ×₁U_1 ×₂U_2 ×₃U_3 ×₄U_4,
without ever forming Ã. A factor of None leaves its mode alone: no product, no cost.

Two orders of contraction give the same result:

* :func:`papers_order` (Nguyen et al. 2024, Apolinario & Roy 2025) re-expands height and width of the
  core and correlates it with the projected G;
* :func:`separable_order` contracts G with shifted rows of U_3 and U_4, so that no spatial map is formed
  and every step is a matrix product. It may first put the core's batch and channels back to full size, which
  are then no longer contracted with G: cheaper where these ranks are small beside what G still has of other modes.

:func:`project` and :func:`weight_gradient` are the doorways: any layer, by default in the order of fewest
multiply-adds, and with height and width of a small map in one product (:func:`product_of_modes`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from lance_ref.algebra.frame import feature_mode
from lance_ref.algebra.geometry import WORKSPACE_BYTES, ConvGeometry, Geometry, LinearGeometry
from lance_ref.algebra.kernels import threads as kernels
from lance_ref.algebra.kernels.depthwise import MOST_PLACES, depthwise_core_gradient
from lance_ref.algebra.tucker import contraction_order, multi_mode_product
from lance_ref.engine.counting import matmul
from lance_ref.engine.tensor import Shape

Factors = Sequence[np.ndarray | None]
"""One (n, r) matrix with orthonormal columns per mode, or None for a mode that is left alone."""

CONTRACTION_BYTES = 32 * 2**20
"""Of the arrays between an output gradient and the weight gradient of a core."""

EXPANSIONS = ((), (0,), (1,), (0, 1))
"""Modes of a convolution's core that :func:`separable_order` may put back to full size first: batch, channels."""

EXPANDED_ELEMENTS = 2**22
"""At most, of a core put back to full size in some modes; and never more than a quarter of the activation."""

SMALL_MAP, SMALL_CORE = 128, 64
"""Places of the largest map, and numbers of its largest core, whose height and width are taken in one product. On
square maps with r_h = r_w that is up to 4.6 times the multiply-adds of two, more on lopsided ones, but less time."""


def project(activation: np.ndarray, factors: Factors, order: str = "auto") -> np.ndarray:
    """The core S = A ×₁U_1ᵀ ×₂U_2ᵀ …, in the cheapest order of the modes.

    Parameters
    ----------
    activation : array of any number of dimensions
    factors : sequence of (n, r) arrays or None, one per mode
    order : {"auto", "papers", "separable"}
        ``"auto"`` by :func:`product_of_modes`, the others one mode after the other.

    Returns
    -------
    Array of the ranks' shape, in a buffer of its own (a copy if no mode is compressed).
    """
    products = product_of_modes if order == "auto" else multi_mode_product
    core = products(activation, [None if U is None else U.T for U in factors])
    return core.copy() if np.may_share_memory(core, activation) else core


def product_of_modes(tensor: np.ndarray, matrices: Sequence[np.ndarray | None]) -> np.ndarray:
    """:func:`~lance_ref.algebra.tucker.multi_mode_product`, with height and width of a small map as one mode.

    The rows of A_(B·C × H·W) are maps, and A ×₃M_3 ×₄M_4 is A (M_3 ⊗ M_4)ᵀ: one product of a useful size in place of
    two with matrices of a few numbers, which a processor does at a tenth of its speed.
    """
    if tensor.ndim != 4 or not in_one_product(tensor.shape[2:], [None if M is None else len(M) for M in matrices[2:]]):
        return multi_mode_product(tensor, matrices)
    M_batch, M_channel, M_height, M_width = matrices
    assert M_height is not None
    assert M_width is not None
    (B, C, H, W), (r_h, r_w) = tensor.shape, (len(M_height), len(M_width))
    both = np.multiply(M_height[:, None, :, None], M_width[:, None], order="C").reshape(r_h * r_w, H * W)  # M_3 ⊗ M_4
    product = multi_mode_product(tensor.reshape(B, C, H * W), (M_batch, M_channel, both))
    return product.reshape(*product.shape[:2], r_h, r_w)


def in_one_product(size: Shape, ranks: Sequence[int | None]) -> bool:
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


def _as_multiplied(shape: Shape, ranks: Sequence[int | None]) -> tuple[Shape, Sequence[int | None]]:
    """The sizes and ranks that :func:`product_of_modes` gives to the chain: height and width perhaps as one."""
    r_h, r_w = ranks[2:]
    if not in_one_product(shape[2:], (r_h, r_w)):
        return shape, ranks
    assert r_h is not None
    assert r_w is not None
    return (*shape[:2], math.prod(shape[2:])), (*ranks[:2], r_h * r_w)


def project_mean(mean: np.ndarray, factors: Factors, shape: Shape) -> np.ndarray:
    """The core of an activation of that shape that is ``mean`` (one number per feature) at every place.

    It has rank one: S = (U_1ᵀ1) ∘ (U_2ᵀμ) ∘ (U_3ᵀ1) ∘ (U_4ᵀ1).

    Returns
    -------
    Array of the ranks' shape.
    """
    core = np.ones((), mean.dtype)
    for mode, (n, U) in enumerate(zip(shape, factors, strict=True)):
        vector = mean if mode == feature_mode(shape) else np.ones(n, mean.dtype)
        core = np.multiply.outer(core, vector if U is None else (U * vector[:, None]).sum(axis=0))
    return core


def weight_gradient(
    core: np.ndarray, factors: Factors, grad_output: np.ndarray, geometry: Geometry, order: str = "auto"
) -> np.ndarray:
    """The weight gradient of Ã = S ×₁U_1 ×₂U_2 ….

    Parameters
    ----------
    core : array of the ranks' shape
    factors : sequence of (n, r) arrays or None, one per mode
    grad_output : array of ``geometry.output_shape``
    geometry : ConvGeometry or LinearGeometry
    order : {"auto", "papers", "separable"}
        Of a convolution; ``"auto"`` is :func:`cheapest_order`, with height and width of a small map in one product;
        the others take one mode after the other. A linear layer has one order only.

    Returns
    -------
    Array of ``geometry.weight_shape``.
    """
    if isinstance(geometry, LinearGeometry):
        return linear_weight_gradient(core, factors, grad_output, geometry)
    expanded: Sequence[int] = ()
    one_product = order == "auto"
    if order == "auto":
        order, expanded = cheapest_order(core.shape, factors, geometry)
    if order == "papers":
        return papers_order(core, factors, grad_output, geometry)
    return separable_order(core, factors, grad_output, geometry, expanded, one_product)


def papers_order(core: np.ndarray, factors: Factors, grad_output: np.ndarray, geometry: ConvGeometry) -> np.ndarray:
    """Weight gradient in the papers' order.

    Z1 = G ×₁ U_1ᵀ;  Z2 = S ×₃ U_3 ×₄ U_4;  Z3 = correlate(Z2, Z1);  dW = Z3 ×₂ U_2.

    Z2 is re-expanded a few slices of the first mode at a time, within the workspace of
    :data:`~lance_ref.algebra.geometry.WORKSPACE_BYTES`.

    Returns
    -------
    (C_out, C_in/g, k_h, k_w)
    """
    U_batch, U_channel, U_height, U_width = factors
    _, _, H, W = geometry.input_shape
    C_out, _, k_h, k_w = geometry.weight_shape
    Z1 = multi_mode_product(grad_output, (None if U_batch is None else U_batch.T, None, None, None))
    r1, c = core.shape[:2]
    narrow = (C_out, c, k_h, k_w) if U_channel is not None else geometry.weight_shape
    groups = 1 if U_channel is not None else geometry.groups
    Z3 = np.zeros(narrow, grad_output.dtype)
    step = max(1, WORKSPACE_BYTES // (c * H * W * core.itemsize))
    for start in range(0, r1, step):
        block = slice(start, min(start + step, r1))
        Z2 = multi_mode_product(core[block], (None, None, U_height, U_width))  # (b, c, H, W)
        slices = ConvGeometry(Z2.shape, narrow, geometry.stride, geometry.padding, geometry.dilation, groups)
        Z3 += slices.weight_gradient(Z2, Z1[block])
    if U_channel is None:
        return Z3
    return _expand_channels(Z3.transpose(0, 2, 3, 1), U_channel, geometry)


def separable_order(
    core: np.ndarray,
    factors: Factors,
    grad_output: np.ndarray,
    geometry: ConvGeometry,
    expanded: Sequence[int] = (),
    one_product: bool = False,
) -> np.ndarray:
    """Weight gradient in the separable order.

    With U_3^(p)[h'] = U_3[s·h' + d·p − top] (zero outside) for each kernel row p, and U_4^(q) likewise:

    Z = G ×₁ U_1ᵀ ×₃ [U_3^(p)]ᵀ ×₄ [U_4^(q)]ᵀ  ∈ (r1, C_out, k_h·r3, k_w·r4), in the cheapest order;
    dW[o,:,p,q] = U_2 Σ_{a,i,j} Z[a, o, (p,i), (q,j)] · S[a, :, i, j].

    Modes in ``expanded`` (0 the batch, 1 the channels) are first put back, S ×_n U_n, and count as left alone from then
    on: no U_1ᵀ on G, no U_2 in the end, and channels of other groups than an output's own no longer enter.

    With ``one_product`` height and width of a small map are one mode (:func:`product_of_modes`); its rows come in the
    order of (p, q, i, j), so that Z is nearly laid out as the product with the core wants it.

    Output channels do not meet in any of it; where Z and what comes before it would take more than
    :data:`CONTRACTION_BYTES`, they are worked on a few at a time.

    Returns
    -------
    (C_out, C_in/g, k_h, k_w)
    """
    if expanded:
        core = multi_mode_product(core, [U if mode in expanded else None for mode, U in enumerate(factors)])
        factors = [None if mode in expanded else U for mode, U in enumerate(factors)]
    U_batch, U_channel, U_height, U_width = factors
    C_out, _, k_h, k_w = geometry.weight_shape
    r1, c, r3, r4 = core.shape
    rows = shifted_rows(U_height, geometry, axis=0)  # (H_out, k_h·r3)
    columns = shifted_rows(U_width, geometry, axis=1)  # (W_out, k_w·r4)
    dtype = grad_output.dtype
    shape, ranks = chain_of(core.shape, factors, geometry, one_product)
    if len(shape) == 4 and depthwise_alone(factors, geometry) and kernels.numba_enabled():
        return depthwise_core_gradient(core, grad_output, rows, columns, (k_h, k_w))  # what follows, in one pass
    if len(shape) == 3:
        by_row, by_column = rows.reshape(-1, 1, k_h, 1, r3, 1), columns.reshape(-1, 1, k_w, 1, r4)
        of_map = [(by_row * by_column).reshape(-1, k_h * k_w * r3 * r4)]  # (H_out·W_out, k_h·k_w·r3·r4)
        grid = (1, 1, k_h * k_w, r3 * r4)
    else:
        of_map, grid = [rows, columns], (k_h, r3, k_w, r4)
    G = grad_output.reshape(shape)
    products = [None if M is None else M.T.astype(dtype, copy=False) for M in (U_batch, None, *of_map)]
    g = 1 if U_channel is not None else geometry.groups
    S = core.reshape(r1, g, c // g, r3, r4).transpose(1, 0, 3, 4, 2).reshape(g, r1 * r3 * r4, c // g)
    del core  # what was put back is in S now

    def contract(channels: slice, groups: slice) -> np.ndarray:
        Z = multi_mode_product(G[:, channels], products)
        o, own = Z.shape[1], S if U_channel is not None else S[groups]
        Z = kernels.offsets_first(Z.reshape(r1, o, *grid))  # (o, k_h, k_w, r1, r3, r4)
        narrow = matmul(Z.reshape(len(own), -1, r1 * r3 * r4), own).reshape(o, k_h, k_w, c // g)
        if U_channel is None:
            return np.ascontiguousarray(narrow.transpose(0, 3, 1, 2))
        del Z
        return _expand_channels(narrow, U_channel, geometry, groups)

    at_a_time = channels_at_a_time(geometry, shape, ranks, dtype.itemsize)
    if at_a_time == C_out:
        return contract(slice(None), slice(None))
    gradient = np.empty(geometry.weight_shape, dtype)
    for start in range(0, C_out, at_a_time):
        stop = min(start + at_a_time, C_out)
        groups = slice(start * geometry.groups // C_out, -(-stop * geometry.groups // C_out))
        gradient[start:stop] = contract(slice(start, stop), groups)
    return gradient


def chain_of(
    core_shape: Shape, factors: Factors, geometry: ConvGeometry, one_product: bool
) -> tuple[Shape, Sequence[int | None]]:
    """Sizes of the output gradient and of Z in :func:`separable_order`, with three modes where a map is one."""
    r1, _, r3, r4 = core_shape
    k_h, k_w = geometry.weight_shape[2:]
    ranks = (None if factors[0] is None else r1, None, k_h * r3, k_w * r4)
    return _as_multiplied(geometry.output_shape, ranks) if one_product else (geometry.output_shape, ranks)


def depthwise_alone(factors: Factors, geometry: ConvGeometry) -> bool:
    """Whether compiled loops are faster than two products: depthwise, small, and height and width compressed alone."""
    small = math.prod(geometry.output_size) <= MOST_PLACES
    return geometry.is_depthwise and small and factors[0] is None and factors[1] is None


def channels_at_a_time(geometry: ConvGeometry, shape: Shape, ranks: Sequence[int | None], itemsize: int) -> int:
    """Output channels that :func:`separable_order` works on at a time: all, or whole groups in the workspace.

    Parameters
    ----------
    shape, ranks : tuple of int
        Of the output gradient and of Z, as they are multiplied.
    """
    C_out = geometry.weight_shape[0]
    sizes = [shape[0], 1, *shape[2:]]
    elements = [math.prod(sizes)]  # of one channel: its slice of G, then each product
    for mode in contraction_order(sizes, ranks):
        sizes[mode] = ranks[mode] or 1
        elements.append(math.prod(sizes))
    most = max(*(a + b for a, b in itertools.pairwise(elements)), 2 * elements[-1])  # Z is laid out once more
    fit = CONTRACTION_BYTES // (most * itemsize)
    unit = 1 if geometry.groups == 1 else C_out // geometry.groups
    return C_out if fit >= C_out else max(fit // unit, 1) * unit


def shifted_rows(factor: np.ndarray | None, geometry: ConvGeometry, axis: int) -> np.ndarray:
    """The factor's rows as each kernel offset sees them, side by side.

    Parameters
    ----------
    factor : (n, r) array or None
        None stands for the identity.
    axis : int
        0 for height, 1 for width.

    Returns
    -------
    (n_out, k·r) array
        ``[h, p·r + i] = factor[stride·h + dilation·p − before, i]``, zero outside the image.
    """
    n, k, n_out = geometry.input_shape[2 + axis], geometry.weight_shape[2 + axis], geometry.output_size[axis]
    if factor is None:
        factor = np.eye(n, dtype=np.float32)
    positions = geometry.stride[axis] * np.arange(n_out)[:, None] + geometry.dilation[axis] * np.arange(k)
    positions -= geometry.padding[axis][0]  # (n_out, k)
    inside = (positions >= 0) & (positions < n)
    rows = factor[np.where(inside, positions, 0)] * inside[..., None].astype(factor.dtype)  # (n_out, k, r)
    return rows.reshape(n_out, -1)


def _expand_channels(
    narrow: np.ndarray, U_channel: np.ndarray, geometry: ConvGeometry, groups: slice = slice(None)
) -> np.ndarray:
    """dW = Z ×₂ U_2, each group with its own rows of U_2: (o, k_h, k_w, r2) -> (o, C_in/g, k_h, k_w).

    ``groups``: those of the o output channels.
    """
    (o, k_h, k_w, r2), width = narrow.shape, geometry.weight_shape[1]
    rows = U_channel.reshape(geometry.groups, width, r2).transpose(0, 2, 1)[groups]  # (groups, r2, C_in/g)
    wide = matmul(narrow.reshape(len(rows), -1, r2), rows)  # (groups, o/groups·k_h·k_w, C_in/g)
    return np.ascontiguousarray(wide.reshape(o, k_h, k_w, width).transpose(0, 3, 1, 2))


def linear_weight_gradient(
    core: np.ndarray, factors: Factors, grad_output: np.ndarray, geometry: LinearGeometry
) -> np.ndarray:
    """Weight gradient of a linear layer: dW = (G ×₁U_1ᵀ …)ᵀ S U_Iᵀ, (O, I).

    ``factors`` are those of (batch, feature) or (batch, token, feature).
    """
    *outer, U_feature = factors
    Z = multi_mode_product(grad_output, (*(None if U is None else U.T for U in outer), None))  # (r1, .., O)
    return contract_features(Z.reshape(-1, Z.shape[-1]), core.reshape(-1, core.shape[-1]), U_feature)


def contract_features(Z: np.ndarray, S: np.ndarray, U_feature: np.ndarray | None) -> np.ndarray:
    """Zᵀ S Uᵀ in the cheaper order.

    (ZᵀS)Uᵀ takes m·O·r + O·r·I multiply-adds, Zᵀ(SUᵀ) m·r·I + m·O·I: fewer where the rows m of the core
    are fewer than its features r, as with small batches.

    Parameters
    ----------
    Z, S : (m, O), (m, r)
    U_feature : (I, r) or None
        None stands for the identity.

    Returns
    -------
    (O, I)
    """
    if U_feature is None:
        return matmul(Z.T, S)
    (m, O), (I, r) = Z.shape, U_feature.shape  # noqa: E741
    if O * r * (m + I) <= m * I * (r + O):
        return matmul(matmul(Z.T, S), U_feature.T)
    return matmul(Z.T, matmul(S, U_feature.T))


def mean_weight_gradient(mean: np.ndarray, grad_output: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Weight gradient of an input that is ``mean`` (one number per feature) at every place of every sample.

    Linear: dW = (Σ G) μᵀ. Convolution: dW[o,c,p,q] = μ_c Σ_{h,w} (Σ_b G[b,o,h,w]), over the places (h, w) from
    which kernel offset (p, q) looks into the image and not into the padding.

    Returns
    -------
    (O, I) or (C_out, C_in/g, k_h, k_w)
    """
    if isinstance(geometry, LinearGeometry):
        total = grad_output.sum(axis=tuple(range(grad_output.ndim - 1)))  # (O,)
        return matmul(total[:, None], mean[None])
    C_out, width, k_h, k_w = geometry.weight_shape
    H, W = geometry.input_shape[2:]
    rows = shifted_rows(np.ones((H, 1), mean.dtype), geometry, axis=0)  # (H_out, k_h): 1 inside, 0 outside
    columns = shifted_rows(np.ones((W, 1), mean.dtype), geometry, axis=1)  # (W_out, k_w)
    total = matmul(rows.T, matmul(grad_output.sum(axis=0), columns))  # (C_out, k_h, k_w)
    g = geometry.groups
    grouped = total.reshape(g, -1, 1)  # (g, C_out/g·k_h·k_w, 1)
    wide = matmul(grouped, mean.reshape(g, 1, width))  # (g, C_out/g·k_h·k_w, C_in/g)
    return np.ascontiguousarray(wide.reshape(C_out, k_h, k_w, width).transpose(0, 3, 1, 2))


def cheapest_order(core_shape: Shape, factors: Factors, geometry: ConvGeometry) -> tuple[str, tuple[int, ...]]:
    """The order of fewest multiply-adds: ``"papers"``, or ``"separable"`` and the modes to put back first.

    As :func:`weight_gradient` does it by default, with height and width of a small map in one product.
    """
    best: tuple[str, tuple[int, ...]] = "papers", ()
    fewest = _papers_macs(core_shape, factors, geometry)
    for expanded in EXPANSIONS:
        if any(factors[mode] is None for mode in expanded):
            continue
        shape = tuple(
            n if mode in expanded else r
            for mode, (n, r) in enumerate(zip(geometry.input_shape, core_shape, strict=True))
        )
        if expanded and math.prod(shape) > min(EXPANDED_ELEMENTS, math.prod(geometry.input_shape) // 4):
            continue
        left = [None if mode in expanded else U for mode, U in enumerate(factors)]
        macs = _chain_macs(core_shape, [n if mode in expanded else None for mode, n in enumerate(shape)])
        macs += _separable_macs(shape, left, geometry)
        if macs < fewest:
            best, fewest = ("separable", expanded), macs
    return best


def _papers_macs(core_shape: Shape, factors: Factors, geometry: ConvGeometry) -> int:
    """Multiply-adds of :func:`papers_order`."""
    B, _, H, W = geometry.input_shape
    _, C_out, H_out, W_out = geometry.output_shape
    r1, c, r3, r4 = core_shape
    U_batch, _, U_height, U_width = factors
    narrow, last = _channel_macs(c, factors, geometry)
    first = B * r1 * C_out * H_out * W_out if U_batch is not None else 0
    wide = (None, None, None if U_height is None else H, None if U_width is None else W)
    return first + _chain_macs((r1, c, r3, r4), wide) + r1 * H_out * W_out * narrow + last


def _separable_macs(core_shape: Shape, factors: Factors, geometry: ConvGeometry) -> int:
    """Multiply-adds of :func:`separable_order` with nothing to put back, and small maps in one product."""
    r1, c, r3, r4 = core_shape
    narrow, last = _channel_macs(c, factors, geometry)
    return _chain_macs(*chain_of(core_shape, factors, geometry, True)) + r1 * r3 * r4 * narrow + last


def _channel_macs(c: int, factors: Factors, geometry: ConvGeometry) -> tuple[int, int]:
    """Numbers of (the gradient with c or with its group's channels, as each meets the core; the product ×₂ U_2)."""
    C_out, width, k_h, k_w = geometry.weight_shape
    if factors[1] is None:
        return C_out * width * k_h * k_w, 0
    return C_out * c * k_h * k_w, C_out * k_h * k_w * c * width


def _chain_macs(shape: Shape, ranks: Sequence[int | None]) -> int:
    """Multiply-adds of :func:`~lance_ref.algebra.tucker.multi_mode_product` from ``shape`` to ``ranks``."""
    sizes = list(shape)
    macs = 0
    for mode in contraction_order(shape, [n if r is None else r for n, r in zip(shape, ranks, strict=True)]):
        rank = ranks[mode]
        if rank is not None:
            macs += math.prod(sizes) * rank
            sizes[mode] = rank
    return macs
