"""The peak of operations that the library's own networks do without: predicted within 5 % of what tracemalloc sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_peak_shapes import Shapes, check, compiled

from analysis.check.store_case import Case, memory
from lance_ref import Subspace
from lance_ref import functional as F
from lance_ref.algebra.volumes import TransposedGeometry
from lance_ref.engine.tensor import Tensor
from lance_ref.stores import Lance

MAP = (8, 16, 48, 64)


def condition(like: Tensor) -> Tensor:
    shape = (like.shape[0], like.shape[1], 1, 1)
    return Tensor.meta(shape, np.bool_) if like.is_meta else Tensor(np.arange(np.prod(shape)).reshape(shape) % 2 == 0)


def looked_up(table: Tensor) -> Tensor:
    rows = Tensor.meta((50_000,), np.int64) if table.is_meta else Tensor(np.arange(50_000) % len(table))
    return F.embedding(rows, table)


CASES: dict[str, tuple[Any, Shapes]] = {
    "prelu": (F.prelu, (MAP, (16,))),
    "glu": (lambda x: F.glu(x, 1), (MAP,)),
    "glu, last": (F.glu, ((600, 1000),)),
    "where": (lambda a, b: F.where(condition(a), a, b), (MAP, MAP)),
    "embedding": (looked_up, ((4000, 64),)),
    "group_norm": (lambda x, w, b: F.group_norm(x, 4, w, b), (MAP, (16,), (16,))),
    "group_norm, plain": (lambda x: F.group_norm(x, 4), (MAP,)),
    "instance_norm": (F.instance_norm, (MAP, (16,), (16,))),
    "rms_norm": (lambda x, w: F.rms_norm(x, 700, w), ((1000, 700), (700,))),
    "rms_norm, plain": (lambda x: F.rms_norm(x, 700), ((1000, 700),)),
    "attention": (F.scaled_dot_product_attention, ((4, 3, 200, 32), (4, 3, 300, 32), (4, 3, 300, 32))),
    "attention, causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ((2, 3, 300, 64), (2, 3, 300, 64), (2, 3, 300, 64)),
    ),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), (MAP,)),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (MAP,)),
    "smaller": (lambda x: F.interpolate(x, (30, 40), mode="bilinear"), (MAP,)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 3, 2, 1), ((4, 8, 16, 32, 32),)),
    "max_pool3d, no padding": (lambda x: F.max_pool3d(x, 2), ((4, 8, 16, 32, 32),)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 3, 2, 1), ((4, 8, 16, 32, 32),)),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1), ((8, 16, 24, 32), (16, 12, 3, 3), (12,))
    ),
    "conv_transpose2d, groups": (
        lambda x, w: F.conv_transpose2d(x, w, None, 2, groups=4), ((8, 16, 24, 32), (16, 3, 2, 2))
    ),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b, 1, 1), ((2, 8, 12, 24, 24), (12, 8, 3, 3, 3), (12,))),
    "conv3d, strided": (lambda x, w: F.conv3d(x, w, None, 2), ((2, 8, 12, 24, 24), (12, 8, 3, 3, 3))),
}  # fmt: skip


@compiled
@pytest.mark.parametrize("name", CASES)
def test_peaks_of_one_operation(name: str) -> None:
    """With all gradients, and with those of each input alone."""
    operation, shapes = CASES[name]
    patterns = [[True] * len(shapes), *([i == one for i in range(len(shapes))] for one in range(len(shapes)))]
    for needs in patterns:
        check(operation, shapes, needs)


@compiled
def test_a_transposed_layer_of_one_channel_a_group_has_no_loops_of_its_own() -> None:
    """A depthwise convolution's weight gradient from a core has compiled loops, which keep less; here Z is laid out."""
    geometry = TransposedGeometry((32, 48, 7, 7), (48, 1, 2, 2), (2, 2), groups=48)
    ranks = (None, None, 3, 3)
    subspace = Subspace.random(geometry.input_shape, ranks, np.random.default_rng(0))
    case = Case("of one channel", geometry, np.dtype(np.float32), ranks)
    for predicted, measured in memory(case, Lance(subspace, order="separable")):
        assert abs(predicted - measured) <= 0.05 * measured
