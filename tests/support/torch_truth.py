"""What PyTorch itself keeps of its own modules, and their exports; a test that takes from here needs PyTorch."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch_twins import one_thread

torch = pytest.importorskip("torch")


def kept(net: Any, x: Any) -> int:
    """Bytes that PyTorch keeps of a module and its cross-entropy, each storage once, without the module's own."""
    found: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        stay.append(tensor)
        return tensor

    stay: list[Any] = []
    with one_thread(), warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        warnings.simplefilter("ignore")
        torch.nn.functional.cross_entropy(net(x), torch.zeros(len(x), dtype=torch.long))
    for tensor in (*net.parameters(), *net.buffers()):
        found.pop(tensor.untyped_storage()._cdata, None)
    return sum(found.values())


def exported(net: Any, x: Any, file: Path, **options: Any) -> str:
    stream = io.BytesIO()
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (x,),
            stream,
            dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
            **options,
        )
    file.write_bytes(stream.getvalue())
    return str(file)
