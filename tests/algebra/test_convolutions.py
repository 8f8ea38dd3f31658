"""Transposed convolutions and those of volumes as geometries: their products, and LANCE's arithmetic on them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, ranks_for, transposed_geometries, volume_geometries

from lance_ref.algebra import projection, projection_fast
from lance_ref.algebra.convolution import Convolution
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.algebra.modes import multi_mode_product
from lance_ref.algebra.subspace import Subspace
from lance_ref.algebra.volumes import TransposedGeometry, VolumeGeometry
from lance_ref.engine.counting import count_macs

ANY = st.one_of(transposed_geometries(), volume_geometries(), conv_geometries())
OTHERS = st.one_of(transposed_geometries(), volume_geometries())
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def by_definition(g: Convolution, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Y[b,o,y] = Σ_{c,p} W[o,c,p] · X[b, c, seen(y, p)], one position of the kernel after the other."""
    outputs_first = g.outputs_first(weight).reshape(g.groups, -1, g.width, *g.kernel)
    out = np.zeros((g.input_shape[0], g.groups, g.out_channels // g.groups, *g.output_shape[2:]))
    for position in np.ndindex(*g.kernel):
        shown = x
        for axis, p in enumerate(position):
            places, n = g.seen(axis)[:, p], g.input_shape[2 + axis]
            chosen = np.zeros((len(places), n))  # a row of zeros where no place is seen
            for y, place in enumerate(places):
                if 0 <= place < n:
                    chosen[y, place] = 1
            shown = np.moveaxis(np.tensordot(chosen, shown, (1, 2 + axis)), 0, 2 + axis)
        by_group = shown.reshape(len(x), g.groups, g.width, *shown.shape[2:])
        out += np.einsum("goc,bgc...->bgo...", outputs_first[(..., *position)], by_group)
    return out.reshape(g.output_shape)


@given(ANY, st.integers(0, 99))
def test_what_is_seen_defines_the_output(g: Convolution, seed: int) -> None:
    """LANCE's arithmetic knows a convolution by ``seen`` alone: a wrong place there would be a wrong gradient."""
    x, weight, _ = arrays(g, seed)
    np.testing.assert_allclose(g.forward(x, weight), by_definition(g, x, weight), **CLOSE)


@given(ANY, st.integers(0, 99))
def test_the_three_products_belong_together(g: Convolution, seed: int) -> None:
    """⟨G, Y(X, W)⟩ is bilinear: both gradients give it back, and each product counts the same multiply-adds."""
    x, weight, grad_output = arrays(g, seed)
    counts = []
    values = []
    for product in (
        lambda: np.vdot(grad_output, g.forward(x, weight)),
        lambda: np.vdot(g.input_gradient(weight, grad_output), x),
        lambda: np.vdot(g.weight_gradient(x, grad_output), weight),
    ):
        with count_macs() as counter:
            values.append(product())
        counts.append(sum(counter.by_kind().values()))
    np.testing.assert_allclose(values, values[0], rtol=1e-9, atol=1e-9)
    assert counts == [x.shape[0] * g.places * g.out_channels * g.width * int(np.prod(g.kernel))] * 3


@given(ANY, st.integers(0, 99))
def test_a_weight_goes_to_outputs_first_and_back(g: Convolution, seed: int) -> None:
    """A wrong order of groups would show as another weight."""
    _, weight, _ = arrays(g, seed)
    turned = g.outputs_first(weight)
    assert turned.shape == (g.out_channels, g.width, *g.kernel)
    np.testing.assert_array_equal(g.as_weight(turned), weight)


@given(OTHERS, st.integers(0, 99))
def test_full_rank_gives_backpropagations_gradient(g: Convolution, seed: int) -> None:
    """Whatever kind of convolution it is, in both orders."""
    x, _, grad_output = arrays(g, seed)
    factors = Subspace.random(g.input_shape, g.input_shape, np.random.default_rng(seed)).factors
    core, expected = projection.project(x, factors), g.weight_gradient(x, grad_output)
    for order in (projection.papers_order, projection.separable_order):
        np.testing.assert_allclose(order(core, factors, grad_output, g), expected, **CLOSE)


@given(st.data(), st.integers(0, 99))
def test_the_gradient_is_that_of_the_reconstruction(data: st.DataObject, seed: int) -> None:
    """At any ranks, in both orders, and as stores run it with each choice of order."""
    g = data.draw(OTHERS)
    ranks = data.draw(ranks_for(g.input_shape))
    x, _, grad_output = arrays(g, seed)
    factors = Subspace.random(g.input_shape, ranks, np.random.default_rng(seed)).factors
    core = projection.project(x, factors)
    expected = g.weight_gradient(multi_mode_product(core, factors), grad_output)
    found = [order(core, factors, grad_output, g) for order in (projection.papers_order, projection.separable_order)]
    found += [
        projection_fast.weight_gradient(core, factors, grad_output, g, order)
        for order in ("auto", "papers", "separable")
    ]
    np.testing.assert_allclose(projection_fast.project(x, factors), core, **CLOSE)
    for gradient in found:
        assert gradient.flags.c_contiguous
        np.testing.assert_allclose(gradient, expected, **CLOSE)


@given(OTHERS, st.integers(0, 99))
def test_the_gradient_of_a_mean_is_that_of_a_map_of_it(g: Convolution, seed: int) -> None:
    """The padding is zero and not the mean, and rows that no input place reaches add nothing."""
    x, _, grad_output = arrays(g, seed)
    mean = x[0].reshape(x.shape[1], -1)[:, 0].copy()
    everywhere = np.broadcast_to(mean.reshape(-1, *[1] * len(g.kernel)), g.input_shape)
    expected = g.weight_gradient(np.ascontiguousarray(everywhere), grad_output)
    np.testing.assert_allclose(projection.mean_weight_gradient(mean, grad_output, g), expected, **CLOSE)


@pytest.mark.parametrize("groups", [1, 2])
def test_few_channels_at_a_time_give_the_same_gradient(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole groups of outputs are worked on at a time, and put in the order of a transposed weight in the end."""
    g = TransposedGeometry((3, 4, 5, 4), (4, 6 // groups, 3, 2), (2, 1), ((1, 1), (0, 0)), groups=groups)
    x, _, grad_output = arrays(g, 0)
    factors = Subspace.random(g.input_shape, (2, None, 3, 2), np.random.default_rng(0)).factors
    core = projection.project(x, factors)
    monkeypatch.setattr(projection_fast, "CONTRACTION_BYTES", 4096)
    calls = []
    contract = projection.multiply_by_core
    monkeypatch.setattr(projection, "multiply_by_core", lambda *args: calls.append(1) or contract(*args))
    found = projection_fast.weight_gradient(core, factors, grad_output, g, "separable")
    assert len(calls) > 1
    np.testing.assert_allclose(found, projection.separable_order(core, factors, grad_output, g), **CLOSE)


def test_sizes_worked_by_hand() -> None:
    """A stride of 2 doubles a map; a kernel of 3 with padding 1 leaves a volume as it is."""
    transposed = TransposedGeometry((2, 3, 4, 5), (3, 6, 4, 4), (2, 2), ((1, 1), (1, 1)))
    assert transposed.output_shape == (2, 6, 8, 10)
    assert transposed.mirror == ConvGeometry((2, 6, 8, 10), (3, 6, 4, 4), (2, 2), ((1, 1), (1, 1)))
    volume = VolumeGeometry((2, 3, 4, 5, 6), (7, 3, 3, 3, 3), padding=((1, 1),) * 3)
    assert volume.output_shape == (2, 7, 4, 5, 6)
    assert transposed.seen(0)[:3].tolist() == [[-1, 0, -1, -1], [1, -1, 0, -1], [-1, 1, -1, 0]]
    assert volume.seen(0).tolist() == [[-1, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
