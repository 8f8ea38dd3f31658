"""ONNX's Resize and Upsample, and the moves of channels to places and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.onnx.file import Node
from analysis.onnx.host import argument, axes_of, integers
from analysis.onnx.numbers import Inputs
from lance_ref import functional as F
from lance_ref.engine.tensor import Tensor

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


def _resize(node: Node, x: Inputs) -> Tensor:
    tensor = x[0]
    old, axes = tensor.shape, node.attributes.get("axes")
    named = axes_of(axes, tensor.ndim) if axes else list(range(tensor.ndim))
    scales, sizes = _scales_and_sizes(node, x)
    if sizes is not None:
        new = {axis: int(n) for axis, n in zip(named, sizes, strict=True)}
        factors = {axis: n / old[axis] for axis, n in new.items()}
    else:
        factors = {axis: float(f) for axis, f in zip(named, scales, strict=True)}
        new = {axis: math.floor(old[axis] * factor) for axis, factor in factors.items()}
    for name, allowed in (("antialias", 0), ("exclude_outside", 0), ("keep_aspect_ratio_policy", "stretch")):
        if node.attributes.get(name, allowed) != allowed:
            raise ValueError(f"{name} is {node.attributes[name]!r}, expected {allowed!r}")
    mode = node.attributes.get("mode", "nearest")
    where = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    if node.op == "Upsample" or node.opset < 11:
        where = "asymmetric"
    changed = [axis for axis in new if new[axis] != old[axis] or factors[axis] != 1]
    if not changed:
        return tensor
    if mode == "nearest":
        return _nearest(node, tensor, new, factors, where)
    if mode == "linear":
        return _linear(tensor, changed, new, factors, where, sizes is not None)
    raise ValueError(f"mode is {mode!r}, expected 'nearest' or 'linear'")


def _scales_and_sizes(node: Node, x: Inputs) -> tuple[Any, Any]:
    """What a node says of the result: factors, or sizes."""
    if node.op == "Upsample" or (len(x) == 2 and node.opset < 11):
        return argument(node, x, 1, "scales"), None
    scales, sizes = (*x[2:], None, None)[:2]
    if scales is not None and np.size(scales):
        return np.asarray(scales), None
    if sizes is None:
        raise ValueError("neither scales nor sizes are known beforehand")
    return None, integers(sizes, "sizes")


def _nearest(node: Node, x: Tensor, new: dict[int, int], factors: dict[int, float], where: str) -> Tensor:
    """PyTorch's operation where it gives the same places, else the places one axis after the other."""
    places = {axis: _places(x.shape[axis], new[axis], factors[axis], where, node) for axis in new}
    spatial = range(2, x.ndim)
    size = tuple(new.get(axis, x.shape[axis]) for axis in spatial)
    same = all(np.array_equal(places[axis], np.arange(x.shape[axis])) for axis in new if axis < 2)
    asked = [
        np.array_equal(places[axis], np.minimum(np.arange(new[axis]) * x.shape[axis] // new[axis], x.shape[axis] - 1))
        for axis in new
        if axis >= 2
    ]
    if x.ndim in (3, 4, 5) and same and all(asked):
        return F.interpolate(x, size)
    for axis, chosen in places.items():
        if not np.array_equal(chosen, np.arange(x.shape[axis])):
            x = x[(slice(None),) * axis + (chosen,)]
    return x


def _places(n: int, m: int, factor: float, where: str, node: Node) -> np.ndarray:
    """The place of each of m results on an axis of n."""
    at = np.arange(m)
    source: np.ndarray
    if where == "asymmetric":
        source = at / factor
    elif where in ("half_pixel", "pytorch_half_pixel"):
        source = (at + 0.5) / factor - 0.5 if m > 1 or where == "half_pixel" else np.zeros(1)
    elif where == "align_corners":
        source = at * ((n - 1) / (m - 1) if m > 1 else 0.0)
    else:
        raise ValueError(f"coordinate_transformation_mode is {where!r}, which is not known here")
    rounding = node.attributes.get("nearest_mode", "round_prefer_floor")
    if node.op == "Upsample" or node.opset < 11:
        rounding = "floor"
    rounds: dict[str, Any] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda s: np.ceil(s - 0.5),
        "round_prefer_ceil": lambda s: np.floor(s + 0.5),
    }
    if rounding not in rounds:
        raise ValueError(f"nearest_mode is {rounding!r}, expected one of {', '.join(rounds)}")
    return np.clip(rounds[rounding](source), 0, n - 1).astype(np.intp)


def _linear(
    x: Tensor, changed: Sequence[int], new: dict[int, int], factors: dict[int, float], where: str, by_size: bool
) -> Tensor:
    if x.ndim not in _LINEAR or min(changed) < 2:
        raise ValueError(f"x has shape {x.shape} and axes {list(changed)} change, expected axes behind the channels")
    if where not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise ValueError(f"coordinate_transformation_mode is {where!r}, expected 'half_pixel' or 'align_corners'")
    spatial = range(2, x.ndim)
    size = tuple(new.get(axis, x.shape[axis]) for axis in spatial)
    if where == "pytorch_half_pixel" and any(m == 1 != x.shape[axis] for axis, m in zip(spatial, size, strict=True)):
        raise ValueError("coordinate_transformation_mode is 'pytorch_half_pixel', for an axis that becomes 1")
    options: dict[str, Any] = {"mode": _LINEAR[x.ndim], "align_corners": where == "align_corners"}
    if by_size or where == "align_corners":
        return F.interpolate(x, size, **options)
    return F.interpolate(x, scale_factor=tuple(factors.get(axis, 1.0) for axis in spatial), **options)


def _depth_to_space(node: Node, x: Inputs) -> Tensor:
    B, C, H, W = x[0].shape
    b = node.attributes["blocksize"]
    if node.attributes.get("mode", "DCR") == "DCR":
        apart, order = (B, b, b, C // b**2, H, W), (0, 3, 4, 1, 5, 2)
    else:
        apart, order = (B, C // b**2, b, b, H, W), (0, 1, 4, 2, 5, 3)
    return F.reshape(F.permute(F.reshape(x[0], apart), order), (B, C // b**2, H * b, W * b))


def _space_to_depth(node: Node, x: Inputs) -> Tensor:
    B, C, H, W = x[0].shape
    b = node.attributes["blocksize"]
    apart = F.reshape(x[0], (B, C, H // b, b, W // b, b))
    order = (0, 3, 5, 1, 2, 4) if node.attributes.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return F.reshape(F.permute(apart, order), (B, C * b**2, H // b, W // b))


RESIZING = {
    "Resize": _resize,
    "Upsample": _resize,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
"""What each of these operations is here."""
