"""Cost rule of LANCE on patches: predicted equals executed, bytes and multiply-adds; hand integers; planted faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import conv_geometries, ranks_for
from test_cost_stores import differences, step

from analysis.rules import account, tucker_costs
from lance_ref import Subspace, nn, trace
from lance_ref.algebra import geometry
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.lance.patches import PatchLance, patch_shape

HAND = ConvGeometry((8, 2, 9, 7), (5, 2, 3, 2), (2, 1), ((1, 1), (0, 0)))
"""Output (8, 5, 5, 6): patches (8, 30, 12)."""


def store_of(g: ConvGeometry, ranks: tuple[int | None, ...], dtype: Any = np.float32) -> PatchLance:
    """Random factors of these ranks."""
    return PatchLance(Subspace.random(patch_shape(g), ranks, np.random.default_rng(0)), dtype)


@settings(max_examples=60)
@given(
    data=st.data(),
    g=conv_geometries(depthwise=False),
    dtype=st.sampled_from([np.float32, np.float64]),
    workspace=st.sampled_from([64, 1000, 2**23]),
)
def test_costs_what_is_predicted(data: Any, g: ConvGeometry, dtype: Any, workspace: int) -> None:
    """Any ranks, any convolution of one group, and blocks of any size: they must not change what is multiplied."""
    g = replace(g, weight_shape=(g.weight_shape[0], g.input_shape[1], *g.weight_shape[2:]), groups=1)
    ranks = data.draw(ranks_for(patch_shape(g)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "WORKSPACE_BYTES", workspace)
        assert not differences(*step(g, store_of(g, ranks, dtype), dtype))


@pytest.mark.parametrize(
    ("ranks", "core", "projection", "grad_weight", "factors"),
    [
        # 1/r − 1/n: feature 1/4 − 1/12, token 1/3 − 1/30, batch 1/2 − 1/8: batch, token, feature
        # 8·30·12·2, 2·30·12·3, 2·3·12·4; G: 8·30·5·2, 2·30·5·3, then 2·3·5·4 and 5·4·12
        ((2, 3, 4), 24, 5760 + 2160 + 288, 2400 + 900 + 120 + 240, 16 + 90 + 48),
        ((None, None, 4), 960, 11520, 240 * 5 * 4 + 240, 48),
        # token first: 8·30·12·3, then 8·3·12·4
        ((None, 3, 4), 96, 8640 + 1152, 3600 + 24 * 5 * 4 + 240, 90 + 48),
        ((2, None, None), 720, 5760, 2400 + 60 * 5 * 12, 16),
        ((None, None, None), 2880, 0, 240 * 5 * 12, 0),
    ],
)
def test_by_hand(ranks: tuple[int | None, ...], core: int, projection: int, grad_weight: int, factors: int) -> None:
    """Patches (8, 30, 12), five outputs; bytes in float32."""
    assert patch_shape(HAND) == (8, 30, 12)
    cost, measured = step(HAND, store_of(HAND, ranks), np.float32)
    kept = [saved.storage.nbytes for saved in cost.tape if not saved.storage.is_parameter]
    assert kept == [4 * core]
    assert (cost.projection_macs, cost.grad_weight_macs, cost.subspace_bytes) == (projection, grad_weight, 4 * factors)
    assert cost.paper_bytes == 4 * core
    assert not differences(cost, measured)


@pytest.mark.parametrize(
    ("function", "wrong", "what"),
    [
        ("projection_macs", lambda shape, ranks: np.prod(shape) * sum(ranks), "projection"),
        ("linear_weight_gradient_macs", lambda *sizes: 2400 + 900 + 120, "grad_weight"),
        ("core_elements", lambda shape, ranks: 8 * 2 * 9 * 7, "tape"),
        ("factor_elements", lambda shape, ranks: 16 + 90 + 2 * 4, "factors"),
    ],
    ids=["each mode on the whole", "expansion forgotten", "the input kept", "channels for patches"],
)
def test_planted_faults_are_caught(function: str, wrong: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that forgets something differs from what runs, in the number that it is about."""
    monkeypatch.setattr(tucker_costs, function, wrong)
    assert set(differences(*step(HAND, store_of(HAND, (2, 3, 4)), np.float32))) == {what}


def test_the_rule_refuses_groups() -> None:
    """A trace runs nothing: the cost of something that cannot run must not be printed."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, rng=0))
    net[0].store = PatchLance(Subspace.random((2, 9, 18), (None, None, 3), np.random.default_rng(0)))
    with pytest.raises(ValueError, match="layer '0': patch-lance takes no groups, the convolution has 2"):
        account.account(trace(net, (2, 4, 5, 5)), head=None)
