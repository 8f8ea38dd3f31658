"""The report of a PyTorch module: columns by hand, methods on the storages that PyTorch showed, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_nets import between, plain, summed  # noqa: E402
from torch_twins import one_thread  # noqa: E402

import analysis  # noqa: E402
from analysis.cost_model import main  # noqa: E402
from analysis.reports.tables import render  # noqa: E402
from analysis.rules.tucker_costs import ConvSizes, conv_cheapest, projection_macs  # noqa: E402

PLAIN = ("--net", "torch_nets:plain", "--input-shape", "3,16,16", "--batch", "4")
RANKS = "0=2,3,4,5"


def test_a_core_takes_the_place_of_an_input_that_nobody_else_holds() -> None:
    """4 images: the first layer's input goes, 2·3·4·5 numbers come; multiply-adds are those of our own layer."""
    report = analysis.cost(plain(), batch=4, input_shape=(3, 16, 16), tune="0", ranks=RANKS)
    bp, lance = report.totals["bp"], report.totals["lance"]
    assert report.tuned_layers == ("0",)
    assert bp.activation_bytes["paper"] == 4 * 4 * 3 * 16 * 16
    assert lance.activation_bytes["paper"] == 4 * 2 * 3 * 4 * 5
    assert bp.activation_bytes["pytorch"] - lance.activation_bytes["pytorch"] == 4 * (4 * 3 * 16 * 16 - 2 * 3 * 4 * 5)
    assert lance.subspace_bytes == 4 * (4 * 2 + 3 * 3 + 16 * 4 + 16 * 5)
    sizes = ConvSizes(4, 3, (16, 16), C_out=8, size_out=(14, 14), kernel=(3, 3), groups=1)
    assert lance.flops["projection"] == 2 * projection_macs((4, 3, 16, 16), (2, 3, 4, 5))
    row = next(row for row in report.rows if row.path == "0")
    assert row.methods["lance"].flops["grad_weight"] == 2 * conv_cheapest(sizes, (2, 3, 4, 5))[0]
    assert row.methods["bp"].flops["grad_weight"] == 2 * sizes.macs
    assert row.methods["lance"].ranks == (2, 3, 4, 5)


def test_what_a_relu_holds_stays() -> None:
    """The second layer's input is the ReLU's result, which PyTorch's ReLU keeps: LANCE frees nothing there."""
    report = analysis.cost(plain(), batch=4, input_shape=(3, 16, 16), tune="2", ranks="2=2,3,4,5")
    bp, lance = report.totals["bp"], report.totals["lance"]
    core = 4 * 2 * 3 * 4 * 5
    # the frozen first layer keeps nothing, the ReLU behind it neither: its input has no gradient
    assert bp.activation_bytes["pytorch"] - lance.activation_bytes["pytorch"] == 4 * 4 * 8 * 14 * 14 - core
    report = analysis.cost(plain(), batch=4, input_shape=(3, 16, 16), tune=["0", "2"], ranks="2=2,3,4,5;0=exact")
    bp, lance = report.totals["bp"], report.totals["lance"]
    assert lance.activation_bytes["pytorch"] - bp.activation_bytes["pytorch"] == core


def test_methods_that_keep_something_else() -> None:
    """Codes take an eighth of 64 bits less; the head alone keeps the head's input; others say what to do instead."""
    everything = analysis.cost(plain(), batch=4, input_shape=(3, 16, 16), tune="all", method="all")
    kept = {name: cost.activation_bytes for name, cost in everything.totals.items()}
    head = 4 * 4 * 1152
    tape = head + 4 * 4 * 10 + 4  # the labels of 10 classes are a byte each
    assert kept["head-only"] == {"paper": 0, "pytorch": head + 4 * 4 * 10 + 4 * 8 + 4, "tape": tape}
    assert kept["int8"]["tape"] == kept["bp"]["tape"] - 4 * (3 * 256 * 4 + 8 * 196 * 4) + kept["int8"]["paper"]
    assert kept["int8"]["paper"] == 4 * 3 * 256 + 4 * 8 * 196 + 8 * (3 + 8)
    assert set(everything.notes) == {"bias-only", "checkpoint", "micro-batch", "lora"}
    assert kept["hosvd"]["paper"] == kept["lance"]["paper"] + everything.totals["lance"].subspace_bytes
    assert everything.calibration["lance"].batches == 100
    with pytest.raises(ValueError, match=r"method 'lora' does not fit net .*peft"):
        analysis.cost(plain(), batch=4, input_shape=(3, 16, 16), method=["bp", "lora"])
    with pytest.raises(ValueError, match="training in a subspace"):
        analysis.cost(plain(), batch=4, input_shape=(3, 16, 16), method=["bp", "lance"], update="subspace")


def test_layers_without_a_method_stay_as_they_are() -> None:
    """A convolution in one dimension is tuned, counted among the papers' bytes, and not compressed."""
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 6), nn.Linear(6, 2))
    report = analysis.cost(net, batch=5, input_shape=(3, 11))
    assert report.tuned_layers == ("0", "2")
    assert "Methods leave the input of 0 as it is: no method knows Conv1d" in report.remark
    row = next(row for row in report.rows if row.path == "0")
    assert row.methods["lance"] == row.methods["bp"]


def test_a_report_without_a_tape_prints_and_writes() -> None:
    """The tape's place is PyTorch's; what is not known is left out, not 0."""
    report = analysis.cost(between(nn.Hardshrink()), batch=2, input_shape=(3, 8, 8), tune="all", loss=summed)
    text = " ".join(render(report).split())
    assert "tape: none: hardshrink has no counterpart among this library's operations (in 1)" in text
    assert "with lance what PyTorch keeps for the backward pass" in text
    assert "tape + factors" not in text
    assert "elementwise" not in text
    assert "classes" not in render(report).splitlines()[0]
    document = json.loads(report.json_text())
    assert document["num_classes"] is None
    assert set(document["totals"]["bp"]["activation_bytes"]) == {"paper", "pytorch"}
    assert document["totals"]["bp"]["elementwise"] is None
    total = sum(row.methods["bp"].activation_bytes["pytorch"] for row in report.rows)
    assert document["totals"]["bp"]["activation_bytes"]["pytorch"] == total
    assert document["notes"]["tape"] == f"none: {report.no_tape}"
    assert report.csv_text().splitlines()[0].startswith("name,op,")
    assert "tape" not in report.csv_text().splitlines()[0]
    with pytest.raises(ValueError, match="expected some of paper, pytorch"):
        render(report, ["tape"])


def test_the_command_measures(capsys: pytest.CaptureFixture[str]) -> None:
    """The hooks of a real step, the observer of a real step and PyTorch's counter say what was predicted."""
    with one_thread():
        assert main([*PLAIN, "--tune", "all", "--measure"]) == 0
    printed = capsys.readouterr().out
    assert "tuned: 2 layers and the classifier head" in printed
    assert "no difference" in printed


def test_a_wrong_prediction_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte or a multiply-add too many is seen."""
    from dataclasses import replace

    from analysis.check.torch_measure import compare_module
    from analysis.reports.predict import predict_torch

    prediction = predict_torch(plain(), "plain", 4, input_shape=(3, 16, 16), methods="bp")
    with one_thread():
        assert compare_module(prediction).agrees
        step = prediction.step
        kept = (replace(step.kept[0], nbytes=step.kept[0].nbytes + 1), *step.kept[1:])
        assert not compare_module(replace(prediction, step=replace(step, kept=kept))).agrees
        macs = {**step.macs, ("6", "grad_weight"): step.macs["6", "grad_weight"] + 1}
        assert not compare_module(replace(prediction, step=replace(step, macs=macs))).agrees


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--net", "torch_nets:raising"], "the factory raised KeyError: 'no weights' (torch_nets.py, line"),
        (["--net", "torch_nets:all_frozen", "--input-shape", "3,16,16"], "nothing trains"),
        ([*PLAIN[:2], "--input-shape", "3,15,15"], "cannot run on inputs (128, 3, 15, 15)"),
        ([*PLAIN, "--loss", "torch_nets:many_numbers"], "gave a tensor of shape (4, 10)"),
        ([*PLAIN, "--loss", "torch_nets:nothing"], "--loss 'torch_nets:nothing' cannot be imported"),
        ([*PLAIN, "--loss", "torch_nets"], "expected pkg.module:function"),
        ([*PLAIN, "--freeze", "nowhere*"], "--freeze 'nowhere*' matches no parameter"),
        ([*PLAIN, "--num-classes", "5"], "num_classes is 5, but net 'torch_nets:plain' gives 10"),
        ([*PLAIN, "--dtype", "float64"], "--dtype has no effect here"),
        ([*PLAIN, "--continual", "3"], "--continual has no effect here"),
        ([*PLAIN, "--engine", "device"], "--engine has no effect here"),
        ([*PLAIN[:2], "--input-shape", "3,16,16:complex"], "expected [name=]shape[:dtype]"),
        (["--net", "resnet8", "--freeze", "*"], "--freeze has no effect here: it is for modules of PyTorch"),
        (["--net", "resnet8", "--input-shape", "x=3,32,32"], "--input-shape has names"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """One line, exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in errors
    assert errors.count("\n") == 1


def test_options_reach_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Freezing, autocast, and a loss of one's own."""

    def bytes_of(*more: str) -> Any:
        assert main([*PLAIN, "--method", "bp", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    plainly, half = bytes_of(), bytes_of("--autocast", "bfloat16")
    assert half["dtype"] == "float32, autocast bfloat16"
    frozen = bytes_of("--freeze", "0.*", "--freeze", "2.*", "--freeze", "3.*")
    assert frozen["totals"]["bp"]["activation_bytes"]["paper"] == 0
    squares = bytes_of("--loss", "torch_nets:squares")
    assert "Loss: squares" in squares["notes"]["net"]
    assert squares["num_classes"] == plainly["num_classes"] == 10


def test_python_refuses_what_means_nothing() -> None:
    """Arguments of modules for our own nets, and the other way round."""
    with pytest.raises(ValueError, match="dtype is 'float64', which has no effect"):
        analysis.cost(plain(), input_shape=(3, 16, 16), dtype="float64")
    with pytest.raises(TypeError, match="freeze is for modules of PyTorch"):
        analysis.cost("resnet8", freeze=["*"])
    with pytest.raises(ValueError, match="autocast is 'int8'"):
        analysis.cost(plain(), input_shape=(3, 16, 16), autocast="int8")
    with pytest.raises(TypeError, match="input_shape is"):
        analysis.cost(plain(), input_shape=784)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one of them"):
        analysis.cost(plain(), input_shape=(3, 16, 16), inputs=torch.zeros(2, 3, 16, 16))


def test_without_pytorch_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of somebody else's class, where PyTorch cannot be imported."""
    from analysis.torch_modules import run

    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"python -m pip install -e '.\[torch\]'"):
        analysis.cost(plain(), input_shape=(3, 16, 16))


def test_a_factory_that_cannot_import_pytorch_names_the_extra(tmp_path: Path) -> None:
    """One line and exit code 2 from the command."""
    (tmp_path / "needs_torch.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(3, 2)\n")
    code = "import sys; sys.modules['torch'] = None; from analysis.cost_model import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--net", "needs_torch:make", "--input-shape", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "python -m pip install -e '.[torch]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_networks_of_our_own_never_need_pytorch() -> None:
    """It takes a second to import, and need not be there."""
    code = "import sys; from analysis import cost; cost('resnet8', batch=2); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_figure_of_a_module(tmp_path: Path) -> None:
    """The panels that a report can fill; the others, and a tape that there is not, are refused."""
    pytest.importorskip("matplotlib")
    from analysis.reports.plots import draw
    from analysis.reports.predict import predict_torch

    prediction = predict_torch(plain(), "plain", 4, input_shape=(3, 16, 16), ranks="0.25")
    figure = draw(prediction, tmp_path / "net.png", ("tape", "macs"))
    assert (tmp_path / "net.png").stat().st_size > 0
    assert "Where the tape's bytes sit" in figure.axes[0].get_title(loc="left")
    with pytest.raises(ValueError, match="panels are batch, expected some of tape, macs for a PyTorch module"):
        draw(prediction, None, ("tape", "batch"))
    without = predict_torch(between(nn.Hardshrink()), "net", 2, input_shape=(3, 8, 8), methods="bp", loss=summed)
    with pytest.raises(ValueError, match="has no tape: hardshrink"):
        draw(without, None, ("tape",))


def test_json_and_csv_have_the_tape(capsys: pytest.CaptureFixture[str]) -> None:
    """As those of other networks have it: rows add up to the total."""
    assert main([*PLAIN, "--method", "bp", "lance", "--ranks", "0.25", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    for method in ("bp", "lance"):
        rows = [row["methods"][method]["activation_bytes"]["tape"] for row in document["layers"]]
        assert sum(rows) == document["totals"][method]["activation_bytes"]["tape"] > 0
    assert main([*PLAIN, "--method", "bp", "--format", "csv"]) == 0
    assert "methods.bp.activation_bytes.tape" in capsys.readouterr().out.splitlines()[0]
