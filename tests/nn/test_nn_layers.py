"""Layers: each is its function with remembered arguments; constructors refuse what cannot work."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from lance_ref import F, Tensor, nn, tape

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((2, 4, 6, 7)).astype(np.float32)
ROWS = RNG.standard_normal((2, 3, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("layer", "x", "function"),
    [
        (nn.ReLU(), ROWS, F.relu),
        (nn.ReLU6(), ROWS * 5, F.relu6),
        (nn.Hardswish(), ROWS * 3, F.hardswish),
        (nn.GELU(), ROWS, F.gelu),
        (nn.Sigmoid(), ROWS, F.sigmoid),
        (nn.Tanh(), ROWS, F.tanh),
        (nn.Softmax(1), ROWS, lambda x: F.softmax(x, 1)),
        (nn.Identity(54, unused=0.1), ROWS, lambda x: x),
        (nn.Flatten(), IMAGES, lambda x: F.flatten(x, 1)),
        (nn.Flatten(2, 3), IMAGES, lambda x: F.flatten(x, 2, 3)),
        (nn.MaxPool2d(2), IMAGES, lambda x: F.max_pool2d(x, 2)),
        (nn.MaxPool2d(3, 2, 1), IMAGES, lambda x: F.max_pool2d(x, 3, 2, 1)),
        (nn.AvgPool2d((3, 2)), IMAGES, lambda x: F.avg_pool2d(x, (3, 2))),
        (
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            IMAGES,
            lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        ),
        (nn.AdaptiveAvgPool2d((2, 3)), IMAGES, lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
        (nn.LayerNorm((3, 8)), ROWS, lambda x: F.layer_norm(x, (3, 8))),
        (nn.Dropout(0.3, rng=4), ROWS, lambda x: F.dropout(x, 0.3, rng=4)),
        (nn.Dropout(0.3).eval(), ROWS, lambda x: x),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_a_layer_is_its_function(layer: nn.Module, x: np.ndarray, function: Any) -> None:
    """An argument forgotten or swapped on the way would show."""
    expected = function(Tensor(x))
    assert not np.array_equal(expected.data, 0 * expected.data)
    np.testing.assert_array_equal(layer(x).data, expected.data)


def test_conv2d_passes_all_its_arguments_on() -> None:
    """Stride, padding, dilation and groups, all different, with and without bias."""
    for bias in (True, False):
        conv = nn.Conv2d(4, 6, (3, 2), (2, 1), ((1, 0), (2, 1)), (1, 2), 2, bias, rng=0)
        assert conv.weight.shape == (6, 2, 3, 2)
        assert (conv.bias is not None) == bias
        expected = F.conv2d(IMAGES, conv.weight, conv.bias, (2, 1), ((1, 0), (2, 1)), (1, 2), 2)
        np.testing.assert_array_equal(conv(IMAGES).data, expected.data)


def test_same_padding_depends_on_the_image() -> None:
    """It is resolved at every call, not when the layer is made."""
    conv = nn.Conv2d(1, 1, 3, stride=2, padding="same", rng=0)
    assert conv(np.ones((1, 1, 7, 8), np.float32)).shape == (1, 1, 4, 4)
    assert conv(np.ones((1, 1, 8, 5), np.float32)).shape == (1, 1, 4, 3)


def test_linear_is_its_function() -> None:
    """Weight (out, in), with and without bias, any leading dimensions."""
    for bias in (True, False):
        linear = nn.Linear(8, 5, bias, rng=0)
        assert linear.weight.shape == (5, 8)
        np.testing.assert_array_equal(linear(ROWS).data, F.linear(ROWS, linear.weight, linear.bias).data)


def test_sequential_runs_in_order_and_can_be_taken_apart() -> None:
    """Positions, slices, names, length and iteration."""
    layers = [nn.Linear(8, 4, rng=0), nn.ReLU(), nn.Linear(4, 2, rng=1)]
    net = nn.Sequential(*layers)
    np.testing.assert_array_equal(net(ROWS).data, layers[2](layers[1](layers[0](ROWS))).data)
    assert (len(net), list(net)) == (3, layers)
    assert net[0] is layers[0]
    assert net[-1] is layers[2]
    head = net[1:]
    assert isinstance(head, nn.Sequential)
    assert [name for name, _ in head.named_modules()] == ["", "1", "2"]
    named = nn.Sequential(OrderedDict(first=layers[0], act=layers[1]))
    assert [name for name, _ in named.named_parameters()] == ["first.weight", "first.bias"]
    assert named.first is layers[0]
    with pytest.raises(TypeError, match="'1' is a function, expected a Module"):
        nn.Sequential(nn.ReLU(), F.relu)


def test_dropout_layers_share_a_generator_that_goes_on() -> None:
    """Two calls differ; evaluation does not draw."""
    dropout = nn.Dropout(0.5, rng=np.random.default_rng(0))
    x = np.ones(64, np.float32)
    assert (dropout(x).data != dropout(x).data).any()
    np.testing.assert_array_equal(dropout.eval()(x).data, x)


def test_batch_norm_has_three_states() -> None:
    """Training updates the statistics; evaluation and frozen use them; frozen survives train()."""
    x = 3 * IMAGES + 1
    norm = nn.BatchNorm2d(4, momentum=0.5)
    expected = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    np.testing.assert_array_equal(norm(x).data, expected.data)
    statistics = norm.running_mean.copy(), norm.running_var.copy()
    np.testing.assert_allclose(statistics[0], x.mean((0, 2, 3)) / 2, rtol=1e-5)
    assert "frozen" not in repr(norm)
    norm.frozen = True
    for mode in (norm.train(), norm.eval(), norm.train()):
        assert mode.frozen
        out = mode(x)
        np.testing.assert_array_equal(out.data, F.batch_norm(x, *statistics, norm.weight, norm.bias).data)
    np.testing.assert_array_equal(norm.running_mean, statistics[0])
    np.testing.assert_array_equal(norm.running_var, statistics[1])
    assert "frozen=True" in repr(norm)
    norm.frozen = False
    assert (norm(x).data != out.data).any()


def test_batch_norm_without_running_statistics() -> None:
    """Always the batch's own, in evaluation too; nothing to save; cannot be frozen."""
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    assert sorted(norm.state_dict()) == ["bias", "weight"]
    np.testing.assert_array_equal(norm(IMAGES).data, norm.eval()(IMAGES).data)
    assert "track_running_stats=False" in repr(norm)
    norm.frozen = True
    with pytest.raises(RuntimeError, match="track_running_stats is False"):
        norm(IMAGES)


def test_norm_layers_without_parameters() -> None:
    """affine=False leaves the plain normalisation, and nothing to train."""
    assert list(nn.BatchNorm2d(4, affine=False).parameters()) == []
    assert list(nn.LayerNorm(8, elementwise_affine=False).parameters()) == []
    x = Tensor(IMAGES, requires_grad=True)
    out = nn.BatchNorm2d(4, affine=False).eval()(x)
    assert [entry.what for entry in tape(out).entries] == ["scale"]


def test_batch_norm_in_float64() -> None:
    """``to`` converts the statistics too, and their updates stay float64."""
    norm = nn.BatchNorm2d(4).to(np.float64)
    assert norm(IMAGES.astype(np.float64)).dtype == np.float64
    assert norm.running_mean.dtype == norm.running_var.dtype == np.float64
    with pytest.raises(TypeError, match=r"float32.*float64"):
        norm(IMAGES)


def test_a_net_equals_pytorchs() -> None:
    """Forward, gradients and statistics of conv, norm, pool and linear in one, from the same weights."""
    torch = pytest.importorskip("torch")
    ours = nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, 1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).to(np.float64)
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3, 2, 1, groups=2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU6(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(8, 8, 1, bias=False),
        torch.nn.Hardswish(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 5),
    ).double()
    weights = {name: value.numpy() for name, value in theirs.state_dict().items() if "tracked" not in name}
    ours.load_state_dict(weights)
    x, target = IMAGES.astype(np.float64), np.array([3, 1])
    loss = F.cross_entropy(ours(x), target)
    expected = torch.nn.functional.cross_entropy(theirs(torch.tensor(x)), torch.tensor(target))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    for (name, mine), (other, peer) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        np.testing.assert_allclose(mine.grad, peer.grad.numpy(), rtol=1e-9, atol=1e-12, err_msg=name)
    for name, value in theirs.state_dict().items():
        if "running" in name:
            np.testing.assert_allclose(ours.state_dict()[name], value.numpy(), rtol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            nn.Conv2d(4, 6, 3, groups=2, bias=False, rng=0),
            "Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), groups=2, bias=False)",
        ),
        (
            nn.Conv2d(4, 6, 3, 1, "same", 2, rng=0),
            "Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding='same', dilation=(2, 2))",
        ),
        (nn.Linear(3, 4, rng=0), "Linear(3, 4, bias=True)"),
        (nn.BatchNorm2d(3), "BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True)"),
        (nn.LayerNorm(3), "LayerNorm((3,), eps=1e-05, elementwise_affine=True)"),
        (nn.MaxPool2d(2), "MaxPool2d(kernel_size=(2, 2), stride=(2, 2), padding=(0, 0))"),
        (nn.AvgPool2d(2), "AvgPool2d(kernel_size=(2, 2), stride=(2, 2), padding=(0, 0))"),
        (
            nn.AvgPool2d(2, count_include_pad=False),
            "AvgPool2d(kernel_size=(2, 2), stride=(2, 2), padding=(0, 0), count_include_pad=False)",
        ),
        (nn.AdaptiveAvgPool2d(1), "AdaptiveAvgPool2d(output_size=(1, 1))"),
        (nn.Dropout(0.2), "Dropout(p=0.2)"),
        (nn.Softmax(1), "Softmax(dim=1)"),
        (nn.Flatten(), "Flatten(start_dim=1, end_dim=-1)"),
        (nn.ReLU6(), "ReLU6()"),
        (
            nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh())),
            "Sequential(\n  (0): ReLU()\n  (1): Sequential(\n    (0): Tanh()\n  )\n)",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_layers_print_what_they_are(layer: nn.Module, text: str) -> None:
    """The arguments that matter, in PyTorch's form."""
    assert repr(layer) == text


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Conv2d(0, 4, 3), "Conv2d: in_channels is 0, expected a positive integer"),
        (lambda: nn.Conv2d(4, -1, 3), "out_channels is -1"),
        (lambda: nn.Conv2d(4, 4.0, 3), "out_channels is 4.0"),
        (lambda: nn.Conv2d(4, 4, 0), "kernel_size is 0"),
        (lambda: nn.Conv2d(4, 4, (3, 3, 3)), r"kernel_size is \(3, 3, 3\)"),
        (lambda: nn.Conv2d(4, 4, 3, stride=0), "stride is 0"),
        (lambda: nn.Conv2d(4, 4, 3, padding=-1), "padding is -1"),
        (lambda: nn.Conv2d(4, 4, 3, padding="full"), "padding is 'full'"),
        (lambda: nn.Conv2d(4, 4, 3, padding=None), "padding is None"),
        (lambda: nn.Conv2d(4, 4, 3, padding=((1, 2), (0, -1))), r"padding of width is \(0, -1\)"),
        (lambda: nn.Conv2d(4, 4, 3, dilation=0), "dilation is 0"),
        (lambda: nn.Conv2d(4, 6, 3, groups=3), "groups is 3, expected a divisor of in_channels = 4"),
        (lambda: nn.Conv2d(6, 4, 3, groups=3), "groups is 3, expected a divisor of out_channels = 4"),
        (lambda: nn.Conv2d(4, 4, 3, groups=0), "groups is 0"),
        (lambda: nn.Conv2d(4, 4, 3, rng="0"), "seed is '0'"),
        (lambda: nn.Linear(0, 3), "Linear: in_features is 0"),
        (lambda: nn.Linear(3, True), "out_features is True"),
        (lambda: nn.BatchNorm2d(0), "BatchNorm2d: num_features is 0"),
        (lambda: nn.LayerNorm((3, 0)), r"LayerNorm: normalized_shape\[1\] is 0"),
        (lambda: nn.Dropout(1.2), r"Dropout: p is 1.2, expected a number in \[0, 1\]"),
        (lambda: nn.Dropout("0.2"), "p is '0.2'"),
        (lambda: nn.MaxPool2d(0), "kernel_size is 0"),
        (lambda: nn.AvgPool2d(2, stride=-1), "stride is -1"),
        (lambda: nn.AdaptiveAvgPool2d((2, 0)), r"output_size is \(2, 0\)"),
        (lambda: nn.BatchNorm2d(3)(IMAGES), r"BatchNorm2d: x has shape \(2, 4, 6, 7\), expected \(B, 3, H, W\)"),
        (lambda: nn.BatchNorm2d(3)(ROWS), r"BatchNorm2d: x has shape \(2, 3, 8\)"),
    ],
)
def test_bad_arguments_are_named(make: Any, says: str) -> None:
    """When the layer is made, not at the first batch: the layer, the argument, what came, what was expected."""
    with pytest.raises(ValueError, match=says):
        make()
