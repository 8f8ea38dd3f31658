"""Networks and arguments that are none: one line or an exception that fits, and clean names."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import analysis
from analysis.check.measure import compare
from analysis.commands import memory
from analysis.commands.cli import input_shape
from analysis.commands.names import plain, shown
from analysis.cost_model import main, predict
from analysis.peak.memory import measure_peak
from analysis.steps import nets
from lance_ref import nn, tune
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.lora import can_adapt
from lance_ref.nn.module import Parameter

NETS = """
from lance_ref import nn

def deep():
    return deep()

def a_class():
    return nn.Linear

def several():
    return (nn.Linear(4, 4), nn.Linear(4, 3))

def colours():
    raise ValueError("\\x1b[31mred\\nlines")

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("nothing")

def mute():
    raise Mute()

def leaves_later():
    class Leaves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        def forward(self, x):
            raise SystemExit(0)
    return Leaves()

def without_init():
    class Net(nn.Module):
        def __init__(self):
            pass
    return Net()

class Staged(nn.Module):
    given = None
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
    def forward(self, x):
        return self.b(self.a(x))
    def stages(self):
        return self.given

class OfNumbers(Staged):
    given = (3, 4)

class OfAClass(Staged):
    given = nn.Linear

class OfNothing(Staged):
    given = []

class Deep(Staged):
    def stages(self):
        return self.stages()

class Raising(Staged):
    def stages(self):
        raise RuntimeError("no\\x1b[31m\\nstages")

class NoFunction(Staged):
    stages = 3
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    sys.modules.pop("odd_nets", None)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--batch", "4", "--tune", "all"])
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "\x1b" not in err
    return err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deep", "RecursionError"),
        ("a_class", "returned the class Linear"),
        ("several", "returned a tuple"),
        ("colours", r"ValueError: \x1b[31mred lines"),
        ("mute", "the factory raised Mute"),
        ("leaves_later", "SystemExit: 0"),
        ("without_init", "does not call super().__init__()"),
    ],
)
def test_a_factory_that_gives_no_net_is_one_line(capsys: pytest.CaptureFixture[str], name: str, words: str) -> None:
    """A traceback, or an escape sequence on the terminal."""
    assert words in refused(capsys, "--net", f"odd_nets:{name}", "--input-shape", "4", "--method", "bp")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Staged", "stages() of the Staged gives a NoneType"),
        ("OfNumbers", "gives a int among others"),
        ("OfAClass", "gives a type"),
        ("OfNothing", "gives nothing"),
        ("Deep", "RecursionError"),
        ("Raising", r"raised RuntimeError: no\x1b[31m stages"),
        ("NoFunction", "not callable"),
    ],
)
def test_stages_that_are_none_are_one_line(capsys: pytest.CaptureFixture[str], name: str, words: str) -> None:
    """Whatever stages() does, it is named."""
    assert words in refused(capsys, "--net", f"odd_nets:{name}", "--input-shape", "4", "--method", "checkpoint")


def test_a_net_of_pytorch_is_told_how_to_come() -> None:
    """Where only networks of the library will do, it said "forward() missing 1 required positional argument"."""
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"net is a torch.nn.Module \(Linear\).*torch.onnx.export\(net"):
        predict(torch.nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"net": None}, "net is a NoneType"),
        ({"net": nn.Linear}, "net is the class Linear"),
        ({"net": 3}, "net is a int"),
        ({"batch": "64"}, "batch is '64', a str, expected an integer"),
        ({"batch": True}, "batch is 'True', a bool"),
        ({"batch": 2.0}, "batch is '2.0', a float"),
        ({"image_size": (3, 4)}, "image_size is"),
        ({"num_classes": "10"}, "num_classes is"),
        ({"input_shape": 784}, "input_shape is '784', a int, expected a sequence of integers"),
        ({"input_shape": "784"}, "input_shape is"),
        ({"input_shape": (28.0, 28.0)}, "input_shape is"),
        ({"tune": 4}, "tune is '4', a int, expected a sequence of strings"),
        ({"tune": ["head", 4]}, "tune is"),
        ({"method": 4}, "methods is"),
        ({"method": ["bp", None]}, "methods is"),
        ({"epsilon": "0.7"}, "epsilon is '0.7', a str, expected a number"),
        ({"epsilon": None}, "epsilon is"),
        ({"ranks": 0.5}, "ranks is '0.5', a float, expected a string"),
        ({"spectra": 3}, "spectra is"),
        ({"convention": None}, "convention is"),
        ({"dtype": np.float32}, "dtype is"),
        ({"continual": 2.5}, "continual is"),
        ({"protected": "half"}, "protected is"),
        ({"basis_batches": None}, "basis_batches is"),
        ({"optimizer": None}, "optimizer is"),
    ],
)
def test_an_argument_of_another_kind_is_a_type_error(arguments: dict[str, Any], named: str) -> None:
    """An AttributeError from inside, or a comparison that cannot be made."""
    with pytest.raises(TypeError) as error:
        analysis.cost(**{"net": "mlp", **arguments})
    assert str(error.value).startswith(named)


def test_numbers_of_numpy_are_numbers() -> None:
    """Sizes often come from arrays."""
    ours = analysis.cost("mlp", batch=2, input_shape=(20,), tune="all", method="bp")
    theirs = analysis.cost("mlp", batch=np.int64(2), input_shape=np.array([20]), tune=["*"], method=["bp"])
    assert ours.totals == theirs.totals


def test_any_input_shape_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Sequences were refused there and taken in Python."""
    (Path("sequences.py")).write_text(
        "from lance_ref import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(360, 2))\n"
    )
    sys.modules.pop("sequences", None)
    arguments = ["--net", "sequences:net", "--input-shape", "90,3", "--batch", "2", "--method", "bp"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["input_shape"] == [2, 90, 3]
    assert main([*arguments, "--measure"]) == 0
    assert "no difference" in capsys.readouterr().out
    for text in ("", "3,", "0", "3,-1", "a"):
        with pytest.raises(argparse.ArgumentTypeError, match="C,H,W or N or L,F"):
            input_shape(text)


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3), (2, 3, 4), (2, 1, 3, 2)])
def test_samples_of_any_shape_are_measured(shape: tuple[int, ...]) -> None:
    """Those of two dimensions came flat."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 4), nn.ReLU(), nn.Linear(4, 3))
    seen: list[tuple[int, ...]] = []
    net[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape) or None)
    comparison = compare(predict(net, 3, input_shape=shape, tune="all", methods=["bp"]))
    assert comparison.agrees
    assert set(seen) == {(3, *shape)}


class Steep(nn.Module):
    """Its first gradients are finite; one step of any size makes the next ones infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, rng=0), nn.Linear(4, 3, rng=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * 1e30) * 1e-8


@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum", "adam"])
def test_a_step_that_would_diverge_is_measured(optimizer: str) -> None:
    """Two steps were taken for the peak, and the second had "NaN gradient"."""
    net = Steep()
    tune(net, "all")
    x, labels = np.ones((4, 4), np.float32), np.zeros(4, np.int64)
    before = [p.data.copy() for p in net.parameters()]
    with np.errstate(over="ignore"):
        assert measure_peak(net, x, labels, optimizer) > 0
        assert measure_peak(net, x, labels, optimizer, parts=2) > 0
    for parameter, values in zip(net.parameters(), before, strict=True):
        np.testing.assert_array_equal(parameter.data, values)


def test_memory_is_asked_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 9000 pixels took 4.6 GB before they were refused; so did weights."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    prediction = predict("convnet", 2, 256, tune="head", methods=["bp"])
    with pytest.raises(MemoryError, match="a step of net 'convnet' at batch 2 would take"):
        compare(prediction)
    with pytest.raises(MemoryError, match="the weights of net 'mlp' would take"):
        nets.build("mlp", 10, (3, 9000, 9000), without_weights=False)
    assert nets.build("mlp", 10, (3, 9000, 9000), without_weights=True) is not None
    memory.check_memory(2**20, "what fits")


def test_the_smallest_limit_is_what_is_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the machine, of a control group, and none where nobody says."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_of_the_process", lambda: None)
    assert memory.available_bytes() is None
    memory.check_memory(2**80, "anything")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\n")
    assert memory.available_bytes() == 5 * 1024
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory.available_bytes() == 2000
    (tmp_path / "memory.current").write_text("4000\n")
    assert memory.available_bytes() == 0


def test_names_do_not_reach_the_terminal_as_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """A layer's name with an escape sequence: in tables, in the measurement, in JSON."""
    net = nn.Sequential({"\x1b[31mred\n": nn.Linear(4, 4), "\x07bell": nn.Linear(4, 3)})
    prediction = predict(net, 2, input_shape=(4,), tune="all", methods=["bp"])
    assert {row.name for row in prediction.report.rows} == {r"\x1b[31mred\n", r"\x07bell", "loss"}
    assert "\x1b" not in str(compare(prediction))
    assert prediction.report.to_json()["tuned_layers"] == [r"\x1b[31mred\n"]


def test_long_names_keep_their_end() -> None:
    """A path that is cut before the file's name tells nothing."""
    path = "/data/" + "folder/" * 40 + "the_network_that_i_meant.onnx"
    assert shown(path).endswith("the_network_that_i_meant.onnx'")
    assert len(shown(path)) == 82
    long = "/" + "a" * 20 + "/" + "x" * 79
    assert "x" * 79 in shown(long)
    assert shown("\x1b[0m\n") == r"'\x1b[0m\n'"
    assert plain("a\u202eb\tc") == r"a\u202eb\tc"


def test_parameters_of_a_shared_layer_stand_once() -> None:
    """Twice in the rows of a layer that is called twice; the total was nowhere."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.unused = Parameter(np.zeros(7, np.float32))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(self.a(x)))

    report = analysis.cost(Twice(), batch=2, input_shape=(4,), tune="all", method=["bp", "lora"])
    assert [row.parameters for row in report.rows if row.path == "a"] == [20, 0]
    assert {name: total["parameters"] for name, total in report.to_json()["totals"].items()} == {"bp": 42, "lora": 42}


def test_layers_that_compute_otherwise_are_not_adapted() -> None:
    """LoRA takes the place of a plain linear layer; another kind would lose what it does beside."""

    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.5

    assert can_adapt(nn.Linear(3, 2))
    assert not can_adapt(Halved(3, 2))
