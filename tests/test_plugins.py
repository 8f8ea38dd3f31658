"""A package that was never heard of here brings an operation and a network, and every command takes them."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THEIRS = """
import numpy as np

from analysis import OpCost, operation
from lance_ref import nn
from lance_ref.engine.autograd import Function
from lance_ref.models import net


class Square(Function):
    op = "square"

    @staticmethod
    def output_shape(x):
        return x.shape

    @staticmethod
    def forward(ctx, x):
        ctx.save_input("x", 0)
        return x * x

    @staticmethod
    def backward(ctx, grad_output):
        return (2 * ctx["x"] * grad_output,)


def square_cost(call):
    kept = [call.save_input("x", 0)] if call.on_tape else []
    return OpCost(elementwise=(3 if call.on_tape else 1) * call.n_out, tape=kept, pytorch=kept)


operation("square", cost=square_cost, twin=lambda torch, inputs, attributes: inputs[0] ** 2)


class Squared(nn.Module):
    def forward(self, x):
        return Square.apply(x)


@net("theirs", input_shape=(1, 16, 16), tune="all", options_for=lambda shape: {"in_channels": shape[0]})
def theirs(num_classes=10, in_channels=1, rng=None):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, rng=rng),
        Squared(),
        nn.Conv2d(8, 8, 3, stride=2, rng=rng),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(8, num_classes, rng=rng),
    )
"""


def install(folder: Path) -> Path:
    """A folder with the package and what an installer writes beside it."""
    package = folder / "site" / "their_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "for_lance_ref.py").write_text(THEIRS, encoding="utf-8")
    about = folder / "site" / "their_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n", encoding="utf-8")
    points = "[lance_ref.plugins]\ntheirs = their_package.for_lance_ref\n"
    (about / "entry_points.txt").write_text(points, encoding="utf-8")
    return folder / "site"


def write_method(folder: Path) -> Path:
    """The folder, with the module that the page on methods shows."""
    page = (ROOT / "docs" / "own_method.md").read_text(encoding="utf-8")
    (shown,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if block.startswith("# my_method.py")]
    (folder / "my_method.py").write_text(shown, encoding="utf-8")
    return folder


def run(
    words: list[str], path: Path | None, folder: Path, plugins: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LANCE_REF_PLUGINS"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (path, ROOT))))
    if plugins is not None:
        environment["LANCE_REF_PLUGINS"] = plugins
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def done(words: list[str], installed: Path) -> str:
    """What a command that succeeds prints, in a folder of its own."""
    finished = run(words, installed, installed.parent)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


ONE_AFTER_ANOTHER = """
import contextlib, gc, importlib, io, json, sys
found = {}
for name, (module, *words) in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = importlib.import_module(module).main(words)
        except SystemExit as ended:
            code = ended.code
    found[name] = code, out.getvalue(), err.getvalue()
    gc.freeze()  # what was imported is not searched again, each time that garbage is collected before a measurement
print(json.dumps(found))
"""
"""Each command's exit code and outputs. One process in place of many, each of which would import PyTorch again."""


class Commands:
    """What commands of one process printed, where the package and the method are plug-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words = json.dumps({name: line.split() for name, line in COMMANDS.items()})
        finished = run(["-c", ONE_AFTER_ANOTHER, words], install(folder), write_method(folder), "my_method")
        assert finished.returncode == 0, finished.stdout + finished.stderr
        self.found: dict[str, tuple[int, str, str]] = json.loads(finished.stdout)

    def done(self, name: str) -> str:
        """What the command printed; it must have succeeded."""
        code, out, err = self.found[name]
        assert code == 0, out + err
        return out


COST = ["-m", "analysis.cost_model", "--net", "theirs", "--batch", "8"]
COST_OF_NET = " ".join(COST[1:])
COST_OF_METHOD = "analysis.cost_model --net mcunet --image-size 32 --batch 4 --method bp fewer-bits --bits 10"
COMMANDS = {
    "net: measure": f"{COST_OF_NET} --tune all --measure",
    "net: json": f"{COST_OF_NET} --json",
    "net: csv": f"{COST_OF_NET} --format csv",
    "net: plot": f"{COST_OF_NET} --plot net.png",
    "net: plan": "analysis.plan --net theirs --budget 1MiB",
    "net: validate": "analysis.validate --quick --nets theirs --methods bp lance",
    "net: finetune": "experiments.finetune --quick --net theirs --methods bp lance --epochs 1 --output net.json",
    "method: measure": f"{COST_OF_METHOD} --measure",
    "method: json": f"{COST_OF_METHOD} --json",
    "method: csv": f"{COST_OF_METHOD} --format csv",
    "method: plot": f"{COST_OF_METHOD} --plot method.png",
    "method: help": "analysis.cost_model --help",
    "method: plan": "analysis.plan --net mcunet --image-size 32 --num-classes 10 --budget 4MiB --json "
    "--method fewer-bits bp",
    "method: validate": "analysis.validate --quick --nets mlp convnet --methods fewer-bits",
    "method: finetune": "experiments.finetune --quick --epochs 1 --methods bp fewer-bits fewer-bits@2 "
    "--output method.json",
    "without it": "analysis.cost_model --net mlp --method bp --bits 10",
    "too many": "analysis.cost_model --net mlp --method fewer-bits --bits 17",
    "misspelt": "analysis.cost_model --net mlp --method fewer-bit",
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("plugins"))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The package, installed in a folder that the test may change."""
    return install(tmp_path)


def test_the_cost_model_measures_it(commands: Commands) -> None:
    """Equal to the byte in every layer; the peak, of which it has no rule, is said to be estimated."""
    printed = commands.done("net: measure")
    assert "peak of operation 'square': no rule, an upper estimate is used" in printed
    assert "peak of memory of lance: not compared: at most" in printed
    assert "not replayed" not in printed


def test_every_format(commands: Commands) -> None:
    report = json.loads(commands.done("net: json"))
    assert (report["net"], {row["op"] for row in report["layers"]} >= {"square"}) == ("theirs", True)
    rows = list(csv.DictReader(commands.done("net: csv").splitlines()))
    assert "square" in {row["op"] for row in rows}
    commands.done("net: plot")
    assert (commands.folder / "net.png").read_bytes().startswith(b"\x89PNG")


def test_the_planner_takes_it(commands: Commands) -> None:
    printed = commands.done("net: plan")
    assert "theirs, input 1x16x16" in printed
    assert "peak of operation 'square': no rule, an upper estimate is used" in printed


def test_the_validation_takes_it(commands: Commands) -> None:
    """Each number of a real step is the predicted one."""
    assert "theirs" in commands.done("net: validate")


def test_it_can_be_fine_tuned(commands: Commands) -> None:
    """Its cells run in processes of their own, which load the plug-in for themselves."""
    assert "lance" in commands.done("net: finetune")
    assert json.loads((commands.folder / "net.json").read_text())["settings"]["net"] == "theirs"


def test_it_is_there_in_python(installed: Path) -> None:
    code = "import lance_ref; assert 'theirs' in lance_ref.models.names(); lance_ref.models.create('theirs')"
    done(["-c", code], installed)
    code = "import analysis; print(analysis.cost('theirs', batch=8).rows[1].op)"
    assert done(["-c", code], installed) == "square\n"


def test_a_module_of_the_folder_is_named_by_the_environment(tmp_path: Path) -> None:
    """Without an installation; several, with spaces and an empty name between."""
    (tmp_path / "my_plugin.py").write_text(THEIRS, encoding="utf-8")
    (tmp_path / "another.py").write_text("print('once')", encoding="utf-8")
    finished = run([*COST, "--json"], None, tmp_path, " my_plugin, another,,another")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("once\n{")
    assert '"op": "square"' in finished.stdout


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise SystemExit", "SystemExit"),
        (
            "from analysis import operation\noperation('relu', cost=print)",
            "ValueError: operation 'relu' is registered twice: its cost is analysis.rules.elementwise.",
        ),
        (
            "from lance_ref.models import net\nnet('mlp')",
            "ValueError: there is a network named 'mlp' already",
        ),
    ],
)
def test_a_plugin_that_fails_is_one_line(tmp_path: Path, text: str, cause: str) -> None:
    """Which, who names it, and why; nothing has run."""
    (tmp_path / "broken.py").write_text(text, encoding="utf-8")
    finished = run(COST, None, tmp_path, "broken")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.count("\n") == 1
    expected = "python -m analysis.cost_model: error: plug-in 'broken' (LANCE_REF_PLUGINS) cannot be imported: "
    assert finished.stderr.startswith(expected + cause)


def test_an_entry_point_that_fails_is_named(installed: Path) -> None:
    (installed / "their_package" / "for_lance_ref.py").unlink()
    finished = run(COST, installed, installed.parent)
    assert finished.returncode == 2
    assert "plug-in 'their_package.for_lance_ref' (entry point 'theirs' of lance_ref.plugins)" in finished.stderr


# ---- a method ------------------------------------------------------------------------------------


def test_a_method_is_predicted_and_measured(commands: Commands) -> None:
    """Its bytes are those of a real step; its setting is an option; the estimate of its peak is said to be one."""
    printed = commands.done("method: measure")
    assert "fewer-bits: activations in 16 bits, of which the last are dropped (bits 10)" in printed
    assert "peak of activation store 'fewer-bits': no rule, an upper estimate is used" in printed
    assert "no difference" in printed
    report = json.loads(commands.done("method: json"))
    bp, theirs = (report["totals"][name]["activation_bytes"]["paper"] for name in ("bp", "fewer-bits"))
    assert theirs * 2 == bp
    assert "fewer-bits" in commands.done("method: csv")
    commands.done("method: plot")
    assert (commands.folder / "method.png").read_bytes().startswith(b"\x89PNG")
    assert "--bits" in commands.done("method: help")


def test_a_method_is_planned(commands: Commands) -> None:
    """Every value of its grid, with the fidelity that the entry gives."""
    rows = json.loads(commands.done("method: plan"))["rows"]
    found = {row["setting"]: row["best"]["fidelity"] for row in rows if row["method"] == "fewer-bits"}
    assert set(found) == {"bits 8", "bits 12"}
    assert 0.9 < found["bits 8"] < found["bits 12"] < 1


def test_a_method_is_validated_and_trained(commands: Commands) -> None:
    """Also in the processes of a sweep; METHOD@VALUE sets its setting."""
    commands.done("method: validate")
    assert "fewer-bits@2" in commands.done("method: finetune")
    rows = {row["method"]: row for row in json.loads((commands.folder / "method.json").read_text())["rows"]}
    seeds = {name: row["seeds"][0] for name, row in rows.items()}
    assert seeds["fewer-bits"]["tape_bytes"] == seeds["fewer-bits"]["predicted_tape_bytes"] < seeds["bp"]["tape_bytes"]
    assert seeds["fewer-bits"]["loss"] != seeds["fewer-bits@2"]["loss"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("without it", "--bits has no effect here: it needs one of fewer-bits"),
        ("too many", "--bits is 17, expected a positive integer, at most 16"),
        ("misspelt", "expected some of bp, "),
    ],
)
def test_its_options_are_checked_as_ours_are(name: str, says: str, commands: Commands) -> None:
    code, printed, error = commands.found[name]
    assert (code, printed) == (2, "")
    assert says in error
    assert error.count("\n") == 1


def test_a_name_or_a_setting_that_is_taken(tmp_path: Path) -> None:
    """One line that says which."""
    for text, says in (
        ("from analysis import method; method('lance', 'mine')", "a method is called 'lance', which is taken"),
        ("from analysis import method; method('a b', 'mine')", "expected a word without spaces"),
        (
            "from analysis import Setting, method; method('x', 'y', settings=(Setting('patch', 1, int, 'z'),))",
            "setting 'patch' of method 'x' means something else in another method",
        ),
        (
            "from analysis import Setting, method; method('x', 'y', settings=(Setting('net', 1, int, 'z'),))",
            "setting 'net' of method x has the name of an option of this command",
        ),
    ):
        (tmp_path / "wrong.py").write_text(text, encoding="utf-8")
        finished = run(COST, None, tmp_path, "wrong")
        assert finished.returncode == 2
        assert says in finished.stderr
        assert finished.stderr.count("\n") == 1
