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


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the package and what an installer writes beside it."""
    package = tmp_path / "site" / "their_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "for_lance_ref.py").write_text(THEIRS, encoding="utf-8")
    about = tmp_path / "site" / "their_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n", encoding="utf-8")
    points = "[lance_ref.plugins]\ntheirs = their_package.for_lance_ref\n"
    (about / "entry_points.txt").write_text(points, encoding="utf-8")
    return tmp_path / "site"


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


COST = ["-m", "analysis.cost_model", "--net", "theirs", "--batch", "8"]


def test_the_cost_model_measures_it(installed: Path) -> None:
    """Equal to the byte in every layer; the peak, of which it has no rule, is said to be estimated."""
    printed = done([*COST, "--tune", "all", "--measure"], installed)
    assert "peak of operation 'square': no rule, an upper estimate is used" in printed
    assert "peak of memory of lance: not compared: at most" in printed
    assert "not replayed" not in printed


def test_every_format(installed: Path) -> None:
    report = json.loads(done([*COST, "--json"], installed))
    assert (report["net"], {row["op"] for row in report["layers"]} >= {"square"}) == ("theirs", True)
    rows = list(csv.DictReader(done([*COST, "--format", "csv"], installed).splitlines()))
    assert "square" in {row["op"] for row in rows}
    done([*COST, "--plot", "x.png"], installed)
    assert (installed.parent / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_planner_takes_it(installed: Path) -> None:
    printed = done(["-m", "analysis.plan", "--net", "theirs", "--budget", "1MiB"], installed)
    assert "theirs, input 1x16x16" in printed
    assert "peak of operation 'square': no rule, an upper estimate is used" in printed


def test_the_validation_takes_it(installed: Path) -> None:
    """Its cells run in processes of their own, which load the plug-in for themselves."""
    done(["-m", "analysis.validate", "--quick", "--nets", "theirs", "--methods", "bp", "lance"], installed)


def test_it_can_be_fine_tuned(installed: Path) -> None:
    words = ["-m", "experiments.finetune", "--quick", "--net", "theirs", "--methods", "bp", "lance", "--epochs", "1"]
    assert "lance" in done([*words, "--output", "x.json"], installed)
    assert json.loads((installed.parent / "x.json").read_text())["settings"]["net"] == "theirs"


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


@pytest.fixture
def with_method(tmp_path: Path) -> Path:
    """The module that the page on methods shows, in a folder where commands run."""
    page = (ROOT / "docs" / "own_method.md").read_text(encoding="utf-8")
    (shown,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if block.startswith("# my_method.py")]
    (tmp_path / "my_method.py").write_text(shown, encoding="utf-8")
    return tmp_path


def with_it(words: list[str], folder: Path) -> str:
    finished = run(words, None, folder, "my_method")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


COST_OF_IT = ["-m", "analysis.cost_model", "--net", "mcunet", "--image-size", "32", "--batch", "4", "--method", "bp"]


def test_a_method_is_predicted_and_measured(with_method: Path) -> None:
    """Its bytes are those of a real step; its setting is an option; the estimate of its peak is said to be one."""
    words = [*COST_OF_IT, "fewer-bits", "--bits", "10"]
    printed = with_it([*words, "--measure"], with_method)
    assert "fewer-bits: activations in 16 bits, of which the last are dropped (bits 10)" in printed
    assert "peak of activation store 'fewer-bits': no rule, an upper estimate is used" in printed
    assert "no difference" in printed
    report = json.loads(with_it([*words, "--json"], with_method))
    bp, theirs = (report["totals"][name]["activation_bytes"]["paper"] for name in ("bp", "fewer-bits"))
    assert theirs * 2 == bp
    assert "fewer-bits" in with_it([*words, "--format", "csv"], with_method)
    with_it([*words, "--plot", "x.png"], with_method)
    assert (with_method / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "--bits" in with_it(["-m", "analysis.cost_model", "--help"], with_method)


def test_a_method_is_planned(with_method: Path) -> None:
    """Every value of its grid, with the fidelity that the entry gives."""
    words = ["-m", "analysis.plan", "--net", "mcunet", "--image-size", "32", "--num-classes", "10", "--budget", "4MiB"]
    rows = json.loads(with_it([*words, "--json", "--method", "fewer-bits", "bp"], with_method))["rows"]
    found = {row["setting"]: row["best"]["fidelity"] for row in rows if row["method"] == "fewer-bits"}
    assert set(found) == {"bits 8", "bits 12"}
    assert 0.9 < found["bits 8"] < found["bits 12"] < 1


def test_a_method_is_validated_and_trained(with_method: Path) -> None:
    """Also in the processes of a sweep; METHOD@VALUE sets its setting."""
    with_it(["-m", "analysis.validate", "--quick", "--nets", "mlp", "convnet", "--methods", "fewer-bits"], with_method)
    words = ["-m", "experiments.finetune", "--quick", "--epochs", "1", "--methods", "bp", "fewer-bits", "fewer-bits@2"]
    printed = with_it([*words, "--output", "x.json"], with_method)
    assert "fewer-bits@2" in printed
    rows = {row["method"]: row for row in json.loads((with_method / "x.json").read_text())["rows"]}
    seeds = {name: row["seeds"][0] for name, row in rows.items()}
    assert seeds["fewer-bits"]["tape_bytes"] == seeds["fewer-bits"]["predicted_tape_bytes"] < seeds["bp"]["tape_bytes"]
    assert seeds["fewer-bits"]["loss"] != seeds["fewer-bits@2"]["loss"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "bp", "--bits", "10"], "--bits has no effect here: it needs one of fewer-bits"),
        (["--method", "fewer-bits", "--bits", "17"], "--bits is 17, expected a positive integer, at most 16"),
        (["--method", "fewer-bit"], "expected some of bp, "),
    ],
)
def test_its_options_are_checked_as_ours_are(words: list[str], says: str, with_method: Path) -> None:
    finished = run(["-m", "analysis.cost_model", "--net", "mlp", *words], None, with_method, "my_method")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert says in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_a_name_or_a_setting_that_is_taken(with_method: Path) -> None:
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
        (with_method / "wrong.py").write_text(text, encoding="utf-8")
        finished = run(COST, None, with_method, "wrong")
        assert finished.returncode == 2
        assert says in finished.stderr
        assert finished.stderr.count("\n") == 1
