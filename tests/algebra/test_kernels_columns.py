"""The loops that lay columns out and add them back: equal to their NumPy twins, and the transpose of each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries

from lance_ref.algebra import geometry
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.algebra.kernels import columns as kernels_columns
from lance_ref.algebra.kernels.columns import add_columns, add_columns_numpy, lay_out, lay_out_numpy

GEOMETRIES = conv_geometries()


def columns_like(g: ConvGeometry, rows: slice, seed: int) -> np.ndarray:
    B, C_in = g.input_shape[:2]
    shape = (C_in, *g.weight_shape[2:], B, rows.stop - rows.start, g.output_size[1])
    return np.random.default_rng(seed).standard_normal(shape)


@given(g=GEOMETRIES, seed=st.integers(0, 99), data=st.data())
def test_loops_equal_their_twin(g: ConvGeometry, seed: int, data: st.DataObject) -> None:
    """Any stride, padding, dilation and part of the rows: the same sums in the same order, on top of what is there."""
    first = data.draw(st.integers(0, g.output_size[0] - 1))
    rows = slice(first, data.draw(st.integers(first + 1, g.output_size[0])))
    columns = columns_like(g, rows, seed)
    there = np.random.default_rng(seed + 1).standard_normal(g.input_shape)
    found, expected = there.copy(), there.copy()
    add_columns(columns, found, rows, g.stride, g.padding, g.dilation)
    add_columns_numpy(columns, expected, rows, g.stride, g.padding, g.dilation)
    np.testing.assert_array_equal(found, expected)


@given(g=GEOMETRIES, seed=st.integers(0, 99), data=st.data())
def test_laying_out_equals_its_twin_and_the_patches(g: ConvGeometry, seed: int, data: st.DataObject) -> None:
    """Any stride, padding, dilation, part of the rows and of the channels; every number is written, zeros too."""
    x, _, _ = arrays(g, seed)
    first = data.draw(st.integers(0, g.output_size[0] - 1))
    rows = slice(first, data.draw(st.integers(first + 1, g.output_size[0])))
    channel = data.draw(st.integers(0, g.input_shape[1] - 1))
    shape = columns_like(g, rows, 0)[channel:].shape
    found, twin = np.full(shape, np.nan), np.full(shape, np.nan)
    lay_out(x, found, rows, g.stride, g.padding, g.dilation, channel)
    lay_out_numpy(x, twin, rows, g.stride, g.padding, g.dilation, channel)
    np.testing.assert_array_equal(found, twin)
    places = (rows.stop - rows.start) * g.output_size[1]
    patches = g.patches(x, rows).reshape(len(x), g.input_shape[1], -1, places)[:, channel:]
    by_image = found.reshape(len(found), -1, len(x), places).transpose(2, 0, 1, 3)
    np.testing.assert_array_equal(by_image, patches)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 2), slice(8, 9)], ids=str)
def test_rows_that_see_nothing_but_padding(rows: slice) -> None:
    """Above and below the image all is zero, in loops, twin and patches."""
    g = ConvGeometry((2, 3, 4, 5), (3, 3, 2, 2), padding=((3, 3), (0, 1)))
    x, _, _ = arrays(g, 0)
    shape = columns_like(g, rows, 0).shape
    for lay in (lay_out, lay_out_numpy):
        columns = np.full(shape, np.nan)
        lay(x, columns, rows, g.stride, g.padding, g.dilation)
        assert not columns.any()
    assert not g.patches(x, rows).any()
    assert g.patches(x, slice(2, 4)).any()


def test_zeros_below_alone() -> None:
    """The last row of places looks beyond the image, where no padding is on any other side."""
    g = ConvGeometry((2, 3, 4, 5), (3, 3, 2, 2), padding=((0, 1), (0, 0)))
    x, rows = np.ones(g.input_shape), slice(3, 4)
    patches = g.patches(x, rows).reshape(2, 3, 2, 2, 4)
    assert patches[:, :, 0].all()
    assert not patches[:, :, 1].any()


@given(g=GEOMETRIES, seed=st.integers(0, 9), parts=st.integers(2, 4), bytes_=st.sampled_from([1, 2000, 2**20]))
def test_images_and_channels_in_several_threads(g: ConvGeometry, seed: int, parts: int, bytes_: int) -> None:
    """Each thread has images of its own, and channels of its own of a weight gradient: the same products."""
    x, weight, grad_output = arrays(g, seed)
    expected = g.forward(x, weight), g.input_gradient(weight, grad_output), g.weight_gradient(x, grad_output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "SHARED_MACS", 0)
        patch.setattr(geometry, "MANY_PLACES", 1)
        patch.setattr(geometry, "WORKSPACE_BYTES", bytes_)
        patch.setattr(geometry, "product_threads", lambda: parts)
        found = g.forward(x, weight), g.input_gradient(weight, grad_output), g.weight_gradient(x, grad_output)
    for ours, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-11, atol=1e-11)


@given(g=GEOMETRIES, seed=st.integers(0, 99))
def test_it_is_the_transpose_of_laying_columns_out(g: ConvGeometry, seed: int) -> None:
    """⟨columns(x), Y⟩ = ⟨x, add(Y)⟩ for all x and Y: a patch that were added elsewhere would show."""
    x, _, _ = arrays(g, seed)
    rows = slice(0, g.output_size[0])
    Y, back = columns_like(g, rows, seed), np.zeros(g.input_shape)
    add_columns(Y, back, rows, g.stride, g.padding, g.dilation)
    laid_out = g.patches(x)  # (B, g, K, L)
    by_image = Y.reshape(g.groups, -1, len(x), laid_out.shape[-1]).transpose(2, 0, 1, 3)
    assert float((laid_out * by_image).sum()) == pytest.approx(float((x * back).sum()), rel=1e-9, abs=1e-9)


@given(g=GEOMETRIES, seed=st.integers(0, 9), bytes_=st.integers(1, 4000))
def test_blocks_of_any_size_give_the_same_products(g: ConvGeometry, seed: int, bytes_: int) -> None:
    """Images together, one by one, or row by row: the same three products up to the order of sums."""
    x, weight, grad_output = arrays(g, seed)
    expected = g.forward(x, weight), g.input_gradient(weight, grad_output), g.weight_gradient(x, grad_output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "WORKSPACE_BYTES", bytes_)
        found = g.forward(x, weight), g.input_gradient(weight, grad_output), g.weight_gradient(x, grad_output)
    for ours, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-10, atol=1e-10)


def test_without_numba_the_twin_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Numba is switched off all three products are the same."""
    g = ConvGeometry((3, 4, 6, 5), (6, 2, 3, 2), (2, 1), ((1, 0), (0, 2)), groups=2)
    x, weight, grad_output = arrays(g, 0)
    expected = g.forward(x, weight), g.input_gradient(weight, grad_output), g.weight_gradient(x, grad_output)
    monkeypatch.setattr(kernels_columns, "numba_enabled", lambda: False)
    found = g.forward(x, weight), g.input_gradient(weight, grad_output), g.weight_gradient(x, grad_output)
    for ours, compiled in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, compiled, rtol=1e-12, atol=1e-12)
