"""The tensors of an ONNX file: shapes at once, values only when asked for and only from where they may come."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from analysis.commands.names import shown


@dataclass(frozen=True)
class Constant:
    """A tensor that the file contains."""

    shape: tuple[int, ...]
    dtype: np.dtype  #: Of the stored values; types that NumPy lacks (bfloat16) under their extension type.
    load: Callable[[], np.ndarray]  #: Gives the values.

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def is_floating(self) -> bool:
        return self.dtype.kind not in "iub"  # bfloat16 and its like are of kind "V"


def text(value: str | bytes) -> str:
    """A string of the file; protobuf gives what is no UTF-8 as bytes."""
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


def refuse(path: Path, why: str) -> NoReturn:
    raise ValueError(f"{shown(path)} {why}")


def read_constant(path: Path, tensor: Any) -> Constant:
    """A tensor's shape and type; its values must be there in full, or in a file that may be read."""
    import onnx

    shape = tuple(tensor.dims)
    if any(n < 0 for n in shape):
        refuse(path, f"contains tensor {shown(tensor.name)} of shape {shape}")
    if tensor.data_type == onnx.TensorProto.STRING:
        refuse(path, f"contains tensor {shown(tensor.name)} of strings")
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, TypeError):
        refuse(path, f"contains tensor {shown(tensor.name)} of unknown type {tensor.data_type}")
    constant = Constant(shape, dtype, lambda: _values(path, tensor))
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _external(path, tensor, constant)
    elif (
        tensor.HasField("raw_data") and dtype.kind in "iufb" and len(tensor.raw_data) != constant.size * dtype.itemsize
    ):
        refuse(
            path,
            f"contains tensor {shown(tensor.name)} of shape {shape} with {len(tensor.raw_data)} bytes, "
            f"expected {constant.size * dtype.itemsize}",
        )
    elif not tensor.HasField("raw_data") and constant.size > tensor.ByteSize() * 8:  # repeated numbers, or four bits
        refuse(path, f"contains tensor {shown(tensor.name)} of shape {shape} without its values")
    return constant


def _values(path: Path, tensor: Any) -> np.ndarray:
    import onnx

    whole = tensor
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        where, offset, length = _external(path, tensor, None)
        if not where.is_file():
            refuse(path, f"has the values of {shown(tensor.name)} in {shown(where.name)}, which does not exist")
        with open(where, "rb") as stream:
            stream.seek(offset)
            whole = onnx.TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=stream.read(length))
    try:
        return np.asarray(onnx.numpy_helper.to_array(whole))
    except (ValueError, TypeError) as error:
        refuse(path, f"contains tensor {shown(tensor.name)} whose values do not fit its shape: {error}")


def _external(path: Path, tensor: Any, constant: Constant | None) -> tuple[Path, int, int]:
    """File, offset and length of values outside; refused unless the file is in the model's folder."""
    entries = {text(entry.key): text(entry.value) for entry in tensor.external_data}
    location = entries.get("location", "")
    numbers = [entries.get(key, "0") for key in ("offset", "length")]
    if not location or "\0" in location or not all(re.fullmatch("[0-9]{1,18}", n) for n in numbers):
        refuse(path, f"has the values of {shown(tensor.name)} at {shown(entries)}, expected a file, offset and length")
    folder = path.parent.resolve()
    where = (folder / location).resolve()  # of a link: where it leads
    if Path(location).is_absolute() or not where.is_relative_to(folder):
        refuse(path, f"has the values of {shown(tensor.name)} in {shown(location)}, outside its folder: refused")
    offset, length = map(int, numbers)
    if constant is not None:
        expected = constant.size * constant.dtype.itemsize
        length = length or expected
        if constant.dtype.kind in "iufb" and length != expected:
            refuse(path, f"has {length} bytes for {shown(tensor.name)}, expected {expected}")
        if where.exists() and (not where.is_file() or where.stat().st_size < offset + length):
            refuse(path, f"has the values of {shown(tensor.name)} in {shown(location)}, which ends before them")
    return where, offset, length or -1
