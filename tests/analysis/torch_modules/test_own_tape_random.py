"""Random networks of PyTorch: the predicted tape is that of a real step, and loss and gradients are PyTorch's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from test_own_tape import check_equal, how_for, squared  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as TF  # noqa: E402


class Residual(nn.Module):
    """x plus what a layer makes of it, in one of three ways."""

    def __init__(self, layer: Any, way: str) -> None:
        super().__init__()
        self.layer, self.way = layer, way

    def forward(self, x: Any) -> Any:
        y = self.layer(x)
        if self.way == "in place":
            y = y + 0
            y += x
            return y
        return x + y if self.way == "sum" else torch.cat([x, y], 1)[:, ::2] * 0.5


class Attended(nn.Module):
    """PyTorch's layer of attention, of tokens to themselves or to others."""

    def __init__(self, crossed: bool, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.crossed = crossed

    def forward(self, x: Any) -> Any:
        return self.layer(x, x * 0.5 if self.crossed else x, x, need_weights=False)[0]


class Products(nn.Module):
    """Attention written out: products, a mask, softmax, and dropout that drops nothing."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.project, self.causal = nn.Linear(8, 24), causal

    def forward(self, x: Any) -> Any:
        q, k, v = self.project(x).chunk(3, -1)
        scores = torch.einsum("bid,bjd->bij", q, k) / 3
        if self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -1e4)
        return TF.dropout(torch.softmax(scores, -1), 0.0) @ v


class First(nn.Module):
    """The first result of a layer that gives several."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x)[0]


class Called(nn.Module):
    """A function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def doubled(x: Any) -> Any:
    """Copies, and half of them."""
    return x.repeat(2, *[1] * (x.ndim - 1))[::2]


ACTIVATIONS = [
    nn.ReLU, lambda: nn.ReLU(inplace=True), nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.PReLU, lambda: nn.GELU("tanh"),
    lambda: nn.Softmax(-1), lambda: nn.LogSoftmax(1), lambda: nn.Dropout(0.0), nn.Identity,
]  # fmt: skip
FUNCTIONS = [
    lambda x: x.clamp(-0.5, 0.5), lambda x: x.exp().reciprocal(), lambda x: 2 - x, lambda x: 1 / (x * x + 1),
    lambda x: (x.square() + 1).rsqrt(), lambda x: x.roll(1, 1), lambda x: TF.normalize(x, dim=1),
    lambda x: torch.where(torch.ones_like(x) > 0, x, -x), lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    lambda x: x - x.mean(1, keepdim=True), lambda x: x.unflatten(1, (2, -1)).flatten(1, 2), doubled,
    lambda x: torch.addcmul(x, x, x, value=0.5), lambda x: (x.var(-1, keepdim=True) + 1).sqrt() * x,
]  # fmt: skip
IMAGES = [
    lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
    lambda: nn.Conv2d(4, 4, (1, 2), padding="same"), lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
    lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm2d(4, affine=True),
    lambda: nn.InstanceNorm2d(4), lambda: nn.BatchNorm2d(4, affine=False),
    lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.GLU(1)), lambda: nn.MaxPool2d(3, 1, 1), lambda: nn.AvgPool2d(3, 1, 1),
    lambda: nn.AdaptiveAvgPool2d(4), lambda: nn.Upsample(scale_factor=2), lambda: nn.MaxPool2d(2, ceil_mode=True),
]  # fmt: skip
TOKENS = [
    lambda: nn.Linear(8, 8), lambda: nn.Linear(8, 8, bias=False), lambda: nn.LayerNorm(8), lambda: nn.RMSNorm(8),
    lambda: nn.LayerNorm(8, elementwise_affine=False), lambda: nn.LayerNorm(8, bias=False),
    lambda: nn.Sequential(nn.Linear(8, 16), nn.GLU()), lambda: Attended(False, True), lambda: Attended(False, False),
    lambda: Attended(True, True), lambda: Products(False), lambda: Products(True),
    lambda: First(nn.LSTM(8, 8, batch_first=True)), lambda: First(nn.LSTM(8, 4, 2, bidirectional=True)),
    lambda: First(nn.GRU(8, 8)), lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
]  # fmt: skip


@st.composite
def nets(draw: st.DrawFn) -> tuple[Any, tuple[int, ...]]:
    """Some layers between two that train, in one of both modes, and some parameters frozen."""
    of_images = draw(st.booleans())
    kinds = [*(IMAGES if of_images else TOKENS), *ACTIVATIONS, *(lambda f=f: Called(f) for f in FUNCTIONS)]
    layers = []
    torch.manual_seed(draw(st.integers(0, 1000)))
    for make in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=5)):
        layer = make()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of even kernels with padding "same"
            same = layer(torch.rand(2, 4, 6, 8)).shape == (2, 4, 6, 8) if of_images else True
        way = draw(st.sampled_from(["plain", "plain", "sum", "in place", "halves"])) if same else "plain"
        layers.append(layer if way == "plain" else Residual(layer, way))
    if of_images:
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers, nn.Conv2d(4, 3, 1))
    else:
        net = nn.Sequential(nn.Linear(5, 8), *layers, nn.Linear(8, 3))
    for parameter in net.parameters():
        parameter.requires_grad_(draw(st.booleans()) or draw(st.booleans()))
    return net.double().train(draw(st.booleans())), (3, 6, 8) if of_images else (4, 5)


@given(nets())
def test_random_networks(case: tuple[Any, tuple[int, ...]]) -> None:
    """A rule that forgets something, a wrong path, or memory that is shared and counted twice would be seen."""
    net, shape = case
    assume(net[0].weight.requires_grad or net[-1].weight.requires_grad)
    check_equal(net, how_for(shape, loss=squared))
