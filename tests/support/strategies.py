"""Random layer geometries, shared by the property tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from lance_ref.algebra.geometry import ConvGeometry, Geometry, LinearGeometry
from lance_ref.algebra.volumes import TransposedGeometry, VolumeGeometry


@st.composite
def conv_geometries(draw: Any, depthwise: bool | None = None) -> ConvGeometry:
    """Any convolution with small sizes: groups, stride, dilation per axis, asymmetric padding."""
    if depthwise is None:
        depthwise = draw(st.booleans())
    if depthwise:
        groups, in_width = draw(st.integers(2, 5)), 1
    else:
        groups, in_width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    out_width = draw(st.integers(1, 3))
    B, H, W = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    k_h, k_w = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    sides = [draw(st.integers(0, 3)) for _ in range(4)]
    geometry = ConvGeometry(
        (B, groups * in_width, H, W),
        (groups * out_width, in_width, k_h, k_w),
        stride,
        ((sides[0], sides[1]), (sides[2], sides[3])),
        dilation,
        groups,
    )
    assume(min(geometry.output_size) >= 1)
    return geometry


@st.composite
def transposed_geometries(draw: Any) -> TransposedGeometry:
    """Any transposed convolution with small sizes: groups, stride, dilation, cuts on either side, rows added."""
    groups = draw(st.integers(1, 3))
    C_in, out_width = groups * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    B, H, W = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    sides = [draw(st.integers(0, 2)) for _ in range(4)]
    more = draw(st.integers(0, stride[0] - 1)), draw(st.integers(0, stride[1] - 1))
    padding = ((sides[0], sides[1]), (sides[2], sides[3]))
    shapes = (B, C_in, H, W), (C_in, out_width, *kernel)
    geometry = TransposedGeometry(*shapes, stride, padding, dilation, groups, more)
    assume(min(geometry.output_shape) >= 1)
    return geometry


@st.composite
def volume_geometries(draw: Any) -> VolumeGeometry:
    """Any convolution of volumes with small sizes: groups, stride, dilation, asymmetric padding."""
    groups, in_width, out_width = (draw(st.integers(1, 2)) for _ in range(3))
    size = [draw(st.integers(1, 5)) for _ in range(3)]
    kernel = [draw(st.integers(1, 3)) for _ in range(3)]
    stride = tuple(draw(st.integers(1, 2)) for _ in range(3))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(3))
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(3))
    shapes = (draw(st.integers(1, 3)), groups * in_width, *size), (groups * out_width, in_width, *kernel)
    geometry = VolumeGeometry(*shapes, stride, padding, dilation, groups)
    assume(min(geometry.output_shape) >= 1)
    return geometry


@st.composite
def linear_geometries(draw: Any) -> LinearGeometry:
    """(B, I) or (B, L, I) linear layers."""
    leading = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    I, O = draw(st.integers(1, 6)), draw(st.integers(1, 6))  # noqa: E741
    return LinearGeometry((*leading, I), (O, I))


@st.composite
def ranks_for(draw: Any, shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """A rank for every mode, None for some."""
    return tuple(draw(st.one_of(st.none(), st.integers(1, n))) for n in shape)


def arrays(geometry: Geometry, seed: int, dtype: Any = np.float64) -> tuple[np.ndarray, ...]:
    """Activation, weight and output gradient for a geometry."""
    rng = np.random.default_rng(seed)
    shapes = (geometry.input_shape, geometry.weight_shape, geometry.output_shape)
    x, weight, grad_output = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return x, weight, grad_output
