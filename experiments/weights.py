"""Make the files of pretrained weights from the files that their authors publish: ``python -m experiments.weights``.

The committed tables were measured with these arrays. Each original file becomes a ``.npz`` file of the same arrays, and
a checksum says whether they are the same to the bit. Put into the folder ``weights`` of the folder that
``LANCE_REF_DATA`` names, it is what ``pretrained=True`` reads.

    lance-ref weights mcunet mcunet-5fps.pkl
    lance-ref weights mobilenetv2 mobilenet_v2_1.0_224_quant.tflite
    lance-ref weights resnet8 pretrainedResnet.h5
"""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.commands import cli, command_line, names
from experiments import frame
from lance_ref import models
from lance_ref.io.npz import arrays_digest, save_npz
from lance_ref.io.tflite import Convolution, convolutions

Arrays = dict[str, np.ndarray]

SOURCES = {
    "mcunet": "algorithm/assets/mcu_models/mcunet-5fps.pkl of github.com/mit-han-lab/tiny-training; takes PyTorch",
    "mobilenetv2": "mobilenet_v2_1.0_224_quant.tflite of github.com/google-coral/test_data; takes no other package",
    "resnet8": "pretrainedResnet.h5 below benchmark/training/image_classification of github.com/mlcommons/tiny; takes "
    "h5py",
    "mobilenetv2-torchvision": "mobilenet_v2-*.pth of torchvision; takes PyTorch; no table was measured with it",
}  # fmt: skip
"""The originals by net, and what reading them takes."""


# ---- from what the files hold to our arrays ----------------------------------------------------


def mcunet(config: Mapping[str, Any]) -> Arrays:
    """Arrays from the description of an 8-bit net: weight = code · channel scale, bias = code · input scale · scale."""
    found: Arrays = {}

    def add(path: str, conv: Mapping[str, Any]) -> None:
        parts = {name: np.asarray(value) for name, value in conv["params"].items()}
        scales = parts["w_scales"].astype(np.float64).reshape(-1)  # (C_out,)
        weight = parts["weight"].astype(np.float64) * scales[:, None, None, None]  # (C_out, C_in/groups, k_h, k_w)
        found[f"{path}.weight"] = (weight[:, :, 0, 0] if path == "classifier" else weight).astype(np.float32)
        scale = float(parts["x_scale"].reshape(-1)[0])
        found[f"{path}.bias"] = (parts["bias"].astype(np.float64).reshape(-1) * scale * scales).astype(np.float32)

    add("first_conv", config["first_conv"])
    for n, block in enumerate(config["blocks"]):
        for ours, theirs in (("expand", "pointwise1"), ("depthwise", "depthwise"), ("project", "pointwise2")):
            if block.get(theirs) is not None:
                add(f"blocks.{n}.{ours}", block[theirs])
    add("classifier", config["classifier"])
    return found


def mobilenetv2(layers: Sequence[Convolution]) -> Arrays:
    """Arrays from the 53 convolutions of the TFLite file: 8-bit codes with a scale and a zero point for each tensor."""
    blocks = [f"blocks.{n}.{part}" for n in range(17) for part in ("expand", "depthwise", "project")]
    paths = ["first_conv", *(path for path in blocks if path != "blocks.0.expand"), "last_conv", "classifier"]
    if len(layers) != len(paths):
        raise ValueError(f"the file has {len(layers)} convolutions, expected {len(paths)}")
    found: Arrays = {}
    for path, layer in zip(paths, layers, strict=True):
        codes, bias = layer.weight, layer.bias
        if codes.scale is None or codes.zero_point is None or bias.scale is None or codes.values.dtype != np.uint8:
            raise ValueError(f"{path}: weight {codes.values.dtype}, expected 8-bit codes with a scale for each tensor")
        axes = (3, 0, 1, 2) if layer.kind == "depthwise" else (0, 3, 1, 2)
        weight = codes.values.transpose(axes)  # (C_out, C_in/groups, k_h, k_w)
        found[f"{path}.weight"] = np.ascontiguousarray(weight[:, :, 0, 0] if path == "classifier" else weight)
        found[f"{path}.weight.scale"] = np.asarray(codes.scale[0], np.float32)
        found[f"{path}.weight.zero_point"] = np.asarray(codes.zero_point[0], np.uint8)
        found[f"{path}.bias"] = (bias.values.astype(np.float64) * float(bias.scale[0])).astype(np.float32)
    return found


NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def resnet8(stored: Mapping[str, np.ndarray]) -> Arrays:
    """Arrays from those of the Keras file, ``layer/…/name:0``: layers in the order of the numbers in their names."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    for path, array in stored.items():
        parts = path.removesuffix(":0").split("/")
        layers.setdefault(parts[-2], {})[parts[-1]] = np.asarray(array, np.float32)

    def named(kind: str) -> list[dict[str, np.ndarray]]:
        numbers = {name: re.fullmatch(rf"{kind}(?:_(\d+))?", name) for name in layers}
        return [layers[name] for name in sorted(layers, key=lambda n: _number(numbers[n])) if numbers[name]]

    convs, norms, (dense, *_) = named("conv2d"), named("batch_normalization"), named("dense") or [{}]
    large = [conv for conv in convs if conv["kernel"].shape[:2] == (3, 3)]
    small = [conv for conv in convs if conv["kernel"].shape[:2] == (1, 1)]
    if (len(large), len(small), len(norms), bool(dense)) != (7, 2, 7, True):
        raise ValueError(
            f"the file has {len(large)} convolutions of 3x3, {len(small)} of 1x1, {len(norms)} batch norms and "
            f"{int(bool(dense))} dense layer, expected 7, 2, 7 and 1"
        )
    found: Arrays = {}

    def add(path: str, conv: dict[str, np.ndarray], norm: str | None = None) -> None:
        found[f"{path}.weight"] = np.ascontiguousarray(conv["kernel"].transpose(3, 2, 0, 1))  # from (k_h, k_w, C, C')
        found[f"{path}.bias"] = conv["bias"]
        if norm is not None:
            found.update({f"{norm}.{ours}": norms[0][theirs] for theirs, ours in NORM.items()})
            norms.pop(0)

    add("stem.conv", large.pop(0), "stem.bn")
    for n in range(3):
        add(f"stacks.{n}.conv1", large.pop(0), f"stacks.{n}.bn1")
        add(f"stacks.{n}.conv2", large.pop(0), f"stacks.{n}.bn2")
        if n:
            add(f"stacks.{n}.shortcut", small.pop(0))
    found["classifier.weight"], found["classifier.bias"] = np.ascontiguousarray(dense["kernel"].T), dense["bias"]
    return found


def _number(match: re.Match[str] | None) -> int:
    return int(match[1] or 0) if match else -1


def torchvision(state: Mapping[str, Any]) -> Arrays:
    """The arrays of torchvision's MobileNetV2, which have our names; counters of batches are left out."""
    found = {name: np.asarray(value) for name, value in state.items() if not name.endswith("num_batches_tracked")}
    expected = models.mobilenetv2(num_classes=len(found.get("classifier.1.bias", [0]))).state_dict()
    wrong = [name for name in expected if name not in found or found[name].shape != expected[name].shape]
    wrong += [name for name in found if name not in expected]
    if wrong:
        raise ValueError(f"array {wrong[0]!r} (of {len(wrong)}) is missing, has another shape, or has no counterpart")
    return {name: found[name].astype(np.float32) for name in expected}


# ---- reading the files ---------------------------------------------------------------------------


def load_torch(path: str) -> Any:
    """What ``torch.save`` wrote: tensors and arrays alone, nothing that runs."""
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path} is a file of PyTorch, which is not installed: python -m pip install torch") from None
    # what arrays and numbers of NumPy name in a pickle, of a version before 2.0 too
    named: dict[str, Any] = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    allowed: list[Any] = [
        (function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name, function in named.items()
    ]
    allowed += [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("i1", "u1", "i4", "i8", "f4", "f8"))]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: holds more than arrays, or is damaged: {str(error).splitlines()[0]}") from None


def load_keras(path: str) -> Arrays:
    """All arrays of an HDF5 file by their paths."""
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path} is an HDF5 file, which takes h5py: python -m pip install h5py") from None
    found: Arrays = {}
    with h5py.File(path, "r") as file:
        group = file.get("model_weights", file)
        group.visititems(lambda name, of: found.update({name: of[()]}) if isinstance(of, h5py.Dataset) else None)
    return found


READERS: dict[str, tuple[Callable[[str], Any], Callable[[Any], Arrays]]] = {
    "mcunet": (load_torch, mcunet),
    "mobilenetv2": (convolutions, mobilenetv2),
    "resnet8": (load_keras, resnet8),
    "mobilenetv2-torchvision": (load_torch, torchvision),
}
"""For each net, the function that reads the original file, and the one that makes our arrays of it."""


def converted(net: str, path: str) -> Arrays:
    """Our arrays from the original file of a net.

    Raises
    ------
    ValueError
        In one line that names the file: a package is missing, the file is damaged, or it holds other layers.
    """
    read, arrange = READERS[net]
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; the original is {SOURCES[net]}")
    content = read(path)
    try:
        return arrange(content)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: is not {SOURCES[net]}: {names.one_line(error)}") from None


def verdict(net: str, arrays: Arrays) -> tuple[bool, str]:
    """Whether these may be the arrays of the committed tables, and the words for it."""
    known = models.PRETRAINED.get(net)
    if known is None:
        return True, "No committed table was measured with these arrays."
    digest = arrays_digest(arrays)
    if digest == known.arrays_sha256:
        return True, "They are those of the committed tables, to the bit."
    return False, (
        "They are NOT those of the committed tables: pretrained=True refuses the file, and pretrained='FILE' takes it. "
        f"Their checksum is {digest}, expected {known.arrays_sha256}."
    )


def parser() -> argparse.ArgumentParser:
    p = frame.parser("experiments.weights", __doc__, epilog=command_line.listing("original files", SOURCES))
    p.add_argument("net", choices=list(READERS), help="the net whose weights these are")
    p.add_argument("file", help="the original file, see below")
    p.add_argument("--output", type=cli.any_file, help="the .npz file to write (the name that the library looks for)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 1 if the arrays are not those of the committed tables."""
    return command_line.run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    known = models.PRETRAINED.get(options.net)
    output = options.output or (Path(known.file).name if known else f"{options.net}.npz")
    cli.check_writable(output)
    arrays = converted(options.net, options.file)
    save_npz(output, arrays)
    numbers = sum(array.size for array in arrays.values())
    same, said = verdict(options.net, arrays)
    print(f"{output}: {len(arrays)} arrays, {numbers:,} numbers. {said}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
