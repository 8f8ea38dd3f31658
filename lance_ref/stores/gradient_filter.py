"""Gradient filtering: both gradients of a layer from patch sums and patch means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lance_ref.algebra.geometry import ConvGeometry, Geometry, LinearGeometry
from lance_ref.stores.base import ActivationStore, check_kept


@dataclass(frozen=True)
class Windows:
    """``count`` windows of ``length`` places, side by side over an axis of ``size`` places that is centred in them.

    Windows at the ends may reach beyond the axis, or lie beyond it; or the axis beyond the windows.
    """

    size: int
    length: int
    count: int

    @property
    def before(self) -> int:
        """Places of the first windows that lie before the axis, ⌈(count·length − size) / 2⌉; negative: cropped places.

        >>> Windows(5, 2, 3).before, Windows(5, 1, 3).before
        (1, -1)
        """
        return -((self.size - self.count * self.length) // 2)

    @property
    def places(self) -> np.ndarray:
        """Number of places of the axis in each window.

        >>> Windows(5, 2, 3).places
        array([1, 2, 2])
        """
        edges = np.arange(self.count + 1) * self.length - self.before
        return np.diff(np.clip(edges, 0, self.size))

    def pairs(self) -> Iterator[tuple[slice, slice]]:
        """(windows, places): for each offset into a window, those that have that place, and where it is.

        >>> [(list(range(*w.indices(3))), list(range(*p.indices(5)))) for w, p in Windows(5, 2, 3).pairs()]
        [([1, 2], [1, 3]), ([0, 1, 2], [0, 2, 4])]
        """
        for offset in range(self.length):
            place = offset - self.before  # in window 0
            first = max(0, -(place // self.length))
            place += first * self.length
            n = min(self.count - first, -((place - self.size) // self.length))
            if n > 0:
                yield slice(first, first + n), slice(place, place + (n - 1) * self.length + 1, self.length)


class Cut(NamedTuple):
    """How one axis is cut into patches, on the input's side and on the output's."""

    axis: int
    inputs: Windows
    outputs: Windows


class GradientFilter(ActivationStore):
    """Keep patch sums of the activation, and average the output gradient over patches (Yang et al., CVPR 2023).

    The output map is cut into r × r patches, r = ``patch``, the input map into as many windows of
    (s_h·r) × (s_w·r) for a stride (s_h, s_w). With Â the sums of A over its windows and Ḡ the means of G over
    its patches, and i running over images and patches,

        dW[o, c, p, q] = Σ_i Ḡ[i, o] · Â[i, c]              the same for every kernel position (p, q)
        dA[i, c]       = Σ_o Ḡ[i, o] · Σ_{p,q} W[o, c, p, q]   the same at every place of window i

    so neither gradient is exact, and all layers below get filtered gradients too. This is the official
    implementation's arithmetic: ⌈n_out/r⌉ patches an axis; the maps are centred in their patches (of an odd
    number of zeros the larger half goes before); Â counts zeros of the padding, Ḡ divides by the number of
    places that are inside the map. A map smaller than a patch is one patch.

    Parameters
    ----------
    patch : int
        r, at least 1.

    Notes
    -----
    * Stride: a window sums s_h·s_w input places for each output place, so on slowly varying maps both gradients
      of a strided convolution come out s_h·s_w times as large as backpropagation's. That is the published
      method, and is left as it is.
    * Dilation d: the published code leaves the kernel whole where d ≥ r and d > 1, and lets it reach ⌊d/r⌋
      patches far; so does this one, axis by axis, with s·r in place of r where there is a stride.
    * The published code knows one group and depthwise convolutions (C_out = C_in). Here any number of groups is
      filtered group by group. It also expects "same" padding; where the output map is so small that the windows
      do not cover the input, the input is cropped alike on both sides, and dA is 0 out there. Padding that differs
      from side to side is not looked at either: both maps are centred all the same.
    * Linear layers, which the paper does not treat: (B, L, I) is a 1×1 convolution along the tokens, in patches of
      r tokens; for (B, I) there is nothing to average, so everything is exact and the activation itself is kept.
    * Transposed convolutions, and convolutions of volumes, the paper does not treat, and nor does this store
      (:attr:`ops`): an input place of theirs meets several output patches, or has a third direction to cut.
    * r = 1 is exact for linear layers, and for 1×1 kernels with stride 1 and padding alike on both sides.
    """

    name = "gradient-filter"
    ops = ("linear", "conv2d")
    by_image = True

    def __init__(self, patch: int) -> None:
        if isinstance(patch, bool) or not isinstance(patch, (int, np.integer)) or patch < 1:
            raise ValueError(f"patch is {patch!r}, expected a positive integer")
        self.patch = int(patch)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "patch": self.patch}

    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        raise TypeError("GradientFilter needs stride and output size: call save_for(activation, geometry)")

    def save_for(self, activation: np.ndarray, geometry: Geometry) -> dict[str, np.ndarray]:
        """Â: (B, C_in, P_h, P_w), or (B, P, I); the activation itself where every window is one place."""
        sums = activation
        with np.errstate(invalid="ignore", over="ignore"):  # reported by name
            for cut in self.cuts(geometry):
                sums = sum_windows(sums, cut.axis, cut.inputs)
        check_kept("GradientFilter", sums, activation.shape)
        return {"patch_sums": sums}

    def weight_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        """Σ_i Ḡ[i, o] · Â[i, c], repeated over the kernel."""
        sums, means = saved["patch_sums"], self.means(grad_output, geometry)
        if isinstance(geometry, LinearGeometry):
            return LinearGeometry(sums.shape, geometry.weight_shape).weight_gradient(sums, means)
        assert isinstance(geometry, ConvGeometry)
        point = ConvGeometry(sums.shape, (*geometry.weight_shape[:2], 1, 1), groups=geometry.groups)
        return np.ascontiguousarray(np.broadcast_to(point.weight_gradient(sums, means), geometry.weight_shape))

    def input_gradient(self, weight: np.ndarray, grad_output: np.ndarray, geometry: Geometry) -> np.ndarray:
        """Σ_o Ḡ[i, o] · ΣW, spread over each window."""
        cuts, means = self.cuts(geometry), self.means(grad_output, geometry)
        if isinstance(geometry, LinearGeometry):
            grad = LinearGeometry((*means.shape[:-1], weight.shape[1]), weight.shape).input_gradient(weight, means)
        else:
            assert isinstance(geometry, ConvGeometry)
            reach = self.reach(geometry)
            summed = tuple(2 + i for i, e in enumerate(reach) if e == 0)
            kernel = weight.sum(axis=summed, keepdims=True) if summed else weight
            before = [e * (k - 1) // 2 for e, k in zip(reach, kernel.shape[2:], strict=True)]
            after = [e * (k - 1) - b for e, k, b in zip(reach, kernel.shape[2:], before, strict=True)]
            on_patches = ConvGeometry(
                (means.shape[0], geometry.input_shape[1], *means.shape[2:]),
                kernel.shape,
                padding=((before[0], after[0]), (before[1], after[1])),
                dilation=(max(reach[0], 1), max(reach[1], 1)),
                groups=geometry.groups,
            )
            grad = on_patches.input_gradient(kernel, means)
        for cut in reversed(cuts):  # whole rows last, they lie together
            grad = spread(grad, cut.axis, cut.inputs)
        return grad

    # ---- patches ---------------------------------------------------------------------------

    def cuts(self, geometry: Geometry) -> Sequence[Cut]:
        """The axes that are cut: height and width, or the tokens, or none; those cut into single places left out."""
        shape, out = geometry.input_shape, geometry.output_shape
        if isinstance(geometry, ConvGeometry):
            strides = {2: geometry.stride[0], 3: geometry.stride[1]}  # by axis
        else:
            strides = {len(shape) - 2: 1} if len(shape) > 2 else {}
        cuts = []
        for axis, s in strides.items():
            count = -(-out[axis] // self.patch)
            if (self.patch * s, out[axis]) != (1, shape[axis]):
                inputs = Windows(shape[axis], self.patch * s, count)
                cuts.append(Cut(axis, inputs, Windows(out[axis], self.patch, count)))
        return cuts

    def means(self, grad_output: np.ndarray, geometry: Geometry) -> np.ndarray:
        """Ḡ: (B, C_out, P_h, P_w), or (B, P, O)."""
        for cut in self.cuts(geometry):
            along = [-1 if axis == cut.axis else 1 for axis in range(grad_output.ndim)]
            grad_output = sum_windows(grad_output, cut.axis, cut.outputs)
            grad_output /= cut.outputs.places.astype(grad_output.dtype).reshape(along)
        return grad_output

    def reach(self, geometry: ConvGeometry) -> tuple[int, int]:
        """Patches from one kernel position to the next, for height and width; 0 where the whole kernel sees one."""
        e = [0 if d == 1 else d // (s * self.patch) for d, s in zip(geometry.dilation, geometry.stride, strict=True)]
        return e[0], e[1]


def sum_windows(array: np.ndarray, axis: int, windows: Windows) -> np.ndarray:
    """Sums of ``array`` over the windows of one axis, 0 for an empty window."""
    sums = np.zeros((*array.shape[:axis], windows.count, *array.shape[axis + 1 :]), array.dtype)
    before = (slice(None),) * axis
    for at, places in windows.pairs():
        sums[(*before, at)] += array[(*before, places)]
    return sums


def spread(array: np.ndarray, axis: int, windows: Windows) -> np.ndarray:
    """The opposite of :func:`sum_windows`: every window's value at each of its places, 0 at cropped ones."""
    result = np.zeros((*array.shape[:axis], windows.size, *array.shape[axis + 1 :]), array.dtype)
    before = (slice(None),) * axis
    for at, places in windows.pairs():
        result[(*before, places)] = array[(*before, at)]
    return result
