"""MCUNet: the published layout, and weights that give what an independent PyTorch net gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lance_ref import count_macs, datasets, models, nn, no_grad, trace
from lance_ref.models import pretrained
from lance_ref.nn import init

# in, expansion, out, stride, kernel, residual: typed anew from the published table
TABLE = """
16 1 8 1 3 no
8 4 16 2 3 no
16 3 16 1 3 yes
16 3 24 2 7 no
24 5 24 1 3 yes
24 5 40 2 3 no
40 4 40 1 7 yes
40 4 48 1 5 no
48 3 48 1 3 yes
48 4 48 1 3 yes
48 5 96 2 7 no
96 4 96 1 5 yes
96 4 96 1 5 yes
96 6 160 1 3 no
"""
ROWS = [(*map(int, line.split()[:5]), line.endswith("yes")) for line in TABLE.split("\n") if line]


def weights_file(data_dir: Path) -> Path:
    return data_dir / models.PRETRAINED["mcunet"].file


def test_layout_is_the_published_one() -> None:
    """A block of another width, kernel or stride, or a residual too many, would be another network."""
    with init.shapes_only():
        net = models.mcunet()
    assert sum(p.size for p in net.parameters()) == 630_224
    records = trace(net, (1, 3, 128, 128))
    convs = {r.path: r for r in records if r.op == "conv2d"}
    assert list(convs)[:3] == ["first_conv", "blocks.0.depthwise", "blocks.0.project"]
    for index, (C_in, ratio, C_out, stride, kernel, _) in enumerate(ROWS):
        path, hidden = f"blocks.{index}", C_in * ratio
        assert (f"{path}.expand" in convs) == (ratio != 1)
        depthwise, project = convs[f"{path}.depthwise"], convs[f"{path}.project"]
        assert depthwise.inputs[1].shape == (hidden, 1, kernel, kernel)
        assert depthwise.attributes["stride"] == (stride, stride)
        assert depthwise.attributes["padding"] == (((kernel - 1) // 2,) * 2,) * 2
        assert project.inputs[1].shape == (C_out, hidden, 1, 1)
    assert [r.path for r in records if r.op == "add"] == [f"blocks.{i}" for i, row in enumerate(ROWS) if row[5]]
    assert [r.path for r in records if r.op == "relu6"][:3] == ["relu6", "blocks.0.relu6", "blocks.1.relu6"]
    assert sum(r.op == "relu6" for r in records) == 1 + 14 + 13
    assert convs["blocks.13.project"].output.shape == (1, 160, 4, 4)


def test_multiply_adds_by_hand() -> None:
    """Two layers worked out on paper: the first convolution and the first depthwise one, at 32 pixels."""
    with init.shapes_only():
        net = models.mcunet(7)
    outputs = {r.path: r.output.shape for r in trace(net, (3, 3, 32, 32)) if r.op in ("conv2d", "linear")}
    assert outputs["first_conv"] == (3, 16, 16, 16)
    assert outputs["classifier"] == (3, 7)
    real = models.mcunet(7, rng=0)
    with count_macs() as counter, no_grad():
        nn.Sequential(real.first_conv, real.relu6, real.blocks[0].depthwise)(np.zeros((3, 3, 32, 32), np.float32))
    assert counter.by_kind()["forward"] == 3 * 16 * 16 * 16 * (3 * 9) + 3 * 16 * 16 * 16 * 9


def plain(classes: int = 1000) -> dict[str, np.ndarray]:
    """Random arrays of the names and shapes of the file."""
    with init.shapes_only():
        shapes = {name: p.shape for name, p in models.mcunet(classes).named_parameters()}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_file_is_loaded_by_name(tmp_path: Path) -> None:
    """An array in the wrong layer, or a classifier of the wrong kind, would go unnoticed."""
    arrays = plain()
    np.savez(tmp_path / "w.npz", **arrays)
    for key, array in models.mcunet(pretrained=tmp_path / "w.npz", rng=0).state_dict().items():
        np.testing.assert_array_equal(array, arrays[key])
    few, fresh = models.mcunet(10, pretrained=tmp_path / "w.npz", rng=0).state_dict(), models.mcunet(10, rng=0)
    np.testing.assert_array_equal(few["classifier.weight"], fresh.classifier.weight.data)
    np.testing.assert_array_equal(few["classifier.bias"], fresh.classifier.bias.data)
    np.testing.assert_array_equal(few["blocks.13.project.bias"], arrays["blocks.13.project.bias"])


def test_damaged_file_changes_nothing(tmp_path: Path) -> None:
    """A file that fits in part would leave a net that is half pretrained."""
    good = plain()
    name = "blocks.3.depthwise.weight"
    cases: list[tuple[dict[str, Any], str]] = [
        ({name: None}, rf"array '{name}' is missing"),
        ({name: good[name][..., :5, :5]}, r"is \(48, 1, 5, 5\) float32, expected \(48, 1, 7, 7\) float32"),
        ({name: good[name].astype(np.float64)}, "float64, expected"),
        ({name: np.full_like(good[name], np.nan)}, "NaN"),
        ({"classifier.bias": good["classifier.bias"][:900]}, "classifier"),
        ({"classifier.weight": good["classifier.weight"][:, :5]}, r"'classifier.weight' is \(1000, 5\)"),
        ({"classifier.bias": None}, "'classifier.bias' is missing"),
        ({"classifier.bias": np.float32(1)}, "'classifier.bias' is"),
        ({"extra": np.zeros(2)}, "unexpected array 'extra'"),
    ]
    net = models.mcunet(rng=0)
    before = net.state_dict()
    for number, (change, message) in enumerate(cases):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **{key: array for key, array in {**good, **change}.items() if array is not None})
        with pytest.raises(ValueError, match=message) as caught:
            pretrained.load_plain(net, "mcunet", path)
        assert str(path) in str(caught.value)
    for key, array in net.state_dict().items():
        np.testing.assert_array_equal(array, before[key])


def test_missing_or_other_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not the pinned file must not pass for it."""
    monkeypatch.delenv("LANCE_REF_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"imagenet_mcunet_5fps\.npz: .*LANCE_REF_DATA"):
        models.mcunet(pretrained=True)
    monkeypatch.setenv("LANCE_REF_DATA", str(tmp_path))
    file = weights_file(tmp_path)
    file.parent.mkdir()
    np.savez(file, **plain())
    with pytest.raises(ValueError, match="SHA-256 is"):
        models.mcunet(pretrained=True)
    with init.shapes_only(), pytest.raises(ValueError, match="shapes only"):
        models.mcunet(pretrained=file)


# ---- the real weights ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(data_dir: Path) -> nn.Module:
    """MCUNet with its real weights, found by name and checksum, and all 1000 outputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANCE_REF_DATA", str(data_dir))
        return models.create("mcunet", pretrained=True, rng=0).eval()


def flowers(data_dir: Path, label: str, limit: int) -> np.ndarray:
    """Real pictures of one class, (limit, 3, 128, 128), ready for the net."""
    data = datasets.load("flowers102", "test", data_dir=data_dir)
    chosen = np.flatnonzero(data.labels == data.class_names.index(label))[:limit]
    return models.preprocessing("mcunet")(data.images[chosen])


def torch_logits(arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The same network written down with PyTorch's functions, from the file and the table above alone."""
    torch = pytest.importorskip("torch")
    conv, relu6 = torch.nn.functional.conv2d, torch.nn.functional.relu6
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def layer(x: Any, path: str, stride: int = 1) -> Any:
        weight = weights[f"{path}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return conv(x, weight, weights[f"{path}.bias"], stride, (weight.shape[2] - 1) // 2, groups=groups)

    h = relu6(layer(torch.from_numpy(x), "first_conv", 2))
    for index, (_, ratio, _, stride, _, residual) in enumerate(ROWS):
        inner = h if ratio == 1 else relu6(layer(h, f"blocks.{index}.expand"))
        inner = relu6(layer(inner, f"blocks.{index}.depthwise", stride))
        inner = layer(inner, f"blocks.{index}.project")
        h = h + inner if residual else inner
    result: np.ndarray = (h.mean((2, 3)) @ weights["classifier.weight"].T + weights["classifier.bias"]).numpy()
    return result


def test_logits_are_pytorchs(imagenet: nn.Module, data_dir: Path) -> None:
    """Any layer, padding or activation in the wrong place would move the logits of real pictures."""
    x = flowers(data_dir, "049", 4)
    with np.load(weights_file(data_dir)) as file:
        arrays = dict(file)
    with no_grad():
        logits = imagenet(x).data
    expected = torch_logits(arrays, x)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    swapped = {**arrays, "blocks.8.expand.bias": arrays["blocks.8.expand.bias"][::-1].copy()}
    assert np.abs(torch_logits(swapped, x) - expected).max() > 0.1


GOLDEN_ARGMAX = 810
GOLDEN = [-3.62131, 0.21114, -7.89095, -3.85416, 4.35855]
GOLDEN_NORM = 167.09016


def test_golden_logits(imagenet: nn.Module) -> None:
    """The same without PyTorch: logits of a fixed picture, whose figures PyTorch's net gave."""
    row, column, channel = np.ogrid[:128, :128, :3]
    pixels = ((3 * row + 5 * column + 80 * channel) % 256).astype(np.uint8)[None]  # (1, 128, 128, 3)
    with no_grad():
        logits = imagenet(models.preprocessing("mcunet")(pixels)).data[0]
    assert int(logits.argmax()) == GOLDEN_ARGMAX
    np.testing.assert_allclose(logits[[0, 1, 500, 985, 999]], GOLDEN, atol=1e-3)
    assert float(np.linalg.norm(logits)) == pytest.approx(GOLDEN_NORM, rel=1e-4)


DAISY = 985


def test_daisies_are_daisies(imagenet: nn.Module, data_dir: Path) -> None:
    """Real weights on real pixels: an ox-eye daisy is ImageNet's "daisy", and is not with the wrong scale."""
    x = flowers(data_dir, "049", 10)
    with no_grad():
        right, wrong = ((imagenet(pixels).data.argmax(axis=1) == DAISY).mean() for pixels in (x, 127.5 * (x + 1)))
    assert right >= 0.7
    assert wrong <= 0.3
