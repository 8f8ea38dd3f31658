"""Fused passes against the same operations one by one: values, multiply-adds, gradients."""

from __future__ import annotations

from typing import Any

import fused_nets
import numpy as np
import pytest
from hypothesis import given

from lance_ref import count_macs, models, no_grad, tune
from lance_ref import functional as F
from lance_ref.fused import deferral, plan
from lance_ref.nn.module import Module


def both(call: Any) -> tuple[Any, Any]:
    """What a call gives fused, and with every operation for itself."""
    fused = call()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferral, "enabled", lambda: False)
        return fused, call()


@given(graph=fused_nets.graphs())
def test_any_graph_gives_the_same(graph: tuple[Any, ...]) -> None:
    """An operation joined with the wrong one, a map overwritten while it is needed, a value that was let go of."""
    channels, steps, kept, seed = graph
    x = np.random.default_rng(seed).standard_normal((5, channels, 6, 7))

    def run() -> tuple[np.ndarray, dict[Any, int]]:
        net = fused_nets.Graph(channels, steps, kept, np.random.default_rng(seed)).to(np.float64)
        with no_grad(), count_macs() as counter, np.errstate(all="ignore"):
            return net(x).data, dict(counter.macs)

    (got, macs), (expected, expected_macs) = both(run)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10 * max(1.0, np.abs(expected).max()))
    assert macs == expected_macs


@pytest.mark.parametrize("after", ["add", "hardswish", "relu6"])
@pytest.mark.parametrize("kind", ["depthwise", "pointwise", "conv"])
def test_each_convolution_with_what_follows_it(kind: str, after: str) -> None:
    """A residual, or an activation that is no clamp, behind each kind of convolution."""
    steps = [("pointwise", 0, 0), (kind, 0, 0), (after, 0, 1)]
    net = fused_nets.Graph(3, steps, [], np.random.default_rng(0)).to(np.float64)
    x = np.random.default_rng(0).standard_normal((5, 3, 6, 7))
    with no_grad():
        got, expected = both(lambda: net(x).data)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def net_of(name: str, size: int, dtype: Any, tuning: str | None) -> tuple[Module, np.ndarray]:
    rng = np.random.default_rng(1)
    net = models.create(name, num_classes=5, rng=0).to(dtype)
    for module in net.modules():
        if hasattr(module, "running_mean") and module.running_mean is not None:
            module.running_mean[:] = 0.1 * rng.standard_normal(module.running_mean.shape)
            module.running_var[:] = rng.uniform(0.5, 2, module.running_var.shape)
    if tuning is not None:
        tune(net, tuning)
    return net, rng.standard_normal((5, 3, size, size)).astype(dtype)


NETS = [
    ("mobilenetv2", 32),
    ("mcunet", 64),
    ("resnet8", 32),
    ("convnet", 16),
    ("mobilenetv3-small", 32),
    ("resnet18", 32),
]


@pytest.mark.parametrize(("name", "size"), NETS, ids=[name for name, _ in NETS])
def test_evaluation_of_the_networks(name: str, size: int) -> None:
    """In double precision to 1e-12, in single to 1e-5, and every multiply-add under its layer."""
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        net, x = net_of(name, size, dtype, None)
        net.eval()

        def run(net: Module = net, x: np.ndarray = x) -> tuple[np.ndarray, dict[Any, int]]:
            with no_grad(), count_macs() as counter:
                return net(x).data, dict(counter.macs)

        (got, macs), (expected, expected_macs) = both(run)
        assert got.dtype == dtype
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
        assert macs == expected_macs
        assert sum(macs.values()) > 0


@pytest.mark.parametrize("name", ["mobilenetv2", "mcunet", "resnet8"])
def test_gradients_behind_a_fused_prefix(name: str) -> None:
    """The layers that train see the same inputs, the residuals around the cut included."""
    results = {}
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deferral, "enabled", lambda fused=fused: fused)
            net, x = net_of(name, 32, np.float64, "last:3")
            if name == "mobilenetv2":
                net.classifier[0].p = 0.0
            F.cross_entropy(net(x), np.arange(5)).backward()
            results[fused] = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    assert len(results[True]) >= 3
    assert results[True].keys() == results[False].keys()
    for key, grad in results[True].items():
        expected = results[False][key]
        assert np.abs(grad - expected).max() <= 1e-11 * np.abs(expected).max(), key


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails if maps are put where others still lie."""
    net, x = net_of("mobilenetv2", 32, np.float64, None)
    net.eval()
    original = plan.plan

    def broken(*arguments: Any) -> plan.PassPlan:
        made = original(*arguments)
        made.places = dict.fromkeys(made.places, 0)
        return made

    monkeypatch.setattr(deferral, "plan", broken)
    monkeypatch.setattr(deferral, "_plans", type(deferral._plans)())
    with no_grad():
        got, expected = both(lambda: net(x).data)
    assert not np.allclose(got, expected, rtol=1e-3)
