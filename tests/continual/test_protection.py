"""Task subspaces: whatever SGD does with LANCE's gradients, answers to protected inputs do not move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from continual_cases import BODY, HEAD, LEAK, bases_of, make_net, sgd, task, train, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from analysis.rules import protection_costs
from lance_ref import F, Tensor, calibrate, count_macs, models, nn, no_grad, tape
from lance_ref.continual import PatchLance, check_optimizer, compress_for_task, feature_gram, leak, protection
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.optim import SGD, Adam, Optimizer
from lance_ref.stores import EXACT, Lance

kinds = st.sampled_from(["linear", "conv"])
MOMENTA = [{}, {"momentum": 0.9}, {"momentum": 0.5, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}]
MODES = [("batch", "token", "feature"), ("token", "feature"), ("feature",), ("batch", "feature")]


def features(net: nn.Sequential, x: np.ndarray) -> np.ndarray:
    """What the head takes in."""
    with no_grad():
        value = Tensor(x)
        for layer in list(net)[:-1]:
            value = layer(value)
    return value.data


def largest_leak(net: Module, before: dict[str, np.ndarray], protected: dict[str, np.ndarray]) -> float:
    """Of all protected layers."""
    return max(leak(W, weighted_layers(net)[path].weight, protected[path]) for path, W in before.items())


# ---- the invariant -------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    kind=kinds,
    dtype=st.sampled_from([np.float32, np.float64]),
    steps=st.integers(1, 6),
    momentum=st.sampled_from(MOMENTA),
    clip=st.sampled_from([None, 0.5]),
    threshold=st.sampled_from([0.5, 0.8]),
    epsilon=st.sampled_from([0.3, 0.7, 1.0]),
    modes=st.sampled_from(MODES),
    mean_free=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_no_step_moves_a_weight_along_its_basis(
    kind: str, dtype: Any, steps: int, momentum: dict[str, Any], clip: float | None, threshold: float, epsilon: float,
    modes: tuple[str, ...], mean_free: bool, seed: int,
) -> None:  # fmt: skip
    """‖ΔW M‖ ≤ 1e-6 ‖ΔW‖ in float64, 1e-4 in float32: any modes and ranks, steps, momentum, clipping."""
    net = make_net(kind, dtype)
    protected = bases_of(net, kind, task(kind, dtype, seed)[0], threshold)
    x, labels = task(kind, dtype, seed + 100)
    result = compress_for_task(net, [x], protected, epsilon=epsilon, modes=modes, mean_free=mean_free)
    assert not result.frozen
    before, optimizer = weights(net, BODY[kind]), sgd(net, **momentum)
    check_optimizer(optimizer, net, protected)
    train(net, optimizer, x, labels, steps, clip)
    check_optimizer(optimizer, net, protected)
    assert largest_leak(net, before, protected) <= LEAK[dtype]
    for path, W in before.items():
        after = weighted_layers(net)[path].weight.data
        M = protected[path].astype(dtype)
        assert np.abs(after - W).max() > 0
        still = np.abs((after - W).reshape(len(W), -1) @ M).max()  # pre-activations of the inputs M
        assert still <= LEAK[dtype] * np.abs(W.reshape(len(W), -1) @ M).max()


@settings(max_examples=25)
@given(kind=kinds, momentum=st.sampled_from([0.0, 0.9]), clip=st.sampled_from([None, 0.5]), seed=st.integers(0, 99))
def test_a_protected_net_does_not_forget(kind: str, momentum: float, clip: float | None, seed: int) -> None:
    """With all energy of a few old inputs protected in each layer, the whole net answers to them as before."""
    net = make_net(kind, np.float64)
    old = task(kind, np.float64, seed, count=4 if kind == "linear" else 1)[0]
    if kind == "conv":
        old[..., 1:] = 0  # so that its patches leave some of the 18 dimensions free
    protected = bases_of(net, kind, old, 1.0)
    assert all(M.shape[1] < len(M) for M in protected.values())
    answers = features(net, old)
    x, labels = task(kind, np.float64, seed + 1)
    compress_for_task(net, [x], protected, epsilon=0.9, modes=("feature",))
    moved = features(net, x)
    losses = train(net, sgd(net, momentum=momentum), x, labels, 8, clip)
    assert_allclose(features(net, old), answers, rtol=1e-9, atol=1e-9)
    assert np.abs(features(net, x) - moved).max() > 1e-3
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_without_protection_it_forgets(kind: str) -> None:
    """The same run with subspaces that know nothing of the old inputs: the tests above would notice."""
    net = make_net(kind, np.float64)
    old = task(kind, np.float64, 0)[0]
    protected = bases_of(net, kind, old, 0.8)
    x, labels = task(kind, np.float64, 1)
    compress_for_task(net, [x], dict.fromkeys(protected), epsilon=0.9)
    before, answers = weights(net, BODY[kind]), features(net, old)
    train(net, sgd(net), x, labels, 5)
    assert largest_leak(net, before, protected) > 0.1
    assert np.abs(features(net, old) - answers).max() > 0.01


# ---- what breaks it, and is refused ----------------------------------------------------------


def _adam(net: Module) -> Optimizer:
    return Adam(list(net.parameters()), lr=0.05)


def _decay(net: Module) -> Optimizer:
    return sgd(net, weight_decay=0.05)


def _old_momentum(net: Module) -> Optimizer:
    """Has already made a few steps for the old task, of full gradients."""
    optimizer = sgd(net, momentum=0.9)
    stores = [(layer, layer.store) for layer in weighted_layers(net).values()]
    values = [parameter.data.copy() for parameter in net.parameters()]
    for layer, _ in stores:
        layer.store = EXACT
    kind = "conv" if isinstance(net[0], nn.Conv2d) else "linear"
    train(net, optimizer, *task(kind, np.float64, 0), 3)
    for parameter, value in zip(net.parameters(), values, strict=True):
        parameter.data = value
    for layer, store in stores:
        layer.store = store
    return optimizer


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (_adam, "the optimiser is Adam, expected SGD"),
        (_decay, "weight_decay is 0.05, expected 0"),
        (_old_momentum, "the momentum of layer .* make a new optimiser for each task"),
    ],
)
def test_optimisers_that_leave_the_null_space(kind: str, make: Callable[[Module], Optimizer], match: str) -> None:
    """Each breaks the invariant by far, and is refused before the first step."""
    net = make_net(kind, np.float64)
    protected = bases_of(net, kind, task(kind, np.float64, 0)[0], 0.8)
    x, labels = task(kind, np.float64, 1)
    compress_for_task(net, [x], protected, epsilon=0.9)
    optimizer = make(net)
    with pytest.raises(ValueError, match=match):
        check_optimizer(optimizer, net, protected)
    before = weights(net, BODY[kind])
    train(net, optimizer, x, labels, 4)
    assert largest_leak(net, before, protected) > 1e-2


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_trained_bias(kind: str) -> None:
    """ΔW M = 0 still holds, but the layer answers otherwise to every input; frozen it does not."""
    for trains in (True, False):
        net = make_net(kind, np.float64, bias=True)
        old = task(kind, np.float64, 0, count=2)[0]
        protected = bases_of(net, kind, old, 1.0)
        for path in BODY[kind]:
            weighted_layers(net)[path].bias.requires_grad_(trains)
        x, labels = task(kind, np.float64, 1)
        frozen = compress_for_task(net, [x], protected, epsilon=0.9, modes=("feature",)).frozen
        assert BODY[kind][-1] not in frozen
        optimizer, before, answers = sgd(net), weights(net, BODY[kind]), features(net, old)
        if trains:
            with pytest.raises(ValueError, match="the bias of the protected layer '0' trains"):
                check_optimizer(optimizer, net, protected)
        else:
            check_optimizer(optimizer, net, protected)
            bias = weighted_layers(net)[BODY[kind][0]].bias
            bias.grad = np.ones_like(bias.data)  # left from an earlier task: a step would take it
            with pytest.raises(ValueError, match="the bias of the protected layer '0' trains"):
                check_optimizer(optimizer, net, protected)
            bias.grad = None
        train(net, optimizer, x, labels, 4)
        change = np.abs(features(net, old) - answers).max()
        assert change > 1e-3 if trains else change < 1e-9
        if trains:
            last = BODY[kind][-1]  # the weight is innocent
            assert leak(before[last], weighted_layers(net)[last].weight, protected[last]) < 1e-6


def test_an_unprotected_layer() -> None:
    """Trained below protected ones it moves what they take in; named as a head it is the caller's word."""
    net = make_net("linear", np.float64)
    old = task("linear", np.float64, 0, count=4)[0]
    protected = bases_of(net, "linear", old, 1.0)
    del protected["0"]
    x, labels = task("linear", np.float64, 1)
    compress_for_task(net, [x], protected, epsilon=0.9)
    optimizer, answers = sgd(net), features(net, old)
    with pytest.raises(ValueError, match=r"parameter '0\.weight' trains, but is neither .* protected layer nor a head"):
        check_optimizer(optimizer, net, protected)
    check_optimizer(optimizer, net, protected, heads=["0", "4"])
    check_optimizer(SGD(list(net[2].parameters()), lr=0.1), net, protected)
    train(net, optimizer, x, labels, 4)
    assert np.abs(features(net, old) - answers).max() > 1e-3
    net[0].weight.requires_grad_(False)
    net[0].weight.grad = None
    check_optimizer(optimizer, net, protected)


def test_trained_batch_norm_and_heads() -> None:
    """Batch norm's weight and bias must be frozen after the first task; all heads of several may train."""
    net = models.create("alexnet-cl", num_classes=2, heads=3, rng=0)
    bodies = [path for path in weighted_layers(net) if not path.startswith("fc3")]
    small = {path: np.eye(weighted_layers(net)[path].weight.data[0].size)[:, :1] for path in bodies}
    optimizer = sgd(net)
    with pytest.raises(ValueError, match=r"parameter 'bn1\.weight' trains"):
        check_optimizer(optimizer, net, small)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith("bn"))
    check_optimizer(optimizer, net, small)
    with pytest.raises(ValueError, match=r"parameter 'fc3\.0\.weight' trains"):
        check_optimizer(optimizer, net, small, heads="fc3.2")


def test_the_first_task_may_do_anything() -> None:
    """As long as nothing is protected nothing can be forgotten; a shared head that is protected is a layer."""
    net = make_net("linear", np.float64, bias=True)
    check_optimizer(_adam(net), net, {"0": None, "2": np.zeros((12, 0))})
    shared = {path: np.eye(n)[:, :1] for path, n in (("0", 14), ("2", 12), ("4", 9))}
    for path in ("0", "2"):
        net[int(path)].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="the bias of the protected layer '4' trains"):
        check_optimizer(sgd(net), net, shared)
    check_optimizer(sgd(net), net, {path: shared[path] for path in ("0", "2")})
    check_optimizer(Adam(list(net[4].parameters())), net, {path: shared[path] for path in ("0", "2")})  # head alone


# ---- what compress_for_task does -------------------------------------------------------------


@pytest.mark.parametrize("mean_free", [False, True])
def test_factors_are_those_of_a_calibration(mean_free: bool) -> None:
    """A linear layer, and a 1×1 convolution by its channels: what ``calibrate(protected=…)`` finds."""
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Conv2d(6, 7, 1, bias=False, rng=0), nn.Flatten(), nn.Linear(7 * 6, 3, bias=False, rng=1))
    net.to(np.float64)
    batches = [rng.standard_normal((5, 6, 2, 3)) + 1 for _ in range(3)]
    protected = {"0": np.linalg.qr(rng.standard_normal((6, 2)))[0], "2": np.linalg.qr(rng.standard_normal((42, 9)))[0]}
    result = compress_for_task(net, batches, protected, epsilon=0.8, mean_free=mean_free)
    expected = calibrate(net, batches, ["0", "2"], 0.8, ("batch", "channel"), protected=protected, mean_free=mean_free)
    for path, mode in (("0", 1), ("2", 1)):
        U, V = result.subspaces[path].factors[-1], expected[path].factors[mode]
        assert_allclose(U @ U.T, V @ V.T, atol=1e-9)
        U, V = result.subspaces[path].factors[0], expected[path].factors[0]
        assert_allclose(U @ U.T, V @ V.T, atol=1e-9)
    assert isinstance(net[0].store, PatchLance)
    assert isinstance(net[2].store, Lance)
    assert result.paths == ("0", "2")
    assert result.ranks == {"0": net[0].store.ranks, "2": net[2].store.ranks}
    assert result.ram_bytes == net[0].store.factor_bytes + net[2].store.factor_bytes
    assert result.flash_bytes == 8 * (12 + 42 * 9)
    assert str(result).splitlines()[-1] == f"factors {result.ram_bytes:,} bytes in RAM, bases 3,120 in flash"


@given(kind=kinds, seed=st.integers(0, 99), protect=st.booleans())
@settings(max_examples=20)
def test_mean_free_leaves_the_mean_alone(kind: str, seed: int, protect: bool) -> None:
    """UᵀM = 0 and Uᵀμ = 0 to 1e-12, μ the mean patch or row over all batches."""
    net = make_net(kind, np.float64)
    x = task(kind, np.float64, seed)[0] + 1
    protected = bases_of(net, kind, task(kind, np.float64, seed + 1)[0], 0.6 if protect else 1e-9)
    result = compress_for_task(net, [x[:4], x[4:]], protected, epsilon=0.9, modes=("feature",), mean_free=True)
    for path, subspace in result.subspaces.items():
        U = subspace.factors[-1]
        assert np.abs(U.T @ protected[path]).max() <= 1e-12
    layer = net[0]
    if kind == "linear":
        mean = x.mean(axis=0)
    else:  # over all places, zeros of the padding included
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]), (3, 3), (2, 3))
        mean = windows.mean(axis=(0, 2, 3)).ravel()
    assert np.abs(layer.store.factors[-1].T @ mean).max() <= 1e-12 * np.linalg.norm(mean)
    plain = compress_for_task(net, [x], protected, epsilon=0.9, modes=("feature",)).subspaces["0"]
    assert np.abs(plain.factors[-1].T @ mean).max() > 1e-3


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_layers_with_nothing_left_are_frozen(kind: str) -> None:
    """All directions protected, or inputs within the protected ones: no gradient, nothing kept; and back again."""
    net = make_net(kind, np.float32)
    x, labels = task(kind, np.float32, 0, count=6)
    first, *rest = BODY[kind]
    n = weighted_layers(net)[first].weight.data[0].size
    protected = {**bases_of(net, kind, x, 1.0), first: np.eye(n)}
    result = compress_for_task(net, [x], protected, epsilon=0.9)
    assert result.frozen == BODY[kind]  # of the others the inputs are those that the bases are made of
    assert (result.paths, result.ram_bytes) == ((), 0)
    before, optimizer = weights(net, BODY[kind]), sgd(net)
    check_optimizer(optimizer, net, protected)
    kept = tape(F.cross_entropy(net(x), Tensor(labels))).by_layer()
    assert set(kept) <= {HEAD[kind], ""}
    train(net, optimizer, x, labels, 2)
    for path, W in before.items():
        np.testing.assert_array_equal(weighted_layers(net)[path].weight.data, W)
    other = task(kind, np.float32, 7)[0]
    again = compress_for_task(net, [other], {first: np.eye(n), **dict.fromkeys(rest)}, epsilon=0.9)
    assert (again.frozen, again.paths) == ((first,), tuple(rest))
    assert all(weighted_layers(net)[path].weight.requires_grad for path in rest)
    full = {path: np.eye(weighted_layers(net)[path].weight.data[0].size) for path in rest}
    assert set(compress_for_task(net, [other], full, epsilon=0.9).frozen) == set(rest)
    assert all(weighted_layers(net)[path].store is EXACT for path in rest)  # not that of the task before
    assert "frozen, no direction is left" in str(again)


def test_all_patches_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows or images give the same subspaces as everything at once."""
    net = make_net("conv", np.float64)
    x = task("conv", np.float64, 1)[0]
    protected = bases_of(net, "conv", task("conv", np.float64, 0)[0], 0.6)
    whole = compress_for_task(net, [x], protected, epsilon=0.8, mean_free=True)
    monkeypatch.setattr("lance_ref.algebra.geometry.WORKSPACE_BYTES", 3000)
    blocks = compress_for_task(net, [x], protected, epsilon=0.8, mean_free=True)
    assert blocks.ranks == whole.ranks
    for path, subspace in whole.subspaces.items():
        for U, V in zip(subspace.factors, blocks.subspaces[path].factors, strict=True):
            assert_allclose(U @ U.T, V @ V.T, atol=1e-9)


def test_costs_what_is_predicted() -> None:
    """Bytes on the tape, in RAM and in flash, multiply-adds of steps and of calibration: layer by layer."""
    net = make_net("conv", np.float32)
    protected = bases_of(net, "conv", task("conv", np.float32, 0)[0], 0.8)
    x, labels = task("conv", np.float32, 1)
    with count_macs() as counter:
        result = compress_for_task(net, [x, x], protected, epsilon=0.7)
    shapes = {"0": (16, 30, 18), "2": (16, 8, 24), "5": (16, 40)}
    for path, shape in shapes.items():
        m = protected[path].shape[1]
        calibration = protection_costs.calibration_macs(shape, (True,) * len(shape), m, path != "5")
        assert counter.by_layer(path)["calibration"] == 2 * calibration
    with count_macs() as counter:
        kept = tape(F.cross_entropy(net(x), Tensor(labels)))
        train(net, sgd(net), x, labels, 1)
    bills = {
        path: protection_costs.lance_bill(shape, result.ranks[path], weighted_layers(net)[path].weight.shape[0],
                                         protected[path].shape[1])
        for path, shape in shapes.items()
    }  # fmt: skip
    cores = {entry.path: entry.nbytes for entry in kept.entries if entry.what == "core"}
    assert cores == {path: bill.kept_bytes for path, bill in bills.items()} == result.core_bytes
    assert result.input_bytes == {"0": 4 * 960, "2": 4 * 1920, "5": 4 * 640}
    for path, bill in bills.items():
        assert counter.by_layer(path)["projection"] == 2 * bill.projection_macs  # of both forward passes
        assert counter.by_layer(path)["grad_weight"] == bill.grad_weight_macs
    assert result.ram_bytes == sum(bill.ram_bytes for bill in bills.values())
    assert result.flash_bytes == sum(bill.flash_bytes for bill in bills.values())
    assert protection_costs.lance_bill((16, 40), None, 8, 40) == protection_costs.LayerBill(0, 12800, 0, 0, 0)


def test_cores_of_patches_can_be_larger_than_the_input() -> None:
    """Patches overlap: with the feature mode alone at full rank the tape grows, and the report says so."""
    net = make_net("conv", np.float32)
    x, labels = task("conv", np.float32, 1)
    result = compress_for_task(net, [x], {"0": None}, epsilon=1.0, modes=("feature",))
    assert result.core_bytes["0"] == 4 * 16 * 30 * 18 == 9 * result.input_bytes["0"]
    kept = tape(F.cross_entropy(net(x), Tensor(labels)))
    assert [entry.nbytes for entry in kept.entries if entry.what == "core"] == [result.core_bytes["0"]]
    assert "0: ranks -x-x18 of 16x30x18, core 34,560 bytes of 3,840" in str(result)


def test_bad_arguments_change_nothing() -> None:
    """Every error comes before the first store is swapped."""
    net = make_net("conv", np.float32)
    x = task("conv", np.float32, 0)[0]
    protected = bases_of(net, "conv", x, 0.5)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([x], {"epsilon": 0}, ValueError, r"epsilon is 0, expected a number in \(0, 1\]"),
        ([x], {"modes": ("batch", "token")}, ValueError, "without 'feature'"),
        ([x], {"modes": ("batch", "channel")}, ValueError, "expected some of"),
        ([x], {"modes": "feature"}, ValueError, "expected some of"),
        (iter([x]), {"mean_free": True}, TypeError, "two passes"),
        ([x * np.nan], {}, ValueError, "layer '0': .* NaN or infinity"),
        ([x, x[:3]], {}, ValueError, "layer '0': the patches of an activation have shape"),
        ([], {}, ValueError, "batches is empty"),
    ]
    for batches, options, error, match in cases:
        with pytest.raises(error, match=match):
            compress_for_task(net, batches, protected, **{"epsilon": 0.9, **options})
    with pytest.raises(ValueError, match="names no layer"):
        compress_for_task(net, [x], {}, epsilon=0.9)
    with pytest.raises(ValueError, match="protected names layer '1'"):
        compress_for_task(net, [x], {**protected, "1": None}, epsilon=0.9)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, rng=0))
    with pytest.raises(ValueError, match=r"layer '0'.*groups = 2"):
        compress_for_task(grouped, [x], {"0": None}, epsilon=0.9)
    assert all(layer.store is EXACT and layer.weight.requires_grad for layer in weighted_layers(net).values())


def test_leak_by_hand() -> None:
    """A change of (3, 4) has a share of 0.6 along the first direction; no change has none."""
    M = np.array([[1.0], [0.0]])
    assert leak(np.zeros((1, 2)), np.array([[3.0, 4.0]]), M) == pytest.approx(0.6)
    assert leak(np.ones((1, 2, 1, 1)), Tensor(np.ones((1, 2, 1, 1))), M) == 0
    assert protection.MODES == ("batch", "token", "feature")
    assert feature_gram(nn.Sequential(nn.Linear(1, 1, rng=0)), [np.full((2, 1), 2.0, np.float32)])["0"].matrix == 8


def test_the_head_is_the_last_layer_and_no_other() -> None:
    """The layer before the head moves what the head takes in; the head itself may train."""
    net = nn.Sequential(nn.Linear(4, 3, rng=0), nn.ReLU(), nn.Linear(3, 3, rng=1), nn.ReLU(), nn.Linear(3, 2, rng=2))
    protected = {"0": np.eye(4)[:, :1]}
    check_optimizer(SGD([net[4].weight, net[4].bias], lr=0.1), net, protected)
    with pytest.raises(ValueError, match=r"parameter '2\.weight' trains"):
        check_optimizer(SGD([net[2].weight], lr=0.1), net, protected)
