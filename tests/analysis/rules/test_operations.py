"""One row in the table of operations is all that somebody else's operation takes; what is missing has safe defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cost_cases import CASES, run

import lance_ref
from analysis import OpCost, operation
from analysis.check import torch_replay
from analysis.check.measure import compare
from analysis.peak import rules as peak
from analysis.peak.memory import peak as peak_of
from analysis.reports.predict import predict
from analysis.reports.report import Report
from analysis.reports.tables import render
from analysis.rules.layouts import Layout, Memory
from analysis.rules.op_cost import Call, MissingRuleError, fresh
from analysis.rules.operations import OPERATIONS
from lance_ref import nn
from lance_ref.engine.autograd import Function
from lance_ref.engine.tensor import Tensor


class Square(Function):
    op = "square"

    @staticmethod
    def output_shape(x: Tensor) -> tuple[int, ...]:
        return x.shape

    @staticmethod
    def forward(ctx: Any, x: np.ndarray) -> np.ndarray:
        ctx.save_input("x", 0)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad_output: np.ndarray) -> tuple[np.ndarray]:
        return (2 * ctx["x"] * grad_output,)


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


def square_cost(call: Call) -> OpCost:
    kept = [call.save_input("x", 0)] if call.on_tape else []
    return OpCost(elementwise=(3 if call.on_tape else 1) * call.n_out, tape=kept, pytorch=kept)


def in_flight_forward(call: Call) -> int:
    return call.n_out * call.itemsize


def in_flight_backward(call: Call, g: Layout) -> peak.Backward:
    return peak.Backward(2 * call.n_out * call.itemsize, (peak.like_input(call),))


def twin(torch: Any, inputs: list[Any], attributes: Any) -> Any:
    return inputs[0] ** 2


ROW: dict[str, Any] = {
    "cost": square_cost,
    "in_flight_forward": in_flight_forward,
    "in_flight_backward": in_flight_backward,
    "twin": twin,
}
FOOTNOTE = "peak of operation 'square': no rule, an upper estimate is used"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The table as it was, after each test."""
    before = dict(OPERATIONS)
    yield
    OPERATIONS.clear()
    OPERATIONS.update(before)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, rng=0), Squared(), nn.Flatten(), nn.Linear(1568, 3, rng=1))


OPTIONS: dict[str, Any] = {"input_shape": (1, 16, 16), "methods": ["bp", "lance"], "tune": "all", "ranks": "0.5"}


def report() -> Report:
    return predict(net(), 8, **OPTIONS).report


def test_one_row_is_all_it_takes() -> None:
    """A complete row: priced, measured to the byte, and nothing estimated."""
    operation("square", **ROW)
    priced = report()
    assert {row.op: row for row in priced.rows}["square"].methods["bp"].elementwise == 3 * 8 * 8 * 14 * 14
    assert "upper estimate" not in render(priced)
    assert list(priced.to_json()["notes"]) == []
    comparison = compare(predict(net(), 8, **OPTIONS), peaks=True)
    assert comparison.agrees, comparison
    assert "not replayed" not in str(comparison)
    assert any("pytorch" in line.what for line in comparison.lines) == torch_replay.available()


def test_without_a_rule_of_its_own_the_peak_is_an_upper_estimate_and_the_report_says_so() -> None:
    """Not too small, in bytes, and not silent: in the table and in the JSON."""
    operation("square", **ROW)
    exact = report().peaks["bp"].peak_bytes
    operation("square", cost=square_cost, replace=True)
    estimated = report()
    assert exact <= estimated.peaks["bp"].peak_bytes
    assert render(estimated).count(FOOTNOTE) == 1
    assert json.loads(estimated.json_text())["notes"] == dict([FOOTNOTE.split(": ", 1)])


def test_one_rule_of_two_is_not_enough() -> None:
    """The other direction is estimated, and that is said."""
    for column in ("in_flight_forward", "in_flight_backward"):
        operation("square", **{**ROW, column: None}, replace=True)
        assert FOOTNOTE in render(report())


def test_a_peak_above_its_estimate_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below it, it is not compared, which is said; above it the estimate was too small."""
    operation("square", cost=square_cost)
    comparison = compare(predict(net(), 8, **OPTIONS), peaks=True)
    assert comparison.agrees
    assert "peak of memory of bp: not compared: at most" in str(comparison)
    monkeypatch.setattr("analysis.check.measure.measure_peak", lambda *arguments: 2**30)
    assert not compare(predict(net(), 8, **OPTIONS), peaks=True).agrees


def test_the_estimate_is_result_kept_gradient_and_three_arrays_of_each_size() -> None:
    """By hand: 2 x 3 float64, squared, both on the tape."""
    operation("square", cost=lambda call: OpCost(tape=[call.save_input("x", 0), fresh("mask", 10)]))
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    with lance_ref.record() as records:
        Square.apply(x)
    memory = Memory()
    inputs = (memory.of(records[0].inputs[0]),)
    call = Call(records[0], inputs, memory.follow(records[0], inputs), True)
    assert peak.most_forward(call) == 48 + 10 + 3 * (48 + 48)
    back = peak.run_backward(call, call.output)
    assert (back.most, back.shared) == (48 + 3 * (48 + 48), {0})
    assert [grad.shape for grad in back.gradients if grad is not None] == [(2, 3)]


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("conv2d")])
def test_the_estimate_is_never_below_the_rule(name: str) -> None:
    """Of our own, those that lay out patches aside: with its rules taken away the peak of a step does not shrink."""
    records, _ = run(name, real=False)
    exact = peak_of(records).peak_bytes
    for op in {record.op for record in records}:
        OPERATIONS[op] = replace(OPERATIONS[op], in_flight_forward=None, in_flight_backward=None)
    found = peak_of(records)
    assert found.peak_bytes >= exact
    assert set(found.estimated) == {f"operation {record.op!r}" for record in records}


def test_without_a_twin_the_measurement_says_that_pytorch_was_not_asked() -> None:
    pytest.importorskip("torch")
    operation("square", **{**ROW, "twin": None})
    comparison = compare(predict(net(), 8, **OPTIONS))
    assert comparison.agrees
    assert "PyTorch's column of bp: not replayed: no PyTorch counterpart for operation 'square'" in str(comparison)


@pytest.mark.parametrize(
    ("columns", "strides", "in_pytorch"),
    [
        ({}, (3, 1), (3, 1)),
        ({"layout": "as the first input"}, (1, 2), (1, 2)),
        ({"layout": "as the first input", "layout_in_pytorch": "packed"}, (1, 2), (3, 1)),
        ({"layout_in_pytorch": lambda record, inputs: inputs[0]}, (3, 1), (1, 2)),
    ],
)
def test_the_layout_of_a_result(columns: dict[str, Any], strides: tuple[int, ...], in_pytorch: tuple[int, ...]) -> None:
    """Packed by default; a function gives a look at an input's memory."""
    operation("square", cost=square_cost, **columns)
    x = Tensor(np.ones((3, 2)), requires_grad=True)
    with lance_ref.record() as records:
        Square.apply(x.permute(1, 0))
    ours, theirs = Memory(), Memory(in_pytorch=True)
    for record in records:
        ours.follow(record)
        theirs.follow(record)
    assert ours.of(records[-1].output).strides == strides
    assert theirs.of(records[-1].output).strides == in_pytorch
    shared = theirs.of(records[-1].output).storage is theirs.of(records[-1].inputs[0]).storage
    assert shared == callable(columns.get("layout_in_pytorch"))


def test_an_onnx_file_is_read_with_it(tmp_path: Path) -> None:
    """An operator of a domain of its own, which nobody else can read."""
    onnx_files = pytest.importorskip("onnx_files")
    node = onnx_files.helper.make_node("Square", ["h"], ["g"], domain="com.theirs")
    model = onnx_files.mlp(node)
    model.opset_import.append(onnx_files.helper.make_opsetid("com.theirs", 1))
    onnx_files.onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"no cost rule for com\.theirs\.Square; there are rules for Abs"):
        predict(str(tmp_path / "net.onnx"), 8)
    operation("square", **ROW, onnx={"com.theirs.Square": lambda node, inputs: Square.apply(inputs[0])})
    found = compare(predict(str(tmp_path / "net.onnx"), 8, tune="all", with_weights=True))
    assert found.agrees, found
    assert {bill.record.op for bill in predict(str(tmp_path / "net.onnx"), 8).bills["bp"]} >= {"square"}


def test_a_missing_cost_names_operation_and_layer() -> None:
    with pytest.raises(MissingRuleError, match="no cost rule for operation 'square' in layer '1'"):
        report()


def other_cost(call: Call) -> OpCost:
    return OpCost()


def test_a_name_registered_twice_is_an_error() -> None:
    """By another function: both are named. The same one again, as when a module is loaded anew, is not."""
    operation("square", cost=square_cost)
    operation("square", cost=square_cost, twin=twin)
    assert OPERATIONS["square"].twin is twin
    both = r"operation 'square' is registered twice: its cost is \S*square_cost, and here \S*other_cost"
    with pytest.raises(ValueError, match=both):
        operation("square", cost=other_cost)
    with pytest.raises(ValueError, match=r"operation 'relu' is registered twice: its cost is analysis\.rules\."):
        operation("relu", cost=other_cost)
    operation("square", cost=other_cost, replace=True)
    assert (OPERATIONS["square"].cost, OPERATIONS["square"].twin) == (other_cost, None)


@pytest.mark.parametrize(
    ("columns", "error", "says"),
    [
        ({"cost": 3}, TypeError, "cost of operation 'square' is 3, expected a function"),
        ({"cost": None}, TypeError, "cost of operation 'square' is None, expected a function"),
        ({"cost": other_cost, "twin": "relu"}, TypeError, "twin of operation 'square' is 'relu', expected a function"),
        ({"cost": other_cost, "layout": "same"}, ValueError, "is 'same', expected 'packed', 'as the first input'"),
        ({"cost": other_cost, "colour": 1}, TypeError, "colour"),
    ],
)
def test_a_row_that_cannot_be(columns: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        operation("square", **columns)
    assert "square" not in OPERATIONS


def test_our_own_rows_are_complete() -> None:
    """Every operation that has a cost has all the other columns; a recomputed segment is made of others."""
    for name in set(OPERATIONS) - {"recompute"}:
        row = OPERATIONS[name]
        assert row.cost is not None, name
        assert row.twin is not None, name
        assert not row.is_estimated, name
