"""Layers of F7: against PyTorch's own with the same weights, forward and backward, and what may be asked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lance_ref
from lance_ref import F, Tensor, calibrate, compress, nn, tape, tune

SEQUENCES, IMAGES, VOLUMES = (2, 4, 9), (2, 4, 5, 6), (2, 4, 5, 4, 6)

LAYERS: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "SiLU": (lambda kind: kind.SiLU(inplace=False), IMAGES),
    "Mish": (lambda kind: kind.Mish(), IMAGES),
    "LeakyReLU": (lambda kind: kind.LeakyReLU(0.2), IMAGES),
    "ELU": (lambda kind: kind.ELU(0.7), IMAGES),
    "Softplus": (lambda kind: kind.Softplus(2.0, 1.0), IMAGES),
    "PReLU": (lambda kind: kind.PReLU(), IMAGES),
    "PReLU of channels": (lambda kind: kind.PReLU(4, 0.1), IMAGES),
    "GLU": (lambda kind: kind.GLU(1), IMAGES),
    "GELU by tanh": (lambda kind: kind.GELU("tanh"), IMAGES),
    "GroupNorm": (lambda kind: kind.GroupNorm(2, 4), IMAGES),
    "GroupNorm, plain": (lambda kind: kind.GroupNorm(4, 4, affine=False), SEQUENCES),
    "InstanceNorm1d": (lambda kind: kind.InstanceNorm1d(4, affine=True), SEQUENCES),
    "InstanceNorm2d": (lambda kind: kind.InstanceNorm2d(4), IMAGES),
    "InstanceNorm3d": (lambda kind: kind.InstanceNorm3d(4), VOLUMES),
    "RMSNorm": (lambda kind: kind.RMSNorm((5, 6)), IMAGES),
    "RMSNorm, plain": (lambda kind: kind.RMSNorm(6, elementwise_affine=False), IMAGES),
    "ConvTranspose2d": (lambda kind: kind.ConvTranspose2d(4, 6, 4, 2, 1), IMAGES),
    "ConvTranspose2d, grouped": (lambda kind: kind.ConvTranspose2d(4, 6, (3, 2), 2, 0, 1, 2, False, 2), IMAGES),
    "Conv1d": (lambda kind: kind.Conv1d(4, 6, 3, 2, 1, 2, 2), SEQUENCES),
    "Conv1d, same": (lambda kind: kind.Conv1d(4, 6, 3, padding="same", bias=False), SEQUENCES),
    "Conv3d": (lambda kind: kind.Conv3d(4, 6, (3, 2, 1), 2, 1), VOLUMES),
    "Conv3d, dilated": (lambda kind: kind.Conv3d(4, 6, (3, 2, 2), 1, (2, 1, 0), (2, 1, 3), 2), VOLUMES),
    "MaxPool1d": (lambda kind: kind.MaxPool1d(3, 2, 1, ceil_mode=True), SEQUENCES),
    "AvgPool1d": (lambda kind: kind.AvgPool1d(3, 2, 1), SEQUENCES),
    "MaxPool3d": (lambda kind: kind.MaxPool3d((3, 2, 2), 2, 1), VOLUMES),
    "AvgPool3d": (lambda kind: kind.AvgPool3d(2, count_include_pad=False), VOLUMES),
    "Upsample": (lambda kind: kind.Upsample(scale_factor=2), IMAGES),
    "Upsample, bilinear": (lambda kind: kind.Upsample((7, 9), mode="bilinear"), IMAGES),
    "LSTM": (lambda kind: kind.LSTM(9, 3, 2, batch_first=True, bidirectional=True), SEQUENCES),
    "GRU": (lambda kind: kind.GRU(9, 3), SEQUENCES),
}


def _named_as_here(name: str) -> str:
    """PyTorch's ``weight_ih_l0_reverse`` is ``l0_reverse.ih.weight``."""
    if "_ih_l" not in name and "_hh_l" not in name:
        return name
    what, which, layer = name.split("_", 2)
    return f"{layer}.{which}.{what}"


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_pytorchs(name: str) -> None:
    """Values, and the gradients of input and parameters; PyTorch's weights are taken over under its own shapes."""
    torch = pytest.importorskip("torch")
    make, shape = LAYERS[name]
    ours, theirs = make(nn).to(np.float64), make(torch.nn).double()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.tensor(rng.standard_normal(parameter.shape)))
    ours.load_state_dict({_named_as_here(n): value.numpy() for n, value in theirs.state_dict().items()})
    values = rng.standard_normal(shape)
    x, t = Tensor(values, requires_grad=True), torch.tensor(values, requires_grad=True)
    y, expected = _first(ours(x)), _first(theirs(t))
    np.testing.assert_allclose(y.data, expected.detach().numpy(), rtol=1e-10, atol=1e-12)
    weights = rng.standard_normal(y.shape)
    (y * Tensor(weights)).sum().backward()
    (expected * torch.tensor(weights)).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, t.grad.numpy(), rtol=1e-9, atol=1e-11)
    own = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        grad = own[_named_as_here(key)].grad
        assert grad is not None
        np.testing.assert_allclose(grad.reshape(parameter.shape), parameter.grad.numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("arguments", "x", "macs"),
    [
        ((4, 6, 4, 2, 1), (2, 4, 8, 8), 49_152),
        ((4, 4, 3, 1, 0, 0, 4), (2, 4, 8, 8), 4_608),
        ((6, 6, 2, 1, 0, 0, 3), (2, 6, 8, 8), 6_144),
        ((32, 1, 3), (1, 32, 1, 1), 288),
    ],
)
def test_multiply_adds_of_transposed_convolutions(arguments: tuple[int, ...], x: tuple[int, ...], macs: int) -> None:
    """As public reports have them; each gradient takes as much as the forward pass, predicted and counted."""
    net = nn.Sequential(nn.ConvTranspose2d(*arguments), nn.Flatten(), nn.Linear(1, 2))
    records = lance_ref.trace(net[0], x)
    assert [record.op for record in records] == ["conv_transpose2d"]
    with lance_ref.count_macs() as counter:
        y = net[0](Tensor(np.ones(x, np.float32), requires_grad=True)).sum()
        y.backward()
    counted = counter.by_kind()
    assert (counted["forward"], counted["grad_input"], counted["grad_weight"]) == (macs, macs, macs)


def test_a_sequence_is_an_image_of_height_one() -> None:
    """LANCE finds its directions, compresses and trains; the layer's weight has a height of 1."""
    net = nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1, rng=0), nn.ReLU(inplace=True), nn.Conv1d(6, 4, 3, rng=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(40, 3, rng=2),
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((8, 2, 12)).astype(np.float32)
    tune(net, "last:1")
    compress(net, calibrate(net, [x], epsilon=0.8))
    report = tape(F.cross_entropy(net(x), np.arange(8) % 3))
    kept = [entry for entry in report.entries if entry.path == "2"]
    assert net[2].store.name == "lance"
    assert sum(entry.nbytes for entry in kept) < 8 * 6 * 12 * 4
    assert net[2].weight.shape == (4, 6, 1, 3)


def test_lists_and_dicts_register_their_modules() -> None:
    """A plain list would hide them."""
    net = nn.ModuleList([nn.Linear(2, 3), nn.ReLU()])
    net.append(nn.Linear(3, 4)).extend([nn.ReLU()])
    net[1] = nn.Tanh()
    assert [type(m).__name__ for m in net] == ["Linear", "Tanh", "Linear", "ReLU"]
    assert len(net) == 4
    assert [type(m).__name__ for m in net[-2:]] == ["Linear", "ReLU"]
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    table = nn.ModuleDict({"a": nn.Linear(2, 3)})
    table.update([("b", nn.ReLU())])
    assert (list(table), len(table), "b" in table, "c" in table) == (["a", "b"], 2, True, False)
    assert [type(m).__name__ for m in table.values()] == ["Linear", "ReLU"]
    assert list(dict(table.items())) == list(table.keys())
    for name in ("", "a.b", "items", "training"):
        with pytest.raises(KeyError, match="module name"):
            table[name] = nn.ReLU()
    with pytest.raises(NotImplementedError, match="ModuleList does not define forward"):
        net(np.ones((1, 2), np.float32))


def test_numpys_names_of_arguments() -> None:
    """``axis`` and ``keepdims``, as PyTorch takes them; both names of one argument are an error. ``view`` reshapes."""
    x = Tensor(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(x.mean(axis=1, keepdims=True).data, [[1.0], [4.0]])
    np.testing.assert_array_equal(F.softmax(x, axis=0).data, F.softmax(x, dim=0).data)
    np.testing.assert_array_equal(F.cat([x, x], axis=1).data, np.concatenate([x.data, x.data], 1))
    assert x.view(3, -1).shape == (3, 2)
    with pytest.raises(TypeError, match="sum: axis and dim are both given"):
        x.sum(dim=0, axis=0)


def test_a_table_of_vectors() -> None:
    """Rows by number; the row of the padding starts with zeros."""
    table = nn.Embedding(5, 3, padding_idx=-1, rng=0)
    y = table(np.array([[0, 4], [4, 2]]))
    assert y.shape == (2, 2, 3)
    np.testing.assert_array_equal(y.data[0, 1], np.zeros(3))
    y.sum().backward()
    assert table.weight.grad is not None
    np.testing.assert_array_equal(table.weight.grad.sum(axis=1), [3, 0, 3, 0, 0])
    with pytest.raises(ValueError, match=r"indices are from 0 to 5, expected rows in \[0, 5\)"):
        table(np.array([0, 5]))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "groups of GroupNorm": (lambda: nn.GroupNorm(3, 4), "num_groups is 3"),
    "running statistics": (lambda: nn.InstanceNorm2d(3, track_running_stats=True), "track_running_stats is True"),
    "output padding": (
        lambda: F.conv_transpose2d(np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)), output_padding=1),
        r"output_padding is \(1, 1\), expected less than stride",
    ),
    "channels of a transposed weight": (
        lambda: F.conv_transpose2d(np.ones((1, 2, 2, 2)), np.ones((3, 1, 2, 2))), r"expected \(2, C_out/groups"
    ),
    "a transposed convolution of nothing": (
        lambda: F.conv_transpose2d(np.ones((1, 1, 1, 1)), np.ones((1, 1, 1, 1)), padding=1), "output would be empty"
    ),
    "a volume": (lambda: F.conv3d(np.ones((1, 2, 3, 3)), np.ones((1, 2, 1, 1, 1))), "expected .B, C_in, D, H, W."),
    "a sequence": (lambda: nn.Conv1d(2, 3, 1)(np.ones((1, 2, 3, 4), np.float32)), r"expected 3 dimensions"),
    "mode": (lambda: F.interpolate(np.ones((1, 1, 2, 2)), 3, mode="bicubic"), "mode is 'bicubic'"),
    "size and scale": (lambda: F.interpolate(np.ones((1, 1, 2, 2)), 3, 2), "expected one of them"),
    "no places": (lambda: F.interpolate(np.ones((1, 1, 2, 2)), scale_factor=0.1), "expected sizes of at least 1"),
    "odd halves": (lambda: F.glu(np.ones((2, 3))), "expected an even size"),
    "slopes": (lambda: F.prelu(np.ones((2, 3)), np.ones(2)), r"weight has shape \(2,\), expected \(1,\) or \(3,\)"),
    "a row that sees nothing": (
        lambda: F.scaled_dot_product_attention(*[np.ones((2, 3, 4))] * 3, np.eye(3, dtype=bool) & False),
        "hides everything from a row",
    ),
    "two masks": (
        lambda: F.scaled_dot_product_attention(*[np.ones((2, 3, 4))] * 3, np.ones((3, 3)), is_causal=True),
        "both given",
    ),
    "one value in a group": (lambda: F.group_norm(np.ones((2, 3)), 3), "more than one value in each group"),
    "alpha": (lambda: F.elu(np.ones(3), -1), "alpha is -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_named(case: str) -> None:
    """What came, and what was expected."""
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        call()
