"""Sampled activations and output gradients are those of the real step, and the network never notices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lance_ref as lr
from lance_ref import F, Tensor, nn
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.lance.gradient_samples import LayerSample, sample_gradients
from lance_ref.stores import EXACT, Asi, GradientFilter, Hosvd


class Net(nn.Module):
    """Grouped strided convolution, batch norm, a convolution called twice, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=((0, 1), (1, 0)), groups=2, rng=0)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, rng=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3, rng=2)
        self.to(np.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.conv(F.relu(self.conv(x)))
        return self.head(self.drop(x.mean((2, 3))))


def pairs(count: int = 2, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((5, 2, 9, 7)), rng.integers(0, 3, 5)) for _ in range(count)]


def true_gradients(net: nn.Module, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Weight gradients of one exact step in evaluation mode, by plain backpropagation."""
    net.eval()
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    return {path: net.get_submodule(path).weight.grad for path in ("stem", "conv", "head")}


def from_samples(samples: list[LayerSample], count: int = 1) -> np.ndarray:
    return sum(s.geometry.weight_gradient(s.activation, s.grad_output) for s in samples) / count


def test_samples_give_the_real_weight_gradient() -> None:
    """geometry.weight_gradient(activation, grad_output), summed over the calls, is what backward computes."""
    batches = pairs()
    samples = sample_gradients(Net(), batches)
    assert list(samples) == ["stem", "conv", "head"]
    assert [len(found) for found in samples.values()] == [2, 4, 2]
    for i, (x, y) in enumerate(batches):
        expected = true_gradients(Net(), x, y)
        for path, calls in (("stem", 1), ("conv", 2), ("head", 1)):
            of_batch = samples[path][i * calls : (i + 1) * calls]
            np.testing.assert_allclose(from_samples(of_batch), expected[path], rtol=1e-10, atol=1e-12)


def test_calls_come_in_the_order_of_the_forward_pass() -> None:
    """The backward pass meets the second call first; the samples are sorted back."""
    net, batches = Net(), pairs()
    samples = sample_gradients(net, batches)["conv"]
    assert [sample.call for sample in samples] == [0, 1, 0, 1]
    net.eval()
    first = F.relu(net.norm(net.stem(Tensor(batches[0][0])))).data
    np.testing.assert_array_equal(samples[0].activation, first)
    np.testing.assert_array_equal(samples[1].activation, F.relu(net.conv(Tensor(first))).data)


def test_geometries_are_those_of_the_calls() -> None:
    """Stride, padding and groups as the layer has them, sizes as the call had them."""
    samples = sample_gradients(Net(), pairs(1))
    stem, head = samples["stem"][0], samples["head"][0]
    assert stem.geometry == ConvGeometry((5, 2, 9, 7), (4, 1, 3, 3), (2, 2), ((0, 1), (1, 0)), (1, 1), 2)
    assert head.geometry == LinearGeometry((5, 4), (3, 4))
    for sample in (stem, head):
        assert sample.activation.shape == sample.geometry.input_shape
        assert sample.grad_output.shape == sample.geometry.output_shape
        assert sample.activation.base is None
        assert sample.grad_output.base is None


def snapshot(net: nn.Module) -> dict[str, Any]:
    """Everything of a network that sampling could change, by identity or by value."""
    return {
        "parameters": [(p.requires_grad, id(p.grad), id(p.data)) for p in net.parameters()],
        "grads": [None if p.grad is None else p.grad.copy() for p in net.parameters()],
        "buffers": [array.copy() for _, array in net.named_buffers()],
        "training": [module.training for module in net.modules()],
        "frozen": [getattr(module, "frozen", None) for module in net.modules()],
        "stores": [id(module.store) for module in net.modules() if hasattr(module, "store")],
        "state": [dict(m.store.state()) for m in net.modules() if hasattr(m, "store")],
        "hooks": [len(module._pre_hooks) for module in net.modules()],
        "tuning": getattr(net, "tuning", None),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was_found(fails: bool) -> None:
    """Modes, stores and their state, gradients, running statistics, tuning, random numbers; after an error too."""
    net = Net()
    lr.tune(net, ["conv"], train_batchnorm=True)
    net.conv.store, net.stem.store = Asi((2, 2, 2, 2)), Hosvd(0.5)
    x, y = pairs(1)[0]
    F.cross_entropy(net(x), y).backward()  # gradients and a warm start to be found again
    net.drop.eval()
    before = snapshot(net)
    lr.manual_seed(5)
    expected_draw = np.random.default_rng(5).random()
    if fails:
        with pytest.raises(ValueError, match="groups is 2, expected a divisor of C_in = 1"):
            sample_gradients(net, [(x, y), (x[:, :1], y)])
    else:
        sample_gradients(net, [(x, y)])
    after = snapshot(net)
    for what in before:
        np.testing.assert_equal(after[what], before[what], err_msg=what)
    assert lr.engine.random.as_generator().random() == expected_draw


def test_gradients_of_before_do_not_leak_into_the_samples() -> None:
    """Sampling twice gives the same, bit by bit, whatever the compression and the gradients in between."""
    net, batches = Net(), pairs(1)
    first = sample_gradients(net, batches)
    net.conv.store = Hosvd(0.3)
    F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    net.norm._buffers.update(Net().norm._buffers)  # that step was a training step
    second = sample_gradients(net, batches)
    for path in first:
        for a, b in zip(first[path], second[path], strict=True):
            np.testing.assert_array_equal(a.activation, b.activation)
            np.testing.assert_array_equal(a.grad_output, b.grad_output)


def test_samples_are_copies() -> None:
    """A loader that uses its buffer again must not change what was sampled."""
    x, y = pairs(1)[0]
    sample = sample_gradients(Net(), [(x, y)], "stem")["stem"][0]
    before = sample.activation.copy()
    x[:] = 0
    np.testing.assert_array_equal(sample.activation, before)


def test_which_layers() -> None:
    """By default those that tune selected, without the head; by name also layers that do not train."""
    net = Net()
    lr.tune(net, "last:1")
    assert list(sample_gradients(net, pairs(1))) == ["conv"]
    samples = sample_gradients(net, pairs(1), ["stem", "head"])
    np.testing.assert_allclose(
        from_samples(samples["stem"]), true_gradients(Net(), *pairs(1)[0])["stem"], rtol=1e-10, atol=1e-12
    )
    assert not net.stem.weight.requires_grad


def test_inside_no_grad_and_with_another_loss() -> None:
    """The caller's switches do not matter; the loss is the one that was given."""
    x, _ = pairs(1)[0]
    target = np.ones((5, 3))
    with lr.no_grad():
        samples = sample_gradients(Net(), [(Tensor(x), Tensor(target))], "head", loss=F.mse_loss)
        assert not net_requires_grad_inside()
    net = Net().eval()
    expected = 2 * (net(x).data - target) / target.size
    np.testing.assert_allclose(samples["head"][0].grad_output, expected, rtol=1e-12)


def net_requires_grad_inside() -> bool:
    """Whether gradients are on where this is called."""
    return Net()(pairs(1)[0][0]).requires_grad


def test_what_is_multiplied_is_calibration() -> None:
    """The forward passes of sampling are no part of a training step's bill."""
    with lr.count_macs() as counter:
        sample_gradients(Net(), pairs(1))
    assert counter.by_kind()["forward"] == 0
    assert counter.by_kind()["calibration"] > 0
    assert counter.by_kind()["grad_weight"] == 0


def test_stores_between_a_layer_and_the_loss_change_nothing() -> None:
    """A gradient filter on a later layer coarsens what it hands back; the samples are those of the exact step."""
    net = Net()
    (plain,) = sample_gradients(net, pairs(1), layers=["stem"])["stem"]
    net.conv.store = GradientFilter(2)
    (found,) = sample_gradients(net, pairs(1), layers=["stem"])["stem"]
    np.testing.assert_array_equal(found.grad_output, plain.grad_output)


def test_only_chosen_layers_are_differentiated() -> None:
    """The others compute no weight gradient, and no activation store of theirs is asked for one."""
    net = Net()
    stem: Any = net.stem
    before, asked = type(EXACT).weight_gradient, []

    def noted(store: Any, saved: Any, grad_output: np.ndarray, geometry: Any) -> np.ndarray:
        asked.append(geometry)
        return before(store, saved, grad_output, geometry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(EXACT), "weight_gradient", noted)
        samples = sample_gradients(net, pairs(1), layers=["conv"])
    assert list(samples) == ["conv"]
    assert asked == []
    assert stem.weight.requires_grad


def test_wrong_arguments_are_named() -> None:
    """No batches, no pair, no such layer, a layer that the loss does not depend on."""
    net = Net()
    with pytest.raises(ValueError, match="batches is empty"):
        sample_gradients(net, [])
    with pytest.raises(TypeError, match=r"batch 0 is a ndarray, expected a pair"):
        sample_gradients(net, [pairs(1)[0][0]])
    with pytest.raises(ValueError, match="'tail' matches no"):
        sample_gradients(net, pairs(1), "tail")
    with pytest.raises(TypeError, match="net is a int"):
        sample_gradients(3, pairs(1))  # type: ignore[arg-type]
    net.unused = nn.Linear(4, 4, rng=0).to(np.float64)
    with pytest.raises(ValueError, match=r"does not depend on layers \['unused'\]"):
        sample_gradients(net, pairs(1), ["conv", "unused"])
    assert net.unused.store is EXACT
