"""Original files of published weights become our arrays: synthetic files of the same layout, compared to the bit."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import weights
from lance_ref import models
from lance_ref.io import tflite
from lance_ref.io.npz import arrays_digest, load_npz

Write = Callable[[bytearray], None]

# ---- a TFLite file --------------------------------------------------------------------------------


def table(*fields: tuple[str, Any] | Write | None) -> Write:
    """A table: each field a (format, number), something written behind it, or left out."""

    def write(out: bytearray) -> None:
        vtable = len(out)
        sizes = [0 if f is None else struct.calcsize(f[0]) if isinstance(f, tuple) else 4 for f in fields]
        offsets = [4 + sum(sizes[:i]) if size else 0 for i, size in enumerate(sizes)]
        out += struct.pack("<HH", 4 + 2 * len(fields), 4 + sum(sizes))
        out += struct.pack(f"<{len(fields)}H", *offsets)
        at = len(out)
        out += struct.pack("<i", at - vtable) + bytes(sum(sizes))
        for field, offset in zip(fields, offsets, strict=True):
            if isinstance(field, tuple):
                struct.pack_into(field[0], out, at + offset, field[1])
            elif field is not None:
                point(out, at + offset, field)

    return write


def point(out: bytearray, place: int, content: Write) -> None:
    """Write something at the end, and how far it is at a place."""
    start = len(out) if getattr(content, "is_vector", False) else None
    before = len(out)
    content(out)
    if start is None:  # a table begins behind its table of offsets
        size = struct.unpack_from("<H", out, before)[0]
        start = before + size
    struct.pack_into("<I", out, place, start - place)


def vector(content: np.ndarray | list[Write]) -> Write:
    """Numbers, or tables one after the other."""

    def write(out: bytearray) -> None:
        out += struct.pack("<I", len(content))
        if isinstance(content, np.ndarray):
            out += content.tobytes()
            return
        first = len(out)
        out += bytes(4 * len(content))
        for i, each in enumerate(content):
            point(out, first + 4 * i, each)

    write.is_vector = True  # type: ignore[attr-defined]
    return write


def tflite_file(layers: list[tuple[str, np.ndarray, float, int, np.ndarray, float]]) -> bytes:
    """Convolutions (kind, weight, scale, zero point, bias, scale) as the format has them, an addition between."""
    buffers, tensors, operators = [table()], [table(vector(np.array([1], "<i4")))], []

    def tensor(array: np.ndarray, kind: int, scale: float, zero: int) -> int:
        buffers.append(table(vector(np.frombuffer(array.tobytes(), "u1"))))
        quantised = table(None, None, vector(np.array([scale], "<f4")), vector(np.array([zero], "<i8")))
        name = vector(np.frombuffer(b"a name", "u1"))
        shape = vector(np.array(array.shape, "<i4"))
        tensors.append(table(shape, ("<b", kind), ("<I", len(buffers) - 1), name, quantised))
        return len(tensors) - 1

    for kind, weight, scale, zero, bias, bias_scale in layers:
        inputs = [0, tensor(weight, 3, scale, zero), tensor(bias, 2, bias_scale, 0)]
        operators.append(table(("<I", {"conv": 1, "depthwise": 2}[kind]), vector(np.array(inputs, "<i4"))))
        operators.append(table(None, vector(np.array([0, 0], "<i4"))))
    codes = [table(("<b", code)) for code in (0, 3, 4)]
    graph = table(vector(tensors), None, None, vector(operators))
    out = bytearray(b"\0\0\0\0TFL3")
    point(out, 0, table(("<I", 3), vector(codes), vector([graph]), None, vector(buffers)))
    return bytes(out)


LAYERS: list[tuple[str, np.ndarray, float, int, np.ndarray, float]] = [
    ("conv", np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 2), 0.5, 7, np.array([4, -6], "<i4"), 0.25),
    ("depthwise", np.arange(9 * 4, dtype=np.uint8).reshape(1, 3, 3, 4), 0.125, 1, np.array([1, 2, 3, 4], "<i4"), 1.0),
]


def test_convolutions_of_a_tflite_file(tmp_path: Path) -> None:
    """Kinds, codes, scales, zero points and biases in the order of the operations; others are passed over."""
    (tmp_path / "n.tflite").write_bytes(tflite_file(LAYERS))
    found = tflite.convolutions(tmp_path / "n.tflite")
    assert [layer.kind for layer in found] == ["conv", "depthwise"]
    for layer, (_, weight, scale, zero, bias, bias_scale) in zip(found, LAYERS, strict=True):
        np.testing.assert_array_equal(layer.weight.values, weight)
        np.testing.assert_array_equal(layer.bias.values, bias)
        assert layer.weight.scale is not None
        assert layer.bias.scale is not None
        assert layer.weight.zero_point is not None
        assert (layer.weight.scale.tolist(), layer.weight.zero_point.tolist()) == ([scale], [zero])
        assert layer.bias.scale.tolist() == [bias_scale]
        assert layer.weight.name == "a name"


@pytest.mark.parametrize("cut", [0, 7, 8, 40, 200, -1])
def test_a_tflite_file_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    """One line that names the file; nothing is read beyond its end."""
    (tmp_path / "n.tflite").write_bytes(tflite_file(LAYERS)[:cut])
    with pytest.raises(ValueError, match=r"n\.tflite: no TFLite file") as error:
        tflite.convolutions(tmp_path / "n.tflite")
    assert "\n" not in str(error.value)


def test_no_byte_of_a_tflite_file_leads_out_of_it(tmp_path: Path) -> None:
    """Any byte changed: convolutions or a ValueError, never another error."""
    sound = tflite_file(LAYERS)
    path = tmp_path / "n.tflite"
    for place in range(len(sound)):
        for value in (0, 255):
            path.write_bytes(sound[:place] + bytes([value]) + sound[place + 1 :])
            with suppress(ValueError):  # any other error fails the test
                tflite.convolutions(path)


# ---- the three nets --------------------------------------------------------------------------------


def mobilenetv2_layers(seed: int = 0) -> list[tuple[str, np.ndarray, float, int, np.ndarray, float]]:
    """53 convolutions of MobileNetV2's shapes."""
    rng = np.random.default_rng(seed)
    made = []
    net = models.mobilenetv2(1001).state_dict()
    for name, weight in net.items():
        if not name.endswith("weight") or weight.ndim not in (2, 4):
            continue
        shape = weight.shape if weight.ndim == 4 else (*weight.shape, 1, 1)
        depthwise = shape[1] == 1 and shape[2] == 3
        theirs = (1, *shape[2:], shape[0]) if depthwise else (shape[0], *shape[2:], shape[1])
        codes = rng.integers(0, 256, theirs, dtype=np.uint8)
        bias = rng.integers(-9999, 9999, shape[0]).astype("<i4")
        made.append(("depthwise" if depthwise else "conv", codes, 0.01, 128, bias, 0.001))
    return made


def test_mobilenetv2_from_its_tflite_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that is written is one that the net loads; codes stand in PyTorch's layout."""
    layers = mobilenetv2_layers()
    (tmp_path / "m.tflite").write_bytes(tflite_file(layers))
    output = tmp_path / "m.npz"
    assert weights.main(["mobilenetv2", str(tmp_path / "m.tflite"), "--output", str(output)]) == 1
    assert "NOT those of the committed tables" in capsys.readouterr().out
    arrays = load_npz(output)
    np.testing.assert_array_equal(arrays["first_conv.weight"], layers[0][1].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(arrays["blocks.0.depthwise.weight"], layers[1][1].transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(arrays["classifier.weight"], layers[-1][1][:, 0, 0])
    np.testing.assert_allclose(arrays["last_conv.bias"], layers[-2][4] * 0.001, rtol=1e-6)
    net = models.mobilenetv2(1001, pretrained=output)
    first = net.get_submodule("features.0.0").weight.data
    np.testing.assert_allclose(first, (arrays["first_conv.weight"].astype(np.float32) - 128) * np.float32(0.01))


def mcunet_config() -> dict[str, Any]:
    """A description of MCUNet as its authors' program writes it, with a scale for each channel."""
    rng = np.random.default_rng(1)
    net = models.mcunet(1000).state_dict()

    def conv(path: str) -> dict[str, Any]:
        shape = net[f"{path}.weight"].shape
        shape = shape if len(shape) == 4 else (*shape, 1, 1)
        params = {
            "weight": rng.integers(-127, 128, shape).astype(np.int8),
            "bias": rng.integers(-5000, 5000, shape[0]).astype(np.int32),
            "w_scales": rng.uniform(0.001, 0.01, shape[0]),
            "x_scale": np.float64(0.0235),
            "x_zero": np.int64(0),
        }
        return {"in_channel": shape[1], "kernel_size": shape[2], "params": params}

    blocks = []
    for n in range(14):
        names = {"pointwise1": "expand", "depthwise": "depthwise", "pointwise2": "project"}
        block: dict[str, Any] = {
            theirs: conv(f"blocks.{n}.{ours}") if f"blocks.{n}.{ours}.weight" in net else None
            for theirs, ours in names.items()
        }
        blocks.append({**block, "residual": None})
    return {"first_conv": conv("first_conv"), "blocks": blocks, "feature_mix": None, "classifier": conv("classifier")}


def test_mcunet_from_its_pickle(tmp_path: Path) -> None:
    """Opened with arrays alone; weight = code · scale of its channel, bias = code · input scale · scale."""
    torch = pytest.importorskip("torch")
    config = mcunet_config()
    torch.save(config, tmp_path / "mcunet.pkl")
    output = tmp_path / "m.npz"
    assert weights.main(["mcunet", str(tmp_path / "mcunet.pkl"), "--output", str(output)]) == 1
    arrays = load_npz(output)
    params = config["blocks"][3]["depthwise"]["params"]
    expected = params["weight"] * params["w_scales"][:, None, None, None]
    np.testing.assert_array_equal(arrays["blocks.3.depthwise.weight"], expected.astype(np.float32))
    np.testing.assert_allclose(
        arrays["blocks.3.depthwise.bias"], params["bias"] * 0.0235 * params["w_scales"], rtol=1e-6
    )
    net = models.mcunet(1000, pretrained=output)
    np.testing.assert_array_equal(net.get_submodule("classifier").weight.data, arrays["classifier.weight"])


def keras_arrays(arrays: dict[str, np.ndarray], first: int = 0) -> dict[str, np.ndarray]:
    """Our arrays of ResNet-8 under the names that Keras gives layers in the order in which they are made."""
    convs = ["stem.conv"]
    for n in range(3):
        convs += [f"stacks.{n}.conv1", f"stacks.{n}.conv2", *([f"stacks.{n}.shortcut"] if n else [])]
    norms = ["stem.bn", *(f"stacks.{n}.bn{i}" for n in range(3) for i in (1, 2))]
    made = {}
    for kind, paths in (("conv2d", convs), ("batch_normalization", norms)):
        for number, path in enumerate(paths, first):
            layer = f"{kind}_{number}" if number else kind
            if kind == "conv2d":
                made[f"{layer}/{layer}/kernel:0"] = arrays[f"{path}.weight"].transpose(2, 3, 1, 0)
                made[f"{layer}/{layer}/bias:0"] = arrays[f"{path}.bias"]
            else:
                for theirs, ours in weights.NORM.items():
                    made[f"{layer}/{layer}/{theirs}:0"] = arrays[f"{path}.{ours}"]
    made["dense/dense/kernel:0"] = arrays["classifier.weight"].T
    made["dense/dense/bias:0"] = arrays["classifier.bias"]
    return dict(sorted(made.items()))  # as HDF5 lists them: conv2d_10 before conv2d_2


@pytest.mark.parametrize("first", [0, 9])
def test_resnet8_from_keras_arrays(first: int) -> None:
    """Layers in the order of their numbers, wherever they begin; kernels in PyTorch's layout."""
    rng = np.random.default_rng(2)
    ours = {name: rng.normal(size=a.shape).astype(np.float32) for name, a in models.resnet8(10).state_dict().items()}
    found = weights.resnet8(keras_arrays(ours, first))
    assert set(found) == set(ours)
    for name, array in ours.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_the_shipped_resnet8_again(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the shipped arrays to Keras's file and back: the same to the bit."""
    h5py = pytest.importorskip("h5py")
    shipped = load_npz(data_dir / "weights" / "mlperf_tiny_resnet8.npz")
    with h5py.File(tmp_path / "r.h5", "w") as file:
        for name, array in keras_arrays(shipped).items():
            file[f"model_weights/{name}"] = array
    assert weights.main(["resnet8", str(tmp_path / "r.h5"), "--output", str(tmp_path / "r.npz")]) == 0
    assert "those of the committed tables, to the bit" in capsys.readouterr().out


def test_other_bytes_around_the_same_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was made again is taken by pretrained=True; one with a changed number is not."""
    arrays = models.resnet8(10, rng=5).state_dict()
    spec = models.find("resnet8")
    assert spec.weights is not None
    file = tmp_path / spec.weights.file
    file.parent.mkdir()
    np.savez(file, **arrays)
    pinned = replace(
        spec.weights, sha256=hashlib.sha256(file.read_bytes()).hexdigest(), arrays_sha256=arrays_digest(arrays)
    )
    monkeypatch.setitem(models.NETS, "resnet8", replace(spec, weights=pinned))
    monkeypatch.setenv("LANCE_REF_DATA", str(tmp_path))
    models.resnet8(10, pretrained=True)
    np.savez_compressed(file, **dict(reversed(arrays.items())))
    net = models.resnet8(10, pretrained=True)
    np.testing.assert_array_equal(net.get_submodule("classifier").weight.data, arrays["classifier.weight"])
    arrays["classifier.bias"][0] += 1
    np.savez_compressed(file, **arrays)
    with pytest.raises(ValueError, match="SHA-256 is"):
        models.resnet8(10, pretrained=True)


def test_torchvisions_arrays_have_our_names(tmp_path: Path) -> None:
    """A state dict of torchvision's layout is loaded whole; what is missing is named."""
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(a) for name, a in models.mobilenetv2(7).state_dict().items()}
    state["features.0.1.num_batches_tracked"] = torch.tensor(3)
    torch.save(state, tmp_path / "tv.pth")
    assert weights.main(["mobilenetv2-torchvision", str(tmp_path / "tv.pth"), "--output", str(tmp_path / "t.npz")]) == 0
    models.mobilenetv2(7).load_state_dict(load_npz(tmp_path / "t.npz"))
    del state["features.3.conv.1.0.weight"]
    torch.save(state, tmp_path / "tv.pth")
    with pytest.raises(ValueError, match=r"array 'features\.3\.conv\.1\.0\.weight'"):
        weights.converted("mobilenetv2-torchvision", str(tmp_path / "tv.pth"))


class Runs:
    """What a pickle would run if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


def test_a_file_that_would_run_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, and nothing of it runs."""
    pytest.importorskip("torch")
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(Runs(), 2))
    with pytest.raises(SystemExit):
        weights.main(["mcunet", str(tmp_path / "m.pkl"), "--output", str(tmp_path / "m.npz")])
    said = capsys.readouterr()
    assert "it ran" not in said.out + said.err
    assert "holds more than arrays, or is damaged" in said.err
    assert not (tmp_path / "m.npz").exists()


@pytest.mark.parametrize("net", weights.READERS)
def test_a_missing_file_says_where_the_original_is(net: str) -> None:
    """Repository and file, and what reading it takes."""
    with pytest.raises(ValueError, match="no such file; the original is ") as error:
        weights.converted(net, "nowhere")
    assert weights.SOURCES[net] in str(error.value)


def test_other_layers_are_refused(tmp_path: Path) -> None:
    """A TFLite file of another net."""
    (tmp_path / "n.tflite").write_bytes(tflite_file(LAYERS))
    with pytest.raises(ValueError, match="has 2 convolutions, expected 53"):
        weights.converted("mobilenetv2", str(tmp_path / "n.tflite"))
