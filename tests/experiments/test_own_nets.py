"""Commands that train take a net and images of the user's own, and say whose weights these were."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_case import strict_json
from PIL import Image

from analysis import plan, spectra
from analysis.commands import sweep
from analysis.device import command as device_cli
from analysis.steps.net_choice import NetChoice
from experiments.continual import command as continual
from experiments.device import command as device_accuracy
from experiments.finetune import command as finetune
from lance_ref import datasets

MYNETS = """
from lance_ref import nn

def ours(num_classes=3):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes),
    )

def asked(num_classes):
    net = ours(num_classes)
    net.load_state_dict({name: 0.5 * array for name, array in net.state_dict().items()})
    return net

def five():
    return nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))

def six():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 6),
    )

def maps():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
"""
TORCH = """
import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.Bilinear(3, 3, 3)
        self.fold = nn.Fold((2, 2), 1)
    def forward(self, x):
        return torch.fft.fft(self.fold(self.lstm(x, x)))

odd = Odd
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of a user: two modules with nets, and images as arrays and as pictures."""
    (tmp_path / "mynets.py").write_text(MYNETS)
    (tmp_path / "torch_nets.py").write_text(TORCH)
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.integers(0, 60, (60, 8, 8), dtype=np.uint8)
    x[np.arange(60), y] += 150  # one bright row, another one for each class
    np.savez(tmp_path / "data.npz", x=x, y=y)
    np.savez(tmp_path / "five.npz", x=np.repeat(x[..., None], 5, 3), y=y)
    for i in range(30):
        folder = tmp_path / "pictures" / f"class{y[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i]).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LANCE_REF_THREADS", "1")
    # one after the other in this process: starting others takes longer than all that runs in them
    monkeypatch.setattr(sweep, "_in_processes", lambda tasks, jobs: ((task, sweep.run_cell(task)) for task in tasks))
    for name in ("mynets", "torch_nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)


SMALL = [
    "--quick", "--methods", "bp", "lance", "--tune", "last:1", "--epochs", "1", "--batch", "8",
    "--calibration-batches", "2", "--lr", "0.1", "--jobs", "1", "--output", "r.json", "--table", "r.md",
]  # fmt: skip


IN_PROCESSES = sweep._in_processes


def finetuned(*arguments: str) -> dict[str, Any]:
    assert finetune.main([*SMALL, *arguments]) == 0
    document: dict[str, Any] = strict_json(Path("r.json"))
    assert all(row["predicted_equals_measured"] for row in document["rows"])
    return document


def test_a_factory_and_arrays() -> None:
    """One channel, three classes: every predicted byte is the measured one, and the results name factory and file."""
    document = finetuned("--net", "mynets:ours", "--data", "data.npz")
    assert document["weights"]["origin"] == "user's factory"
    assert document["weights"]["words"] == "those of mynets:ours"
    assert document["weights"]["head"] == "own"
    assert document["images"]["shape"] == [8, 8, 1]
    assert document["images"]["sha256"] == datasets.checksum("data.npz")
    assert document["normalisation"] == "pixel / 255"
    assert "Weights: those of mynets:ours, with its own classifier. Images: data" in Path("r.md").read_text()


def test_a_factory_of_another_number_of_classes_gets_a_fresh_head() -> None:
    """Seven outputs, three classes, five channels, a normalisation of one's own."""
    document = finetuned("--net", "mynets:five", "--data", "five.npz", "--mean", "0.2", "--std", "0.5")
    assert document["weights"]["head"] == "fresh"
    assert document["images"]["shape"] == [8, 8, 5]
    assert document["normalisation"] == "(pixel / 255 - mean) / std, mean [0.2], std [0.5]"


def test_a_module_of_pytorch_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey pictures are read as RGB and made grey again; processes of their own find the user's module."""
    pytest.importorskip("torch")
    monkeypatch.setattr(sweep, "_in_processes", IN_PROCESSES)
    document = finetuned("--net", "torch_nets:net", "--data", "pictures", "--channels", "1", "--seeds", "2")
    assert document["weights"]["origin"] == "user's factory"
    assert document["images"]["shape"] == [8, 8, 1]
    assert document["images"]["classes"] == 3
    rows = {row["method"]: row["seeds"] for row in document["rows"]}
    assert rows["bp"][0]["loss"] != rows["bp"][1]["loss"]


def export(path: str = "net.onnx", classes: int = 3) -> None:
    """A file of two convolutions and a classifier, for any batch."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)
    weights = {"a": (4, 1, 3, 3), "b": (6, 4, 3, 3), "c": (classes, 6), "d": (classes,)}
    stored = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), name) for name, s in weights.items()]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("Conv", ["q", "b"], ["r"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["r"], ["s"]),
        helper.make_node("Flatten", ["s"], ["t"]),
        helper.make_node("Gemm", ["t", "c", "d"], ["y"], transB=1),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 1, 8, 8]), ("y", ["n", classes]))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_an_onnx_file(tmp_path: Path) -> None:
    """File name and checksum stand in the results; channels and size of the file are those of the images."""
    export()
    document = finetuned("--net", "net.onnx", "--data", "pictures")
    assert document["weights"]["origin"] == "ONNX file"
    assert document["weights"]["file"] == "net.onnx"
    assert len(document["weights"]["sha256"]) == 64
    assert document["images"]["shape"] == [8, 8, 1]
    assert (NetChoice("net.onnx").channels, NetChoice("net.onnx").image_size) == (1, 8)


def test_an_onnx_file_of_another_number_of_classes() -> None:
    """Its last layer is replaced in place, and the rest of the graph runs as before."""
    export(classes=11)
    net, weights = NetChoice("net.onnx").make(3, (1, 8, 8), 0)
    x = np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)
    assert net(x).shape == (2, 3)
    assert weights.head == "fresh"
    assert not np.array_equal(net(x).data, NetChoice("net.onnx").make(3, (1, 8, 8), 1)[0](x).data)


def test_a_built_in_net_says_what_it_started_from(data_dir: Path) -> None:
    """Pretrained: the file and its checksum, and whether the classifier is the file's own."""
    _, weights = NetChoice("resnet8").make(10, (3, 32, 32), 0)
    assert (weights.origin, weights.file, weights.head) == ("pretrained file", "mlperf_tiny_resnet8.npz", "own")
    assert NetChoice("resnet8").make(3, (3, 32, 32), 0)[1].head == "fresh"
    assert NetChoice("convnet").make(3, (3, 32, 32), 0)[1].origin == "freshly initialised"


def test_changed_code_runs_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Finished runs of a net that has changed since, or of changed images, are not taken for those of the new one."""
    first = finetuned("--net", "mynets:asked", "--data", "data.npz", "--methods", "bp")
    assert finetuned("--net", "mynets:asked", "--data", "data.npz", "--methods", "bp")["rows"] == first["rows"]
    before = len(list(Path("runs/finetune").glob("*.json")))
    x = np.load("data.npz")
    np.savez("data.npz", x=255 - x["x"], y=x["y"])
    finetuned("--net", "mynets:asked", "--data", "data.npz", "--methods", "bp")
    assert len(list(Path("runs/finetune").glob("*.json"))) == before + 1


def test_built_in_cells_keep_their_names() -> None:
    """Nothing of the new options stands in a cell where none was given, so that finished runs are found again."""
    options = finetune.checked(finetune.parser().parse_args(["--quick"]))
    cell = finetune.cell(options, "bp", 0, 0.1)
    assert not {"channels", "mean", "std", "own"} & set(cell)
    own = finetune.checked(finetune.parser().parse_args(["--quick", "--data", "data.npz"]))
    assert finetune.cell(own, "bp", 0, 0.1)["own"]


def test_spectra_of_own_arrays_and_nets() -> None:
    """The same --net and --data; labels are not needed."""
    np.savez("unlabelled.npz", x=np.load("data.npz")["x"])
    common = ["--input-shape", "1,8,8", "--batch", "8", "--batches", "2", "--output", "s.json"]
    for net in ("mynets:ours", "mynets:ours"):
        assert spectra.main(["--net", net, "--data", "unlabelled.npz", *common]) == 0
    provenance = json.loads(Path("s.json").read_text())
    assert "unlabelled" in json.dumps(provenance)


def test_the_planner_and_device_programs_take_a_module_of_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    """It is converted; a net with parts that have no counterpart is refused, and all of them are listed."""
    pytest.importorskip("torch")
    shape = ["--input-shape", "1,8,8"]
    assert device_cli.main(["--net", "torch_nets:net", "--method", "bp", "--tune", "last:1", *shape]) == 0
    assert "torch_nets:net, input 1x8x8, 3 classes" in capsys.readouterr().out
    arguments = ["--budget", "1MiB", "--batch", "2", "--method", "bp", "head-only", "--engine", "library"]
    assert plan.main(["--net", "torch_nets:net", *arguments, *shape]) == 0
    assert "torch_nets:net" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        device_cli.main(["--net", "torch_nets:odd", "--method", "bp", *shape])
    error = capsys.readouterr().err
    assert "Bilinear" in error
    assert "Fold" in error
    assert "fft" in error
    assert error.count("\n") == 1


def test_accuracy_over_ram_of_an_own_net() -> None:
    """The experiment of device programs takes the same net and images."""
    arguments = [
        "--quick", "--net", "mynets:ours", "--data", "data.npz", "--methods", "bp", "--updates", "batch",
        "--epochs", "1", "--batch", "8", "--batch-rates", "0.1", "0.2", "--jobs", "1", "--output", "d.json",
    ]  # fmt: skip
    assert device_accuracy.main(arguments) == 0
    assert strict_json(Path("d.json"))["weights"]["words"] == "those of mynets:ours"


CONTINUAL = [
    "--data", "data.npz", "--classes-per-task", "3", "--learners", "finetune", "lance", "--seeds", "1", "--epochs", "1",
    "--batch", "8", "--basis-samples", "16", "--output", "c.json",
]  # fmt: skip


@pytest.mark.parametrize("net", ["mynets:six", "six.onnx", "convnet"])
def test_tasks_of_own_images(net: str) -> None:
    """Six classes in two tasks, a head for each in place of the last layer; bytes and multiply-adds as predicted."""
    data = np.load("data.npz")
    np.savez("data.npz", x=data["x"], y=np.arange(60) % 6)
    if net.endswith(".onnx"):
        export(net, 6)
    assert continual.main(["--net", net, *CONTINUAL]) == 0
    document = strict_json(Path("c.json"))
    assert all(row["predicted_equals_measured"] for row in document["rows"])
    assert document["images"]["sha256"] == datasets.checksum("data.npz")
    origin = {"mynets:six": "user's factory", "six.onnx": "ONNX file", "convnet": "freshly initialised"}
    assert document["weights"]["origin"] == origin[net]


def test_classes_that_cannot_be_shared_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Three classes, two a task."""
    with pytest.raises(SystemExit):
        continual.main(["--data", "data.npz", "--learners", "finetune"])
    assert "--classes-per-task is 2, but data has 3 classes" in capsys.readouterr().err


WRONG = {
    "no such module": (["--net", "nowhere:net"], "net 'nowhere:net' cannot be imported"),
    "no such function": (["--net", "mynets:nothing"], "cannot be imported"),
    "no scores": (["--net", "mynets:maps"], "does not give scores (batch, classes)"),
    "wrong channels": (
        ["--net", "mynets:five"],
        "; --channels and --image-size say what the images of data.npz become",
    ),
    "no such file": (["--net", "none.onnx"], "expected the name of an ONNX file that is there"),
    "no such net": (["--net", "vgg"], "--net is 'vgg', expected one of"),
    "no such data": (["--data", "none.npz"], "--data is 'none.npz', expected one of"),
    "a file of another kind": (["--data", "mynets.py"], "it is there, but is none of these"),
    "mean alone": (["--mean", "0.5"], "expected both or none"),
    "two means": (["--mean", "0.5", "0.1", "--std", "1"], "mean is [0.5, 0.1], but the images have 1 channel"),
    "no such layer": (["--tune", "encoder.*"], "--tune is 'encoder.*' for mynets:ours"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What came and what was expected, before any training."""
    wrong, said = WRONG[case]
    with pytest.raises(SystemExit) as exit_info:
        finetune.main([*SMALL, "--net", "mynets:ours", "--data", "data.npz", *wrong])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
