"""What PyTorch keeps of layers that pad or round up: asked of its own modules, not of a replay of our records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_truth import exported, kept

from analysis import cost
from analysis.check import torch_replay
from analysis.check.measure import compare
from analysis.cost_model import predict
from lance_ref import functional as F
from lance_ref import nn, no_grad
from lance_ref.engine.tensor import Tensor

torch = pytest.importorskip("torch")
tnn = torch.nn


def torch_net(*layers: Any) -> Any:
    return tnn.Sequential(*layers, tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), tnn.Linear(8, 10))


CONVOLUTIONS = {
    "4x4": ({"kernel_size": 4}, 13_872),
    "odd in width": ({"kernel_size": (3, 4)}, 4 * 3 * 16 * 17 * 4),
    "odd in height": ({"kernel_size": (2, 3)}, 4 * 3 * 17 * 16 * 4),
    "dilated": ({"kernel_size": (4, 2), "dilation": (3, 3)}, 4 * 3 * 17 * 17 * 4),
    "dilated evenly": ({"kernel_size": 4, "dilation": 2}, 4 * 3 * 16 * 16 * 4),
    "grouped": ({"kernel_size": 6, "groups": 1, "bias": False}, 4 * 3 * 17 * 17 * 4),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_same_padding_of_a_convolution(name: str, tmp_path: Path) -> None:
    """PyTorch pads the odd side alone (13,872 bytes), not all of it (17,328)."""
    pytest.importorskip("onnx")
    options, of_the_layer = CONVOLUTIONS[name]
    x = torch.randn(4, 3, 16, 16)
    theirs = torch_net(tnn.Conv2d(3, 8, padding="same", **options), tnn.Conv2d(8, 8, 3))
    ours = nn.Sequential(
        nn.Conv2d(3, 8, padding="same", **options),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    for net in (ours, exported(theirs, x, tmp_path / "net.onnx")):
        prediction = predict(net, 4, input_shape=(3, 16, 16), tune="all", methods=["bp"], with_weights=True)
        assert prediction.report.totals["bp"].activation_bytes["pytorch"] == kept(theirs, x)
        assert prediction.bills["bp"][0].pytorch_bytes == of_the_layer
        assert compare(prediction).agrees


POOLS = {
    "max": lambda kind: kind.MaxPool2d(3, 2, ceil_mode=True),
    "max with padding": lambda kind: kind.MaxPool2d((3, 2), (2, 3), (1, 0), ceil_mode=True),
    "max, nothing over the edge": lambda kind: kind.MaxPool2d(2, 2, ceil_mode=True),
    "mean": lambda kind: kind.AvgPool2d(3, 2, 1, ceil_mode=True),
    "mean of the inside": lambda kind: kind.AvgPool2d((3, 2), (2, 3), (1, 1), ceil_mode=True, count_include_pad=False),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_that_round_up(name: str, tmp_path: Path) -> None:
    """PyTorch rounds up without a padded copy of the input; numbers, gradients and bytes are its own."""
    pytest.importorskip("onnx")
    x = torch.randn(4, 3, 15, 17)
    theirs = torch_net(tnn.Conv2d(3, 8, 3), tnn.ReLU(), POOLS[name](tnn), tnn.Conv2d(8, 8, 3))
    ours = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        POOLS[name](nn),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    for net in (ours, exported(theirs, x, tmp_path / "net.onnx")):
        prediction = predict(net, 4, input_shape=(3, 15, 17), tune="all", methods=["bp"], with_weights=True)
        assert prediction.report.totals["bp"].activation_bytes["pytorch"] == kept(theirs, x)
        assert "pad" not in [bill.record.op for bill in prediction.bills["bp"]]
        assert compare(prediction).agrees


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("kind", ["max", "mean", "mean of the inside"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((5, 6), (2, 3), (2, 2), (0, 1)),
        ((6, 7), (3, 3), (2, 3), (1, 1)),
        ((4, 4), (2, 2), (3, 3), (1, 1)),  # a last window would begin beyond the image
        ((7, 3), (3, 2), (1, 4), (0, 0)),
        ((2, 2), (3, 3), (2, 2), (1, 1)),
        ((5, 5), (1, 1), (3, 3), (0, 0)),
        ((3, 6), (2, 2), (3, 3), (0, 0)),  # it would begin just beyond
    ],
)
def test_rounding_up_as_pytorch_does(
    monkeypatch: pytest.MonkeyPatch, numba: bool, kind: str, size: Any, kernel: Any, stride: Any, padding: Any
) -> None:
    """Sizes, means over the edge and gradients, with compiled loops and without."""
    from lance_ref.algebra.kernels import elementwise as kernels_elementwise

    monkeypatch.setattr(kernels_elementwise, "numba_enabled", lambda: numba and kernels_elementwise is not None)
    values = np.random.default_rng(0).standard_normal((2, 3, *size))
    x, y = Tensor(values, requires_grad=True), torch.tensor(values, requires_grad=True)
    if kind == "max":
        given = F.max_pool2d(x, kernel, stride, padding, ceil_mode=True)
        expected = torch.nn.functional.max_pool2d(y, kernel, stride, padding, ceil_mode=True)
    else:
        inside = kind == "mean"
        given = F.avg_pool2d(x, kernel, stride, padding, ceil_mode=True, count_include_pad=inside)
        expected = torch.nn.functional.avg_pool2d(y, kernel, stride, padding, True, inside)
    np.testing.assert_allclose(given.data, expected.detach().numpy())
    weights = np.random.default_rng(1).standard_normal(given.shape)
    (given * weights).sum().backward()
    (expected * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(x.grad, y.grad.numpy())


def test_other_unequal_sides_are_padded_by_their_difference() -> None:
    """One side alone, both axes, either side, with a stride: bytes of the copy by hand, and as replayed."""
    for padding, height, width in (
        (((0, 1), (0, 0)), 10, 11),
        (((0, 0), (2, 0)), 9, 13),
        (((1, 3), (2, 1)), 11, 12),
        (((2, 2), (1, 1)), 9, 11),
    ):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        bills = predict(net, 2, input_shape=(3, 9, 11), tune="all", methods=["bp"]).bills["bp"]
        assert bills[0].pytorch_bytes == 2 * 3 * height * width * 4
        assert torch_replay.saved_bytes([bill.record for bill in bills])[0] == bills[0].pytorch_bytes


def onnx_pool(op: str, file: Path, **attributes: Any) -> Any:
    from onnx_files import helper, model, save

    content = model([helper.make_node(op, ["x"], ["y"], **attributes)], [], ("batch", 2, 7, 8), 19)
    return content, save(file, content)


@pytest.mark.parametrize(
    ("mode", "stride", "kernel"),
    [("SAME_UPPER", 1, 2), ("SAME_LOWER", 1, 2), ("SAME_UPPER", 2, 3), ("SAME_LOWER", 2, 4), ("SAME_LOWER", 3, 3)],
)
def test_the_odd_zero_of_same_padding(mode: str, stride: int, kernel: int, tmp_path: Path) -> None:
    """At the end for SAME_UPPER, at the beginning for SAME_LOWER: of pools, and of convolutions, computed or stored."""
    pytest.importorskip("onnx")
    from onnx_files import helper, model, save, weight

    from analysis.onnx.net import OnnxNet

    x = np.random.default_rng(0).standard_normal((2, 2, 7, 8)).astype(np.float32)
    before, after = [], []
    for n in (7, 8):
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        less = total // 2
        before.append(less if mode == "SAME_UPPER" else total - less)
        after.append(total - before[-1])
    widths = ((0, 0), (0, 0), *zip(before, after, strict=True))
    zeros, lowest = torch.tensor(np.pad(x, widths)), torch.tensor(np.pad(x, widths, constant_values=-np.inf))
    attributes: dict[str, Any] = {"auto_pad": mode, "strides": [stride, stride]}
    pooled = OnnxNet(onnx_pool("MaxPool", tmp_path, kernel_shape=[kernel, kernel], **attributes)[1])
    w = weight("w", 3, 2, kernel, kernel)
    values = torch.tensor(np.array(__import__("onnx").numpy_helper.to_array(w)))
    expected = torch.nn.functional.conv2d(zeros, values, stride=stride).numpy()
    stored = model([helper.make_node("Conv", ["x", "w"], ["y"], **attributes)], [w], ("batch", 2, 7, 8))
    computed = model(
        [helper.make_node("Relu", ["w"], ["u"]), helper.make_node("Conv", ["x", "u"], ["y"], **attributes)],
        [w],
        ("batch", 2, 7, 8),
    )
    with no_grad():
        largest = torch.nn.functional.max_pool2d(lowest, kernel, stride).numpy()
        np.testing.assert_array_equal(pooled(x).data, largest)
        np.testing.assert_allclose(OnnxNet(save(tmp_path, stored, "s.onnx"))(x).data, expected, rtol=1e-4, atol=1e-5)
        positive = torch.nn.functional.conv2d(zeros, values.relu(), stride=stride).numpy()
        np.testing.assert_allclose(OnnxNet(save(tmp_path, computed, "c.onnx"))(x).data, positive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pads", "kernel", "stride"),
    [
        ([0, 0, 1, 0], [2, 3], [2, 2]),
        ([0, 1, 0, 0], [3, 2], [2, 3]),
        ([0, 0, 0, 0], [3, 3], [2, 2]),
        ([0, 0, 2, 2], [2, 2], [2, 2]),  # whole windows in the padding alone do not count
        ([0, 0, 3, 1], [2, 3], [3, 3]),
        ([1, 0, 2, 2], [3, 3], [3, 2]),
        ([2, 2, 1, 1], [5, 5], [2, 2]),
    ],
)
def test_a_window_that_begins_beyond_the_image_does_not_count(
    pads: Any, kernel: Any, stride: Any, tmp_path: Path
) -> None:
    """Rounded up on images with unequal sides: windows one by one."""
    pytest.importorskip("onnx")
    from analysis.onnx.net import OnnxNet

    file = onnx_pool("MaxPool", tmp_path, kernel_shape=kernel, strides=stride, pads=pads, ceil_mode=1)[1]
    x = np.random.default_rng(0).standard_normal((2, 2, 7, 8)).astype(np.float32)
    starts = []
    for axis, n in enumerate((7, 8)):
        first = -pads[axis]
        reach = n + pads[axis + 2]  # where the padding ends
        starts.append(
            [s for s in range(first, n, stride[axis]) if s == first or s - stride[axis] + kernel[axis] < reach]
        )
    windows = [
        [(slice(max(r, 0), r + kernel[0]), slice(max(c, 0), c + kernel[1])) for c in starts[1]] for r in starts[0]
    ]
    expected = np.stack([np.stack([x[(..., *w)].max((2, 3)) for w in row], -1) for row in windows], -2)
    with no_grad():
        np.testing.assert_array_equal(OnnxNet(file)(x).data, expected)


def test_what_the_report_said_of_these_nets(tmp_path: Path) -> None:
    """The numbers that PyTorch's hooks gave: 46,964 and 69,956."""
    pytest.importorskip("onnx")
    x = torch.randn(4, 3, 16, 16)
    nets = {
        46_964: torch_net(tnn.Conv2d(3, 8, 4, padding="same"), tnn.Conv2d(8, 8, 3)),
        69_956: torch_net(
            tnn.Conv2d(3, 8, 3, padding=1), tnn.ReLU(), tnn.MaxPool2d(3, 2, ceil_mode=True), tnn.Conv2d(8, 8, 3)
        ),
    }
    for right, net in nets.items():
        report = cost(exported(net, x, tmp_path / "net.onnx"), batch=4, tune="all", method="bp")
        assert report.totals["bp"].activation_bytes["pytorch"] == right
