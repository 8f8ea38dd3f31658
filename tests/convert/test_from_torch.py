"""Modules of PyTorch as networks of this library: the same numbers in float64, forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as TF  # noqa: E402
from torch_twins import one_thread  # noqa: E402

import analysis  # noqa: E402
import lance_ref  # noqa: E402
from lance_ref import functional as F  # noqa: E402
from lance_ref import nn as ours  # noqa: E402


class Residual(nn.Module):
    """Branches, functions, operators and methods of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.mix = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.BatchNorm2d(6))
        self.scale = nn.Parameter(torch.full((6, 1, 1), 0.5))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Any) -> Any:
        x = self.body(x)
        x = TF.relu(x + self.mix(x) * self.scale)
        x = TF.max_pool2d(x, 2, stride=2)
        first, second = x.chunk(2, dim=1)
        x = torch.cat([second, -first], dim=1)
        return self.head(x.mean([2, 3]).view(x.size(0), -1))


class Tokens(nn.Module):
    """A token beside patches, positions, attention written out, and layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.norm, self.project, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        B, L, C = x.shape
        q, k, v = self.project(self.norm(x)).reshape(B, L, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = TF.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, C)
        return self.head(TF.gelu(x + self.out(y), approximate="tanh")[:, 0])


class Odd(nn.Module):
    """Arguments that are easily dropped, and a count that tracing must not move on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 7)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        self.calls.add_(1)
        first, second, rest = torch.add(x, self.layer(x), alpha=2).split(3, dim=1)
        both = torch.stack([first - second, torch.sub(second, first, alpha=3)], dim=1)
        return torch.cat([both.flatten(1), rest.squeeze(1).unsqueeze(-1)], 1)


class Shared(nn.Module):
    """One layer twice, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Any) -> Any:
        return self.second(torch.tanh(self.first(torch.sigmoid(self.first(x)))))


def plain() -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding="valid", dilation=2), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), nn.SiLU(),
        nn.Sequential(nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), nn.GELU()), nn.Linear(32, 5), nn.Softmax(dim=1),
    )  # fmt: skip


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "sequential": (plain, (3, 17, 13)),
    "residual": (Residual, (3, 8, 8)),
    "tokens": (Tokens, (3, 8, 8)),
    "odd": (Odd, (7,)),
    "shared": (Shared, (6,)),
    "a layer": (lambda: nn.Linear(6, 4), (6,)),
}


def randomised(module: Any) -> Any:
    """In float64, with statistics and weights that no default hides."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module.double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_outputs_gradients_and_statistics_are_equal(name: str, training: bool) -> None:
    """A weight transposed, an option dropped, or a step in another order would be seen."""
    make, shape = NETS[name]
    module = randomised(make()).train(training)
    x = torch.rand(4, *shape, dtype=torch.float64)
    before = copy.deepcopy(module.state_dict())
    net = lance_ref.from_torch(module)
    assert all(torch.equal(before[path], value) for path, value in module.state_dict().items())
    with one_thread():
        output = module(x)
        weights = torch.rand(output.shape, dtype=torch.float64)
        (output * weights).sum().backward()
    found = net(x.numpy())
    F.sum(found * weights.numpy()).backward()
    np.testing.assert_allclose(found.data, output.detach().numpy(), rtol=1e-10, atol=1e-12)
    theirs = dict(module.named_parameters())
    assert [name for name, _ in net.named_parameters()] == list(theirs)
    for path, parameter in net.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad, theirs[path].grad.numpy(), rtol=1e-9, atol=1e-12, err_msg=path)
    for path, array in net.named_buffers():
        np.testing.assert_allclose(array, module.state_dict()[path].numpy(), rtol=1e-12, err_msg=path)
    assert net.training is training


def test_paths_selection_and_mode_come_along() -> None:
    """Layers are tuned and compressed under the names that they have in PyTorch."""
    module = Residual()
    module.body[0].weight.requires_grad_(False)
    module.body[1].eval()
    net = lance_ref.from_torch(module)
    assert not net.get_submodule("body.0").weight.requires_grad
    assert not net.get_submodule("body.1").training
    assert net.get_submodule("body").training
    assert lance_ref.tune(net, "last:1").layers == ("mix.0",)
    report = analysis.cost(net, batch=2, input_shape=(3, 8, 8), tune="mix.0")
    assert report.tuned_layers == ("mix.0",)
    assert report.totals["lance"].activation_bytes["tape"] < report.totals["bp"].activation_bytes["tape"]


class FourLayers(nn.Module):
    """The same layers, called one by one."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = layers

    def forward(self, x: Any) -> Any:
        return self.d(TF.relu(self.c(TF.relu(self.b(TF.relu(self.a(x)))))))


def test_results_are_given_back_as_soon_as_no_step_needs_them() -> None:
    """The peak of memory below a trained head is that of a plain sequence."""
    sizes = [nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)]
    sequence = [layer for each in sizes[:-1] for layer in (each, nn.ReLU())] + sizes[-1:]
    nets = [lance_ref.from_torch(module) for module in (nn.Sequential(*sequence), FourLayers(sizes))]
    reports = [analysis.cost(net, batch=50, input_shape=(64,), tune="head", method="bp") for net in nets]
    assert isinstance(nets[0], ours.Sequential)
    assert reports[0].peaks["bp"].peak_bytes == reports[1].peaks["bp"].peak_bytes
    assert reports[0].totals["bp"].activation_bytes == reports[1].totals["bp"].activation_bytes


def test_a_copy_of_the_weights_is_made() -> None:
    """Training here changes nothing there."""
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    net = lance_ref.from_torch(module)
    net.weight.data[:] = 7
    assert torch.equal(module.weight, before)


class Unknown(nn.Module):
    """Several things that this library has not."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Bilinear(1, 2, 3), nn.LocalResponseNorm(2)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x: Any) -> Any:
        return torch.flip(self.norm(self.conv(x)), [1]).cumsum(1)


class ByValue(nn.Module):
    """A branch that depends on a value."""

    def forward(self, x: Any) -> Any:
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    """Two inputs."""

    def forward(self, x: Any, y: Any) -> Any:
        return x + y


class Linear(nn.Module):
    """A user's class of a name that PyTorch has, too."""

    def forward(self, x: Any) -> Any:
        return 2 * x


SEQUENCE, IMAGE, VOLUME = (6, 9), (6, 7, 9), (6, 5, 4, 5)
SINGLE: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.LeakyReLU(0.3), IMAGE), (lambda: nn.PReLU(6), IMAGE), (lambda: nn.ELU(0.7), IMAGE),
    (lambda: nn.Mish(), IMAGE), (lambda: nn.Softplus(2.0, 1.5), IMAGE), (lambda: nn.GLU(1), IMAGE),
    (lambda: nn.Hardtanh(-0.2, 0.5), IMAGE), (lambda: nn.Hardtanh(0.0, 6.0), IMAGE), (lambda: nn.LogSoftmax(1), IMAGE),
    (lambda: nn.Unflatten(1, (2, 3)), IMAGE), (lambda: nn.ZeroPad2d((1, 2, 0, 3)), IMAGE),
    (lambda: nn.ConstantPad2d(1, 0.5), IMAGE), (lambda: nn.GroupNorm(3, 6, 1e-3), IMAGE),
    (lambda: nn.InstanceNorm1d(6, affine=True), SEQUENCE), (lambda: nn.InstanceNorm2d(6), IMAGE),
    (lambda: nn.InstanceNorm3d(6, affine=True), VOLUME), (lambda: nn.RMSNorm((7, 9)), IMAGE),
    (lambda: nn.Conv1d(6, 4, 3, 2, "valid", 2, 2), SEQUENCE), (lambda: nn.Conv3d(6, 4, 2, 1, 1, groups=2), VOLUME),
    (lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, 2, dilation=2), IMAGE), (lambda: nn.Upsample(scale_factor=2), IMAGE),
    (lambda: nn.Upsample((5, 11), mode="bilinear", align_corners=True), IMAGE),
    (lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True), SEQUENCE), (lambda: nn.MaxPool3d(2, 1, 1), VOLUME),
    (lambda: nn.AvgPool1d(3, 2, 1, count_include_pad=False), SEQUENCE),
    (lambda: nn.AvgPool3d(2, 1, 1, count_include_pad=False), VOLUME),
    (lambda: nn.AdaptiveAvgPool1d(4), SEQUENCE), (lambda: nn.AdaptiveAvgPool3d(1), VOLUME),
    (lambda: nn.LSTM(9, 5, 2, batch_first=True, bidirectional=True), SEQUENCE),
    (lambda: nn.GRU(9, 5, bias=False), SEQUENCE),
]  # fmt: skip


def first(output: Any) -> Any:
    """A recurrent layer gives its states too."""
    return output[0] if isinstance(output, tuple) else output


def path_here(name: str) -> str:
    """``weight_ih_l0`` as ``l0.ih.weight``."""
    parts = name.split("_", 2)
    return ".".join(reversed(parts)) if len(parts) == 3 else name


@pytest.mark.parametrize("case", SINGLE, ids=[repr(make()) for make, _ in SINGLE])
def test_every_layer_is_pytorchs(case: tuple[Any, tuple[int, ...]]) -> None:
    """Output, gradient of the input and of all weights, in float64."""
    make, shape = case
    module = randomised(make())
    x = torch.rand(4, *shape, dtype=torch.float64, requires_grad=True)
    net, mine = lance_ref.from_torch(module), lance_ref.Tensor(x.detach().numpy().copy(), requires_grad=True)
    with one_thread():
        output = first(module(x))
        weights = torch.rand(output.shape, dtype=torch.float64)
        (output * weights).sum().backward()
    found = first(net(mine))
    F.sum(found * weights.numpy()).backward()
    np.testing.assert_allclose(found.data, output.detach().numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mine.grad, x.grad.numpy(), rtol=1e-9, atol=1e-12)
    here = dict(net.named_parameters())
    assert set(here) == {path_here(name) for name, _ in module.named_parameters()}
    for name, theirs in module.named_parameters():
        own = here[path_here(name)].grad
        assert own is not None
        np.testing.assert_allclose(own.reshape(theirs.shape), theirs.grad.numpy(), rtol=1e-9, atol=1e-12, err_msg=name)
    for name, array in net.named_buffers():
        np.testing.assert_allclose(array, module.state_dict()[name].numpy(), rtol=1e-12, err_msg=name)


def test_a_table_of_words() -> None:
    """Indices go in, rows come out, and the row of padding has no gradient."""
    module = randomised(nn.Embedding(7, 5, padding_idx=2))
    indices = np.array([[0, 2, 6], [6, 2, 1]])
    net = lance_ref.from_torch(module)
    output = module(torch.from_numpy(indices))
    output.square().sum().backward()
    found = net(indices)
    F.sum(found * found).backward()
    np.testing.assert_allclose(found.data, output.detach().numpy())
    (here,) = net.parameters()
    np.testing.assert_allclose(here.grad, module.weight.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            Unknown,
            ["layer conv: Conv2d (padding_mode is 'circular'", "layer norm: LocalResponseNorm", "flip", "cumsum"],
        ),
        (ByValue, ["cannot be traced by torch.fx"]),
        (TwoInputs, ["input 'y' (networks of this library have one input)"]),
        (lambda: nn.Sequential(nn.Softsign(), nn.CELU()), ["layer 0: Softsign (no such layer)", "layer 1: CELU"]),
        (lambda: nn.LSTM(3, 4, proj_size=2), ["proj_size is 2"]),
        (lambda: nn.AvgPool3d(2, ceil_mode=True), ["ceil_mode is True"]),
        (lambda: nn.MaxPool1d(2, return_indices=True), ["return_indices is True"]),
        (lambda: nn.Embedding(3, 2, max_norm=1.0), ["max_norm is 1.0"]),
        (lambda: nn.BatchNorm2d(4, momentum=None), ["momentum is None"]),
        (lambda: nn.Linear(3, 2).half(), ["dtype float16"]),
        (lambda: nn.MaxPool2d(2, dilation=2), ["dilation is 2"]),
    ],
)
def test_all_that_has_no_counterpart_is_listed(make: Any, words: list[str]) -> None:
    """One error for all of it, not one after the other."""
    with pytest.raises(ValueError, match=r"counterpart|traced") as raised:
        lance_ref.from_torch(make())
    assert all(each in str(raised.value) for each in words), str(raised.value)


def test_what_is_none_is_refused() -> None:
    """A class, a function, one of our own."""
    for value in (nn.Linear, ours.Linear(3, 2), 3):
        with pytest.raises(TypeError, match=r"expected a torch.nn.Module"):
            lance_ref.from_torch(value)


def test_a_class_of_that_name_is_not_taken_for_pytorchs() -> None:
    """Its own forward() runs."""
    net = lance_ref.from_torch(nn.Sequential(Linear()))
    np.testing.assert_array_equal(net(np.ones((2, 3))).data, np.full((2, 3), 2.0))
