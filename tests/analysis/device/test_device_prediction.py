"""What a device step is predicted to take is what its arena has and what ran, to the byte and to the multiply-add."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device_nets import RandomGraph, case

from analysis.device.check import choices_of, differences, prediction_of, settings_of, step_trace
from analysis.device.choices import Choices, DeviceSettings
from analysis.device.operations import read
from analysis.device.predict import predict
from lance_ref import device, models, nn, tune
from lance_ref.algebra.subspace import Subspace
from lance_ref.functional import adaptive_avg_pool2d, flatten
from lance_ref.nn.tracing import trace

WAYS = [("lance", "subspace"), ("lance", "weight"), ("bp", "weight"), ("bias", "weight"), ("head", "weight")]


def settings(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "forward": ("auto", "factored", "merged")[rng.integers(3)],
        "update": ("batch", "image")[rng.integers(2)],
        "momentum": (0.0, 0.9)[rng.integers(2)],
    }


def image(program: device.Program, rng: np.random.Generator) -> np.ndarray:
    """One image, as bytes if the program reads these and a coin says so."""
    C, H, W = program.graph.shapes[0]
    if program.recipe.pixels is not None and rng.random() < 0.5:
        return rng.integers(0, 256, (1, H, W, C), dtype=np.uint8)
    return rng.normal(size=(1, C, H, W))


def squeezed(program: device.Program, rng: np.random.Generator, compiled: Any) -> device.Program:
    """The same step with a budget near the least that it can do with, so that other tiles are chosen."""
    try:
        return compiled(budget=int(program.ram_bytes * (1 + rng.random() / 2)))
    except device.BudgetError:
        return program


@pytest.mark.parametrize("first", range(0, 45, 5))
def test_random_nets_take_what_is_predicted(first: int) -> None:
    """More than 200 nets and settings, many of them in tiles."""
    for seed in range(first, first + 5):
        rng = np.random.default_rng(seed + 7)
        for method, train in WAYS:
            dtype = (np.float32, np.float64)[rng.integers(2)]
            net, shape, calibration, _, labels = case(seed, method, dtype)
            if method == "lance" and not calibration:
                continue
            rest = settings(rng)

            def compiled(**more: Any) -> device.Program:
                return device.compile(net, calibration, shape, method=method, train=train, **rest, **more)  # noqa: B023

            program = compiled()
            if rng.random() < 0.5:
                program = squeezed(program, rng, compiled)
            program.step(image(program, rng), labels[:1], 0.01)
            assert differences(program, prediction_of(program, net, shape)) == [], (seed, method, train, rest)


def directions(net: nn.Module, shape: tuple[int, ...], layers: Any, count: int) -> dict[str, Subspace]:
    rng = np.random.default_rng(0)
    inputs = {r.path: r.inputs[0].shape for r in trace(net, (1, *shape)) if r.path in layers}
    ranks = {path: (None, min(count, of[1]), *[None] * (len(of) - 2)) for path, of in inputs.items()}
    return {path: Subspace.random(inputs[path], ranks[path], rng) for path in inputs}


@pytest.mark.parametrize(
    ("name", "shape", "selection", "options"),
    [
        ("mcunet", (3, 128, 128), "last:4", {}),
        ("mobilenetv2", (3, 64, 48), "last:4", {"width": 0.35}),
        ("mobilenetv2", (3, 32, 64), "last:3", {"width": 0.5}),
        ("resnet8", (3, 32, 32), "last:4", {}),
        ("resnet8", (3, 32, 32), "all", {}),
        ("resnet18", (3, 32, 32), "last:2", {}),
        ("convnet", (3, 32, 32), "all", {}),
        ("mlp", (784,), "all", {}),
    ],
)
def test_named_nets_take_what_is_predicted(name: str, shape: Any, selection: str, options: dict[str, Any]) -> None:
    shape = models.NETS[name].input_shape if name in ("convnet", "mlp") else shape
    net = models.create(name, num_classes=10, rng=0, **options)
    program = device.compile(net, directions(net, shape, tune(net, selection).layers, 8), shape)
    x = np.zeros((1, *shape[1:], shape[0]), np.uint8) if len(shape) == 3 else np.zeros((1, *shape))
    program.step(x, np.array([0]), 0.01)
    assert differences(program, prediction_of(program, net, shape)) == []


def small() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, rng=0), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3, rng=0)
    )
    tune(net, "head")
    return net


def test_a_head_by_hand() -> None:
    """One segment: the image, channels of 4x4 and 1x1, the logits, the classifier's input and the classifier."""
    found = predict(step_trace(small(), (1, 4, 4)), DeviceSettings(), Choices((True, False)))
    assert found.live == (16 + 64 + 4 + 12 + 8 + 72, 12 + 12 + 8 + 72, 12 + 8 + 72, 72)
    assert found.ram == {"image": 16, "channels": 68, "maps": 12, "cores": 8, "head": 72}
    assert found.flash_bytes == 4 * (18 + 2 + 2)  # kernels, their biases, scale and shift of the pixels
    counts = {"forward": 18 * 16 + 6, "recomputed": 0, "projection": 0, "merge": 0, "grad_input": 0, "grad_weight": 6}
    assert found.macs == counts


def test_a_layer_in_the_subspace_by_hand() -> None:
    """A 1x1 convolution from 4 to 6 channels of 2x2 places, two directions, behind a convolution that trains too."""
    net = nn.Sequential(*(nn.Conv2d(4, n, 1, bias=False, rng=0) for n in (4, 6)), nn.Flatten(), nn.Linear(24, 2, rng=0))
    tune(net, "all")
    traced = step_trace(net, (4, 2, 2))
    ranks = {"0": (2, None, None), "1": (2, None, None)}
    factored = predict(traced, DeviceSettings(ranks), Choices((True, False, False))).macs
    assert factored["projection"] == 2 * (2 * 4 * 4)  # U^T x of both layers: 2 directions, 4 channels, 4 places
    assert factored["forward"] == 16 * 4 + 24 * 4 + 48 + (4 * 2 * 4) + (6 * 2 * 4)
    # The classifier's input; W_0^T g, D^T g and U (D^T g) of the second layer; nothing of the first.
    assert factored["grad_input"] == 48 + 24 * 4 + 6 * 2 * 4 + 2 * 4 * 4
    assert factored["grad_weight"] == 4 * 2 * 4 + 6 * 2 * 4 + 48
    merged = predict(traced, DeviceSettings(ranks), Choices((True, False, False), merged=frozenset("01"))).macs
    assert merged["merge"] == 4 * 4 * 2 + 2 * (6 * 4 * 2)  # the second one again in the backward pass
    assert merged["forward"] == 16 * 4 + 24 * 4 + 48


def test_choices_of_another_net_are_refused() -> None:
    with pytest.raises(ValueError, match="heads has 1 values, expected 2"):
        predict(step_trace(small(), (1, 4, 4)), DeviceSettings(), Choices((True,)))


def test_an_operation_that_no_device_has_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, rng=0), nn.GELU(), nn.Flatten(), nn.Linear(8, 3, rng=0))
    with pytest.raises(ValueError, match="'gelu' of layer '1'"):
        read(trace(net, (1, 1, 4, 4)))


def test_a_difference_names_both_numbers() -> None:
    net = small()
    program = device.compile(net, input_shape=(1, 4, 4), method="head")
    program.step(np.zeros((1, 1, 4, 4), np.float32), np.array([0]), 0.01)
    wrong = predict(step_trace(net, (1, 4, 4)), DeviceSettings(adds_up=False, pixels=False), choices_of(program))
    text = [str(difference) for difference in differences(program, wrong)]
    assert "RAM for head: predicted 36, measured 72" in text
    assert settings_of(program) == DeviceSettings(pixels=False)


class Twice(nn.Module):
    """Two branches that both read the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, rng=0), nn.Conv2d(8, 2, 3, stride=4, padding=1, rng=1))
        self.second = nn.Conv2d(3, 2, 3, stride=4, padding=1, rng=2)
        self.last = nn.Linear(2, 3, rng=3)

    def forward(self, x: Any) -> Any:
        return self.last(flatten(adaptive_avg_pool2d(self.first(x) + self.second(x), 1), 1))


@pytest.mark.parametrize("tiled", [1, 2])
def test_tiles_spare_an_image_that_is_read_later(tiled: int) -> None:
    from lance_ref.device.layout import Choice, lay_out

    net = Twice()
    whole = device.compile(net, input_shape=(3, 32, 32), method="head", budget="1MiB")
    layout = lay_out(whole.graph, whole.recipe, Choice(whole.layout.choice.heads, tiled, (2, 8)))
    layout.place()
    program = device.Program(whole.graph, whole.recipe, layout, "head", poison=True)
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(program.logits(x), whole.logits(x), rtol=1e-5)
    assert (layout.image.over is None) == (tiled == 1)
    program.step(x[:1], np.array([0]), 0.01)
    assert differences(program, prediction_of(program, net, (3, 32, 32))) == []


def test_flash_does_not_depend_on_values() -> None:
    """A fresh batch norm has means of zero, and still has a shift; floats need no scale of pixels."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, rng=0), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3, rng=0))
    tune(net, "all", parameters="bias")
    program = device.compile(net, input_shape=(1, 4, 4), method="bias")
    with_pixels = program.flash_bytes
    program.step(np.zeros((1, 1, 4, 4), np.float32), np.array([0]), 0.01)
    assert with_pixels - program.flash_bytes == 2 * 4
    assert differences(program, prediction_of(program, net, (1, 4, 4))) == []


def test_a_calibrated_classifier_counts_as_head() -> None:
    net = small()
    program = device.compile(net, directions(net, (1, 4, 4), ["4"], 1), (1, 4, 4))
    assert {array.kind for array in program.layout.arrays if "4." in array.name} == {"head"}


class Woven(nn.Module):
    """Maps that are read twice, a norm behind one of them, two sums in a row, and dilated kernels."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(4):
            setattr(self, f"conv{i}", nn.Conv2d(3, 3, 3, padding=2, dilation=2, rng=i))
        self.norm = nn.BatchNorm2d(3)
        self.last = nn.Linear(3, 3, rng=9)

    def forward(self, x: Any) -> Any:
        first = self.conv0(x)
        normed = self.norm(first) + first
        second = self.conv1(x)
        both = self.conv2(x) + normed
        again = self.conv3(both + second) + normed
        return self.last(flatten(adaptive_avg_pool2d(again, 1), 1))


@pytest.mark.parametrize("selection", ["head", "all"])
def test_maps_that_are_read_twice(selection: str) -> None:
    net = Woven()
    tune(net, selection)
    program = device.compile(net, input_shape=(3, 12, 12), budget="1MiB")
    program.step(np.zeros((1, 12, 12, 3), np.uint8), np.array([0]), 0.01)
    assert differences(program, prediction_of(program, net, (3, 12, 12))) == []


def test_tiles_of_dilated_kernels() -> None:
    from lance_ref.device.layout import Choice, lay_out

    net = nn.Sequential(
        *(nn.Conv2d(3, 3, 3, padding=2, dilation=2, rng=i) for i in range(2)), nn.Flatten(), nn.Linear(432, 3, rng=2)
    )
    whole = device.compile(net, input_shape=(3, 12, 12), method="head", budget="1MiB")
    layout = lay_out(whole.graph, whole.recipe, Choice(whole.layout.choice.heads, 1, (4, 6)))
    layout.place()
    program = device.Program(whole.graph, whole.recipe, layout, "head")
    program.step(np.zeros((1, 12, 12, 3), np.uint8), np.array([0]), 0.01)
    predicted = prediction_of(program, net, (3, 12, 12))
    assert differences(program, predicted) == []
    # The first convolution computes, for each row of tiles, 4 rows with a halo of 2 inside the map, and 2 x 8 columns.
    assert predicted.macs["recomputed"] == 81 * ((6 + 8 + 6) * (8 + 8) - 12 * 12)


def test_two_biases_of_the_same_channels_are_refused() -> None:
    """One of them would be lost when the norm is folded."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, rng=0), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3, rng=0))
    tune(net, "all")
    net.get_submodule("1").bias.requires_grad = True
    with pytest.raises(device.UnsupportedError, match=r"'1' trains its bias, and the layer before it trains '0\.bias'"):
        device.compile(net, input_shape=(1, 4, 4))


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_maps_in_any_order(first: int) -> None:
    """Maps that several operations read, and operations without effect on the output."""
    for seed in range(first, first + 10):
        net, rng = RandomGraph(seed), np.random.default_rng(seed)
        tune(net, ("head", "last:1", "all")[seed % 3])
        program = device.compile(net, input_shape=(2, 8, 9), update=("batch", "image")[seed % 2])
        program.step(image(program, rng), np.array([0]), 0.01)
        assert differences(program, prediction_of(program, net, (2, 8, 9))) == [], seed
