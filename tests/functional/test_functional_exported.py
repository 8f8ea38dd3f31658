"""Erf, clip, GELU by tanh, expand and the quantizer's grid: values, gradients where differences say nothing, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import F, Tensor, tape


def test_values_by_hand() -> None:
    """Another function of a similar shape."""
    x = np.array([-1.0, 0.0, 0.5, 2.0])
    np.testing.assert_allclose(F.erf(x).data, [math.erf(v) for v in x], rtol=1e-15)
    by_tanh = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    np.testing.assert_allclose(F.gelu_tanh(x).data, by_tanh, rtol=1e-15)
    assert np.abs(F.gelu_tanh(x).data - F.gelu(x).data).max() < 1e-3
    assert F.clip(x, -0.5, 1).data.tolist() == [-0.5, 0, 0.5, 1]
    assert F.expand(np.array([[1.0], [2.0]]), (2, 2, 3)).data.tolist() == [[[1] * 3, [2] * 3]] * 2


def test_the_grid_by_hand() -> None:
    """Steps of 0.5 around a zero point of 1, cut off below 0 and above 7; halves go to the even step."""
    x = Tensor(np.array([-9.0, -0.5, 0.2, 0.25, 0.75, 3.0, 3.3]), requires_grad=True)
    y = F.fake_quantize(x, 0.5, 1, 0, 7)
    assert y.data.tolist() == [-0.5, -0.5, 0, 0, 1, 3, 3]
    y.backward(np.arange(1.0, 8))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=9), st.floats(0.01, 2), st.integers(-128, 127))
def test_the_grid_is_onnxs(values: list[float], scale: float, zero_point: int) -> None:
    """A grid beside that of QuantizeLinear and DequantizeLinear: never further than half a step, unless cut off."""
    x, s = np.array(values, np.float32), np.float32(scale)
    steps = np.clip(np.rint(x / s) + zero_point, -128, 127)
    y = F.fake_quantize(x, float(s), zero_point).data
    np.testing.assert_array_equal(y, (steps - zero_point) * s)
    inside = (steps > -128) & (steps < 127)
    assert (np.abs(y - x)[inside] <= 0.5001 * s).all()


def test_a_mask_takes_one_bit_per_element() -> None:
    """Keeping the input itself would be 32 times as much."""
    x = Tensor(np.zeros((3, 7), np.float32), requires_grad=True)
    for y in (F.clip(x, -1, 1), F.fake_quantize(x, 0.1)):
        assert tape(y).total_bytes == 3


def test_the_slope_of_clip_at_its_bounds_is_1() -> None:
    """As PyTorch has it; beyond them it is 0."""
    x = Tensor(np.array([-1.5, -1, 0, 2, 2.5]), requires_grad=True)
    F.sum(F.clip(x, -1, 2)).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_bad_arguments_are_named() -> None:
    """A bound that never bites, a grid without steps, a shape that does not fit."""
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="low is 2 and high is 1"):
        F.clip(x, 2, 1)
    with pytest.raises(ValueError, match="low is nan"):
        F.clip(x, math.nan)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), which does not broadcast to \(3, 2\)"):
        F.expand(x, (3, 2))
    with pytest.raises(ValueError, match=r"does not broadcast to \(3,\)"):
        F.expand(x, (3,))
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale is"):
            F.fake_quantize(x, scale)
    with pytest.raises(ValueError, match="zero_point is 300"):
        F.fake_quantize(x, 1.0, 300)
