"""The simulated step by hand: lifetimes, leaves, statistics, segments, and tokens on a grid of patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_cost_exact import N, Narrow, Twice, kept, meta_peak, rows, stored

from analysis.peak import layers
from analysis.peak.lifetimes import lifetimes, lifetimes_from_scopes, renumbered
from analysis.peak.memory import parameters_bytes, peak
from analysis.peak.tucker import chain, projecting
from analysis.rules.account import account
from analysis.rules.layouts import Layout, Storage
from lance_ref import functional as F
from lance_ref import nn, record
from lance_ref.algebra import geometry
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.algebra.kernels import threads
from lance_ref.engine.tensor import Tensor
from lance_ref.stores import Asi


class Two(nn.Module):
    """Two operations in one call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.exp(F.neg(x))


def traced(net: nn.Module, *shape: int) -> list[Any]:
    with record(net) as records:
        F.cross_entropy(net(Tensor.meta(shape)), Tensor.meta(shape[:1], np.int64))
    return list(records)


@pytest.mark.parametrize(
    ("middle", "ends"),
    [
        (Two, [3, 3, 4, 5]),  # the input of the middle lives until its second operation is through
        (lambda: nn.Sequential(Two(), Two()), [5, 3, 5, 5, 6, 7]),  # and of a nested one until all of it is
    ],
)
def test_inputs_of_a_module_live_until_its_call_is_over(middle: Callable[[], nn.Module], ends: list[int]) -> None:
    """Linear, the middle, linear, loss: after how many operations each result is given back."""
    net = nn.Sequential(nn.Linear(6, 4, rng=0), middle(), nn.Linear(4, 2, rng=0))
    records = traced(net, 8, 6)
    made = [each.output.id for each in records]
    guessed = lifetimes_from_scopes(records)
    assert [guessed.get(value) for value in made] == [*ends, None]
    exact = lifetimes(net, (8, 6))
    assert all(exact[value] >= guessed[value] for value in made[:-1])
    assert exact[made[-2]] == len(records)


def test_a_leaf_takes_a_copy_of_what_is_shared() -> None:
    """The gradient of a sum goes through an addition as it is: four bytes, of which the leaf makes N."""

    def step() -> Tensor:
        return (Tensor.meta((1000,), requires_grad=True) + Tensor.meta(())).sum()

    found = meta_peak(step)
    assert found.backward_bytes == 2 * N + 4 + 4 + 4 + N
    assert found.optimizer_bytes == 2 * N + 4 + 4 + N


def test_a_view_of_a_gradient_is_copied_by_a_leaf() -> None:
    """Through a reshape: the gradient of −x, and the leaf's own."""

    def step() -> Tensor:
        return F.neg(Tensor.meta((1000,), requires_grad=True).reshape(10, 100)).sum()

    assert meta_peak(step).backward_bytes == 2 * N + 4 + N + N


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_belong_to_the_module(affine: bool) -> None:
    """Weight and bias are given, running mean and variance are there anyway."""
    C = [Tensor.meta((300,)) for _ in range(4)]

    def step() -> Tensor:
        return F.batch_norm(Tensor.meta((4, 300, 2, 2)), *C[:2], *(C[2:] if affine else ()))

    x, own = 4 * 300 * 4 * 4, 300 * 4
    assert meta_peak(step).forward_bytes == 2 * x + (2 * own + 4 * own if affine else 3 * own)


def test_a_loss_that_nothing_trains_keeps_no_labels() -> None:
    """Scores; the score of each label, the sum and the loss; no small labels."""
    B = 100_000
    found = meta_peak(lambda: F.cross_entropy(Tensor.meta((B, 2)), Tensor.meta((B,), np.int64)))
    assert found.forward_bytes == B * 8 + B * 8 + B * 8 + 3 * B * 4


def test_asi_has_no_factor_of_a_full_mode() -> None:
    """Of ranks (8, 3) for (8, 60): the feature's alone."""
    net = Narrow()

    def found() -> Any:
        return peak(traced(net, 8, 60_000), lifetimes=lifetimes(net, (8, 60_000)))

    exact = found()
    net.layer.store = Asi((8, 3))
    assert found().forward_bytes == exact.forward_bytes + 60 * 3 * 4


def test_totals() -> None:
    """Parameters beside the peak, in their own type; the state of the optimiser beside what is alive."""
    net = Twice()
    sgd, adam = (peak(traced(net, 8, 20), optimizer=name) for name in ("sgd", "adam"))
    everything = (20 * 20 + 20 + 20 * 5 + 5) * 4
    assert sgd.total_bytes == sgd.peak_bytes + everything
    assert adam.optimizer_bytes == sgd.optimizer_bytes + 2 * everything + 1600  # of the largest the denominator, too
    assert adam.forward_bytes == sgd.forward_bytes + 2 * everything
    assert parameters_bytes([Tensor(np.zeros(3)), Tensor(np.zeros(3, np.float32))]) == 24 + 12


def test_segments_run_again() -> None:
    """48 elements, negated and to the power of e, in a segment, and once more in one within it."""
    inner = nn.Recompute(Two())
    net = nn.Recompute(nn.Sequential(Two(), inner))
    with record(net) as records:
        net(Tensor.meta((8, 6), requires_grad=True)).sum()
    bills = account(list(records), None)
    assert sum(bill.cost.elementwise for bill in bills) == 48 * (2 * (2 + 1) + 2 * (2 + 2)) + 48
    assert [bill.cost.second_tape_bytes for bill in bills if bill.record.op == "recompute"] == [48 * 4, 48 * 4]


def test_tokens_on_a_grid() -> None:
    """Five tokens two by two: three patches of each of two sequences; of one token each nothing is summed."""
    x, w = Tensor.meta((2, 5, 6), requires_grad=True), Tensor.meta((4, 6), requires_grad=True)
    cost = stored(lambda: F.linear(x, w), name="gradient-filter", patch=2)
    assert cost.grad_weight_macs == cost.grad_input_macs == 2 * 3 * 4 * 6
    assert cost.elementwise == 60 + 2 * (40 + 6 * 4)
    assert kept(cost) == 6 * 6 * 4
    single = stored(lambda: F.linear(x, w), name="gradient-filter", patch=1)
    assert (single.grad_weight_macs, single.elementwise, kept(single)) == (10 * 4 * 6, 0, 60 * 4)


@pytest.mark.parametrize(("padding", "sums", "elementwise"), [(1, 150, 108), (0, 2 * 9 * 3, 150 + 2 * (72 + 72) + 108)])
def test_windows_of_one_place(padding: int, sums: int, elementwise: int) -> None:
    """The input itself where output and input have the same places; the weights are summed in any case."""
    x, w = Tensor.meta((2, 3, 5, 5), requires_grad=True), Tensor.meta((4, 3, 3, 3), requires_grad=True)
    cost = stored(lambda: F.conv2d(x, w, padding=padding), name="gradient-filter", patch=1)
    assert (kept(cost), cost.elementwise) == (sums * 4, elementwise)


def test_core_and_factors() -> None:
    """Both are kept; the input itself where every mode has full rank."""
    cost = stored(rows, name="asi", ranks=(2, 3))
    assert kept(cost) == cost.paper_bytes == (2 * 3 + 5 * 2 + 6 * 3) * 4
    full = stored(rows, name="asi", ranks=(5, 6))
    assert kept(full) == full.paper_bytes == 30 * 4
    assert [saved.what for saved in full.pytorch] == ["input", "weight"]  # PyTorch's own, no copy of it
    assert len(full.tape) == 2  # the input, and the weight for the input gradient


class Aside(nn.Module):
    """Computes something that nobody reads."""

    def forward(self, x: Tensor) -> Tensor:
        F.exp(x)
        return F.neg(x)


def test_who_is_never_given_back() -> None:
    """Input, labels and loss; what nobody reads is gone as soon as it is made."""
    net = nn.Sequential(nn.Linear(6, 4, rng=0), Aside(), nn.Linear(4, 2, rng=0))
    records = traced(net, 8, 6)
    aside = records[1].output.id
    for ends in (lifetimes(net, (8, 6)), lifetimes_from_scopes(records)):
        assert ends[aside] == 2
        never = [records[0].inputs[0], *records[-1].inputs[1:], records[-1].output]
        assert all(value.id not in ends for value in never)
    assert renumbered({1: 5, 2: 6}, {1: 10, 3: 11}) == {10: 5}


def test_height_and_width_as_one_mode_have_one_factor() -> None:
    """Of 7 × 7 places and 2 · 3 directions; on a larger map there are two, which are kept anyway."""
    assert projecting((8, 6, 7, 7), (3, None, 2, 3)) == chain((8, 6, 49), (3, None, 6))[0] + 49 * 6
    assert projecting((8, 6, 14, 14), (3, None, 2, 3)) == chain((8, 6, 14, 14), (3, None, 2, 3))[0]


def convolution(**changes: Any) -> layers.Convolution:
    """Two images (3, 8, 6), 3 × 3 kernels, one zero around."""
    sizes: dict[str, Any] = {"input_shape": (2, 3, 8, 6), "weight_shape": (4, 3, 3, 3), "padding": ((1, 1), (1, 1))}
    return layers.Convolution(ConvGeometry(**sizes | changes), itemsize=4)


def test_workspaces_of_convolutions_by_hand() -> None:
    """Patches of both images; beside them the output with channels first, or that and weights."""
    columns, copied = 2 * 8 * 27 * 6 * 4, 2 * 4 * 8 * 6 * 4
    assert convolution().forward_workspace(None) == columns + copied
    many = convolution(weight_shape=(40, 3, 3, 3))
    assert many.forward_workspace(None) == columns + 10 * copied
    assert many.weight_workspace(None, None) == columns + 10 * copied + 40 * 27 * 4
    assert many.input_workspace(None) == columns + 10 * copied
    single = convolution(input_shape=(1, 3, 8, 6), weight_shape=(40, 3, 3, 3))
    assert single.forward_workspace(None) == columns // 2  # its output lies as it must
    assert single.weight_workspace(None, None) == columns // 2 + 40 * 27 * 4
    assert single.input_workspace(None) == columns // 2
    strided = Layout(Storage(0), (2, 3, 8, 6), (144, 1, 18, 3))  # channels innermost: it is packed first
    assert many.forward_workspace(strided) == columns + 10 * copied + 2 * 3 * 8 * 6 * 4


def test_workspaces_of_convolutions_in_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the patches of an image, or for the weight gradient those of some channels of both images."""
    monkeypatch.setattr(geometry, "product_threads", lambda: 2)
    monkeypatch.setattr(geometry, "SHARED_MACS", 1)
    many = convolution(input_shape=(2, 3, 10, 10), weight_shape=(40, 3, 3, 3))
    one = 27 * 100 * 4
    assert many.forward_workspace(None) == many.input_workspace(None) == 2 * one
    assert many.weight_workspace(None, None) == 2 * one + 2 * 40 * 2 * 100 * 4 + 40 * 27 * 4
    of_two = convolution(input_shape=(4, 3, 10, 10), weight_shape=(40, 3, 3, 3))  # their outputs lie beside them
    assert of_two.forward_workspace(None) == of_two.input_workspace(None) == 2 * 2 * (one + 40 * 100 * 4)
    large = convolution(input_shape=(4, 3, 16, 20), weight_shape=(40, 3, 3, 3))  # two images have too many places
    assert large.forward_workspace(None) == large.input_workspace(None) == 2 * 27 * 320 * 4
    in_groups = convolution(input_shape=(2, 4, 10, 10), weight_shape=(40, 2, 3, 3), groups=2)
    assert in_groups.weight_workspace(None, None) == 2 * 36 * 100 * 4 + 40 * 2 * 100 * 4 + 40 * 18 * 4
    monkeypatch.setattr(geometry, "SHARED_MACS", 1 << 30)  # too little work for two
    little = convolution(input_shape=(2, 3, 10, 10), weight_shape=(40, 3, 3, 3))
    assert little.forward_workspace(None) == little.input_workspace(None) == 2 * (one + 40 * 100 * 4)


def test_workspaces_of_depthwise_loops_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image with its zeros, kernel and sum per channel for each of two threads, or one for the weight gradient."""
    monkeypatch.setattr(threads, "_threads", lambda: 2)
    loops = convolution(input_shape=(5, 16, 10, 9), weight_shape=(16, 1, 3, 3), groups=16)
    one = (12 * 11 + 9 + 1) * 16 * 4
    assert loops.forward_workspace(None) == loops.input_workspace(None) == 2 * one
    assert loops.weight_workspace(None, None) == one
    x = Layout(Storage(0), (5, 16, 10, 9), (1440, 1, 144, 16))  # channels innermost: it is packed for the loops
    assert loops.weight_workspace(None, x) == one + 5 * 16 * 10 * 9 * 4
    few = convolution(input_shape=(5, 4, 10, 9), weight_shape=(4, 1, 3, 3), groups=4)
    assert few.forward_workspace(None) == 2 * 12 * 11 * 4


def test_gradients_of_a_layer_one_after_the_other() -> None:
    """What is made stays; adding the bias takes a buffer of NumPy's, at most 32 KiB."""
    x, w, b = (Tensor.meta(shape, requires_grad=True) for shape in ((100, 50), (200, 50), (200,)))
    inputs, result = (100 * 50 + 200 * 50 + 200) * 4, 100 * 200 * 4
    found = meta_peak(lambda: F.linear(x, w, b))
    assert found.forward_bytes == inputs + result + 8192 * 4
    assert found.backward_bytes == inputs + 2 * result + inputs


def test_a_formula_on_exactly_one_block() -> None:
    """Worked out at once: x, the result, both gradients, and one and a half arrays of the slope of hardswish."""
    x = Tensor.meta((2**16,), requires_grad=True)
    assert meta_peak(lambda: F.hardswish(x)).backward_bytes == 11 * 2**17
