"""Every method of the cost model: by hand, against what really runs, and side by side in one report."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import analysis
from analysis.check import torch_replay
from analysis.check.measure import Comparison, compare
from analysis.cost_model import cost, main, predict
from analysis.peak.lifetimes import renumbered
from analysis.peak.memory import peak
from analysis.reports.peaks import peaks
from analysis.reports.report import MethodCost, Report
from analysis.reports.tables import render, totals_table
from analysis.rules.account import Billed, account
from analysis.rules.op_cost import OpCost
from analysis.rules.recompute import flatten
from analysis.steps import changes as step_changes
from analysis.steps.changes import numbers, retrained, trained_parameters, with_lora
from analysis.steps.methods import METHODS, chosen_methods, method_step
from analysis.steps.nets import build, step_records, trace_step
from analysis.steps.runs import running
from analysis.steps.settings import KNOWN, MethodStep, NotApplicableError, Settings
from lance_ref import functional as F
from lance_ref import models, nn
from lance_ref.engine.recording import OpRecord
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.lora import add_lora
from lance_ref.stores import EXACT, Quantized

CHANGES_OPERATIONS = ("bp", "head-only", "bias-only", "checkpoint", "micro-batch", "lora")
MLP: dict[str, Any] = {"batch": 8, "input_shape": (20,), "num_classes": 10, "tune": "all", "ranks": "0.25"}


@pytest.fixture(name="without_pytorch")
def _without_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's column has tests of its own, and takes longer than all the rest."""
    monkeypatch.setattr(torch_replay, "available", lambda: False)


def agreement(name: str, tune: str, asked: str | tuple[str, ...], **options: Any) -> Comparison:
    shape = (20,) if name == "mlp" else (3, 32, 32)
    return compare(predict(name, 4, None, shape, 5, tune, asked, ranks="0.02", with_weights=True, **options))


# ---- predicted = measured ------------------------------------------------------------------


@pytest.mark.usefixtures("without_pytorch")
@pytest.mark.parametrize("name", models.names())
def test_every_net_measures_as_predicted(name: str) -> None:
    """What trains and what runs changes with the method: every byte and multiply-add, on every net."""
    if name in ("deit-small", "resnet34"):
        pytest.skip("the blocks of deit-tiny and resnet18, more of them")
    prediction = predict(
        name, 4, None, (20,) if name == "mlp" else (3, 32, 32), 5, "last:2", "all", ranks="0.004", with_weights=True
    )
    assert set(prediction.bills) | set(prediction.report.notes) == set(METHODS)
    for method in set(prediction.bills) - set(CHANGES_OPERATIONS):
        del prediction.bills[method]
    comparison = compare(prediction)
    assert comparison.agrees, str(comparison)


@pytest.mark.parametrize(("name", "tune"), [("convnet", "last:1"), ("mlp", "all"), ("resnet8", "last:3")])
def test_all_methods_measure_as_predicted(name: str, tune: str) -> None:
    """All stores too, with PyTorch's column wherever PyTorch can run the step."""
    comparison = agreement(name, tune, "all")
    assert comparison.agrees, str(comparison)
    ran = {line.method for line in comparison.lines}
    left_out = {note.split(":")[0] for note in comparison.notes if "left out" in note}
    assert ran | left_out == set(METHODS)
    assert left_out <= {"lora"}


@pytest.mark.usefixtures("without_pytorch")
@pytest.mark.parametrize(
    "settings",
    [
        Settings(segments=1, micro_batch=1, lora_rank=1, patch=1, ratio=1.0),
        Settings(patch=3, ratio=0.5, segments=2, micro_batch=4, lora_rank=9),
    ],
)
def test_other_settings_measure_as_predicted(settings: Settings) -> None:
    """One segment and several, one image and the whole batch, ranks above a layer's width."""
    asked = ("gradient-filter", "sketch", "checkpoint", "micro-batch", "lora")
    comparison = agreement("mcunet", "last:6", asked, settings=settings)
    assert comparison.agrees, str(comparison)


def test_float64_measures_as_predicted() -> None:
    """Twice the bytes, the same multiply-adds, LoRA's updates included."""
    comparison = agreement("mlp", "all", "all", dtype="float64")
    assert comparison.agrees, str(comparison)


class Own(nn.Module):
    """A user's net: a layer called twice, another in a recomputed segment, no stages()."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.inside = nn.Linear(6, 6, rng=0), nn.Recompute(nn.Sequential(nn.Linear(6, 7, rng=1), nn.Tanh()))
        self.head = nn.Linear(7, 3, rng=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(F.relu(self.twice(F.relu(self.twice(x))))))


def test_a_users_net_measures_as_predicted() -> None:
    """All that fits; checkpointing does not, says why, and is an error if it is asked for by name."""
    prediction = predict(Own(), 8, None, (6,), tune="all", methods="all", ranks="0.5")
    assert list(prediction.report.notes) == ["checkpoint"]
    assert "has none" in prediction.report.notes["checkpoint"]
    comparison = compare(prediction)
    assert comparison.agrees, str(comparison)
    assert "checkpoint: left out: checkpointing takes a net with stages()" in str(comparison)
    with pytest.raises(ValueError, match="method 'checkpoint' does not fit net 'Own'"):
        predict(Own(), 8, None, (6,), tune="all", methods=["checkpoint"])


def test_measuring_leaves_the_net_as_it_was() -> None:
    """Stores, gradients, layers, forward() and tuning: the next method starts from the same net."""
    net = models.create("mlp", in_features=20, hidden=(8, 8), num_classes=5, rng=0)
    prediction = predict(net, 4, None, (20,), tune="all", methods="all", ranks="0.5")
    tuning, modules = net.tuning, list(net.modules())
    compare(prediction)
    assert net.tuning is tuning
    assert [id(module) for module in net.modules()] == [id(module) for module in modules]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert all(module.store is EXACT for module in modules if hasattr(module, "store"))
    assert "forward" not in net.__dict__


# ---- the changed records are those of the changed net ----------------------------------------


def same_records(ours: list[OpRecord], theirs: list[OpRecord]) -> None:
    """Operation by operation: shapes, gradients and parameters; the numbers of the values aside."""
    assert [(r.op, r.path) for r in flatten(ours)] == [(r.op, r.path) for r in flatten(theirs)]
    for a, b in zip(flatten(ours), flatten(theirs), strict=True):
        for x, y in zip((*a.inputs, a.output), (*b.inputs, b.output), strict=True):
            assert (x.shape, x.dtype, x.requires_grad, x.parameter) == (y.shape, y.dtype, y.requires_grad, y.parameter)
        assert {k: v for k, v in a.attributes.items() if k != "records"} == {
            k: v for k, v in b.attributes.items() if k != "records"
        }, a.path


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet8", "deit-tiny", "mobilenetv3-small", "alexnet-cl"])
@pytest.mark.parametrize("method", ["head-only", "bias-only", "lora"])
def test_changed_records_are_those_of_the_changed_net(name: str, method: str) -> None:
    """Gradients spread as the autograd spreads them, and LoRA's operations are those of the real layer."""
    shape = (3, 32, 32)
    net = build(name, 5, shape, without_weights=True)
    step = trace_step(net, name, shape, 4, "last:3", "float32")
    tune = METHODS[method].tune
    changed = MethodStep(step.records)
    if method == "lora":
        try:
            changed = with_lora(step, 2)
        except NotApplicableError:
            pytest.skip("no layer to adapt")
    ours = retrained(changed.records, trained_parameters(step, tune) | set(changed.facts.get("parameters", ())))
    with step_changes.retuned(net, **tune):
        if method == "lora":
            add_lora(net, changed.facts["layers"], 2)
        theirs = step_records(net, name, shape, 4, "float32").records
    same_records(ours, theirs)


def test_nothing_changes_where_nothing_is_asked_for() -> None:
    """Retrained with the same parameters: the very same records, so that costs are shared."""
    step = predict("mobilenetv2", 2, 32, tune="last:2", methods=["bp"]).step
    again = retrained(step.records, trained_parameters(step, {}))
    assert all(a is b for a, b in zip(again, step.records, strict=True))


def test_shared_costs_are_those_of_each_method_alone() -> None:
    """What is costed once for all methods is what each would have been billed by itself."""

    def numbers(bills: list[Billed]) -> list[Any]:
        return [(b.name, b.tape_bytes, b.pytorch_bytes, b.paper_bytes, MethodCost.of(b, "flops")) for b in bills]

    prediction = predict("mcunet", 4, 64, tune="last:4", methods="all", ranks="0.2", num_classes=7)
    for method, bills in prediction.bills.items():
        changed = prediction.steps[method]
        assert numbers(account(changed.records, prediction.step.head, changed.repeats)) == numbers(bills), method


@pytest.mark.parametrize("tune", ["last:3", "all", "head"])
def test_shared_peaks_are_those_of_each_method_alone(tune: str) -> None:
    """The peak of a method does not depend on the others that were asked for."""
    prediction = predict("mcunet", 4, 64, tune=tune, methods="all", ranks="0.2", num_classes=7)
    together = prediction.peaks
    assert list(together) == list(prediction.bills)
    for method, changed in prediction.steps.items():
        assert peaks(prediction.step, {method: changed}, "sgd")[method] == together[method], method
        if METHODS[method].runs is None:
            ends, parameters = prediction.step.lifetimes, prediction.step.net.parameters()
            assert peak(changed.records, lifetimes=ends, parameters=parameters) == together[method], method


@pytest.mark.parametrize("name", ["mobilenetv2", "mcunet", "deit-tiny", "alexnet-cl"])
def test_checkpointing_runs_the_very_operations_of_the_plain_step(name: str) -> None:
    """In segments; the tensors live as long as in a trace of the checkpointed net."""
    size = 32 if name == "alexnet-cl" else 64
    prediction = predict(name, 4, size, tune="last:3", methods=["bp", "checkpoint"], num_classes=7)
    step, changed = prediction.step, prediction.steps["checkpoint"]
    plain = [(record.op, record.path) for record in flatten(changed.records) if record.op != "recompute"]
    assert plain == [(record.op, record.path) for record in step.records]
    with running(step, "checkpoint", changed):
        traced = step_records(step.net, name, step.input_shape, 4, "float32")
    assert changed.lifetimes == renumbered(traced.lifetimes, numbers(traced.records, changed.records))


def test_the_first_call_imports_nothing_of_ours() -> None:
    """``from analysis import cost`` has loaded what the call needs, so that it is not timed."""
    code = (
        "import sys; from analysis import cost; before = set(sys.modules); cost('mlp', method='all').to_json(); "
        "print([m for m in set(sys.modules) - before if m.startswith(('analysis', 'lance_ref', 'scipy', 'numpy'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- by hand -------------------------------------------------------------------------------


def totals(method: str, **settings: Any) -> Any:
    return cost("mlp", method=method, **{**MLP, **settings}).totals[method]


LOSS = 8 * 10 * 4 + 8
"""Of ten classes: the probabilities, and labels of one byte."""


def test_head_only_by_hand() -> None:
    """mlp 20-100-100-10, batch 8: the head's input 8·100 floats; one weight gradient 8·10·100."""
    found = totals("head-only")
    assert found.activation_bytes["tape"] == 8 * 100 * 4 + LOSS
    assert found.activation_bytes["paper"] == 0
    assert found.flops["grad_weight"] == 2 * 8 * 10 * 100
    assert found.flops["grad_input"] == 0
    assert found.flops["forward"] == 2 * 8 * (20 * 100 + 100 * 100 + 100 * 10)


def test_bias_only_by_hand() -> None:
    """The bits of two ReLUs and the head's input; the input gradients of two layers, down to the first bias."""
    found = totals("bias-only")
    assert found.activation_bytes["tape"] == 2 * 100 + 8 * 100 * 4 + LOSS
    assert found.flops["grad_input"] == 2 * 8 * (100 * 100 + 100 * 10)
    assert found.flops["grad_weight"] == 2 * 8 * 10 * 100


def test_lora_by_hand() -> None:
    """Rank 3: the inputs stay, and two products of 3 numbers an image come on top."""
    found = totals("lora", lora_rank=3)
    inputs = 8 * (20 + 100 + 100) * 4
    assert found.activation_bytes["tape"] == inputs + 2 * 8 * 3 * 4 + 2 * 100 + LOSS
    low = 8 * 3 * (20 + 100 + 100 + 100)  # A and B of both layers
    exact = 8 * (20 * 100 + 100 * 100 + 100 * 10)
    assert found.flops["forward"] == 2 * (exact + low)
    assert found.flops["grad_weight"] == 2 * (low + 8 * 100 * 10)
    # head and second layer, its A, and B of both; the first layer's input needs none
    assert found.flops["grad_input"] == 2 * 8 * (10 * 100 + 100 * 100 + 3 * (100 + 100 + 100))


def test_micro_batches_by_hand() -> None:
    """A quarter of the bytes, the same multiply-adds; bits of 2·100 numbers, and parts of two images."""
    plain, parts = totals("bp"), totals("micro-batch")
    assert parts.flops == plain.flops
    assert parts.elementwise == plain.elementwise
    assert parts.activation_bytes["paper"] * 4 == plain.activation_bytes["paper"]
    assert parts.activation_bytes["tape"] == 2 * (20 + 100 + 100) * 4 + 2 * 25 + 2 * 10 * 4 + 2
    report = cost("mlp", method="micro-batch", **{**MLP, "batch": 7})
    assert report.settings["micro-batch"] == {"micro_batch": 1}
    assert report.batch == 7


def test_checkpoint_by_hand() -> None:
    """The inputs of two linear layers and the head's, the ReLUs' bits; both layers run forward again."""
    found = totals("checkpoint")
    assert found.activation_bytes["tape"] == 8 * (20 + 100 + 100) * 4 + 2 * 100 + LOSS
    assert found.flops["recompute"] == 2 * 8 * (20 * 100 + 100 * 100)
    # in one segment its input alone is kept, and that of the head
    one = totals("checkpoint", segments=1)
    assert one.activation_bytes["tape"] == 8 * (20 + 100) * 4 + LOSS
    assert one.flops["recompute"] == found.flops["recompute"]


# ---- one report ----------------------------------------------------------------------------


def test_missing_operations_are_absent() -> None:
    """LoRA's operations are nobody else's: no key in JSON, nothing in CSV, a dash in the table, no zero."""
    report = cost("mlp", method=["bp", "lora", "checkpoint"], **MLP)
    assert json.loads(report.json_text())["notes"] == {}
    rows = {row.name: row for row in report.rows}
    assert list(rows["features.0"].methods) == ["bp", "lora", "checkpoint"]
    assert list(rows["features.0.down"].methods) == ["lora"]
    assert list(rows["(root)/recompute"].methods) == ["checkpoint"]
    names = list(rows)
    assert names.index("features.0") < names.index("features.0.down") < names.index("features.0.sum")
    assert names.index("features.0.sum") < names.index("features.1")
    table = list(csv.DictReader(io.StringIO(report.csv_text())))
    down = next(row for row in table if row["name"] == "features.0.down")
    assert down["methods.lora.activation_bytes.tape"] == str(8 * 20 * 4)  # x, which the frozen weight does not keep
    assert down["methods.bp.activation_bytes.tape"] == ""
    text = render(report, across=300, wide=True)
    line = next(line for line in text.splitlines() if line.split()[:1] == ["features.0.up"])
    assert line.split().count("-") >= 6  # three accountings of two methods
    assert "checkpoint: segments keep their input and run twice (segments 2)" in text


def test_the_order_of_methods_does_not_matter() -> None:
    """The same rows and costs, whichever method comes first."""
    asked = ["lora", "bp", "checkpoint", "head-only"]
    first, second = (cost("mlp", method=order, **MLP) for order in (asked, asked[::-1]))
    assert {row.name: row.methods for row in first.rows} == {row.name: row.methods for row in second.rows}
    assert first.totals == second.totals


def test_all_methods_of_the_main_net(capsys: pytest.CaptureFixture[str]) -> None:
    """`--method all` from the shell: every method has a total, and every line is whole and in ASCII."""
    assert main(["--net", "mobilenetv2", "--tune", "last:2", "--batch", "8", "--method", "all", "--wide"]) == 0
    text = capsys.readouterr().out
    assert text.isascii()
    lines = text[text.index("Totals (memory in MiB") :].splitlines()
    for name in METHODS:
        assert any(line.split()[:1] == [name] for line in lines), name
    assert "MFLOPs" in text
    assert "GMACs" in text


def test_paper_convention_names_its_unit() -> None:
    """Multiply-adds are not called FLOPs, in table and JSON."""
    report = cost("mlp", method=["bp", "hosvd"], convention="paper", **MLP)
    assert report.to_json()["units"]["flops"] == "multiply-adds of the tuned layers"
    text = render(report, wide=True)
    assert "FLOPs" not in text
    assert "multiply-adds and element-wise operations in millions" in text


def test_cost_of_a_traced_step() -> None:
    """A step that was traced already costs the same; other wishes about it are refused."""
    net = build("mlp", 10, (20,), without_weights=True)
    step = trace_step(net, "mlp", (20,), 8, "all", "float32")
    asked = {"method": "all", "ranks": "0.25"}
    assert analysis.cost(step, **asked).to_json() == cost("mlp", **{**MLP, **asked}).to_json()
    assert analysis.cost(step, batch=8, **asked).batch == 8
    with pytest.raises(ValueError, match="batch is 9, but the step of net 'mlp' was traced already"):
        analysis.cost(step, batch=9)


def test_method_and_methods_are_one_thing() -> None:
    """A name, several, or both spellings; not both at once."""
    assert cost("mlp", methods=["bp"], **MLP) == cost("mlp", method="bp", **MLP)
    with pytest.raises(ValueError, match="expected one of them"):
        cost("mlp", method="bp", methods=["bp"])
    with pytest.raises(ValueError, match="expected some of"):
        chosen_methods([])
    with pytest.raises(TypeError, match="pach"):
        cost("mlp", pach=3)


def test_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """table() is a rich table of all methods; the HTML is escaped and has every method's line, in a kernel too."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    report: Report = cost("mlp", method=["bp", "lance", "lora"], **MLP)
    assert repr(report) == f"Report(mlp, batch {report.batch}, bp, lance, lora: {len(report.rows)} rows)"
    assert len(totals_table(report).rows) == 5  # three methods, two reductions
    html = report._repr_html_()
    assert html.startswith("<pre")
    assert "bp / lora" in html
    assert "The calibration of lance" in html
    assert "<built-in" not in html


def test_to_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the CSV under the same names; without pandas one line that says what to install."""
    report = cost("mlp", method=["bp", "lora"], **MLP)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="needs pandas, which is not installed"):
        report.to_pandas()

    class Fake:
        @staticmethod
        def DataFrame(rows: list[dict[str, Any]], columns: list[str]) -> tuple[Any, Any]:  # noqa: N802
            return rows, columns

    monkeypatch.setitem(sys.modules, "pandas", Fake)
    rows, columns = report.to_pandas()
    assert columns == next(csv.reader(io.StringIO(report.csv_text())))
    assert len(rows) == len(report.rows)


def test_the_registry_names_settings_that_exist() -> None:
    """A setting that a method heeds is one that can be given, and every setting belongs to a method."""
    assert {name for method in METHODS.values() for name in method.names} == set(KNOWN)
    assert all(
        (method.about and method.about[0].islower()) or method.about[:4].isupper() for method in METHODS.values()
    )


# ---- planted faults --------------------------------------------------------------------------


@pytest.fixture(name="differences")
def _differences(without_pytorch: None) -> Callable[[str], set[str]]:
    """What differs for one method on a small net."""
    return lambda method: {x.what for x in agreement("mlp", "all", (method,)).lines if not x.agrees}


def test_planted_forgotten_factor_of_lora(
    monkeypatch: pytest.MonkeyPatch, differences: Callable[[str], set[str]]
) -> None:
    """Updates of another rank than the real ones are caught in bytes and in every product."""
    assert differences("lora") == set()
    real = step_changes.with_lora

    def wrong(step: Any, rank: int) -> MethodStep:
        changed = real(step, rank + 1)
        return MethodStep(changed.records, facts={**changed.facts, "rank": rank})

    monkeypatch.setattr(step_changes, "with_lora", wrong)
    assert {"tape bytes", "forward multiply-adds", "grad_weight multiply-adds"} <= differences("lora")


def test_planted_gradients_below_the_head(
    monkeypatch: pytest.MonkeyPatch, differences: Callable[[str], set[str]]
) -> None:
    """Head-only billed as if everything trained."""
    assert differences("head-only") == set()
    monkeypatch.setattr(step_changes, "retrained", lambda records, trains: list(records))
    assert {"tape bytes", "grad_weight multiply-adds"} <= differences("head-only")


def test_planted_one_micro_batch_for_all(
    monkeypatch: pytest.MonkeyPatch, differences: Callable[[str], set[str]]
) -> None:
    """The operations of one part billed for the whole step."""
    assert differences("micro-batch") == set()
    monkeypatch.setattr(OpCost, "repeated", lambda cost, times: cost)
    assert "forward multiply-adds" in differences("micro-batch")


def test_planted_wrong_bits(monkeypatch: pytest.MonkeyPatch, differences: Callable[[str], set[str]]) -> None:
    """Eight bits billed where four are kept."""
    assert differences("int8") == set()
    says = {"name": "quantized", "bits": 8}
    wrong = replace(METHODS["int8"], make=lambda layer: Quantized(4), describe=lambda layer: says)
    monkeypatch.setitem(METHODS, "int8", wrong)
    assert "tape bytes" in differences("int8")


def test_a_net_of_ours_is_traced_once() -> None:
    """Asked for by name, on shapes alone; with weights, or at another batch size, it is another one."""
    first = predict("mlp", 8, methods="all")
    assert predict("mlp", 8, methods="bp").step is first.step
    assert predict("mlp", 4, methods="bp").step is not first.step
    assert predict("mlp", 8, methods="bp", with_weights=True).step is not first.step
    assert predict("mlp", 8, methods="all").report.to_json() == first.report.to_json()


@pytest.mark.parametrize("dtype", ["", "float16"])
def test_a_net_by_name_takes_no_other_dtype(dtype: str) -> None:
    """An empty name is not the default."""
    with pytest.raises(ValueError, match="expected float32 or float64"):
        cost("mlp", batch=4, dtype=dtype)


def test_what_a_step_remembers_is_its_own() -> None:
    """Traces for checkpointing and for parts are made once; a step that trains other layers makes its own."""
    step = predict("convnet", 8, methods="bp", with_weights=True).step
    for method in ("checkpoint", "micro-batch"):
        once = method_step(method, step, Settings(), {}, {})
        traces = dict(step.derived)
        assert method_step(method, step, Settings(), {}, {}) == once
        assert all(step.derived[key] is traces[key] for key in traces)
    assert len(step.derived) == 2
    assert not dataclasses.replace(step, tuned_layers=()).derived


def test_a_width_goes_with_the_name() -> None:
    """The net of that width, and no ranks measured on another one."""
    named = cost("mobilenetv2@0.35", batch=4, image_size=64, num_classes=10)
    net = models.create("mobilenetv2", num_classes=10, width=0.35)
    given = cost(net, batch=4, image_size=64)
    assert named.totals == given.totals
    assert named.net == "mobilenetv2@0.35"
    assert "assumed" in cost("mobilenetv2@0.35", batch=4).ranks_from
