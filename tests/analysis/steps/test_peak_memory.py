"""Peak memory: hand-worked integers, a real step within 5 %, the bound of workspaces, and planted faults."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lance_ref
from analysis.peak import layers as peak_layers
from analysis.peak.lifetimes import lifetimes
from analysis.peak.memory import Peak, measure_peak, peak
from analysis.peak.simulation import Ledger
from analysis.rules.account import account
from analysis.rules.layouts import Storage
from analysis.rules.op_cost import MissingRuleError
from analysis.rules.operations import OPERATIONS
from lance_ref import functional as F
from lance_ref import models, nn, record
from lance_ref.algebra import projection_fast as projection
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.algebra.subspace import Subspace
from lance_ref.engine.blocks import BLOCK_ELEMENTS, blockwise
from lance_ref.engine.recording import OpRecord
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module
from lance_ref.stores import Asi, GradientFilter, Hosvd, Lance, Quantized

MIB = 2**20
compiled = pytest.mark.skipif(not numba_enabled(), reason="the rules are those of the compiled loops")
SIZES = {"mlp": (784,), "alexnet-cl": (3, 32, 32), "resnet8": (3, 32, 32)}


def model(name: str, tune: str = "all", batch: int = 8) -> tuple[Module, np.ndarray, np.ndarray]:
    """A small net of the library in training mode, images and labels."""
    shape = SIZES.get(name, (3, 64, 64))
    options: dict[str, Any] = {"num_classes": 10}
    if name == "mlp":
        options["hidden"] = (200, 100)
    if name.startswith("deit"):
        options["image_size"] = shape[1]
    net = models.create(name, rng=0, **options).train()
    lance_ref.tune(net, tune)
    images = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    return net, images, np.arange(batch) % 10


def traced(net: Module, images: np.ndarray) -> list[OpRecord]:
    with record(net) as records:
        F.cross_entropy(net(Tensor.meta(images.shape, images.dtype)), Tensor.meta((len(images),), np.int64))
    return list(records)


def predicted(net: Module, images: np.ndarray, optimizer: str = "sgd") -> Peak:
    ends = lifetimes(net, images.shape, images.dtype)
    return peak(traced(net, images), optimizer=optimizer, lifetimes=ends)


def check(net: Module, images: np.ndarray, labels: np.ndarray, optimizer: str = "sgd") -> Peak:
    measured = measure_peak(net, images, labels, optimizer)
    found = predicted(net, images, optimizer)
    assert found.peak_bytes == pytest.approx(measured, rel=0.05), f"predicted {found}, measured {measured:,} bytes"
    return found


# ---- by hand -----------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """(B, 60) → 40 → relu → 10, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(60, 40, rng=0), nn.Linear(40, 10, rng=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def test_a_peak_worked_out_by_hand() -> None:
    """Every buffer of a step with two layers, batch 32, float32."""
    B, item = 32, 4
    net = TwoLayers()
    images = np.zeros((B, 60), np.float32)
    found = predicted(net, images)
    x, hidden, logits, labels = B * 60 * item, B * 40 * item, B * 10 * item, B * 8
    mask, probabilities, kept_labels = B * 40 // 8, logits, B
    weights = [60 * 40 * item, 40 * item, 40 * 10 * item, 10 * item]
    # backward of the first layer: batch, tape of that layer (x itself), the loss, gradients of the second layer,
    # the gradient of its output, and the gradients of weight and bias that are being made
    last = x + labels + item + weights[2] + weights[3] + hidden + weights[0] + weights[1]
    # backward of the second layer: its tape is the hidden layer; masks of relu; gradients of logits and hidden
    second = x + labels + item + mask + hidden + logits + hidden + weights[2] + weights[3]
    assert found.backward_bytes == max(last, second)
    # forward: relu makes its result beside its input and mask; two Booleans for each element
    relu = x + labels + 2 * hidden + mask + 2 * B * 40
    loss = x + labels + mask + hidden + logits + probabilities + B * (4 * item + 8)
    assert found.forward_bytes == max(relu, loss)
    assert found.gradients_bytes == found.parameters_bytes == sum(weights)
    assert found.optimizer_bytes == x + labels + item + sum(weights) + weights[0]
    assert kept_labels < 4 * B  # the labels in a byte are among the loss's own


def test_state_of_the_optimiser() -> None:
    """One array of a parameter's size with momentum, two with Adam, none without; only for what trains."""
    net, images, _ = model("convnet", "last:1")
    trained = sum(p.size * 4 for p in net.parameters() if p.requires_grad)
    for name, copies in {"sgd": 0, "sgd-momentum": 1, "adam": 2}.items():
        found = predicted(net, images, name)
        assert found.optimizer_state_bytes == copies * trained
        assert found.gradients_bytes == trained
        assert found.forward_bytes == predicted(net, images).forward_bytes + copies * trained


def test_given_parameters_are_all_counted() -> None:
    """Also those that the step does not read."""
    net, images, _ = model("convnet")
    unused = Tensor(np.zeros(1000, np.float32))
    records = traced(net, images)
    more = peak(records, parameters=[*net.parameters(), unused])
    assert more.parameters_bytes == peak(records).parameters_bytes + 4000
    assert more.total_bytes == more.peak_bytes + more.parameters_bytes


def test_bills_give_what_records_give() -> None:
    """The cost model hands over its bills, segments unfolded."""
    net = nn.Sequential(nn.Recompute(TwoLayers()), nn.ReLU())
    records = traced(net, np.zeros((8, 60), np.float32))
    assert peak(account(records, None)) == peak(records)


# ---- a real step -------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("name", models.names())
def test_every_net(name: str) -> None:
    """Within 5 % of what tracemalloc sees, every layer trained; the slow nets at a batch of 2."""
    slow = name in ("deit-small", "resnet18", "resnet34", "resnet50")
    check(*model(name, "all", 2 if slow else 4))


@compiled
@pytest.mark.parametrize("name", ["mobilenetv2", "mcunet", "resnet8"])
def test_last_layers(name: str) -> None:
    """Frozen layers keep nothing; the batch and the activations in flight are what is left."""
    check(*model(name, "last:2", 16))  # enough images for arrays to outweigh the objects of what was put off


@compiled
@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum", "adam"])
def test_every_optimiser(optimizer: str) -> None:
    """A net of few activations and many parameters: the update is the peak."""
    net, images, labels = model("mlp", batch=4)
    assert check(net, images, labels, optimizer).moment == "optimiser"


def stored(kind: str, shape: tuple[int, ...]) -> Any:
    ranks = tuple(max(1, min(n // 4, math.prod(shape) // n // 4)) for n in shape)
    makers: dict[str, Callable[[], Any]] = {
        "lance": lambda: Lance(Subspace.random(shape, ranks, np.random.default_rng(1))),
        "hosvd": lambda: Hosvd(ranks=ranks),
        "asi": lambda: Asi(ranks),
        "int8": lambda: Quantized(8),
        "int4": lambda: Quantized(4),
        "gradient-filter": lambda: GradientFilter(2),
    }
    return makers[kind]()


@compiled
@pytest.mark.parametrize("kind", ["lance", "hosvd", "asi", "int8", "int4", "gradient-filter"])
@pytest.mark.parametrize("name", ["mcunet", "mlp"])
def test_every_store(name: str, kind: str) -> None:
    """All layers compressed: depthwise, pointwise, plain and linear ones; projections and codes are workspaces."""
    net, images, labels = model(name)
    inputs = {r.path: r.inputs[0].shape for r in traced(net, images) if r.op in ("conv2d", "linear")}
    for path, shape in inputs.items():
        net.get_submodule(path).store = stored(kind, shape)
    check(net, images, labels)


@compiled
@pytest.mark.parametrize("groups", [128, 8, 1])
def test_weight_gradients_of_cores_in_blocks(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few output channels at a time, where their products would not fit the workspace: less at the peak."""
    middle = nn.Conv2d(128, 128, 5, padding=2, groups=groups, rng=0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10, rng=0))
    net = nn.Sequential(nn.Conv2d(3, 128, 1, rng=0), middle, head)
    lance_ref.tune(net, "1")
    images, labels = np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype(np.float32), np.arange(16) % 10
    middle.store = Lance(Subspace.random((16, 128, 16, 16), (9, 20, 9, 9), np.random.default_rng(1)), "separable")
    whole = check(net, images, labels)
    assert whole.at == "1"
    monkeypatch.setattr(projection, "CONTRACTION_BYTES", 2**20)
    assert check(net, images, labels).peak_bytes < 0.75 * whole.peak_bytes


@compiled
@pytest.mark.parametrize("ranks", [(16, 40, 3, 3), (None, None, 1, 2)])
def test_weight_gradients_of_depthwise_cores_in_one_pass(ranks: tuple[int | None, ...]) -> None:
    """Batch and channels put back, or never compressed: the core, and some channels' planes in each thread."""
    middle = nn.Conv2d(160, 160, 3, padding=1, groups=160, rng=0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, 10, rng=0))
    net = nn.Sequential(nn.Conv2d(3, 160, 1, rng=0), middle, head)
    lance_ref.tune(net, "1")
    shape = (64, 160, 14, 14)
    middle.store = Lance(Subspace.random(shape, ranks, np.random.default_rng(1)))
    geometry = ConvGeometry(shape, middle.weight.shape, padding=((1, 1), (1, 1)), groups=160)
    expanded = (0, 1) if ranks[0] else ()
    assert projection.cheapest_order(ranks, geometry) == ("separable", expanded)
    assert projection.depthwise_alone((None, None, *middle.store.factors[2:]), geometry)
    assert not projection.in_one_product((14, 14), (3 * (ranks[2] or 0), 3 * (ranks[3] or 0)))
    assert check(net, np.ones((64, 3, 14, 14), np.float32), np.arange(64) % 10).at == "1"


@compiled
def test_the_main_case_at_a_small_batch() -> None:
    """MobileNetV2, 224 pixels, the last four layers: activations in flight are the peak, in the frozen part."""
    net = models.create("mobilenetv2", num_classes=10, rng=0).train()
    lance_ref.tune(net, "last:4")
    images = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    assert check(net, images, np.arange(2)).moment == "forward"


@compiled
def test_recomputed_segments() -> None:
    """A segment's second tape is alive while it is differentiated, and its first run keeps nothing."""
    body = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, rng=i), nn.GELU()) for i in range(6)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10, rng=0))
    images, labels = np.random.default_rng(0).standard_normal((16, 8, 32, 32)).astype(np.float32), np.arange(16) % 10
    plain = check(nn.Sequential(body, head), images, labels)
    less = check(nn.Sequential(nn.checkpoint_sequential(body, 3), head), images, labels)
    assert less.peak_bytes < 0.8 * plain.peak_bytes


class Holding(nn.Module):
    """Goes on naming an activation long after its last use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1, rng=0)
        self.head = nn.Linear(32, 10, rng=0)

    def forward(self, x: Tensor) -> Tensor:
        large = self.conv(x)
        other = F.exp(large * 0.01)
        other = F.exp(other * 0.01)
        return self.head(other.mean((2, 3)))


@compiled
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pooling_of_a_fused_pass(dtype: type) -> None:
    """NumPy's iterators have room for a row of windows, of both operands and the result: a tenth of this peak."""
    net = models.create("convnet", num_classes=10, rng=0).to(dtype)
    lance_ref.tune(net, "head")
    images = np.random.default_rng(0).standard_normal((64, 3, 12, 16)).astype(dtype)
    check(net, images, np.arange(64) % 10)


class Branches(nn.Module):
    """A frozen branch of two wide convolutions, beside one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 32, 3, padding=1, rng=0), nn.Conv2d(32, 32, 3, padding=1, rng=1)
        self.beside = nn.Conv2d(16, 32, 1, rng=2)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.second(F.relu(self.first(x)))
        return frozen + self.beside(x)


@compiled
def test_the_second_run_of_a_segment_puts_nothing_off() -> None:
    """Its frozen operations run one by one; a pass over them would hold less than half of these columns."""
    images = np.random.default_rng(0).standard_normal((8, 16, 32, 32)).astype(np.float32)
    net = nn.Sequential(nn.Recompute(Branches()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    lance_ref.tune(net, ["0.beside"])
    check(net, images, np.arange(8))


@compiled
def test_variables_of_a_forward_keep_activations_alive() -> None:
    """Lifetimes come from the net's own forward; a guess from paths is two whole activations short."""
    net = Holding()
    for parameter in net.conv.parameters():
        parameter.requires_grad_(False)
    images, labels = np.random.default_rng(0).standard_normal((8, 3, 64, 64)).astype(np.float32), np.arange(8)
    found = check(net, images, labels)
    guess = peak(traced(net, images))
    assert found.peak_bytes - guess.peak_bytes == pytest.approx(2 * 8 * 32 * 64 * 64 * 4, rel=0.05)


@compiled
def test_measuring_leaves_the_net_as_it_was() -> None:
    """Parameters, running statistics, gradients and warm starts."""
    net, images, labels = model("alexnet-cl", batch=4)
    layer = net.get_submodule("conv2")
    layer.store = Asi((2, 4, 3, 3))
    before = {name: array.copy() for name, array in net.state_dict().items()}
    measure_peak(net, images, labels, "adam")
    assert all(np.array_equal(before[name], array) for name, array in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert layer.store.state() == {}
    assert not tracemalloc.is_tracing()


# ---- the bound of workspaces -------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("name", ["mobilenetv2", "mcunet", "resnet18", "mobilenetv3-small", "deit-tiny"])
@pytest.mark.parametrize(("tune", "batch"), [("all", 512), ("last:4", 64)])
def test_a_peak_is_the_tape_two_activations_and_at_most_32_mib(name: str, batch: int, tune: str) -> None:
    """Columns, temporaries of formulas and masks are worked on in blocks. (A frozen block's input, kept for its
    residual, is a third activation: it binds at large batches.)"""
    net, images, _ = model(name, tune, 1)
    shape = (batch, *images.shape[1:])
    with record(net) as records:
        F.cross_entropy(net(Tensor.meta(shape)), Tensor.meta((batch,), np.int64))
    found = peak(records, lifetimes=lifetimes(net, shape))
    tape = sum(bill.tape_bytes for bill in account(records, None))
    largest = sorted((r.output.nbytes for r in records), reverse=True)
    images_bytes = math.prod(shape) * 4
    bound = tape + sum(largest[:2]) + 32 * MIB + images_bytes + found.gradients_bytes
    assert max(found.forward_bytes, found.backward_bytes) <= bound


def test_columns_stay_within_their_block() -> None:
    """A convolution whose patches take 150 MiB makes them 8 MiB at a time, forward and backward."""
    layer = nn.Conv2d(32, 16, 5, padding=2, bias=False, rng=0)
    x = Tensor(np.ones((16, 32, 56, 56), np.float32), requires_grad=True)
    layer(x).sum().backward()
    x.grad = None
    tracemalloc.start()
    try:
        loss = layer(x).sum()
        loss.backward()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 2 * x.size * 4 + 24 * MIB


# ---- formulas in blocks ------------------------------------------------------------------------


@given(data=st.data(), dtype=st.sampled_from([np.float32, np.float64]))
@settings(max_examples=25)
def test_blocks_change_no_bit(data: Any, dtype: Any) -> None:
    """Any order of axes, any broadcasting, more than one block: the same numbers as at once."""
    shape = data.draw(st.sampled_from([(BLOCK_ELEMENTS + 3,), (3, 70, 400), (1, 5, 7, 4001), (2, 3), (0, 4)]))
    order = data.draw(st.permutations(range(len(shape))))
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(dtype).transpose(order)
    y = rng.standard_normal([n if data.draw(st.booleans()) else 1 for n in x.shape]).astype(dtype)

    def formula(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x * np.exp(-y) + y / (1 + x * x)

    result, whole = blockwise(formula, x, y), formula(x, y)
    assert result.dtype == dtype
    assert result.base is None
    np.testing.assert_array_equal(result, whole)


@pytest.mark.parametrize("name", ["gelu", "hardswish", "sigmoid", "hardsigmoid", "relu6", "dropout", "softmax"])
def test_a_formula_takes_little_beside_its_result(name: str) -> None:
    """Forward and backward of a large activation: result, mask, and at most 2 MiB."""
    function = (lambda x: F.dropout(x, 0.5)) if name == "dropout" else getattr(F, name)
    x = Tensor(np.random.default_rng(0).standard_normal((64, 8192)).astype(np.float32), requires_grad=True)
    gradient = np.ones(x.shape, np.float32)
    function(x).backward(gradient)
    x.grad = None
    tracemalloc.start()
    try:
        y = function(x)
        forward = tracemalloc.get_traced_memory()[1]
        y.backward(gradient)
        both = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert forward <= x.size * 4 * (1 + 1 / 32) + 2 * MIB
    assert both <= 2 * x.size * 4 * (1 + 1 / 32) + 2 * MIB


# ---- faults and errors -------------------------------------------------------------------------


@compiled
def test_a_rule_that_forgets_columns_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the workspace of convolutions the prediction leaves the 5 %."""
    net, images, labels = model("resnet8")
    for products in ("forward", "input", "weight"):
        monkeypatch.setattr(peak_layers.Convolution, f"{products}_workspace", lambda self, *layouts: 0)
    with pytest.raises(AssertionError, match="measured"):
        check(net, images, labels)


@compiled
def test_a_ledger_that_never_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that are given back must leave the total."""
    net, images, labels = model("convnet")

    def keep(self: Ledger, storage: Storage) -> None:
        return

    monkeypatch.setattr(Ledger, "drop", keep)
    with pytest.raises(AssertionError, match="measured"):
        check(net, images, labels)


def test_errors_name_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for an unknown optimiser, an empty step, an operation without a rule; a store may be without one."""
    net, images, _ = model("convnet")
    records = traced(net, images)
    with pytest.raises(ValueError, match="optimizer is 'lion', expected one of sgd"):
        peak(records, optimizer="lion")
    with pytest.raises(ValueError, match="the step is empty"):
        peak([])
    monkeypatch.delitem(OPERATIONS, "relu")
    with pytest.raises(MissingRuleError, match="no cost rule for operation 'relu' in layer 'relu'"):
        peak(records)
    monkeypatch.undo()
    exact = peak(records).peak_bytes
    monkeypatch.delitem(peak_layers.STORES, "exact")
    assert peak(records).estimated == ("activation store 'exact'",)
    assert peak(records).peak_bytes >= exact
