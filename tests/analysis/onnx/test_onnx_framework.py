"""One operation of PyTorch is one operation here, however its exporter writes it: asked of PyTorch's own modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
from torch_truth import exported, kept  # noqa: E402
from torch_twins import one_thread  # noqa: E402

from analysis.check.measure import compare  # noqa: E402
from analysis.onnx.net import OnnxNet  # noqa: E402
from analysis.reports.predict import predict  # noqa: E402
from lance_ref import no_grad  # noqa: E402

tnn = torch.nn
TF = torch.nn.functional


class Glu(tnn.Module):
    def forward(self, x: Any) -> Any:
        return TF.glu(x, 1)


class Attention(tnn.Module):
    """Of 4 heads over the places of a map; ``options`` are those of PyTorch's function."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.qkv, self.options = tnn.Linear(8, 24), options

    def forward(self, x: Any) -> Any:
        B, C, H, W = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2)).reshape(B, H * W, 3, 4, 2).permute(2, 0, 3, 1, 4)
        mixed = TF.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], **self.options)
        return mixed.transpose(1, 2).reshape(B, H * W, C).transpose(1, 2).reshape(B, C, H, W)


class Tokens(tnn.Module):
    """A module of tokens, on the places of a map."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        B, C, H, W = x.shape
        return self.inner(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(B, C, H, W)


class RootMeanSquare(tnn.Module):
    """As language models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = tnn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Stochastic(tnn.Module):
    """Whole samples left out, as torchvision does it."""

    def forward(self, x: Any) -> Any:
        noise = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype).bernoulli_(0.8)
        return x * noise.div_(0.8)


LAYERS: dict[str, tuple[Callable[[], Any], str]] = {
    "SiLU": (tnn.SiLU, "silu"),
    "Hardswish": (tnn.Hardswish, "hardswish"),
    "Hardsigmoid": (tnn.Hardsigmoid, "hardsigmoid"),
    "Mish": (tnn.Mish, "mish"),
    "Softplus": (tnn.Softplus, "softplus"),
    "LeakyReLU": (lambda: tnn.LeakyReLU(0.2), "leaky_relu"),
    "ELU": (tnn.ELU, "elu"),
    "PReLU": (lambda: tnn.PReLU(8), "prelu"),
    "GELU": (tnn.GELU, "gelu"),
    "GELU by tanh": (lambda: tnn.GELU("tanh"), "gelu_tanh"),
    "GroupNorm": (lambda: tnn.GroupNorm(2, 8), "group_norm"),
    "GroupNorm, plain": (lambda: tnn.GroupNorm(4, 8, affine=False), "group_norm"),
    "InstanceNorm2d": (lambda: tnn.InstanceNorm2d(8), "instance_norm"),
    "InstanceNorm2d, affine": (lambda: tnn.InstanceNorm2d(8, affine=True), "instance_norm"),
    "LayerNorm": (lambda: Tokens(tnn.LayerNorm(8)), "layer_norm"),
    "attention": (lambda: Attention({}), "scaled_dot_product_attention"),
    "causal attention": (lambda: Attention({"is_causal": True}), "scaled_dot_product_attention"),
    "scaled attention": (lambda: Attention({"scale": 0.3}), "scaled_dot_product_attention"),
    "Upsample": (lambda: tnn.Upsample(scale_factor=2), "interpolate"),
    "Upsample, bilinear": (lambda: tnn.Upsample(scale_factor=2, mode="bilinear"), "interpolate"),
    "ConvTranspose2d": (lambda: tnn.ConvTranspose2d(8, 8, 4, 2, 1), "conv_transpose2d"),
    "ConvTranspose2d, grouped": (lambda: tnn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=2), "conv_transpose2d"),
    "MaxPool2d, rounded up": (lambda: tnn.MaxPool2d(3, 2, ceil_mode=True), "max_pool2d"),
    "AvgPool2d, rounded up": (lambda: tnn.AvgPool2d(3, 2, 1, ceil_mode=True), "avg_pool2d"),
    "PixelShuffle": (lambda: tnn.Sequential(tnn.Conv2d(8, 32, 1), tnn.PixelShuffle(2)), "permute"),
    "stochastic depth": (Stochastic, "mul"),
}


def head(*layers: Any) -> Any:
    return tnn.Sequential(
        tnn.Conv2d(3, 8, 3, padding=1), *layers, tnn.Conv2d(8, 8, 3), tnn.AdaptiveAvgPool2d(1), tnn.Flatten(),
        tnn.Linear(8, 10),
    )  # fmt: skip


def frozen_beside(net: Any) -> Any:
    """What ``--tune all`` trains: convolutions and linear layers; batch norm keeps to its statistics."""
    for module in net.modules():
        if isinstance(module, tnn.modules.batchnorm._BatchNorm):
            module.eval()
    layers = [m for m in net.modules() if isinstance(m, (tnn.Linear, tnn.modules.conv._ConvNd))]
    trained = {id(p) for m in layers for p in m.parameters(recurse=False)}
    for parameter in net.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return net


@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_layer_is_pytorchs_own_operation(name: str, tmp_path: Path) -> None:
    """Bytes of PyTorch's hooks on the module, the operation's name, and a real step that agrees."""
    make, op = LAYERS[name]
    torch.manual_seed(0)
    net = head(make())
    x = torch.randn(4, 3, 16, 16)
    file = exported(net, x, tmp_path / "net.onnx")
    prediction = predict(file, 4, tune="all", methods=["bp"], with_weights=True)
    assert op in {bill.record.op for bill in prediction.bills["bp"]}
    assert prediction.report.totals["bp"].activation_bytes["pytorch"] == kept(frozen_beside(net), x)
    assert compare(prediction).agrees


VALUES = [name for name in LAYERS if name not in ("stochastic depth",)]


@pytest.mark.parametrize("name", VALUES)
def test_an_exported_layer_gives_pytorchs_numbers(name: str, tmp_path: Path) -> None:
    """What is joined to one operation computes what its nodes did."""
    make, _ = LAYERS[name]
    torch.manual_seed(0)
    net = head(make())
    x = torch.randn(4, 3, 16, 16)
    file = exported(net, x, tmp_path / "net.onnx")
    with no_grad(), torch.no_grad(), one_thread():
        found, expected = OnnxNet(file)(x.numpy()).data, net(x).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [RootMeanSquare, lambda: tnn.LayerNorm(8, elementwise_affine=False)])
def test_norms_of_tokens(norm: Callable[[], Any], tmp_path: Path) -> None:
    """By the root mean square, which the exporter writes in six nodes; of layers without weights."""
    torch.manual_seed(0)
    net = head(Tokens(norm()))
    x = torch.randn(4, 3, 16, 16)
    prediction = predict(exported(net, x, tmp_path / "net.onnx"), 4, tune="all", methods=["bp"], with_weights=True)
    ops = {bill.record.op for bill in prediction.bills["bp"]}
    assert ops & {"rms_norm", "layer_norm"}
    assert prediction.report.totals["bp"].activation_bytes["pytorch"] == kept(frozen_beside(net), x)
    assert compare(prediction).agrees


@pytest.mark.parametrize("shape", [8, (64, 8)])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_that_older_operator_sets_take_apart(shape: Any, affine: bool, tmp_path: Path) -> None:
    """Nine nodes, or seven without weights; over one dimension and over two."""
    torch.manual_seed(0)
    net, x = head(Tokens(tnn.LayerNorm(shape, elementwise_affine=affine))), torch.randn(4, 3, 8, 8)
    prediction = predict(
        exported(net, x, tmp_path / "net.onnx", opset_version=13), 4, tune="all", methods=["bp"], with_weights=True
    )
    assert [bill.record.op for bill in prediction.bills["bp"]].count("layer_norm") == 1
    assert prediction.report.totals["bp"].activation_bytes["pytorch"] == kept(frozen_beside(net), x)
    assert compare(prediction).agrees


SEQUENCES: dict[str, Callable[[], Any]] = {
    "1-D": lambda: tnn.Sequential(
        tnn.Conv1d(3, 8, 5, 2, 1), tnn.BatchNorm1d(8), tnn.ReLU(), tnn.MaxPool1d(2), tnn.Conv1d(8, 4, 3),
        tnn.AvgPool1d(2), tnn.Flatten(), tnn.LazyLinear(5),
    ),
    "1-D transposed": lambda: tnn.Sequential(
        tnn.Conv1d(3, 8, 3), tnn.ConvTranspose1d(8, 4, 4, 2, 1), tnn.ReLU(), tnn.Flatten(), tnn.LazyLinear(5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name: str, tmp_path: Path) -> None:
    """Convolutions of sequences are those of images of height 1, and so are their bytes, those of cores too."""
    torch.manual_seed(0)
    net, x = SEQUENCES[name](), torch.randn(4, 3, 32)
    net(x)
    file = exported(net, x, tmp_path / "net.onnx")
    prediction = predict(file, 4, tune="all", methods=["bp", "lance"], ranks="0.5", with_weights=True)
    assert prediction.report.totals["bp"].activation_bytes["pytorch"] == kept(frozen_beside(net), x)
    assert compare(prediction).agrees


def test_volumes(tmp_path: Path) -> None:
    """Convolution, batch norm and pooling of volumes; the convolutions may keep cores."""
    torch.manual_seed(0)
    net = tnn.Sequential(
        tnn.Conv3d(3, 8, 3, padding=1), tnn.BatchNorm3d(8), tnn.ReLU(), tnn.MaxPool3d(2),
        tnn.Conv3d(8, 4, (1, 3, 3), groups=2), tnn.AvgPool3d((1, 2, 2)), tnn.Flatten(), tnn.LazyLinear(5),
    )  # fmt: skip
    x = torch.randn(2, 3, 4, 8, 8)
    net(x)
    file = exported(net, x, tmp_path / "net.onnx")
    prediction = predict(file, 2, tune="all", methods=["bp", "lance"], ranks="0.5", with_weights=True)
    assert prediction.report.totals["bp"].activation_bytes["pytorch"] == kept(frozen_beside(net), x)
    assert compare(prediction).agrees


class Recurrent(tnn.Module):
    """The last step of a recurrent layer, and a linear one."""

    def __init__(self, inner: Any, size: int) -> None:
        super().__init__()
        self.inner, self.head = inner, tnn.Linear(size, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.inner(x)[0][:, -1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers(kind: str, bidirectional: bool, tmp_path: Path) -> None:
    """PyTorch's numbers, products as linear layers that train, and a mark: its kernels keep other things."""
    torch.manual_seed(0)
    inner = getattr(tnn, kind)(5, 4, num_layers=2, batch_first=True, bidirectional=bidirectional)
    net, x = Recurrent(inner, 8 if bidirectional else 4), torch.randn(4, 6, 5)
    file = exported(net, x, tmp_path / "net.onnx")
    with no_grad(), torch.no_grad(), one_thread():
        np.testing.assert_allclose(OnnxNet(file)(x.numpy()).data, net(x).numpy(), rtol=1e-5, atol=1e-6)
    prediction = predict(file, 4, tune="all", methods=["bp"], with_weights=True)
    assert prediction.report.file_only
    assert "PyTorch's own kernels keep another workspace" in prediction.report.remark
    gates, directions = (4 if kind == "LSTM" else 3) * 4, 2 if bidirectional else 1
    per_step = directions * gates * (5 + 4) + directions * gates * (4 * directions + 4)
    assert prediction.report.totals["bp"].flops["forward"] == 2 * 4 * (6 * per_step + 3 * 4 * directions)
    assert compare(prediction).agrees
