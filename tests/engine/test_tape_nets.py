"""Whole networks: what the tape report says equals what the interpreter holds, before and after compression."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import numpy as np
import pytest

import lance_ref as lr
from lance_ref import F, Subspace, models, tape
from lance_ref.stores import Lance

NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mobilenetv2": (lambda: models.mobilenetv2(num_classes=10, rng=0), (8, 3, 64, 64)),
    "resnet18": (lambda: models.resnet18(num_classes=10, rng=0), (8, 3, 64, 64)),
    "resnet34": (lambda: models.resnet34(num_classes=10, rng=0), (4, 3, 64, 64)),
    "convnet": (lambda: models.convnet(num_classes=10, rng=0), (64, 3, 32, 32)),
    "mlp": (lambda: models.mlp(num_classes=10, in_features=784, rng=0), (512, 784)),
}


def live_bytes_and_report(net: lr.nn.Module, shape: tuple[int, ...]) -> tuple[int, lr.tape_report.TapeReport, int]:
    """Memory that a forward pass leaves behind with only the loss kept; the report; the number of ops."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, shape[0])
    with lr.record(net) as records:
        F.cross_entropy(net(rng.standard_normal(shape).astype(np.float32)), y)
    F.cross_entropy(net(rng.standard_normal(shape).astype(np.float32)), y)  # warms up every kernel, the fused ones too
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        loss = F.cross_entropy(net(rng.standard_normal(shape).astype(np.float32)), y)
        gc.collect()
        live = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    return live, tape(loss), len(records)


def compress_at_random(net: lr.nn.Module, shape: tuple[int, ...]) -> None:
    """LANCE stores of a quarter of each mode on the tuned layers."""
    for record in lr.trace(net, shape):
        if record.op in ("conv2d", "linear") and record.path in net.tuning.layers:
            sizes = record.inputs[0].shape
            subspace = Subspace.random(sizes, tuple(-(-n // 4) for n in sizes), np.random.default_rng(0))
            net.get_submodule(record.path).store = Lance(subspace)


@pytest.mark.parametrize("selection", ["head", "last:2", "all"])
@pytest.mark.parametrize("name", NETS)
def test_live_memory_equals_the_report(name: str, selection: str) -> None:
    """A hidden reference to any activation of any network would show, with and without compression."""
    build, shape = NETS[name]
    net = build()
    net.train()
    lr.tune(net, selection)
    totals = []
    for compressed in (False, True):
        if compressed:
            compress_at_random(net, shape)
        live, report, ops = live_bytes_and_report(net, shape)
        assert abs(live - report.total_bytes) <= 64 * 1024 + 2048 * ops, (live, report.total_bytes)
        totals.append(report.total_bytes)
    if selection != "head":
        assert totals[1] < totals[0]


def test_nothing_below_the_first_trained_layer_is_kept() -> None:
    """The tape of ``last:2`` starts at the first of the two."""
    net = NETS["mobilenetv2"][0]()
    tuning = lr.tune(net, "last:2")
    x = np.ones((2, 3, 64, 64), np.float32)
    paths = list(tape(F.cross_entropy(net(x), np.array([0, 1]))).by_layer())
    assert paths[0] == tuning.layers[0] == "features.17.conv.2"
    assert not any(path.startswith(("features.16", "features.0.")) for path in paths)
