"""Convolutions as linear layers over patches: what LANCE keeps of them when single patches must be protected.

Notation. A convolution of one group sees its input as patches P (B, L, K): L = H_out·W_out places of the output,
K = C_in·k_h·k_w numbers each. With the weight as a matrix W (C_out, K) and the output gradient as tokens
G (B, L, C_out) it is a linear layer: Y_b = P_b Wᵀ and

    dW = Σ_b G_bᵀ P_b.

So a factor of the feature mode, U_f (K, r), has dŴ = dŴ U_f U_fᵀ, and UᵀM = 0 makes dŴ M = 0 for directions M of
*patches*. A factor of the channel mode protects a direction of channels at every kernel position or not at all: far
more than patches of earlier tasks fill of the K dimensions, and soon everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lance_ref.algebra import geometry as geometries
from lance_ref.algebra.basis import Basis
from lance_ref.algebra.frame import Frame
from lance_ref.algebra.geometry import ConvGeometry, Geometry
from lance_ref.algebra.grams import LayerGrams
from lance_ref.algebra.magnitude import scaled
from lance_ref.algebra.modes import contraction_order, mode_product, multi_mode_product
from lance_ref.algebra.projection import contract_features
from lance_ref.algebra.tucker import gram
from lance_ref.engine.tensor import FLOATS, Shape
from lance_ref.functional.convolution import resolve_padding
from lance_ref.nn import Conv2d
from lance_ref.stores.base import ActivationStore, check_kept

if TYPE_CHECKING:
    from lance_ref.algebra.subspace import Subspace

BATCH, TOKEN, FEATURE = 0, 1, 2
_AXES = {BATCH: 0, TOKEN: 2, FEATURE: 1}
"""Where the modes stand in a block of patches as the convolution lays them out, (b, K, l)."""


class PatchLance(ActivationStore):
    """Keep the core of the patches of a convolution in fixed subspaces: LANCE on (B, L, K).

    Forward keeps S = P ×₁U_bᵀ ×₂U_tᵀ ×₃U_fᵀ alone; backward computes the weight gradient of P's projection
    S ×₁U_b ×₂U_t ×₃U_f without forming it (Apolinario & Roy, arXiv 2509.21617, on unfolded patches). Output and input
    gradient stay exact. Patches are laid out a block at a time, in the workspace of
    :data:`lance_ref.algebra.geometry.WORKSPACE_BYTES`.

    Parameters
    ----------
    subspace : Subspace
        Of shape (B, L, K): one factor (n, r) each for batch, token and feature, None for a mode left alone.
    dtype : numpy dtype
        float32 or float64: the dtype of the activations, to which the factors are converted.

    Raises
    ------
    ValueError
        If the subspace is not one of (batch, token, feature). Later, in the forward pass: if the layer is not a
        convolution of one group, or has another number of images, places or numbers a patch than a factor.
    TypeError
        For other dtypes.

    Notes
    -----
    A token factor fixes H_out and W_out, a batch factor the batch size. At full rank the weight gradient is that of
    backpropagation, to rounding. With the feature mode alone compressed it is an orthogonal projection of it,
    dŴ = dW U_f U_fᵀ; with the batch or the token mode compressed it is not (see :class:`~lance_ref.stores.Lance`).
    """

    name = "patch-lance"
    ops = ("conv2d",)

    def __init__(self, subspace: Subspace, dtype: Any = np.float32) -> None:
        if np.dtype(dtype) not in FLOATS:
            raise TypeError(f"dtype is {np.dtype(dtype)}, expected float32 or float64")
        if len(subspace.shape) != 3:
            raise ValueError(f"subspace has shape {subspace.shape}, expected (B, L, K): batch, token and feature")
        self.shape, self.mode_names = subspace.shape, subspace.mode_names  # its float64 factors need not stay alive
        self.dtype = np.dtype(dtype)
        self.factors = tuple(None if U is None else np.ascontiguousarray(U, dtype=dtype) for U in subspace.factors)

    @property
    def by_image(self) -> bool:  # type: ignore[override]
        """Whether the batch mode is left alone."""
        return self.factors[BATCH] is None

    @property
    def ranks(self) -> tuple[int | None, ...]:
        """Rank of each mode, None for a mode left alone."""
        return tuple(None if U is None else U.shape[1] for U in self.factors)

    @property
    def factor_bytes(self) -> int:
        """Bytes of the fixed factors: not on the tape, but in memory all through training."""
        return sum(U.nbytes for U in self.factors if U is not None)

    def fixed(self) -> dict[str, np.ndarray]:
        return {f"factor_{mode}": U for mode, U in enumerate(self.factors) if U is not None}

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "ranks": self.ranks, "shape": self.shape}

    def check(self, input_shape: Shape) -> None:
        if len(input_shape) != 4:
            raise ValueError(f"activation has shape {input_shape}, expected the input of a convolution (B, C, H, W)")
        self._check_size(BATCH, input_shape[0], input_shape)

    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        raise TypeError("PatchLance needs kernel, stride and padding: call save_for(activation, geometry)")

    def save_for(self, activation: np.ndarray, geometry: Geometry) -> dict[str, np.ndarray]:
        """``core``: (r1, r2, r3), with the full size of a mode left alone."""
        if not isinstance(geometry, ConvGeometry):
            raise ValueError(f"activation has shape {activation.shape}, of a linear layer; expected a convolution's")
        check_one_group("PatchLance", geometry.groups)
        if activation.dtype != self.dtype:
            raise TypeError(f"activation has dtype {activation.dtype}, but the factors were made for {self.dtype}")
        for mode, n in enumerate(patch_shape(geometry)):
            self._check_size(mode, n, activation.shape)
        with np.errstate(invalid="ignore", over="ignore"):  # reported by name
            core = project_patches(activation, self.factors, geometry)
        check_kept("PatchLance", core, activation.shape)
        return {"core": core}

    def basis(self, groups: int, forward: str = "auto") -> Basis | None:
        """Q is the feature mode's factor; None if that mode is left alone."""
        check_one_group("PatchLance", groups)
        U_feature = self.factors[FEATURE]
        return None if U_feature is None else Basis(U_feature[None], patches=True, forward=forward)

    def update_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry, basis: Basis
    ) -> np.ndarray:
        """(G ×₁U_bᵀ ×₂U_tᵀ)ᵀ S, the weight gradient before its patches come back, (C_out, r, 1, 1)."""
        if basis.directions.base is not self.factors[FEATURE]:
            return super().update_gradient(saved, grad_output, geometry, basis)
        return self._gradient(saved, grad_output, None)[:, :, None, None]

    def weight_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        """dW = (G ×₁U_bᵀ ×₂U_tᵀ)ᵀ S U_fᵀ, of the weight's shape."""
        wide = self._gradient(saved, grad_output, self.factors[FEATURE])  # (C_out, K)
        return wide.reshape(geometry.weight_shape)  # (C_out, C_in, k_h, k_w)

    def _gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, U_feature: np.ndarray | None
    ) -> np.ndarray:
        U_batch, U_token, _ = self.factors
        B, C_out = grad_output.shape[:2]
        tokens = grad_output.reshape(B, C_out, -1)  # (B, C_out, L)
        outer = (None if U_batch is None else U_batch.T, None, None if U_token is None else U_token.T)
        Z = multi_mode_product(tokens, outer)  # (r1, C_out, r2)
        rows, core = Z.transpose(0, 2, 1).reshape(-1, C_out), saved["core"]  # (r1·r2, C_out)
        return contract_features(rows, core.reshape(-1, core.shape[-1]), U_feature)

    def _check_size(self, mode: int, n: int, input_shape: Shape) -> None:
        U = self.factors[mode]
        if U is not None and len(U) != n:
            what = ("images", "places of the output", "numbers a patch")[mode]
            raise ValueError(
                f"activation has shape {input_shape}, which makes {n} {what}, but the {self.mode_names[mode]} "
                f"mode was calibrated with {len(U)} (shape {self.shape})"
            )


# ---- patches in blocks ---------------------------------------------------------------------


def patch_shape(geometry: ConvGeometry) -> Shape:
    """(B, L, K): images, places of the output, numbers a patch.

    >>> patch_shape(ConvGeometry((8, 3, 6, 7), (5, 3, 2, 3), stride=(2, 1)))
    (8, 15, 18)
    """
    H_out, W_out = geometry.output_size
    return geometry.input_shape[0], H_out * W_out, math.prod(geometry.weight_shape[1:])


def geometry_of(layer: Conv2d, input_shape: Shape) -> ConvGeometry:
    """The sizes of one call of ``layer`` on an input of that shape."""
    size = input_shape[2], input_shape[3]
    padding = resolve_padding(layer.padding, size, layer.kernel_size, layer.stride, layer.dilation)
    return ConvGeometry(input_shape, layer.weight.shape, layer.stride, padding, layer.dilation, layer.groups)


def check_one_group(subject: str, groups: int) -> None:
    """Raise ValueError unless ``groups`` is 1: with more, no row of the weight meets a whole patch."""
    if groups != 1:
        raise ValueError(
            f"{subject}: the convolution has groups = {groups}, expected 1: unfolded patches are tokens of a linear "
            "layer only if every output channel sees all of a patch"
        )


def project_patches(activation: np.ndarray, factors: Sequence[np.ndarray | None], geometry: ConvGeometry) -> np.ndarray:
    """The core S = P ×₁U_bᵀ ×₂U_tᵀ ×₃U_fᵀ (r1, r2, r3) of the patches P (B, L, K), a block of them at a time.

    The products are taken in the cheapest order of the whole (B, L, K), and the mode among batch and token that comes
    first in it is summed over in the inner loop; so the multiply-adds do not depend on the size of the blocks.

    ``factors`` are (n, r) arrays for batch, token and feature, or None, which leaves the full size of the mode.
    """
    shape = patch_shape(geometry)
    order = contraction_order(shape, [None if U is None else U.shape[1] for U in factors])
    inner = next((mode for mode in order if mode != FEATURE), None)  # summed first
    outer = TOKEN if inner == BATCH else BATCH
    first = len(order) if inner is None else order.index(inner) + 1
    second = order.index(outer) + 1 if outer in order else len(order)
    early, middle, late = order[:first], order[first:second], order[second:]  # per block, per outer block, in the end
    sizes = [
        n if U is None or mode in late else U.shape[1] for mode, (n, U) in enumerate(zip(shape, factors, strict=True))
    ]
    core = np.zeros((sizes[BATCH], sizes[FEATURE], sizes[TOKEN]), activation.dtype)
    for outer_block, inner_blocks in _nest(geometry, activation.itemsize, outer, summed=inner is not None):
        total: np.ndarray | None = None
        for inner_block in inner_blocks:
            images, rows = (outer_block, inner_block) if outer == BATCH else (inner_block, outer_block)
            places = slice(rows.start * geometry.output_size[1], rows.stop * geometry.output_size[1])
            own = {BATCH: images, TOKEN: places, FEATURE: slice(None)}
            block = geometry.patches(activation[images], rows)[:, 0]  # (b, K, l)
            block = _contract(block, early, factors, own)
            total = block if total is None else np.add(total, block, out=total)
        assert total is not None
        at = [own[mode] if factors[mode] is None else slice(None) for mode in (BATCH, TOKEN)]
        core[at[0], :, at[1]] += _contract(total, middle, factors, own)
    core = _contract(core, late, factors, {mode: slice(None) for mode in late})
    return np.ascontiguousarray(core.transpose(0, 2, 1))  # (r1, r2, r3)


def _contract(
    block: np.ndarray, modes: Sequence[int], factors: Sequence[np.ndarray | None], own: Mapping[int, slice]
) -> np.ndarray:
    """A block (b, K, l) times the factors of ``modes``, in this order; of each the rows that belong to the block."""
    for mode in modes:
        U = factors[mode]
        assert U is not None
        block = mode_product(block, U[own[mode]].T, _AXES[mode])
    return block


def _nest(
    geometry: ConvGeometry, itemsize: int, outer: int, summed: bool = True
) -> Iterator[tuple[slice, Sequence[slice]]]:
    """Blocks of patches within the workspace: (outer, all inner ones), of images and output rows.

    The outer axis (BATCH or TOKEN) is cut first, the inner one only where a single image, or a row of all images, does
    not fit. Where nothing is ``summed`` over the inner axis, every block comes alone.
    """
    B, _, K = patch_shape(geometry)
    H_out, W_out = geometry.output_size
    n_outer, n_inner = (B, H_out) if outer == BATCH else (H_out, B)
    rows = max(1, geometries.WORKSPACE_BYTES // (K * W_out * itemsize))  # that fit, of one image or of several
    inner_blocks = _cut(n_inner, min(n_inner, rows))
    for outer_block in _cut(n_outer, max(1, rows // n_inner)):
        if summed:
            yield outer_block, inner_blocks
        else:
            yield from ((outer_block, [inner_block]) for inner_block in inner_blocks)


def _cut(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


# ---- calibration ---------------------------------------------------------------------------


class PatchGrams(LayerGrams):
    """Gram matrices of the modes (batch, token, feature) of a convolution's patches, in float64.

    ``layer`` is a Conv2d of one group at ``path``, and ``input_shape`` that of its activations, (B, C_in, H, W).
    Directions of ``frame``, which is taken out of the patches first, are directions of patches, (K, m).
    """

    def __init__(
        self, path: str, layer: Conv2d, input_shape: Shape, selected: Sequence[bool], frame: Frame | None = None
    ) -> None:
        check_one_group(f"layer {path!r}", layer.groups)
        self.conv = layer
        super().__init__(path, patch_shape(geometry_of(layer, input_shape)), selected, frame)

    def add(self, activation: np.ndarray, again: bool = False) -> None:
        """Add the Grams of one activation's (B, C_in, H, W) patches, laid out a block at a time.

        Raises ValueError and TypeError as :meth:`LayerGrams.add` does.
        """
        if activation.dtype not in FLOATS:
            raise TypeError(f"layer {self.layer!r}: activation is {activation.dtype}, expected float32 or float64")
        geometry = geometry_of(self.conv, activation.shape)
        self._check_shape(patch_shape(geometry), "the patches of an activation have", "that of the first batch")
        activation = self._in_unit(activation)
        # a mean is in the unit of the activations; protected directions have none
        frame = Frame(self.frame.protected, None if self.frame.mean is None else scaled(self.frame.mean, -self.unit))
        for mode, total in enumerate(self.grams):
            if total is None:
                continue
            for images, rows in whole_blocks(geometry, activation.itemsize, mode):
                block = geometry.patches(activation[images], rows)[:, 0]  # (b, K, l)
                total += gram(frame.apply(block.transpose(0, 2, 1)), mode)  # of (b, l, K)
        self._count(activation.shape[0], again)


def whole_blocks(geometry: ConvGeometry, itemsize: int, mode: int) -> Iterator[tuple[slice, slice]]:
    """(images, output rows) of blocks, within the workspace where that can be, that hold all of one mode.

    For BATCH all images, for TOKEN all rows; FEATURE is whole in any block.
    """
    outer = TOKEN if mode == BATCH else BATCH
    for first, rest in _nest(geometry, itemsize, outer):
        second = rest if mode == FEATURE else [slice(0, rest[-1].stop)]
        yield from ((first, s) if outer == BATCH else (s, first) for s in second)


def patch_tokens(geometry: ConvGeometry, activation: np.ndarray) -> Iterator[np.ndarray]:
    """All patches of ``activation`` as tokens (b, l, K), in blocks within the workspace."""
    for images, rows in whole_blocks(geometry, activation.itemsize, FEATURE):
        yield geometry.patches(activation[images], rows)[:, 0].transpose(0, 2, 1)  # (b, l, K)
