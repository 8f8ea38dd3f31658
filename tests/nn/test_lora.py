"""LoRA: the mathematics of its docstring, what it trains, and what it keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import check_vjp
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_ref import F, Tensor, nn, tape, trace, tune
from lance_ref.models import create
from lance_ref.nn.init import shapes_only
from lance_ref.nn.lora import LoRAConv2d, LoRALinear, add_lora, merge_lora, put_back

Layer = LoRALinear | LoRAConv2d


def filled(layer: Layer, seed: int = 0) -> Layer:
    """The same layer with a B that is not zero."""
    rng = np.random.default_rng(seed)
    layer.up.weight.data = rng.standard_normal(layer.up.weight.shape).astype(layer.weight.dtype)
    return layer


@given(st.data())
@settings(max_examples=30)
def test_equals_the_merged_linear_layer(data: st.DataObject) -> None:
    """W + (α/r)·BA in one plain layer gives the same output, for any sizes, rank and α."""
    n_in, n_out, rank = (data.draw(st.integers(1, 6)) for _ in range(3))
    alpha = data.draw(st.sampled_from([None, 1.0, 7.5]))
    base = nn.Linear(n_in, n_out, bias=data.draw(st.booleans()), rng=1).to(np.float64)
    layer = filled(LoRALinear(base, rank, alpha, rng=2))
    x = np.random.default_rng(3).standard_normal((4, 3, n_in))
    np.testing.assert_allclose(layer.merged()(x).data, layer(x).data, rtol=1e-12, atol=1e-12)
    scale = (rank if alpha is None else alpha) / rank
    W = base.weight.data + scale * layer.up.weight.data @ layer.down.weight.data
    np.testing.assert_allclose(layer.merged().weight.data, W, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_the_merged_convolution(dtype: Any) -> None:
    """With stride and padding the low-rank path sees the same places as the weight."""
    layer = filled(LoRAConv2d(nn.Conv2d(5, 4, 1, stride=2, padding=1, rng=0).to(dtype), 2, 3.0, rng=1))
    x = np.random.default_rng(3).standard_normal((2, 5, 5, 6)).astype(dtype)
    assert layer(x).data.dtype == dtype
    np.testing.assert_allclose(layer.merged()(x).data, layer(x).data, rtol=1e-4 if dtype == np.float32 else 1e-12)


def test_starts_as_the_layer_it_adapts() -> None:
    """B = 0: the first output is that of the base layer, bit by bit."""
    base = nn.Linear(6, 5, rng=0)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    before = base(x).data.copy()
    np.testing.assert_array_equal(LoRALinear(base, 3, rng=1)(x).data, before)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_gradients_by_differences(alpha: float | None) -> None:
    """dx, dA and dB of both layers against central differences."""
    rng = np.random.default_rng(0)
    linear = LoRALinear(nn.Linear(4, 3, rng=0).to(np.float64), 2, alpha, rng=1)
    conv = LoRAConv2d(nn.Conv2d(4, 3, 1, stride=2, rng=0).to(np.float64), 2, alpha, rng=1)
    cases: list[tuple[Layer, tuple[int, ...], tuple[int, ...]]] = [
        (linear, (3, 4), ()),
        (conv, (2, 4, 3, 5), (1, 1)),
    ]
    for layer, shape, kernel in cases:

        def run(x: Tensor, A: Tensor, B: Tensor, layer: Layer = layer) -> Tensor:
            product = F.linear if isinstance(layer, LoRALinear) else F.conv2d
            stride = {} if isinstance(layer, LoRALinear) else {"stride": layer.stride}
            low = product(x, A, **stride)
            return product(x, layer.weight, layer.bias, **stride) + product(low, B) * layer.scale

        x, A, B = (rng.standard_normal(s) for s in (shape, (2, 4, *kernel), (3, 2, *kernel)))
        check_vjp(run, x, A, B)
        layer.down.weight.data, layer.up.weight.data = A, B
        leaf = Tensor(x.copy(), requires_grad=True)
        tensors = [Tensor(a.copy(), requires_grad=True) for a in (x, A, B)]
        G = rng.standard_normal(layer(leaf).shape)
        layer(leaf).backward(G)
        run(*tensors).backward(G)
        for ours, theirs in zip((leaf, layer.down.weight, layer.up.weight), tensors, strict=True):
            np.testing.assert_allclose(ours.grad, theirs.grad, rtol=1e-12)
        assert layer.weight.grad is None
        assert layer.bias is not None
        assert layer.bias.grad is None


def test_what_is_kept() -> None:
    """x once (8·6 numbers) and A x (8·2); a frozen x leaves just as much, and nothing is kept for the weight."""
    layer = LoRALinear(nn.Linear(6, 5, rng=0), 2, rng=1)
    x = np.ones((8, 6), np.float32)
    for requires_grad in (False, True):
        report = tape(layer(Tensor(x, requires_grad=requires_grad)).sum())
        assert report.total_bytes == (8 * 6 + 8 * 2) * 4
        assert {entry.what for entry in report.entries if entry.nbytes} == {"activation"}


def test_a_frozen_layer_keeps_nothing_of_its_input() -> None:
    """With the low-rank path frozen too, the layer keeps its weights alone, as any frozen layer."""
    layer = LoRALinear(nn.Linear(6, 5, rng=0), 2, rng=1)
    layer.requires_grad_(False)
    assert tape(layer(Tensor(np.ones((8, 6), np.float32), requires_grad=True)).sum()).total_bytes == 0


def test_in_a_network() -> None:
    """Paths and order stay; the updates alone train; a step moves the output; merging changes nothing."""
    net = create("mlp", in_features=6, hidden=(5, 4), num_classes=3, rng=0)
    tune(net, "head")
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    before = net(x).data.copy()
    replaced = add_lora(net, ["features.0", "features.2"], rank=2, rng=0)
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert trained == [
        *(f"features.{i}.{part}.weight" for i in (0, 2) for part in ("down", "up")),
        "classifier.weight",
        "classifier.bias",
    ]
    np.testing.assert_array_equal(net(x).data, before)
    assert [r.path for r in trace(net, (4, 6)) if r.path.startswith("features.0")] == [
        "features.0", "features.0.down", "features.0.up", "features.0.sum",
    ]  # fmt: skip
    filled(net.get_submodule("features.0"))
    moved = net(x).data.copy()
    assert np.abs(moved - before).max() > 1e-3
    merge_lora(net)
    assert type(net.get_submodule("features.0")) is nn.Linear
    np.testing.assert_allclose(net(x).data, moved, rtol=1e-4, atol=1e-6)
    add_again = create("mlp", in_features=6, hidden=(5, 4), num_classes=3, rng=0)
    kept = add_lora(add_again, ["features.0"], rank=1)
    put_back(add_again, kept)
    np.testing.assert_array_equal(add_again(x).data, before)
    assert [r.path for r in trace(add_again, (4, 6))] == [r.path for r in trace(create("mlp", in_features=6), (4, 6))]
    assert set(replaced) == {"features.0", "features.2"}


def test_learns_and_the_weight_stays() -> None:
    """A few steps of gradient descent on A and B alone lower the loss; W does not move."""
    rng = np.random.default_rng(0)
    layer = LoRALinear(nn.Linear(6, 3, rng=0), 2, rng=1)
    W = layer.weight.data.copy()
    x, y = rng.standard_normal((64, 6)).astype(np.float32), rng.integers(0, 3, 64)
    losses = []
    for _ in range(30):
        layer.zero_grad()
        loss = F.cross_entropy(layer(x), Tensor(y))
        loss.backward()
        losses.append(float(loss.data))
        for part in (layer.down, layer.up):
            part.weight.data = part.weight.data - np.float32(0.5) * part.weight.grad
    assert losses[-1] < losses[0] - 0.05
    np.testing.assert_array_equal(layer.weight.data, W)


def test_a_layer_used_twice_is_adapted_in_both_places() -> None:
    """One module under two names stays one module."""
    shared = nn.Linear(4, 4, rng=0)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2, rng=1))
    add_lora(net, ["0"], rank=1)
    assert net[0] is net[2]
    assert isinstance(net[0], LoRALinear)


def test_shapes_alone() -> None:
    """A net without weights gets updates without weights."""
    with shapes_only():
        net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, 2))
    add_lora(net, ["0"], rank=2)
    assert net[0].down.weight.is_meta
    assert trace(net, (4, 3, 1, 1))[-1].output.shape == (4, 2)


@pytest.mark.parametrize(
    ("layers", "rank", "named"),
    [
        (["1"], 2, "'1', a ReLU"),
        (["0"], 2, "'0', a Conv2d"),
        (["2"], 0, "rank is 0"),
        (["9"], 2, "'9', no module"),
    ],
)
def test_bad_arguments_change_nothing(layers: list[str], rank: int, named: str) -> None:
    """Said in one line, and the net is as it was: a 3x3 convolution, no layer, no such path, no rank."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, rng=0), nn.ReLU(), nn.Conv2d(4, 4, 1, rng=0))
    with pytest.raises(ValueError, match=named):
        add_lora(net, ["2", *layers] if layers != ["2"] else layers, rank)
    assert [type(module) for module in net] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_grouped_convolutions_and_bad_alphas_are_refused() -> None:
    """Groups would need an update of their own each."""
    with pytest.raises(ValueError, match="2 groups"):
        LoRAConv2d(nn.Conv2d(4, 4, 1, groups=2, rng=0), 1)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha is"):
            LoRALinear(nn.Linear(3, 3, rng=0), 1, alpha)
    with pytest.raises(TypeError, match="base is a ReLU"):
        LoRALinear(nn.ReLU(), 1)  # type: ignore[arg-type]
