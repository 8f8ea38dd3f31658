"""Reading the weights of a TFLite file: convolutions in the order in which they run, without TensorFlow.

A ``.tflite`` file is a FlatBuffer: tables whose fields are found through a table of offsets. Only the fields that lead
to the weights of convolutions are read, and every place is compared with the file's length before it is read.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import numpy as np

from lance_ref.io.opening import open_regular

MAX_BYTES = 2**28
MAGIC = b"TFL3"
CONVOLUTIONS = {3: "conv", 4: "depthwise"}
"""The kinds of operations that are read, by their number in the format."""
DTYPES = {0: np.float32, 2: np.int32, 3: np.uint8, 9: np.int8}


@dataclass(frozen=True)
class Stored:
    """A tensor with a value: codes or numbers, and the scale and zero point of codes (None without)."""

    name: str
    values: np.ndarray
    scale: np.ndarray | None
    zero_point: np.ndarray | None


@dataclass(frozen=True)
class Convolution:
    """One convolution: ``kind`` is "conv", weight (C_out, k_h, k_w, C_in), or "depthwise", weight (1, k_h, k_w, C)."""

    kind: str
    weight: Stored
    bias: Stored


def convolutions(path: str | os.PathLike[str]) -> list[Convolution]:
    """All convolutions of the first graph of a TFLite file, in the order of its operations.

    Raises
    ------
    ValueError
        In one line that names the file: it is no TFLite file, larger than :data:`MAX_BYTES`, or damaged.
    OSError
        If it cannot be opened.
    """
    with open_regular(path, MAX_BYTES) as file:
        data = file.read()
    try:
        if data[4:8] != MAGIC:
            raise ValueError("its bytes 4 to 7 are not TFL3")
        model = _Table(data, _number(data, "<I", 0))
        codes = [max(code.number(0, "<b"), code.number(3, "<i")) for code in model.tables(1)]
        graph = model.tables(2)[0]
        tensors, buffers = graph.tables(0), model.tables(4)
        found = []
        for operator in graph.tables(3):
            kind = CONVOLUTIONS.get(codes[operator.number(0, "<I")])
            if kind is not None:
                inputs = operator.array(1, "<i4")
                weight, bias = (_stored(tensors[int(i)], buffers) for i in inputs[1:3])
                found.append(Convolution(kind, weight, bias))
        return found
    except (ValueError, IndexError, struct.error, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)}: no TFLite file with convolutions that can be read: {error}") from None


def _stored(tensor: _Table, buffers: list[_Table]) -> Stored:
    shape, dtype = tensor.array(0, "<i4"), DTYPES[tensor.number(1, "<b")]
    raw = buffers[tensor.number(2, "<I")].array(0, "u1")
    values = np.frombuffer(raw.tobytes(), np.dtype(dtype).newbyteorder("<")).reshape(shape)
    quantised = tensor.table(4)
    scale = quantised.array(2, "<f4") if quantised else np.zeros(0, np.float32)
    zero = quantised.array(3, "<i8") if quantised else np.zeros(0, np.int64)
    return Stored(tensor.text(3), values, scale if scale.size else None, zero if zero.size else None)


class _Table:
    """A table at a place of the file; fields are numbered as in the format's description."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self.fields = at - _number(data, "<i", at)

    def place(self, field: int) -> int:
        """The place of a field's value; 0 where the table leaves it out."""
        if 4 + 2 * field >= _number(self.data, "<H", self.fields):
            return 0
        offset = _number(self.data, "<H", self.fields + 4 + 2 * field)
        return self.at + offset if offset else 0

    def number(self, field: int, kind: str) -> int:
        """A number; 0 where it is left out."""
        place = self.place(field)
        return _number(self.data, kind, place) if place else 0

    def table(self, field: int) -> _Table | None:
        place = self.place(field)
        return _Table(self.data, place + _number(self.data, "<I", place)) if place else None

    def _vector(self, field: int) -> tuple[int, int]:
        """Where the items of a vector begin, and how many there are."""
        place = self.place(field)
        if not place:
            return 0, 0
        start = place + _number(self.data, "<I", place)
        return start + 4, _number(self.data, "<I", start)

    def array(self, field: int, kind: str) -> np.ndarray:
        start, count = self._vector(field)
        size = count * np.dtype(kind).itemsize
        if start + size > len(self.data):
            raise ValueError(f"a vector ends at byte {start + size} of {len(self.data)}")
        return np.frombuffer(self.data, kind, count, start) if count else np.zeros(0, kind)

    def tables(self, field: int) -> list[_Table]:
        start, count = self._vector(field)
        if start + 4 * count > len(self.data):
            raise ValueError(f"a vector ends at byte {start + 4 * count} of {len(self.data)}")
        places = range(start, start + 4 * count, 4)
        return [_Table(self.data, place + _number(self.data, "<I", place)) for place in places]

    def text(self, field: int) -> str:
        return self.array(field, "u1").tobytes().decode()


def _number(data: bytes, kind: str, at: int) -> int:
    if at < 0 or at + struct.calcsize(kind) > len(data):
        raise ValueError(f"byte {at} of {len(data)} is asked for")
    value: int = struct.unpack_from(kind, data, at)[0]
    return value
