"""`--measure`: predictions equal what really runs, for users' own nets too, and planted faults are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.check.measure import PEAK, Comparison, Line, compare
from analysis.cost_model import predict
from analysis.reports import peaks as method_peaks
from analysis.rules import account, tucker_costs
from analysis.rules import elementwise as elementwise_rules
from analysis.rules import stores as store_rules
from analysis.rules.op_cost import Call, Saved
from analysis.rules.operations import OPERATIONS
from lance_ref import functional as F
from lance_ref import nn
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module


def measure(net: Module, shape: tuple[int, ...], tune: str = "all", **options: Any) -> Comparison:
    prediction = predict(net, 4, input_shape=shape, tune=tune, **{"ranks": "0.5", **options})
    return compare(prediction)


class TwiceNet(nn.Module):
    """One convolution called twice, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.conv(F.relu(self.conv(x))))
        return self.head(y.mean(dim=(2, 3)))


class TiedNet(nn.Module):
    """Two linear layers with one weight, counted at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.second(F.gelu(self.first(x)))))


class FunctionalNet(nn.Module):
    """Everything between its layers in forward(): a residual, views, batch norm that trains, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm(self.conv(x)))
        y = y + F.sigmoid(self.mix(y)) * y
        y = F.max_pool2d(F.pad(y, (1, 1, 1, 1)), 2)
        y = F.concatenate([y[:, :3], F.tanh(y[:, 3:])], dim=1)
        return self.head(F.flatten(F.adaptive_avg_pool2d(y, 2), 1))


class TokenNet(nn.Module):
    """A transformer block on patches: linear layers on (B, L, I), attention, layer norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).reshape(x.shape[0], 8, -1).permute(0, 2, 1)  # (B, L, 8)
        qkv = self.qkv(self.norm(tokens)).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        weights = F.softmax(qkv[0] @ qkv[1].transpose(-1, -2) * 0.5, dim=-1)
        mixed = (weights @ qkv[2]).permute(0, 2, 1, 3).reshape(x.shape[0], -1, 8)
        return self.head((tokens + self.drop(self.out(mixed))).mean(dim=1))


class ViewNet(nn.Module):
    """A layer's weight used again, transposed: a view of a parameter is no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid, self.head = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.mid(self.down(x)))
        return self.head(y @ self.down.weight + F.linear(y, self.down.weight.transpose(0, 1)))


NETS: dict[str, tuple[Callable[[], Module], tuple[int, ...]]] = {
    "called twice": (TwiceNet, (3, 8, 8)),
    "tied weights": (TiedNet, (6,)),
    "tied through a view": (ViewNet, (6,)),
    "functional": (FunctionalNet, (3, 8, 9)),
    "tokens": (TokenNet, (3, 12, 12)),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NETS)
def test_a_users_own_net_measures_as_predicted(name: str, dtype: str) -> None:
    """Nets that were registered nowhere: every byte and multiply-add, for bp and lance."""
    factory, shape = NETS[name]
    comparison = measure(factory().to(dtype), shape)
    assert comparison.agrees, str(comparison)
    assert {line.what for line in comparison.lines} >= {"tape bytes", "factor bytes", "projection multiply-adds"}


@pytest.mark.parametrize("name", ["convnet", "resnet18", "mobilenetv2"])
@pytest.mark.parametrize("tune", ["last:1", "all", "head"])
def test_a_built_in_net_measures_as_predicted(name: str, tune: str) -> None:
    """Residuals, depthwise convolutions and pooling of the shipped nets, at a small size."""
    prediction = predict(name, 2, 33, num_classes=7, tune=tune, ranks="0.4", with_weights=True)
    comparison = compare(prediction)
    assert comparison.agrees, str(comparison)


def test_a_layer_called_twice_is_billed_twice_and_its_factors_once() -> None:
    """Two activations are kept, by one set of factors."""
    prediction = predict(TwiceNet(), 4, input_shape=(3, 8, 8), tune="all", ranks="0.5")
    rows = [row.methods["lance"] for row in prediction.report.rows if row.op == "conv2d"]
    assert [row.name for row in prediction.report.rows if row.op == "conv2d"] == ["conv", "conv#2"]
    core = 2 * 2 * 4 * 4 * 4
    assert [cost.activation_bytes["tape"] for cost in rows] == [core, core]
    assert [cost.subspace_bytes for cost in rows] == [(4 * 2 + 3 * 2 + 8 * 4 + 8 * 4) * 4, 0]


def test_modes_left_alone_cost_nothing() -> None:
    """`-` in the place of a rank: no factor, no projection, the mode's full size in the core."""
    comparison = measure(FunctionalNet(), (3, 8, 9), ranks="conv=-,2,-,3;mix=2,-,2,-")
    assert comparison.agrees, str(comparison)
    assert any(line.layer == "conv" and line.what == "factor bytes" for line in comparison.lines)


def test_a_layer_left_exact_keeps_its_input() -> None:
    """`exact` in the place of ranks: that layer costs what bp costs."""
    comparison = measure(FunctionalNet(), (3, 8, 9), ranks="conv=exact;mix=2,2,2,2")
    assert comparison.agrees, str(comparison)
    kept = {(x.method, x.layer): x.measured for x in comparison.lines if x.what == "tape bytes"}
    assert kept["lance", "conv"] == kept["bp", "conv"] > kept["lance", "mix"]


@given(st.data())
@settings(max_examples=40)
def test_any_convolution_at_any_ranks(data: st.DataObject) -> None:
    """Geometry, groups and ranks drawn at random: bytes and multiply-adds of LANCE, exactly."""

    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = draw(1, 3)
    C_in, C_out = groups * draw(1, 3), groups * draw(1, 3)
    kernel, dilation = (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 2))
    shape = (C_in, draw(6, 9), draw(6, 9))
    padding = ((draw(0, 2), draw(0, 2)), (draw(0, 2), draw(0, 2)))
    net = nn.Sequential(
        nn.Conv2d(C_in, C_out, kernel, (draw(1, 3), draw(1, 3)), padding, dilation, groups),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(C_out, 3),
    )
    ranks = ",".join("-" if draw(0, 3) == 0 else str(draw(1, n)) for n in (4, *shape))
    ranks = ranks if set(ranks) - set("-,") else "exact"
    comparison = measure(net, shape, ranks=f"0={ranks}", methods=["lance"])
    assert comparison.agrees, str(comparison)


def test_a_step_that_runs_other_operations_than_its_trace_is_refused() -> None:
    """A forward() that differs from call to call cannot be predicted; saying so beats a wrong table."""

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.body, self.head = 0, nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = self.body(x)
            return self.head(F.relu(y) if self.calls > 1 else y)

    with pytest.raises(ValueError, match="other operations than the trace, from number 1 on"):
        measure(Moody(), (6,))


# ---- planted faults: each must make a comparison differ ------------------------------------


@pytest.fixture(name="differences")
def _differences() -> Callable[[], set[tuple[str, str]]]:
    """(method, what) of all numbers that differ for a net with a strided grouped convolution."""

    def run() -> set[tuple[str, str]]:
        comparison = measure(FunctionalNet(), (3, 8, 9))
        return {(line.method, line.what) for line in comparison.lines if not line.agrees}

    assert run() == set()
    return run


def test_planted_dropped_c_in(monkeypatch: pytest.MonkeyPatch, differences: Callable[[], set[tuple[str, str]]]) -> None:
    """A convolution's formula without C_in is caught in all three products."""
    right = tucker_costs.ConvSizes.macs.fget
    assert right is not None
    monkeypatch.setattr(tucker_costs.ConvSizes, "macs", property(lambda s: right(s) // (s.C_in // s.groups)))
    assert {("bp", f"{kind} multiply-adds") for kind in ("forward", "grad_input", "grad_weight")} <= differences()


def test_planted_groups_forgotten_in_the_backward(
    monkeypatch: pytest.MonkeyPatch, differences: Callable[[], set[tuple[str, str]]]
) -> None:
    """The fault of PyTorch's counter: forward right, weight gradient times the groups."""

    def forgetful(call: Call, macs: int) -> store_rules.StoreCost:
        return store_rules.lance.exact(call, macs * call.record.attributes.get("groups", 1))

    monkeypatch.setitem(store_rules.STORES, "exact", forgetful)
    found = differences()
    assert ("bp", "grad_weight multiply-adds") in found
    assert ("bp", "forward multiply-adds") not in found


def test_planted_alias_counted_twice(
    monkeypatch: pytest.MonkeyPatch, differences: Callable[[], set[tuple[str, str]]]
) -> None:
    """An array that two operations keep, billed to both."""

    def bill(saved: list[Saved], seen: object) -> int:
        return sum(item.storage.nbytes for item in saved if not item.storage.is_parameter)

    monkeypatch.setattr(account, "_bill", bill)
    assert ("bp", "tape bytes") in differences()


def test_planted_forgotten_factor(
    monkeypatch: pytest.MonkeyPatch, differences: Callable[[], set[tuple[str, str]]]
) -> None:
    """The width factor left out of the projection and of the factors' bytes."""
    right = tucker_costs.factor_elements
    monkeypatch.setattr(tucker_costs, "factor_elements", lambda shape, ranks: right(shape[:3], ranks[:3]))
    macs = tucker_costs.projection_macs
    monkeypatch.setattr(tucker_costs, "projection_macs", lambda shape, ranks, *order: macs(shape, (*ranks[:3], None)))
    assert {("lance", "factor bytes"), ("lance", "projection multiply-adds")} <= differences()


def test_planted_whole_bytes_for_bits(
    monkeypatch: pytest.MonkeyPatch, differences: Callable[[], set[tuple[str, str]]]
) -> None:
    """Nine elements take two bytes of bits, not one, and not nine."""
    monkeypatch.setattr(elementwise_rules, "index_bytes", lambda count: 8)
    assert ("bp", "tape bytes") in differences()


def test_planted_free_operation(
    monkeypatch: pytest.MonkeyPatch, differences: Callable[[], set[tuple[str, str]]]
) -> None:
    """An operation whose rule says that it keeps nothing."""
    monkeypatch.setitem(elementwise_rules.UNARY, "hardswish", elementwise_rules.UNARY["hardswish"]._replace(tape=None))
    assert ("bp", "tape bytes") in differences()


@pytest.mark.skipif(not numba_enabled(), reason="peaks are predicted for the compiled loops")
@pytest.mark.usefixtures("single_thread")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_peak_of_memory_is_what_tracemalloc_sees(optimizer: str) -> None:
    """Within 5 %, of a step in one part and in four, and with low-rank updates beside the layers."""
    methods = ["bp", "micro-batch", "lora"]
    prediction = predict("mcunet", 8, 96, methods=methods, num_classes=1000, with_weights=True, optimizer=optimizer)
    peaks = {line.method: line for line in compare(prediction, peaks=True).lines if line.what == PEAK}
    assert list(peaks) == methods
    for line in peaks.values():
        assert line.predicted == pytest.approx(line.measured, rel=0.05), line


@pytest.mark.skipif(not numba_enabled(), reason="peaks are predicted for the compiled loops")
def test_planted_forgotten_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in parts, simulated as if its first part were all of it, is not what runs."""
    monkeypatch.setattr(method_peaks, "_gradients", lambda records: {})
    comparison = compare(predict("alexnet-cl", 8, tune="all", methods="micro-batch", with_weights=True), peaks=True)
    assert [line.what for line in comparison.lines if not line.agrees] == [PEAK]
    assert "DIFFERS" in str(comparison)


def test_a_peak_may_differ_by_little_and_other_bytes_not_at_all() -> None:
    """5 % of the measured peak, or what Python's objects take; a byte too many on the tape is a difference."""

    def agrees(predicted: int, measured: int, operations: int) -> bool:
        comparison = Comparison()
        comparison.add_peak("bp", predicted, measured, operations)
        return comparison.agrees

    assert agrees(104 * 2**20, 100 * 2**20, 10)
    assert not agrees(106 * 2**20, 100 * 2**20, 1000)
    assert agrees(2**10, 55 * 2**10, 10)
    assert not agrees(2**10, 65 * 2**10, 10)
    assert not agrees(2**20, 2**20 + 300 * 2**10, 1000)
    assert not Line("bp", "conv", "tape bytes", 100 * 2**20 + 1, 100 * 2**20).agrees


def test_without_pytorch_the_measurement_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that were not checked must not look as if they had been."""
    from analysis.check import torch_replay

    monkeypatch.setattr(torch_replay, "available", lambda: False)
    comparison = measure(TiedNet(), (6,))
    assert "skipped: PyTorch is not installed" in str(comparison)
    assert not any("pytorch" in line.what for line in comparison.lines)


def test_an_operation_that_pytorch_has_not_leaves_its_column_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own operation must not stop the comparison of all the rest."""
    pytest.importorskip("torch")
    monkeypatch.setitem(OPERATIONS, "relu", replace(OPERATIONS["relu"], twin=None))
    net = nn.Sequential(nn.Linear(6, 5, rng=0), nn.ReLU(), nn.Linear(5, 3, rng=0))
    comparison = measure(net, (6,), methods=["bp"])
    assert comparison.agrees
    assert "bp: not replayed: no PyTorch counterpart for operation 'relu'" in str(comparison)
    assert {line.what for line in comparison.lines} >= {"tape bytes", "forward multiply-adds"}
    assert not any("pytorch" in line.what for line in comparison.lines)


def test_a_difference_is_shown_and_denied() -> None:
    """The printed table marks the number that differs, and the verdict is not "no difference"."""
    comparison = Comparison()
    comparison.add("bp", "forward multiply-adds", {"conv": 10, "head": 3}, {"conv": 12, "head": 3})
    assert not comparison.agrees
    text = str(comparison)
    assert "DIFFERS" in text
    assert "1 difference" in text
