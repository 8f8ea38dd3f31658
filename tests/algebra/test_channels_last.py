"""Loops over maps with the channels innermost, compiled and in NumPy, against the convolutions of the layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries

from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.algebra.kernels import channels_last
from lance_ref.algebra.kernels.channels_last import (
    CLAMP,
    HARDSIGMOID,
    HARDSWISH,
    Activation,
    columns,
    depthwise,
    finish,
)
from lance_ref.algebra.kernels.threads import numba_enabled

COMPILED = [
    pytest.param(True, marks=pytest.mark.skipif(not numba_enabled(), reason="Numba is switched off")),
    False,
]


@pytest.fixture(params=COMPILED, ids=["compiled", "twin"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(channels_last, "numba_enabled", lambda: request.param)
    return bool(request.param)


def last(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


@pytest.mark.usefixtures("kernels")
@given(g=conv_geometries(depthwise=True), seed=st.integers(0, 99))
def test_depthwise_is_the_layers(g: ConvGeometry, seed: int) -> None:
    """A border that is skipped, or a position taken twice, for any stride, padding and dilation."""
    x, weight, _ = arrays(g, seed)
    weight = weight[: g.groups]  # one output channel each
    one = ConvGeometry(g.input_shape, weight.shape, g.stride, g.padding, g.dilation, g.groups)
    scale, shift = np.random.default_rng(seed).standard_normal((2, g.groups))
    out = np.full((len(x), *one.output_size, g.groups), np.nan)
    laid_out = np.ascontiguousarray(weight[:, 0].transpose(1, 2, 0))
    depthwise(last(x), laid_out, out, g.stride, g.padding, g.dilation, scale, shift, -0.5, 1.5)
    expected = np.clip(one.forward(x, weight) * scale[:, None, None] + shift[:, None, None], -0.5, 1.5)
    np.testing.assert_allclose(out, last(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("kernels")
@given(g=conv_geometries(depthwise=False), seed=st.integers(0, 99), data=st.data(), packed=st.booleans())
def test_patches_are_the_layers(g: ConvGeometry, seed: int, data: Any, packed: bool) -> None:
    """Patches in another order than the weight's, or of the wrong image where rows of several come together."""
    x, weight, _ = arrays(g, seed)
    x, weight = x[:, : weight.shape[1]], weight  # one group
    one = ConvGeometry(x.shape, weight.shape, g.stride, g.padding, g.dilation, 1)
    H_out, W_out = one.output_size
    start = data.draw(st.integers(0, len(x) * H_out - 1))
    stop = data.draw(st.integers(start + 1, len(x) * H_out))
    out = np.full((stop - start, W_out, weight[0].size), np.nan)
    images = last(x) if packed else x.transpose(0, 2, 3, 1)
    columns(images, out, slice(start, stop), H_out, weight.shape[2:], g.stride, g.padding, g.dilation)
    got = out @ weight.reshape(len(weight), -1).T  # (n, W_out, C_out)
    expected = last(one.forward(x, weight)).reshape(len(x) * H_out, W_out, -1)[start:stop]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


ACTIVATIONS = [
    (Activation(), lambda y: y),
    (Activation(CLAMP, 0.0), lambda y: np.maximum(y, 0)),
    (Activation(CLAMP, 0.0, 6.0), lambda y: np.clip(y, 0, 6)),
    (Activation(HARDSWISH), lambda y: y * np.clip(y + 3, 0, 6) / 6),
    (Activation(HARDSIGMOID), lambda y: np.clip(y + 3, 0, 6) / 6),
]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("activation", "formula"), ACTIVATIONS)
def test_finish_is_its_formula(activation: Activation, formula: Any, adds: bool) -> None:
    """Scale, shift, residual and activation in another order; a NaN that a comparison turns into a number."""
    rng = np.random.default_rng(0)
    y, residual = 4 * rng.standard_normal((2, 50, 7))
    y[3, 2] = np.nan
    scale, shift = rng.standard_normal((2, 7))
    expected = formula(y * scale + shift + (residual if adds else 0))
    finish(y, scale, shift, residual if adds else None, activation)
    assert np.isnan(y[3, 2])
    np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("kernels")
def test_numbers_stay_in_single_precision() -> None:
    """A bound or a constant in double precision would make every number of the loop one."""
    y = np.ones((2, 3), np.float32)
    finish(y, np.ones(3, np.float32), np.full(3, 1e-9, np.float32), None, Activation(HARDSWISH))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, np.float32(4 / 6), rtol=1e-6)
