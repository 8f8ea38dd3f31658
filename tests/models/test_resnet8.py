"""ResNet-8 of MLPerf Tiny: its layout, and the accuracy that its weights have on real pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lance_ref import datasets, models, nn, no_grad, trace
from lance_ref.models import pretrained
from lance_ref.nn import init


def test_layout() -> None:
    """Another width, padding or shortcut would be another network."""
    with init.shapes_only():
        net = models.resnet8()
    numbers = sum(p.size for p in net.parameters()) + sum(array.size for _, array in net.named_buffers())
    assert numbers == 78_666
    records = trace(net, (2, 3, 32, 32))
    convs = {r.path: r for r in records if r.op == "conv2d"}
    assert next(iter(convs)) == "stem.conv"
    assert {path for path in convs if path.endswith("shortcut")} == {"stacks.1.shortcut", "stacks.2.shortcut"}
    assert convs["stacks.0.conv1"].attributes["padding"] == ((1, 1), (1, 1))
    assert convs["stacks.1.conv1"].attributes["padding"] == ((0, 1), (0, 1))  # TensorFlow's at stride 2
    assert convs["stacks.2.shortcut"].attributes["padding"] == ((0, 0), (0, 0))
    assert convs["stacks.2.conv2"].output.shape == (2, 64, 8, 8)
    assert all(module.eps == 1e-3 for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    assert [r.path for r in records if r.op == "add"] == ["stacks.0", "stacks.1", "stacks.2"]


def test_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without the running statistics would leave those of a fresh net beside trained weights."""
    state = models.resnet8(rng=0).state_dict()
    np.savez(tmp_path / "good.npz", **state)
    np.savez(tmp_path / "bad.npz", **{key: a for key, a in state.items() if key != "stacks.1.bn2.running_var"})
    np.savez(tmp_path / "other.npz", **{**state, "stem.conv.bias": np.zeros(17, np.float32)})
    for name, message in [("bad", "'stacks.1.bn2.running_var' is missing"), ("other", r"\(17,\) float32, expected")]:
        net = models.resnet8(rng=1)
        before = net.state_dict()
        with pytest.raises(ValueError, match=rf"{name}\.npz: array .*{message}"):
            pretrained.load_plain(net, "resnet8", tmp_path / f"{name}.npz")
        for key, array in net.state_dict().items():
            np.testing.assert_array_equal(array, before[key])
    loaded = models.resnet8(pretrained=tmp_path / "good.npz", rng=1).state_dict()
    np.testing.assert_array_equal(loaded["classifier.weight"], state["classifier.weight"])
    three = models.resnet8(3, pretrained=tmp_path / "good.npz", rng=1).state_dict()
    np.testing.assert_array_equal(three["classifier.weight"], models.resnet8(3, rng=1).classifier.weight.data)
    np.testing.assert_array_equal(three["stem.bn.running_mean"], state["stem.bn.running_mean"])
    monkeypatch.setenv("LANCE_REF_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"mlperf_tiny_resnet8\.npz: put it at"):
        models.resnet8(pretrained=True)


# ---- the real weights ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data_dir: Path) -> nn.Module:
    """ResNet-8 with its real weights, found by name and checksum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANCE_REF_DATA", str(data_dir))
        return models.create("resnet8", pretrained=True, rng=0).eval()


@pytest.fixture(scope="module")
def pictures(data_dir: Path) -> datasets.Dataset:
    """The first 50 test images of each class."""
    return datasets.load("cifar10", "test", limit=500, data_dir=data_dir)


def correct(net: nn.Module, data: datasets.Dataset, normalise: Any) -> int:
    run = datasets.batches(data, 250, shuffle=False, normalise=normalise)
    with no_grad():
        return sum(int((net(x).data.argmax(axis=1) == y).sum()) for x, y in run)


def test_accuracy_on_real_pictures(trained: nn.Module, pictures: datasets.Dataset) -> None:
    """376 of these 500 are right (7,548 of all 10,000): one layer, padding or scale off and it is less.

    The closest two answers of any of these images are 0.008 apart, far more than float32's rounding.
    """
    assert correct(trained, pictures, models.preprocessing("resnet8")) == 376
    assert correct(trained, pictures, None) < 150  # pixels scaled to 0..1


def test_logits_are_pytorchs(trained: nn.Module, pictures: datasets.Dataset, data_dir: Path) -> None:
    """The same network with PyTorch's functions, from the file alone."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    with np.load(data_dir / models.PRETRAINED["resnet8"].file) as file:
        weights = {name: torch.from_numpy(array) for name, array in file.items()}

    def conv(x: Any, path: str, stride: int = 1) -> Any:
        kernel = weights[f"{path}.weight"].shape[2]
        total = kernel - stride if kernel > stride else 0  # on an even input
        x = functional.pad(x, (total // 2, total - total // 2) * 2)
        return functional.conv2d(x, weights[f"{path}.weight"], weights[f"{path}.bias"], stride)

    def norm(x: Any, path: str) -> Any:
        names = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(weights[f"{path}.{name}"] for name in names), eps=1e-3)

    x = models.preprocessing("resnet8")(pictures.images[::100])
    h = torch.relu(norm(conv(torch.from_numpy(x), "stem.conv"), "stem.bn"))
    for index, stride in enumerate((1, 2, 2)):
        path = f"stacks.{index}"
        inner = torch.relu(norm(conv(h, f"{path}.conv1", stride), f"{path}.bn1"))
        inner = norm(conv(inner, f"{path}.conv2"), f"{path}.bn2")
        h = torch.relu(inner + (conv(h, f"{path}.shortcut", stride) if stride == 2 else h))
    expected = h.mean((2, 3)) @ weights["classifier.weight"].T + weights["classifier.bias"]
    with no_grad():
        np.testing.assert_allclose(trained(x).data, expected.numpy(), rtol=1e-4, atol=1e-4)
