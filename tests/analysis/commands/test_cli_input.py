"""`python -m analysis.cost_model` on nets and options of the user's own: one line and exit code 2 for every bad one."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cli_case import CASE, RANKS, ROOT, run_json

from analysis.cost_model import cost, main, predict
from lance_ref import models

# ---- users' nets ---------------------------------------------------------------------------

USER_MODULE = """
from lance_ref import nn

def with_classes(num_classes):
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pooled, nn.Linear(4, num_classes))

def without():
    return with_classes(7)

NET = without()

def small(num_classes=5):
    return with_classes(num_classes)

class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)]
        self.head = nn.Linear(4, 5)
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))

class Hidden(Listed):
    def __init__(self):
        super().__init__()
        self.layers = [self.layers]
    def forward(self, x):
        for layer in self.layers[0]:
            x = layer(x)
        return self.head(x.mean((2, 3)))

class Sight(Hidden):
    def __init__(self):
        super().__init__()
        for layer in self.layers[0]:
            layer.requires_grad_(False)

def fails(num_classes=2):
    raise RuntimeError("out of\\n luck")

def leaves():
    raise SystemExit(3)

def none():
    return None

number = 3

def bare():
    return nn.ReLU()

def silent():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)
        def forward(self, x):
            self.layer(x)
    return Silent()

def crashes():
    class Crash(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x):
            return {}["missing"]
    return Crash()

def biasless():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), pooled, nn.Linear(4, 5))

def looks():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x):
            return self.b(self.a(x)) if x.data.sum() > 0 else x
    return Looks()
"""


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a module of nets."""
    (tmp_path / "own_nets.py").write_text(USER_MODULE)
    (tmp_path / "broken_nets.py").write_text("def net(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name in ("own_nets", "broken_nets"):
        sys.modules.pop(name, None)
    return tmp_path


def test_factories_of_the_current_folder(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """Called with num_classes= if that was given and it takes it, else with nothing; a Module is taken as it is."""
    arguments = ["--batch", "2", "--image-size", "8", "--tune", "all", "--net"]
    assert run_json(capsys, *arguments, "own_nets:with_classes", "--num-classes", "3")["num_classes"] == 3
    for net, classes in (("small", 5), ("without", 7), ("NET", 7)):
        assert run_json(capsys, *arguments, f"own_nets:{net}")["num_classes"] == classes
    assert run_json(capsys, *arguments, "own_nets:without", "--num-classes", "7")["num_classes"] == 7


def test_num_classes_in_python(folder: Path) -> None:
    """The same rules for cost(): 1000 by default for a name, a net's own for a net, and no other."""
    assert cost("resnet18", batch=1, tune="head", method="bp").num_classes == 1000
    assert cost("own_nets:small", batch=2, image_size=8, method="bp").num_classes == 5
    step = predict(models.create("convnet", num_classes=4), 2, methods="bp").step
    assert cost(step, num_classes=4, method="bp").num_classes == 4
    for net in (step.net, step):
        with pytest.raises(ValueError, match=r"num_classes is 9, but net .* gives 4, whatever is asked for"):
            cost(net, num_classes=9, method="bp")


def test_frozen_layers_may_be_anywhere(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """What does not train need not be registered."""
    arguments = ["--net", "own_nets:Sight", "--batch", "2", "--image-size", "8", "--tune", "head"]
    assert run_json(capsys, *arguments)["tuned_layers"] == []


def test_both_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    """--methods is --method, and --json is --format json, as elsewhere."""
    arguments = ["--net", "mlp", "--batch", "2"]
    assert main([*arguments, "--methods", "bp", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == run_json(capsys, *arguments, "--method", "bp")


# ---- bad input -----------------------------------------------------------------------------

BAD = {
    "no net": ([], "--net"),
    "unknown net": (["--net", "vgg"], "mobilenetv2"),
    "width of a net without": (["--net", "resnet18@0.5"], "mobilenetv2 and mobilenetv3-small"),
    "width that is no number": (["--net", "mobilenetv2@wide"], "mobilenetv2@WIDTH"),
    "no width": (["--net", "mobilenetv2@"], "mobilenetv2@WIDTH"),
    "width of nan": (["--net", "mobilenetv2@nan"], "up to 16"),
    "enormous width": (["--net", "mobilenetv2@1e6"], "up to 16"),
    "no such module": (["--net", "no_such_package.module:factory"], "no_such_package"),
    "no such factory": (["--net", "own_nets:missing"], "missing"),
    "half a factory": (["--net", "own_nets:"], "pkg.module:factory"),
    "syntax error": (["--net", "broken_nets:net"], "SyntaxError"),
    "classes of its own": (["--net", "own_nets:without", "--image-size", "8", "--num-classes", "9"], "gives 7"),
    "file for a module": (["--net", "nets/own.py:net"], "not of its file: nets.own:net"),
    "layers in a list": (["--net", "own_nets:Listed"], "layers of the Listed is a list with 4 parameters (4x3x3x3, 4,"),
    "layers that nothing finds": (["--net", "own_nets:Hidden"], "own_nets:Hidden' computes with 4 parameters (4x3x3x3"),
    "factory raises": (["--net", "own_nets:fails"], "RuntimeError: out of luck (own_nets.py, line "),
    "factory exits": (["--net", "own_nets:leaves"], "SystemExit"),
    "factory gives None": (["--net", "own_nets:none"], "NoneType"),
    "factory is a number": (["--net", "own_nets:number"], "int"),
    "net without layers": (["--net", "own_nets:bare"], "no convolution or linear"),
    "net without a result": (["--net", "own_nets:silent", "--image-size", "8", "--tune", "all"], "gives a NoneType"),
    "forward raises": (
        ["--net", "own_nets:crashes", "--input-shape", "4", "--tune", "all"],
        "'missing' (own_nets.py, line ",
    ),
    "forward looks at values": (["--net", "own_nets:looks", "--input-shape", "4", "--tune", "all"], "has no data"),
    "input does not fit": (["--net", "mobilenetv2", "--input-shape", "4,224,224"], "(128, 4, 224, 224)"),
    "image too small": (["--net", "own_nets:without", "--image-size", "2", "--tune", "all"], "empty"),
    "glob without match": (["--net", "resnet18", "--tune", "layer9.*"], "layer9.*"),
    "one glob of two without match": (["--net", "resnet18", "--tune", "layer4.*", "layer9.*"], "layer9.*"),
    "more layers than there are": (["--net", "resnet18", "--tune", "last:99"], "last:99"),
    "last of nothing": (["--net", "resnet18", "--tune", "last:0"], "last:0"),
    "last of a word": (["--net", "resnet18", "--tune", "last:x"], "last:x"),
    "negative batch": (["--net", "resnet18", "--batch", "-1"], "batch is -1"),
    "zero batch": (["--net", "resnet18", "--batch", "0"], "batch is 0"),
    "batch of words": (["--net", "resnet18", "--batch", "many"], "'many'"),
    "zero image size": (["--net", "resnet18", "--image-size", "0"], "--image-size is 0"),
    "zero classes": (["--net", "resnet18", "--num-classes", "0"], "--num-classes is 0"),
    "input shape of words": (["--net", "resnet18", "--input-shape", "3,x,8"], "C,H,W or N"),
    "input shape of two": (["--net", "resnet18", "--input-shape", "8,8"], "(128, 8, 8)"),
    "input shape with zero": (["--net", "resnet18", "--input-shape", "3,0,8"], "C,H,W or N"),
    "epsilon zero": (["--net", "resnet18", "--epsilon", "0"], "(0, 1]"),
    "epsilon above one": (["--net", "resnet18", "--epsilon", "1.01"], "(0, 1]"),
    "epsilon nan": (["--net", "resnet18", "--epsilon", "nan"], "(0, 1]"),
    "unknown method": (["--net", "resnet18", "--method", "bp", "hosvdd"], "bp, head-only"),
    "method twice": (["--net", "resnet18", "--method", "bp", "bp"], "each once"),
    "all and one more": (["--net", "resnet18", "--method", "all", "bp"], "or all alone"),
    "method that does not fit": (["--net", "convnet", "--method", "lora"], "1x1 convolution of one group"),
    "too many segments": (["--net", "convnet", "--method", "checkpoint", "--segments", "9"], "segments is 9"),
    "no segments": (["--net", "convnet", "--method", "checkpoint", "--segments", "0"], "segments is 0"),
    "uneven micro-batch": (["--net", "convnet", "--method", "micro-batch", "--micro-batch", "3"], "divisor of batch"),
    "lora of rank 0": (["--net", "mlp", "--method", "lora", "--lora-rank", "0"], "--lora-rank is 0"),
    "patch of 0": (["--net", "mlp", "--method", "gradient-filter", "--patch", "0"], "patch is 0"),
    "ratio nan": (["--net", "mlp", "--method", "sketch", "--ratio", "nan"], "ratio is nan"),
    "no calibration": (["--net", "mlp", "--calibration-batches", "0"], "--calibration-batches is 0"),
    "biases that are not there": (["--net", "own_nets:biasless", "--tune", "all", "--method", "bias-only"], "no bias"),
    "unknown convention": (["--net", "resnet18", "--convention", "macs"], "macs"),
    "unknown accounting": (["--net", "resnet18", "--accounting", "disk"], "disk"),
    "unknown dtype": (["--net", "resnet18", "--dtype", "float16"], "float16"),
    "unknown option": (["--net", "resnet18", "--speed"], "--speed"),
    "ranks above one": (["--net", "resnet18", "--ranks", "1.5"], "(0, 1]"),
    "ranks zero": (["--net", "resnet18", "--ranks", "0"], "(0, 1]"),
    "ranks of words": (["--net", "resnet18", "--ranks", "half"], "(0, 1]"),
    "rank over its mode": ([*CASE, "--ranks", RANKS.replace("160", "961")], "1 to 960"),
    "rank zero": ([*CASE, "--ranks", RANKS.replace("160", "0")], "1 to 960"),
    "rank negative": ([*CASE, "--ranks", RANKS.replace("160", "-1")], "1 to 960"),
    "too few ranks": ([*CASE, "--ranks", RANKS.replace("160,", "")], "expected 4 ranks"),
    "layer not tuned": ([*CASE, "--ranks", "features.0.0=64,3,2,2"], "features.0.0"),
    "layer twice": ([*CASE, "--ranks", f"{RANKS};features.18.0=1,1,1,1"], "twice"),
    "ranks and spectra": ([*CASE, "--ranks", "0.5", "--spectra", "x.json"], "expected one of them"),
    "missing spectra": (
        ["--net", "resnet18", "--spectra", "nowhere.json"],
        "spectra file 'nowhere.json' (--spectra): No such",
    ),
    "folder as spectra": (["--net", "resnet18", "--spectra", "."], "spectra file .: is no ordinary file"),
    "no json": (["--net", "resnet18", "--spectra", "own_nets.py"], "own_nets.py"),
    "output into nowhere": (["--net", "resnet18", "--tune", "head", "--output", "no/such/x.json"], "no/such"),
    "output onto a folder": (["--net", "resnet18", "--tune", "head", "--output", "."], "folder"),
    "figure of another kind": (["--net", "resnet18", "--plot", "figure.pdf"], ".png or .svg"),
    "figure without suffix": (["--net", "resnet18", "--plot", "figure"], ".png or .svg"),
    "figure into nowhere": (["--net", "resnet18", "--plot", "no/such/x.png"], "no/such"),
    "unknown panel": (["--net", "resnet18", "--plot", "x.png", "--panels", "tape", "disk"], "disk"),
    "panel twice": (["--net", "mlp", "--plot", "x.png", "--panels", "tape", "tape"], "each once"),
    "panels without a figure": (["--net", "resnet18", "--panels", "tape"], "--plot"),
    "unknown optimiser": (["--net", "resnet18", "--optimizer", "lion"], "lion"),
    "one task": (["--net", "mlp", "--continual", "1"], "tasks is 1, expected at least 2"),
    "tasks of words": (["--net", "mlp", "--continual", "many"], "'many'"),
    "all protected": (["--net", "mlp", "--continual", "3", "--protected", "1"], "--protected is 1, expected"),
    "protected nan": (["--net", "mlp", "--continual", "3", "--protected", "nan"], "protected is nan"),
    "no basis batches": (["--net", "mlp", "--continual", "3", "--basis-batches", "0"], "--basis-batches is 0"),
    "protected without tasks": (["--net", "mlp", "--protected", "0.5"], "--continual"),
    "basis batches without tasks": (["--net", "mlp", "--basis-batches", "3"], "--continual"),
    "tasks for groups": (["--net", "mobilenetv2", "--continual", "2"], "groups"),
    "data without measuring": (["--net", "resnet18", "--data", "digits"], "--measure"),
    "unknown data": (
        ["--net", "convnet", "--tune", "head", "--batch", "2", "--measure", "--data", "nowhere"],
        "nowhere",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], folder: Path, name: str) -> None:
    """Exactly one line that names what came, nothing on stdout, no file."""
    arguments, named = BAD[name]
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    captured = capsys.readouterr()
    assert exit_info.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert named in captured.err
    assert [p for p in sorted(folder.iterdir()) if p.name != "__pycache__"] == before


def test_bad_input_of_a_real_process(folder: Path) -> None:
    """The same through the shell: exit code 2, one line, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "analysis.cost_model", "--net", "own_nets:fails"],
        capture_output=True, text=True, cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "python -m analysis.cost_model: error: net 'own_nets:fails': the factory raised RuntimeError: out of luck "
        f"(own_nets.py, line {1 + USER_MODULE.splitlines().index('def fails(num_classes=2):') + 1})"
    ]


def test_an_output_is_written_whole_or_not_at_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure while writing leaves what was there before, and nothing beside it."""
    target = tmp_path / "report.json"
    arguments = ["--net", "resnet18", "--tune", "head", "--format", "json", "--output", str(target)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(target.read_text())["schema"] == 1
    target.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.endswith("error: disk is full\n")
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert target.read_text() == "before"


def test_output_of_a_table_and_its_mode(tmp_path: Path) -> None:
    """A table goes to the file without colours, readable as any file of the user's."""
    target = tmp_path / "report.txt"
    assert main(["--net", "resnet18", "--tune", "head", "--output", str(target)]) == 0
    assert "\x1b" not in target.read_text()
    assert stat.S_IMODE(target.stat().st_mode) & 0o400


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """A renamed file must not take the place of /dev/null, nor of the target of a link."""
    assert main(["--net", "resnet18", "--tune", "head", "--output", os.devnull]) == 0
    assert not Path(os.devnull).is_file()
    target, link = tmp_path / "target", tmp_path / "link"
    target.touch()
    link.symlink_to(target)
    assert main(["--net", "resnet18", "--tune", "head", "--output", str(link)]) == 0
    assert link.is_symlink()
    assert target.read_text()


def test_a_piped_table_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe may have any encoding, and the table must get through it."""
    assert main(["--net", "mobilenetv2", "--batch", "8"]) == 0
    assert capsys.readouterr().out.isascii()
