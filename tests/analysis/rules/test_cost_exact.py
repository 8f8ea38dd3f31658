"""Counts and bytes as integers worked out by hand: every operation, store and buffer of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cost_cases import run

import lance_ref
from analysis.peak.arrays import division_buffer, temporaries
from analysis.peak.lifetimes import lifetimes
from analysis.peak.memory import peak, updating
from analysis.planner.costs import Costs, Device, Memory, weights_by_layer
from analysis.planner.fidelity import Fidelity, layer_fidelity, layer_shares, mode_shares, tucker_fidelity, why_not
from analysis.planner.options import Option, options_for, parse_bytes, parse_fraction_of_modes, parse_times
from analysis.ranks.batch_law import batch_spectrum, fit_batch_law, rank_for_energy
from analysis.ranks.spectra_file import LayerSpectra
from analysis.reports.continual_bill import _ranks
from analysis.reports.continual_costs import _kept
from analysis.rules import tucker_costs
from analysis.rules.account import account
from analysis.rules.calibration_costs import CalibrationCost, LayerCalibration, ModeCalibration, calibration_cost
from analysis.rules.layouts import Memory as Layouts
from analysis.rules.op_cost import OpCost, cost_of
from analysis.rules.protection_costs import LayerBill, calibration_macs, gpm_bill, lance_bill, update_macs
from analysis.rules.stores.sketch import directions
from analysis.rules.stores.tucker import asi_macs, decomposed, hosvd_macs, orthonormal_macs
from analysis.rules.tucker_costs import ConvSizes, conv_cheapest, conv_papers_macs
from analysis.steps.changes import _stretches
from analysis.steps.nets import trace_step
from lance_ref import functional as F
from lance_ref import nn, record
from lance_ref.algebra import projection_fast as projection
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.tracing import OpRecord

# ---- operations number by number -----------------------------------------------------------------

UNARY = {  # forward and backward of one element
    "neg": 2, "exp": 2, "log": 2, "sqrt": 3, "pow": 4, "tanh": 4, "sigmoid": 7, "erf": 6, "gelu": 16, "gelu_tanh": 26,
    "hardswish": 11, "hardsigmoid": 5, "relu": 2, "relu6": 3, "clip": 3, "fake_quantize": 8, "dropout": 3,
    "softmax": 9, "log_softmax": 9,
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_formulas_of_one_tensor(name: str) -> None:
    """120 elements, (2, 3, 5, 4), and their sum."""
    records, _ = run(name, real=False)
    assert sum(bill.cost.elementwise for bill in account(records, None)) == 120 * UNARY[name] + 120


@pytest.mark.parametrize(
    ("name", "elementwise"),
    [
        ("add", 6 + 6 + 6),  # forward, b folded to (3,), the sum
        ("mul both", 6 + 6 + 6 + 6),
        ("mul left", 6 + 6 + 6),
        ("mul right", 6 + 6 + 6),
        ("mul parameter", 6 + 6 + (6 + 6) + 6),
        ("div left", 6 + 6 + 6),
        ("div right", 6 + (24 + 6) + 6),
        ("mean", (24 + 2) + 2 + 2),  # (2, 1, 1); the division; back; the sum
        ("var", (4 * 24 + 2 * 3) + 3 * 24 + 3),
        ("var of all", (4 * 24 + 2) + 3 * 24),
        ("max", 2400 + 8),
        ("sum", 24 * 2 + 24 + 8),  # relu of (2, 3, 4), the sum over 3, the sum of 8
        ("expand", 360 + 360 + 360 + 360),  # (3, 1, 4) to (2, 3, 5, 4)... folded; log twice; the sum
        ("array index", 20 + 20 * 2 + 20),
        ("mse_loss", 3 * 15 + 15),
        ("avg_pool2d", 72 * 5 * 2 + 72),
        ("adaptive_avg_pool2d to one", (6 * 7 * 8 + 6) * 2 + 6),
        ("batch_norm frozen, affine trained", 120 * (2 + 1 + 4 + 1 + 1)),
        ("batch_norm frozen, only affine", 120 * (2 + 4 + 1 + 1)),
        ("batch_norm training", 120 * (8 + 2 + 7 + 2 + 1 + 1)),
        ("batch_norm training, frozen affine", 120 * (8 + 2 + 7 + 1)),
        ("batch_norm training, no affine", 120 * (6 + 2 + 7 + 1)),
        ("layer_norm frozen input", 48 * (8 + 2 + 2 + 1 + 1)),
        ("linear", 12 + 12 + 12),  # bias added, its gradient summed, the sum
        ("conv2d first layer", 2 * 4 * 4 * 8),  # no bias: the sum alone
    ],
)
def test_operations_on_several(name: str, elementwise: int) -> None:
    """Who needs a gradient, and who was repeated."""
    records, _ = run(name, real=False)
    found = sum(bill.cost.elementwise for bill in account(records, None))
    assert found == (120 + 120 + 120 + 120 if name == "expand" else elementwise)


@pytest.mark.parametrize(
    ("name", "forward", "to_input", "to_weight"),
    [
        ("conv2d", 2 * 4 * 5 * 7 * 6 * 3 * 2, 2 * 4 * 5 * 7 * 6 * 3 * 2, 2 * 4 * 5 * 7 * 6 * 3 * 2),
        ("conv2d frozen weight", 10080, 10080, 0),
        ("conv2d first layer", 2 * 4 * 4 * 8 * 3 * 3 * 2, 0, 4608),  # two groups, strides (2, 1), dilations (1, 2)
        ("linear tokens", 4 * 7 * 3 * 5, 420, 420),
        ("linear first layer", 4 * 3 * 5, 0, 60),
        ("matmul parameter", 4 * 3 * 5, 60, 60),
        ("matmul frozen parameter", 60, 60, 0),
        ("matmul batch by matrix", 2 * 7 * 4 * 3 * 5, 840 + 840, 0),
        ("matmul vector", 2 * 7 * 4 * 3, 168 + 168, 0),
    ],
)
def test_products(name: str, forward: int, to_input: int, to_weight: int) -> None:
    """Multiply-adds of the three products; a gradient of an activation is none of a weight."""
    records, _ = run(name, real=False)
    costs = [bill.cost for bill in account(records, None)]
    assert sum(cost.forward_macs for cost in costs) == forward
    assert sum(cost.grad_input_macs for cost in costs) == to_input
    assert sum(cost.grad_weight_macs for cost in costs) == to_weight


def first(step: Callable[[], Tensor]) -> OpCost:
    """The cost of the first operation."""
    with record() as records:
        step()
    return cost_of(records[0], Layouts(), True)


def test_squared_differences_both() -> None:
    """Two gradients: the second is the negative of the first."""
    both = [Tensor.meta((5, 3), requires_grad=True) for _ in range(2)]
    assert first(lambda: F.mse_loss(*both)).elementwise == 3 * 15 + 2 * 15


def test_who_is_negated_by_a_difference() -> None:
    """The subtrahend: six elements, summed to three; the gradient of the other is the one that came in."""
    a, b = Tensor.meta((2, 3), requires_grad=True), Tensor.meta((3,), requires_grad=True)
    assert first(lambda: a - Tensor.meta((3,))).elementwise == 6
    assert first(lambda: Tensor.meta((2, 3)) - b).elementwise == 6 + 6 + 6
    assert first(lambda: b - Tensor.meta((2, 3))).elementwise == 6 + 6


@pytest.mark.parametrize(
    ("trains", "backward"), [((True, False), 2 + 2), ((False, True), 1), ((True, True), 2 + 2 + 1)]
)
def test_only_weight_or_bias_of_a_norm_trains(trains: tuple[bool, bool], backward: int) -> None:
    """x̂ again and its products with the gradient, summed; the gradient, summed."""
    w, b = (Tensor.meta((8,), requires_grad=yes) for yes in trains)
    assert first(lambda: F.layer_norm(Tensor.meta((2, 3, 8)), (8,), w, b)).elementwise == 48 * (8 + backward)


def test_only_the_bias_trains() -> None:
    """Added to twelve results, and its gradient summed over them."""
    cost = first(lambda: F.linear(Tensor.meta((4, 5)), Tensor.meta((3, 5)), Tensor.meta((3,), requires_grad=True)))
    assert (cost.elementwise, cost.grad_weight_macs, cost.tape) == (24, 0, [])


def test_what_pytorch_keeps_of_pooling() -> None:
    """To one place it takes the mean, which keeps nothing."""
    x = Tensor.meta((2, 3, 7, 8), requires_grad=True)
    assert first(lambda: F.adaptive_avg_pool2d(x, 1)).pytorch == []
    assert [saved.storage.nbytes for saved in first(lambda: F.adaptive_avg_pool2d(x, (1, 2))).pytorch] == [336 * 4]


def test_positions_behind_a_new_dimension() -> None:
    """Four positions of 300, two bytes each; of 6, one byte each."""
    x = Tensor.meta((300, 6), requires_grad=True)
    assert kept(first(lambda: x[None, np.array([0, 7, 7, 299])])) == 8
    assert kept(first(lambda: x[None, :, np.array([0, 5])])) == 2


# ---- activation stores ---------------------------------------------------------------------------


def stored(step: Callable[[], Tensor], **store: Any) -> OpCost:
    """The cost of the first operation with another activation store."""
    with record() as records:
        step()
    one = records[0]
    return cost_of(replace(one, attributes={**one.attributes, "store": store}), Layouts(), True)


def convolution() -> Tensor:
    """(2, 6, 7, 8) by (4, 3, 3, 2): two groups, strides (2, 1), padding 1, dilations (1, 2); (2, 4, 4, 8)."""
    x, w = Tensor.meta((2, 6, 7, 8), requires_grad=True), Tensor.meta((4, 3, 3, 2), requires_grad=True)
    return F.conv2d(x, w, groups=2, stride=(2, 1), padding=1, dilation=(1, 2))


def rows() -> Tensor:
    """(5, 6) by (4, 6)."""
    return F.linear(Tensor.meta((5, 6), requires_grad=True), Tensor.meta((4, 6), requires_grad=True))


def kept(cost: OpCost) -> int:
    return sum(saved.storage.nbytes for saved in cost.tape if saved.what != "weight")


def test_gradient_filter() -> None:
    """2 · 2 · 4 patches; the kernel's width reaches other patches, its height does not."""
    cost = stored(convolution, name="gradient-filter", patch=2)
    assert cost.grad_weight_macs == 16 * 4 * 3
    assert cost.grad_input_macs == 16 * 4 * 3 * 2
    assert cost.elementwise == 672 + 2 * (256 + 16 * 4) + 4 * 3 * 3 * 2
    assert kept(cost) == 16 * 6 * 4


def test_a_stride_keeps_the_kernel_in_its_patch() -> None:
    """Windows of 2 · 2 input places, which a dilation of 2 does not leave."""

    def step() -> Tensor:
        x, w = Tensor.meta((2, 3, 9, 9), requires_grad=True), Tensor.meta((4, 3, 3, 3), requires_grad=True)
        return F.conv2d(x, w, stride=2, padding=2, dilation=2)

    cost = stored(step, name="gradient-filter", patch=2)
    assert cost.grad_input_macs == cost.grad_weight_macs == 2 * 3 * 3 * 4 * 3


def test_rows_are_not_cut() -> None:
    """Of (B, I) nothing is summed: the input itself is kept."""
    cost = stored(rows, name="gradient-filter", patch=2)
    assert (cost.grad_weight_macs, cost.elementwise, kept(cost)) == (5 * 4 * 6, 0, 5 * 6 * 4)


def test_codes_fill_bytes() -> None:
    """Fifteen codes of four bits: eight bytes, and two floats for each of three features."""
    x, w = Tensor.meta((5, 3), requires_grad=True), Tensor.meta((4, 3), requires_grad=True)
    assert kept(stored(lambda: F.linear(x, w), name="quantized", bits=4)) == 8 + 3 * 2 * 4


def test_ranges_of_a_coded_core() -> None:
    """A range for each feature where it has 32 entries of the core, else one for all."""
    x, w = Tensor.meta((40, 3), requires_grad=True), Tensor.meta((4, 3), requires_grad=True)
    for rank, ranges in ((32, 3), (31, 1)):
        cost = stored(lambda: F.linear(x, w), name="lance", ranks=(rank, None), core_bits=8)
        assert kept(cost) == rank * 3 + ranges * 2 * 4
        assert cost.elementwise == 2 * (120 + rank * 3) + rank * 3 * 12


def test_directions() -> None:
    """To the nearest integer, of two the even one, and at least one; all of them keep everything."""
    assert [directions(n, ratio) for n, ratio in ((8, 0.7), (5, 0.5), (7, 0.5), (3, 0.01))] == [6, 2, 4, 1]
    every = options_for(["sketch"], [], [], {"ratio": [1.0]})[0]
    assert layer_fidelity(every, (4, 3), None, None) == Fidelity(1.0, 1.0, 1.0)


def test_a_core_is_expanded_to_a_quarter() -> None:
    """Of the activation's numbers, at most: beyond that the core stays compressed though it costs more.

    With the channels put back: 480 numbers of at most 420, and 19,584 multiply-adds.
    """
    sizes = ConvSizes(8, 6, (5, 7), C_out=4, size_out=(3, 6), kernel=(3, 2), groups=2)
    assert conv_cheapest(sizes, (4, 6, 4, 5)) == (19_704, "papers", ())


def test_the_papers_order_with_groups() -> None:
    """Z1, Z2 by the width first, Z3, and each output channel's own three rows of the channels' factor."""
    sizes = ConvSizes(8, 6, (5, 7), C_out=4, size_out=(3, 6), kernel=(3, 2), groups=2)
    Z1, Z2, Z3 = 8 * 4 * 3 * 6 * 3, 120 * 7 + 210 * 5, 3 * 4 * 3 * 6 * 5 * 3 * 2
    assert conv_papers_macs(sizes, (3, 5, 2, 4)) == Z1 + Z2 + Z3 + 4 * 3 * 2 * 5 * 3


def test_limits_are_those_of_the_library() -> None:
    """What decides which order runs."""
    for name in ("EXPANDED_ELEMENTS", "SMALL_MAP", "SMALL_CORE"):
        assert getattr(tucker_costs, name) == getattr(projection, name)


def test_a_square_unfolding() -> None:
    """The Gram of its rows, and no product after it."""
    assert hosvd_macs((6, 2, 3), (2, None, None), (True, False, False)) == 36 * 6 + 9 * 216 // 2


def test_which_modes_are_decomposed() -> None:
    """Not those of size one, none at a threshold of one, and only those that are selected."""
    none = (None, None, None)
    assert decomposed((1, 4, 5), none, {"epsilon": 0.9}) == (False, True, True)
    assert decomposed((1, 4, 5), none, {"epsilon": 0.9, "selected": (True, False, True)}) == (False, False, True)
    assert decomposed((2, 4, 5), none, {"epsilon": 1}) == (False, False, False)
    assert decomposed((2, 4, 5), (1, None, 5), {}) == (True, False, True)


def test_codes() -> None:
    """⌈672·bits/8⌉ bytes, two floats a channel, twelve operations an element; products as ever."""
    for bits, nbytes in ((4, 336), (8, 672)):
        cost = stored(convolution, name="quantized", bits=bits)
        assert kept(cost) == nbytes + 2 * 6 * 4
        assert cost.elementwise == 672 * 12
        assert cost.grad_weight_macs == cost.grad_input_macs == cost.forward_macs == 4608


def test_sketch() -> None:
    """Two directions of a batch of five, and a seed."""
    cost = stored(rows, name="sketch", ratio=0.5)
    assert kept(cost) == 2 * 6 * 4 + 8
    assert cost.grad_weight_macs == 5 * 4 * 2 + 2 * 4 * 6
    assert cost.projection_macs == 30 * 2
    assert cost.decomposition_macs == 2 * 34  # ⌊2·5·4 − ⅔·8⌋
    assert cost.elementwise == 2 * 3 * 5 * 2


def test_lance() -> None:
    """Ranks (3, None): core 3·6, factor 5·3; the mean activation's own product and outer product."""
    cost = stored(rows, name="lance", ranks=(3, None))
    assert (kept(cost), cost.subspace_bytes) == (3 * 6 * 4, 5 * 3 * 4)
    assert cost.projection_macs == 30 * 3
    assert cost.paper_projection_macs == 30 * 3
    assert cost.grad_weight_macs == 5 * 4 * 3 + 3 * 4 * 6
    assert cost.elementwise == 2 * (30 + 18)
    centred = stored(rows, name="lance", ranks=(3, None), centred=True)
    assert centred.subspace_bytes == (5 * 3 + 6) * 4
    assert centred.grad_weight_macs == cost.grad_weight_macs + 4 * 6
    making = 2 * 5 * 3 + (3 + 3 * 6) + 3 * 6  # one vector, its outer product with the mean, taken off the core
    assert centred.elementwise == cost.elementwise + 30 + 20 + 24 + making


def test_patches() -> None:
    """(2, 32, 18) patches of a convolution of one group."""

    def one_group() -> Tensor:
        x, w = Tensor.meta((2, 3, 7, 8), requires_grad=True), Tensor.meta((4, 3, 3, 2), requires_grad=True)
        return F.conv2d(x, w, stride=(2, 1), padding=1, dilation=(1, 2))

    cost = stored(one_group, name="patch-lance", ranks=(1, 5, 7))
    assert kept(cost) == 1 * 5 * 7 * 4
    assert cost.subspace_bytes == (2 * 1 + 32 * 5 + 18 * 7) * 4
    assert cost.paper_projection_macs == 2 * 32 * 18 * (1 + 5 + 7)


def test_decompositions() -> None:
    """Grams of the smaller side, eigenvectors, thin factors."""
    assert orthonormal_macs(7, 3) == (6 * 7 * 9 - 2 * 27) // 3 == 108
    assert asi_macs((7, 3, 5), (2, None, 4)) == 2 * 105 * 2 + 50 + 2 * 105 * 4 + 117  # 2·7·4 − ⅔·8, 2·5·16 − ⅔·64
    assert hosvd_macs((4, 3, 5), (2, None, 3), (True, False, True)) == (60 * 4 + 288) + (60 * 5 + 562)
    assert hosvd_macs((20, 3), (2, None), (True, False)) == (60 * 3 + 121) + (60 * 2 + (6 * 20 * 4 - 16) // 3)


# ---- the peak ------------------------------------------------------------------------------------


def meta_peak(step: Callable[[], Tensor], **options: Any) -> Any:
    """Of a step whose tensors are all named until it is over."""
    with record() as records:
        step()
    return peak(records, lifetimes={}, **options)


N = 1000 * 4


def test_gradients_of_a_leaf_that_add_up() -> None:
    """The first, and the second, which is added to it, beside x, −x, −x, the sum of them, the loss and its gradient."""

    def step() -> Tensor:
        x = Tensor.meta((1000,), requires_grad=True)
        return (F.neg(x) + F.neg(x)).sum()

    assert meta_peak(step).backward_bytes == 4 * N + 4 + 4 + 2 * N


def test_gradients_in_between_that_add_up() -> None:
    """The same at an activation, here a view of x."""

    def step() -> Tensor:
        a = Tensor.meta((1000,), requires_grad=True).reshape(10, 100)
        return (F.neg(a) + F.neg(a)).sum()

    assert meta_peak(step).backward_bytes == 4 * N + 4 + 4 + 2 * N


def test_three_gradients_that_add_up() -> None:
    """Two at a time: each is added to the first."""

    def step() -> Tensor:
        a = Tensor.meta((1000,), requires_grad=True).reshape(10, 100)
        return (F.neg(a) + F.neg(a) + F.neg(a)).sum()

    assert meta_peak(step).backward_bytes == 6 * N + 4 + 4 + 2 * N


def test_gradients_that_are_sums_of_products() -> None:
    """Of a factor for each row (250 of 400): 163 rows at a time, ⌊2¹⁶/400⌋, the last with fewer."""

    def step() -> Tensor:
        x, w = Tensor.meta((250, 400)), Tensor.meta((250, 1), requires_grad=True)
        return (x * w).sum()

    x, w = 250 * 400 * 4, 250 * 4
    assert meta_peak(step).backward_bytes == 2 * x + w + 4 + 4 + w + 163 * 400 * 4


def test_a_gradient_that_is_summed_in_one_go() -> None:
    """Of a single number: nothing is left to cut the product along."""

    def step() -> Tensor:
        x, w = Tensor.meta((250, 400)), Tensor.meta((), requires_grad=True)
        return (x * w).sum()

    x = 250 * 400 * 4
    assert meta_peak(step).backward_bytes == 2 * x + 4 + 4 + 4 + 4 + x


def test_a_loss_row_by_row() -> None:
    """Scores; of each row the score of its label, the sum and the loss; the label in a byte."""
    B = 100_000

    def step() -> Tensor:
        return F.cross_entropy(Tensor.meta((B, 2), requires_grad=True), Tensor.meta((B,), np.int64))

    scores, labels = B * 2 * 4, B * 8
    assert meta_peak(step).forward_bytes == scores + labels + scores + 3 * B * 4 + B
    # kept: the probabilities and a byte; then the gradient, row numbers, labels as an index, what is taken there
    assert meta_peak(step).backward_bytes == scores + labels + 4 + 4 + scores + B + scores + B * (8 + 8 + 4)


def test_a_matrix_that_a_product_repeats() -> None:
    """Its gradient is a sum of one product for each of the ten."""

    def step() -> Tensor:
        a, b = Tensor.meta((10, 7, 60)), Tensor.meta((1, 60, 80), requires_grad=True)
        return F.matmul(a, b)

    a, b, result = 10 * 7 * 60 * 4, 60 * 80 * 4, 10 * 7 * 80 * 4
    assert meta_peak(step).backward_bytes == a + b + 2 * result + 10 * b + b


class Narrow(nn.Module):
    """A large activation before the only layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(60, 10, bias=False, rng=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.exp(x).reshape(8, 60, 1000).mean(2))


def test_factors_that_asi_carries_over() -> None:
    """From the step before: there while the large activation is made, and its own ones when the step is over."""
    net = Narrow()

    def found() -> Any:
        with record(net) as records:
            F.cross_entropy(net(Tensor.meta((8, 60_000))), Tensor.meta((8,), np.int64))
        return peak(records, lifetimes=lifetimes(net, (8, 60_000)))

    exact = found()
    net.layer.store = lance_ref.stores.Asi((2, 3))
    carried = (8 * 2 + 60 * 3) * 4
    assert found().forward_bytes == exact.forward_bytes + carried
    assert found().optimizer_bytes == exact.optimizer_bytes + carried


class Twice(nn.Module):
    """One layer that runs twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(20, 20, rng=0), nn.Linear(20, 5, rng=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.layer(F.relu(self.layer(x)))))


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 0), ("sgd-momentum", 1), ("adam", 2)])
def test_a_layer_that_runs_twice_is_there_once(optimizer: str, copies: int) -> None:
    """Its weights, gradients, optimiser state and factors; its core twice."""
    net, own, head = Twice(), (20 * 20 + 20) * 4, (20 * 5 + 5) * 4
    costs = Costs(net, "twice", (20,), Device(optimizer=optimizer, weights="ram"))
    memory = costs.memory(Option("lance", fraction=Fraction(1, 4)), 1, 8)
    assert memory.gradients == memory.weights == own + head
    assert memory.optimizer_state == copies * (own + head)
    assert memory.factors == (8 * 2 + 20 * 5) * 4
    kept_only = Costs(net, "twice", (20,), Device(count="kept", optimizer=optimizer))
    assert kept_only.memory(Option("lance", fraction=Fraction(1, 4)), 1, 8).factors == memory.factors
    lance_ref.tune(net, "all")
    with record(net) as records:
        F.cross_entropy(net(Tensor.meta((8, 20))), Tensor.meta((8,), np.int64))
    found = peak(records, optimizer=optimizer)
    assert found.parameters_bytes == found.gradients_bytes == own + head
    assert found.optimizer_state_bytes == copies * (own + head)
    assert weights_by_layer(list(records), ("layer",)) == {"layer": 400}


def test_what_an_update_allocates() -> None:
    """Small parameters and large ones."""
    small, large = 1000, 256 * 1024
    block = 4 * (1 << 16)
    assert [updating("sgd", n, 4) for n in (small, 3 * block)] == [small, block]
    assert [updating("sgd-momentum", n, 4) for n in (small, 3 * block)] == [small, block]
    assert [updating("adam", n, 8) for n in (small, 3 * block)] == [2 * small, 2 * 2 * block]
    assert [temporaries(n) for n in (large - 4, large)] == [2 * (large - 4), large]
    assert [division_buffer(n) for n in (1, 2, 8192, 9000)] == [0, 32, 131_072, 131_072]


# ---- calibration, protection ---------------------------------------------------------------------


def test_a_calibration_adds_up() -> None:
    """Forward passes, Grams, the mean's direction, eigenvectors; paid back only if a step saves something."""
    layer = LayerCalibration("a", (ModeCalibration("batch", 3, 100, 20), ModeCalibration("feature", 5, 300, 60)), 7)
    cost = CalibrationCost(2, 1000, (layer, layer), 500)
    assert (cost.gram_macs, cost.frame_macs, cost.eigenvector_macs) == (800, 14, 160)
    assert cost.total_macs == 1000 + 800 + 14 + 160
    assert cost.gram_bytes == 2 * 8 * (9 + 25)
    assert cost.steps_to_pay_back == 4  # 1974 of 500 a step
    assert replace(cost, saved_macs_per_step=1974).steps_to_pay_back == 1
    assert replace(cost, saved_macs_per_step=0).steps_to_pay_back is None
    assert replace(cost, saved_macs_per_step=-1).steps_to_pay_back is None


def test_a_calibration_by_its_sizes() -> None:
    """(5, 6) rows, three batches: orthogonal to the mean, the feature's Gram goes there and back."""
    with record() as records:
        rows()
    found: list[OpRecord] = [replace(records[0], path="a")]
    plain = calibration_cost(found, 70, {"a": (2, 3)}, 3)
    assert (plain.forward_macs, plain.gram_macs, plain.frame_macs) == (3 * 70, 3 * 30 * (5 + 6), 0)
    assert plain.eigenvector_macs == 9 * 125 // 2 + 9 * 216 // 2
    free = calibration_cost(found, 70, {"a": (2, 3)}, 3, "mean-free")
    assert (free.forward_macs, free.gram_macs, free.frame_macs) == (2 * 3 * 70, 990, 2 * 3 * 30)
    assert free.eigenvector_macs == 562 + (36 * 5 + 2 * 6 * 25 + 562)
    with record() as records:
        convolution()
    maps = calibration_cost([replace(records[0], path="a")], 0, {"a": (None, 4, 3, None)}, 1, "mean-free")
    assert (maps.gram_macs, maps.frame_macs) == (672 * (6 + 7), 2 * 672)
    assert maps.eigenvector_macs == (36 * 5 + 2 * 6 * 25 + 562) + 9 * 343 // 2
    centred = calibration_cost(found, 70, {"a": (None, 3)}, 3, "center")
    assert (centred.forward_macs, centred.gram_macs, centred.frame_macs) == (420, 540, 0)


def test_protection_by_its_sizes() -> None:
    """GPM in memory and in flash, LANCE on tokens, and Gram matrices of some modes."""
    gpm = gpm_bill((8, 3, 6), 100, 5, m=2)
    assert (gpm.ram_bytes, gpm.flash_bytes, gpm.kept_bytes) == (6 * 2 * 4, 6 * 2 * 8, 400)
    assert (gpm.projection_macs, gpm.grad_weight_macs) == (2 * 5 * 6 * 2, 144 * 5)
    assert (gpm.training_bytes, gpm.step_macs) == (448, 840)
    saturated = gpm_bill((8, 6), 48, 5, m=6)
    assert (saturated.ram_bytes, saturated.projection_macs, saturated.flash_bytes) == (0, 0, 6 * 6 * 8)
    assert lance_bill((8, 6), None, 5, m=4) == LayerBill(0, 6 * 4 * 8, 0, 0, 0)
    assert update_macs(5, 2, 1) == (300 - 60 + 8) // 3 + 25 * 3 + 3 * 5 * 3 + 9 * 27 // 2 + 5 * 3
    assert calibration_macs((8, 3, 6), (True, False, True), 2, True) == 144 * 14 + 2 * 144 * 2 * 2
    assert calibration_macs((8, 3, 6), (True, False, True), 2, False) == 144 * 14 + 2 * 144 * 2


# ---- the planner's pieces ------------------------------------------------------------------------


def test_memory_of_a_candidate() -> None:
    """Training and calibration are one after the other."""
    memory = Memory(step=100, factors=20, weights=3, gradients=1, optimizer_state=1, calibration=122)
    assert (memory.training, memory.total) == (123, 123)
    assert replace(memory, calibration=124).total == 124


def test_options() -> None:
    """Limits, units, and the settings of each method."""
    assert [parse_bytes(text) for text in ("1B", "1 KiB", "1.5MiB", "2GiB")] == [1, 1024, 1_572_864, 2 * 2**30]
    assert parse_times("0.5") == Fraction(1, 2)
    assert parse_fraction_of_modes("1") == 1
    for parse, text in ((parse_bytes, "0.5B"), (parse_times, "0x"), (parse_fraction_of_modes, "0"),
                        (parse_fraction_of_modes, "1.1"), (parse_bytes, "1KB")):  # fmt: skip
        with pytest.raises(ValueError, match="is '"):
            parse(text)
    names = [
        o.name
        for o in options_for(["bp", "gradient-filter", "sketch", "lora"], [], [], {"ratio": [0.5], "lora_rank": [3]})
    ]
    assert names == ["bp", "gradient-filter patch 2", "gradient-filter patch 4", "sketch ratio 0.5", "lora rank 3"]


def test_fidelities() -> None:
    """Shares of spectra, codes, directions, and layers."""
    spectra = LayerSpectra((4, 3), (np.array([14.0, 2.0, 2.0, 2.0]), np.array([6.0, 3.0, 1.0])))
    assert mode_shares(spectra, 4, (1, 2), fixed=False) == [14 / 20, 0.9]
    fixed = mode_shares(spectra, 4, (1, None), fixed=True)
    assert fixed == [pytest.approx(14 / 20), 1.0]
    assert mode_shares(spectra, 8, (2, None), fixed=True)[0] == pytest.approx((2 + 8 * 3 + 2) / (8 * 5))
    assert tucker_fidelity([0.5, 0.25]) == Fidelity(0.125, 0.0, 0.25)
    assert layer_fidelity(Option("bp"), (4, 3), None, None) == Fidelity(1.0, 1.0, 1.0)
    assert layer_fidelity(Option("lora"), (4, 3), (1, 1), spectra) is None
    sketch = options_for(["sketch"], [], [], {"ratio": [0.5]})[0]
    assert layer_fidelity(sketch, (4, 3), None, None) == Fidelity(0.5, 0.0, 1.0)
    int4 = layer_fidelity(Option("int4"), (4, 3, 5, 5), None, None)
    assert int4 == Fidelity(1 - 3 / 900, 1 - 98 / 450, 1.0)
    assert layer_fidelity(Option("int4"), (3, 9), None, None) == Fidelity(1 - min(3 / 900, 1 / 450), 1 - 1 / 450, 1.0)
    ranked, plain = Option("lance", epsilon=0.9), Option("bp")
    assert [why_not(ranked, True), why_not(plain, False), why_not(plain, True)] == [None, None, None]
    assert why_not(ranked, False) == why_not(Option("lance", fraction=Fraction(1, 2)), False) == "there are no spectra"
    assert layer_fidelity(options_for(["sketch"], [], [], {"ratio": [0.01]})[0], (4, 3), None, None).estimate == 0.25
    assert layer_shares("layers", {"a": 1, "b": 9}) == {"a": 0.5, "b": 0.5}


def test_the_law_of_the_batch() -> None:
    """v + n·m once, v for the others; ranks that just hold the energy."""
    assert fit_batch_law(np.array([2.0, 17.0, 2.0, 2.0, 2.0])) == (2.0, 3.0)
    assert fit_batch_law(np.array([5.0])) == (0.0, 5.0)
    np.testing.assert_allclose(batch_spectrum(np.array([14.0, 2.0, 2.0, 2.0]), 6), [20, 2, 2, 2, 2, 2])
    assert [rank_for_energy(np.array([1.0, 6.0, 3.0]), e) for e in (0.6, 0.61, 0.9, 1)] == [1, 2, 2, 3]


def test_codes_of_tokens() -> None:
    """A range for each feature of (B, L, n): ten values each."""
    assert layer_fidelity(Option("int4"), (2, 5, 3), None, None) == Fidelity(1 - 3 / 900, 1 - 8 / 450, 1.0)


def test_a_memory_is_shared_out() -> None:
    """In equal parts, of tasks that may be smaller; at least one image each."""
    assert [_kept([10, 3], 8), _kept([10, 3], 100), _kept([5, 5], 0)] == [4 + 3, 13, 2]


def test_ranks_round_up() -> None:
    """Of the batch's directions and of the free features."""
    step = trace_step(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), "net", (6,), 8, "all", "float32")
    assert _ranks(step, "0", 5, 0.3) == (3, 2)


def test_stretches() -> None:
    """The first ones longer."""
    stages: list[Any] = list(range(5))
    assert [len(part) for part in _stretches(stages, 2)] == [3, 2]
    assert [len(part) for part in _stretches(stages, 3)] == [2, 2, 1]
    assert [len(part) for part in _stretches(stages, 5)] == [1] * 5
