"""LANCE's arithmetic, line by line as its equations: the core of an activation, and the weight gradient from it.

Notation. A (B, C, H, W) is a convolution's input, G (B, C_out, H_out, W_out) the gradient of its
output, U_1..U_4 the fixed factors (n, r) of batch, channel, height and width, and
S = A ×₁U_1ᵀ ×₂U_2ᵀ ×₃U_3ᵀ ×₄U_4ᵀ the core. Wanted is the weight gradient of Ã = S ×₁U_1 ×₂U_2 ×₃U_3 ×₄U_4,
without ever forming Ã. A factor of None leaves its mode alone: no product, no cost. Numbers in brackets are those of
the equations in ``docs/what_lance_is.md``. A map of volumes has a depth before height and width, and one more factor.
A transposed convolution shows other places of the input to the kernel (:meth:`Convolution.seen
<lance_ref.algebra.convolution.Convolution.seen>`), and everything else is the same.

Two orders of contraction give the same result:

* :func:`papers_order` (Nguyen et al. 2024, Apolinario & Roy 2025) puts height and width of the core back to full size
  and correlates the core with the projected G;
* :func:`separable_order` contracts G with shifted rows of U_3 and U_4, so that no spatial map is formed
  and every step is a matrix product.

Stores call :mod:`lance_ref.algebra.projection_fast`, which takes the same steps in less time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lance_ref.algebra.convolution import Convolution, Geometry
from lance_ref.algebra.frame import feature_mode
from lance_ref.algebra.geometry import LinearGeometry
from lance_ref.algebra.kernels.threads import offsets_first
from lance_ref.algebra.modes import mode_product, multi_mode_product
from lance_ref.engine.counting import matmul
from lance_ref.engine.tensor import Shape

Factors = Sequence[np.ndarray | None]
"""One (n, r) matrix with orthonormal columns per mode, or None for a mode that is left alone."""


def transposed(factors: Factors) -> Factors:
    return [None if U is None else U.T for U in factors]


# ---- forward -----------------------------------------------------------------------------


def project(activation: np.ndarray, factors: Factors) -> np.ndarray:
    """The core S = A ×₁U_1ᵀ ×₂U_2ᵀ … (4), one mode after the other.

    Returns
    -------
    Array of the ranks' shape, in a buffer of its own (a copy if no mode is compressed).
    """
    core = multi_mode_product(activation, transposed(factors))
    # A view of A on the tape would keep the whole of A alive.
    return core.copy() if np.may_share_memory(core, activation) else core


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


# ---- backward: a convolution ---------------------------------------------------------------


def papers_order(core: np.ndarray, factors: Factors, grad_output: np.ndarray, geometry: Convolution) -> np.ndarray:
    """Weight gradient of a convolution in the papers' order, (5) to (8).

    Z1 = G ×₁ U_1ᵀ;  Z2 = S ×₃ U_3 ×₄ U_4;  Z3 = correlate(Z2, Z1);  dW = Z3 ×₂ U_2.

    Parameters
    ----------
    core : array of the ranks' shape
    factors : sequence of (n, r) arrays or None, one per mode
    grad_output : array of ``geometry.output_shape``
    geometry : Convolution

    Returns
    -------
    Array of ``geometry.weight_shape``: (C_out, C_in/g, k_h, k_w), unless it is transposed or of volumes.
    """
    U_batch, U_channel, *U_map = factors
    # (5) The weight gradient sums over the images of A and G, so G has to be in the same r1 directions as S.
    Z1 = multi_mode_product(grad_output, transposed((U_batch, *[None] * (grad_output.ndim - 1))))
    # (r1, C_out, H_out, W_out)
    # (6) The kernel slides over places, not over directions: height and width come back.
    Z2 = multi_mode_product(core, (None, None, *U_map))  # (r1, r2, H, W)
    # (7) This is the exact weight gradient of a layer with r1 images and r2 channels.
    narrow = narrow_layer(core, U_channel, geometry)
    Z3 = narrow.weight_gradient(Z2, Z1)  # (C_out, r2, k_h, k_w)
    # (8) Nothing was summed over the channels, so they come back last, when there are no places any more.
    return channels_of_narrow(Z3, narrow, U_channel, geometry)


def separable_order(core: np.ndarray, factors: Factors, grad_output: np.ndarray, geometry: Convolution) -> np.ndarray:
    """Weight gradient of a convolution in the separable order, with arguments and result of :func:`papers_order`.

    Put (6) into (7) and sum over the places first. With U_3^(p)[h'] = U_3[s·h' + d·p − top] (zero outside) for each
    kernel row p, and U_4^(q) likewise:

    Z = G ×₁ U_1ᵀ ×₃ [U_3^(p)]ᵀ ×₄ [U_4^(q)]ᵀ  ∈ (r1, C_out, k_h·r3, k_w·r4);
    dW[o,:,p,q] = U_2 Σ_{a,i,j} Z[a, o, (p,i), (q,j)] · S[a, :, i, j].
    """
    U_batch, U_channel, *U_map = factors
    # The kernel slides over the rows of U_3 and U_4, which are few numbers, and not over a map.
    shifted = [shifted_rows(U, geometry, axis) for axis, U in enumerate(U_map)]
    # G is summed over images and places and is from then on as small as the core, once for each kernel offset.
    of_map = [matrix.astype(grad_output.dtype, copy=False) for matrix in shifted]
    Z = multi_mode_product(grad_output, transposed((U_batch, None, *of_map)))  # (r1, C_out, k_h·r3, k_w·r4)
    Z3 = multiply_by_core(Z, lay_out(core, U_channel, geometry), core.shape, geometry)  # (C_out, k_h, k_w, r2)
    # (8) The channels come back last, as in the papers' order.
    return geometry.as_weight(put_channels_back(Z3, rows_of_groups(U_channel, geometry)))


def shifted_rows(factor: np.ndarray | None, geometry: Convolution, axis: int) -> np.ndarray:
    """The factor's rows as each kernel offset sees them, side by side.

    Parameters
    ----------
    factor : (n, r) array or None
        None stands for the identity.
    axis : int
        0 for height, 1 for width; with a depth this is 0, and the others are 1 and 2.

    Returns
    -------
    (n_out, k·r) array
        ``[h, p·r + i] = factor[seen(h, p), i]``, with seen(h, p) = stride·h + dilation·p − before unless it is a
        transposed convolution; zero outside the image.
    """
    n = geometry.input_shape[2 + axis]
    if factor is None:
        factor = np.eye(n, dtype=np.float32)
    positions = geometry.seen(axis)  # (n_out, k)
    # Padding is zero in every direction, so a row outside the image is a row of zeros.
    inside = (positions >= 0) & (positions < n)
    rows = factor[np.where(inside, positions, 0)] * inside[..., None].astype(factor.dtype)  # (n_out, k, r)
    return rows.reshape(len(rows), -1)


def narrow_layer(core: np.ndarray, U_channel: np.ndarray | None, geometry: Convolution) -> Convolution:
    """The convolution of (7): its input is the core with height and width put back."""
    # A direction mixes channels of all groups, so every output channel sees all r2 of them.
    return geometry.with_channels(core.shape[0], core.shape[1], mixed=U_channel is not None)


def channels_of_narrow(
    Z3: np.ndarray, narrow: Convolution, U_channel: np.ndarray | None, geometry: Convolution
) -> np.ndarray:
    """dW = Z3 ×₂ U_2 (8) of a weight gradient Z3 of :func:`narrow_layer`; Z3 itself where channels are left alone."""
    if U_channel is None:
        return Z3
    Z3 = np.moveaxis(narrow.outputs_first(Z3), 1, -1)  # (C_out, k_h, k_w, r2)
    return geometry.as_weight(put_channels_back(Z3, rows_of_groups(U_channel, geometry)))


def lay_out(core: np.ndarray, U_channel: np.ndarray | None, geometry: Convolution) -> np.ndarray:
    """The core as the matrix that Z is multiplied by, (g, r1·r3·r4, r2/g): one for each group, or one for all."""
    (r1, c, *r), g = core.shape, 1 if U_channel is not None else geometry.groups
    return core.reshape(r1, g, c // g, math.prod(r)).transpose(1, 0, 3, 2).reshape(g, r1 * math.prod(r), c // g)


def multiply_by_core(Z: np.ndarray, S: np.ndarray, ranks: Shape, geometry: Convolution) -> np.ndarray:
    """Z3[o,p,q,:] = Σ_{a,i,j} Z[a, o, (p,i), (q,j)] · S[a, :, i, j], (o, k_h, k_w, r2).

    ``Z`` may have some output channels alone; ``S`` then has the groups of these.
    """
    (r1, _, *r), kernel, o = ranks, geometry.kernel, Z.shape[1]
    # The offsets (p, q) stay and (a, i, j) are summed over, so these have to lie side by side.
    pairs = [size for pair in zip(kernel, r, strict=True) for size in pair]  # k_h, r3, k_w, r4
    Z = offsets_first(Z.reshape(r1, o, *pairs)).reshape(len(S), -1, r1 * math.prod(r))
    return matmul(Z, S).reshape(o, *kernel, S.shape[2])


def rows_of_groups(U_channel: np.ndarray | None, geometry: Convolution) -> np.ndarray | None:
    """The rows of U_2 that belong to each group's channels, (g, r2, C_in/g)."""
    if U_channel is None:
        return None
    return U_channel.reshape(geometry.groups, geometry.width, -1).transpose(0, 2, 1)


def put_channels_back(Z3: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """dW = Z3 ×₂ U_2 (8), each group with its own rows of U_2: (o, k_h, k_w, r2) -> (o, C_in/g, k_h, k_w)."""
    if rows is not None:
        Z3 = matmul(Z3.reshape(len(rows), -1, Z3.shape[-1]), rows).reshape(*Z3.shape[:-1], -1)
    return np.ascontiguousarray(np.moveaxis(Z3, -1, 1))


# ---- backward: a linear layer, and a mean --------------------------------------------------------


def linear_weight_gradient(
    core: np.ndarray, factors: Factors, grad_output: np.ndarray, geometry: LinearGeometry
) -> np.ndarray:
    """Weight gradient of a linear layer: dW = (G ×₁U_1ᵀ …)ᵀ S U_Iᵀ, (O, I).

    ``factors`` are those of (batch, feature) or (batch, token, feature).
    """
    *outer, U_feature = factors
    # (5) G in the directions of batch and tokens, over which the weight gradient sums.
    Z = multi_mode_product(grad_output, transposed((*outer, None)))  # (r1, .., O)
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
    # S Uᵀ as (U Sᵀ)ᵀ: BLAS lays out the second matrix anew, and does well to have it small.
    return matmul(Z.T, matmul(U_feature, np.ascontiguousarray(S.T)).T)


def mean_weight_gradient(mean: np.ndarray, grad_output: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Weight gradient of an input that is ``mean`` (one number per feature) at every place of every sample.

    Linear: dW = (Σ G) μᵀ. Convolution: dW[o,c,p,q] = μ_c Σ_{h,w} (Σ_b G[b,o,h,w]), over the places (h, w) from
    which kernel offset (p, q) looks into the image and not into the padding.

    Returns
    -------
    Array of ``geometry.weight_shape``: (O, I) or (C_out, C_in/g, k_h, k_w), unless it is transposed or of volumes.
    """
    if isinstance(geometry, LinearGeometry):
        total = grad_output.sum(axis=tuple(range(grad_output.ndim - 1)))  # (O,)
        return matmul(total[:, None], mean[None])
    assert isinstance(geometry, Convolution)
    total = grad_output.sum(axis=0)  # (C_out, H_out, W_out)
    # A map of ones has rank one in height and width, so the sum over places is separable, too.
    for axis in reversed(range(len(geometry.kernel))):
        n = geometry.input_shape[2 + axis]
        inside = shifted_rows(np.ones((n, 1), mean.dtype), geometry, axis)  # (n_out, k): 1 inside, 0 outside
        total = mode_product(total, inside.T, 1 + axis)  # in the end (C_out, k_h, k_w)
    return geometry.as_weight(put_channels_back(total[..., None], mean.reshape(geometry.groups, 1, -1)))
