"""The README tells the truth: its example prints what it says, its commands are the ones that work."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.M | re.S)


def test_the_example_prints_what_the_readme_says() -> None:
    """Each Python block is run; the text block that follows it is its output, to the letter."""
    text = README.read_text(encoding="utf-8")
    pairs = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", text, flags=re.M | re.S)
    assert pairs
    assert len(pairs) == len(blocks("python"))
    for code, expected in pairs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), {})
        assert printed.getvalue() == expected


def test_the_first_example_is_short() -> None:
    """A first example of more than 12 lines is not read."""
    code = blocks("python")[0].splitlines()
    assert len([line for line in code if line.strip()]) <= 12


def test_commands_are_stated_as_they_are_run() -> None:
    """The two commands stand in the README as whole lines that do their own set-up."""
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert "python -m pip install -e . && python -m analysis.cost_model --net mobilenetv2" in commands
    assert "python -m pip install -e '.[test]' && python -m pytest" in commands


def test_the_printed_totals_are_todays(capsys: pytest.CaptureFixture[str]) -> None:
    """The totals of the main job that the README shows are those that the command prints."""
    from analysis.cost_model import main

    assert main(["--net", "mobilenetv2"]) == 0
    printed = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    shown = next(block for block in blocks("text") if "tape + factors" in block)
    for line in shown.splitlines():
        if line.strip() and not set(line.strip()) <= set("─- "):
            assert " ".join(line.split()) in printed, line


def test_every_file_in_the_map_exists() -> None:
    """The map of files names nothing that is not there, and no module of the library is left out."""
    listing = next(block for block in blocks("text") if "lance_ref/" in block)
    named = set(re.findall(r"[\w/]+\.py|^\w+/", listing, flags=re.M))
    folders = ("", "lance_ref", "lance_ref/continual", "analysis", "benchmarks", "notebooks", "examples", "docs")
    for name in named:
        assert any((ROOT / folder / name).exists() for folder in folders), name
    modules = {p.name for folder in folders[1:4] for p in (ROOT / folder).glob("[!_]*.py")}
    assert modules <= named, modules - named


def test_what_is_written_of_own_networks_runs(tmp_path: Path) -> None:
    """Every block of docs/own_networks.md, one after the other in one folder; the export where PyTorch is installed."""
    text = (ROOT / "docs" / "own_networks.md").read_text(encoding="utf-8")
    can_export = all(importlib.util.find_spec(name) is not None for name in ("torch", "onnx"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    namespace = tmp_path / "blocks.py"
    ran: list[str] = []
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.M | re.S):
        file = re.match(r"# (\w+\.py)\n", code)
        if not can_export and ("torch.onnx" in code or "model.onnx" in code):
            continue
        if file is not None:
            (tmp_path / file[1]).write_text(code, encoding="utf-8")
            continue
        if language == "python":
            ran.append(code)  # those before it as well: they share their names
            namespace.write_text("\n".join(ran), encoding="utf-8")
            words = [sys.executable, namespace.name]
        else:
            words = [sys.executable, *shlex.split(code)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
    assert len(ran) == 3 + can_export
