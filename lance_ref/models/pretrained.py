"""Pretrained weights: where they are, and how each file's layout becomes a network's state."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from lance_ref import nn
from lance_ref.datasets.fetch import data_file
from lance_ref.engine.state import state
from lance_ref.io.npz import arrays_digest, load_npz
from lance_ref.models.register import find
from lance_ref.nn.module import Module

IMAGENET_OUTPUTS = 1001
"""Outputs of the pretrained classifier: "background", then the 1000 ImageNet classes."""

MAX_BYTES = 64 * 1024**2


def load_mobilenetv2(net: Module, path: str | os.PathLike[str] | None = None) -> None:
    """Put the pretrained weights into a MobileNetV2 of width 1.0; checks everything before any change.

    The net has ``padding="same"``; its classifier is loaded if it has 1001 outputs, or 1000 (without "background"), and
    left as it is otherwise. ``path`` is a file of the same layout, by default the pinned one of
    :data:`~lance_ref.models.PRETRAINED`.

    The file has batch norm folded into the weights. To keep the architecture that of a network trained from scratch,
    each batch norm becomes x ↦ x + b: weight 1, bias b, running mean 0 and running variance 1 − eps, so that (x − 0) /
    √(1 − eps + eps) = x up to rounding.
    """
    file, arrays = _read("mobilenetv2", path)
    try:
        new_state = _state_dict(net, arrays)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    net.load_state_dict(new_state)


def load_plain(net: Module, name: str, pretrained: bool | str | os.PathLike[str] | None = True) -> None:
    """Put weights into a net from a file whose arrays have the net's own names; checks everything first.

    Its last layer, ``classifier``, is loaded if it has as many outputs as the file's, and left as it is otherwise.
    ``name`` is one of :data:`~lance_ref.models.PRETRAINED`, whose pinned file True takes; a path is a file of the same
    layout, and False and None do nothing.

    Raises
    ------
    FileNotFoundError
        If the file is not there.
    ValueError
        If it is damaged, or is not the pinned file, or names, shapes or dtypes do not fit.
    """
    if pretrained is None or pretrained is False:
        return
    file, arrays = _read(name, None if pretrained is True else pretrained)
    result = net.state_dict()
    classifier = arrays.get("classifier.bias")
    outputs = len(result["classifier.bias"]) if classifier is None or classifier.ndim != 1 else len(classifier)
    try:
        for key, own in result.items():
            rows = (outputs,) if key.startswith("classifier.") else own.shape[:1]
            array = _checked(arrays, key, (*rows, *own.shape[1:]), np.float32)
            if array.shape == own.shape:
                result[key] = array
        _refuse_others(arrays, set(result))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    net.load_state_dict(result)


def _read(name: str, path: str | os.PathLike[str] | None) -> tuple[Path, dict[str, np.ndarray]]:
    """The file at ``path``, else the pinned file of that name with its checksum compared, and its arrays."""
    if state.shapes_only:
        raise ValueError("pretrained weights cannot be loaded into a net that has shapes only")
    if path is None:
        pinned = find(name).weights
        assert pinned is not None, f"{name} has no pretrained weights"
        file = data_file(pinned.file, f"{name}(pretrained=True)")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        # a file that `lance-ref weights` made of the original has other bytes around the same arrays
        if found != pinned.sha256 and _of_arrays(file) != pinned.arrays_sha256:
            raise ValueError(f"{file}: SHA-256 is {found}, expected {pinned.sha256}, and its arrays are others, too")
    else:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file of pretrained weights")
    return file, load_npz(file, max_bytes=MAX_BYTES)


def _of_arrays(file: Path) -> str:
    """The checksum of a file's arrays; "" if it holds none."""
    try:
        return arrays_digest(load_npz(file, max_bytes=MAX_BYTES))
    except ValueError:
        return ""


def _checked(arrays: dict[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """The array of that name; raises ValueError unless it has that shape and dtype and is finite."""
    if name not in arrays:
        raise ValueError(f"array {name!r} is missing")
    array = arrays[name]
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"array {name!r} is {array.shape} {array.dtype}, expected {shape} {np.dtype(dtype)}")
    if not np.isfinite(array).all():
        raise ValueError(f"array {name!r} holds NaN or infinite values")
    return array


def _refuse_others(arrays: dict[str, np.ndarray], used: set[str]) -> None:
    unexpected = sorted(set(arrays) - used)
    if unexpected:
        raise ValueError(f"unexpected array {unexpected[0]!r} (of {len(unexpected)})")


def _state_dict(net: Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's own state with the file's weights put in; raises ValueError if they do not fit."""
    result = net.state_dict()
    used: set[str] = set()
    for theirs, conv, norm in _convolutions():
        weight, bias = _dequantise(arrays, theirs, result[f"{conv}.weight"].shape, used)
        batch_norm = net.get_submodule(norm)
        assert isinstance(batch_norm, nn.BatchNorm2d)
        result[f"{conv}.weight"] = weight
        result[f"{norm}.weight"] = np.ones_like(bias)
        result[f"{norm}.bias"] = bias
        result[f"{norm}.running_mean"] = np.zeros_like(bias)
        result[f"{norm}.running_var"] = np.full_like(bias, 1 - batch_norm.eps)
    num_classes, features = result["classifier.1.weight"].shape
    weight, bias = _dequantise(arrays, "classifier", (IMAGENET_OUTPUTS, features), used)
    if num_classes in (IMAGENET_OUTPUTS, IMAGENET_OUTPUTS - 1):
        result["classifier.1.weight"] = weight[-num_classes:]  # (num_classes, 1280)
        result["classifier.1.bias"] = bias[-num_classes:]  # (num_classes,)
    _refuse_others(arrays, used)
    return result


def _convolutions() -> list[tuple[str, str, str]]:
    """(path in the file, path of the convolution, path of its batch norm), in the order of execution."""
    paths = [("first_conv", "features.0.0", "features.0.1")]
    for block in range(17):
        inside = f"features.{block + 1}.conv"
        offset = 0 if block == 0 else 1  # block 0 has no expansion
        if offset:
            paths.append((f"blocks.{block}.expand", f"{inside}.0.0", f"{inside}.0.1"))
        paths.append((f"blocks.{block}.depthwise", f"{inside}.{offset}.0", f"{inside}.{offset}.1"))
        paths.append((f"blocks.{block}.project", f"{inside}.{offset + 1}", f"{inside}.{offset + 2}"))
    paths.append(("last_conv", "features.18.0", "features.18.1"))
    return paths


def _dequantise(
    arrays: dict[str, np.ndarray], path: str, shape: tuple[int, ...], used: set[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(codes − zero point) · scale, of ``shape``, and the bias; both float32."""
    expected: dict[str, tuple[tuple[int, ...], type]] = {
        f"{path}.weight": (shape, np.uint8),
        f"{path}.weight.scale": ((), np.float32),
        f"{path}.weight.zero_point": ((), np.uint8),
        f"{path}.bias": (shape[:1], np.float32),
    }
    used.update(expected)
    codes, scale, zero_point, bias = (_checked(arrays, name, *wanted) for name, wanted in expected.items())
    if scale <= 0:
        raise ValueError(f"array '{path}.weight.scale' is {scale}, expected a positive number")
    return (codes.astype(np.float32) - np.float32(zero_point)) * scale, bias
