"""The calibration's bill: what `lance_ref.calibrate` really multiplies, by hand, and when it is paid back."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import cost
from analysis.cost_model import predict
from analysis.reports.tables import render
from analysis.rules import calibration_costs
from lance_ref import calibrate, count_macs, models, nn
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module

KINDS: dict[str, dict[str, bool]] = {
    "lance": {},
    "lance-mean-free": {"mean_free": True},
    "lance-center": {"center": True},
}


class Twice(nn.Module):
    """A convolution called twice, a linear layer on tokens, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 3, 3, padding=1, rng=0), nn.Linear(3, 3, rng=1)
        self.head = nn.Linear(3, 5, rng=2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(self.conv(x)).reshape(x.shape[0], 3, -1).permute(0, 2, 1)  # (B, L, 3)
        return self.head(self.mix(tokens).mean(dim=1))


def executed(net: Module, shape: tuple[int, ...], batches: int, modes: Any = None, **kind: bool) -> dict[str, int]:
    """Multiply-adds that calibration ran, by kind."""
    rng = np.random.default_rng(0)
    data = [rng.standard_normal(shape).astype(np.float32) for _ in range(batches)]
    with count_macs() as counter:
        calibrate(net, data, progress=False, **({} if modes is None else {"modes": modes}), **kind)
    return counter.by_kind()


@pytest.mark.parametrize("name", ["convnet", "mcunet", "twice"])
@pytest.mark.parametrize("method", KINDS)
def test_predicted_equals_executed(name: str, method: str) -> None:
    """Grams, the mean's direction and the forward passes, multiply-add by multiply-add."""
    net = Twice() if name == "twice" else models.create(name, num_classes=5, rng=0)
    shape = (2, 3, 12, 12) if name == "twice" else (2, 3, 32, 32)
    prediction = predict(net, 2, input_shape=shape[1:], methods=[method], ranks="0.3")
    bill = prediction.report.calibration[method]
    ran = executed(net, shape, 3, **KINDS[method])
    three = calibration_costs.calibration_cost(
        prediction.step.records, bill.forward_macs // (100 * (1 + (method != "lance"))), prediction.ranks[method], 3,
        {"lance": "plain"}.get(method, method.removeprefix("lance-")),
    )  # fmt: skip
    assert three.gram_macs + three.frame_macs == ran["calibration"] > 0
    assert three.forward_macs == ran["forward"] > 0
    assert (three.frame_macs > 0) == (method == "lance-mean-free")


def test_modes_left_alone_have_no_gram() -> None:
    """Calibrated with channels alone, and predicted with ranks that leave the other modes alone."""
    net = models.create("convnet", num_classes=5, rng=0)
    ranks = "conv1=-,2,-,-;conv2=-,2,-,-;conv3=-,2,-,-"
    prediction = predict(net, 2, 16, tune="all", methods=["lance"], ranks=ranks, num_classes=5)
    bill = prediction.report.calibration["lance"]
    assert bill.gram_macs == 100 * executed(net, (2, 3, 16, 16), 1, modes=("channel",))["calibration"]


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=4, max_size=4), st.integers(1, 5))
@settings(max_examples=30)
def test_one_layer_by_its_formulas(modes: list[tuple[int, bool]], batches: int) -> None:
    """P·n for every Gram and batch, 9n³/2 once, 8n² bytes: of the modes with a rank, and no others."""
    sizes = tuple(n for n, _ in modes)
    P = int(np.prod(sizes))
    layer = calibration_costs._layer("a", [sizes], tuple(1 if on else None for _, on in modes), batches, "plain")
    bill = calibration_costs.CalibrationCost(batches, 0, (layer,))
    chosen = [n for n, on in modes if on]
    assert bill.gram_macs == batches * P * sum(chosen)
    assert bill.eigenvector_macs == sum(9 * n**3 // 2 for n in chosen)
    assert bill.gram_bytes == 8 * sum(n * n for n in chosen)
    assert bill.total_macs == bill.gram_macs + bill.eigenvector_macs


def test_by_hand_and_paid_back() -> None:
    """conv3 of (2, 32, 4, 4): P = 1024; Grams 1024·42 a batch; HOSVD decomposes the same modes at every step."""
    options: dict[str, Any] = {
        "batch": 2, "input_shape": (3, 16, 16), "tune": "conv3", "ranks": "conv3=1,4,2,2", "num_classes": 10,
        "calibration_batches": 7,
    }  # fmt: skip
    report = cost("convnet", method=["lance", "hosvd"], **options)
    bill = report.calibration["lance"]
    eigenvectors = 9 * 8 // 2 + 9 * 32**3 // 2 + 2 * (9 * 64 // 2)
    # of (2, 32, 4, 4) every mode is smaller than the product of the others
    assert bill.gram_macs == 7 * 1024 * (2 + 32 + 4 + 4)
    assert bill.eigenvector_macs == eigenvectors
    # pixels 16², then 8² after pooling, 4²
    forward = 2 * (16 * 256 * 27 + 32 * 64 * 144 + 64 * 16 * 288) + 2 * 10 * 256
    assert bill.forward_macs == 7 * forward
    totals = report.totals
    per_step = 1024 * 42 + eigenvectors
    assert bill.saved_macs_per_step == per_step
    assert totals["hosvd"].flops["decomposition"] == 2 * per_step
    assert totals["hosvd"].flops["projection"] == totals["lance"].flops["projection"]
    steps = bill.steps_to_pay_back
    assert steps is not None
    assert (steps - 1) * per_step < bill.total_macs <= steps * per_step
    text = " ".join(render(report).split())
    assert f"paid back after {steps:,} step" in text
    assert re.search(r"The calibration of lance takes [0-9.]+ GMACs, once, on 7 batches", text)
    assert json.loads(report.json_text())["calibration"]["lance"]["steps_to_pay_back"] == steps


def test_never_paid_back_at_full_rank() -> None:
    """Where HOSVD has nothing to decompose there is nothing to save: None, and said so."""
    report = cost("convnet", batch=2, image_size=16, tune="last:1", ranks="1")
    assert report.calibration["lance"].steps_to_pay_back is None
    assert "never paid back" in " ".join(render(report).split())


def test_planted_forgotten_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gram without its batch mode is caught by the comparison with what ran."""
    right = calibration_costs._layer
    monkeypatch.setattr(
        calibration_costs, "_layer", lambda path, shapes, ranks, *rest: right(path, shapes, (None, *ranks[1:]), *rest)
    )
    with pytest.raises(AssertionError):
        test_predicted_equals_executed("convnet", "lance")
