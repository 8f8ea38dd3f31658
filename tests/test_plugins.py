"""A package that was never heard of here brings an operation and a network, and every command takes them."""

from __future__ import annotations

import csv
import json
import os
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
