"""Training in a subspace: the same steps as LANCE on the whole weight, with fewer numbers that train."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import conv_geometries, linear_geometries, ranks_for

from lance_ref import Subspace, Tensor, attach, merge, nn, optim
from lance_ref.algebra.frame import Frame
from lance_ref.algebra.geometry import ConvGeometry, Geometry
from lance_ref.lance.patches import PatchLance, patch_shape
from lance_ref.nn.module import Module
from lance_ref.nn.utils import clip_grad_norm_
from lance_ref.stores import ActivationStore, Lance

STEPS = 100


def layer_of(geometry: Geometry, seed: int = 0) -> Module:
    """A layer of these sizes in float64."""
    rng = np.random.default_rng(seed)
    if isinstance(geometry, ConvGeometry):
        C_out, width, *kernel = geometry.weight_shape
        g = geometry
        layer: Module = nn.Conv2d(
            width * g.groups, C_out, kernel, g.stride, g.padding, g.dilation, g.groups, rng=rng
        )  # fmt: skip
    else:
        layer = nn.Linear(*reversed(geometry.weight_shape), rng=rng)
    return layer.to(np.float64)


def store_of(geometry: Geometry, kind: str, ranks: tuple[int | None, ...], seed: int) -> ActivationStore:
    """LANCE of random subspaces: plain, of activations without their mean, or of patches."""
    rng = np.random.default_rng(seed)
    if kind == "patches":
        assert isinstance(geometry, ConvGeometry)
        return PatchLance(Subspace.random(patch_shape(geometry), ranks, rng), np.float64)
    space = Subspace.random(geometry.input_shape, ranks, rng)
    if kind == "centred":
        features = geometry.input_shape[1 if isinstance(geometry, ConvGeometry) else -1]
        space = dataclasses.replace(space, frame=Frame(None, rng.standard_normal(features)))
    return Lance(space, dtype=np.float64)


def train(layer: Module, geometry: Geometry, make: Any, clip: float, steps: int = STEPS) -> None:
    """So many steps on a loss that is linear in the output, with other images and other coefficients each."""
    optimiser = make([p for p in layer.parameters() if p.requires_grad])
    rng = np.random.default_rng(5)
    for _ in range(steps):
        x, v = rng.standard_normal(geometry.input_shape), rng.standard_normal(geometry.output_shape)
        optimiser.zero_grad()
        y = layer(Tensor(x))
        (y * y * v).mean().backward()
        clip_grad_norm_(optimiser.params, clip)
        optimiser.step()


@st.composite
def cases(draw: Any) -> tuple[Geometry, str, tuple[int | None, ...]]:
    """A geometry, a kind of store, and its ranks, with a feature mode that is compressed."""
    kind = draw(st.sampled_from(["plain", "centred", "patches"]))
    geometry: Geometry = draw(st.one_of(conv_geometries(), linear_geometries()))
    if kind == "patches":
        geometry = draw(conv_geometries(depthwise=False).filter(lambda g: g.groups == 1))
        shape, feature = patch_shape(geometry), 2  # type: ignore[arg-type]
    else:
        shape = geometry.input_shape
        feature = 1 if isinstance(geometry, ConvGeometry) else len(shape) - 1
    ranks = list(draw(ranks_for(shape)))
    ranks[feature] = draw(st.integers(1, shape[feature]))
    return geometry, kind, tuple(ranks)


RULES = st.fixed_dictionaries(
    {
        "lr": st.just(0.05),
        "momentum": st.sampled_from([0.0, 0.9]),
        "dampening": st.sampled_from([0.0, 0.3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "nesterov": st.booleans(),
    }
).filter(lambda rule: not rule["nesterov"] or (rule["momentum"] > 0 and rule["dampening"] == 0))


@given(cases(), RULES, st.sampled_from([0.05, np.inf]), st.sampled_from(["merged", "factored", "auto"]))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], deadline=None)
def test_equals_lance_on_the_whole_weight(case: Any, rule: dict[str, Any], clip: float, forward: str) -> None:
    """A hundred steps of SGD by any rule end at the same weight and bias, whichever of W and D trains."""
    geometry, kind, ranks = case
    layers = [nn.Sequential(layer_of(geometry)) for _ in range(2)]
    for layer, update in zip(layers, ("weight", "subspace"), strict=True):
        attach(layer, lambda *_: store_of(geometry, kind, ranks, 1), update=update, forward=forward)
        train(layer, geometry, lambda parameters: optim.SGD(parameters, **rule), clip)
    if layers[1][0].update is not None:
        assert layers[1][0].update.weight.size < layers[1][0].weight.size
        assert merge(layers[1]) == ["0"]
    for mine, theirs in zip(layers[1].parameters(), layers[0].parameters(), strict=True):
        scale = np.abs(theirs.data).max()
        np.testing.assert_allclose(mine.data, theirs.data, rtol=1e-9, atol=1e-10 * scale)
