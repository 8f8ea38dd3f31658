"""Networks: the layers, names and sizes of the originals, and weights that recognise real pictures."""

from __future__ import annotations

import hashlib
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lance_ref import count_macs, datasets, models, nn, no_grad, trace
from lance_ref.models import pretrained
from lance_ref.models.mobilenetv2 import divisible
from lance_ref.nn import init

# torchvision's numbers of trainable parameters
PARAMETERS = {"mobilenetv2": 3_504_872, "resnet18": 11_689_512, "resnet34": 21_797_672}

# Published: inputs of the last n convolutions, float32, MiB, batch 64, 224x224; None = all of them
PAPER_MIB = {
    ("mobilenetv2", 2): 15.3125,
    ("mobilenetv2", 4): 28.7109375,
    ("mobilenetv2", None): 1732075520 / 2**20,
    ("resnet18", 2): 12.25,
    ("resnet18", 4): 30.625,
    ("resnet18", None): 532.875,
    ("resnet34", 2): 12.25,
    ("resnet34", 4): 24.5,
}


def on_shapes(name: str, **options: Any) -> nn.Module:
    with init.shapes_only():
        return models.create(name, **options)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_torchvisions(name: str) -> None:
    """A layer of another width, or with a bias, would be another network."""
    net = on_shapes(name)
    assert sum(p.size for p in net.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "last"), PAPER_MIB, ids=str)
def test_published_activation_sizes(name: str, last: int | None) -> None:
    """Another order, stride or width of the convolutions would miss the published table."""
    net = on_shapes(name)
    inputs = {r.path: r.inputs[0].nbytes for r in trace(net, (64, 3, 224, 224)) if r.op == "conv2d"}
    convolutions = [path for path, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    assert set(convolutions) == set(inputs)
    chosen = convolutions if last is None else convolutions[-last:]
    assert sum(inputs[path] for path in chosen) == PAPER_MIB[name, last] * 2**20


def test_mobilenetv2_names() -> None:
    """State dictionaries and selections would not carry over from torchvision."""
    net = on_shapes("mobilenetv2", num_classes=7)
    kinds = {path: type(module).__name__ for path, module in net.named_modules()}
    expected = {
        "features.0.0": "Conv2d",
        "features.0.1": "BatchNorm2d",
        "features.0.2": "ReLU6",
        "features.1.conv.0.0": "Conv2d",
        "features.1.conv.1": "Conv2d",
        "features.1.conv.2": "BatchNorm2d",
        "features.2.conv.0.0": "Conv2d",
        "features.2.conv.1.0": "Conv2d",
        "features.2.conv.1.2": "ReLU6",
        "features.2.conv.2": "Conv2d",
        "features.17.conv.3": "BatchNorm2d",
        "features.18.0": "Conv2d",
        "classifier.0": "Dropout",
        "classifier.1": "Linear",
    }
    assert {path: kinds[path] for path in expected} == expected
    shapes = {name: p.shape for name, p in net.named_parameters()}
    assert shapes["features.2.conv.1.0.weight"] == (96, 1, 3, 3)
    assert shapes["features.18.0.weight"] == (1280, 320, 1, 1)
    assert shapes["classifier.1.weight"] == (7, 1280)
    assert "features.0.0.bias" not in shapes
    additions = [r.path for r in trace(net, (1, 3, 64, 64)) if r.op == "add"]
    assert additions == [f"features.{i}" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]


def test_resnet_names() -> None:
    """As above, for ResNet: blocks, shortcuts and the order in which they run."""
    net = on_shapes("resnet18")
    paths = [path for path, _ in net.named_modules()]
    top = [path for path in paths if path and "." not in path]
    assert top == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    block = [path.removeprefix("layer4.0.") for path in paths if path.startswith("layer4.0.")]
    assert block == ["conv1", "bn1", "relu", "conv2", "bn2", "downsample", "downsample.0", "downsample.1"]
    assert "layer1.0.downsample" not in paths
    outputs = {r.path: r.output.shape for r in trace(net, (2, 3, 224, 224)) if r.op in ("conv2d", "max_pool2d")}
    assert outputs["maxpool"] == (2, 64, 56, 56)
    assert outputs["layer4.1.conv2"] == (2, 512, 7, 7)


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet18", "resnet34", "convnet", "mlp", "mcunet", "resnet8"])
def test_shapes_only_takes_no_memory(name: str) -> None:
    """A trace of a large network would cost its weights."""
    tracemalloc.start()
    try:
        net = on_shapes(name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(p.is_meta for p in net.parameters())
    assert peak < 1_500_000  # Python objects and batch-norm buffers; ResNet-34's weights are 87 MB


def test_width_scales_channels() -> None:
    """Widths are rounded to multiples of 8, never more than 10 % down; the last layer does not shrink."""
    net = on_shapes("mobilenetv2", width=0.35, num_classes=2)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    assert shapes["features.0.0.weight"] == (16, 3, 3, 3)
    assert shapes["features.17.conv.2.weight"][0] == 112
    assert shapes["features.18.0.weight"] == (1280, 112, 1, 1)
    assert [divisible(c) for c in (1, 12, 33.6, 44.8, 100)] == [8, 16, 32, 48, 104]


def test_padding_same_is_tensorflows() -> None:
    """Pretrained weights need zeros at the bottom and right only, where the stride is 2."""
    net = on_shapes("mobilenetv2", padding="same")
    paddings = {r.path: r.attributes["padding"] for r in trace(net, (1, 3, 224, 224)) if r.op == "conv2d"}
    assert paddings["features.0.0"] == ((0, 1), (0, 1))
    assert paddings["features.2.conv.1.0"] == ((0, 1), (0, 1))
    assert paddings["features.3.conv.1.0"] == ((1, 1), (1, 1))
    assert paddings["features.18.0"] == ((0, 0), (0, 0))
    assert trace(on_shapes("mobilenetv2"), (1, 3, 64, 64))[0].attributes["padding"] == ((1, 1), (1, 1))


def test_initial_weights_come_from_the_seed() -> None:
    """Two runs with one seed would differ, or two seeds agree."""
    for name, options in [("convnet", {}), ("mlp", {}), ("mobilenetv2", {"width": 0.1, "num_classes": 3})]:
        first, again, other = (models.create(name, rng=seed, **options).state_dict() for seed in (5, 5, 6))
        for key, array in first.items():
            np.testing.assert_array_equal(array, again[key])
        assert any((array != other[key]).any() for key, array in first.items())


def test_initial_scale_carries_through_a_frozen_network() -> None:
    """With batch norm frozen at its start (an identity) too small weights would give a signal of zero."""
    net = models.mobilenetv2(10, rng=0).eval()
    features = net.features._modules["0"]
    weight = net.features._modules["2"].conv._modules["1"]._modules["0"].weight.data  # depthwise (96, 1, 3, 3)
    assert features._modules["0"].weight.data.std() == pytest.approx(np.sqrt(2 / (32 * 9)), rel=0.1)
    assert weight.std() == pytest.approx(np.sqrt(2 / 9), rel=0.1)
    x = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
    with no_grad():
        out = net.features(x).data
    assert 1e-3 < out.std() < 1e3


def test_residual_addition_is_there() -> None:
    """Without the shortcut a block whose convolutions are zero would give zeros."""
    net = models.resnet18(num_classes=2, rng=0).eval()
    block = net.layer1._modules["0"]
    x = np.abs(np.random.default_rng(0).normal(size=(1, 64, 4, 4))).astype(np.float32)
    block.conv2.weight.data = np.zeros_like(block.conv2.weight.data)
    with no_grad():
        np.testing.assert_array_equal(block(x).data, x)


def test_convnet_multiply_adds() -> None:
    """The number in its documentation must be what runs."""
    net = models.convnet(rng=0)
    with count_macs() as counter, no_grad():
        net(np.zeros((1, 3, 8, 8), np.float32))
    assert counter.by_kind()["forward"] == 177_664


@pytest.mark.parametrize("size", [4, 8, 28, 32])
def test_convnet_takes_images_of_lessons(size: int) -> None:
    """Lessons use images from 8x8 to 32x32 and MNIST's 28x28."""
    assert trace(on_shapes("convnet", in_channels=1), (2, 1, size, size))[-1].output.shape == (2, 10)


def test_mlp_of_gpm() -> None:
    """784-100-100-10 without bias has 89,400 parameters; images are flattened."""
    net = models.mlp(bias=False, rng=0)
    assert sum(p.size for p in net.parameters()) == 784 * 100 + 100 * 100 + 100 * 10
    with no_grad():
        assert net(np.zeros((2, 1, 28, 28), np.float32)).shape == (2, 10)
    assert models.mlp(3, 5, hidden=(), rng=0).classifier.weight.shape == (3, 5)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("vgg", {}, "unknown model 'vgg', expected one of alexnet-cl, convnet, deit-small, deit-tiny, mcunet, mlp"),
    ("mobilenetv2", {"num_classes": 0}, "num_classes is 0"),
    ("resnet18", {"num_classes": -1}, "num_classes is -1"),
    ("resnet34", {"num_classes": 2.5}, "num_classes is 2.5"),
    ("mcunet", {"num_classes": 0}, "num_classes is 0"),
    ("resnet8", {"num_classes": "10"}, "num_classes is '10'"),
    ("mlp", {"num_classes": True}, "num_classes is True"),
    ("mlp", {"in_features": 0}, "in_features is 0"),
    ("mlp", {"hidden": (4, 0)}, r"hidden\[1\] is 0"),
    ("convnet", {"in_channels": 0}, "in_channels is 0"),
    ("convnet", {"channels": 0}, "channels is 0"),
    ("mobilenetv2", {"width": 0}, "width is 0"),
    ("mobilenetv2", {"width": float("nan")}, "width is nan"),
    ("mobilenetv2", {"dropout": 1.5}, "1.5"),
    ("mobilenetv2", {"padding": "reflect"}, "padding is 'reflect'"),
    ("mobilenetv2", {"pretrained": True, "padding": "symmetric"}, "padding is 'symmetric', but the pretrained"),
    ("mobilenetv2", {"pretrained": True, "width": 0.5}, "width is 0.5, but the pretrained"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=[case[2][:30] for case in BAD])
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    """An option out of range must be named, not fail inside a layer."""
    with pytest.raises(ValueError, match=message):
        models.create(name, **options)


def test_unknown_option_is_refused() -> None:
    """A misspelt option must not be ignored."""
    with pytest.raises(TypeError, match="num_class"):
        models.create("mlp", num_class=3)
    small = ["alexnet-cl", "convnet", "deit-small", "deit-tiny", "mcunet", "mlp", "mobilenetv2", "mobilenetv3-small"]
    assert models.names() == [*small, "resnet18", "resnet34", "resnet50", "resnet8"]


# ---- pretrained weights -------------------------------------------------------------------


def test_preprocess_by_hand() -> None:
    """Pixels scaled another way would be outside what the weights were trained on."""
    pixels = np.zeros((2, 4, 5, 3), np.uint8)
    pixels[1, 2, 3] = (0, 128, 255)
    x = models.preprocess(pixels)
    assert (x.shape, x.dtype) == ((2, 3, 4, 5), np.dtype(np.float32))
    assert x[1, :, 2, 3].tolist() == [-1.0, 0.0, 127 / 128]
    np.testing.assert_array_equal(models.preprocess(pixels.transpose(0, 3, 1, 2)), x)
    for bad in (pixels[..., :1], pixels.astype(np.float32), pixels[0]):
        with pytest.raises(ValueError, match="pixels has shape"):
            models.preprocess(bad)


def test_preprocessing_by_name() -> None:
    """Each net's weights were trained on another scale of pixels; the wrong one costs most of the accuracy."""
    pixels = np.zeros((1, 2, 1, 3), np.uint8)
    pixels[0, 1, 0] = (0, 51, 255)
    expected = {
        "mobilenetv2": [-1.0, (51 - 128) / 128, 127 / 128],
        "mcunet": [-1.0, (51 - 127.5) * 2 / 255, 1.0],
        "resnet8": [0.0, 51.0, 255.0],
        "resnet18": [0.0, 0.2, 1.0],
        "convnet": [0.0, 0.2, 1.0],
    }
    for name, values in expected.items():
        x = models.preprocessing(name)(pixels)
        assert (x.shape, x.dtype) == ((1, 3, 2, 1), np.dtype(np.float32))
        np.testing.assert_allclose(x[0, :, 1, 0], values, rtol=1e-6)
    assert set(models.PRETRAINED) <= set(expected)
    assert models.preprocessing("mlp")(pixels[..., :1]).shape == (1, 1, 2, 1)
    with pytest.raises(ValueError, match="pixels has shape"):
        models.preprocessing("mcunet")(pixels[..., :1])
    with pytest.raises(ValueError, match="unknown model 'vgg'"):
        models.preprocessing("vgg")


def codes() -> dict[str, np.ndarray]:
    """A file of weights with random codes, of the right names and shapes."""
    rng = np.random.default_rng(0)
    net = on_shapes("mobilenetv2", num_classes=1001)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    layers = [(theirs, shapes[f"{conv}.weight"]) for theirs, conv, _ in pretrained._convolutions()]
    arrays: dict[str, np.ndarray] = {}
    for path, shape in [*layers, ("classifier", (1001, 1280))]:
        arrays[f"{path}.weight"] = rng.integers(0, 256, shape, np.uint8)
        arrays[f"{path}.weight.scale"] = np.float32(0.01)
        arrays[f"{path}.weight.zero_point"] = np.uint8(120)
        arrays[f"{path}.bias"] = rng.normal(size=shape[0]).astype(np.float32)
    return arrays


def test_codes_become_weights_and_biases_become_batch_norm(tmp_path: Path) -> None:
    """A wrong zero point, layer or classifier row would give another network."""
    arrays = codes()
    np.savez(tmp_path / "w.npz", **arrays)
    net = models.mobilenetv2(1000, pretrained=tmp_path / "w.npz", rng=0)
    assert net.padding == "same"
    state = net.state_dict()
    np.testing.assert_array_equal(
        state["features.2.conv.1.0.weight"],
        (arrays["blocks.1.depthwise.weight"].astype(np.float32) - 120) * np.float32(0.01),
    )
    np.testing.assert_array_equal(state["features.1.conv.2.bias"], arrays["blocks.0.project.bias"])
    np.testing.assert_array_equal(state["classifier.1.bias"], arrays["classifier.bias"][1:])
    norm = net.features._modules["18"]._modules["1"].eval()
    x = np.random.default_rng(1).normal(size=(2, 1280, 1, 1)).astype(np.float32)
    with no_grad():
        np.testing.assert_allclose(norm(x).data, x + arrays["last_conv.bias"][:, None, None], rtol=1e-5, atol=1e-5)
    fresh = models.mobilenetv2(10, pretrained=tmp_path / "w.npz", rng=0).state_dict()
    untrained = models.mobilenetv2(10, rng=0).state_dict()
    np.testing.assert_array_equal(fresh["classifier.1.weight"], untrained["classifier.1.weight"])
    np.testing.assert_array_equal(fresh["features.18.0.weight"], state["features.18.0.weight"])
    full = models.mobilenetv2(1001, pretrained=tmp_path / "w.npz").state_dict()
    np.testing.assert_array_equal(full["classifier.1.weight"][1:], state["classifier.1.weight"])


def test_damaged_weights_are_refused_before_any_change(tmp_path: Path) -> None:
    """A file that fits in part would leave a net that is half pretrained."""
    good = codes()
    name = "blocks.3.expand"
    cases = [
        ({f"{name}.weight": None}, rf"'{name}\.weight' is missing"),
        ({f"{name}.weight": good[f"{name}.weight"][:-1]}, rf"'{name}\.weight' is \(143, 24, 1, 1\) uint8"),
        ({f"{name}.weight": good[f"{name}.weight"].astype(np.int16)}, "int16, expected"),
        ({f"{name}.weight.scale": np.float32(np.nan)}, "NaN"),
        ({f"{name}.weight.scale": np.float32(-1)}, "expected a positive number"),
        ({"classifier.bias": np.full(1001, np.inf, np.float32)}, "'classifier.bias' holds NaN"),
        ({"extra": np.zeros(2)}, "unexpected array 'extra'"),
    ]
    net = models.mobilenetv2(1000, padding="same", rng=0)
    before = net.state_dict()
    for number, (change, message) in enumerate(cases):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **{key: array for key, array in {**good, **change}.items() if array is not None})
        with pytest.raises(ValueError, match=message) as caught:
            pretrained.load_mobilenetv2(net, path)
        assert str(path) in str(caught.value)
    for key, array in net.state_dict().items():
        np.testing.assert_array_equal(array, before[key])


def test_missing_or_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not the pinned file must not pass for it."""
    monkeypatch.delenv("LANCE_REF_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"imagenet_mobilenet_v2_1\.0_224\.npz: .*LANCE_REF_DATA"):
        models.mobilenetv2(pretrained=True)
    with pytest.raises(FileNotFoundError, match="no such file of pretrained weights"):
        models.mobilenetv2(pretrained=tmp_path / "none.npz")
    monkeypatch.setenv("LANCE_REF_DATA", str(tmp_path))
    file = tmp_path / models.PRETRAINED["mobilenetv2"].file
    file.parent.mkdir()
    np.savez(file, **codes())
    with pytest.raises(ValueError, match="SHA-256 is"):
        models.mobilenetv2(pretrained=True)
    with init.shapes_only(), pytest.raises(ValueError, match="shapes only"):
        models.mobilenetv2(pretrained=file)


@pytest.fixture(scope="module")
def imagenet(data_dir: Path) -> nn.Module:
    """MobileNetV2 with its real weights and all 1001 outputs."""
    return models.mobilenetv2(1001, pretrained=data_dir / models.PRETRAINED["mobilenetv2"].file).eval()


def answers(net: nn.Module, data: datasets.Dataset) -> np.ndarray:
    """Most likely ImageNet class of each picture, (N,), in 0..999 (-1 for "background")."""
    with no_grad():
        outputs = [
            net(x).data
            for x, _ in datasets.batches(
                data, 4, shuffle=False, drop_last=False, normalise=models.preprocess, image_size=224
            )
        ]
    result: np.ndarray = np.concatenate(outputs).argmax(axis=1) - 1
    return result


DAISY = 985


def test_pretrained_recognises_daisies(imagenet: nn.Module, data_dir: Path) -> None:
    """Real weights, asymmetric padding and real pixels together: an ox-eye daisy is ImageNet's "daisy"."""
    flowers = datasets.load("flowers102", "test", data_dir=data_dir)
    daisies = flowers.subset(np.flatnonzero(flowers.labels == flowers.class_names.index("049")))
    assert len(daisies) == 10
    assert (answers(imagenet, daisies) == DAISY).mean() >= 0.7


ANIMALS = 398  # ImageNet classes 0..397 are animals


def test_pretrained_tells_animals_from_vehicles(imagenet: nn.Module, data_dir: Path) -> None:
    """CIFAR-10 (JPEG q75 copy) enlarged sevenfold: far above the 60 % of always answering "animal"."""
    data = datasets.load("cifar10", "test", limit=20, data_dir=data_dir)
    vehicles = [data.class_names.index(name) for name in ("airplane", "automobile", "ship", "truck")]
    is_animal = ~np.isin(data.labels, vehicles)
    assert ((answers(imagenet, data) < ANIMALS) == is_animal).mean() >= 0.8


def test_pinned_file_is_the_one_in_the_folder(data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pretrained=True must accept the real file, found through the environment."""
    info = models.PRETRAINED["mobilenetv2"]
    file = data_dir / info.file
    assert hashlib.sha256(file.read_bytes()).hexdigest() == info.sha256
    (tmp_path / "weights").mkdir()
    shutil.copy(file, tmp_path / info.file)
    monkeypatch.setenv("LANCE_REF_DATA", str(tmp_path))
    net = models.mobilenetv2(2, pretrained=True, rng=0)
    assert net.state_dict()["features.18.0.weight"].std() > 0
