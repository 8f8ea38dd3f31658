"""What stores run equals the equations, written line by line, on random layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries, ranks_for

from lance_ref import Subspace
from lance_ref.algebra import projection, projection_fast
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.stores import Lance

ORDERS = st.sampled_from(["auto", "papers", "separable"])
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def case(data: Any, g: Any, seed: int) -> tuple[np.ndarray, Any, np.ndarray, np.ndarray]:
    """An activation, factors of any ranks, the core in one product per mode, and a gradient of the output."""
    factors = Subspace.random(g.input_shape, data.draw(ranks_for(g.input_shape)), np.random.default_rng(seed)).factors
    x, _, grad_output = arrays(g, seed)
    return x, factors, projection.project(x, factors), grad_output


@given(data=st.data(), g=st.one_of(conv_geometries(), linear_geometries()), seed=st.integers(0, 99), order=ORDERS)
def test_the_core_equals_the_plain_one(data: Any, g: Any, seed: int, order: str) -> None:
    x, factors, core, _ = case(data, g, seed)
    np.testing.assert_allclose(projection_fast.project(x, factors, order), core, **CLOSE)


@given(data=st.data(), g=conv_geometries(), seed=st.integers(0, 99), order=ORDERS, small=st.booleans())
def test_a_convolutions_gradient_equals_the_plain_one(
    data: Any, g: ConvGeometry, seed: int, order: str, small: bool
) -> None:
    """Any stride, padding, dilation and groups, depthwise too; with all the workspace, and with next to none."""
    _, factors, core, grad_output = case(data, g, seed)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WORKSPACE_BYTES", "CONTRACTION_BYTES") if small else ():
            patch.setattr(projection_fast, name, 1)
        found = projection_fast.weight_gradient(core, factors, grad_output, g, order)
    for plain in (projection.papers_order, projection.separable_order):
        np.testing.assert_allclose(found, plain(core, factors, grad_output, g), **CLOSE)


@given(data=st.data(), g=linear_geometries(), seed=st.integers(0, 99))
def test_a_linear_layers_gradient_equals_the_formula(data: Any, g: LinearGeometry, seed: int) -> None:
    """Two or three dimensions: dW = Gᵀ Ã, with Ã put together in full."""
    _, factors, core, grad_output = case(data, g, seed)
    found = projection_fast.weight_gradient(core, factors, grad_output, g)
    projected = projection.multi_mode_product(core, factors)
    np.testing.assert_allclose(found, g.weight_gradient(projected, grad_output), **CLOSE)


def test_the_order_is_decided_once_for_a_geometry() -> None:
    """Counts of the orders are compared at the first step, and not at the steps after it."""
    g = ConvGeometry((7, 5, 6, 6), (4, 5, 3, 3))
    factors = Subspace.random(g.input_shape, (3, 2, 2, 1), np.random.default_rng(0)).factors
    x, _, grad_output = arrays(g, 0)
    core = projection_fast.project(x, factors)
    projection_fast.cheapest_order.cache_clear()
    for _ in range(3):
        projection_fast.weight_gradient(core, factors, grad_output, g)
    assert projection_fast.cheapest_order.cache_info().misses == 1
    assert projection_fast.cheapest_order.cache_info().hits == 2


@pytest.mark.parametrize(("order", "said"), [
    ("auto", "separable, batch and channel put back first"), ("papers", "papers"), ("separable", "separable"),
])  # fmt: skip
@pytest.mark.parametrize("batch_mode", ["calibrated", "sketch"])
def test_a_store_says_its_order(order: str, said: str, batch_mode: str) -> None:
    """What ``"auto"`` comes to for one geometry; the batch that a sketch had last does not matter."""
    g = ConvGeometry((128, 96, 7, 7), (96, 1, 3, 3), padding=((1, 1), (1, 1)), groups=96)
    subspace = Subspace.random(g.input_shape, (32, 24, 2, 2), np.random.default_rng(0))
    store = Lance(subspace, order, batch_mode=batch_mode, batch_ratio=0.25 if batch_mode == "sketch" else None)
    if batch_mode == "sketch":
        store.save(np.ones((4, 96, 7, 7), np.float32))
    assert store.order_for(g) == said
    assert store.describe()["order"] == order
