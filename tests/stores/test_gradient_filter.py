"""Gradient filtering: both gradients against loops over patches, and the published conventions at the edges."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries

from analysis.check.store_case import StoreTestCase
from analysis.steps.settings import TunedLayer
from lance_ref import F, Tensor, tape
from lance_ref.algebra.geometry import ConvGeometry, Geometry, LinearGeometry
from lance_ref.nn.module import Parameter
from lance_ref.stores import GradientFilter, gradient_filter

PATCHES = st.sampled_from([1, 2, 3, 4, 7])


class TestGradientFilter(StoreTestCase):
    """Patches of two. Only of one place and on the maps of the output are they exact."""

    method, patch, exact_input = "gradient-filter", 2, False
    wrong: ClassVar = {
        f"patch is {patch!r}, expected a positive integer": lambda patch=patch: GradientFilter(patch)
        for patch in (0, -2, 2.0, True)
    } | {"save_for": lambda: GradientFilter(2).save(np.ones((1, 1, 2, 2)))}

    def make(self, layer: TunedLayer) -> GradientFilter:
        return GradientFilter(self.patch)

    def takes(self, geometry: Geometry) -> bool:
        return isinstance(geometry, (ConvGeometry, LinearGeometry))

    def exactly(self, layer: TunedLayer) -> GradientFilter | None:
        return GradientFilter(1) if layer.path == "pointwise" or len(layer.shape) < 4 else None


class TestPatchesOfOne(TestGradientFilter):
    """Windows as large as the stride."""

    method, patch = None, 1


class TestPatchesOfThree(TestGradientFilter):
    """They divide no map evenly."""

    method, patch = None, 3


class TestPatchesOfSeven(TestGradientFilter):
    """Larger than most maps."""

    method, patch = None, 7


def filtered(g: Any, patch: int, x: np.ndarray, weight: np.ndarray, grad_output: np.ndarray) -> tuple[np.ndarray, ...]:
    """The store's two gradients."""
    store = GradientFilter(patch)
    grad_weight = store.weight_gradient(store.save_for(x, g), grad_output, g)
    return grad_weight, store.input_gradient(weight, grad_output, g)


def patch_of(place: int, size: int, window: int, count: int) -> int | None:
    """The patch that a place of an axis belongs to; None for a place that is cropped."""
    patch = (place + math.ceil((count * window - size) / 2)) // window
    return patch if 0 <= patch < count else None


def pooled(array: np.ndarray, windows: tuple[int, int], counts: tuple[int, int], mean: bool) -> np.ndarray:
    """Sums or means over patches of (B, C, H, W), place by place."""
    total, places = np.zeros((*array.shape[:2], *counts)), np.zeros(counts)
    for h, w in np.ndindex(*array.shape[2:]):
        i, j = (
            patch_of(at, n, window, count)
            for at, n, window, count in zip((h, w), array.shape[2:], windows, counts, strict=True)
        )
        if i is not None and j is not None:
            total[:, :, i, j] += array[:, :, h, w]
            places[i, j] += 1
    return total / places if mean else total


def slow_conv(
    g: ConvGeometry, r: int, x: np.ndarray, weight: np.ndarray, grad_output: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The definition, by loops over images, groups, patches and kernel positions."""
    counts = (math.ceil(g.output_size[0] / r), math.ceil(g.output_size[1] / r))
    windows = (r * g.stride[0], r * g.stride[1])
    sums, means = pooled(x, windows, counts, mean=False), pooled(grad_output, (r, r), counts, mean=True)
    reach = [0 if d == 1 else d // window for d, window in zip(g.dilation, windows, strict=True)]
    k = weight.shape[2:]
    before = [e * (n - 1) // 2 for e, n in zip(reach, k, strict=True)]
    point, patch_grad = np.zeros(weight.shape[:2]), np.zeros(sums.shape)
    wide, narrow = weight.shape[0] // g.groups, weight.shape[1]
    for b, group, i, j in np.ndindex(len(x), g.groups, *counts):
        out, into = slice(group * wide, (group + 1) * wide), slice(group * narrow, (group + 1) * narrow)
        point[out] += np.outer(means[b, out, i, j], sums[b, into, i, j])
        for p, q in np.ndindex(*k):
            above, left = i - reach[0] * p + before[0], j - reach[1] * q + before[1]
            if 0 <= above < counts[0] and 0 <= left < counts[1]:
                patch_grad[b, into, i, j] += weight[out, :, p, q].T @ means[b, out, above, left]
    grad = np.zeros(x.shape)
    for h, w in np.ndindex(*x.shape[2:]):
        i, j = patch_of(h, x.shape[2], windows[0], counts[0]), patch_of(w, x.shape[3], windows[1], counts[1])
        if i is not None and j is not None:
            grad[:, :, h, w] = patch_grad[:, :, i, j]
    return np.repeat(point, math.prod(k), axis=1).reshape(weight.shape), grad


@given(g=conv_geometries(), patch=PATCHES, seed=st.integers(0, 99))
def test_both_gradients_equal_loops_over_patches(g: ConvGeometry, patch: int, seed: int) -> None:
    """Any groups, stride, padding and dilation, odd sizes, maps smaller than a patch."""
    x, weight, grad_output = arrays(g, seed)
    for fast, slow in zip(
        filtered(g, patch, x, weight, grad_output), slow_conv(g, patch, x, weight, grad_output), strict=True
    ):
        np.testing.assert_allclose(fast, slow, rtol=1e-10, atol=1e-10)


@given(g=linear_geometries(), patch=PATCHES, seed=st.integers(0, 99))
def test_linear_layers_are_filtered_along_their_tokens(g: LinearGeometry, patch: int, seed: int) -> None:
    """(B, L, I) is a 1×1 convolution along L; (B, I) stays exact."""
    x, weight, grad_output = arrays(g, seed)
    grad_weight, grad = filtered(g, patch, x, weight, grad_output)
    if len(g.input_shape) == 2:
        np.testing.assert_array_equal(grad_weight, g.weight_gradient(x, grad_output))
        np.testing.assert_array_equal(grad, g.input_gradient(weight, grad_output))
        assert GradientFilter(patch).save_for(x, g)["patch_sums"] is x
        return
    count = math.ceil(x.shape[1] / patch)
    expected_weight, expected = np.zeros(weight.shape), np.zeros(x.shape)
    for token_patch in range(count):
        tokens = [t for t in range(x.shape[1]) if patch_of(t, x.shape[1], patch, count) == token_patch]
        mean = grad_output[:, tokens].mean(axis=1)  # (B, O)
        expected_weight += mean.T @ x[:, tokens].sum(axis=1)
        expected[:, tokens] = (mean @ weight)[:, None]
    np.testing.assert_allclose(grad_weight, expected_weight, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-10)


@given(data=st.data(), g=conv_geometries(), seed=st.integers(0, 99))
def test_patch_one_on_a_pointwise_convolution_is_backpropagation(data: Any, g: ConvGeometry, seed: int) -> None:
    """r = 1, 1×1, stride 1, any groups: nothing is summed and nothing averaged, with padding or without."""
    pad = data.draw(st.integers(0, 2))
    g = ConvGeometry(
        g.input_shape,
        (*g.weight_shape[:2], 1, 1),
        padding=((pad, pad), (pad, pad)),
        dilation=g.dilation,
        groups=g.groups,
    )
    x, weight, grad_output = arrays(g, seed)
    grad_weight, grad = filtered(g, 1, x, weight, grad_output)
    np.testing.assert_allclose(grad_weight, g.weight_gradient(x, grad_output), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(grad, g.input_gradient(weight, grad_output), rtol=1e-12, atol=1e-12)
    assert (GradientFilter(1).save_for(x, g)["patch_sums"] is x) == (pad == 0)


@given(seed=st.integers(0, 99), r=st.sampled_from([2, 4, 7]))
def test_exact_where_patches_are_constant(seed: int, r: int) -> None:
    """A 1×1 convolution whose maps are constant on whole patches: averaging loses nothing."""
    g = ConvGeometry((2, 3, 2 * r, 3 * r), (4, 3, 1, 1))
    rng = np.random.default_rng(seed)
    block = np.ones((1, 1, r, r))
    x, grad_output = (
        np.kron(rng.standard_normal((2, 3, 2, 3)), block),
        np.kron(rng.standard_normal((2, 4, 2, 3)), block),
    )
    weight = rng.standard_normal((4, 3, 1, 1))
    grad_weight, grad = filtered(g, r, x, weight, grad_output)
    np.testing.assert_allclose(grad_weight, g.weight_gradient(x, grad_output), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(grad, g.input_gradient(weight, grad_output), rtol=1e-10, atol=1e-10)


def test_by_hand() -> None:
    """A 3×3 map in patches of 2: the zero before comes first, sums count it, means do not."""
    x = np.arange(9.0).reshape(1, 1, 3, 3)
    g = ConvGeometry(x.shape, (1, 1, 3, 3), padding=((1, 1), (1, 1)))
    store = GradientFilter(2)
    saved = store.save_for(x, g)["patch_sums"]
    np.testing.assert_array_equal(saved, [[[[0, 1 + 2], [3 + 6, 4 + 5 + 7 + 8]]]])
    means = store.means(x, g)
    np.testing.assert_array_equal(means, [[[[0, 1.5], [4.5, 6]]]])
    weight = np.ones((1, 1, 3, 3))
    np.testing.assert_array_equal(
        store.input_gradient(weight, x, g), [[[[0, 13.5, 13.5], [40.5, 54, 54], [40.5, 54, 54]]]]
    )
    expected = 0 * 0 + 1.5 * 3 + 4.5 * 9 + 6 * 24
    np.testing.assert_array_equal(store.weight_gradient({"patch_sums": saved}, x, g), np.full((1, 1, 3, 3), expected))


def test_a_map_smaller_than_its_patch_is_one_patch() -> None:
    """3 × 2 under patches of 7: one sum, one mean, and no place left out."""
    g = ConvGeometry((2, 3, 3, 2), (4, 3, 3, 3), padding=((1, 1), (1, 1)))
    x, weight, grad_output = arrays(g, 0)
    store = GradientFilter(7)
    np.testing.assert_allclose(store.save_for(x, g)["patch_sums"], x.sum(axis=(2, 3), keepdims=True))
    np.testing.assert_allclose(store.means(grad_output, g), grad_output.mean(axis=(2, 3), keepdims=True))
    grad = store.input_gradient(weight, grad_output, g)
    np.testing.assert_array_equal(grad, np.broadcast_to(grad[:, :, :1, :1], x.shape))


def test_stride_multiplies_both_gradients_of_constant_maps() -> None:
    """As documented: a window sums s_h·s_w places for each output place, 2·3 times backpropagation's."""
    g = ConvGeometry((1, 1, 8, 12), (1, 1, 1, 1), stride=(2, 3))
    x, grad_output, weight = np.ones(g.input_shape), np.ones(g.output_shape), np.ones((1, 1, 1, 1))
    grad_weight, grad = filtered(g, 2, x, weight, grad_output)
    np.testing.assert_array_equal(grad_weight, 6 * g.weight_gradient(x, grad_output))
    assert grad.sum() == 6 * g.input_gradient(weight, grad_output).sum()


def test_a_dilated_kernel_is_kept_whole() -> None:
    """d = 4 ≥ r: kernel positions four places apart reach ⌊4/r⌋ patches far; r = 1 is exact in the input gradient."""
    g = ConvGeometry((2, 3, 9, 8), (4, 3, 3, 3), padding=((4, 4), (4, 4)), dilation=(4, 4))
    x, weight, grad_output = arrays(g, 0)
    exact = g.input_gradient(weight, grad_output)
    np.testing.assert_allclose(filtered(g, 1, x, weight, grad_output)[1], exact, rtol=1e-10, atol=1e-10)
    assert [GradientFilter(r).reach(g) for r in (1, 2, 4, 7)] == [(4, 4), (2, 2), (1, 1), (0, 0)]
    undilated = ConvGeometry(g.input_shape, g.weight_shape, padding=((1, 1), (1, 1)))
    assert GradientFilter(1).reach(undilated) == (0, 0)  # the published code sums the kernel even for patches of one


@pytest.mark.parametrize("r", [2, 4, 7])
@pytest.mark.parametrize(("stride", "size"), [(1, (14, 14)), (1, (13, 9)), (2, (14, 7)), (2, (15, 9))])
def test_sums_and_means_are_pytorchs_pooling(r: int, stride: int, size: tuple[int, int]) -> None:
    """The published conventions, said with avg_pool2d: zeros on both sides; sums undivided, means without zeros."""
    torch = pytest.importorskip("torch")
    g = ConvGeometry((2, 3, *size), (4, 3, 3, 3), (stride, stride), ((1, 1), (1, 1)))
    x, _, grad_output = arrays(g, 0)
    store = GradientFilter(r)

    def pool(array: np.ndarray, window: int, **options: Any) -> np.ndarray:
        totals = [math.ceil(n / r) * window - m for n, m in zip(g.output_size, array.shape[2:], strict=True)]
        pads = [math.ceil(total / 2) for total in totals]
        pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(array), window, window, pads, **options)
        return np.asarray(pooled.numpy())

    sums = pool(x, r * stride, divisor_override=1)
    np.testing.assert_allclose(store.save_for(x, g)["patch_sums"], sums, rtol=1e-12, atol=1e-12)
    means = pool(grad_output, r, count_include_pad=False)
    np.testing.assert_allclose(store.means(grad_output, g), means, rtol=1e-12, atol=1e-12)


def test_a_layer_passes_the_filtered_gradient_on() -> None:
    """Both gradients reach the parameters and the layers below, and the tape holds the patch sums alone."""
    g = ConvGeometry((2, 4, 9, 7), (6, 2, 3, 3), (2, 1), ((1, 1), (1, 1)), groups=2)
    x, weight, grad_output = (array.astype(np.float32) for array in arrays(g, 0))
    below, parameter = Tensor(x, requires_grad=True), Parameter(weight)
    out = F.conv2d(below, parameter, None, g.stride, g.padding, groups=2, store=GradientFilter(2))
    np.testing.assert_array_equal(out.data, g.forward(x, weight))
    assert tape(out).total_bytes == 2 * 4 * 3 * 4 * 4
    out.backward(grad_output)
    expected = filtered(g, 2, x, weight, grad_output)
    np.testing.assert_array_equal(parameter.grad, expected[0])
    np.testing.assert_array_equal(below.grad, expected[1])
    assert parameter.grad.dtype == below.grad.dtype == np.float32


@pytest.mark.parametrize("fault", ["divide by all places", "window without stride", "zeros after first"])
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops over patches disagree as soon as an edge is treated differently."""
    g = ConvGeometry((2, 3, 9, 7), (2, 3, 3, 3), (2, 1), ((1, 1), (1, 1)))
    x, weight, grad_output = arrays(g, 0)
    expected = slow_conv(g, 4, x, weight, grad_output)
    np.testing.assert_allclose(filtered(g, 4, x, weight, grad_output)[0], expected[0], rtol=1e-10)
    windows = gradient_filter.Windows
    if fault == "divide by all places":
        monkeypatch.setattr(windows, "places", property(lambda self: np.full(self.count, self.length)))
    elif fault == "window without stride":
        monkeypatch.setattr(
            gradient_filter, "Windows", lambda n, length, count: windows(n, 4 if length == 8 else length, count)
        )
    else:
        monkeypatch.setattr(windows, "before", property(lambda self: (self.count * self.length - self.size) // 2))
    wrong = filtered(g, 4, x, weight, grad_output)
    assert not np.allclose(wrong[0], expected[0], rtol=1e-3)
    assert not np.allclose(wrong[1], expected[1], rtol=1e-3)
