"""ONNX's own models of single nodes: a wrong value of an operation that is accepted would be wrong silently."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.onnx.net import OnnxNet
from lance_ref import Tensor, no_grad

onnx = pytest.importorskip("onnx")

RANDOM = ("training_dropout", "bernoulli", "randomuniform")


def cases() -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [case for case in collect_testcases(None) if case.model is not None and case.data_sets]


def values(net: OnnxNet, case: Any) -> list[np.ndarray]:
    given = dict(zip((value.name for value in case.model.graph.input), case.data_sets[0][0], strict=False))
    tensors = []
    for value in net.graph.inputs:
        x = np.asarray(given[value.name])
        tensors.append(Tensor(x.astype(np.float32) if x.dtype == np.float16 else x))
    with no_grad(), np.errstate(all="ignore"):
        found = net.forward(*tensors)
    return [y.data if isinstance(y, Tensor) else y.x.data for y in (found if isinstance(found, list) else [found])]


def test_accepted_nodes_give_onnxs_values(tmp_path: Path) -> None:
    """Every one that is not refused in one line; more than 500 are accepted."""
    accepted, wrong = 0, []
    file = tmp_path / "node.onnx"
    for case in cases():
        if any(name in case.name for name in RANDOM):
            continue
        onnx.save(case.model, file)
        try:
            found = values(OnnxNet(file).eval(), case)
        except (ValueError, TypeError, IndexError):
            continue
        accepted += 1
        for ours, theirs in zip(found, case.data_sets[0][1], strict=False):
            expected = np.asarray(theirs).astype(np.float64)
            same = ours.shape == expected.shape
            if not same or not np.allclose(ours.astype(np.float64), expected, rtol=1e-3, atol=1e-4, equal_nan=True):
                wrong.append(case.name)
    assert wrong == []
    assert accepted > 500
