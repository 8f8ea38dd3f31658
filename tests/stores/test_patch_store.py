"""LANCE on patches: at full rank backpropagation, truncated the gradient of projected patches, always in blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers import check_vjp
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from patch_cases import patches_by_loops
from strategies import arrays, conv_geometries, linear_geometries, ranks_for

from analysis.check.store_case import GEOMETRIES, LARGE, StoreTestCase
from analysis.steps.settings import TunedLayer
from lance_ref import F, Subspace, Tensor, nn, tape
from lance_ref.algebra import geometry
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.algebra.projection import linear_weight_gradient
from lance_ref.functional.convolution import Conv2d
from lance_ref.lance import patches
from lance_ref.lance.patches import PatchLance, patch_shape, patch_tokens, whole_blocks

TOLERANCE = {np.float64: 1e-12, np.float32: 3e-5}
workspaces = st.sampled_from([64, 1000, 2**23])


@st.composite
def one_group(draw: Any) -> ConvGeometry:
    """Any convolution of one group: stride, dilation and padding by axis and side."""
    g = draw(conv_geometries(depthwise=False))
    return replace(g, weight_shape=(g.weight_shape[0], g.input_shape[1], *g.weight_shape[2:]), groups=1)


def store_of(g: ConvGeometry, ranks: tuple[int | None, ...], dtype: Any = np.float64, seed: int = 0) -> PatchLance:
    """Random factors of these ranks."""
    return PatchLance(Subspace.random(patch_shape(g), ranks, np.random.default_rng(seed)), dtype)


class TestPatchLance(StoreTestCase):
    """Half of every mode of the patches, of convolutions of one group."""

    wrong: ClassVar = {
        "expected (B, L, K)": lambda: PatchLance(Subspace.random((2, 3), (1, 1), np.random.default_rng(0))),
        "dtype is float16": lambda: PatchLance(
            Subspace.random((2, 3, 4), (1, 1, 1), np.random.default_rng(0)), np.float16
        ),
    }

    def takes(self, geometry: ConvGeometry | LinearGeometry) -> bool:
        return isinstance(geometry, ConvGeometry) and geometry.groups == 1

    def make(self, layer: TunedLayer) -> PatchLance:
        g = {**GEOMETRIES, **LARGE}[layer.path]
        return store_of(g, tuple((n + 1) // 2 for n in patch_shape(g)), layer.dtype)

    def exactly(self, layer: TunedLayer) -> PatchLance:
        g = GEOMETRIES[layer.path]
        return store_of(g, patch_shape(g), layer.dtype)


def gradient(g: ConvGeometry, store: PatchLance, x: np.ndarray, grad_output: np.ndarray) -> np.ndarray:
    """The weight gradient from what the store keeps."""
    return store.weight_gradient(store.save_for(x, g), grad_output, g)


@given(
    g=one_group(),
    alone=st.tuples(*[st.booleans()] * 3),
    dtype=st.sampled_from([np.float32, np.float64]),
    workspace=workspaces,
)
def test_full_rank_is_backpropagation(g: ConvGeometry, alone: tuple[bool, ...], dtype: Any, workspace: int) -> None:
    """Any stride, padding and dilation, any modes left alone: a wrong order of patches would show at once."""
    x, _, grad_output = arrays(g, 0, dtype)
    ranks = tuple(None if a else n for a, n in zip(alone, patch_shape(g), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "WORKSPACE_BYTES", workspace)
        found = gradient(g, store_of(g, ranks, dtype), x, grad_output)
    expected = g.weight_gradient(x, grad_output)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert np.abs(found - expected).max() <= TOLERANCE[dtype] * (1 + np.abs(expected).max())


@given(data=st.data(), g=one_group(), workspace=workspaces)
def test_truncated_it_is_the_gradient_of_projected_patches(data: Any, g: ConvGeometry, workspace: int) -> None:
    """Patches by loops, projected as a whole: blocks, their order, and the contraction must not matter."""
    ranks = data.draw(ranks_for(patch_shape(g)))
    x, _, grad_output = arrays(g, 1)
    store = store_of(g, ranks)
    P = patches_by_loops(x, g)
    for mode, U in enumerate(store.factors):
        if U is not None:
            P = np.moveaxis(np.tensordot(U @ U.T, P, (1, mode)), 0, mode)
    tokens = grad_output.reshape(*grad_output.shape[:2], -1).transpose(0, 2, 1)  # (B, L, C_out)
    expected = np.einsum("blo,blk->ok", tokens, P).reshape(g.weight_shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "WORKSPACE_BYTES", workspace)
        saved = store.save_for(x, g)
    assert {name: array.shape for name, array in saved.items()} == {
        "core": tuple(n if r is None else r for n, r in zip(store.shape, store.ranks, strict=True))
    }
    assert saved["core"].base is None or saved["core"].base.nbytes == saved["core"].nbytes
    found = store.weight_gradient(saved, grad_output, g)
    assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    linear = LinearGeometry(patch_shape(g), (g.weight_shape[0], patch_shape(g)[2]))
    assert_allclose(
        found.reshape(linear.weight_shape),
        linear_weight_gradient(saved["core"], store.factors, tokens, linear),
        rtol=1e-10,
        atol=1e-10,
    )


@given(g=one_group(), rank=st.integers(1, 40), seed=st.integers(0, 9))
def test_the_feature_mode_alone_projects_the_weight_gradient(g: ConvGeometry, rank: int, seed: int) -> None:
    """dŴ = dW U Uᵀ: orthogonal, a descent direction, and with no part outside of U."""
    x, _, grad_output = arrays(g, seed)
    K = patch_shape(g)[2]
    store = store_of(g, (None, None, min(rank, K)), seed=seed)
    exact = g.weight_gradient(x, grad_output).reshape(-1, K)
    found = gradient(g, store, x, grad_output).reshape(-1, K)
    U = store.factors[2]
    assert_allclose(found, exact @ U @ U.T, rtol=1e-10, atol=1e-10)
    assert np.vdot(exact, found) >= -1e-10


@given(g=one_group(), workspace=st.sampled_from([1, 500, 5000]), batch_first=st.booleans())
def test_patches_are_laid_out_within_the_workspace(g: ConvGeometry, workspace: int, batch_first: bool) -> None:
    """At most the workspace, or one output row of one image: never all patches where they are many."""
    B, L, K = patch_shape(g)
    x, _, _ = arrays(g, 0)
    laid_out = []
    original = ConvGeometry.patches

    def spy(self: ConvGeometry, images: np.ndarray, rows: slice | None = None) -> np.ndarray:
        block = original(self, images, rows)
        laid_out.append(block.nbytes)
        return block

    ranks = (1, L, K) if batch_first else (B, 1, K)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "WORKSPACE_BYTES", workspace)
        patch.setattr(ConvGeometry, "patches", spy)
        store_of(g, ranks).save_for(x, g)
    assert max(laid_out) <= max(workspace, 8 * K * g.output_size[1])
    assert sum(laid_out) == 8 * B * L * K


@given(g=one_group(), workspace=workspaces)
def test_blocks_cover_every_patch_once(g: ConvGeometry, workspace: int) -> None:
    """A block forgotten or counted twice would make a Gram matrix wrong without any error."""
    B, L, K = patch_shape(g)
    x, _, _ = arrays(g, 2)
    P = patches_by_loops(x, g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "WORKSPACE_BYTES", workspace)
        for mode in (patches.BATCH, patches.TOKEN, patches.FEATURE):
            seen = np.zeros((B, g.output_size[0]), int)
            for images, rows in whole_blocks(g, 8, mode):
                seen[images, rows] += 1
                whole = {patches.BATCH: images == slice(0, B), patches.TOKEN: rows == slice(0, g.output_size[0])}
                assert whole.get(mode, True)
            assert (seen == 1).all()
        tokens = np.concatenate([block.reshape(-1, K) for block in patch_tokens(g, x)])
    rows = {tuple(row) for row in P.reshape(-1, K)}
    assert len(tokens) == B * L
    assert {tuple(row) for row in tokens} == rows


# ---- in a network --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_in_a_network_everything_else_is_exact(dtype: Any) -> None:
    """Output, input gradient and bias gradient do not depend on the store; the tape holds the core and the weight."""
    layer = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=((1, 0), (0, 2)), rng=0).to(dtype)
    x = np.random.default_rng(1).standard_normal((4, 3, 9, 8)).astype(dtype)
    g = patches.geometry_of(layer, x.shape)
    results = []
    for store in (layer.store, store_of(g, (2, 3, 4), dtype), store_of(g, patch_shape(g), dtype)):
        layer.store = store
        layer.weight.grad = layer.bias.grad = None
        leaf = Tensor(x, requires_grad=True)
        out = F.tanh(layer(leaf))
        kept = tape(out.sum())
        out.sum().backward()
        results.append((out.data, leaf.grad, layer.bias.grad, layer.weight.grad))
        if store.name == "patch-lance" and store.ranks == (2, 3, 4):
            assert kept.total_bytes == np.dtype(dtype).itemsize * (2 * 3 * 4 + out.size)
    for exact, *compressed in zip(*results, strict=True):
        assert_allclose(compressed[1], exact, rtol=2e-4 if dtype == np.float32 else 1e-10, atol=1e-5)
    for exact, small, _ in list(zip(*results, strict=True))[:3]:
        np.testing.assert_array_equal(small, exact)
    assert np.abs(results[1][3] - results[0][3]).max() > 1e-3  # the compressed one is another


def test_descriptions() -> None:
    """What a trace says, and the memory that is not on the tape."""
    g = ConvGeometry((8, 2, 9, 7), (5, 2, 3, 2), (2, 1), ((1, 1), (0, 0)))
    store = store_of(g, (2, None, 4), np.float32)
    assert store.describe() == {"name": "patch-lance", "ranks": (2, None, 4), "shape": (8, 30, 12)}
    assert store.factor_bytes == 4 * (8 * 2 + 12 * 4)
    assert store.state() == {}


# ---- refusals ------------------------------------------------------------------------------


def test_groups_are_refused() -> None:
    """With groups no row of the weight meets a whole patch, and ΔW M = 0 would mean nothing."""
    g = ConvGeometry((2, 4, 5, 5), (6, 2, 3, 3), groups=2)
    layer = nn.Conv2d(4, 6, 3, groups=2, rng=0)
    layer.store = PatchLance(Subspace.random((2, 9, 18), (None, None, 3), np.random.default_rng(0)))
    with pytest.raises(ValueError, match="groups = 2, expected 1"):
        layer(np.zeros(g.input_shape, np.float32))


def test_what_does_not_fit_is_refused() -> None:
    """Each refusal names what came and what was calibrated."""
    g = ConvGeometry((8, 2, 9, 7), (5, 2, 3, 2), (2, 1), ((1, 1), (0, 0)))
    store = store_of(g, (2, 3, 4))
    with pytest.raises(ValueError, match="makes 7 images, but the batch mode was calibrated with 8"):
        store.save_for(np.zeros((7, 2, 9, 7)), replace(g, input_shape=(7, 2, 9, 7)))
    with pytest.raises(ValueError, match="makes 25 places of the output, but the token mode was calibrated with 30"):
        store.save_for(np.zeros((8, 2, 9, 6)), replace(g, input_shape=(8, 2, 9, 6)))
    wide = replace(g, input_shape=(8, 3, 9, 7), weight_shape=(5, 3, 3, 2))
    with pytest.raises(ValueError, match="makes 18 numbers a patch, but the feature mode was calibrated with 12"):
        store.save_for(np.zeros((8, 3, 9, 7)), wide)
    with pytest.raises(TypeError, match="dtype float32, but the factors were made for float64"):
        store.save_for(np.zeros((8, 2, 9, 7), np.float32), g)
    with pytest.raises(ValueError, match="linear layer"):
        store.save_for(np.zeros((8, 4)), LinearGeometry((8, 4), (2, 4)))
    with pytest.raises(TypeError, match="save_for"):
        store.save(np.zeros((8, 2, 9, 7)))
    with pytest.raises(ValueError, match="expected the input of a convolution"):
        store.check((8, 12))


@given(linear_geometries())
def test_linear_layers_have_no_patches(g: LinearGeometry) -> None:
    """Lance is the store of linear layers; this one must not take them for something else."""
    with pytest.raises(ValueError, match="expected the input of a convolution"):
        PatchLance(Subspace.random((2, 3, 4), (None,) * 3, np.random.default_rng(0))).check(g.input_shape)


# ---- planted faults ------------------------------------------------------------------------


def test_another_order_within_a_patch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel positions before channels, as some layouts have it, is caught by the full-rank property."""
    g = ConvGeometry((3, 2, 5, 6), (4, 2, 3, 2), (1, 2), ((1, 0), (0, 1)))
    x, _, grad_output = arrays(g, 0)
    original = ConvGeometry.patches

    def turned(self: ConvGeometry, images: np.ndarray, rows: slice | None = None) -> np.ndarray:
        block = original(self, images, rows)  # (b, 1, K, l)
        b, _, K, places = block.shape
        return block.reshape(b, 2, 6, places).transpose(0, 2, 1, 3).reshape(b, 1, K, places)

    exact = g.weight_gradient(x, grad_output)
    assert_allclose(gradient(g, store_of(g, patch_shape(g)), x, grad_output), exact, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(ConvGeometry, "patches", turned)
    assert np.abs(gradient(g, store_of(g, patch_shape(g)), x, grad_output) - exact).max() > 0.1


@pytest.mark.parametrize("compressed", [False, True])
def test_bias_gradient_of_a_convolution(compressed: bool) -> None:
    """C_out = 4, H_out = 6 and W_out = 5 all differ: the sum is over batch, height and width, for every store."""
    x, weight = (np.random.default_rng(i).standard_normal(s) for i, s in enumerate([(2, 3, 8, 6), (4, 3, 3, 2)]))
    g = ConvGeometry(x.shape, weight.shape)
    assert g.output_shape == (2, 4, 6, 5)
    store = store_of(g, (1, 2, 3)) if compressed else nn.Conv2d(1, 1, 1, rng=0).store
    bias = np.random.default_rng(2).standard_normal(4)
    check_vjp(lambda b: F.tanh(F.conv2d(Tensor(x), Tensor(weight), b, store=store)), bias)


@pytest.mark.parametrize("H", [8, 6], ids=["other sizes", "C_out = H_out"])
def test_a_bias_gradient_along_the_wrong_axis_is_noticed(H: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed as if a permuted output were (B, C, H, W): another size, or, where that fits, other numbers."""

    def wrong(ctx: Any, grad_output: np.ndarray) -> tuple[Any, ...]:
        permuted = grad_output.transpose(0, 2, 3, 1)  # (B, H_out, W_out, C_out)
        return (*Conv2d.gradients(ctx, grad_output), permuted.sum(axis=(0, 2, 3)))  # (H_out,)

    x, weight = np.random.default_rng(0).standard_normal((2, 3, H, 6)), np.ones((4, 3, 3, 2))
    bias = np.random.default_rng(2).standard_normal(4)
    monkeypatch.setattr(Conv2d, "backward", staticmethod(wrong))
    with pytest.raises((ValueError, AssertionError)):
        check_vjp(lambda b: F.tanh(F.conv2d(Tensor(x), Tensor(weight), b)), bias)
