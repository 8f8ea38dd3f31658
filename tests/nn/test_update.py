"""Training in a subspace: the same steps as LANCE on the whole weight, with fewer numbers that train."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import conv_geometries, linear_geometries, ranks_for

from lance_ref import (
    F,
    Subspace,
    Tensor,
    attach,
    calibrate,
    checkpoint,
    compress,
    count_macs,
    datasets,
    fit,
    merge,
    nn,
    optim,
    restore,
    tune,
)
from lance_ref.algebra.frame import Frame
from lance_ref.algebra.geometry import ConvGeometry, Geometry
from lance_ref.lance.patches import PatchLance, patch_shape
from lance_ref.nn.lora import LoRALinear, add_lora, merge_lora
from lance_ref.nn.module import Module
from lance_ref.nn.subspace import as_whole
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
    geometry: Geometry = draw(st.one_of(conv_geometries(), conv_geometries(depthwise=False), linear_geometries()))
    if kind == "patches":
        geometry = draw(conv_geometries(depthwise=False).filter(lambda g: g.groups == 1))
        shape, feature = patch_shape(geometry), 2  # type: ignore[arg-type]
    else:
        shape = geometry.input_shape
        feature = 1 if isinstance(geometry, ConvGeometry) else len(shape) - 1
    ranks = list(draw(ranks_for(shape)))
    width = shape[feature] // getattr(geometry, "groups", 1)
    ranks[feature] = draw(st.integers(1, max(width - 1, 1)))  # mostly fewer than a group's: only then does D pay
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


GROUPED = ConvGeometry((3, 12, 5, 6), (8, 6, 3, 2), (2, 1), ((1, 0), (0, 1)), (1, 2), groups=2)


@pytest.mark.parametrize("kind", ["plain", "centred"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_groups_where_the_update_is_smaller(kind: str, momentum: float) -> None:
    """Rows of one group are not orthonormal: their own basis keeps the norm, so that clipping is the same too."""
    layers = [nn.Sequential(layer_of(GROUPED)) for _ in range(2)]
    for layer, update in zip(layers, ("weight", "subspace"), strict=True):
        attach(layer, lambda *_: store_of(GROUPED, kind, (None, 3, 2, None), 1), update=update)
        train(layer, GROUPED, lambda ps: optim.SGD(ps, lr=0.5, momentum=momentum, weight_decay=0.01), clip=0.01)
    rank = 3 if kind == "plain" else 4
    assert layers[1][0].update.weight.shape == (8, rank, 3, 2)
    moved = np.abs(layers[0][0].weight.data - layer_of(GROUPED).weight.data).max()
    assert moved > 0.01, "the weight has to move for this to say anything"
    merge(layers[1])
    np.testing.assert_allclose(layers[1][0].weight.data, layers[0][0].weight.data, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("geometry", [
    ConvGeometry((2, 6, 5, 5), (6, 1, 3, 3), groups=6),  # depthwise
    ConvGeometry((2, 6, 5, 5), (4, 3, 3, 3), groups=2),  # as many directions as a group has channels
])  # fmt: skip
def test_trains_as_it_is_where_the_update_is_not_smaller(geometry: ConvGeometry) -> None:
    """No update, and the weight trains."""
    layer = nn.Sequential(layer_of(geometry))
    attach(layer, lambda *_: store_of(geometry, "plain", (None, 3, None, None), 1), update="subspace")
    assert layer[0].update is None
    assert layer[0].weight.requires_grad


def test_a_step_by_hand() -> None:
    """W_0 = (1, 2), U = (0.6, 0.8): x = (5, 0) has the core 3, dŴ = 3·(0.6, 0.8), dD = 3; with decay 0.1, s = 0.95."""
    net = nn.Sequential(nn.Linear(2, 1, bias=False).to(np.float64))
    net[0].weight.data = np.array([[1.0, 2.0]])
    space = Subspace.random((1, 2), (None, 1), np.random.default_rng(0))
    space = dataclasses.replace(space, factors=(None, np.array([[0.6], [0.8]])))
    attach(net, lambda *_: Lance(space, dtype=np.float64), update="subspace")
    sgd = optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5, weight_decay=0.1)
    net(np.array([[5.0, 0.0]])).sum().backward()
    assert net[0].update.weight.grad.item() == pytest.approx(3)
    assert net[0].update.decay.grad.item() == 0
    sgd.step()
    assert net[0].update.weight.data.item() == pytest.approx(-1.5)
    assert net[0].update.decay.data.item() == pytest.approx(0.95)
    merge(net)
    np.testing.assert_allclose(net[0].weight.data, [[0.95 - 0.9, 1.9 - 1.2]])


@pytest.mark.parametrize("kind", ["plain", "centred", "patches"])
def test_both_ways_give_one_output_and_one_input_gradient(kind: str) -> None:
    """Merged and factored are two ways to compute one function; so is the merged layer."""
    geometry = GROUPED if kind != "patches" else ConvGeometry((3, 4, 5, 6), (8, 4, 3, 2), (2, 1), ((1, 0), (0, 1)))
    ranks = (2, 5, 3) if kind == "patches" else (2, 3, None, 2)
    results = []
    for forward in ("merged", "factored", "after"):
        net = nn.Sequential(layer_of(geometry))
        way = "auto" if forward == "after" else forward
        attach(net, lambda *_: store_of(geometry, kind, ranks, 1), update="subspace", forward=way)
        rng = np.random.default_rng(3)
        net[0].update.weight.data = rng.standard_normal(net[0].update.weight.shape)
        net[0].update.decay.data = np.asarray(0.5)
        if forward == "after":
            merge(net)
        x = Tensor(rng.standard_normal(geometry.input_shape), requires_grad=True)
        y = net(x)
        y.backward(rng.standard_normal(y.shape))
        results.append((y.data, x.grad))
    for output, gradient in results[1:]:
        np.testing.assert_allclose(output, results[0][0], atol=1e-12)
        np.testing.assert_allclose(gradient, results[0][1], atol=1e-12)


@pytest.mark.parametrize("batch", [1, 64])
def test_auto_takes_the_way_of_fewer_multiply_adds(batch: int) -> None:
    """One image of a 2x2 map: factored; many: merged."""
    spent = {}
    for forward in ("merged", "factored", "auto"):
        net = nn.Sequential(nn.Conv2d(32, 24, 1, rng=0))
        space = Subspace.random((batch, 32, 2, 2), (None, 4, None, None), np.random.default_rng(0))
        attach(net, lambda *_, space=space: Lance(space), update="subspace", forward=forward)
        x = Tensor(np.ones((batch, 32, 2, 2), np.float32), requires_grad=True)
        with count_macs() as counter:
            net(x).sum().backward()
        spent[forward] = counter.by_kind()
    plain = batch * 4 * 24 * 32
    narrow, merging = batch * 4 * 4 * (32 + 24), 24 * 32 * 4
    assert spent["merged"]["forward"] == spent["merged"]["grad_input"] == plain + merging
    assert spent["factored"]["forward"] == spent["factored"]["grad_input"] == plain + narrow
    assert spent["auto"] == spent["factored" if batch == 1 else "merged"]


def test_it_is_lora_with_a_frozen_calibrated_a() -> None:
    """LANCE of the features alone, by SGD, and LoRA with A = Uᵀ frozen and B = 0 at first: one trajectory."""
    rng = np.random.default_rng(0)
    space = Subspace.random((16, 10), (None, 3), rng)
    nets = [nn.Sequential(nn.Linear(10, 7, rng=0), nn.ReLU(), nn.Linear(7, 3, rng=1)).to(np.float64) for _ in range(2)]
    attach(nets[0], lambda *_: Lance(space, dtype=np.float64), ["0"])
    add_lora(nets[1], ["0"], rank=3)
    nets[1][0].down.weight.data = space.factors[1].T.copy()
    nets[1][0].down.requires_grad_(False)
    nets[1][0].bias.requires_grad_()
    for net in nets:
        sgd = optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9, nesterov=True)
        data = np.random.default_rng(1)
        for _ in range(STEPS):
            sgd.zero_grad()
            F.cross_entropy(net(data.standard_normal((16, 10))), data.integers(0, 3, 16)).backward()
            clip_grad_norm_(sgd.params, 0.3)
            sgd.step()
    merge_lora(nets[1])
    moved = np.abs(nets[0][0].weight.data - nn.Linear(10, 7, rng=0).weight.data).max()
    assert moved > 0.01
    np.testing.assert_allclose(nets[1][0].weight.data, nets[0][0].weight.data, rtol=1e-10, atol=1e-12)


# ---- on a network ------------------------------------------------------------------------------


def small_net() -> Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1, rng=0), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1, rng=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 10, rng=2),
    )  # fmt: skip


def prepared(update: str, **options: Any) -> Module:
    """Calibrated and compressed, all but the head."""
    net = small_net()
    tune(net, "all")
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((20, 1, 8, 8)).astype(np.float32) for _ in range(3)]
    compress(net, calibrate(net, batches, epsilon=0.6, modes=["channel"]), update=update, **options)
    return net


def test_fit_ends_at_the_same_weights() -> None:
    """A whole run, clipping and schedule included, in float32."""
    digits, nets = datasets.load("digits", "train"), [prepared("weight"), prepared("subspace")]
    for net in nets:
        fit(net, digits, epochs=1, batch_size=20, lr=0.05, normalise=(0.3, 0.3), progress=False)
    assert merge(nets[1]) == ["2"]  # the first layer has one channel
    for mine, theirs in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        np.testing.assert_allclose(mine.data, theirs.data, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resumes_bit_by_bit(tmp_path: Any, momentum: float) -> None:
    """A checkpoint holds D, s and their velocities: a run that was cut in two ends as one that was not."""
    digits = datasets.load("digits", "train")

    def make(parameters: Any) -> optim.Optimizer:
        return optim.SGD(parameters, lr=0.02, momentum=momentum, weight_decay=0.01)

    def run(net: Module, path: Any, stop: int | None = None) -> None:
        def on_step(info: Any) -> None:
            if info.step == stop:
                raise KeyboardInterrupt

        fit(net, digits, epochs=1, batch_size=100, optimizer=make, normalise=(0.3, 0.3), progress=False,
            checkpoint=path, checkpoint_every_steps=2, on_step=on_step)  # fmt: skip

    whole, cut, again = (prepared("subspace") for _ in range(3))
    run(whole, tmp_path / "whole.npz")
    with pytest.raises(KeyboardInterrupt):
        run(cut, tmp_path / "cut.npz", stop=5)
    run(again, tmp_path / "cut.npz")
    assert again[2].update.decay.data != 1
    for (name, mine), theirs in zip(again.named_parameters(), whole.parameters(), strict=True):
        np.testing.assert_array_equal(mine.data, theirs.data, err_msg=name)


def test_a_checkpoint_of_the_whole_weight_is_refused(tmp_path: Any) -> None:
    """It has other parameters."""
    checkpoint.save(tmp_path / "weight.npz", prepared("weight"))
    with pytest.raises(ValueError, match="another run"):
        checkpoint.load(tmp_path / "weight.npz", prepared("subspace"))


def test_restore_and_merge_take_it_off() -> None:
    """Afterwards the net has the parameters that it had before, the weights train, and the output is the same."""
    net, twin = prepared("subspace"), prepared("subspace")
    names = [name for name, _ in small_net().named_parameters()]
    rng = np.random.default_rng(0)
    D = rng.standard_normal(net[2].update.weight.shape).astype(np.float32)
    net[2].update.weight.data, twin[2].update.weight.data = D, D.copy()
    x = rng.standard_normal((2, 1, 8, 8)).astype(np.float32)
    before = net(x).data
    assert merge(net) == ["2"]
    assert isinstance(net[2].store, Lance)
    assert set(restore(twin)) == {"0", "2"}
    for each in (net, twin):
        assert [name for name, _ in each.named_parameters()] == names
        assert all(p.requires_grad for p in each.parameters())
        np.testing.assert_allclose(each(x).data, before, rtol=1e-5, atol=1e-6)
    assert merge(net) == []


def test_only_the_coordinates_train() -> None:
    """W_0 is frozen; D and s of an updated layer train; biases, the head and layers without update do as ever."""
    names = [name for name, p in prepared("subspace").named_parameters() if p.requires_grad]
    assert names == ["0.weight", "0.bias", "2.bias", "2.update.weight", "2.update.decay", "5.weight", "5.bias"]


def test_nothing_changes_before_the_first_step() -> None:
    """D = 0 and s = 1: the output is that of the weight, bit by bit."""
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(prepared("subspace", forward="merged")(x).data, prepared("weight")(x).data)


def test_another_store_in_between_gives_the_coordinates_of_its_gradient() -> None:
    """Whatever keeps the input, the gradient of D is the one of the weight times Qᵀ."""
    from lance_ref.stores import EXACT

    net = prepared("subspace")
    x = np.random.default_rng(0).standard_normal((20, 1, 8, 8)).astype(np.float32)
    lance, net[2].store = net[2].store, EXACT
    net(x).sum().backward()
    exact = net[2].update.weight.grad
    net[2].store = lance
    net.zero_grad()
    net(x).sum().backward()
    np.testing.assert_allclose(net[2].update.weight.grad, exact, rtol=1e-3, atol=1e-4)  # other modes are left alone


def test_as_a_whole_for_a_while() -> None:
    """Inside, the weight has a gradient and the output is the same; afterwards D goes on as the same parameter."""
    net = prepared("subspace")
    rng = np.random.default_rng(0)
    net[2].update.weight.data = rng.standard_normal(net[2].update.weight.shape).astype(np.float32)
    D, W, x = net[2].update.weight, net[2].weight.data, rng.standard_normal((20, 1, 8, 8)).astype(np.float32)
    before = net(x).data
    with as_whole(net):
        y = net(x)
        y.sum().backward()
        np.testing.assert_allclose(y.data, before, atol=1e-5)
        assert net[2].weight.grad is not None
    assert net[2].update.weight is D
    assert net[2].weight.data is W
    assert not net[2].weight.requires_grad


def test_adam_trains_the_coordinates() -> None:
    """Allowed, and another method: the weight moves within the span of Q, and s stays where it was."""
    net = prepared("subspace")
    Q, before = net[2].update.basis.directions[0], net[2].weight.data
    adam = optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    net(np.random.default_rng(0).standard_normal((20, 1, 8, 8)).astype(np.float32)).sum().backward()
    adam.step()
    assert net[2].update.decay.data == 1
    merge(net)
    moved = (net[2].weight.data - before).transpose(0, 2, 3, 1)
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(moved @ Q @ Q.T, moved, atol=1e-6)


def test_bad_input_is_named() -> None:
    """Each error says which layer, what came and what was expected; nothing has been changed then."""
    net = prepared("subspace")
    calibration = calibrate(net, [np.zeros((20, 1, 8, 8), np.float32)], epsilon=0.6, modes=["channel"], layers=["2"])
    with pytest.raises(ValueError, match="layer '2' trains in the subspace of its store; merge"):
        compress(net, calibration)
    with pytest.raises(ValueError, match="layer '2' trains in a subspace, which tune does not heed"):
        tune(net, "last:1")
    with pytest.raises(ValueError, match="update is 'weights', expected one of weight, subspace"):
        prepared("weights")
    with pytest.raises(ValueError, match="forward is 'folded', expected one of auto, merged, factored"):
        prepared("subspace", forward="folded")
    with pytest.raises(ValueError, match="forward is 'merged', but update is 'weight'"):
        prepared("weight", forward="merged")
    tied = nn.Sequential(nn.Linear(6, 6, rng=0), nn.Linear(6, 6, rng=1))
    tied[1].weight = tied[0].weight
    space = Subspace.random((4, 6), (None, 2), np.random.default_rng(0))
    with pytest.raises(ValueError, match="layers '0' and '1' share one weight"):
        attach(tied, lambda *_: Lance(space), update="subspace")
    assert tied[0].update is None
    own = nn.Sequential(LoRALinear(nn.Linear(6, 6, rng=0), 2))
    own.requires_grad_()
    with pytest.raises(ValueError, match="layer '0' is a LoRALinear, expected a Conv2d or Linear to train"):
        attach(own, lambda *_: Lance(space), "0", update="subspace")
    plain = nn.Sequential(nn.Linear(6, 6, rng=0))
    attach(plain, lambda *_: Lance(space), update="subspace")
    with pytest.raises(ValueError, match="LoRA: base trains in a subspace"):
        add_lora(plain, ["0"], rank=2)
    wrong = plain[0].update.parts()._replace(weight=Tensor(np.zeros((6, 3), np.float32)))
    with pytest.raises(ValueError, match=r"linear: the update has shape \(6, 3\) and decay \(\), expected \(6, 2\)"):
        F.linear(np.zeros((4, 6), np.float32), plain[0].weight, update=wrong)
