"""Small ONNX files, node by node. Needs the package onnx: a test file that takes from here is skipped without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
FLOAT = onnx.TensorProto.FLOAT


def weight(name: str, *shape: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    return numpy_helper.from_array(np.random.default_rng(seed).standard_normal(shape).astype(dtype), name)


def array(name: str, values: Any, dtype: Any = np.int64) -> Any:
    return numpy_helper.from_array(np.array(values, dtype), name)


def model(
    nodes: list[Any], constants: list[Any], shape: Any = ("batch", 4), opset: int = 17, kind: int = FLOAT
) -> onnx.ModelProto:
    """From ``x`` to ``y``."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def mlp(*between: Any, shape: Any = ("batch", 4), constants: tuple[Any, ...] = (), **options: Any) -> onnx.ModelProto:
    """Two linear layers, and between them nodes from ``h`` to ``g``."""
    nodes = [helper.make_node("Gemm", ["x", "a.weight", "a.bias"], ["h"], transB=1)]
    nodes += between or [helper.make_node("Relu", ["h"], ["g"], name="act")]
    nodes += [helper.make_node("Gemm", ["g", "b.weight", "b.bias"], ["y"], transB=1)]
    sizes = {"a.weight": (6, 4), "a.bias": (6,), "b.weight": (3, 6), "b.bias": (3,)}
    weights = [weight(name, *shape, seed=i) for i, (name, shape) in enumerate(sizes.items())]
    return model(nodes, [*weights, *constants], shape, **options)


def save(folder: Path, net: onnx.ModelProto | bytes, name: str = "net.onnx") -> Path:
    file = folder / name
    file.write_bytes(net if isinstance(net, bytes) else net.SerializeToString())
    return file
