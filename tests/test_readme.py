"""The README tells the truth: its example prints what it says, its commands are the ones that work."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
