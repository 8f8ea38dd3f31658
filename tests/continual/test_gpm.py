"""Gradient projection memory: no step moves a weight along its protected directions, at the predicted cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from continual_cases import BODY, LEAK, bases_of, make_net, sgd, task, train, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from analysis.rules import protection_costs
from lance_ref import count_macs, nn
from lance_ref.continual import GPM, check_optimizer, compress_for_task, leak
from lance_ref.engine.state import state
from lance_ref.nn.selection import weighted_layers


@settings(max_examples=30)
@given(
    kind=st.sampled_from(["linear", "conv"]),
    dtype=st.sampled_from([np.float32, np.float64]),
    steps=st.integers(1, 6),
    momentum=st.sampled_from([0.0, 0.9]),
    clip=st.sampled_from([None, 0.5]),
    threshold=st.sampled_from([0.5, 0.8]),
    seed=st.integers(0, 99),
)
def test_no_step_moves_a_weight_along_its_basis(
    kind: str, dtype: Any, steps: int, momentum: float, clip: float | None, threshold: float, seed: int
) -> None:
    """‖ΔW M‖ ≤ 1e-6 ‖ΔW‖ in float64, 1e-4 in float32, after any steps, with momentum and clipping."""
    net = make_net(kind, dtype)
    protected = bases_of(net, kind, task(kind, dtype, seed)[0], threshold)
    before, optimizer = weights(net, BODY[kind]), sgd(net, momentum=momentum)
    check_optimizer(optimizer, net, protected)
    train(net, optimizer, *task(kind, dtype, seed + 100), steps, clip, GPM(net, protected).project)
    check_optimizer(optimizer, net, protected)  # its momentum has no part along M
    for path, W in before.items():
        after = weighted_layers(net)[path].weight
        assert after.dtype == dtype
        assert np.abs(after.data - W).max() > 0
        assert leak(W, after, protected[path]) <= LEAK[dtype]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_without_the_projection_weights_move_along_the_basis(kind: str) -> None:
    """The same run without GPM breaks the invariant: the test above would notice a projection that does nothing."""
    net = make_net(kind, np.float64)
    protected = bases_of(net, kind, task(kind, np.float64, 0)[0], 0.8)
    before = weights(net, BODY[kind])
    train(net, sgd(net), *task(kind, np.float64, 1), 3)
    assert min(leak(W, weighted_layers(net)[path].weight, protected[path]) for path, W in before.items()) > 0.1


def test_by_hand() -> None:
    """(3, 4, 1) loses its part along (3, 4, 0)/5; a convolution's weight is a matrix (C_out, C_in·k_h·k_w)."""
    net = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False, rng=0))
    net[0].weight.grad = np.array([3.0, 4.0, 1.0], np.float32).reshape(1, 3, 1, 1)
    GPM(net, {"0": np.array([[0.6], [0.8], [0.0]])}).project()
    assert net[0].weight.grad.shape == (1, 3, 1, 1)
    assert_allclose(net[0].weight.grad.ravel(), [0, 0, 1], atol=1e-6)


def test_costs_what_is_predicted() -> None:
    """2·C_out·n·m multiply-adds a layer and step, and the bases in the weights' dtype: nothing else is in memory."""
    net = make_net("conv", np.float32)
    protected = bases_of(net, "conv", task("conv", np.float32, 0)[0], 0.8)
    gpm = GPM(net, protected)
    with count_macs() as counter:
        train(net, sgd(net), *task("conv", np.float32, 1), 3, after_backward=gpm.project)
    modules = weighted_layers(net)
    shapes = {"0": ((16, 30, 18), 960), "2": ((16, 8, 24), 1920), "5": ((16, 40), 640)}
    bills = {
        path: protection_costs.gpm_bill(shape, elements, len(modules[path].weight.data), protected[path].shape[1])
        for path, (shape, elements) in shapes.items()
    }
    for path, bill in bills.items():
        counted = counter.by_layer(path)
        assert counted["projection"] == 3 * bill.projection_macs > 0
        assert counted["grad_weight"] == 3 * bill.grad_weight_macs
    assert gpm.ram_bytes == sum(bill.ram_bytes for bill in bills.values())
    assert sum(M.nbytes for M in protected.values()) == sum(bill.flash_bytes for bill in bills.values())


def test_costs_by_hand() -> None:
    """Five outputs of 12 numbers, 7 of them protected: two products of 5·12·7; 12·7 floats."""
    net = nn.Sequential(nn.Conv2d(2, 5, (3, 2), bias=False, rng=0))
    net[0].weight.grad = np.ones((5, 2, 3, 2), np.float32)
    gpm = GPM(net, {"0": np.eye(12)[:, :7]})
    with count_macs() as counter:
        gpm.project()
    assert counter.macs == {("0", "projection"): 840}
    assert gpm.ram_bytes == 4 * 84
    bill = protection_costs.gpm_bill((8, 30, 12), 1008, 5, 7)
    assert (bill.projection_macs, bill.ram_bytes, bill.flash_bytes) == (840, 336, 672)
    assert (bill.kept_bytes, bill.grad_weight_macs) == (4032, 8 * 30 * 12 * 5)
    assert protection_costs.gpm_bill((8, 30, 12), 1008, 5, 12).step_macs == 8 * 30 * 12 * 5


def test_a_saturated_layer_has_a_gradient_of_zero() -> None:
    """Two products with a square M would leave rounding, all of it along M."""
    net = nn.Sequential(nn.Linear(4, 3, bias=False, rng=0), nn.Linear(3, 2, bias=False, rng=1))
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    gpm = GPM(net, {"0": Q, "1": None})
    other = np.full((2, 3), 2.0, np.float32)
    net[0].weight.grad, net[1].weight.grad = np.ones((3, 4), np.float32), other.copy()
    with count_macs() as counter:
        gpm.project()
    assert not net[0].weight.grad.any()
    np.testing.assert_array_equal(net[1].weight.grad, other)
    assert not counter.macs
    assert gpm.ram_bytes == 0
    net[0].weight.grad = net[1].weight.grad = None
    gpm.project()  # nothing to do
    assert net[0].weight.grad is None


def test_projecting_leaves_rounding_where_most_of_the_gradient_is_protected() -> None:
    """In float32, with all but 1e-5 of the inputs along M: GPM leaks, LANCE's gradient is made of free directions."""
    rng = np.random.default_rng(0)
    M = np.linalg.qr(rng.standard_normal((20, 8)))[0]
    x = (rng.standard_normal((16, 8)) @ M.T + 1e-5 * rng.standard_normal((16, 20))).astype(np.float32)
    labels = rng.integers(0, 3, 16)
    leaks = {}
    for name in ("gpm", "lance"):
        net = nn.Sequential(nn.Linear(20, 3, bias=False, rng=0))
        if name == "lance":
            compress_for_task(net, [x], {"0": M}, epsilon=0.9)
        train(net, sgd(net, lr=0.0), x, labels, 1, after_backward=GPM(net, {"0": M}).project if name == "gpm" else int)
        gradient = net[0].weight.grad
        leaks[name] = leak(np.zeros_like(gradient), gradient, M)
        assert state.path == ""  # what comes after is not booked under the layer
    assert leaks["gpm"] > 1e-3
    assert leaks["lance"] < 1e-6


def test_wrong_bases_are_refused() -> None:
    """A basis of channels for a layer of patches, a missing layer, and groups."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3, rng=0), nn.Conv2d(4, 4, 3, groups=2, rng=0))
    with pytest.raises(ValueError, match=r"protected\['0'\] has shape \(4, 1\), expected \(36, m\)"):
        GPM(net, {"0": np.eye(4)[:, :1]})
    with pytest.raises(ValueError, match="groups = 2"):
        GPM(net, {"1": None})
    with pytest.raises(ValueError, match="protected names layer '7', expected one of '0', '1'"):
        GPM(net, {"7": None})
    with pytest.raises(ValueError, match="not orthonormal"):
        GPM(net, {"0": np.ones((36, 1))})
